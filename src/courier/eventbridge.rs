//! Events: `PutEvents`, up to ten a call. The call answers entry by entry, and so does the courier.

use std::time::Duration;

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_sdk_eventbridge::{
    Client,
    config::http::HttpResponse,
    error::{ProvideErrorMetadata, SdkError},
    operation::put_events::{PutEventsError, PutEventsOutput},
    primitives::DateTime,
    types::{PutEventsRequestEntry, PutEventsResultEntry},
};

use super::{Courier, Noted, Parcel, causes};
use crate::{
    clock::Stopwatch,
    domain::{delivery::Attempted, payment::Trace, time::Timestamp},
};

/// Of one call (AWS: `PutEvents`).
const CALL_MAX_ENTRIES: usize = 10;
/// Of one call, as AWS counts its entries. AWS takes 1 MiB since January 2026, not yet everywhere.
const CALL_MAX_BYTES: usize = 256 * 1024;
/// Full calls at a time: at 20 ms a call, 30,000 events a second.
const CALLS_MAX: usize = 64;
/// What AWS counts for an entry's `Time`.
const TIME_BYTES: usize = 14;
/// What is kept of an error code: AWS's own are shorter.
const CODE_MAX_CHARS: usize = 64;

const OK: u16 = 200;
const PAYLOAD_TOO_LARGE: u16 = 413;

type PutError = SdkError<PutEventsError, HttpResponse>;

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

    /// As AWS counts it: no names, no bus, no trace header.
    fn entry_bytes(&self, parcel: &Parcel) -> usize {
        TIME_BYTES + self.source.len() + parcel.topic.detail_type().len() + parcel.body.len()
    }

    /// Which parcels go together: places in the batch, in its order.
    fn calls(&self, batch: &[Parcel]) -> Vec<Vec<usize>> {
        let mut calls: Vec<Vec<usize>> = Vec::new();
        let mut call_bytes = 0;
        for (place, parcel) in batch.iter().enumerate() {
            let bytes = self.entry_bytes(parcel);
            if bytes > CALL_MAX_BYTES {
                continue;
            }
            match calls.last_mut() {
                Some(call)
                    if call.len() < CALL_MAX_ENTRIES && call_bytes + bytes <= CALL_MAX_BYTES =>
                {
                    call.push(place);
                    call_bytes += bytes;
                }
                _ => {
                    calls.push(vec![place]);
                    call_bytes = bytes;
                }
            }
        }
        calls
    }

    /// One verdict a parcel. A call that is refused for what is in it says nothing of which entry that is:
    /// each then goes alone, so that one bad entry cannot hold up nine others for ever.
    async fn put(&self, parcels: &[&Parcel], now: Timestamp) -> Vec<Attempted> {
        let answer = self.send(parcels, now).await;
        if parcels.len() < 2 || !answer.is_refused_for_content {
            return answer.verdicts;
        }
        let mut verdicts = Vec::with_capacity(parcels.len());
        for parcel in parcels {
            verdicts.extend(self.send(&[parcel], now).await.verdicts);
        }
        verdicts
    }

    async fn send(&self, parcels: &[&Parcel], now: Timestamp) -> Answer {
        let watch = Stopwatch::start();
        let entries = parcels.iter().map(|parcel| self.entry(parcel)).collect();
        let reply = self.client.put_events().set_entries(Some(entries)).send().await;
        let noted = Noted { at: now, took: watch.elapsed(), http_status: None };
        match reply {
            Ok(output) => Answer {
                verdicts: entry_by_entry(&output, parcels.len(), noted),
                is_refused_for_content: false,
            },
            Err(error) => {
                let is_refused_for_content = is_refused_for_content(&error);
                let verdict = of_the_call(&error, is_refused_for_content, noted);
                Answer { verdicts: vec![verdict; parcels.len()], is_refused_for_content }
            }
        }
    }

    fn entry(&self, parcel: &Parcel) -> PutEventsRequestEntry {
        PutEventsRequestEntry::builder()
            .time(DateTime::from_millis(parcel.at.ms()))
            .source(&self.source)
            .detail_type(parcel.topic.detail_type())
            .event_bus_name(&self.bus)
            // A body that is not UTF-8 is not JSON either: the bus refuses it as MalformedDetail.
            .detail(String::from_utf8_lossy(&parcel.body))
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
        let unsent = Noted { at: now, took: Duration::ZERO, http_status: None };
        // What no call takes is what is too large for any.
        let mut verdicts = vec![unsent.refused("ENTRY_TOO_LARGE"); batch.len()];
        for places in self.calls(batch) {
            let parcels: Vec<_> = places.iter().map(|place| &batch[*place]).collect();
            for (place, verdict) in places.into_iter().zip(self.put(&parcels, now).await) {
                verdicts[place] = verdict;
            }
        }
        verdicts
    }
}

/// What came of a call: one verdict a parcel.
struct Answer {
    verdicts: Vec<Attempted>,
    is_refused_for_content: bool,
}

fn entry_by_entry(output: &PutEventsOutput, sent: usize, noted: Noted) -> Vec<Attempted> {
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
    let code = code.strip_suffix("Exception").unwrap_or(code);
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

/// Whether the call was refused for what is in its entries. A whole call that is denied is not among
/// these: that is about who we are (credentials, policy, clock), an operator mends it, and the events are
/// as good as before.
fn is_refused_for_content(error: &PutError) -> bool {
    let SdkError::ServiceError(refusal) = error else { return false };
    let code = error.code().unwrap_or_default();
    let code = code.strip_suffix("Exception").unwrap_or(code);
    refusal.raw().status().as_u16() == PAYLOAD_TOO_LARGE
        || matches!(
            code,
            "Validation"
                | "InvalidArgument"
                | "MalformedDetail"
                | "Serialization"
                | "RequestEntityTooLarge"
        )
}

fn of_the_call(error: &PutError, is_refused_for_content: bool, noted: Noted) -> Attempted {
    let http_status = error.raw_response().map(|reply| reply.status().as_u16());
    let noted = Noted { http_status, ..noted };
    let why = match error {
        SdkError::TimeoutError(_) => "TIMEOUT".to_owned(),
        SdkError::DispatchFailure(failure) if failure.is_timeout() => "TIMEOUT".to_owned(),
        SdkError::DispatchFailure(failure) if failure.is_io() || is_of_http(error) => {
            "CONNECTION".to_owned()
        }
        // Neither time nor network: what the SDK needs before it can send, credentials above all.
        SdkError::DispatchFailure(_) | SdkError::ConstructionFailure(_) => "NOT_SENT".to_owned(),
        _ => match (error.code(), http_status) {
            (Some(code), _) => kept(code),
            (None, Some(status)) if status != OK => format!("HTTP {status}"),
            (None, _) => "MALFORMED_REPLY".to_owned(),
        },
    };
    // The SDK's own words name hosts and profiles: for the log, not for the attempt.
    tracing::debug!(error = %aws_sdk_eventbridge::error::DisplayErrorContext(error), "PutEvents failed");
    if is_refused_for_content { noted.refused(why) } else { noted.retry(why, None) }
}

/// Whether it went wrong on the wire, replies that are no HTTP included.
fn is_of_http(error: &PutError) -> bool {
    causes(error).any(|e| e.is::<hyper::Error>() || e.is::<hyper_util::client::legacy::Error>())
}

/// A code of AWS's, as far as it looks like one.
fn kept(code: &str) -> String {
    let word = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    code.chars().filter(word).take(CODE_MAX_CHARS).collect()
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
