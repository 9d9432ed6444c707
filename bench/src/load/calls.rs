//! Calls straight on the `h2` crate: what a call costs its caller is taken from the same cores.

use std::{future::poll_fn, net::SocketAddr};

use bytes::Bytes;
use h2::client::SendRequest;
use payment_sim::api::pb::{
    common::v1::Money,
    payment::v1::{CreatePaymentIntentRequest, GetPaymentIntentRequest, PaymentScenario},
};

use crate::{
    client::framed,
    filling::Filling,
    payments::{USERS, mix, uuid},
};

/// Replies fit without an update of the windows each.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 1 << 24;

/// Which calls a run makes, each as a function of its number.
#[derive(Clone, Copy)]
pub struct Calls {
    pub kind: Kind,
    /// No two runs call the same.
    pub run: u64,
}

#[derive(Clone, Copy)]
pub enum Kind {
    /// A payment of its own each.
    Create,
    /// The same, with a life after it.
    Whole(Life),
    /// A stored payment each, at random.
    Get(Filling),
}

/// What becomes of a payment.
#[derive(Clone, Copy)]
pub struct Life {
    pub scenario: PaymentScenario,
    pub webhooks_to: Option<SocketAddr>,
}

impl Calls {
    pub const fn path(&self) -> &'static str {
        match self.kind {
            Kind::Create | Kind::Whole(_) => "/payment.v1.PaymentService/CreatePaymentIntent",
            Kind::Get(_) => "/payment.v1.PaymentService/GetPaymentIntent",
        }
    }

    /// The `n`-th request, as gRPC sends it.
    pub fn request(&self, n: u64) -> Bytes {
        let seed = mix(self.run) ^ n;
        match self.kind {
            Kind::Create => framed(&create(seed)),
            Kind::Whole(life) => framed(&CreatePaymentIntentRequest {
                scenario: life.scenario.into(),
                webhook_url: life.webhooks_to.map(webhook_url).unwrap_or_default(),
                ..create(seed)
            }),
            Kind::Get(filling) => framed(&GetPaymentIntentRequest {
                payment_intent_id: filling.id(mix(seed) % filling.settled.max(1)).intent(),
                user_id: String::new(),
            }),
        }
    }

    /// More calls of this kind.
    #[must_use]
    pub const fn more(self) -> Self {
        Self { run: self.run + 1, ..self }
    }
}

fn webhook_url(to: SocketAddr) -> String {
    format!("http://{to}/hooks/payment")
}

fn create(seed: u64) -> CreatePaymentIntentRequest {
    let (a, b) = (mix(seed), mix(seed ^ 1 << 63));
    CreatePaymentIntentRequest {
        reservation_id: uuid(a, b),
        amount: Some(Money { amount: 10_000, currency: "KRW".to_owned() }),
        user_id: format!("user-{:04}", a % USERS),
        scenario: PaymentScenario::Approve.into(),
        idempotency_key: uuid(b, a),
        ..Default::default()
    }
}

/// One connection's end, for one call at a time; clones share the connection.
#[derive(Clone)]
pub struct Caller {
    connection: SendRequest<Bytes>,
    head: http::Request<()>,
}

impl Caller {
    /// The caller, and what must run beside it.
    pub async fn connect(
        target: SocketAddr,
        path: &str,
    ) -> Result<(Self, impl Future<Output = ()> + use<>), String> {
        let stream = tokio::net::TcpStream::connect(target)
            .await
            .map_err(|error| format!("{target}: {error}"))?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let (connection, driver) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .handshake(stream)
            .await
            .map_err(|error| error.to_string())?;
        let head = http::Request::post(format!("http://{target}{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .map_err(|error| error.to_string())?;
        let driver = async {
            // The calls of a connection that broke say so.
            let _ = driver.await;
        };
        Ok((Self { connection, head }, driver))
    }

    /// Whether the reply was OK. An error is the connection's, and the end of the run.
    pub async fn call(&mut self, request: Bytes) -> Result<bool, h2::Error> {
        match self.try_call(request).await {
            Err(error) if error.is_reset() => Ok(false),
            result => result,
        }
    }

    async fn try_call(&mut self, request: Bytes) -> Result<bool, h2::Error> {
        poll_fn(|context| self.connection.poll_ready(context)).await?;
        let (reply, mut stream) = self.connection.send_request(self.head.clone(), false)?;
        stream.send_data(request, true)?;
        let (head, mut body) = reply.await?.into_parts();
        while let Some(data) = body.data().await {
            let bytes = data?.len();
            body.flow_control().release_capacity(bytes)?;
        }
        let trailers = body.trailers().await?;
        // A refusal may come without a body: then its status stands in the head.
        let status = trailers.as_ref().unwrap_or(&head.headers).get("grpc-status");
        Ok(status.is_some_and(|status| status == "0"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use prost::Message;

    use super::*;

    #[test]
    fn every_create_has_a_reservation_and_a_key_of_its_own() {
        let first = Calls { kind: Kind::Create, run: 0 };
        let mut seen = HashSet::new();
        for calls in [first, first.more()] {
            for n in 0..10_000 {
                let create =
                    CreatePaymentIntentRequest::decode(calls.request(n).slice(5..)).unwrap();
                assert!(seen.insert(create.reservation_id) && seen.insert(create.idempotency_key));
            }
        }
    }
}
