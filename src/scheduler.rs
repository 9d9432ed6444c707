//! Moves time forward: payments whose moment has come are woken, a batch to a commit.

use std::sync::Arc;

use async_trait::async_trait;

use crate::{
    app,
    clock::Clock,
    domain::{
        payment::{Command, Payment},
        time::Timestamp,
    },
    driver::{self, Step},
    metrics::Metrics,
    store::{Change, Commit, Committed, Store, StoreError, Work},
};

/// Payments woken in one commit.
const BATCH: usize = 500;

pub struct Scheduler {
    pub store: Arc<dyn Store>,
    pub clock: Arc<dyn Clock>,
    pub metrics: Arc<Metrics>,
}

#[async_trait]
impl Step for Scheduler {
    fn work(&self) -> Work {
        Work::Wake
    }

    async fn step(&self) -> usize {
        match self.wake_due().await {
            Ok(taken) => taken,
            Err(error) => {
                tracing::warn!(%error, "due payments could not be woken");
                driver::pause_after_failure().await;
                0
            }
        }
    }
}

impl Scheduler {
    async fn wake_due(&self) -> Result<usize, StoreError> {
        let now = Timestamp::from_ms(self.clock.now_ms());
        let leases = self.store.due(Work::Wake, now, BATCH).await?;
        let mut commits = Vec::with_capacity(leases.len());
        let mut woken = Vec::with_capacity(leases.len());
        // Held to the end of the step: nobody else takes these payments meanwhile.
        let mut held = Vec::with_capacity(leases.len());
        for lease in leases {
            let Some((before, lease)) = lease.read(&*self.store, now).await? else { continue };
            held.push(lease);
            let Some(after) = before.payment.transition(Command::Wake, now).changed else {
                continue;
            };
            woken.push((before.payment.clone(), after.clone()));
            commits.push(Commit { change: Some(Change::update(before, after)), reply: None });
        }
        #[cfg(feature = "faults")]
        let again = crate::faults::wakes_again(&commits);
        let answers = self.store.commit(commits).await;
        #[cfg(feature = "faults")]
        crate::faults::wake_again(&*self.store, again).await;
        self.count(woken, answers)
    }

    /// How many were woken, now that it is durable; the first error that was no race.
    fn count(
        &self,
        woken: Vec<(Payment, Payment)>,
        answers: Vec<Result<Committed, StoreError>>,
    ) -> Result<usize, StoreError> {
        let now = Timestamp::from_ms(self.clock.now_ms());
        let mut done = 0;
        let mut failed = None;
        for ((before, after), answer) in woken.into_iter().zip(answers) {
            match answer {
                Ok(Committed::Done(_)) => {
                    done += 1;
                    let due = before.progress.state.wakes_at().unwrap_or(now);
                    self.metrics.decision_lag(now.since(due));
                    app::count_outcome(&self.metrics, Some(&before), &after);
                }
                // Somebody else was quicker; if anything is left to do it is still due.
                Ok(Committed::Replayed(_)) | Err(StoreError::Conflict) => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(done), Err)
    }
}
