//! The caller's side. The client is the generated one over a plain HTTP/2 connection: it keeps no
//! deadline of its own, so that what a test sees is what the server said.

use std::net::SocketAddr;

use http_body_util::BodyExt;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use payment_sim::api::pb::{
    common::v1::Money,
    payment::v1::{CreatePaymentIntentRequest, payment_service_client::PaymentServiceClient},
    simulation::v1::simulation_service_client::SimulationServiceClient,
};
use tonic::{Code, Response, Status, body::Body};
use tonic_types::StatusExt;

type Http = legacy::Client<HttpConnector, Body>;
pub type Client = PaymentServiceClient<Http>;
pub type SimulationClient = SimulationServiceClient<Http>;

pub fn clients(grpc: SocketAddr) -> (Client, SimulationClient) {
    let mut connector = HttpConnector::new();
    // As every gRPC client does: otherwise a call waits for the acknowledgement of the one before.
    connector.set_nodelay(true);
    let http = legacy::Client::builder(TokioExecutor::new()).http2_only(true).build(connector);
    let origin: http::Uri = format!("http://{grpc}").parse().unwrap();
    let payments = PaymentServiceClient::with_origin(http.clone(), origin.clone());
    (payments, SimulationServiceClient::with_origin(http, origin))
}

/// Status and body of a page on the ops port.
pub async fn http_get(ops: SocketAddr, path: &str) -> Result<(u16, String), legacy::Error> {
    let http = legacy::Client::builder(TokioExecutor::new()).build_http();
    let request = http::Request::get(format!("http://{ops}{path}")).body(Body::empty()).unwrap();
    let reply = http.request(request).await?;
    let status = reply.status().as_u16();
    let body = reply.into_body().collect().await.unwrap().to_bytes();
    Ok((status, String::from_utf8(body.to_vec()).unwrap()))
}

pub fn krw(amount: i64) -> Money {
    Money { amount, currency: "KRW".to_owned() }
}

/// A create that is valid and names no scenario.
pub fn create(reservation: &str) -> CreatePaymentIntentRequest {
    CreatePaymentIntentRequest {
        reservation_id: reservation.to_owned(),
        amount: Some(krw(100_000)),
        user_id: "user-1".to_owned(),
        ..Default::default()
    }
}

/// How a call was refused: code, our reason, and the fields it names.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    pub code: Code,
    pub reason: String,
    pub fields: Vec<String>,
}

#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<Response<T>, Status>) -> (Code, String) {
    let refused = Refused::of(&result.expect_err("refused"));
    (refused.code, refused.reason)
}

impl Refused {
    pub fn of(status: &Status) -> Self {
        let details = status.get_error_details();
        let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
        let violations = details.bad_request().map(|bad| bad.field_violations.clone());
        let fields = violations.unwrap_or_default().into_iter().map(|v| v.field).collect();
        Self { code: status.code(), reason, fields }
    }
}
