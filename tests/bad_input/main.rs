//! Thousands of bad requests over real gRPC: each a documented code, the bad fields named, and nothing
//! that shakes the service.
//!
//! `BAD_INPUT_SEED` makes other mixtures.

mod generate;
mod oracle;
#[path = "../support/mod.rs"]
mod support;
mod wire;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use payment_sim::api::pb::payment::v1::{
    CreatePaymentIntentResponse, GetPaymentIntentRequest, PaymentStatus,
};
use prost::Message;
use support::{
    client,
    process::{Launch, get},
    receiver::Receiver,
    setting,
};
use tokio::task::JoinSet;

use generate::{Case, PAN, PLACEHOLDER};
use oracle::Expected;
use wire::Wire;

const SEED: u64 = 3;
const LEAST_CASES: usize = 1_000;
const WORKERS: usize = 8;
const READY_WITHIN: Duration = Duration::from_secs(30);
/// Failures that are shown whole.
const SHOWN: usize = 40;
const CREATE: &str = "CreatePaymentIntent";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_bad_request_gets_a_documented_code_and_its_fields_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let launch = Launch::new(folder.path()).with("EVENT_SINK", "none");
    let mut service = launch.start();
    service.ready(READY_WITHIN).await.unwrap_or_else(|why| panic!("{why}"));
    let receiver = Receiver::start(Arc::new(|_| Box::pin(async { Some(204) }))).await;
    let seed = setting("BAD_INPUT_SEED").map_or(SEED, |seed| seed.parse().expect("a number"));
    let cases = Arc::new(generate::cases(seed, &receiver.url()));
    println!("{} cases, seed {seed}", cases.len());
    assert!(cases.len() >= LEAST_CASES);
    count_kinds(&cases);

    let run = Arc::new(Run {
        cases: Arc::clone(&cases),
        create: generate::good_create(&receiver.url()),
        port: launch.grpc_port,
        next: AtomicUsize::new(0),
        failed: Mutex::default(),
    });
    let memory_before = resident_bytes(launch.ops_port).await;
    let mut workers = JoinSet::new();
    (0..WORKERS).for_each(|_| drop(workers.spawn(Arc::clone(&run).work())));
    while let Some(ended) = workers.join_next().await {
        ended.expect("a worker does not panic");
    }
    let failed = std::mem::take(&mut *run.failed.lock().unwrap_or_else(PoisonError::into_inner));
    let shown = failed.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("\n");
    assert!(failed.is_empty(), "{} of {} failed:\n{shown}", failed.len(), cases.len());

    assert!(service.exited().is_none(), "the process lives");
    let grown = resident_bytes(launch.ops_port).await - memory_before;
    println!("resident memory grew by {} KiB", grown / 1024);
    no_panic_and_no_bug(launch.ops_port).await;
    a_good_create_still_works(&run, launch.grpc_port).await;
    let log = std::fs::read_to_string(launch.log()).expect("the log");
    assert!(!log.contains(PAN) && !log.contains("panic") && !log.contains("ERROR"), "{log}");
}

/// Whoever has no token learns nothing about requests, and costs no decoding.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_token_is_asked_for_before_the_body_is_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let launch =
        Launch::new(folder.path()).with("EVENT_SINK", "none").with("SIMULATION_TOKEN", "t0ken");
    let mut service = launch.start();
    service.ready(READY_WITHIN).await.unwrap_or_else(|why| panic!("{why}"));
    let mut wire = Wire::connect(launch.grpc_port).await;
    let bearer = [("authorization", Bytes::from_static(b"Bearer t0ken"))];
    for method in ["ListDeliveries", "Redeliver"] {
        let path = format!("/simulation.v1.SimulationService/{method}");
        for (headers, reason) in [(&[][..], "TOKEN_REQUIRED"), (&bearer[..], "MALFORMED")] {
            let body = wire::framed(0, 1, b"\xff");
            let reply = wire.call(&path, headers, body).await.expect("a reply");
            let expected = Expected::Reason(reason);
            oracle::check(&reply.status, reply.status_bytes, &expected).expect(method);
        }
    }
}

