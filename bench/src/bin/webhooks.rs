//! What three bad receivers cost a good one. The good one gets webhooks at a fixed rate, alone and
//! then beside one that never answers, one that answers a byte a second and one that resets; each time
//! from a service of its own, several pairs in a run. Then, for the record, how fast webhooks go out
//! when nothing but the service holds them up.
//!
//! A webhook's latency runs from the moment at which it would have come, had its payment been created
//! on schedule and had nothing taken any time. The load waits for nobody, so nothing that is late
//! makes the rest look early.
//!
//! `rate=500 bad=150 seconds=10 pairs=3 burst=20000 dir=PATH binary=PATH`; exit code 2 when a webhook
//! did not come or the load could not be made. A target that is missed is said, and no failure.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use bench::{
    argument, benchmark, check_arguments,
    client::Client,
    gauge::quantile,
    receiver::{Arrivals, Receiver},
    service::{Service, beside},
};
use payment_sim::{
    api::pb::{
        common::v1::Money,
        payment::v1::{CreatePaymentIntentRequest, CreatePaymentIntentResponse, PaymentScenario},
    },
    clock::Stopwatch,
};
use tokio::task::JoinSet;

const RATIO_MAX: f64 = 2.0;
const MEMORY_MIB_MAX: f64 = 512.0;
/// A load that is sent later than this, at its p99, is held up by something else on the machine, and
/// that is then in the figures.
const LATE_MS_MAX: f64 = 5.0;
/// From a payment's creation to its webhook: time for the create to be answered first.
const DELAY_MS: u64 = 100;
/// Connections are made and pages read in this time, which counts for nothing; then the bad receivers
/// get their first webhooks.
const WARM_UP_SECONDS: u64 = 2;
/// A webhook that takes longer counts as lost.
const PATIENCE: Duration = Duration::from_secs(15);
/// The burst's webhooks fall due when its payments are made, which then costs them nothing.
const BURST_DELAY_MS: u64 = 5_000;
const BURST_AT_A_TIME: usize = 128;

fn main() -> ExitCode {
    benchmark(|| run().map(|()| true))
}

struct Load {
    rate: u64,
    /// To each of the bad ones.
    bad: u64,
    seconds: u64,
    pairs: u64,
    burst: usize,
}

/// What one phase showed.
struct Phase {
    /// Milliseconds, sorted, as the other two.
    latency: Vec<f64>,
    /// From its moment until a create was answered.
    create: Vec<f64>,
    /// From its moment until a create was sent: the load's own share of what is measured.
    late: Vec<f64>,
    resident_mib: f64,
    peak_mib: f64,
    pending: f64,
    withheld: f64,
    /// That the good one saw, and each of the bad ones.
    connections: Vec<u64>,
}

fn run() -> Result<(), String> {
    check_arguments(&["rate", "bad", "seconds", "pairs", "burst", "dir", "binary"])?;
    let load = Load {
        rate: argument("rate", 500)?,
        bad: argument("bad", 150)?,
        seconds: argument("seconds", 10)?,
        pairs: argument("pairs", 3)?,
        burst: argument("burst", 20_000)?,
    };
    if [load.rate, load.bad, load.seconds, load.pairs].contains(&0) {
        return Err("rate, bad, seconds and pairs: at least 1 each".to_owned());
    }
    let binary: PathBuf = argument("binary", beside("payment-sim")?)?;
    let given: PathBuf = argument("dir", std::env::temp_dir())?;
    let dir = given.join(format!("payment-sim-webhooks-{}", std::process::id()));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let result = runtime.block_on(measure(&dir, &binary, &load));
    let _ = fs::remove_dir_all(&dir);
    result
}

async fn measure(dir: &Path, binary: &Path, load: &Load) -> Result<(), String> {
    println!(
        "{} webhooks/s for {} s to a good receiver; beside it {}/s to each of three bad ones",
        load.rate, load.seconds, load.bad
    );
    println!(
        "            ms: p50    p99  p99.9    max | create p99  sent p99 | RSS   peak MiB | owed  \
         withheld  connections at good, silent, dripping, resetting"
    );
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for pair in 0..load.pairs {
        for (name, phases, bad) in [("alone", &mut alone, false), ("beside bad", &mut beside, true)]
        {
            let dir = dir.join(format!("{pair}-{bad}"));
            let phase = phase(&dir, binary, load, bad).await?;
            print(name, &phase);
            phases.push(phase);
        }
    }
    let burst = if load.burst > 0 { Some(burst(dir, binary, load.burst).await?) } else { None };
    report(load, &alone, &beside, burst);
    Ok(())
}

