//! What the AWS couriers share: how a batch is cut into calls, and what a call that failed says.

use std::error::Error;

use async_trait::async_trait;
use aws_sdk_eventbridge::{
    config::http::HttpResponse,
    error::{DisplayErrorContext, ProvideErrorMetadata, SdkError},
};

use super::{Noted, causes};
use crate::domain::{delivery::Attempted, time::Timestamp};

/// Of one call (AWS: `PutEvents` and `SendMessageBatch`).
pub const CALL_MAX_ENTRIES: usize = 10;
/// Of one call, as AWS counts its entries. AWS takes 1 MiB of both since January 2026, but not
/// everywhere, nor into a queue that was made before.
pub const CALL_MAX_BYTES: usize = 256 * 1024;
/// Full calls at a time: at 20 ms a call, 30,000 events a second.
pub const CALLS_MAX: usize = 64;
pub const OK: u16 = 200;

const PAYLOAD_TOO_LARGE: u16 = 413;
/// What is kept of an error code: AWS's own are shorter.
const CODE_MAX_CHARS: usize = 64;

/// A service that takes several entries a call and answers entry by entry.
#[async_trait]
pub trait Batched: Sync {
    type Entry: Sync;

    /// As AWS counts it.
    fn bytes(&self, entry: &Self::Entry) -> usize;

    /// One call.
    async fn send(&self, entries: &[&Self::Entry], now: Timestamp) -> Answer;
}

/// What came of a call: one verdict an entry.
pub struct Answer {
    pub verdicts: Vec<Attempted>,
    is_refused_for_content: bool,
}

impl Answer {
    pub fn entry_by_entry(verdicts: Vec<Attempted>) -> Self {
        Self { verdicts, is_refused_for_content: false }
    }

    /// Of a call that failed as a whole. What is in its entries cannot be mended; everything else is the
    /// service's trouble (5xx, time-out, throttling) or about who we are (credentials, policy, clock): it
    /// passes or an operator mends it, and the entries are as good as before.
    ///
    /// `is_of_content` knows the service's codes, as [`bare`] gives them.
    pub fn failed<E>(
        error: &SdkError<E, HttpResponse>,
        is_of_content: fn(&str) -> bool,
        entries: usize,
        noted: Noted,
    ) -> Self
    where
        E: Error + ProvideErrorMetadata + 'static,
    {
        let http_status = http_status(error);
        let noted = Noted { http_status, ..noted };
        // The SDK's own words name hosts and profiles: for the log, not for the attempt.
        tracing::debug!(error = %DisplayErrorContext(error), "a call to AWS failed");
        let is_refused_for_content = match error {
            SdkError::ServiceError(_) => {
                http_status == Some(PAYLOAD_TOO_LARGE)
                    || error.code().is_some_and(|code| is_of_content(bare(code)))
            }
            _ => false,
        };
        let why = why(error);
        let verdict = match is_refused_for_content {
            true => noted.refused(why),
            false => noted.unavailable(why),
        };
        Self { verdicts: vec![verdict; entries], is_refused_for_content }
    }
}

/// One verdict an entry, in their order.
pub async fn attempt<S: Batched>(
    service: &S,
    entries: &[S::Entry],
    now: Timestamp,
) -> Vec<Attempted> {
    let unsent = Noted::unsent(now);
    // What no call takes is what is too large for any.
    let mut verdicts = vec![unsent.refused("ENTRY_TOO_LARGE"); entries.len()];
    for places in calls(service, entries) {
        let together: Vec<_> = places.iter().map(|place| &entries[*place]).collect();
        for (place, verdict) in places.into_iter().zip(call(service, &together, now).await) {
            verdicts[place] = verdict;
        }
    }
    verdicts
}

/// Which entries go together: places in the batch, in its order.
fn calls<S: Batched>(service: &S, entries: &[S::Entry]) -> Vec<Vec<usize>> {
    let mut calls: Vec<Vec<usize>> = Vec::new();
    let mut call_bytes = 0;
    for (place, entry) in entries.iter().enumerate() {
        let bytes = service.bytes(entry);
        if bytes > CALL_MAX_BYTES {
            continue;
        }
        match calls.last_mut() {
            Some(call) if call.len() < CALL_MAX_ENTRIES && call_bytes + bytes <= CALL_MAX_BYTES => {
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

/// A call that is refused for what is in it says nothing of which entry that is: each then goes alone, so
/// that one bad entry cannot hold up nine others for ever.
async fn call<S: Batched>(service: &S, entries: &[&S::Entry], now: Timestamp) -> Vec<Attempted> {
    let answer = service.send(entries, now).await;
    if entries.len() < 2 || !answer.is_refused_for_content {
        return answer.verdicts;
    }
    let mut verdicts = Vec::with_capacity(entries.len());
    for entry in entries {
        verdicts.extend(service.send(&[entry], now).await.verdicts);
    }
    verdicts
}

/// A code without what some protocols of AWS put around it:
/// `AWS.SimpleQueueService.InvalidBatchEntryId`, `ValidationException`.
pub fn bare(code: &str) -> &str {
    let last = code.rsplit(['.', '#']).next().unwrap_or(code);
    last.strip_suffix("Exception").unwrap_or(last)
}

/// Whether an entry's code says that the service takes less than it is sent: then everything waits.
pub fn is_throttling(code: &str) -> bool {
    matches!(
        bare(code),
        "Throttling"
            | "RequestThrottled"
            | "RequestLimitExceeded"
            | "LimitExceeded"
            | "TooManyRequests"
            | "SlowDown"
            | "ServiceUnavailable"
    )
}

/// A code of AWS's, as far as it looks like one.
pub fn kept(code: &str) -> String {
    let word = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    code.chars().filter(word).take(CODE_MAX_CHARS).collect()
}

/// In a word, why a call failed.
pub fn why<E>(error: &SdkError<E, HttpResponse>) -> String
where
    E: Error + ProvideErrorMetadata + 'static,
{
    match error {
        SdkError::TimeoutError(_) => "TIMEOUT".to_owned(),
        SdkError::DispatchFailure(failure) if failure.is_timeout() => "TIMEOUT".to_owned(),
        SdkError::DispatchFailure(failure) if failure.is_io() || is_of_http(error) => {
            "CONNECTION".to_owned()
        }
        // Neither time nor network: what the SDK needs before it can send, credentials above all.
        SdkError::DispatchFailure(_) | SdkError::ConstructionFailure(_) => "NOT_SENT".to_owned(),
        _ => match (error.code(), http_status(error)) {
            (Some(code), _) => kept(code),
            (None, Some(status)) if status != OK => format!("HTTP {status}"),
            (None, _) => "MALFORMED_REPLY".to_owned(),
        },
    }
}

fn http_status<E>(error: &SdkError<E, HttpResponse>) -> Option<u16> {
    error.raw_response().map(|reply| reply.status().as_u16())
}

/// Whether it went wrong on the wire, replies that are no HTTP included.
fn is_of_http(error: &(dyn Error + 'static)) -> bool {
    causes(error).any(|e| e.is::<hyper::Error>() || e.is::<hyper_util::client::legacy::Error>())
}
