//! Writes back what came of attempts, of all channels, many to a commit.

use std::time::Duration;

use rustc_hash::FxHashMap;
use tokio::sync::mpsc;

use super::{Claim, Done, Jitter, Shared};
use crate::{
    domain::{
        delivery::{Attempted, Channel, RetryPolicy},
        ids::PaymentId,
        payment::Payment,
        time::Timestamp,
    },
    store::{Change, Commit, Committed, Lease, Revision, StoreError, UNREADABLE_MS, Versioned},
};

/// Results written back in one commit.
const BATCH: usize = 500;
/// Results that wait to be written back.
const QUEUE: usize = 4_096;
/// How often a result is tried against a payment that others change at the same time.
const TRIES: usize = 16;
/// Payments kept as they were last written; forgetting them costs a read each.
const WRITTEN_KEPT: usize = 1_024;
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
    /// Payments that owe something else just now: what comes of that was claimed before this was written.
    written: FxHashMap<PaymentId, Versioned>,
}

impl Finisher {
    pub fn new(shared: Shared, policies: Policies, jitter: Jitter) -> (Self, mpsc::Sender<Done>) {
        let (sender, done) = mpsc::channel(QUEUE);
        (Self { shared, policies, jitter, done, written: FxHashMap::default() }, sender)
    }

    /// Runs until every feeder is gone and all results are written.
    pub async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        while self.done.recv_many(&mut batch, BATCH).await > 0 {
            self.finish(std::mem::take(&mut batch)).await;
        }
    }

    async fn finish(&mut self, batch: Vec<Done>) {
        let mut left = self.group(batch);
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

    fn group(&mut self, batch: Vec<Done>) -> Vec<Group> {
        let mut groups: FxHashMap<_, Group> = FxHashMap::default();
        groups.reserve(batch.len());
        for Done { claim: Claim { lease, stored }, n, channel, attempted } in batch {
            let id = lease.id;
            let written = &mut self.written;
            let group = groups.entry(id).or_insert_with(|| Group {
                before: written.remove(&id),
                results: Vec::with_capacity(1),
            });
            if group.before.as_ref().is_none_or(|before| before.revision < stored.revision) {
                group.before = Some(stored);
            }
            group.results.push(Finished { lease, n, channel, attempted });
        }
        groups.into_values().collect()
    }

    async fn write(&mut self, groups: Vec<Group>) -> Result<Written, StoreError> {
        let mut commits = Vec::with_capacity(groups.len());
        let mut sent = Vec::with_capacity(groups.len());
        let now = self.shared.now();
        for mut group in groups {
            let before = match self.before(&mut group).await {
                Ok(Some(before)) => before,
                Ok(None) => continue,
                Err(StoreError::Corrupt(why)) => {
                    self.put_off(group, &why);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let Some(after) = self.apply(&before, &group, now) else { continue };
            let is_due = |channel: &Channel| after.due_notification(*channel, now).is_some();
            let kept = Channel::ALL.iter().any(is_due).then(|| after.clone());
            commits.push(Commit { change: Some(Change::Update { before, after }), reply: None });
            sent.push((group, kept));
        }
        let answers = self.shared.store.commit(commits).await;
        let mut written = Written { left: Vec::new(), busy: false };
        for ((group, kept), answer) in sent.into_iter().zip(answers) {
            match answer {
                Ok(Committed::Done(revision)) => {
                    if let Some(payment) = kept {
                        self.keep(payment, revision);
                    }
                }
                // Nothing here has a key.
                Ok(Committed::Replayed(_)) => {}
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

    /// What the results of a group are to change; `None`: it is gone.
    async fn before(&self, group: &mut Group) -> Result<Option<Versioned>, StoreError> {
        match group.before.take() {
            Some(before) => Ok(Some(before)),
            None => self.shared.store.get(group.results[0].lease.id).await,
        }
    }

    fn keep(&mut self, payment: Payment, revision: Revision) {
        if self.written.len() == WRITTEN_KEPT {
            self.written.clear();
        }
        self.written.insert(payment.terms.id, Versioned { payment, revision });
    }

    fn put_off(&self, group: Group, why: &str) {
        let until = self.shared.now().plus_ms(UNREADABLE_MS);
        for finished in group.results {
            let payment = finished.lease.id.intent();
            tracing::error!(payment, why, "what came of a delivery cannot be written down");
            finished.lease.put_off(until);
        }
    }

    fn apply(&self, before: &Versioned, group: &Group, now: Timestamp) -> Option<Payment> {
        group.results.iter().fold(None, |changed: Option<Payment>, finished| {
            let payment = changed.as_ref().unwrap_or(&before.payment);
            let after = payment.after_attempt(
                (finished.n, finished.channel),
                finished.attempted.clone(),
                now,
                self.policies.of(finished.channel),
                (self.jitter)(),
            );
            after.or(changed)
        })
    }
}

/// What came of attempts at one payment's deliveries.
struct Group {
    /// The payment as far as is known; `None`: to be read.
    before: Option<Versioned>,
    results: Vec<Finished>,
}

struct Finished {
    lease: Lease,
    n: u32,
    channel: Channel,
    attempted: Attempted,
}

struct Written {
    /// Still to be written: the payment changed meanwhile, or the store was busy.
    left: Vec<Group>,
    busy: bool,
}
