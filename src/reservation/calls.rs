//! The reservation API, over HTTP; or a log line in its place.

use std::{error::Error, iter, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::{
    HeaderName, HeaderValue, Method, Request, StatusCode,
    header::{CONTENT_TYPE, USER_AGENT},
};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{self, Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use serde_json::json;
use url::Url;

use super::decision::Action;
use crate::{
    config::{ApiStyle, ReservationApiConfig},
    courier::{connect::CONNECT_MAX, tls},
};

/// What is read of a reply, so that its connection can be used again. Only the status counts.
const REPLY_MAX_BYTES: usize = 64 * 1024;
/// Idle connections are closed before the other side does it: many servers wait 5 s.
const IDLE_MAX: Duration = Duration::from_secs(4);

const AGENT: HeaderValue =
    HeaderValue::from_static(concat!("reservation-worker/", env!("CARGO_PKG_VERSION")));
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// One thing to tell the reservation API. Every repeat of it is the same, byte for byte.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    pub action: Action,
    pub reservation_id: &'a str,
    pub payment_id: &'a str,
    /// The idempotency key.
    pub event_id: &'a str,
    pub traceparent: Option<&'a str>,
}

/// What came of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    Done,
    /// Worth another call. It may have been done all the same.
    Retry(String),
    /// The same call would be refused again.
    Refused(String),
}

#[async_trait]
pub trait Reservations: Send + Sync + 'static {
    async fn tell(&self, order: Order<'_>) -> Told;
}

/// What would be told, for a worker that knows no API.
pub struct LoggedReservations;

#[async_trait]
impl Reservations for LoggedReservations {
    async fn tell(&self, order: Order<'_>) -> Told {
        let Order { action, reservation_id, payment_id, event_id, traceparent } = order;
        tracing::info!(
            ?action,
            reservation_id,
            payment_id,
            event_id,
            traceparent,
            "RESERVATION_API_URL is not set: nobody is told"
        );
        Told::Done
    }
}

pub struct HttpReservations {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    base: Url,
    style: ApiStyle,
    timeout: Duration,
}

impl HttpReservations {
    /// Loads the machine's root certificates: once, at start. `idle` connections are kept.
    pub fn new(config: &ReservationApiConfig, idle: usize) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_MAX));
        // https goes through it too.
        tcp.enforce_http(false);
        // No filter of addresses: the operator names this one.
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls::with_native_roots())
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_MAX)
            .pool_max_idle_per_host(idle)
            .build(connector);
        Self { client, base: config.url.clone(), style: config.style, timeout: config.timeout }
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<StatusCode, legacy::Error> {
        let reply = self.client.request(request).await?;
        let status = reply.status();
        // The status is the answer, whatever comes of the body.
        let _cut_off = Limited::new(reply.into_body(), REPLY_MAX_BYTES).collect().await;
        Ok(status)
    }
}

#[async_trait]
impl Reservations for HttpReservations {
    async fn tell(&self, order: Order<'_>) -> Told {
        let request = match request(&self.base, self.style, order) {
            Ok(request) => request,
            Err(error) => return Told::Refused(format!("no request can be made of it: {error}")),
        };
        match tokio::time::timeout(self.timeout, self.exchange(request)).await {
            Err(_elapsed) => Told::Retry("no answer in time".to_owned()),
            Ok(Err(error)) => Told::Retry(causes(&error)),
            Ok(Ok(status)) => judge(status),
        }
    }
}

fn request(
    base: &Url,
    style: ApiStyle,
    order: Order<'_>,
) -> Result<Request<Full<Bytes>>, http::Error> {
    let id = order.reservation_id;
    let (method, path, body) = match (style, order.action) {
        (ApiStyle::Post, action) => {
            let verb = match action {
                Action::Confirm => "confirm",
                Action::Cancel => "cancel",
            };
            let body = json!({ "payment_id": order.payment_id });
            (Method::POST, vec!["v1", "reservations", id, verb], body)
        }
        (ApiStyle::Patch, action) => {
            let status = match action {
                Action::Confirm => "CONFIRMED",
                Action::Cancel => "CANCELLED",
            };
            (Method::PATCH, vec!["internal", "reservations", id], json!({ "status": status }))
        }
    };
    let mut url = base.clone();
    url.path_segments_mut()
        .expect("the setting takes http and https alone, whose URLs have paths")
        .pop_if_empty()
        .extend(path);
    let mut request = Request::builder()
        .method(method)
        .uri(url.as_str())
        .header(CONTENT_TYPE, JSON)
        .header(USER_AGENT, AGENT)
        .header(IDEMPOTENCY_KEY, order.event_id);
    if let Some(traceparent) = order.traceparent {
        request = request.header(TRACEPARENT, traceparent);
    }
    request.body(Full::new(body.to_string().into()))
}

/// A redirect is not followed and, like a 4xx, would be given again. 408 and 429 speak of the moment and
/// not of the request.
fn judge(status: StatusCode) -> Told {
    let why = format!("HTTP {}", status.as_u16());
    match status {
        _ if status.is_success() => Told::Done,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => Told::Retry(why),
        _ if status.is_server_error() => Told::Retry(why),
        _ => Told::Refused(why),
    }
}

fn causes(error: &(dyn Error + 'static)) -> String {
    let texts = iter::successors(Some(error), |&error| error.source()).map(ToString::to_string);
    texts.collect::<Vec<_>>().join(": ")
}
