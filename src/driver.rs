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
        if step.step().await > 0 {
            continue;
        }
        let now = Timestamp::from_ms(clock.now_ms());
        let poll = now.plus_ms(POLL_EVERY_MS);
        let due = store.next_due(step.work()).unwrap_or(poll);
        let due = step.resumes_at().map_or(due, |at| at.max(due));
        let wake_at = step.wakes_at().map_or(due, |at| at.min(due)).min(poll);
        let until_due = async {
            if wake_at <= now {
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
