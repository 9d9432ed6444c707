//! What a payment owes to others: notifications, their two deliveries, and what an attempt makes of one.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{scenario::FailureReason, status::Status, time::Timestamp};

/// How many attempts of a delivery are kept, the newest.
pub const ATTEMPTS_KEPT: usize = 20;
/// A receiver's `Retry-After` is followed up to here.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(60 * 60);

/// Where a notification goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Channel {
    Event,
    Webhook,
    /// A webhook that was given up, on its way to the dead-letter queue.
    DeadLetter,
}

impl Channel {
    pub const ALL: [Self; 3] = [Self::Event, Self::Webhook, Self::DeadLetter];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Webhook => "webhook",
            Self::DeadLetter => "dead_letter",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|channel| channel.as_str() == text)
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
    Owed {
        due: Timestamp,
    },
    Delivered {
        at: Timestamp,
    },
    Dead {
        at: Timestamp,
        why: String,
    },
    /// Dead, with a letter to the dead-letter queue: a delivery of its own.
    DeadLettered {
        at: Timestamp,
        why: String,
        letter: Box<Delivery>,
    },
    /// Owed again, on order, outside the order of the rest.
    Redelivery {
        due: Timestamp,
        /// Attempts that the order found: the schedule starts anew behind them.
        attempts_before: u32,
    },
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
    /// The other side takes nothing at all just now: nothing is wrong with this one, and it goes as
    /// soon as any does.
    Unavailable,
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
    /// Whether what is given up goes to a dead-letter queue.
    pub dead_letters: bool,
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
            DeliveryState::Owed { due } | DeliveryState::Redelivery { due, .. } => Some(due),
            DeliveryState::Delivered { .. }
            | DeliveryState::Dead { .. }
            | DeliveryState::DeadLettered { .. } => None,
        }
    }

    /// When and why it was given up.
    pub fn death(&self) -> Option<(Timestamp, &str)> {
        match &self.state {
            DeliveryState::Dead { at, why } | DeliveryState::DeadLettered { at, why, .. } => {
                Some((*at, why))
            }
            DeliveryState::Owed { .. }
            | DeliveryState::Redelivery { .. }
            | DeliveryState::Delivered { .. } => None,
        }
    }

    pub fn is_dead(&self) -> bool {
        self.death().is_some()
    }

    /// Owed once more, with attempts counted anew; `None` where it is owed already.
    pub fn redelivery(mut self, due: Timestamp) -> Option<Self> {
        if self.due().is_some() {
            return None;
        }
        self.state = DeliveryState::Redelivery { due, attempts_before: self.attempts_made };
        Some(self)
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
        let made = self.attempts_made - self.attempts_before();
        let spent = policy.max_attempts.is_some_and(|max| made >= max);
        self.state = match done.verdict {
            Verdict::Accepted => DeliveryState::Delivered { at: now },
            Verdict::Unavailable if !spent => self.owed_at(now),
            Verdict::Retry { not_before } if !spent => {
                let due = now.plus(policy.wait(made, jitter));
                let asked = not_before.map(|at| at.min(now.plus(RETRY_AFTER_MAX)));
                self.owed_at(asked.map_or(due, |at| due.max(at)))
            }
            Verdict::Retry { .. } | Verdict::Unavailable | Verdict::Refused => {
                let why = error.unwrap_or_else(|| "REFUSED".to_owned());
                match policy.dead_letters {
                    true => {
                        let letter = Box::new(Self::owed(now));
                        DeliveryState::DeadLettered { at: now, why, letter }
                    }
                    false => DeliveryState::Dead { at: now, why },
                }
            }
        };
        self
    }

    const fn attempts_before(&self) -> u32 {
        match self.state {
            DeliveryState::Redelivery { attempts_before, .. } => attempts_before,
            DeliveryState::Owed { .. }
            | DeliveryState::Delivered { .. }
            | DeliveryState::Dead { .. }
            | DeliveryState::DeadLettered { .. } => 0,
        }
    }

    /// Still owed, in the order it was in.
    const fn owed_at(&self, due: Timestamp) -> DeliveryState {
        match self.state {
            DeliveryState::Redelivery { attempts_before, .. } => {
                DeliveryState::Redelivery { due, attempts_before }
            }
            DeliveryState::Owed { .. }
            | DeliveryState::Delivered { .. }
            | DeliveryState::Dead { .. }
            | DeliveryState::DeadLettered { .. } => DeliveryState::Owed { due },
        }
    }
}

impl Notification {
    pub fn delivery(&self, channel: Channel) -> Option<&Delivery> {
        match channel {
            Channel::Event => self.event.as_ref(),
            Channel::Webhook => self.webhook.as_ref(),
            Channel::DeadLetter => match &self.webhook.as_ref()?.state {
                DeliveryState::DeadLettered { letter, .. } => Some(letter),
                _ => None,
            },
        }
    }

