//! Allocations a request, against committed figures: a guard that a busy machine can hold. Times say
//! nothing there; how often the allocator is asked is the same on every machine and in every build.
//!
//! `make bench-smoke`; with `UPDATE=1` it writes the figures anew.

use std::{
    alloc::System,
    collections::BTreeMap,
    fs, io,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::service::Service as _;
use payment_sim::{
    api::pb::{
        common::v1::Money,
        payment::v1::{
            CreatePaymentIntentRequest, CreatePaymentIntentResponse, GetPaymentIntentRequest,
            PaymentScenario,
        },
    },
    clock::ManualClock,
    config::{Config, StoreUrl},
    driver::Step,
    metrics::Metrics,
    service::{Service, Surroundings},
    store::Work,
};
use prost::Message;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/allocations.json");
/// Further from what is committed, either way, is a change that somebody should know of.
const TOLERANCE: f64 = 0.10;
/// Tables and pools have grown by then.
const WARM_UP: usize = 200;
const COUNTED: usize = 1_000;
/// Whole payments go through together so many at a time: a full call of an event sink.
const TOGETHER: usize = 10;
/// A compression flag and a length stand before each message.
const MESSAGE_AT: usize = 5;
/// Nothing depends on how long anything really takes.
const PATIENCE: Duration = Duration::from_secs(60);
const START_MS: i64 = 1_767_225_600_000;
const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

type Figures = BTreeMap<String, f64>;

#[tokio::test]
async fn allocations_a_request_are_as_committed() {
    let found = Figures::from([
        ("create".to_owned(), creates().await),
        ("get".to_owned(), gets().await),
        ("whole payment".to_owned(), whole_payments().await),
    ]);
    for (name, count) in &found {
        println!("{count:>8.1} allocations a {name}");
    }
    compare(&found);
}

fn compare(found: &Figures) {
    #[expect(clippy::disallowed_methods, reason = "the one argument that a test can be given")]
    if std::env::var_os("UPDATE").is_some() {
        let rounded: Figures = found
            .iter()
            .map(|(name, count)| (name.clone(), (count * 10.0).round() / 10.0))
            .collect();
        let text = serde_json::to_string_pretty(&rounded).unwrap() + "\n";
        return fs::write(COMMITTED, text).unwrap();
    }
    let committed: Figures = serde_json::from_slice(&fs::read(COMMITTED).unwrap()).unwrap();
    assert!(found.keys().eq(committed.keys()), "{COMMITTED} is about {:?}", committed.keys());
    let differing: Vec<String> = found
        .iter()
        .map(|(name, new)| (name, committed[name], new))
        .filter(|(_, old, new)| (*new - old).abs() > old * TOLERANCE)
        .map(|(name, old, new)| {
            let percent = 100.0 * (new - old) / old;
            format!("a {name} takes {new:.1} allocations, {old:.1} are committed ({percent:+.0} %)")
        })
        .collect();
    assert!(
        differing.is_empty(),
        "{}; where that is meant, `UPDATE=1 make bench-smoke` writes {COMMITTED} anew",
        differing.join("; ")
    );
}

/// The service without sockets of its own: requests go in at its edge, time and deliveries move in steps.
struct Bed {
    clock: ManualClock,
    delay: Duration,
    service: Service,
    webhook_url: String,
    /// The finisher, and who receives webhooks.
    _tasks: JoinSet<()>,
}

impl Bed {
    async fn new() -> Self {
        let config = Config { store: StoreUrl::Memory, ..Config::default() };
        let clock = ManualClock::at_ms(START_MS);
        let surroundings = Surroundings {
            clock: Arc::new(clock.clone()),
            chance: Arc::new(|| 1.0),
            event_log: Box::new(|| Ok(Box::new(io::sink()))),
        };
        let metrics = Arc::new(Metrics::new());
        let built = Service::build(&config, surroundings, &metrics).await;
        let mut service = built.unwrap_or_else(|(_, why)| panic!("{why}"));
        let mut tasks = JoinSet::new();
        tasks.spawn(service.outbox.finisher.take().unwrap().run());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tasks.spawn(receive(listener));
        let webhook_url = format!("http://127.0.0.1:{port}/hooks/payment");
        Self { clock, delay: config.default_delay, service, webhook_url, _tasks: tasks }
    }

    /// One after the other; the last reply's message.
    async fn send(&self, requests: Vec<Request<Full<Bytes>>>) -> Bytes {
        let connection = self.service.edge.connection(CancellationToken::new());
        let mut last = Bytes::new();
        for request in requests {
            let reply = connection.call(request).await.unwrap_or_else(|never| match never {});
            let mut body = reply.into_body();
            while let Some(frame) = body.frame().await {
                match frame.unwrap().into_data() {
                    Ok(data) => last = data,
                    Err(trailers) => {
                        let trailers = trailers.into_trailers().unwrap();
                        assert_eq!(trailers["grpc-status"], "0", "{trailers:?}");
                    }
                }
            }
        }
        last.slice(MESSAGE_AT..)
    }

    /// Lets the payments just created be decided, told to the event sink and their receiver, and closed.
    async fn settle(&self) {
        self.clock.advance(self.delay);
        let Service { store, scheduler, outbox, .. } = &self.service;
        assert_eq!(scheduler.step().await, TOGETHER);
        outbox.webhooks.step().await;
        outbox.events.as_ref().unwrap().step().await;
        let owed = |work| store.backlog(work).pending;
        let settled = async {
            // Asking allocates nothing, however often.
            while owed(Work::Event) + owed(Work::Webhook) > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, settled).await.expect("all is delivered in one step each");
    }
}

async fn creates() -> f64 {
    let bed = Bed::new().await;
    bed.send(payments(WARM_UP, "")).await;
    let requests = payments(COUNTED, "");
    let region = Region::new(ALLOCATOR);
    bed.send(requests).await;
    each(&region)
}

async fn gets() -> f64 {
    let bed = Bed::new().await;
    let created = bed.send(payments(1, "")).await;
    let created = CreatePaymentIntentResponse::decode(created).unwrap();
    let payment_intent_id = created.payment_intent_id;
    let request = GetPaymentIntentRequest { payment_intent_id, ..Default::default() };
    let requests = |n| (0..n).map(|_| call("GetPaymentIntent", &request)).collect();
    bed.send(requests(WARM_UP)).await;
    let requests = requests(COUNTED);
    let region = Region::new(ALLOCATOR);
    bed.send(requests).await;
    each(&region)
}

async fn whole_payments() -> f64 {
    let bed = Bed::new().await;
    let mut rounds: Vec<_> =
        (0..(WARM_UP + COUNTED) / TOGETHER).map(|_| payments(TOGETHER, &bed.webhook_url)).collect();
    let counted = rounds.split_off(WARM_UP / TOGETHER);
    for requests in rounds {
        bed.send(requests).await;
        bed.settle().await;
    }
    let region = Region::new(ALLOCATOR);
    for requests in counted {
        bed.send(requests).await;
        bed.settle().await;
    }
    each(&region)
}

fn each(region: &Region<'_, System>) -> f64 {
    let change = region.change();
    (change.allocations + change.reallocations) as f64 / COUNTED as f64
}

/// Creates, made before they are counted.
fn payments(count: usize, webhook_url: &str) -> Vec<Request<Full<Bytes>>> {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    let create = |_| {
        let n = MADE.fetch_add(1, Ordering::Relaxed);
        let request = CreatePaymentIntentRequest {
            reservation_id: format!("reservation-{n}"),
            user_id: format!("user-{}", n % 1_000),
            amount: Some(Money { amount: 10_000, currency: "KRW".to_owned() }),
            scenario: PaymentScenario::Delay.into(),
            webhook_url: webhook_url.to_owned(),
            idempotency_key: format!("key-{n}"),
            ..Default::default()
        };
        call("CreatePaymentIntent", &request)
    };
    (0..count).map(create).collect()
}

fn call(method: &str, message: &impl Message) -> Request<Full<Bytes>> {
    let mut body = vec![0; MESSAGE_AT];
    body[1..].copy_from_slice(&u32::try_from(message.encoded_len()).unwrap().to_be_bytes());
    message.encode(&mut body).unwrap();
    Request::post(format!("http://localhost/payment.v1.PaymentService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::from(body))
        .unwrap()
}

/// Answers 200 to every webhook, and allocates nothing once connected.
async fn receive(listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        connections.spawn(async move {
            let (mut buffer, mut filled) = ([0; 8_192], 0);
            while let Ok(read @ 1..) = stream.read(&mut buffer[filled..]).await {
                filled += read;
                if is_whole(&buffer[..filled]) {
                    filled = 0;
                    stream.write_all(OK).await.unwrap();
                }
            }
        });
    }
}

/// A body is a JSON object and small enough to come in one piece.
fn is_whole(request: &[u8]) -> bool {
    request.ends_with(b"}") && request.windows(4).any(|four| four == b"\r\n\r\n")
}
