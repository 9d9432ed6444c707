//! What a payment owes to others: notifications, their two deliveries, and what an attempt makes of one.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{scenario::FailureReason, status::Status, time::Timestamp};

/// How many attempts of a delivery are kept, the newest.
pub const ATTEMPTS_KEPT: usize = 20;
/// A receiver's `Retry-After` is followed up to here.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(60 * 60);

/// Where a notification goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Channel {
    Event,
    Webhook,
}

impl Channel {
    pub const ALL: [Self; 2] = [Self::Event, Self::Webhook];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Webhook => "webhook",
        }
    }
}

/// What is notified, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Topic {
    StatusUpdated,
    /// A partial refund.
    RefundUpdated,
    /// A webhook on order: outside the order of the rest.
    Simulated,
}

impl Topic {
    pub const fn event_type(self) -> &'static str {
        match self {
            Self::StatusUpdated | Self::Simulated => "payment.status_updated",
            Self::RefundUpdated => "payment.refund_updated",
        }
    }

    /// EventBridge `DetailType`: rules written for statuses don't match refunds.
    pub const fn detail_type(self) -> &'static str {
        match self {
            Self::StatusUpdated | Self::Simulated => "Payment Status Updated",
            Self::RefundUpdated => "Payment Refund Updated",
        }
    }

    const fn is_ordered(self) -> bool {
        match self {
            Self::StatusUpdated | Self::RefundUpdated => true,
            Self::Simulated => false,
        }
    }
}

/// The payment as it was when the notification arose: with the terms, all that its body is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub version: u32,
    pub status: Status,
    /// When the status changed.
    pub at: Timestamp,
    /// Whether the outcome was known, and with it the transaction id.
    pub decided: bool,
    pub approved: bool,
    pub failure_reason: Option<FailureReason>,
    /// Number and amount of the refund that is notified.
    pub refund: Option<(u32, u64)>,
    pub refunded_amount: Option<u64>,
}

/// One thing to tell, over one or both channels. `n` counts a payment's notifications from 1 and
/// names the event: it is never given twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notification {
    pub n: u32,
    pub topic: Topic,
    pub snapshot: Snapshot,
    pub event: Option<Delivery>,
    pub webhook: Option<Delivery>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    pub state: DeliveryState,
    pub attempts_made: u32,
    /// The last [`ATTEMPTS_KEPT`].
    pub attempts: Vec<Attempt>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeliveryState {
    Owed { due: Timestamp },
    Delivered { at: Timestamp },
    Dead { at: Timestamp, why: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    pub at: Timestamp,
    pub http_status: Option<u16>,
    pub latency_ms: u32,
    pub error: Option<String>,
}

/// How an attempt went, as its courier saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempted {
    pub attempt: Attempt,
    pub verdict: Verdict,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accepted,
    /// Try again, not before the moment the receiver asked for.
    Retry {
        not_before: Option<Timestamp>,
    },
    /// Trying again is no use.
    Refused,
}

/// When a delivery that failed is tried again, and when it is given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// `None`: tried without end.
    pub max_attempts: Option<u32>,
    pub backoff_base: Duration,
    pub backoff_max: Duration,
}

impl RetryPolicy {
    /// The wait after the n-th attempt (from 1): uniform in 0 … min(base·2^(n−1), max), `jitter` in
    /// 0 … 1 being where in that range ("full jitter").
    pub fn wait(&self, attempts_made: u32, jitter: f64) -> Duration {
        let doublings = attempts_made.saturating_sub(1).min(63);
        let cap = u64::try_from(self.backoff_base.as_millis())
            .unwrap_or(u64::MAX)
            .saturating_mul(1 << doublings.min(62))
            .min(u64::try_from(self.backoff_max.as_millis()).unwrap_or(u64::MAX));
        Duration::from_millis((cap as f64 * jitter.clamp(0.0, 1.0)) as u64)
    }
}

impl Delivery {
    pub const fn owed(due: Timestamp) -> Self {
        Self { state: DeliveryState::Owed { due }, attempts_made: 0, attempts: Vec::new() }
    }

    pub const fn due(&self) -> Option<Timestamp> {
        match self.state {
            DeliveryState::Owed { due } => Some(due),
            DeliveryState::Delivered { .. } | DeliveryState::Dead { .. } => None,
        }
    }

    /// What an attempt makes of a delivery that is owed; any other stays what it is.
    pub fn after_attempt(
        mut self,
        done: Attempted,
        now: Timestamp,
        policy: &RetryPolicy,
        jitter: f64,
    ) -> Self {
        if self.due().is_none() {
            return self;
        }
        self.attempts_made = self.attempts_made.saturating_add(1);
        let error = done.attempt.error.clone();
        if self.attempts.len() == ATTEMPTS_KEPT {
            self.attempts.remove(0);
        }
        self.attempts.push(done.attempt);
        let spent = policy.max_attempts.is_some_and(|max| self.attempts_made >= max);
        self.state = match done.verdict {
            Verdict::Accepted => DeliveryState::Delivered { at: now },
            Verdict::Retry { not_before } if !spent => {
                let due = now.plus(policy.wait(self.attempts_made, jitter));
                let asked = not_before.map(|at| at.min(now.plus(RETRY_AFTER_MAX)));
                DeliveryState::Owed { due: asked.map_or(due, |at| due.max(at)) }
            }
            Verdict::Retry { .. } | Verdict::Refused => {
                DeliveryState::Dead { at: now, why: error.unwrap_or_else(|| "REFUSED".to_owned()) }
            }
        };
        self
    }
}

