//! The one loop behind scheduler and outbox: lease → step → finish, then sleep until something is due.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::{
    clock::Clock,
    domain::time::Timestamp,
    store::{Store, Work},
};

/// The store is asked so often even if nothing wakes the loop: a wake-up is a hint, not the truth.
const POLL_EVERY_MS: u64 = 1_000;
/// Something is due and yet could not be taken (a full disk, a busy receiver): ask again this soon.
const BLOCKED: Duration = Duration::from_millis(50);

#[async_trait]
pub trait Step: Send + Sync + 'static {
    fn work(&self) -> Work;

    /// Takes what is due now and does it, as much as fits; how much it took.
    async fn step(&self) -> usize;

    /// Nothing is taken before this.
    fn resumes_at(&self) -> Option<Timestamp> {
        None
    }

    /// There may be something to do then, whatever the store says is due.
    fn wakes_at(&self) -> Option<Timestamp> {
        None
    }
}

/// After a step that failed. What it had leased is given back, which wakes the loop at once: without a
/// pause it would spin, and keep its thread from everything else.
pub async fn pause_after_failure() {
    tokio::time::sleep(BLOCKED).await;
}

/// Runs until cancelled. It may stop between any two steps without losing or doubling anything.
pub async fn drive(
    step: &dyn Step,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) {
    let changed = store.changed(step.work());
    while !stop.is_cancelled() {
        // Listening starts before the look, so that a change in between is not missed.
        let woken = changed.notified();
        let looked_at = Timestamp::from_ms(clock.now_ms());
        if step.step().await > 0 {
            continue;
        }
        let now = Timestamp::from_ms(clock.now_ms());
        let poll = now.plus_ms(POLL_EVERY_MS);
        let due = store.next_due(step.work()).unwrap_or(poll);
        let due = step.resumes_at().map_or(due, |at| at.max(due));
        let wake_at = step.wakes_at().map_or(due, |at| at.min(due)).min(poll);
        let until_due = async {
            // Of what has fallen due only since, the step cannot have known: it looks again at once.
            if wake_at <= looked_at {
                tokio::time::sleep(BLOCKED).await;
            } else {
                clock.sleep_until_ms(wake_at.ms()).await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = woken => {}
            () = until_due => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        sync::atomic::{AtomicUsize, Ordering},
        task::Poll,
    };

    use super::*;
    use crate::{
        clock::ManualClock,
        store::{self, Location, Options, Retention},
    };

    const START: Timestamp = Timestamp::from_ms(1_767_225_600_000);

    /// Finds nothing, and takes so long over it that something has fallen due when it is done.
    struct Slow {
        clock: Arc<ManualClock>,
        due: Timestamp,
        steps: AtomicUsize,
    }

    #[async_trait]
    impl Step for Slow {
        fn work(&self) -> Work {
            Work::Webhook
        }

        async fn step(&self) -> usize {
            if self.steps.fetch_add(1, Ordering::Relaxed) == 0 {
                self.clock.set_ms(self.due.ms());
            }
            0
        }

        fn wakes_at(&self) -> Option<Timestamp> {
            Some(self.due)
        }
    }

    fn empty_store(clock: Arc<dyn Clock>) -> Arc<dyn Store> {
        let day = Duration::from_secs(86_400);
        let options = Options {
            retention: Retention { payments: day, idempotency: day, payments_max: None },
            clock,
            on_commit: Arc::new(|_, _| {}),
            on_dropped_early: Arc::new(|_| {}),
        };
        store::open(&Location::Memory, options).unwrap()
    }

    #[tokio::test]
    async fn what_falls_due_during_a_step_is_looked_for_at_once_and_then_again_later() {
        let clock = Arc::new(ManualClock::at_ms(START.ms()));
        let store = empty_store(Arc::clone(&clock) as _);
        let step =
            Slow { clock: Arc::clone(&clock), due: START.plus_ms(5), steps: AtomicUsize::new(0) };
        let stop = CancellationToken::new();
        let mut driving = pin!(drive(&step, store, clock, stop));
        // One poll: as far as it comes without waiting for anything.
        let poll = std::future::poll_fn(|cx| Poll::Ready(driving.as_mut().poll(cx))).await;
        assert!(poll.is_pending());
        assert_eq!(step.steps.load(Ordering::Relaxed), 2, "the second saw it and took nothing");
    }
}
