//! Writes back what came of attempts, of all channels, many to a commit.

use std::time::Duration;

use rustc_hash::FxHashMap;
use tokio::sync::mpsc;

use super::{Done, Jitter, Shared};
use crate::{
    domain::{
        delivery::{Channel, RetryPolicy, Verdict},
        payment::Payment,
        time::Timestamp,
    },
    pace::{self, Pace},
    store::{Change, Commit, StoreError, UNREADABLE_MS, Versioned},
};

/// Results written back in one commit.
const BATCH: usize = 500;
/// Under load they wait for each other: what came of a payment's event and of its webhook then goes into one commit.
/// A crash in between has them attempted once more.
const WRITES: pace::Rules =
    pace::Rules { every: Duration::from_millis(20), busy: 16, company: BATCH, is_awaited: false };
/// Results that wait to be written back.
const QUEUE: usize = 4_096;
/// How often a result is tried against a payment that others change at the same time.
const TRIES: usize = 16;
/// A store that takes no writes just now is asked again after this.
const STORE_BUSY: Duration = Duration::from_millis(50);

/// When deliveries are tried again.
#[derive(Clone, Debug)]
pub struct Policies {
    /// Events and letters: tried without end.
    pub batched: RetryPolicy,
    pub webhook: RetryPolicy,
}

impl Policies {
    const fn of(&self, channel: Channel) -> &RetryPolicy {
        match channel {
            Channel::Event | Channel::DeadLetter => &self.batched,
            Channel::Webhook => &self.webhook,
        }
    }
}

pub struct Finisher {
    shared: Shared,
    policies: Policies,
    jitter: Jitter,
    done: mpsc::Receiver<Done>,
}

impl Finisher {
    pub fn new(shared: Shared, policies: Policies, jitter: Jitter) -> (Self, mpsc::Sender<Done>) {
        let (sender, done) = mpsc::channel(QUEUE);
        (Self { shared, policies, jitter, done }, sender)
    }

    /// Runs until every feeder is gone and all results are written.
    pub async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        let mut pace = Pace::new(WRITES);
        while self.done.recv_many(&mut batch, BATCH).await > 0 {
            if let Some(wait) = pace.wait(batch.len()) {
                tokio::time::sleep(wait).await;
                while batch.len() < BATCH
                    && let Ok(done) = self.done.try_recv()
                {
                    batch.push(done);
                }
            }
            pace.begin(batch.len());
            self.finish(std::mem::take(&mut batch)).await;
        }
    }

    async fn finish(&self, batch: Vec<Done>) {
        let mut left = by_payment(batch);
        let mut tries = 0;
        while !left.is_empty() && tries < TRIES {
            let written = match self.write(left).await {
                Ok(written) => written,
                Err(error) => {
                    // Nothing is lost: the deliveries are still owed and will be attempted again.
                    tracing::warn!(%error, "results of deliveries could not be written");
                    return;
                }
            };
            if written.busy {
                tokio::time::sleep(STORE_BUSY).await;
            } else {
                tries += 1;
            }
            left = written.left;
        }
    }

    async fn write(&self, groups: Vec<Vec<Done>>) -> Result<Written, StoreError> {
        let mut commits = Vec::with_capacity(groups.len());
        let mut sent = Vec::with_capacity(groups.len());
        let now = self.shared.now();
        for group in groups {
            let before = match self.shared.store.get(group[0].lease.id).await {
                Ok(Some(before)) => before,
                Ok(None) => continue,
                Err(StoreError::Corrupt(why)) => {
                    self.put_off(group, &why);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let Some(after) = self.apply(&before, &group, now) else { continue };
            commits.push(Commit { change: Some(Change::update(before, after)), reply: None });
            sent.push(group);
        }
        let answers = self.shared.store.commit(commits).await;
        let mut written = Written { left: Vec::new(), busy: false };
        for (group, answer) in sent.into_iter().zip(answers) {
            match answer {
                Ok(_) => drop(group),
                Err(StoreError::Conflict) => written.left.push(group),
                Err(StoreError::Overloaded | StoreError::Full) => {
                    written.left.push(group);
                    written.busy = true;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }

    fn put_off(&self, group: Vec<Done>, why: &str) {
        let until = self.shared.now().plus_ms(UNREADABLE_MS);
        for done in group {
            let payment = done.lease.id.intent();
            tracing::error!(payment, why, "what came of a delivery cannot be written down");
            done.lease.put_off(until);
        }
    }

    fn apply(&self, before: &Versioned, group: &[Done], now: Timestamp) -> Option<Payment> {
        group.iter().fold(None, |changed: Option<Payment>, done| {
            let payment = changed.as_ref().unwrap_or(&before.payment);
            let jitter = match done.attempted.verdict {
                Verdict::Retry { .. } => (self.jitter)(),
                // Nothing follows that is to be spread out.
                Verdict::Accepted | Verdict::Unavailable | Verdict::Refused => 0.0,
            };
            let after = payment.after_attempt(
                (done.n, done.channel),
                done.attempted.clone(),
                now,
                self.policies.of(done.channel),
                jitter,
            );
            after.or(changed)
        })
    }
}

/// What came of attempts at each payment's deliveries: they go into one commit.
fn by_payment(batch: Vec<Done>) -> Vec<Vec<Done>> {
    let mut groups: FxHashMap<_, Vec<Done>> = FxHashMap::default();
    for done in batch {
        groups.entry(done.lease.id).or_default().push(done);
    }
    groups.into_values().collect()
}

struct Written {
    /// Still to be written: the payment changed meanwhile, or the store was busy.
    left: Vec<Vec<Done>>,
    busy: bool,
}
