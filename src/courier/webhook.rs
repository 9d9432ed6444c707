//! Webhooks: one signed POST a parcel, over pooled connections, HTTP/2 where the receiver agrees to it.

use std::{
    error::Error,
    io,
    time::{Duration, UNIX_EPOCH},
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri,
    header::{CONTENT_TYPE, RETRY_AFTER, USER_AGENT},
    uri::Scheme,
};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{
        self, Client,
        connect::{Connect, capture_connection},
    },
    rt::{TokioExecutor, TokioTimer},
};
use sha2::{Digest, Sha256};
use url::Url;

use super::{
    Courier, Noted, Parcel, causes,
    connect::{
        self, AddressRefused, CONNECT_MAX, ConnectSettings, ConnectTimeout, Connector, LookupFailed,
    },
    connection, tls,
};
pub use crate::domain::origin::{Origin, origin};
use crate::{
    clock::Stopwatch,
    domain::{delivery::Attempted, payment::Trace, signature::Signer, time::Timestamp},
    egress::Policy,
    recent::Recent,
};

/// How much of a reply's body is read, so that its connection can be used again. A longer one is cut off:
/// nobody looks at it, and a new connection is cheaper.
const REPLY_BODY_MAX_BYTES: usize = 64 * 1024;
/// How long a reply's body is waited for once its status is known; the same trade as above.
const REPLY_BODY_WAIT: Duration = Duration::from_millis(500);
/// The most that a reply's head, or one piece of its body, can take; hyper reads up to two pieces ahead.
const READ_BUFFER_MAX_BYTES: usize = 16 * 1024;
/// The same for HTTP/2: one frame and one reply's head, what a receiver may send of one body and of all
/// bodies on a connection before somebody has read, and what we hold that it does not take.
const FRAME_MAX_BYTES: u32 = 16 * 1024;
const HEAD_MAX_BYTES: u32 = 16 * 1024;
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 256 * 1024;
const UNTAKEN_MAX_BYTES: usize = 64 * 1024;
/// Streams that we have reset and still remember, and those of a receiver that breaks the protocol.
const RESETS_MAX: usize = 128;
/// Idle connections are closed before the receiver does it: node and uvicorn wait 5 s, others longer. A
/// POST that meets a connection just being closed fails, and costs the delivery one of its attempts.
const IDLE_MAX: Duration = Duration::from_secs(4);

/// Room for ours and the one that hyper adds, so that the map does not grow.
const HEADERS: usize = 9;
const AGENT: HeaderValue =
    HeaderValue::from_static(concat!("payment-sim/", env!("CARGO_PKG_VERSION")));
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const LEGACY_SIGNATURE: HeaderName = HeaderName::from_static("x-webhook-signature");
const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

#[derive(Clone, Debug)]
pub struct WebhookSettings {
    pub signer: Signer,
    /// Of one attempt, from the look-up of the name to the reply's status.
    pub timeout: Duration,
    /// Idle connections kept an origin; as many as attempts may be under way there.
    pub idle_per_origin: usize,
}

/// Generic in how it connects: tests bring connections of their own.
pub struct WebhookCourier<C = Connector> {
    client: Client<C, Full<Bytes>>,
    targets: Recent<Option<Uri>>,
    signer: Signer,
    timeout: Duration,
}

impl WebhookCourier {
    /// Loads the machine's root certificates: once, at start.
    pub fn new(policy: Policy, settings: WebhookSettings) -> Self {
        let connector = connect::connector(ConnectSettings {
            tls: tls::with_native_roots(),
            policy,
            connect_max: CONNECT_MAX,
            attempt_max: settings.timeout,
        });
        Self::with_connector(connector, settings)
    }
}

