//! What goes wrong on order.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;

/// What becomes of one call.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Refused as a whole: nothing is done.
    Refuse { status: u16, code: String },
    /// The entries at these places (from 0) fail with these codes; nothing is done for them.
    Entries(Vec<(usize, String)>),
    /// The connection is reset; nothing is done.
    CutBefore,
    /// It is done, then the connection is reset: the reply is lost.
    CutAfter,
    /// It is done; the reply goes when the test says `release`.
    Hold,
    /// It is done, and this is what is said of it.
    Garble { status: u16, body: Bytes },
    /// It is done; the reply comes twice, then the connection ends.
    AnswerTwice,
}

impl Fault {
    pub fn refuse(status: u16, code: &str) -> Self {
        Self::Refuse { status, code: code.to_owned() }
    }

    /// As EventBridge does it; SQS says `RequestThrottled`.
    pub fn throttle() -> Self {
        Self::refuse(400, "ThrottlingException")
    }

    pub fn entry(place: usize, code: &str) -> Self {
        Self::Entries(vec![(place, code.to_owned())])
    }

    pub fn garble(status: u16, body: &'static str) -> Self {
        Self::Garble { status, body: Bytes::from_static(body.as_bytes()) }
    }

    /// The code with which the entry at this place is to fail.
    pub(super) fn of_entry(fault: Option<&Self>, place: usize) -> Option<&str> {
        let Some(Self::Entries(entries)) = fault else { return None };
        entries.iter().find(|(at, _)| *at == place).map(|(_, code)| code.as_str())
    }
}

type Decide = Box<dyn FnMut(&[&str]) -> Option<Fault> + Send>;

#[derive(Default)]
pub(super) struct Faults {
    ordered: HashMap<String, VecDeque<Fault>>,
    standing: HashMap<String, Decide>,
}

impl Faults {
    pub(super) fn order(&mut self, operation: &str, faults: impl IntoIterator<Item = Fault>) {
        self.ordered.entry(operation.to_owned()).or_default().extend(faults);
    }

    pub(super) fn always(&mut self, operation: &str, decide: Decide) {
        self.standing.insert(operation.to_owned(), decide);
    }

    pub(super) fn next(&mut self, operation: &str, entries: &[&str]) -> Option<Fault> {
        let ordered = self.ordered.get_mut(operation).and_then(VecDeque::pop_front);
        ordered.or_else(|| self.standing.get_mut(operation)?(entries))
    }
}
