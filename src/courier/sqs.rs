//! Queues: events straight to one, in EventBridge's envelope, and letters about webhooks that were given
//! up. `SendMessageBatch`, up to ten a call; the call answers entry by entry, and so do the couriers.

use std::collections::HashMap;

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_sdk_sqs::{
    Client,
    operation::send_message_batch::SendMessageBatchOutput,
    types::{BatchResultErrorEntry, MessageAttributeValue, SendMessageBatchRequestEntry},
};
use serde::Serialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::{
    Courier, Noted, Parcel,
    aws_call::{
        self, Answer, Batched, CALL_MAX_BYTES, CALL_MAX_ENTRIES, CALLS_MAX, OK, bare, kept,
    },
};
use crate::{
    clock::Stopwatch,
    domain::{
        delivery::{Attempted, Verdict},
        time::Timestamp,
    },
};

/// Where a queue's URL names no account.
const NO_ACCOUNT: &str = "000000000000";
const ACCOUNT_DIGITS: usize = 12;

/// Events to the queue that a rule of EventBridge would fill: whoever reads it sees no difference.
pub struct SqsCourier {
    queue: Queue,
    source: String,
    account: String,
    region: String,
}

impl SqsCourier {
    /// `config` as `aws::sdk_config` makes it: without retries of its own, and with a region.
    pub fn new(config: &SdkConfig, queue_url: String, source: String) -> Self {
        let region = config.region().map(ToString::to_string).unwrap_or_default();
        let account = account(&queue_url).to_owned();
        Self { queue: Queue::new(config, queue_url), source, account, region }
    }

    /// `None` for a body that is not JSON.
    fn message(&self, parcel: &Parcel) -> Option<Message> {
        let time = jiff::Timestamp::from_second(parcel.at.seconds()).ok()?.to_string();
        let envelope = Envelope {
            version: "0",
            id: envelope_id(&parcel.event_id),
            detail_type: parcel.topic.detail_type(),
            source: &self.source,
            account: &self.account,
            time: &time,
            region: &self.region,
            resources: [],
            detail: serde_json::from_slice(&parcel.body).ok()?,
        };
        let body = serde_json::to_string(&envelope)
            .expect("an envelope has string keys, and memory takes every write");
        Some(Message {
            id: parcel.event_id.clone(),
            body: as_sqs_takes_it(body),
            attributes: Vec::new(),
            group: parcel.payment.intent(),
            deduplication: parcel.event_id.clone(),
        })
    }
}

/// Keys and order as in what EventBridge delivers.
#[derive(Serialize)]
struct Envelope<'a> {
    version: &'a str,
    id: String,
    #[serde(rename = "detail-type")]
    detail_type: &'a str,
    source: &'a str,
    account: &'a str,
    time: &'a str,
    region: &'a str,
    resources: [&'a str; 0],
    detail: &'a RawValue,
}