    pub fn delivery_mut(&mut self, channel: Channel) -> Option<&mut Delivery> {
        match channel {
            Channel::Event => self.event.as_mut(),
            Channel::Webhook => self.webhook.as_mut(),
            Channel::DeadLetter => match &mut self.webhook.as_mut()?.state {
                DeliveryState::DeadLettered { letter, .. } => Some(letter),
                _ => None,
            },
        }
    }

    /// When its delivery on a channel is due, if that keeps to the order of the payment's notifications.
    fn due_in_order(&self, channel: Channel) -> Option<Timestamp> {
        match self.delivery(channel)?.state {
            DeliveryState::Owed { due } if self.topic.is_ordered() => Some(due),
            _ => None,
        }
    }

    pub fn is_owed(&self) -> bool {
        Channel::ALL.iter().any(|c| self.delivery(*c).is_some_and(|d| d.due().is_some()))
    }

    pub fn has_dead(&self) -> bool {
        Channel::ALL.iter().any(|c| self.delivery(*c).is_some_and(Delivery::is_dead))
    }
}

/// The notification to attempt next on a channel: the first that keeps to the order and is still owed,
/// or one outside of it (simulated, redelivered), whichever is due earlier. Later ones in order are held.
pub fn next_owed(notifications: &[Notification], channel: Channel) -> Option<(u32, Timestamp)> {
    let in_order = |n: &Notification| Some((n.n, n.due_in_order(channel)?));
    let outside = notifications.iter().filter(|n| n.due_in_order(channel).is_none());
    let owed = outside.filter_map(|n| Some((n.n, n.delivery(channel)?.due()?)));
    let first = notifications.iter().find_map(in_order);
    first.into_iter().chain(owed).min_by_key(|(n, due)| (*due, *n))
}

/// Whether a delivery waits for an earlier one of its payment and channel.
pub fn is_held(notifications: &[Notification], n: u32, channel: Channel) -> bool {
    let mut in_order = notifications.iter().filter(|other| other.due_in_order(channel).is_some());
    in_order.next().is_some_and(|first| first.n < n) && in_order.any(|other| other.n == n)
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
            dead_letters: false,
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

    #[test]
    fn while_the_other_side_takes_nothing_it_stays_due() {
        let down = failed(Verdict::Unavailable);
        let delivery = Delivery::owed(NOW).after_attempt(down, NOW.plus_ms(7), &policy(), 1.0);
        assert_eq!((delivery.due(), delivery.attempts_made), (Some(NOW.plus_ms(7)), 1));
    }

    #[test]
    fn what_is_given_up_leaves_a_letter_where_there_is_a_queue() {
        let policy = RetryPolicy { dead_letters: true, ..policy() };
        let dead = Delivery::owed(NOW).after_attempt(failed(Verdict::Refused), NOW, &policy, 0.5);
        assert_eq!(dead.death(), Some((NOW, "HTTP 500")));
        let mut one = notification(1, Topic::StatusUpdated, dead);
        assert_eq!(next_owed(std::slice::from_ref(&one), Channel::DeadLetter), Some((1, NOW)));
        assert_eq!(next_owed(std::slice::from_ref(&one), Channel::Webhook), None);
        assert!(one.is_owed(), "its letter is");
        let letter = one.delivery_mut(Channel::DeadLetter).unwrap();
        *letter = letter.clone().after_attempt(failed(Verdict::Accepted), NOW, &policy, 0.5);
        assert!(!one.is_owed());
    }

    #[test]
    fn a_redelivery_has_a_schedule_of_its_own_and_waits_for_nothing() {
        let spent = (0..10).fold(Delivery::owed(NOW), |d, _| {
            let now = d.due().unwrap();
            d.after_attempt(retry(), now, &policy(), 0.0)
        });
        let later = Delivery::owed(NOW.plus_ms(60_000));
        let due = NOW.plus_ms(90_000);
        let again = spent.redelivery(due).unwrap();
        assert!(again.clone().redelivery(due).is_none(), "it is owed already");
        let tried = again.clone().after_attempt(retry(), due, &policy(), 1.0);
        assert_eq!((tried.due(), tried.attempts_made), (Some(due.plus_ms(1_000)), 11));

        let both = [
            notification(1, Topic::StatusUpdated, again),
            notification(2, Topic::StatusUpdated, later),
        ];
        assert_eq!(next_owed(&both, Channel::Webhook), Some((2, NOW.plus_ms(60_000))));
        assert!(!is_held(&both, 2, Channel::Webhook), "a redelivery holds up nothing");
    }

    fn notification(n: u32, topic: Topic, webhook: Delivery) -> Notification {
        let snapshot = Snapshot {
            version: 2,
            status: Status::Completed,
            at: NOW,
            decided: true,
            approved: true,
            failure_reason: None,
            refund: None,
            refunded_amount: None,
        };
        Notification { n, topic, snapshot, event: None, webhook: Some(webhook) }
    }
}