async fn phase(dir: &Path, binary: &Path, load: &Load, bad: bool) -> Result<Phase, String> {
    let service = start(dir, binary, DELAY_MS).await?;
    let clock = Stopwatch::start();
    let warm_up = Duration::from_secs(WARM_UP_SECONDS);
    let count = (load.rate * (WARM_UP_SECONDS + load.seconds)) as usize;
    let arrivals = Arc::new(Arrivals::of(count, clock));
    let good = Arc::new(Receiver::healthy(Arc::clone(&arrivals)).await?);
    let mut bad_ones = Vec::new();
    let mut streams = JoinSet::new();
    if bad {
        let [silent, dripping] = [Receiver::silent().await?, Receiver::dripping().await?];
        bad_ones = [silent, dripping, Receiver::resetting().await?].map(Arc::new).into();
    }
    for receiver in &bad_ones {
        let count = (load.bad * load.seconds) as usize;
        let schedule = Schedule { clock, from: warm_up, rate: load.bad, count };
        streams.spawn(create(service.connect().await?, Arc::clone(receiver), schedule));
    }
    let schedule = Schedule { clock, from: Duration::ZERO, rate: load.rate, count };
    let client = service.connect().await?;
    let (create, late) = create(client, Arc::clone(&good), schedule.clone()).await?;
    while let Some(stream) = streams.join_next().await {
        stream.map_err(|error| error.to_string())??;
    }
    all_arrived(&arrivals).await?;
    let connections: Vec<u64> =
        [good].iter().chain(&bad_ones).map(|one| one.connections()).collect();
    if connections.contains(&0) {
        return Err("a bad receiver was never called: nothing was compared".to_owned());
    }
    let after = |n: usize| schedule.due(n) + Duration::from_millis(DELAY_MS);
    let counted = arrivals.all().into_iter().filter(|(n, _)| schedule.due(*n) >= warm_up);
    Ok(Phase {
        latency: sorted_ms(counted.map(|(n, at)| at.saturating_sub(after(n))).collect()),
        create: sorted_ms(create),
        late: sorted_ms(late),
        resident_mib: service.memory_mib("VmRSS"),
        peak_mib: service.memory_mib("VmHWM"),
        pending: service.metric("outbox_pending{channel=\"webhook\"}")?,
        withheld: service.metric("webhook_deliveries_total{result=\"withheld\"}")?,
        connections,
    })
}

async fn start(dir: &Path, binary: &Path, delay_ms: u64) -> Result<Service, String> {
    fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    Service::start(dir, binary, &[("DEFAULT_DELAY_MS", &delay_ms.to_string())]).await
}

/// When payments are created.
#[derive(Clone)]
struct Schedule {
    clock: Stopwatch,
    from: Duration,
    rate: u64,
    count: usize,
}

impl Schedule {
    fn due(&self, n: usize) -> Duration {
        self.from + Duration::from_nanos(n as u64 * 1_000_000_000 / self.rate)
    }
}

/// Creates payments on schedule, however long each answer takes: how long after its moment each was
/// answered, and sent.
async fn create(
    client: Client,
    receiver: Arc<Receiver>,
    schedule: Schedule,
) -> Result<(Vec<Duration>, Vec<Duration>), String> {
    let clock = schedule.clock;
    let mut late = Vec::with_capacity(schedule.count);
    let mut calls = JoinSet::new();
    for n in 0..schedule.count {
        let due = schedule.due(n);
        tokio::time::sleep(due.saturating_sub(clock.elapsed())).await;
        late.push(clock.elapsed().saturating_sub(due));
        let (client, url) = (client.clone(), receiver.url(n));
        calls.spawn(async move {
            create_one(&client, n, url).await?;
            Ok::<_, String>(clock.elapsed().saturating_sub(due))
        });
    }
    let mut took = Vec::with_capacity(schedule.count);
    for call in calls.join_all().await {
        took.push(call?);
    }
    Ok((took, late))
}

async fn create_one(client: &Client, n: usize, webhook_url: String) -> Result<(), String> {
    let request = CreatePaymentIntentRequest {
        reservation_id: format!("reservation-{n}"),
        amount: Some(Money { amount: 10_000, currency: "KRW".to_owned() }),
        user_id: format!("user-{n}"),
        scenario: PaymentScenario::Approve.into(),
        webhook_url,
        ..Default::default()
    };
    let method = "/payment.v1.PaymentService/CreatePaymentIntent";
    let _: CreatePaymentIntentResponse = client.call(method, &request).await?;
    Ok(())
}

