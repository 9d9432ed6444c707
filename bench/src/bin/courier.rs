//! Signed webhooks a second of the courier alone ÷ those of bare hyper connections that sign and post the
//! same bytes to the same receiver; then, for the record, with what the outbox does around the courier:
//! claimed from a store and acknowledged to it.
//!
//! `pairs=5 seconds=10 claimed=100000 store=file dir=PATH`; exit code 1 when the ratio is less than asked.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bench::{
    argument, benchmark, check_arguments,
    figure::{self, Spread},
    gauge::process_cpu_us,
    on_a_runtime,
    payments::Maker,
    sink::Sink,
};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use payment_sim::{
    clock::{Clock, Stopwatch, SystemClock},
    courier::{Courier, Parcel, WebhookCourier, webhook::WebhookSettings},
    domain::{
        delivery::{Attempted, Channel, RetryPolicy, Verdict},
        event,
        payment::Payment,
        signature::Signer,
        time::Timestamp,
    },
    driver,
    egress::{AllowedNetworks, Policy},
    metrics::Metrics,
    outbox::{Finisher, Policies, RETRIES, Shared, WebhookLimits, Webhooks},
    process,
    store::{self, Change, Commit, Location, Options, Retention, Store, Work},
};
use serde_json::{Value, json};
use tokio::{net::TcpStream, task::JoinSet};
use tokio_util::sync::CancellationToken;

const LEAST: f64 = 0.75;
const IN_FLIGHT: usize = 64;
/// Prepared once and sent again and again.
const PARCELS: u64 = 1_000;
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const WARM_UP: Duration = Duration::from_secs(1);
const CREATES_AT_A_TIME: usize = 1_000;

fn main() -> ExitCode {
    // As the service does, parts of which run in this process.
    process::refuse_huge_pages();
    benchmark(run)
}

fn run() -> Result<bool, String> {
    check_arguments(&["pairs", "seconds", "claimed", "store", "dir"])?;
    let pairs: usize = argument("pairs", 5)?;
    let length = Duration::from_secs(argument("seconds", 10)?);
    let claimed: u64 = argument("claimed", 100_000)?;
    let sink = Sink::start()?;
    let bench = Bench::new(&sink)?;
    let mut rounds = Vec::new();
    for pair in 1..=pairs {
        let bare = bench.round(length, Way::Bare)?;
        println!("{pair}  {}", bare.line("bare"));
        let courier = bench.round(length, Way::Courier)?;
        println!("{pair}  {}  ratio {:.3}", courier.line("courier"), ratio(&bare, &courier));
        rounds.push((bare, courier));
    }
    let outbox = match claimed {
        0 => None,
        count => {
            let outbox = with_outbox(&bench, count)?;
            println!("   {}", outbox.line("outbox"));
            Some(outbox)
        }
    };
    publish(&rounds, outbox)
}

fn publish(rounds: &[(Round, Round)], outbox: Option<Round>) -> Result<bool, String> {
    if rounds.is_empty() {
        return Ok(true);
    }
    let ratios: Vec<f64> = rounds.iter().map(|(bare, courier)| ratio(bare, courier)).collect();
    let cpu = Spread::of(rounds.iter().map(|(bare, courier)| courier.cpu_us / bare.cpu_us));
    println!("CPU a webhook of the courier ÷ of the bare connections: {:.2}", cpu.median);
    let pairs: Vec<Value> = rounds
        .iter()
        .map(|(bare, courier)| json!({ "bare": bare.json(), "courier": courier.json() }))
        .collect();
    let details = json!({
        "in_flight": IN_FLIGHT,
        "cpu_ratio": cpu.json(),
        "pairs": pairs,
        "claimed_and_acknowledged": outbox.map(|round| round.json()),
    });
    figure::publish("courier", &ratios, LEAST, details)?;
    let met = Spread::of(ratios).median >= LEAST;
    println!("asked: {LEAST}: {}", if met { "met" } else { "MISSED" });
    Ok(met)
}

fn ratio(bare: &Round, courier: &Round) -> f64 {
    courier.per_second / bare.per_second
}

/// What was seen of one way to send.
struct Round {
    per_second: f64,
    /// Microseconds of this process's CPU a webhook.
    cpu_us: f64,
}

impl Round {
    fn of(sent: u64, took: Duration, cpu_us: f64) -> Self {
        let sent = sent as f64;
        Self { per_second: sent / took.as_secs_f64(), cpu_us: cpu_us / sent }
    }