/// Each kind of answer must be among them: an oracle that expects one thing only proves nothing.
fn count_kinds(cases: &[Case]) {
    let count =
        |is_it: &dyn Fn(&Expected) -> bool| cases.iter().filter(|c| is_it(&c.expected)).count();
    let accepted = count(&|e| *e == Expected::Accepted);
    let fields = count(&|e| matches!(e, Expected::Fields(_)));
    let several = count(&|e| matches!(e, Expected::Fields(fields) if fields.len() > 1));
    let malformed = count(&|e| *e == Expected::Reason("MALFORMED"));
    println!(
        "{accepted} good, {fields} with bad fields ({several} with several), {malformed} malformed"
    );
    assert!(accepted > 100 && fields > 500 && several > 100 && malformed > 500);
}

struct Run {
    cases: Arc<Vec<Case>>,
    create: Bytes,
    port: u16,
    next: AtomicUsize,
    failed: Mutex<Vec<String>>,
}

impl Run {
    async fn work(self: Arc<Self>) {
        let mut wire = Wire::connect(self.port).await;
        let mut payment = self.create(&mut wire).await;
        while let Some(case) = self.cases.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            // A refund takes of a payment, a simulated webhook is one of at most 100 that it may owe.
            if matches!(case.method.as_str(), "CancelPayment" | "SimulateWebhook") {
                payment = self.create(&mut wire).await;
            }
            if let Err(why) = self.check(&mut wire, case, &payment).await {
                let told =
                    format!("{} {}: {why}; expected {:?}", case.method, case.what, case.expected);
                self.failed.lock().unwrap_or_else(PoisonError::into_inner).push(told);
            }
        }
    }

    async fn check(&self, wire: &mut Wire, case: &Case, payment: &str) -> Result<(), String> {
        let body = generate::replaced(&case.body, PLACEHOLDER, payment.as_bytes());
        let reply = wire.call(&case.path, &case.headers, body.into()).await?;
        let told =
            [reply.status.message().as_bytes(), reply.status.details(), &reply.body].concat();
        if told.windows(PAN.len()).any(|window| window == PAN.as_bytes()) {
            return Err("the reply repeats the card number".to_owned());
        }
        oracle::check(&reply.status, reply.status_bytes, &case.expected)
    }

    async fn create(&self, wire: &mut Wire) -> String {
        let path = format!("/payment.v1.PaymentService/{CREATE}");
        let reply = wire.call(&path, &[], self.create.clone()).await.expect("a good create");
        let message = reply.body.get(5..).unwrap_or_else(|| panic!("{:?}", reply.status));
        let reply = CreatePaymentIntentResponse::decode(message).expect("a reply");
        assert_eq!(reply.status(), PaymentStatus::Pending);
        reply.payment_intent_id
    }
}

async fn metrics(port: u16) -> String {
    get(port, "/metrics").await.expect("metrics")
}

async fn resident_bytes(port: u16) -> i64 {
    let metrics = metrics(port).await;
    let line = metrics.lines().find_map(|line| line.strip_prefix("process_resident_memory_bytes "));
    line.and_then(|n| n.parse().ok()).unwrap_or_default()
}

async fn no_panic_and_no_bug(port: u16) {
    let metrics = metrics(port).await;
    assert!(metrics.lines().any(|line| line == "panics_total 0"), "{metrics}");
    for code in ["Internal", "Unknown", "DataLoss"] {
        let label = format!("grpc_code=\"{code}\"");
        let counted = metrics.lines().filter(|line| line.contains(&label));
        counted.for_each(|line| assert!(line.ends_with(" 0"), "{line}"));
    }
}

async fn a_good_create_still_works(run: &Run, port: u16) {
    let mut wire = Wire::connect(port).await;
    let payment_intent_id = run.create(&mut wire).await;
    let request = GetPaymentIntentRequest { payment_intent_id, ..Default::default() };
    let reply = client(port).get_payment_intent(request).await.expect("it is there").into_inner();
    assert_eq!(reply.payment.expect("it is there").status(), PaymentStatus::Completed);
}
