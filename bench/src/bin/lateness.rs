//! How late payments are decided, at a constant rate of payments that fall due: as the service itself
//! counts it, and of a few as a caller sees it.
//!
//! `rate=10000 seconds=20 dir=PATH binary=PATH connections=50 streams=20 threads=CORES`; exit code 1 when
//! the p99 is later than asked, or a payment was decided before its time.

use std::{process::ExitCode, thread, time::Duration};

use bench::{
    argument, benchmark, check_arguments,
    client::Client,
    figure,
    gauge::quantile,
    load::{Kind, Life, Load},
    on_a_runtime,
    service::Service,
    subject::Subject,
};
use payment_sim::{
    api::pb::{
        common::v1::Money,
        payment::v1::{
            CreatePaymentIntentRequest, CreatePaymentIntentResponse, GetPaymentStatusRequest,
            GetPaymentStatusResponse, Payment, PaymentScenario, PaymentStatus,
        },
    },
    clock::{Clock, SystemClock},
};
use serde_json::json;

const P99_MAX_MS: f64 = 50.0;
const DELAY_MS: i64 = 2_000;
const DELAY: &str = "2000";
const METRIC: &str = "payment_decision_lag_seconds";
/// The histogram's bounds that matter here, as `/metrics` spells them.
const BOUNDS: [&str; 11] =
    ["0.001", "0.0025", "0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1", "5"];
/// A sampled payment is asked for from so long before its time, and so often.
const LOOKED_AT_FROM_MS: i64 = 50;
const LOOK_EVERY: Duration = Duration::from_millis(1);

fn main() -> ExitCode {
    benchmark(run)
}

fn run() -> Result<bool, String> {
    check_arguments(&["rate", "seconds", "dir", "binary", "connections", "streams", "threads"])?;
    let rate: u64 = argument("rate", 10_000)?;
    let life = Life { scenario: PaymentScenario::Delay, webhooks_to: None };
    let mut load = Load::from_arguments(Kind::Whole(life), 20, 20)?;
    load.rate = Some(rate);
    let subject = Subject::from_arguments(&[("DEFAULT_DELAY_MS", DELAY)])?;
    let service = subject.service()?;
    let seen = thread::scope(|scope| {
        let sampler = scope.spawn(|| on_a_runtime(sample(&service, load.duration)));
        let report = load.run(service.address())?;
        if !report.is_valid() {
            return Err(format!("{} of {} calls failed", report.failed, report.answered));
        }
        sampler.join().map_err(|_| "the sampler panicked")?
    })?;
    // What was created last falls due.
    thread::sleep(Duration::from_millis(DELAY_MS.unsigned_abs() + 500));
    publish(&service, rate, seen)
}

fn publish(service: &Service, rate: u64, seen: Vec<Seen>) -> Result<bool, String> {
    let decided = service.metric(&format!("{METRIC}_count"))?;
    let mut shares = Vec::new();
    for bound in BOUNDS {
        let within = service.metric(&format!("{METRIC}_bucket{{le=\"{bound}\"}}"))?;
        shares.push((bound.parse::<f64>().unwrap_or(f64::NAN) * 1e3, within / decided));
    }
    let share_in_time =
        shares.iter().find(|(ms, _)| *ms == P99_MAX_MS).map_or(0.0, |(_, share)| *share);
    let p99 = shares.iter().find(|(_, share)| *share >= 0.99).map_or(f64::INFINITY, |(ms, _)| *ms);
    println!("{decided:.0} payments decided, {rate} due a second");
    println!("  within {}", listed(&shares));
    println!(
        "  p99 at most {p99} ms, {:.3} % within {P99_MAX_MS} ms; asked: 99 %: {}",
        100.0 * share_in_time,
        if share_in_time >= 0.99 { "met" } else { "MISSED" }
    );
    let early = seen.iter().filter(|payment| payment.early).count();
    let mut late: Vec<f64> = seen.iter().map(|payment| payment.late_ms).collect();
    late.sort_by(f64::total_cmp);
    let [p50, p99_seen, max] = [0.5, 0.99, 1.0].map(|q| quantile(&late, q));
    println!(
        "  as callers see it, {} sampled: p50 {p50:.0} p99 {p99_seen:.0} max {max:.0} ms, the asking \
         included; {early} before their time",
        seen.len()
    );
    let text = json!({
        "name": "lateness", "due_per_second": rate, "decided": decided, "within_ms": shares,
        "p99_at_most_ms": p99, "asked_p99_ms": P99_MAX_MS,
        "sampled": { "payments": seen.len(), "early": early, "p50_ms": p50, "p99_ms": p99_seen, "max_ms": max },
    });
    figure::save("lateness.json", &format!("{text:#}\n"))?;
    Ok(share_in_time >= 0.99 && early == 0)
}

fn listed(shares: &[(f64, f64)]) -> String {
    let share = |(ms, share): &(f64, f64)| format!("{ms} ms {:.2} %", 100.0 * share);
    shares.iter().map(share).collect::<Vec<_>>().join(", ")
}

/// One payment, as its caller saw it.
struct Seen {
    late_ms: f64,
    /// Final before its time, or dated so.
    early: bool,
}

/// One payment after the other, for as long as the load lasts.
async fn sample(service: &Service, length: Duration) -> Result<Vec<Seen>, String> {
    let client = service.connect().await?;
    let end = now_ms() + i64::try_from(length.as_millis()).unwrap_or(i64::MAX);
    let mut watching = tokio::task::JoinSet::new();
    for n in 0.. {
        if now_ms() > end {
            break;
        }
        watching.spawn(watch(client.clone(), n));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    watching.join_all().await.into_iter().collect()
}

async fn watch(client: Client, n: u64) -> Result<Seen, String> {
    let request = CreatePaymentIntentRequest {
        reservation_id: format!("sampled-{n}"),
        amount: Some(Money { amount: 10_000, currency: "KRW".to_owned() }),
        user_id: "sampled".to_owned(),
        scenario: PaymentScenario::Delay.into(),
        ..Default::default()
    };
    let method = "/payment.v1.PaymentService/CreatePaymentIntent";
    let created: CreatePaymentIntentResponse = client.call(method, &request).await?;
    let id = created.payment_intent_id;
    let due = created_at_ms(&status(&client, &id).await?) + DELAY_MS;
    let wait = (due - LOOKED_AT_FROM_MS - now_ms()).max(0).unsigned_abs();
    tokio::time::sleep(Duration::from_millis(wait)).await;
    loop {
        let payment = status(&client, &id).await?;
        let now = now_ms();
        if payment.status() != PaymentStatus::Pending {
            let dated = payment.processed_at.map_or(0, |at| ms(at.seconds, at.nanos));
            return Ok(Seen { late_ms: (now - due) as f64, early: now < due || dated < due });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn status(client: &Client, id: &str) -> Result<Payment, String> {
    let request =
        GetPaymentStatusRequest { payment_intent_id: id.to_owned(), ..Default::default() };
    let method = "/payment.v1.PaymentService/GetPaymentStatus";
    let reply: GetPaymentStatusResponse = client.call(method, &request).await?;
    reply.payment.ok_or_else(|| "a reply without a payment".to_owned())
}

fn created_at_ms(payment: &Payment) -> i64 {
    payment.created_at.map_or(0, |at| ms(at.seconds, at.nanos))
}

fn ms(seconds: i64, nanos: i32) -> i64 {
    seconds * 1_000 + i64::from(nanos) / 1_000_000
}

fn now_ms() -> i64 {
    SystemClock.now_ms()
}
