//! Bodies on their way to a second channel: a notification's event and its webhook carry the same bytes, and come
//! up within milliseconds of each other.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rustc_hash::FxHashMap;

use crate::domain::{
    delivery::{Delivery, Notification},
    event,
    ids::PaymentId,
    payment::Terms,
};

/// Bodies kept; beyond it all are forgotten, and rendered anew.
const MAX: usize = 4_096;
/// Nearly all have less than 1 KB. One that its caller filled up is rendered twice, so that what is kept stays small.
const KEPT_BYTES: usize = 4 << 10;

#[derive(Default)]
pub struct Bodies(Mutex<FxHashMap<(PaymentId, u32), Bytes>>);

impl Bodies {
    /// The body of a notification: as it was rendered for its other channel, where that was just now.
    pub fn of(&self, terms: &Terms, notification: &Notification) -> Bytes {
        let name = (terms.id, notification.n);
        if let Some(body) = self.lock().remove(&name) {
            return body;
        }
        let body = event::body(terms, notification);
        let is_small = body.capacity() <= KEPT_BYTES;
        let body = Bytes::from(body);
        let is_to_come = |delivery: &Option<Delivery>| {
            delivery.as_ref().is_some_and(|delivery| delivery.attempts_made == 0)
        };
        if is_small && is_to_come(&notification.event) && is_to_come(&notification.webhook) {
            let mut bodies = self.lock();
            if bodies.len() >= MAX {
                bodies.clear();
            }
            bodies.insert(name, body.clone());
        }
        body
    }

    fn lock(&self) -> MutexGuard<'_, FxHashMap<(PaymentId, u32), Bytes>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        delivery::{Attempt, Attempted, Channel, RetryPolicy, Verdict},
        payment::{Payment, tests::payment},
        scenario::Scenario,
    };

    /// An approved payment: its first notification goes to both channels.
    fn approved() -> Payment {
        payment(Scenario::Approve)
    }

    fn body(bodies: &Bodies, payment: &Payment) -> Bytes {
        bodies.of(&payment.terms, payment.notification(1).unwrap())
    }

    #[test]
    fn what_goes_to_two_channels_is_rendered_once_and_not_kept_beyond() {
        let (bodies, payment) = (Bodies::default(), approved());
        let (first, second) = (body(&bodies, &payment), body(&bodies, &payment));
        assert_eq!(first.as_ptr(), second.as_ptr());
        assert!(bodies.lock().is_empty());
    }

    #[test]
    fn what_is_tried_again_is_rendered_for_itself() {
        let (bodies, payment) = (Bodies::default(), approved());
        let first = body(&bodies, &payment);
        body(&bodies, &payment);
        let now = payment.terms.created_at;
        let attempt = Attempt { at: now, http_status: None, latency_ms: 1, error: None };
        let failed = Attempted { attempt, verdict: Verdict::Retry { not_before: None } };
        let second = std::time::Duration::from_secs(1);
        let policy = RetryPolicy {
            max_attempts: None,
            backoff_base: second,
            backoff_max: second,
            dead_letters: false,
        };
        let after =
            payment.after_attempt((1, Channel::Webhook), failed, now, &policy, 1.0).unwrap();
        assert_eq!(body(&bodies, &after), first, "the same bytes on every attempt");
        assert!(bodies.lock().is_empty(), "nobody else would take it");
    }

    #[test]
    fn bodies_that_nobody_takes_do_not_pile_up() {
        let (bodies, payment) = (Bodies::default(), approved());
        for n in 0..2 * u128::try_from(MAX).unwrap() {
            let id = PaymentId::from_parts(payment.terms.created_at, n);
            let terms = Terms { id, ..(*payment.terms).clone() };
            bodies.of(&terms, payment.notification(1).unwrap());
            assert!(bodies.lock().len() <= MAX);
        }
    }

    #[test]
    fn a_body_that_was_filled_up_is_not_kept() {
        let (bodies, payment) = (Bodies::default(), approved());
        let echo = Some(format!(r#"{{"a":"{}"}}"#, "x".repeat(KEPT_BYTES)));
        let terms = Terms { echo, ..(*payment.terms).clone() };
        bodies.of(&terms, payment.notification(1).unwrap());
        assert!(bodies.lock().is_empty());
    }
}