/// In the form of AWS's own (a random UUID, version 4), but made from the event's id: a repeat is the same
/// bytes.
fn envelope_id(event_id: &str) -> String {
    let mut id = [0; 16];
    id.copy_from_slice(&Sha256::digest(event_id)[..16]);
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    let hex = hex::encode(id);
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// `https://sqs.<region>.amazonaws.com/<account>/<name>`; emulators keep to the path.
fn account(queue_url: &str) -> &str {
    let is_account =
        |part: &str| part.len() == ACCOUNT_DIGITS && part.bytes().all(|b| b.is_ascii_digit());
    queue_url.rsplit('/').nth(1).filter(|part| is_account(part)).unwrap_or(NO_ACCOUNT)
}

#[async_trait]
impl Courier for SqsCourier {
    fn batch_max(&self) -> usize {
        CALL_MAX_ENTRIES
    }

    fn calls_max(&self) -> usize {
        CALLS_MAX
    }

    async fn attempt(&self, batch: &[Parcel], now: Timestamp) -> Vec<Attempted> {
        let message = |(place, parcel)| Some((place, self.message(parcel)?));
        let (places, messages): (Vec<usize>, Vec<Message>) =
            batch.iter().enumerate().filter_map(message).unzip();
        let mut verdicts = vec![Noted::unsent(now).refused("MALFORMED_DETAIL"); batch.len()];
        let sent = aws_call::attempt(&self.queue, &messages, now).await;
        for (place, verdict) in places.into_iter().zip(sent) {
            verdicts[place] = verdict;
        }
        verdicts
    }
}

/// Letters about webhooks that were given up: the body unchanged, and beside it why and when.
pub struct DeadLetterCourier {
    queue: Queue,
}

impl DeadLetterCourier {
    /// `config` as `aws::sdk_config` makes it: without retries of its own.
    pub fn new(config: &SdkConfig, queue_url: String) -> Self {
        Self { queue: Queue::new(config, queue_url) }
    }
}

#[async_trait]
impl Courier for DeadLetterCourier {
    fn batch_max(&self) -> usize {
        CALL_MAX_ENTRIES
    }

    async fn attempt(&self, batch: &[Parcel], now: Timestamp) -> Vec<Attempted> {
        let letters: Vec<_> = batch.iter().map(letter).collect();
        let verdicts = aws_call::attempt(&self.queue, &letters, now).await;
        for (parcel, done) in batch.iter().zip(&verdicts) {
            if done.verdict == Verdict::Refused {
                let error = done.attempt.error.as_deref().unwrap_or_default();
                tracing::error!(
                    event_id = parcel.event_id,
                    error,
                    "the dead-letter queue refused a dead webhook; only this service still lists it"
                );
            }
        }
        verdicts
    }
}

/// Where no dead-letter queue is set, for letters that an earlier run, which had one, still owes.
pub struct NoDeadLetterQueue;

#[async_trait]
impl Courier for NoDeadLetterQueue {
    fn batch_max(&self) -> usize {
        CALL_MAX_ENTRIES
    }

    async fn attempt(&self, batch: &[Parcel], now: Timestamp) -> Vec<Attempted> {
        vec![Noted::unsent(now).refused("NO_QUEUE"); batch.len()]
    }
}

fn letter(parcel: &Parcel) -> Message {
    let mut attributes = vec![
        Attribute::text("event_id", &parcel.event_id),
        Attribute::text("event_type", parcel.topic.event_type()),
    ];
    if let Some(url) = &parcel.url {
        attributes.push(Attribute::text("webhook_url", url));
    }
    let mut deduplication = parcel.event_id.clone();
    if let Some(death) = &parcel.death {
        let died_at = jiff::Timestamp::from_millisecond(death.at.ms()).unwrap_or_default();
        attributes.push(Attribute::text("reason", &death.why));
        attributes.push(Attribute::number("attempts", u64::from(death.attempts_made)));
        attributes.push(Attribute::text("died_at", &died_at.to_string()));
        // Sent again and dead once more within minutes is another letter.
        deduplication = format!("{deduplication}:{}", death.attempts_made);
    }
    let mut body = as_sqs_takes_it(String::from_utf8_lossy(&parcel.body).into_owned());
    let whole = body.len();
    let attribute_bytes: usize = attributes.iter().map(Attribute::bytes).sum();
    if attribute_bytes + whole > CALL_MAX_BYTES {
        attributes.push(Attribute::number("cut_from_bytes", whole as u64));
        let attribute_bytes: usize = attributes.iter().map(Attribute::bytes).sum();
        body.truncate(body.floor_char_boundary(CALL_MAX_BYTES - attribute_bytes));
    }
    Message {
        id: parcel.event_id.clone(),
        body,
        attributes,
        group: parcel.payment.intent(),
        deduplication,
    }
}

/// A queue takes what XML 1.0 takes. All else is written as JSON writes it, `\uXXXX`: in a JSON document,
/// where it can only be inside a string, that is the same document.
fn as_sqs_takes_it(text: String) -> String {
    let is_taken = |c: char| match c {
        '\t' | '\n' | '\r' => true,
        '\u{fffe}' | '\u{ffff}' => false,
        c => c >= ' ',
    };
    if text.chars().all(is_taken) {
        return text;
    }
    let mut out = String::with_capacity(text.len() + 6);
    for c in text.chars() {
        match is_taken(c) {
            true => out.push(c),
            false => out.push_str(&format!("\\u{:04x}", u32::from(c))),
        }
    }
    out
}

/// As a queue takes it.
struct Message {
    /// Names it in the call's answer.
    id: String,
    body: String,
    attributes: Vec<Attribute>,
    /// For FIFO queues: what keeps its order, and what makes a repeat the same message.
    group: String,
    deduplication: String,
}

struct Attribute {
    name: &'static str,
    data_type: &'static str,
    value: String,
}

impl Attribute {
    fn text(name: &'static str, value: &str) -> Self {
        Self { name, data_type: "String", value: as_sqs_takes_it(value.to_owned()) }
    }

    fn number(name: &'static str, value: u64) -> Self {
        Self { name, data_type: "Number", value: value.to_string() }
    }

    fn bytes(&self) -> usize {
        self.name.len() + self.data_type.len() + self.value.len()
    }

    fn value(&self) -> MessageAttributeValue {
        MessageAttributeValue::builder()
            .data_type(self.data_type)
            .string_value(&self.value)
            .build()
            .expect("it has a type")
    }
}

struct Queue {
    client: Client,
    url: String,
}

impl Queue {
    fn new(config: &SdkConfig, url: String) -> Self {
        Self { client: Client::new(config), url }
    }

    fn entry(&self, message: &Message) -> SendMessageBatchRequestEntry {
        let attributes = message.attributes.iter().map(|a| (a.name.to_owned(), a.value()));
        let attributes: HashMap<_, _> = attributes.collect();
        let is_fifo = self.url.ends_with(".fifo");
        SendMessageBatchRequestEntry::builder()
            .id(&message.id)
            .message_body(&message.body)
            .set_message_attributes((!attributes.is_empty()).then_some(attributes))
            .set_message_group_id(is_fifo.then(|| message.group.clone()))
            .set_message_deduplication_id(is_fifo.then(|| message.deduplication.clone()))
            .build()
            .expect("it has an id and a body")
    }
}

#[async_trait]
impl Batched for Queue {
    type Entry = Message;

    fn bytes(&self, message: &Message) -> usize {
        message.body.len() + message.attributes.iter().map(Attribute::bytes).sum::<usize>()
    }

    async fn send(&self, messages: &[&Message], now: Timestamp) -> Answer {
        let watch = Stopwatch::start();
        let entries = messages.iter().map(|message| self.entry(message)).collect();
        let call = self.client.send_message_batch().queue_url(&self.url);
        let reply = call.set_entries(Some(entries)).send().await;
        let noted = Noted { at: now, took: watch.elapsed(), http_status: None };
        match reply {
            Ok(output) => Answer::entry_by_entry(verdicts(&output, messages, noted)),
            Err(error) => Answer::failed(&error, is_of_content, messages.len(), noted),
        }
    }
}

/// The answer names entries by id, in an order of its own.
fn verdicts(output: &SendMessageBatchOutput, sent: &[&Message], noted: Noted) -> Vec<Attempted> {
    let noted = Noted { http_status: Some(OK), ..noted };
    let verdict = |message: &&Message| {
        if let Some(failed) = output.failed().iter().find(|entry| entry.id() == message.id) {
            return of_the_failed(failed, noted);
        }
        // Only a message id says that the queue has it.
        let has_it = output
            .successful()
            .iter()
            .any(|entry| entry.id() == message.id && !entry.message_id().is_empty());
        if has_it { noted.accepted() } else { noted.retry("NO_ANSWER", None) }
    };
    sent.iter().map(verdict).collect()
}

fn of_the_failed(entry: &BatchResultErrorEntry, noted: Noted) -> Attempted {
    let code = entry.code();
    if aws_call::is_throttling(code) {
        return noted.unavailable(kept(code));
    }
    // The sender's fault is also what an operator mends: a denied key, a queue being deleted.
    if entry.sender_fault() && is_of_content(bare(code)) {
        return noted.refused(kept(code));
    }
    noted.retry(kept(code), None)
}

/// The codes that are about a message itself, of an entry and of a whole call. All others are tried again,
/// those that we don't know too.
fn is_of_content(code: &str) -> bool {
    matches!(
        code,
        "BatchRequestTooLong"
            | "BatchEntryIdsNotDistinct"
            | "InvalidAttributeValue"
            | "InvalidBatchEntryId"
            | "InvalidMessageContents"
            | "InvalidParameterValue"
            | "MessageTooLong"
            | "MissingParameter"
            | "RequestEntityTooLarge"
            | "Serialization"
            | "Validation"
    )
}
