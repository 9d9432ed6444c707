//! Posts webhooks, each by itself, so that a receiver that hangs holds up no other.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{Notify, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Done, Shared, drain,
    lanes::{Lanes, Limits, Sign, Turn},
};
use crate::{
    clock::Stopwatch,
    courier::{Courier, Origin, Parcel, origin},
    domain::{
        delivery::{Attempt, Attempted, Channel, Verdict},
        time::Timestamp,
    },
    driver::{self, Step},
    store::{Lease, StoreError, Work},
};

/// Webhooks leased in one step.
const LEASE_MAX: usize = 256;
/// Webhooks of the lanes that are begun or withheld in one step: whatever falls due meanwhile is looked at
/// in between, however long a lane is.
const STEP_MAX: usize = 256;
/// Up to so many that wait for a place keep their parcel; the others are read again.
const PARCELS_KEPT: usize = 1_024;
const ORIGIN_DOWN: &str = "ORIGIN_DOWN";

/// What waits for a place: leased, so that nobody else looks at it meanwhile. As many as the store
/// keeps open payments in memory, at some fifty bytes each.
struct Waiting {
    lease: Lease,
    parcel: Option<Box<Parcel>>,
}

type SharedLanes = Arc<Mutex<Lanes<Waiting>>>;

pub struct Webhooks {
    shared: Shared,
    courier: Arc<dyn Courier>,
    lanes: SharedLanes,
    attempts: TaskTracker,
    /// Ends the attempts in flight; what they carry stays owed.
    abandon: CancellationToken,
    done: mpsc::Sender<Done>,
}

impl Webhooks {
    pub fn new(
        shared: Shared,
        courier: Arc<dyn Courier>,
        limits: Limits,
        done: mpsc::Sender<Done>,
    ) -> Self {
        Self {
            shared,
            courier,
            lanes: Arc::new(Mutex::new(Lanes::new(limits))),
            attempts: TaskTracker::new(),
            abandon: CancellationToken::new(),
            done,
        }
    }

    /// Waits for the attempts in flight, and abandons those that take longer; false: there were some.
    pub async fn drain(&self, grace: Duration) -> bool {
        drain(&self.attempts, &self.abandon, grace).await
    }

    async fn post_due(&self) -> Result<usize, StoreError> {
        if !self.shared.can_finish() {
            return Ok(0);
        }
        let now = self.shared.now();
        let taken_in = self.take_in(now).await?;
        let mut gone = 0;
        while gone < STEP_MAX
            && let Some((origin, waiting, turn)) = self.next(now)
        {
            gone += 1;
            let place = Place::new(self, origin, turn);
            let read = match waiting.parcel {
                Some(parcel) => Some((waiting.lease, *parcel)),
                None => self.shared.parcel(waiting.lease, Channel::Webhook, now).await?,
            };
            let Some((lease, parcel)) = read else { continue };
            match place {
                Some(place) => self.start(lease, parcel, place, now),
                None => self.withhold(lease, parcel.n, now).await,
            }
        }
        Ok(taken_in + gone)
    }

    /// Puts what is due into the lanes of its origins.
    async fn take_in(&self, now: Timestamp) -> Result<usize, StoreError> {
        let leases = self.shared.store.due(Work::Webhook, now, LEASE_MAX).await?;
        let count = leases.len();
        for lease in leases {
            let read = self.shared.parcel(lease, Channel::Webhook, now).await?;
            let Some((lease, parcel)) = read else { continue };
            let origin = parcel.url.as_deref().and_then(origin).unwrap_or_else(nowhere);
            let mut lanes = self.lanes();
            let parcel = (lanes.waiting() < PARCELS_KEPT).then(|| Box::new(parcel));
            lanes.push(origin, Waiting { lease, parcel }, now);
        }
        Ok(count)
    }

    fn next(&self, now: Timestamp) -> Option<(Origin, Waiting, Turn)> {
        self.lanes().next(now)
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes<Waiting>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, lease: Lease, parcel: Parcel, mut place: Place, now: Timestamp) {
        let (shared, courier, done) =
            (self.shared.clone(), Arc::clone(&self.courier), self.done.clone());
        let abandon = self.abandon.clone();
        self.attempts.spawn(async move {
            let took = Stopwatch::start();
            let attempt = courier.attempt(std::slice::from_ref(&parcel), now);
            let attempted =
                abandon.run_until_cancelled(attempt).await.and_then(|mut all| all.pop());
            let Some(attempted) = attempted else { return };
            let (result, sign) = match attempted.verdict {
                Verdict::Accepted => ("delivered", Sign::Healthy),
                Verdict::Retry { .. } | Verdict::Unavailable => ("retry", Sign::Failing),
                // Of this webhook alone: gone, or not allowed.
                Verdict::Refused => ("dead", Sign::None),
            };
            place.sign = sign;
            drop(place);
            shared.metrics.webhook_attempted(result, took.elapsed());
            // Only gone when the process ends; the webhook is then still owed.
            let channel = Channel::Webhook;
            let _ = done.send(Done { lease, n: parcel.n, channel, attempted }).await;
        });
    }

    /// Counts an attempt that was not made, so that what goes to a dead origin dies on schedule.
    async fn withhold(&self, lease: Lease, n: u32, now: Timestamp) {
        self.shared.metrics.webhook_withheld();
        let error = Some(ORIGIN_DOWN.to_owned());
        let attempt = Attempt { at: now, http_status: None, latency_ms: 0, error };
        let attempted = Attempted { attempt, verdict: Verdict::Retry { not_before: None } };
        let channel = Channel::Webhook;
        // As above.
        let _ = self.done.send(Done { lease, n, channel, attempted }).await;
    }
}

/// Whose URL names no origin; the attempt itself refuses it.
const fn nowhere() -> Origin {
    Origin { scheme: String::new(), host: String::new(), port: 0 }
}

#[async_trait]
impl Step for Webhooks {
    fn work(&self) -> Work {
        Work::Webhook
    }

    async fn step(&self) -> usize {
        match self.post_due().await {
            Ok(taken) => taken,
            Err(error) => {
                tracing::warn!(%error, "owed webhooks could not be read");
                driver::pause_after_failure().await;
                0
            }
        }
    }

    fn wakes_at(&self) -> Option<Timestamp> {
        self.lanes().wakes_at()
    }
}

/// A place at an origin, given back when the attempt is over, however it ends.
struct Place {
    lanes: SharedLanes,
    shared: Shared,
    freed: Arc<Notify>,
    origin: Origin,
    sign: Sign,
}

impl Place {
    /// `None` for one that is not attempted.
    fn new(webhooks: &Webhooks, origin: Origin, turn: Turn) -> Option<Self> {
        (turn == Turn::Attempt).then(|| Self {
            lanes: Arc::clone(&webhooks.lanes),
            shared: webhooks.shared.clone(),
            freed: webhooks.shared.store.changed(Work::Webhook),
            origin,
            sign: Sign::None,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.ended(&self.origin, self.sign, self.shared.now());
        drop(lanes);
        self.freed.notify_one();
    }
}