async fn all_arrived(arrivals: &Arrivals) -> Result<(), String> {
    let waited = Stopwatch::start();
    while arrivals.missing() > 0 {
        if waited.elapsed() > PATIENCE {
            return Err(format!("{} webhooks did not come to the good one", arrivals.missing()));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Webhooks a second to one good receiver: of the middle eight tenths, so that neither the start nor the
/// end counts. They fall due as fast as their payments were made; more than that cannot be seen.
async fn burst(dir: &Path, binary: &Path, count: usize) -> Result<f64, String> {
    let service = start(&dir.join("burst"), binary, BURST_DELAY_MS).await?;
    let clock = Stopwatch::start();
    let arrivals = Arc::new(Arrivals::of(count, clock));
    let receiver = Receiver::healthy(Arc::clone(&arrivals)).await?;
    let client = service.connect().await?;
    let mut calls = JoinSet::new();
    for n in 0..count {
        let (client, url) = (client.clone(), receiver.url(n));
        calls.spawn(async move { create_one(&client, n, url).await });
        if calls.len() == BURST_AT_A_TIME {
            calls.join_next().await.transpose().map_err(|e| e.to_string())?.transpose()?;
        }
    }
    for call in calls.join_all().await {
        call?;
    }
    let creates = count as f64 / clock.elapsed().as_secs_f64();
    all_arrived(&arrivals).await?;
    let at = sorted_ms(arrivals.all().into_iter().map(|(_, at)| at).collect());
    let rate = 0.8 * count as f64 / ((quantile(&at, 0.9) - quantile(&at, 0.1)) / 1e3);
    println!(
        "full speed: {rate:.0} webhooks/s to one receiver on {} connections, of {count} that were \
         created at {creates:.0}/s",
        receiver.connections()
    );
    Ok(rate)
}

fn sorted_ms(durations: Vec<Duration>) -> Vec<f64> {
    let mut ms: Vec<f64> = durations.into_iter().map(|d| d.as_secs_f64() * 1e3).collect();
    ms.sort_by(f64::total_cmp);
    ms
}

fn print(name: &str, phase: &Phase) {
    let [p50, p99, p999, max] = [0.5, 0.99, 0.999, 1.0].map(|q| quantile(&phase.latency, q));
    println!(
        "{name:<11} {p50:>8.2} {p99:>6.2} {p999:>6.2} {max:>6.1} | {:>10.2} {:>9.2} | {:>3.0} {:>10.0} | \
         {:>4.0} {:>9.0}  {:?}",
        quantile(&phase.create, 0.99),
        quantile(&phase.late, 0.99),
        phase.resident_mib,
        phase.peak_mib,
        phase.pending,
        phase.withheld,
        phase.connections,
    );
}

/// The verdict for people, and a line for programs.
fn report(load: &Load, alone: &[Phase], beside: &[Phase], burst: Option<f64>) {
    let p99 = |phase: &Phase| quantile(&phase.latency, 0.99);
    let of = |phases: &[Phase], value: &dyn Fn(&Phase) -> f64| {
        let mut values: Vec<f64> = phases.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let mut ratios: Vec<f64> = alone.iter().zip(beside).map(|(a, b)| p99(b) / p99(a)).collect();
    ratios.sort_by(f64::total_cmp);
    let [ratio, least, most] = [0.5, 0.0, 1.0].map(|q| quantile(&ratios, q));
    let late = |phase: &Phase| quantile(&phase.late, 0.99);
    if alone.iter().chain(beside).map(late).any(|ms| ms > LATE_MS_MAX) {
        println!("the load itself was late: this machine is busy, and the figures say little");
    }
    let peaks = |phases| quantile(&of(phases, &|phase| phase.peak_mib), 1.0);
    let (peak_alone, peak_beside) = (peaks(alone), peaks(beside));
    let said = |met| if met { "met" } else { "MISSED" };
    println!(
        "p99 beside bad ones is {ratio:.2} times p99 alone (median of {}, {least:.2} to {most:.2}); \
         target at most {RATIO_MAX}: {}",
        load.pairs,
        said(ratio <= RATIO_MAX)
    );
    println!(
        "peak memory {peak_beside:.0} MiB, alone {peak_alone:.0}; target less than \
         {MEMORY_MIB_MAX}: {}",
        said(peak_beside < MEMORY_MIB_MAX)
    );
    let median = |phases| quantile(&of(phases, &p99), 0.5);
    println!(
        "{{\"bench\":\"webhooks\",\"rate\":{},\"bad\":{},\"seconds\":{},\"pairs\":{},\
         \"p99_alone_ms\":{:.3},\"p99_beside_ms\":{:.3},\"ratio\":{ratio:.3},\
         \"ratio_min\":{least:.3},\"ratio_max\":{most:.3},\"peak_alone_mib\":{peak_alone:.1},\
         \"peak_beside_mib\":{peak_beside:.1},\"burst_per_s\":{}}}",
        load.rate,
        load.bad,
        load.seconds,
        load.pairs,
        median(alone),
        median(beside),
        burst.map_or_else(|| "null".to_owned(), |rate| format!("{rate:.0}")),
    );
}
