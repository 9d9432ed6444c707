//! Moves messages forward: owed deliveries are leased, attempted by their courier, and what came of
//! it is written back. At least once: an attempt whose result is lost is made again, with the same
//! id and the same bytes.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    clock::{Clock, Stopwatch},
    courier::{Courier, Death, Parcel, webhook::Origin},
    domain::{
        delivery::{Attempted, Channel, Delivery, RetryPolicy, Verdict},
        event,
        payment::Payment,
        time::Timestamp,
    },
    driver::Step,
    metrics::Metrics,
    store::{Change, Commit, Lease, Store, StoreError, Versioned, Work},
};

/// Results written back in one commit.
const FINISH_BATCH: usize = 500;
/// Results that wait to be written back.
const FINISH_QUEUE: usize = 4_096;
/// Webhooks leased in one step.
const LEASE_MAX: usize = 256;
/// A webhook whose receiver has no place free is looked at again after this.
const ORIGIN_BUSY_MS: u64 = 200;
/// Origins remembered; the idle ones are forgotten beyond it.
const ORIGINS_KEPT: usize = 10_000;
/// How often a result is tried against a payment that others change at the same time.
const TRIES: usize = 16;
/// The pause of a whole sink after a call without any success: doubled each time, up to here.
const SINK_PAUSE_MAX_MS: u64 = 60_000;
const SINK_PAUSE_BASE_MS: u64 = 500;

/// Where in 0 … 1 a wait is drawn.
pub type Jitter = Arc<dyn Fn() -> f64 + Send + Sync>;

/// What both feeders and the finisher need.
#[derive(Clone)]
pub struct Shared {
    pub store: Arc<dyn Store>,
    pub clock: Arc<dyn Clock>,
    pub metrics: Arc<Metrics>,
}

impl Shared {
    fn now(&self) -> Timestamp {
        Timestamp::from_ms(self.clock.now_ms())
    }

    /// The parcel that a lease is for; `None` where nothing is due any more.
    async fn parcel(&self, lease: &Lease, channel: Channel) -> Result<Option<Parcel>, StoreError> {
        let stored = self.store.get(lease.id).await?;
        Ok(stored.and_then(|stored| parcel(&stored.payment, channel, self.now())))
    }
}

fn parcel(payment: &Payment, channel: Channel, now: Timestamp) -> Option<Parcel> {
    let notification = payment.due_notification(channel, now)?;
    let terms = &payment.terms;
    Some(Parcel {
        payment: terms.id,
        n: notification.n,
        event_id: terms.id.event(notification.n),
        topic: notification.topic,
        at: notification.snapshot.at,
        url: terms.webhook_url.clone(),
        body: Bytes::from(event::body(terms, notification)),
        trace: terms.trace,
        death: match channel {
            Channel::Event | Channel::Webhook => None,
            Channel::DeadLetter => notification.webhook.as_ref().and_then(death),
        },
    })
}

fn death(webhook: &Delivery) -> Option<Death> {
    let (at, why) = webhook.death()?;
    Some(Death { at, why: why.to_owned(), attempts_made: webhook.attempts_made })
}

/// An attempt that is over, with the lease that is given back once it is written down.
pub struct Done {
    lease: Lease,
    n: u32,
    channel: Channel,
    attempted: Attempted,
}

/// Publishes events, a batch at a time.
pub struct Events {
    shared: Shared,
    courier: Arc<dyn Courier>,
    sink: &'static str,
    done: mpsc::Sender<Done>,
    failures: AtomicU32,
    paused_until_ms: AtomicI64,
}

impl Events {
    pub fn new(
        shared: Shared,
        courier: Arc<dyn Courier>,
        sink: &'static str,
        done: mpsc::Sender<Done>,
    ) -> Self {
        Self {
            shared,
            courier,
            sink,
            done,
            failures: AtomicU32::new(0),
            paused_until_ms: AtomicI64::new(0),
        }
    }

    async fn publish_due(&self) -> Result<usize, StoreError> {
        let now = self.shared.now();
        if now < Timestamp::from_ms(self.paused_until_ms.load(Ordering::Relaxed)) {
            return Ok(0);
        }
        let leases = self.shared.store.due(Work::Event, now, self.courier.batch_max()).await?;
        let mut parcels = Vec::with_capacity(leases.len());
        let mut held = Vec::with_capacity(leases.len());
        for lease in leases {
            if let Some(parcel) = self.shared.parcel(&lease, Channel::Event).await? {
                held.push((lease, parcel.n));
                parcels.push(parcel);
            }
        }
        if parcels.is_empty() {
            return Ok(0);
        }
        let attempts = self.courier.attempt(&parcels, now).await;
        self.note(&attempts, now);
        let count = held.len();
        for ((lease, n), attempted) in held.into_iter().zip(attempts) {
            let done = Done { lease, n, channel: Channel::Event, attempted };
            if self.done.send(done).await.is_err() {
                break;
            }
        }
        Ok(count)
    }

