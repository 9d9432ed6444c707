//! What the tests of edge and server share: a payment service that behaves as its caller orders, and ears
//! for the metrics.

use std::future::pending;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tonic_health::server::{HealthReporter, HealthService};

use super::*;
use crate::api::pb::payment::v1::*;
use crate::api::unary::{Answered, Call};

/// Longest wait for what must happen; nothing here depends on how long it really takes.
pub const SOON: Duration = Duration::from_secs(10);

/// CreatePaymentIntent does what `user_id` says; the rest is not found.
pub struct Stub;

fn not_found<T>() -> Answered<T> {
    Err(Failure::new(Reason::PaymentNotFound, "no such payment").into())
}

impl Calls for Stub {
    async fn create_payment_intent(
        &self,
        call: Call<CreatePaymentIntentRequest>,
    ) -> Answered<CreatePaymentIntentResponse> {
        match call.message.user_id.as_str() {
            "panic" => panic!("ordered"),
            "bug" => return Err(Failure::internal("a secret path").into()),
            "hang" => pending().await,
            "hold" => {
                call.head.slot.as_ref().unwrap().release();
                pending().await
            }
            "slow" => tokio::time::sleep(Duration::from_millis(300)).await,
            "invalid" => {
                let bad = vec![Violation::new("amount.currency", "must be an ISO 4217 code")];
                return Err(Failure::invalid(bad).into());
            }
            _ => {}
        }
        let client_secret = hex::encode(call.head.trace.trace_id);
        Ok(unary::Reply::new(CreatePaymentIntentResponse { client_secret, ..Default::default() }))
    }

    async fn get_payment_intent(
        &self,
        _: Call<GetPaymentIntentRequest>,
    ) -> Answered<GetPaymentIntentResponse> {
        not_found()
    }

    async fn get_payment_status(
        &self,
        _: Call<GetPaymentStatusRequest>,
    ) -> Answered<GetPaymentStatusResponse> {
        not_found()
    }

    async fn process_payment(
        &self,
        _: Call<ProcessPaymentRequest>,
    ) -> Answered<ProcessPaymentResponse> {
        not_found()
    }

    async fn cancel_payment(
        &self,
        _: Call<CancelPaymentRequest>,
    ) -> Answered<CancelPaymentResponse> {
        not_found()
    }

    async fn list_payments(&self, _: Call<ListPaymentsRequest>) -> Answered<ListPaymentsResponse> {
        not_found()
    }

    async fn simulate_webhook(
        &self,
        _: Call<SimulateWebhookRequest>,
    ) -> Answered<SimulateWebhookResponse> {
        not_found()
    }
}

/// Remembers what the edge reported.
#[derive(Default)]
pub struct Ears {
    handled: Mutex<Vec<(&'static str, Code)>>,
    panics: AtomicUsize,
}

impl Observe for Ears {
    fn handled(&self, _service: &'static str, method: &'static str, code: Code, _: Duration) {
        self.handled.lock().unwrap().push((method, code));
    }

    fn panicked(&self) {
        self.panics.fetch_add(1, Ordering::Relaxed);
    }

    fn log_lines_suppressed(&self, _n: u64) {}
}

impl Ears {
    pub fn handled(&self) -> Vec<(&'static str, Code)> {
        self.handled.lock().unwrap().clone()
    }

    pub fn panics(&self) -> usize {
        self.panics.load(Ordering::Relaxed)
    }
}

pub fn edge(limits: EdgeLimits) -> (Edge<Stub>, Arc<Ears>) {
    let ears = Arc::new(Ears::default());
    let health = HealthService::from_health_reporter(HealthReporter::new());
    let routes = api::routes(tonic_health::pb::health_server::HealthServer::new(health), None);
    (Edge::new(Stub, routes, limits, ears.clone()), ears)
}

/// A request in which the stub finds its order.
pub fn order(user_id: &str) -> CreatePaymentIntentRequest {
    CreatePaymentIntentRequest { user_id: user_id.to_owned(), ..Default::default() }
}
