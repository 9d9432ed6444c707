//! Couriers: each makes one attempt to bring parcels to the other side, and says how each went.
//!
//! A courier decides nothing that lasts: no back-off, no counting, no giving up. What an attempt makes
//! of a delivery is `domain::delivery`'s; who calls again, and when, is the outbox's.

pub mod aws;
mod aws_call;
pub mod connect;
mod connection;
pub mod eventbridge;
pub mod log;
pub mod sqs;
pub mod startup_check;
pub mod tls;
pub mod webhook;

#[cfg(test)]
mod connect_tests;
#[cfg(test)]
mod eventbridge_tests;
#[cfg(test)]
mod http2_tests;
#[cfg(test)]
mod receiver;
#[cfg(test)]
mod sqs_tests;
#[cfg(test)]
mod startup_check_tests;
#[cfg(test)]
mod webhook_tests;

use std::{error::Error, io, iter, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use crate::domain::{
    delivery::{Attempt, Attempted, Topic, Verdict},
    ids::PaymentId,
    payment::Trace,
    time::Timestamp,
};

pub use self::{
    eventbridge::EventBridgeCourier,
    log::LogCourier,
    sqs::{DeadLetterCourier, NoDeadLetterQueue, SqsCourier},
    webhook::{Origin, WebhookCourier, origin},
};

/// One delivery on its way. Nothing in it changes between attempts.
#[derive(Clone, Debug)]
pub struct Parcel {
    pub payment: PaymentId,
    pub n: u32,
    pub event_id: String,
    pub topic: Topic,
    /// When the status changed.
    pub at: Timestamp,
    /// Where a webhook goes; events have none.
    pub url: Option<String>,
    pub body: Bytes,
    pub trace: Trace,
    /// Of a webhook that was given up: what its letter tells.
    pub death: Option<Death>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    pub at: Timestamp,
    pub why: String,
    pub attempts_made: u32,
}

#[async_trait]
pub trait Courier: Send + Sync + 'static {
    /// The most parcels of one attempt.
    fn batch_max(&self) -> usize;

    /// The most attempts at a time.
    fn calls_max(&self) -> usize {
        1
    }

    /// One verdict a parcel, in order. Never fails as a whole, and never panics on what the other side
    /// says. `now` is the moment of the attempt, as it is signed and noted.
    ///
    /// May be dropped at any await: what was under way may have arrived all the same, so the parcels
    /// stay owed, and the repeat carries the same id and bytes.
    async fn attempt(&self, batch: &[Parcel], now: Timestamp) -> Vec<Attempted>;
}

/// How long one attempt took and what came back: the part that all couriers note alike.
#[derive(Clone, Copy, Debug)]
struct Noted {
    at: Timestamp,
    took: Duration,
    http_status: Option<u16>,
}

impl Noted {
    /// Of an attempt that was not made, or has not ended.
    const fn unsent(at: Timestamp) -> Self {
        Self { at, took: Duration::ZERO, http_status: None }
    }

    fn accepted(self) -> Attempted {
        self.attempted(None, Verdict::Accepted)
    }

    fn retry(self, error: impl Into<String>, not_before: Option<Timestamp>) -> Attempted {
        self.attempted(Some(error.into()), Verdict::Retry { not_before })
    }

    fn unavailable(self, error: impl Into<String>) -> Attempted {
        self.attempted(Some(error.into()), Verdict::Unavailable)
    }

    fn refused(self, error: impl Into<String>) -> Attempted {
        self.attempted(Some(error.into()), Verdict::Refused)
    }

    fn attempted(self, error: Option<String>, verdict: Verdict) -> Attempted {
        let latency_ms = u32::try_from(self.took.as_millis()).unwrap_or(u32::MAX);
        let Self { at, http_status, .. } = self;
        Attempted { attempt: Attempt { at, http_status, latency_ms, error }, verdict }
    }
}

/// An error and what it was made of, outermost first.
fn causes<'a>(top: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(top), |error: &&'a (dyn Error + 'static)| {
        let error = *error;
        // An io::Error made of another error names that one's source as its own, and so hides it.
        match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => error.source(),
        }
    })
}
