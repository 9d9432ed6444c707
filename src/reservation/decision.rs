//! What an event means for its reservation, given what has been applied before. Pure.

use super::envelope::Event;
use crate::domain::{delivery::Topic, status::Status};

/// What is asked of the reservation API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Confirm,
    Cancel,
}

/// What is remembered that concerns an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Whether this very event has been applied.
    pub is_applied: bool,
    /// The highest version that has been applied for its payment, or may have been.
    pub version: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Apply(Action),
    /// Deleted without effect.
    Drop(Why),
    /// Not for us to judge: left to the queue's redrive policy, where somebody sees it.
    Leave,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Applied already.
    Duplicate,
    /// Something newer of its payment has been applied.
    Stale,
    /// A partial refund leaves the reservation as it is.
    NoEffect,
}

pub fn decide(event: &Event, known: Known) -> Decision {
    match event.topic {
        Topic::RefundUpdated => Decision::Drop(Why::NoEffect),
        Topic::StatusUpdated | Topic::Simulated => match action(event.status) {
            None => Decision::Leave,
            Some(_) if known.is_applied => Decision::Drop(Why::Duplicate),
            Some(_) if known.version.is_some_and(|version| event.version < version) => {
                Decision::Drop(Why::Stale)
            }
            Some(action) => Decision::Apply(action),
        },
    }
}

/// `None`: no event tells of such a status.
const fn action(status: Status) -> Option<Action> {
    match status {
        Status::Completed => Some(Action::Confirm),
        Status::Failed | Status::Cancelled | Status::Expired | Status::Refunded => {
            Some(Action::Cancel)
        }
        Status::Pending | Status::Processing => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Decision::{Apply, Drop, Leave};

    const VERSION: u64 = 5;

    fn event(topic: Topic, status: Status) -> Event {
        Event {
            id: "evt_1_1".into(),
            topic,
            status,
            version: VERSION,
            payment_id: "pay_1".into(),
            reservation_id: "res_1".into(),
            traceparent: None,
        }
    }

    /// Topic × status × what is known, in full.
    #[test]
    fn the_table() {
        let new = [
            (Status::Pending, Leave),
            (Status::Processing, Leave),
            (Status::Completed, Apply(Action::Confirm)),
            (Status::Failed, Apply(Action::Cancel)),
            (Status::Cancelled, Apply(Action::Cancel)),
            (Status::Refunded, Apply(Action::Cancel)),
            (Status::Expired, Apply(Action::Cancel)),
        ];
        assert_eq!(new.map(|(status, _)| status), Status::ALL);
        for (status, of_new) in new {
            for version in [None, Some(VERSION - 1), Some(VERSION), Some(VERSION + 1)] {
                for is_applied in [false, true] {
                    let known = Known { is_applied, version };
                    let expected = match (of_new, is_applied, version) {
                        (Leave, _, _) => Leave,
                        (_, true, _) => Drop(Why::Duplicate),
                        (_, false, Some(newer)) if newer > VERSION => Drop(Why::Stale),
                        (of_new, false, _) => of_new,
                    };
                    for topic in [Topic::StatusUpdated, Topic::Simulated] {
                        let decided = decide(&event(topic, status), known);
                        assert_eq!(decided, expected, "{status:?} {known:?}");
                    }
                    let refund = decide(&event(Topic::RefundUpdated, status), known);
                    assert_eq!(refund, Drop(Why::NoEffect), "{status:?} {known:?}");
                }
            }
        }
    }
}
