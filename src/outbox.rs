//! Moves messages forward: owed deliveries are leased, attempted by their courier, and what came of
//! it is written back. At least once: an attempt whose result is lost is made again, with the same
//! id and the same bytes.

mod batches;
mod bodies;
mod finisher;
mod lanes;
mod webhooks;

use std::{sync::Arc, time::Duration};

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::bodies::Bodies;
pub use self::{
    batches::{Batches, Mail, RETRIES},
    finisher::{Finisher, Policies},
    lanes::Limits as WebhookLimits,
    webhooks::Webhooks,
};
use crate::{
    clock::Clock,
    courier::{Death, Parcel},
    domain::{
        delivery::{Attempted, Channel, Delivery},
        time::Timestamp,
    },
    metrics::Metrics,
    store::{Health, Lease, Store, StoreError, Versioned},
};

/// Where in 0 … 1 a wait is drawn.
pub type Jitter = Arc<dyn Fn() -> f64 + Send + Sync>;

/// What the feeders and the finisher need.
#[derive(Clone)]
pub struct Shared {
    pub store: Arc<dyn Store>,
    pub clock: Arc<dyn Clock>,
    pub metrics: Arc<Metrics>,
    bodies: Arc<Bodies>,
}

impl Shared {
    pub fn new(store: Arc<dyn Store>, clock: Arc<dyn Clock>, metrics: Arc<Metrics>) -> Self {
        Self { store, clock, metrics, bodies: Arc::default() }
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_ms(self.clock.now_ms())
    }

    /// Whether what comes of an attempt can be written down. Where not, none is made: it would only be
    /// made again. What is leased meanwhile is taken up by the loop's next poll once it can.
    fn can_finish(&self) -> bool {
        self.store.health() == Health::Good
    }

    /// The payment that a lease is for; `None` where there is none any more.
    async fn claim(&self, lease: Lease, now: Timestamp) -> Result<Option<Claim>, StoreError> {
        let read = lease.read(&*self.store, now).await?;
        Ok(read.map(|(stored, lease)| Claim { lease, stored }))
    }
}

/// The right to a payment's deliveries on a channel, with the payment as it was read under it.
struct Claim {
    lease: Lease,
    stored: Arc<Versioned>,
}

impl Claim {
    /// What is due of it; `None` where nothing is any more.
    fn parcel(&self, bodies: &Bodies, channel: Channel, now: Timestamp) -> Option<Parcel> {
        let payment = &self.stored.payment;
        let notification = payment.due_notification(channel, now)?;
        let terms = &payment.terms;
        Some(Parcel {
            payment: terms.id,
            n: notification.n,
            event_id: terms.id.event(notification.n),
            topic: notification.topic,
            at: notification.snapshot.at,
            url: terms.webhook_url.as_deref().map(str::to_owned),
            body: bodies.of(terms, notification),
            trace: terms.trace,
            death: match channel {
                Channel::Event | Channel::Webhook => None,
                Channel::DeadLetter => notification.webhook.as_ref().and_then(death),
            },
        })
    }
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

/// Waits for what is under way, and abandons what takes longer; false: there was some.
async fn drain(tasks: &TaskTracker, abandon: &CancellationToken, grace: Duration) -> bool {
    tasks.close();
    let ended = tokio::time::timeout(grace, tasks.wait()).await.is_ok();
    abandon.cancel();
    tasks.wait().await;
    ended
}
