//! Events: `PutEvents`, up to ten a call. The call answers entry by entry, and so does the courier.

use std::borrow::Cow;

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_sdk_eventbridge::{
    Client,
    operation::put_events::PutEventsOutput,
    primitives::DateTime,
    types::{PutEventsRequestEntry, PutEventsResultEntry},
};

use super::{
    Courier, Noted, Parcel,
    aws_call::{self, Answer, Batched, CALL_MAX_ENTRIES, CALLS_MAX, OK, bare, is_throttling, kept},
};
use crate::{
    clock::Stopwatch,
    domain::{delivery::Attempted, payment::Trace, time::Timestamp},
};

/// What AWS counts for an entry's `Time`.
const TIME_BYTES: usize = 14;

pub struct EventBridgeCourier {
    client: Client,
    bus: String,
    source: String,
}

impl EventBridgeCourier {
    /// `config` as `aws::sdk_config` makes it: without retries of its own.
    pub fn new(config: &SdkConfig, bus: String, source: String) -> Self {
        Self { client: Client::new(config), bus, source }
    }

    fn entry(&self, parcel: &Parcel) -> PutEventsRequestEntry {
        PutEventsRequestEntry::builder()
            .time(DateTime::from_millis(parcel.at.ms()))
            .source(&self.source)
            .detail_type(parcel.topic.detail_type())
            .event_bus_name(&self.bus)
            .detail(text(&parcel.body))
            .set_trace_header(trace_header(&parcel.trace))
            .build()
    }
}

#[async_trait]
impl Courier for EventBridgeCourier {
    fn batch_max(&self) -> usize {
        CALL_MAX_ENTRIES
    }

    fn calls_max(&self) -> usize {
        CALLS_MAX
    }

    async fn attempt(&self, batch: &[Parcel], now: Timestamp) -> Vec<Attempted> {
        aws_call::attempt(self, batch, now).await
    }
}

#[async_trait]
impl Batched for EventBridgeCourier {
    type Entry = Parcel;

    /// No names, no bus, no trace header.
    fn bytes(&self, parcel: &Parcel) -> usize {
        TIME_BYTES + self.source.len() + parcel.topic.detail_type().len() + parcel.body.len()
    }

    async fn send(&self, parcels: &[&Parcel], now: Timestamp) -> Answer {
        let watch = Stopwatch::start();
        let entries = parcels.iter().map(|parcel| self.entry(parcel)).collect();
        let reply = self.client.put_events().set_entries(Some(entries)).send().await;
        let noted = Noted { at: now, took: watch.elapsed(), http_status: None };
        match reply {
            Ok(output) => Answer::entry_by_entry(verdicts(&output, parcels.len(), noted)),
            Err(error) => Answer::failed(&error, is_of_content, parcels.len(), noted),
        }
    }
}

/// One that is not UTF-8 is not JSON either: the bus refuses it as MalformedDetail.
fn text(body: &[u8]) -> Cow<'_, str> {
    match str::from_utf8(body) {
        // Quicker than to look for what is wrong: nothing is.
        Ok(text) => Cow::Borrowed(text),
        Err(_) => String::from_utf8_lossy(body),
    }
}

fn verdicts(output: &PutEventsOutput, sent: usize, noted: Noted) -> Vec<Attempted> {
    let noted = Noted { http_status: Some(OK), ..noted };
    let verdict = |place| match output.entries().get(place) {
        Some(entry) => of_the_entry(entry, noted),
        None => noted.retry("NO_ANSWER", None),
    };
    (0..sent).map(verdict).collect()
}

fn of_the_entry(entry: &PutEventsResultEntry, noted: Noted) -> Attempted {
    match (entry.event_id(), entry.error_code()) {
        (_, Some(code)) if is_final(code) => noted.refused(kept(code)),
        (_, Some(code)) if is_throttling(code) => noted.unavailable(kept(code)),
        (_, Some(code)) => noted.retry(kept(code), None),
        (Some(_), None) => noted.accepted(),
        // Only an id says that the bus has it.
        (None, None) => noted.retry("NO_ANSWER", None),
    }
}

/// The codes that AWS says not to try again, of an entry. All others are tried again, those that we don't
/// know too: trying in vain costs a call a minute, giving up loses an event.
///
/// `ResourceNotFoundException` is among the others on purpose: a bus that is not there yet can be made
/// later, and nothing about the event is wrong.
fn is_final(code: &str) -> bool {
    let code = bare(code);
    code.starts_with("NotAuthorizedFor")
        || matches!(
            code,
            "AccessDenied"
                | "InvalidAccountId"
                | "InvalidArgument"
                | "MalformedDetail"
                | "RedactionFailure"
                | "Validation"
        )
}

/// Whether a whole call was refused for what is in its entries. One that is denied is not among these.
fn is_of_content(code: &str) -> bool {
    matches!(
        code,
        "Validation"
            | "InvalidArgument"
            | "MalformedDetail"
            | "Serialization"
            | "RequestEntityTooLarge"
    )
}

/// X-Ray's spelling of the trace of the request that made the payment.
fn trace_header(trace: &Trace) -> Option<String> {
    if trace.trace_id == [0; 16] {
        return None;
    }
    let root = hex::encode(trace.trace_id);
    let (seconds, rest) = root.split_at(8);
    let parent = hex::encode(trace.parent_span);
    Some(format!("Root=1-{seconds}-{rest};Parent={parent};Sampled={}", u8::from(trace.sampled)))
}