    fn line(&self, name: &str) -> String {
        format!("{name:<8} {:>7.0}/s  CPU a webhook {:>5.2} µs", self.per_second, self.cpu_us)
    }

    fn json(&self) -> Value {
        json!({ "per_second": self.per_second, "cpu_us": self.cpu_us })
    }
}

#[derive(Clone, Copy)]
enum Way {
    Bare,
    Courier,
}

/// The deliveries, and who sends them.
struct Bench {
    parcels: Arc<[Parcel]>,
    signer: Signer,
    to: SocketAddr,
    url: String,
}

impl Bench {
    fn new(sink: &Sink) -> Result<Self, String> {
        let signer = Signer::new(&[SECRET]).map_err(|error| error.to_string())?;
        let (maker, now, url) = (Maker::new(Duration::ZERO), now(), sink.webhook_url());
        let parcels = (0..PARCELS).map(|n| parcel(&maker.payment(n, now), &url));
        let parcels = parcels.collect::<Option<_>>().ok_or("a payment owes no webhook")?;
        Ok(Self { parcels, signer, to: sink.address(), url })
    }

    fn courier(&self) -> Result<Arc<WebhookCourier>, String> {
        let networks = AllowedNetworks::parse("127.0.0.1").map_err(|error| error.to_string())?;
        let policy = Policy { networks, ..Policy::default() };
        let settings = WebhookSettings {
            signer: self.signer.clone(),
            timeout: Duration::from_secs(5),
            idle_per_origin: IN_FLIGHT,
        };
        Ok(Arc::new(WebhookCourier::new(policy, settings)))
    }

    fn round(&self, length: Duration, way: Way) -> Result<Round, String> {
        let courier = self.courier()?;
        on_a_runtime(async {
            let run = Arc::new(Run::default());
            let mut senders = JoinSet::new();
            for first in 0..IN_FLIGHT {
                let parcels = self.parcels.iter().cycle().skip(first).cloned();
                let parcels: Vec<_> = parcels.take(self.parcels.len()).collect();
                let run = Arc::clone(&run);
                match way {
                    Way::Bare => senders.spawn(post(parcels, run, self.to, self.signer.clone())),
                    Way::Courier => senders.spawn(attempt(parcels, run, Arc::clone(&courier))),
                };
            }
            tokio::time::sleep(WARM_UP).await;
            let (before, cpu_before, took) = (run.sent(), cpu_us(), Stopwatch::start());
            tokio::time::sleep(length).await;
            let round = Round::of(run.sent() - before, took.elapsed(), cpu_us() - cpu_before);
            run.over.store(true, Ordering::Relaxed);
            for sender in senders.join_all().await {
                sender?;
            }
            Ok(round)
        })
    }
}

fn cpu_us() -> f64 {
    process_cpu_us(std::process::id())
}

fn now() -> Timestamp {
    Timestamp::from_ms(SystemClock.now_ms())
}

fn parcel(payment: &Payment, url: &str) -> Option<Parcel> {
    let terms = &payment.terms;
    let notification = payment.due_notification(Channel::Webhook, terms.created_at)?;
    Some(Parcel {
        payment: terms.id,
        n: notification.n,
        event_id: terms.id.event(notification.n),
        topic: notification.topic,
        at: notification.snapshot.at,
        url: Some(url.to_owned()),
        body: Bytes::from(event::body(terms, notification)),
        trace: terms.trace,
        death: None,
    })
}

/// What the senders of a round share.
#[derive(Default)]
struct Run {
    sent: AtomicU64,
    over: AtomicBool,
}

impl Run {
    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// One more was sent; whether another is wanted.
    fn goes_on(&self) -> bool {
        self.sent.fetch_add(1, Ordering::Relaxed);
        !self.over.load(Ordering::Relaxed)
    }
}

async fn attempt(
    parcels: Vec<Parcel>,
    run: Arc<Run>,
    courier: Arc<WebhookCourier>,
) -> Result<(), String> {
    for parcel in parcels.iter().cycle() {
        let attempts = courier.attempt(std::slice::from_ref(parcel), now()).await;
        match attempts.first() {
            Some(Attempted { verdict: Verdict::Accepted, .. }) => {}
            other => return Err(format!("an attempt came to {other:?}")),
        }
        if !run.goes_on() {
            break;
        }
    }
    Ok(())
}