impl<C: Connect + Clone + Send + Sync + 'static> WebhookCourier<C> {
    pub fn with_connector(connector: C, settings: WebhookSettings) -> Self {
        // The executor runs each connection's reading and writing. Such a task owes nothing to anyone:
        // it ends with its connection, and what it carried is still owed.
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_MAX)
            .pool_max_idle_per_host(settings.idle_per_origin)
            .http1_max_buf_size(READ_BUFFER_MAX_BYTES)
            .http2_max_frame_size(FRAME_MAX_BYTES)
            .http2_max_header_list_size(HEAD_MAX_BYTES)
            .http2_initial_stream_window_size(STREAM_WINDOW_BYTES)
            .http2_initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_max_send_buf_size(UNTAKEN_MAX_BYTES)
            .http2_max_concurrent_reset_streams(RESETS_MAX)
            .http2_max_local_error_reset_streams(RESETS_MAX)
            .build(connector);
        let targets = Recent::default();
        Self { client, targets, signer: settings.signer, timeout: settings.timeout }
    }

    async fn post(&self, parcel: &Parcel, now: Timestamp) -> Attempted {
        let unsent = Noted::unsent(now);
        // Both were checked when the payment was made; trying again would not mend them.
        let Some(url) = &parcel.url else { return unsent.refused("NO_WEBHOOK_URL") };
        let Some(mut request) = self.request(url, parcel, now) else {
            return unsent.refused("BAD_URL");
        };
        let taken = is_looked_at(&request).then(|| capture_connection(&mut request));

        let watch = Stopwatch::start();
        let reply = tokio::time::timeout(self.timeout, self.client.request(request)).await;
        let noted = Noted { took: watch.elapsed(), ..unsent };
        let timed_out = reply.is_err();
        let verdict = match reply {
            Err(_elapsed) => noted.retry("TIMEOUT", None),
            Ok(Err(error)) if is_caused_by::<AddressRefused>(&error) => {
                noted.refused("ADDRESS_REFUSED")
            }
            Ok(Err(error)) => noted.retry(reason(&error), None),
            Ok(Ok(reply)) => {
                let verdict = judge(reply.status(), reply.headers(), noted);
                let left = self.timeout.saturating_sub(noted.took).min(REPLY_BODY_WAIT);
                let body = reply.into_body();
                if !body.is_end_stream() {
                    // The verdict stands, whatever comes of the body: a status is an answer.
                    let _cut_off = tokio::time::timeout(left, read_and_drop(body)).await;
                }
                verdict
            }
        };
        if let Some(taken) = taken {
            connection::after_use(&taken, timed_out);
        }
        verdict
    }

    fn request(&self, url: &str, parcel: &Parcel, now: Timestamp) -> Option<Request<Full<Bytes>>> {
        let (id, seconds) = (parcel.event_id.as_str(), now.seconds());
        let signature = self.signer.standard(id, seconds, &parcel.body);
        let mut headers = HeaderMap::with_capacity(HEADERS);
        headers.insert(CONTENT_TYPE, JSON);
        headers.insert(USER_AGENT, AGENT);
        headers.insert(LEGACY_SIGNATURE, self.signer.legacy(&parcel.body).try_into().ok()?);
        headers.insert(WEBHOOK_ID, id.try_into().ok()?);
        headers.insert(WEBHOOK_TIMESTAMP, seconds.into());
        headers.insert(WEBHOOK_SIGNATURE, signature.try_into().ok()?);
        if let Some(parent) = traceparent(&parcel.trace, id, now) {
            headers.insert(TRACEPARENT, parent);
        }
        let mut request = Request::new(Full::new(parcel.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.targets.get(url, target)?;
        *request.headers_mut() = headers;
        Some(request)
    }
}

#[async_trait]
impl<C: Connect + Clone + Send + Sync + 'static> Courier for WebhookCourier<C> {
    fn batch_max(&self) -> usize {
        1
    }

    async fn attempt(&self, batch: &[Parcel], now: Timestamp) -> Vec<Attempted> {
        let mut verdicts = Vec::with_capacity(batch.len());
        for parcel in batch {
            verdicts.push(self.post(parcel, now).await);
        }
        verdicts
    }
}

/// Whether an attempt looks at its connection afterwards, which costs a twentieth of it. Over TLS a connection may
/// be HTTP/2's, which outlives its requests, and has to be given up where it does not answer. Of any other only
/// the age matters: one in sixteen looks, by a digit of its signature, which is as good as drawn. A connection
/// with fewer requests a minute is closed between them.
fn is_looked_at<B>(request: &Request<B>) -> bool {
    let drawn = request.headers().get(LEGACY_SIGNATURE);
    request.uri().scheme() == Some(&Scheme::HTTPS)
        || drawn.is_some_and(|signature| signature.as_bytes().ends_with(b"0"))
}

/// Through the WHATWG parser first, as the check at create does: it spells hosts in one way and escapes
/// what HTTP cannot carry.
fn target(url: &str) -> Option<Uri> {
    let url = Url::parse(url).ok()?;
    let is_web = matches!(url.scheme(), "http" | "https") && url.host_str().is_some();
    // Never sent: HTTP/2 would carry them in `:authority`.
    let has_credentials = !url.username().is_empty() || url.password().is_some();
    (is_web && !has_credentials).then(|| url.as_str().parse().ok()).flatten()
}

