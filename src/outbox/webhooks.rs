//! Posts webhooks, each by itself, so that a receiver that hangs holds up no other.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{Notify, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Claim, Done, Shared, drain,
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
    recent::Recent,
    store::{Lease, StoreError, Work},
};

/// Webhooks leased in one step.
const LEASE_MAX: usize = 256;
/// Webhooks of the lanes that are begun or withheld in one step: whatever falls due meanwhile is looked at
/// in between, however long a lane is.
const STEP_MAX: usize = 256;
/// Up to so many that wait for a place stay in memory; the others are read again.
const READ_KEPT: usize = 1_024;
const ORIGIN_DOWN: &str = "ORIGIN_DOWN";

/// What waits for a place: leased, so that nobody else looks at it meanwhile. As many as the store
/// keeps open payments in memory, at some fifty bytes each.
enum Waiting {
    Read(Box<Claim>),
    Leased(Lease),
}

pub struct Webhooks {
    sender: Arc<Sender>,
    attempts: TaskTracker,
}

/// What an attempt needs, in one handle: there are tens of thousands a second.
struct Sender {
    shared: Shared,
    courier: Arc<dyn Courier>,
    lanes: Mutex<Lanes<Waiting>>,
    origins: Recent<Option<Origin>>,
    /// Wakes the loop when a place is free that somebody waits for.
    freed: Arc<Notify>,
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
        let freed = shared.store.changed(Work::Webhook);
        let sender = Sender {
            shared,
            courier,
            lanes: Mutex::new(Lanes::new(limits)),
            origins: Recent::default(),
            freed,
            abandon: CancellationToken::new(),
            done,
        };
        Self { sender: Arc::new(sender), attempts: TaskTracker::new() }
    }

    /// Waits for the attempts in flight, and abandons those that take longer; false: there were some.
    pub async fn drain(&self, grace: Duration) -> bool {
        drain(&self.attempts, &self.sender.abandon, grace).await
    }

    async fn post_due(&self) -> Result<usize, StoreError> {
        let shared = &self.sender.shared;
        if !shared.can_finish() {
            return Ok(0);
        }
        let now = shared.now();
        let taken_in = self.take_in(now).await?;
        let mut gone = 0;
        while gone < STEP_MAX
            && let Some((origin, waiting, turn)) = self.next(now)
        {
            gone += 1;
            let place = Place::new(&self.sender, origin, turn);
            let claim = match waiting {
                Waiting::Read(claim) => Some(*claim),
                Waiting::Leased(lease) => shared.claim(lease, now).await?,
            };
            let Some(claim) = claim else { continue };
            let Some(parcel) = claim.parcel(&shared.bodies, Channel::Webhook, now) else {
                continue;
            };
            match place {
                Some(place) => self.start(claim.lease, parcel, place, now),
                None => self.withhold(claim.lease, parcel.n, now).await,
            }
        }
        Ok(taken_in + gone)
    }

    /// Puts what is due into the lanes of its origins.
    async fn take_in(&self, now: Timestamp) -> Result<usize, StoreError> {
        let shared = &self.sender.shared;
        let leases = shared.store.due(Work::Webhook, now, LEASE_MAX).await?;
        let count = leases.len();
        for lease in leases {
            let Some(claim) = shared.claim(lease, now).await? else { continue };
            let url = claim.stored.payment.terms.webhook_url.as_deref();
            let origin = url.and_then(|url| self.sender.origins.get(url, origin));
            let origin = origin.unwrap_or_else(nowhere);
            let mut lanes = self.sender.lanes();
            let waiting = match lanes.waiting() < READ_KEPT {
                true => Waiting::Read(Box::new(claim)),
                false => Waiting::Leased(claim.lease),
            };
            lanes.push(origin, waiting, now);
        }
        Ok(count)
    }

    fn next(&self, now: Timestamp) -> Option<(Origin, Waiting, Turn)> {
        self.sender.lanes().next(now)
    }

    fn start(&self, lease: Lease, parcel: Parcel, mut place: Place, now: Timestamp) {
        self.attempts.spawn(async move {
            let sender = Arc::clone(&place.sender);
            let took = Stopwatch::start();
            let attempt = sender.courier.attempt(std::slice::from_ref(&parcel), now);
            let attempted =
                sender.abandon.run_until_cancelled(attempt).await.and_then(|mut all| all.pop());
            let Some(attempted) = attempted else { return };
            let (result, sign) = match attempted.verdict {
                Verdict::Accepted => ("delivered", Sign::Healthy),
                Verdict::Retry { .. } | Verdict::Unavailable => ("retry", Sign::Failing),
                // Of this webhook alone: gone, or not allowed.
                Verdict::Refused => ("dead", Sign::None),
            };
            place.sign = sign;
            drop(place);
            sender.shared.metrics.webhook_attempted(result, took.elapsed());
            // Only gone when the process ends; the webhook is then still owed.
            let channel = Channel::Webhook;
            let _ = sender.done.send(Done { lease, n: parcel.n, channel, attempted }).await;
        });
    }

    /// Counts an attempt that was not made, so that what goes to a dead origin dies on schedule.
    async fn withhold(&self, lease: Lease, n: u32, now: Timestamp) {
        self.sender.shared.metrics.webhook_withheld();
        let error = Some(ORIGIN_DOWN.to_owned());
        let attempt = Attempt { at: now, http_status: None, latency_ms: 0, error };
        let attempted = Attempted { attempt, verdict: Verdict::Retry { not_before: None } };
        let channel = Channel::Webhook;
        // As above.
        let _ = self.sender.done.send(Done { lease, n, channel, attempted }).await;
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
        self.sender.lanes().wakes_at()
    }
}

impl Sender {
    fn lanes(&self) -> MutexGuard<'_, Lanes<Waiting>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place at an origin, given back when the attempt is over, however it ends.
struct Place {
    sender: Arc<Sender>,
    origin: Origin,
    sign: Sign,
}

impl Place {
    /// `None` for one that is not attempted.
    fn new(sender: &Arc<Sender>, origin: Origin, turn: Turn) -> Option<Self> {
        let place = || Self { sender: Arc::clone(sender), origin, sign: Sign::None };
        (turn == Turn::Attempt).then(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lanes = self.sender.lanes();
        lanes.ended(&self.origin, self.sign, self.sender.shared.now());
        let somebody_waits = lanes.waiting() > 0;
        drop(lanes);
        if somebody_waits {
            self.sender.freed.notify_one();
        }
    }
}