impl Notification {
    pub const fn delivery(&self, channel: Channel) -> Option<&Delivery> {
        match channel {
            Channel::Event => self.event.as_ref(),
            Channel::Webhook => self.webhook.as_ref(),
        }
    }

    pub const fn delivery_mut(&mut self, channel: Channel) -> Option<&mut Delivery> {
        match channel {
            Channel::Event => self.event.as_mut(),
            Channel::Webhook => self.webhook.as_mut(),
        }
    }

    pub fn is_owed(&self) -> bool {
        Channel::ALL.iter().any(|c| self.delivery(*c).is_some_and(|d| d.due().is_some()))
    }
}

/// The notification to attempt next on a channel: the first ordered one that is still owed, or a
/// simulated one, whichever is due earlier. Later ordered ones are held.
pub fn next_owed(notifications: &[Notification], channel: Channel) -> Option<(u32, Timestamp)> {
    let owed = |n: &Notification| Some((n.n, n.delivery(channel)?.due()?));
    let ordered = notifications.iter().filter(|n| n.topic.is_ordered()).find_map(owed);
    let simulated = notifications.iter().filter(|n| !n.topic.is_ordered()).filter_map(owed);
    ordered.into_iter().chain(simulated).min_by_key(|(n, due)| (*due, *n))
}

/// Whether a delivery waits for an earlier one of its payment and channel.
pub fn is_held(notifications: &[Notification], n: u32, channel: Channel) -> bool {
    notifications
        .iter()
        .filter(|other| other.topic.is_ordered() && other.n < n)
        .any(|other| other.delivery(channel).is_some_and(|d| d.due().is_some()))
        && notifications.iter().any(|this| this.n == n && this.topic.is_ordered())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_ms(1_000_000);

    fn policy() -> RetryPolicy {
        RetryPolicy {
            max_attempts: Some(10),
            backoff_base: Duration::from_secs(1),
            backoff_max: Duration::from_secs(3600),
        }
    }

    fn failed(verdict: Verdict) -> Attempted {
        let attempt = Attempt {
            at: NOW,
            http_status: Some(500),
            latency_ms: 3,
            error: Some("HTTP 500".into()),
        };
        Attempted { attempt, verdict }
    }

    fn retry() -> Attempted {
        failed(Verdict::Retry { not_before: None })
    }

    proptest::proptest! {
        #[test]
        fn every_wait_lies_within_its_cap(n in 1_u32..200, jitter in 0.0_f64..=1.0) {
            let cap = 1000_u64.saturating_mul(1 << (n - 1).min(40)).min(3_600_000);
            proptest::prop_assert!(policy().wait(n, jitter) <= Duration::from_millis(cap));
            proptest::prop_assert_eq!(policy().wait(n, 1.0), Duration::from_millis(cap));
        }
    }

    #[test]
    fn the_last_attempt_leaves_a_dead_delivery() {
        let mut delivery = Delivery::owed(NOW);
        for n in 1..=10 {
            assert!(delivery.due().is_some(), "owed before attempt {n}");
            delivery = delivery.after_attempt(retry(), NOW, &policy(), 0.5);
        }
        assert_eq!(delivery.state, DeliveryState::Dead { at: NOW, why: "HTTP 500".into() });
        assert_eq!((delivery.attempts_made, delivery.attempts.len()), (10, 10));
        let again = delivery.clone().after_attempt(retry(), NOW, &policy(), 0.5);
        assert_eq!(again, delivery, "a dead delivery stays what it is");
    }

    #[test]
    fn a_receiver_sets_the_least_wait_up_to_an_hour() {
        let asked = |s| failed(Verdict::Retry { not_before: Some(NOW.plus_ms(s)) });
        let due = |done| Delivery::owed(NOW).after_attempt(done, NOW, &policy(), 1.0).due();
        assert_eq!(due(asked(60_000)), Some(NOW.plus_ms(60_000)));
        assert_eq!(due(asked(10)), Some(NOW.plus_ms(1_000)), "ours is longer");
        assert_eq!(due(asked(86_400_000)), Some(NOW.plus_ms(3_600_000)));
    }

    #[test]
    fn without_a_maximum_it_is_tried_without_end_and_keeps_the_last_attempts() {
        let endless = RetryPolicy { max_attempts: None, ..policy() };
        let mut delivery = Delivery::owed(NOW);
        for _ in 0..1_000 {
            delivery = delivery.after_attempt(retry(), NOW, &endless, 0.0);
        }
        assert!(delivery.due().is_some());
        assert_eq!((delivery.attempts_made, delivery.attempts.len()), (1_000, ATTEMPTS_KEPT));
    }

    #[test]
    fn acceptance_and_refusal_end_it() {
        let end =
            |verdict| Delivery::owed(NOW).after_attempt(failed(verdict), NOW, &policy(), 0.5).state;
        assert_eq!(end(Verdict::Accepted), DeliveryState::Delivered { at: NOW });
        assert!(matches!(end(Verdict::Refused), DeliveryState::Dead { .. }));
    }
}
