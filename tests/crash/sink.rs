//! Where events and webhooks arrive. Each is in the journal before it counts as taken.

use std::{
    io::{BufRead, BufReader},
    process::ChildStdout,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use payment_sim::clock::{Clock, SystemClock};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::{
    journal::Journal,
    support::{
        chance::Chance,
        receiver::{Answers, Receiver},
    },
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Channel {
    Event,
    Webhook,
}

/// One arrival.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Told {
    pub at: i64,
    pub channel: Channel,
    /// What the envelope, or the header `webhook-id`, calls it.
    pub id: String,
    pub hash: String,
    /// The status that the receiver answers; `None`: it hangs up.
    pub answer: Option<u16>,
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

#[derive(Deserialize)]
struct EventLine<'a> {
    id: String,
    #[serde(borrow)]
    detail: &'a RawValue,
}

/// What should not have arrived at all.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Arrival {
    Told(Box<Told>),
    Unreadable { at: i64, unreadable: String },
}

pub struct Sink {
    journal: Arc<Journal>,
    receiver: Receiver,
    gate: Arc<Gate>,
}

impl Sink {
    pub async fn start(journal: Arc<Journal>, chance: Chance) -> Self {
        let receiver = Receiver::start(answers(Arc::clone(&journal), chance)).await;
        Self { journal, receiver, gate: Arc::default() }
    }

    pub fn url(&self) -> String {
        self.receiver.url()
    }

    /// Reads events until the service's end of the pipe is closed.
    pub fn follow(&self, stdout: ChildStdout) -> JoinHandle<()> {
        let (journal, gate) = (Arc::clone(&self.journal), Arc::clone(&self.gate));
        std::thread::spawn(move || read_events(stdout, &journal, &gate))
    }

    /// Webhooks find nobody, and nobody reads events.
    pub async fn die(&self) {
        self.gate.set(true);
        self.receiver.set_open(false).await;
    }

    pub async fn revive(&self) {
        self.receiver.set_open(true).await;
        self.gate.set(false);
    }
}

/// Mostly 200; sometimes an error, sometimes late, sometimes taken and yet not answered.
fn answers(journal: Arc<Journal>, chance: Chance) -> Answers {
    let chance = Arc::new(Mutex::new(chance));
    Arc::new(move |request| {
        let drawn = chance.lock().unwrap_or_else(PoisonError::into_inner).below(100);
        let journal = Arc::clone(&journal);
        Box::pin(async move {
            let (answer, wait_ms) = match drawn {
                0..5 => (Some(500), 0),
                5..8 => (None, 0),
                8..12 => (Some(200), drawn * 20),
                _ => (Some(200), 0),
            };
            let name = request.headers().get("webhook-id").and_then(|id| id.to_str().ok());
            let (name, body) = (name.unwrap_or_default().to_owned(), request.body());
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            journal.write(&arrival(Channel::Webhook, name, body, answer)).await;
            answer
        })
    })
}

fn arrival(channel: Channel, id: String, bytes: &[u8], answer: Option<u16>) -> Arrival {
    let at = SystemClock.now_ms();
    match serde_json::from_slice(bytes) {
        Ok(body) => {
            let hash = hex::encode(Sha256::digest(bytes));
            Arrival::Told(Box::new(Told { at, channel, id, hash, answer, body }))
        }
        Err(_) => Arrival::Unreadable { at, unreadable: String::from_utf8_lossy(bytes).into() },
    }
}

fn read_events(stdout: ChildStdout, journal: &Journal, gate: &Gate) {
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        gate.pass();
        line.clear();
        let read = reader.read_until(b'\n', &mut line).expect("a pipe can be read");
        // A line that the kill cut off was not published: it is still owed.
        if read == 0 || line.last() != Some(&b'\n') {
            return;
        }
        let event: Result<EventLine<'_>, _> = serde_json::from_slice(&line);
        journal.note(&match event {
            Ok(event) => {
                arrival(Channel::Event, event.id, event.detail.get().as_bytes(), Some(200))
            }
            Err(_) => Arrival::Unreadable {
                at: SystemClock.now_ms(),
                unreadable: String::from_utf8_lossy(&line).into(),
            },
        });
    }
}

/// Holds up the reader of events.
#[derive(Default)]
struct Gate {
    is_shut: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn set(&self, shut: bool) {
        *self.is_shut.lock().unwrap_or_else(PoisonError::into_inner) = shut;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let is_shut = self.is_shut.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(is_shut, |shut| *shut));
    }
}
