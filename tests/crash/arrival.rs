//! A line of the sink's journal: what arrived, from where, and what it was answered.

use payment_sim::clock::{Clock, SystemClock};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

/// What brought an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Carrier {
    /// `EVENT_SINK=log`.
    Stdout,
    /// `EVENT_SINK=eventbridge`.
    Bus,
    /// `EVENT_SINK=sqs`.
    Queue,
    Webhook,
    Letter,
}

/// As deliveries name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    Event,
    Webhook,
    Letter,
}

impl Channel {
    pub const ALL: [Self; 3] = [Self::Event, Self::Webhook, Self::Letter];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Webhook => "webhook",
            Self::Letter => "dead_letter",
        }
    }
}

/// One arrival.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Told {
    pub at: i64,
    pub carrier: Carrier,
    /// What the envelope, the header `webhook-id`, or the entry of a batch calls it.
    pub id: String,
    /// Of the body, which is the same whatever brings it.
    pub hash: String,
    /// Of all that was sent for it, which is the same whenever the same carrier brings it again.
    pub whole: String,
    /// 200: taken. 4xx: refused for good. `None`: it was read, and nothing was answered.
    pub answer: Option<u16>,
    /// What a letter says beside the body.
    pub letter: Option<Letter>,
    pub body: Body,
}

/// What the checker reads of a body.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Body {
    pub event_id: String,
    pub event_type: String,
    pub version: i64,
    pub payment_intent_id: String,
    pub reservation_id: String,
    pub status: String,
    pub amount: i64,
    pub refund_id: Option<String>,
    pub refund_amount: Option<i64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Letter {
    pub event_id: String,
    pub event_type: String,
    pub webhook_url: String,
    pub reason: String,
    pub attempts: String,
    pub died_at: String,
}

/// What counts of EventBridge's envelope.
#[derive(Deserialize)]
pub struct Envelope<'a> {
    pub id: String,
    #[serde(borrow)]
    pub detail: &'a RawValue,
}

/// What should not have arrived at all.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Arrival {
    Told(Box<Told>),
    Unreadable { at: i64, unreadable: String },
}

/// An arrival as it came in.
pub struct Received<'a> {
    pub carrier: Carrier,
    pub id: String,
    pub whole: &'a [u8],
    pub body: &'a [u8],
    pub answer: Option<u16>,
    pub letter: Option<Letter>,
}

impl Told {
    pub const fn channel(&self) -> Channel {
        match self.carrier {
            Carrier::Stdout | Carrier::Bus | Carrier::Queue => Channel::Event,
            Carrier::Webhook => Channel::Webhook,
            Carrier::Letter => Channel::Letter,
        }
    }

    pub fn is_taken(&self) -> bool {
        self.answer == Some(200)
    }

    /// The sender need not try again.
    pub fn is_refused(&self) -> bool {
        self.answer.is_some_and(|status| (400..500).contains(&status))
    }
}

impl Arrival {
    pub fn of(received: Received<'_>) -> Self {
        let Received { carrier, id, whole, body: bytes, answer, letter } = received;
        let hash = |bytes| hex::encode(Sha256::digest(bytes));
        let Ok(body) = serde_json::from_slice(bytes) else { return Self::unreadable(bytes) };
        let at = SystemClock.now_ms();
        let (hash, whole) = (hash(bytes), hash(whole));
        Self::Told(Box::new(Told { at, carrier, id, hash, whole, answer, letter, body }))
    }

    pub fn unreadable(bytes: &[u8]) -> Self {
        let unreadable = String::from_utf8_lossy(bytes).into();
        Self::Unreadable { at: SystemClock.now_ms(), unreadable }
    }
}