/// The payment's trace, with a span of this attempt's own. Derived, not drawn: an attempt is named by its
/// event and moment, and within one trace nothing else has to differ.
fn traceparent(trace: &Trace, event_id: &str, now: Timestamp) -> Option<HeaderValue> {
    if trace.trace_id == [0; 16] {
        return None;
    }
    let digest =
        Sha256::new().chain_update(event_id).chain_update(now.ms().to_be_bytes()).finalize();
    let mut parent = *b"00-tttttttttttttttttttttttttttttttt-ssssssssssssssss-ff";
    hex::encode_to_slice(trace.trace_id, &mut parent[3..35]).ok()?;
    hex::encode_to_slice(&digest[..8], &mut parent[36..52]).ok()?;
    hex::encode_to_slice([u8::from(trace.sampled)], &mut parent[53..]).ok()?;
    HeaderValue::from_bytes(&parent).ok()
}

fn judge(status: StatusCode, headers: &HeaderMap, noted: Noted) -> Attempted {
    let noted = Noted { http_status: Some(status.as_u16()), ..noted };
    if status.is_success() {
        noted.accepted()
    } else if status == StatusCode::GONE {
        noted.refused("GONE")
    } else {
        let replied = noted.at.plus(noted.took);
        noted.retry(format!("HTTP {}", status.as_u16()), retry_after(headers, replied))
    }
}

/// Seconds from the reply on, or a date. What is neither is ignored: our own wait holds then.
fn retry_after(headers: &HeaderMap, replied: Timestamp) -> Option<Timestamp> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        // More digits than fit are a very long wait, which the domain caps like any other.
        let seconds = text.parse().unwrap_or(u64::MAX);
        return Some(replied.plus_ms(seconds.saturating_mul(1000)));
    }
    let date = httpdate::parse_http_date(text).ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(Timestamp::from_ms(0).plus(date))
}

/// Ends when the body has ended (its connection goes back to the pool) or is not worth it (dropped with
/// the body, its connection is closed).
async fn read_and_drop(mut body: Incoming) {
    let mut left = REPLY_BODY_MAX_BYTES;
    let announced = body.size_hint().lower();
    if usize::try_from(announced).is_ok_and(|bytes| bytes > left) {
        return;
    }
    while let Some(Ok(frame)) = body.frame().await {
        let bytes = frame.data_ref().map_or(0, Bytes::len);
        let Some(rest) = left.checked_sub(bytes) else { return };
        left = rest;
    }
}

/// A short text that stays the same from version to version: kept with the attempt, never a secret and
/// nothing that the other side chose.
fn reason(error: &legacy::Error) -> &'static str {
    if is_caused_by::<ConnectTimeout>(error) {
        return "CONNECT_TIMEOUT";
    }
    if is_caused_by::<LookupFailed>(error) {
        return "DNS";
    }
    if is_caused_by::<rustls::Error>(error) {
        return "TLS";
    }
    // hyper and rustls wrap one I/O error in another: the innermost is the machine's.
    let io =
        causes(error).filter_map(|e| e.downcast_ref::<io::Error>()).last().map(io::Error::kind);
    let http = causes(error).find_map(|e| e.downcast_ref::<hyper::Error>());
    let http2 = causes(error).find_map(|e| e.downcast_ref::<h2::Error>());
    match io {
        Some(io::ErrorKind::ConnectionRefused) => "CONNECT_REFUSED",
        Some(io::ErrorKind::TimedOut) if error.is_connect() => "CONNECT_TIMEOUT",
        Some(io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable) => "UNREACHABLE",
        Some(
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof,
        ) => "RESET",
        _ if error.is_connect() => "CONNECT_FAILED",
        // By frames that break the protocol, or by GOAWAY or RST_STREAM, REFUSED_STREAM among them.
        _ if http2.is_some_and(h2::Error::is_library) => "MALFORMED_REPLY",
        _ if http2.is_some_and(h2::Error::is_remote) => "RESET",
        _ => match http {
            Some(e) if e.is_parse() => "MALFORMED_REPLY",
            Some(e) if e.is_incomplete_message() || e.is_canceled() || e.is_closed() => "RESET",
            _ => "SEND_FAILED",
        },
    }
}

fn is_caused_by<E: Error + 'static>(error: &legacy::Error) -> bool {
    causes(error).any(|e| e.is::<E>())
}
