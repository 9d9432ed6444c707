//! A receiver of webhooks that believes nothing: each delivery's two signatures are verified, the one
//! of Standard Webhooks by its own crate.

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, Mutex},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use payment_sim::clock::{Clock, SystemClock};
use serde_json::Value;
use sha2::Sha256;
use standardwebhooks::Webhook;
use tokio::{net::TcpListener, runtime::Handle, sync::watch, task::JoinSet};

use super::eventually;

/// The default of `WEBHOOK_SECRET`.
pub const SECRET: &str = "payment-sim-dev-secret";
/// Beyond this the crate takes a signature for a replay, by the machine's clock.
const TOLERANCE_S: u64 = 240;

/// What a receiver says.
#[derive(Clone, Debug)]
pub enum Answer {
    Status(u16),
    /// With a header.
    With(u16, &'static str, String),
    /// Nothing, until [`WebhookSink::let_go`].
    Hang,
}

/// One attempt, as it arrived.
#[derive(Clone, Debug)]
pub struct Received {
    pub headers: HeaderMap,
    pub raw: Bytes,
    pub body: Value,
}

impl Received {
    pub fn id(&self) -> &str {
        self.header("webhook-id")
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub fn status(&self) -> &str {
        let status = self.body["status"].as_str().unwrap();
        status.strip_prefix("PAYMENT_STATUS_").unwrap()
    }

    /// Whether both signatures are this body's.
    pub fn is_genuine(&self, secret: &str) -> bool {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
        mac.update(&self.raw);
        let expected = format!("sha256={}", hex::encode(mac.finalize().into_bytes()));
        let standard = Webhook::new(&format!("whsec_{}", STANDARD.encode(secret))).unwrap();
        let seconds: i64 = self.header("webhook-timestamp").parse().unwrap();
        let genuine = if (SystemClock.now_ms() / 1_000).abs_diff(seconds) < TOLERANCE_S {
            standard.verify(&self.raw, &self.headers).is_ok()
        } else {
            // A clock that was moved by a day: the crate signs it again instead.
            let signed = standard.sign(self.id(), seconds, &self.raw).unwrap();
            self.header("webhook-signature").split(' ').any(|one| one == signed)
        };
        genuine && self.header("x-webhook-signature") == expected
    }
}

struct Shared {
    received: watch::Sender<Vec<Received>>,
    answers: Mutex<VecDeque<Answer>>,
    hangs: watch::Sender<bool>,
    forged: Mutex<Vec<Received>>,
}

/// It goes on answering until its test's runtime ends: a test drops it before the service, which may
/// then still have something to deliver.
pub struct WebhookSink {
    pub url: String,
    shared: Arc<Shared>,
}

impl WebhookSink {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            received: watch::Sender::default(),
            answers: Mutex::default(),
            hangs: watch::Sender::new(true),
            forged: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        Handle::current().spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let shared = Arc::clone(&serving);
                let answer = service_fn(move |request| Arc::clone(&shared).answer(request));
                let connection = http1::Builder::new().serve_connection(TokioIo::new(tcp), answer);
                connections.spawn(async move { drop(connection.await) });
            }
        });
        Self { url, shared }
    }

    /// What to say to the next attempts; after them 200.
    pub fn answers(&self, answers: impl IntoIterator<Item = Answer>) {
        self.shared.answers.lock().unwrap().extend(answers);
    }

    /// Answers what hangs and what comes.
    pub fn let_go(&self) {
        self.shared.hangs.send_replace(false);
    }

    pub fn received(&self) -> Vec<Received> {
        self.shared.received.borrow().clone()
    }

    /// The first `n` attempts, once they have come.
    pub async fn first(&self, n: usize) -> Vec<Received> {
        eventually(&format!("{n} webhooks at {}", self.url), || async {
            let received = self.shared.received.borrow();
            (received.len() >= n).then(|| received[..n].to_vec())
        })
        .await
    }

    /// The only attempt so far, once it has come.
    pub async fn only(&self) -> Received {
        let mut first = self.first(1).await;
        assert_eq!(self.received().len(), 1);
        first.remove(0)
    }

    /// The statuses that the attempts told, in the order in which they came.
    pub fn statuses(&self) -> Vec<String> {
        self.received().iter().map(|r| r.status().to_owned()).collect()
    }
}

impl Drop for WebhookSink {
    fn drop(&mut self) {
        let forged = self.shared.forged.lock().unwrap();
        if !std::thread::panicking() {
            assert!(forged.is_empty(), "not signed as the contract says: {forged:?}");
        }
    }
}

impl Shared {
    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let (head, body) = request.into_parts();
        let raw = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let body = serde_json::from_slice(&raw).unwrap_or(Value::Null);
        let received = Received { headers: head.headers, raw, body };
        if !received.is_genuine(SECRET) {
            self.forged.lock().unwrap().push(received);
            return Ok(Response::builder().status(401).body(Full::default()).unwrap());
        }
        let answer = self.answers.lock().unwrap().pop_front().unwrap_or(Answer::Status(200));
        self.received.send_modify(|all| all.push(received));
        let reply = Response::builder();
        let reply = match answer {
            Answer::Status(status) => reply.status(status),
            Answer::With(status, name, value) => reply.status(status).header(name, value),
            Answer::Hang => {
                // Ends with `self` at the latest.
                let mut hangs = self.hangs.subscribe();
                let _gone = hangs.wait_for(|hangs| !hangs).await;
                reply.status(200)
            }
        };
        Ok(reply.body(Full::default()).unwrap())
    }
}
