//! One standard queue: what waits, what is out with a receiver and until when, what is received too often.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use serde_json::{Map, Value};

#[derive(Default)]
pub(super) struct Queue {
    pub(super) visibility_s: u32,
    pub(super) redrive: Option<Redrive>,
    /// Every so many received messages one comes again.
    pub(super) twice_one_in: Option<u64>,
    received: u64,
    messages: BTreeMap<u64, Message>,
    /// Places of messages that may be received; those of deleted ones are passed over.
    visible: VecDeque<u64>,
    /// Until when, and the message's place.
    hidden: BTreeSet<(i64, u64)>,
    places: u64,
}

/// Where messages go that were received too often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Redrive {
    pub(super) target_arn: String,
    pub(super) max_receives: u32,
}

/// What a sender gives.
#[derive(Clone, Debug, Default)]
pub(super) struct Sent {
    pub(super) body: Arc<str>,
    pub(super) attributes: Map<String, Value>,
    pub(super) trace_header: Option<String>,
    pub(super) delay_s: u32,
}

#[derive(Clone, Debug)]
pub(super) struct Message {
    pub(super) id: String,
    pub(super) sent: Sent,
    pub(super) sent_ms: i64,
    pub(super) first_received_ms: Option<i64>,
    pub(super) receives: u32,
    /// The queue that gave it up.
    pub(super) moved_from: Option<String>,
    hidden_until_ms: Option<i64>,
    is_copy: bool,
}

pub(super) struct Depth {
    pub(super) visible: usize,
    pub(super) in_flight: usize,
    pub(super) delayed: usize,
}

/// Names one receive of one message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handle {
    place: u64,
    receive: u32,
}

impl Handle {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (place, receive) = text.strip_prefix("receipt-")?.split_once('-')?;
        Some(Self { place: place.parse().ok()?, receive: receive.parse().ok()? })
    }
}

impl std::fmt::Display for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "receipt-{}-{}", self.place, self.receive)
    }
}

impl Queue {
    pub(super) fn new(visibility_s: u32, redrive: Option<Redrive>) -> Self {
        Self { visibility_s, redrive, ..Self::default() }
    }

    pub(super) fn add(&mut self, id: String, sent: Sent, now_ms: i64) {
        let until_ms = now_ms + i64::from(sent.delay_s) * 1000;
        let message = Message {
            id,
            sent,
            sent_ms: now_ms,
            first_received_ms: None,
            receives: 0,
            moved_from: None,
            hidden_until_ms: None,
            is_copy: false,
        };
        let place = self.insert(message);
        if until_ms > now_ms {
            self.hide(place, until_ms);
        } else {
            self.visible.push_back(place);
        }
    }

    /// Takes up to `max` messages for `visibility_s`; with them come those that were received too often
    /// and now belong to the queue's redrive target.
    pub(super) fn receive(
        &mut self,
        max: usize,
        visibility_s: u32,
        now_ms: i64,
    ) -> (Vec<(Handle, Message)>, Vec<Message>) {
        self.surface(now_ms);
        let (mut taken, mut given_up) = (Vec::new(), Vec::new());
        let max_receives = self.redrive.as_ref().map_or(u32::MAX, |redrive| redrive.max_receives);
        while taken.len() < max {
            let Some(place) = self.visible.pop_front() else { break };
            let Some(message) = self.messages.get_mut(&place) else { continue };
            if message.receives >= max_receives {
                given_up.extend(self.messages.remove(&place));
                continue;
            }
            message.receives += 1;
            message.first_received_ms.get_or_insert(now_ms);
            let (handle, message) = (Handle { place, receive: message.receives }, message.clone());
            self.hide(place, now_ms + i64::from(visibility_s) * 1000);
            self.maybe_again(&message);
            taken.push((handle, message));
        }
        (taken, given_up)
    }

    /// A message that its deletion will not reach, as it happens in a real queue now and then.
    fn maybe_again(&mut self, message: &Message) {
        if message.is_copy {
            return;
        }
        self.received += 1;
        if self.twice_one_in.is_some_and(|n| self.received.is_multiple_of(n)) {
            let copy = Message { is_copy: true, hidden_until_ms: None, ..message.clone() };
            let place = self.insert(copy);
            self.visible.push_back(place);
        }
    }

    pub(super) fn take_over(&mut self, mut message: Message, from: String) {
        message.moved_from = Some(from);
        message.hidden_until_ms = None;
        let place = self.insert(message);
        self.visible.push_back(place);
    }

    /// A handle of an earlier receive deletes nothing, and neither does AWS say so.
    pub(super) fn delete(&mut self, handle: Handle) {
        let Some(message) = self.messages.get(&handle.place) else { return };
        if message.receives != handle.receive {
            return;
        }
        if let Some(until_ms) = message.hidden_until_ms {
            self.hidden.remove(&(until_ms, handle.place));
        }
        self.messages.remove(&handle.place);
    }

    /// False: it is out with nobody, or with another receiver.
    pub(super) fn change_visibility(&mut self, handle: Handle, seconds: u32, now_ms: i64) -> bool {
        self.surface(now_ms);
        let message = self.messages.get(&handle.place);
        let current = message.filter(|message| message.receives == handle.receive);
        let Some(until_ms) = current.and_then(|message| message.hidden_until_ms) else {
            return false;
        };
        self.hidden.remove(&(until_ms, handle.place));
        self.hide(handle.place, now_ms + i64::from(seconds) * 1000);
        true
    }

    pub(super) fn depth(&mut self, now_ms: i64) -> Depth {
        self.surface(now_ms);
        let hidden = || self.hidden.iter().map(|(_, place)| &self.messages[place]);
        let in_flight = hidden().filter(|message| message.receives > 0).count();
        Depth {
            visible: self.messages.len() - self.hidden.len(),
            in_flight,
            delayed: self.hidden.len() - in_flight,
        }
    }

    /// When the next hidden message becomes visible.
    pub(super) fn next_visible_ms(&self) -> Option<i64> {
        self.hidden.first().map(|(until_ms, _)| *until_ms)
    }

    pub(super) fn bodies(&self) -> Vec<String> {
        self.messages.values().map(|message| message.sent.body.to_string()).collect()
    }

    fn insert(&mut self, message: Message) -> u64 {
        self.places += 1;
        self.messages.insert(self.places, message);
        self.places
    }

    fn hide(&mut self, place: u64, until_ms: i64) {
        if let Some(message) = self.messages.get_mut(&place) {
            message.hidden_until_ms = Some(until_ms);
            self.hidden.insert((until_ms, place));
        }
    }

    /// What was hidden until now can be received again.
    fn surface(&mut self, now_ms: i64) {
        while let Some((until_ms, place)) = self.hidden.first().copied()
            && until_ms <= now_ms
        {
            self.hidden.pop_first();
            if let Some(message) = self.messages.get_mut(&place) {
                message.hidden_until_ms = None;
                self.visible.push_back(place);
            }
        }
    }
}