    /// Counts the attempts, and pauses the sink when none of them succeeded.
    fn note(&self, attempts: &[Attempted], now: Timestamp) {
        let mut retried = 0;
        let mut accepted = 0;
        for attempted in attempts {
            let result = match attempted.verdict {
                Verdict::Accepted => {
                    accepted += 1;
                    "published"
                }
                Verdict::Retry { .. } | Verdict::Unavailable => {
                    retried += 1;
                    "retry"
                }
                Verdict::Refused => "dead",
            };
            self.shared.metrics.event_published(self.sink, result, 1);
        }
        if accepted > 0 || retried == 0 {
            self.failures.store(0, Ordering::Relaxed);
            return;
        }
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).min(16);
        let pause = (SINK_PAUSE_BASE_MS << failures).min(SINK_PAUSE_MAX_MS);
        self.paused_until_ms.store(now.plus_ms(pause).ms(), Ordering::Relaxed);
        let error = attempts.iter().find_map(|a| a.attempt.error.as_deref()).unwrap_or("");
        tracing::warn!(sink = self.sink, error, pause_ms = pause, "events could not be published");
    }
}

#[async_trait]
impl Step for Events {
    fn work(&self) -> Work {
        Work::Event
    }

    async fn step(&self) -> usize {
        self.publish_due().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "owed events could not be read");
            0
        })
    }

    fn resumes_at(&self) -> Option<Timestamp> {
        Some(Timestamp::from_ms(self.paused_until_ms.load(Ordering::Relaxed)))
    }
}

/// How many webhooks are in flight at most.
#[derive(Clone, Copy, Debug)]
pub struct WebhookLimits {
    pub concurrency: usize,
    pub origin_concurrency: usize,
}

/// Posts webhooks, each by itself, so that a receiver that hangs holds up no other.
pub struct Webhooks {
    shared: Shared,
    courier: Arc<dyn Courier>,
    limits: WebhookLimits,
    slots: Arc<Semaphore>,
    origins: Mutex<HashMap<Origin, Arc<Semaphore>>>,
    attempts: TaskTracker,
    /// Ends the attempts in flight; what they carry stays owed.
    abandon: CancellationToken,
    done: mpsc::Sender<Done>,
}

impl Webhooks {
    pub fn new(
        shared: Shared,
        courier: Arc<dyn Courier>,
        limits: WebhookLimits,
        done: mpsc::Sender<Done>,
    ) -> Self {
        Self {
            shared,
            courier,
            limits,
            slots: Arc::new(Semaphore::new(limits.concurrency)),
            origins: Mutex::default(),
            attempts: TaskTracker::new(),
            abandon: CancellationToken::new(),
            done,
        }
    }

    /// Waits for the attempts in flight, and abandons those that take longer; false: there were some.
    pub async fn drain(&self, grace: Duration) -> bool {
        self.attempts.close();
        let ended = tokio::time::timeout(grace, self.attempts.wait()).await.is_ok();
        self.abandon.cancel();
        self.attempts.wait().await;
        ended
    }

    async fn post_due(&self) -> Result<usize, StoreError> {
        let now = self.shared.now();
        let free = self.slots.available_permits().min(LEASE_MAX);
        if free == 0 {
            return Ok(0);
        }
        let mut started = 0;
        for lease in self.shared.store.due(Work::Webhook, now, free).await? {
            let Some(parcel) = self.shared.parcel(&lease, Channel::Webhook).await? else {
                continue;
            };
            match self.permits(&parcel) {
                Some(permits) => {
                    self.start(lease, parcel, permits);
                    started += 1;
                }
                None => lease.put_off(now.plus_ms(ORIGIN_BUSY_MS)),
            }
        }
        Ok(started)
    }

    /// A place in all and one at the origin; `None` while either is full.
    fn permits(
        &self,
        parcel: &Parcel,
    ) -> Option<(OwnedSemaphorePermit, Option<OwnedSemaphorePermit>)> {
        let slot = Arc::clone(&self.slots).try_acquire_owned().ok()?;
        let Some(origin) = parcel.url.as_deref().and_then(crate::courier::webhook::origin) else {
            return Some((slot, None));
        };
        let mut origins = self.origins.lock().unwrap_or_else(PoisonError::into_inner);
        if origins.len() >= ORIGINS_KEPT {
            origins.retain(|_, places| places.available_permits() < self.limits.origin_concurrency);
        }
        let places = origins
            .entry(origin)
            .or_insert_with(|| Arc::new(Semaphore::new(self.limits.origin_concurrency)));
        Some((slot, Some(Arc::clone(places).try_acquire_owned().ok()?)))
    }