/// The least that brings the same bytes to the same place: one connection, one request after the other.
async fn post(
    parcels: Vec<Parcel>,
    run: Arc<Run>,
    to: SocketAddr,
    signer: Signer,
) -> Result<(), String> {
    let stream = TcpStream::connect(to).await.map_err(|error| error.to_string())?;
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let host = to.to_string();
    for parcel in parcels.iter().cycle() {
        let request = signed(parcel, &host, &signer).map_err(|error| error.to_string())?;
        sender.ready().await.map_err(|error| error.to_string())?;
        let reply = sender.send_request(request).await.map_err(|error| error.to_string())?;
        if !reply.status().is_success() {
            return Err(format!("the sink answers {}", reply.status()));
        }
        reply.into_body().collect().await.map_err(|error| error.to_string())?;
        if !run.goes_on() {
            break;
        }
    }
    Ok(())
}

fn signed(parcel: &Parcel, host: &str, signer: &Signer) -> http::Result<Request<Full<Bytes>>> {
    let (id, seconds) = (parcel.event_id.as_str(), now().seconds());
    Request::post("/hooks/payment")
        .header(header::HOST, host)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::USER_AGENT, "payment-sim/0.1.0")
        .header("x-webhook-signature", signer.legacy(&parcel.body))
        .header("webhook-id", id)
        .header("webhook-timestamp", seconds)
        .header("webhook-signature", signer.standard(id, seconds, &parcel.body))
        // As long as the courier's, and made up: a trace is no part of what is asked.
        .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
        .body(Full::new(parcel.body.clone()))
}

/// Webhooks that are due in a store until all of them are acknowledged there.
fn with_outbox(bench: &Bench, count: u64) -> Result<Round, String> {
    let dir: PathBuf = argument("dir", std::env::temp_dir())?;
    let dir = dir.join(format!("payment-sim-courier-{}", std::process::id()));
    let location = match argument("store", "file".to_owned())?.as_str() {
        "file" => Location::Folder(dir.clone()),
        "memory" => Location::Memory,
        other => return Err(format!("store={other}: file or memory")),
    };
    // As the service does it: see `runtime`.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let round = runtime.block_on(deliver(bench, &location, count));
    let _ = std::fs::remove_dir_all(&dir);
    round
}

async fn deliver(bench: &Bench, location: &Location, count: u64) -> Result<Round, String> {
    let store = filled(bench, location, count).await?;
    let (clock, metrics) = (Arc::new(SystemClock), Arc::new(Metrics::new()));
    let shared = Shared::new(Arc::clone(&store), clock.clone(), metrics);
    let webhook = RetryPolicy { max_attempts: Some(10), ..RETRIES };
    let policies = Policies { batched: RETRIES, webhook };
    let (finisher, done) = Finisher::new(shared.clone(), policies, Arc::new(|| 0.5));
    let limits =
        WebhookLimits { concurrency: 1_024, origin_concurrency: IN_FLIGHT, origin_max_rps: None };
    let webhooks = Arc::new(Webhooks::new(shared, bench.courier()?, limits, done));
    let end = CancellationToken::new();
    let (cpu_before, took) = (cpu_us(), Stopwatch::start());
    let mut tasks = JoinSet::new();
    tasks.spawn(finisher.run());
    let (driven, stop, kept) = (Arc::clone(&webhooks), end.clone(), Arc::clone(&store));
    tasks.spawn(async move { driver::drive(&*driven, kept, clock, stop).await });
    while store.backlog(Work::Webhook).pending > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let round = Round::of(count, took.elapsed(), cpu_us() - cpu_before);
    end.cancel();
    drop(webhooks);
    tasks.join_all().await;
    store.close().await;
    Ok(round)
}

/// A store in which so many webhooks are due.
async fn filled(bench: &Bench, location: &Location, count: u64) -> Result<Arc<dyn Store>, String> {
    let day = Duration::from_secs(86_400);
    let options = Options {
        retention: Retention { payments: day, idempotency: day, payments_max: None },
        clock: Arc::new(SystemClock),
        on_commit: Arc::new(|_, _| {}),
        on_dropped_early: Arc::new(|_| {}),
    };
    let store = store::open(location, options).map_err(|error| error.to_string())?;
    let (maker, now) = (Maker::new(Duration::ZERO), now());
    for first in (0..count).step_by(CREATES_AT_A_TIME) {
        let commits = (first..count.min(first + CREATES_AT_A_TIME as u64)).map(|n| {
            let mut payment = maker.payment(n, now);
            Arc::make_mut(&mut payment.terms).webhook_url = Some(bench.url.as_str().into());
            Commit {
                change: Some(Change::Create { terms: payment.terms, draw: None }),
                reply: None,
            }
        });
        let answers = store.commit(commits.collect()).await;
        answers.into_iter().collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    }
    Ok(store)
}
