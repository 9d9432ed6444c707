//! The AWS that events and letters go to: a bus and two queues, which outlive the service. They err now and
//! then by chance, and go away on order. What reaches them is in the journal before the reply goes.

use std::{collections::BTreeMap, sync::Arc};

use payment_sim::clock::SystemClock;
use serde::Deserialize;

use crate::{
    arrival::{Arrival, Carrier, Envelope, Letter, Received},
    fake_aws::{self, Call, Entry, FakeAws, Fate, Fault, Options},
    journal::Journal,
    support::{chance::Chance, process::Launch},
};

const BUS: &str = "crash";
const RULE: &str = r#"{"source": ["payment-sim-api"], "detail-type": ["Payment Status Updated"]}"#;
/// Only to be asked for by the check at start: nobody receives.
const VISIBILITY_S: u32 = 30;

/// Which operation, which code says "not now", and which "never".
const PUT_EVENTS: Operation =
    Operation { name: "PutEvents", passing: "InternalFailure", lasting: "MalformedDetail" };
const SEND_MESSAGES: Operation = Operation {
    name: "SendMessageBatch",
    passing: "InternalError",
    lasting: "InvalidMessageContents",
};

#[derive(Clone, Copy)]
struct Operation {
    name: &'static str,
    passing: &'static str,
    lasting: &'static str,
}

pub struct Queue {
    fake: FakeAws,
    events_url: String,
    letters_url: String,
}

impl Queue {
    pub async fn start(journal: Arc<Journal>) -> Self {
        let on_call = move |call: &Call| arrivals(call).iter().for_each(|told| journal.note(told));
        let on_call = Some(Box::new(on_call) as _);
        let options = Options { keeps_calls: false, on_call, ..Options::new(SystemClock) };
        let fake = FakeAws::start(options).await;
        let events_url = fake.route(BUS, "payments", RULE, "payments");
        let letters_url = fake.queue("letters", VISIBILITY_S, None);
        Self { fake, events_url, letters_url }
    }

    /// So that a service finds it, whichever sink it has.
    pub fn reached_by(&self, launch: Launch) -> Launch {
        launch
            .with("AWS_ENDPOINT_URL", &self.fake.url)
            .with("AWS_REGION", fake_aws::REGION)
            .with("AWS_ACCESS_KEY_ID", "test")
            .with("AWS_SECRET_ACCESS_KEY", "test")
            .with("AWS_EC2_METADATA_DISABLED", "true")
            .with("EVENT_BUS_NAME", BUS)
            .with("PAYMENT_WEBHOOK_QUEUE_URL", &self.events_url)
            .with("PAYMENT_WEBHOOK_DLQ_URL", &self.letters_url)
    }

    /// Calls fail now and then, until it behaves.
    pub fn errs(&self, chance: &Chance) {
        for (n, operation) in (0..).zip([PUT_EVENTS, SEND_MESSAGES]) {
            let mut chance = chance.branch(n);
            let trouble = move |entries: &[&str]| trouble(operation, entries, &mut chance);
            self.fake.always(operation.name, trouble);
        }
    }

    pub fn behaves(&self) {
        self.fake.behaves();
    }

    /// While it is away, lines are cut, and nobody answers.
    pub fn set_away(&self, is_away: bool) {
        self.fake.set_reachable(!is_away);
    }
}

/// Few of the kinds after which the service leaves the whole sink alone: a run has no time for its pauses.
fn trouble(operation: Operation, entries: &[&str], chance: &mut Chance) -> Option<Fault> {
    let count = u64::try_from(entries.len()).expect("small");
    let place = usize::try_from(chance.below(count)).expect("small");
    // A letter that is refused for good is not sent again: those that must arrive would not.
    let is_letter = entries.iter().any(|entry| entry.contains(r#""MessageAttributes""#));
    match chance.below(200) {
        0 => Some(Fault::CutBefore),
        1..4 => Some(Fault::CutAfter),
        4 => Some(Fault::throttle()),
        5 => Some(Fault::garble(200, "<html>")),
        6..8 => Some(Fault::AnswerTwice),
        8..20 => Some(Fault::entry(place, operation.passing)),
        20..24 if !is_letter => Some(Fault::entry(place, operation.lasting)),
        _ => None,
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct BusEntry {
    detail: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct QueueEntry {
    id: String,
    message_body: String,
    #[serde(default)]
    message_attributes: BTreeMap<String, Attribute>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Attribute {
    string_value: String,
}

fn arrivals(call: &Call) -> Vec<Arrival> {
    let read = match call.operation.as_str() {
        name if name == PUT_EVENTS.name => of_bus,
        name if name == SEND_MESSAGES.name => of_queue,
        _ => return Vec::new(),
    };
    let answered = call.entries.iter().filter_map(|entry| Some((entry, answer(entry)?)));
    let arrival = |(entry, answer): (&Entry, u16)| {
        read(&entry.raw, answer).unwrap_or_else(|| Arrival::unreadable(entry.raw.as_bytes()))
    };
    answered.map(arrival).collect()
}

/// In the words of HTTP; `None` where the call as a whole was refused.
fn answer(entry: &Entry) -> Option<u16> {
    match &entry.fate {
        Fate::Taken(_) => Some(200),
        Fate::Failed(code) if [PUT_EVENTS.passing, SEND_MESSAGES.passing].contains(&&**code) => {
            Some(503)
        }
        Fate::Failed(_) => Some(400),
        Fate::Untouched => None,
    }
}

/// An entry of `PutEvents` has no name but the one in its detail.
fn of_bus(raw: &str, answer: u16) -> Option<Arrival> {
    let entry: BusEntry = serde_json::from_str(raw).ok()?;
    let detail: BTreeMap<String, serde_json::Value> = serde_json::from_str(&entry.detail).ok()?;
    Some(Arrival::of(Received {
        carrier: Carrier::Bus,
        id: detail.get("event_id")?.as_str()?.to_owned(),
        whole: raw.as_bytes(),
        body: entry.detail.as_bytes(),
        answer: Some(answer),
        letter: None,
    }))
}

fn of_queue(raw: &str, answer: u16) -> Option<Arrival> {
    let entry: QueueEntry = serde_json::from_str(raw).ok()?;
    let received = Received {
        carrier: Carrier::Letter,
        id: entry.id,
        whole: entry.message_body.as_bytes(),
        body: entry.message_body.as_bytes(),
        answer: Some(answer),
        letter: None,
    };
    if entry.message_attributes.is_empty() {
        let envelope: Envelope<'_> = serde_json::from_str(&entry.message_body).ok()?;
        let (carrier, body) = (Carrier::Queue, envelope.detail.get().as_bytes());
        return Some(Arrival::of(Received { carrier, body, ..received }));
    }
    let text = |name| Some(entry.message_attributes.get(name)?.string_value.clone());
    let letter = Letter {
        event_id: text("event_id")?,
        event_type: text("event_type")?,
        webhook_url: text("webhook_url")?,
        reason: text("reason")?,
        attempts: text("attempts")?,
        died_at: text("died_at")?,
    };
    Some(Arrival::of(Received { letter: Some(letter), ..received }))
}