    fn start(
        &self,
        lease: Lease,
        parcel: Parcel,
        permits: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
    ) {
        let (shared, courier, done) =
            (self.shared.clone(), Arc::clone(&self.courier), self.done.clone());
        let abandon = self.abandon.clone();
        self.attempts.spawn(async move {
            let n = parcel.n;
            let took = Stopwatch::start();
            let attempt = courier.attempt(std::slice::from_ref(&parcel), shared.now());
            let attempted =
                abandon.run_until_cancelled(attempt).await.and_then(|mut all| all.pop());
            drop(permits);
            let Some(attempted) = attempted else { return };
            let result = match attempted.verdict {
                Verdict::Accepted => "delivered",
                Verdict::Retry { .. } | Verdict::Unavailable => "retry",
                Verdict::Refused => "dead",
            };
            shared.metrics.webhook_attempted(result, took.elapsed());
            // Only gone when the process ends; the webhook is then still owed.
            let _ = done.send(Done { lease, n, channel: Channel::Webhook, attempted }).await;
        });
    }
}

#[async_trait]
impl Step for Webhooks {
    fn work(&self) -> Work {
        Work::Webhook
    }

    async fn step(&self) -> usize {
        self.post_due().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "owed webhooks could not be read");
            0
        })
    }
}

/// When deliveries are tried again.
#[derive(Clone, Debug)]
pub struct Policies {
    pub event: RetryPolicy,
    pub webhook: RetryPolicy,
}

impl Policies {
    pub const fn event() -> RetryPolicy {
        RetryPolicy {
            max_attempts: None,
            backoff_base: Duration::from_millis(SINK_PAUSE_BASE_MS),
            backoff_max: Duration::from_millis(SINK_PAUSE_MAX_MS),
            dead_letters: false,
        }
    }

    const fn of(&self, channel: Channel) -> &RetryPolicy {
        match channel {
            Channel::Event | Channel::DeadLetter => &self.event,
            Channel::Webhook => &self.webhook,
        }
    }
}

/// Writes back what came of attempts, of both channels, many to a commit.
pub struct Finisher {
    shared: Shared,
    policies: Policies,
    jitter: Jitter,
    done: mpsc::Receiver<Done>,
}

impl Finisher {
    pub fn new(shared: Shared, policies: Policies, jitter: Jitter) -> (Self, mpsc::Sender<Done>) {
        let (sender, done) = mpsc::channel(FINISH_QUEUE);
        (Self { shared, policies, jitter, done }, sender)
    }

    /// Runs until every feeder is gone and all results are written.
    pub async fn run(mut self) {
        let mut batch = Vec::with_capacity(FINISH_BATCH);
        while self.done.recv_many(&mut batch, FINISH_BATCH).await > 0 {
            self.finish(std::mem::take(&mut batch)).await;
        }
    }

    async fn finish(&self, batch: Vec<Done>) {
        let mut by_payment: HashMap<_, Vec<Done>> = HashMap::new();
        for done in batch {
            by_payment.entry(done.lease.id).or_default().push(done);
        }
        let mut left: Vec<Vec<Done>> = by_payment.into_values().collect();
        for _ in 0..TRIES {
            left = match self.write(left).await {
                Ok(left) if left.is_empty() => return,
                Ok(left) => left,
                Err(error) => {
                    // Nothing is lost: the deliveries are still owed and will be attempted again.
                    tracing::warn!(%error, "results of deliveries could not be written");
                    return;
                }
            };
        }
    }

    /// Those whose payment changed meanwhile come back.
    async fn write(&self, groups: Vec<Vec<Done>>) -> Result<Vec<Vec<Done>>, StoreError> {
        let mut commits = Vec::with_capacity(groups.len());
        let mut written = Vec::with_capacity(groups.len());
        for group in groups {
            let Some(before) = self.shared.store.get(group[0].lease.id).await? else { continue };
            let Some(after) = self.apply(&before, &group) else { continue };
            commits.push(Commit { change: Some(Change::Update { before, after }), reply: None });
            written.push(group);
        }
        let answers = self.shared.store.commit(commits).await;
        let mut again = Vec::new();
        for (group, answer) in written.into_iter().zip(answers) {
            match answer {
                Ok(_) => drop(group),
                Err(StoreError::Conflict) => again.push(group),
                Err(error) => return Err(error),
            }
        }
        Ok(again)
    }

    fn apply(&self, before: &Versioned, group: &[Done]) -> Option<Payment> {
        let now = self.shared.now();
        group.iter().fold(None, |changed: Option<Payment>, done| {
            let payment = changed.as_ref().unwrap_or(&before.payment);
            let after = payment.after_attempt(
                (done.n, done.channel),
                done.attempted.clone(),
                now,
                self.policies.of(done.channel),
                (self.jitter)(),
            );
            after.or(changed)
        })
    }
}
