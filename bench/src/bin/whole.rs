//! Whole payments a second: created, decided, published, their webhook acknowledged, and closed. First the
//! highest of some rates at which the outbox does not grow, for a while and then for a minute; then what a
//! payment costs the service at that rate ÷ the sum of its parts, each alone.
//!
//! `rates=2000,4000,… probe=10 seconds=60 pairs=3 scenario=approve connections=50 streams=20 threads=CORES
//! dir=PATH binary=PATH`; exit code 1 when less than asked is sustained, or the whole costs more than asked.

use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use bench::{
    argument, benchmark, check_arguments,
    figure::{self, Spread},
    gauge::process_cpu_us,
    load::{Kind, Life, Load, Report},
    on_a_runtime,
    service::{Service, beside},
    sink::Sink,
};
use payment_sim::{api::pb::payment::v1::PaymentScenario, clock::Stopwatch};
use serde_json::{Value, json};

const LEAST_PER_SECOND: u64 = 12_000;
const RATIO_MAX: f64 = 1.3;
const RATES: &str = "2000,4000,6000,8000,10000,12000,14000,16000,18000,20000,24000,28000,32000";
/// Behind this share of the rate, the load was not made.
const RATE_SHARE: f64 = 0.98;
const SAMPLE_EVERY: Duration = Duration::from_millis(500);
/// What is still owed at the end of a load takes no longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// From its creation until a payment of the scenario `delay` is decided.
const DECIDED_AFTER: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    benchmark(run)
}

fn run() -> Result<bool, String> {
    check_arguments(&[
        "rates",
        "probe",
        "seconds",
        "pairs",
        "scenario",
        "connections",
        "streams",
        "threads",
        "dir",
        "binary",
    ])?;
    let bench = Bench::from_arguments()?;
    let probe = Duration::from_secs(argument("probe", 10)?);
    let minute = Duration::from_secs(argument("seconds", 60)?);
    let rates = argument("rates", RATES.to_owned())?;
    let rates = rates.split(',').map(|rate| rate.parse().map_err(|_| format!("rates={rates}")));
    let rates: Vec<u64> = rates.collect::<Result<_, String>>()?;
    let Some(sustained) = bench.highest(&rates, probe, minute)? else {
        println!("not even the lowest rate is sustained");
        return Ok(false);
    };
    let mut costs = Vec::new();
    for pair in 1..=argument("pairs", 3)? {
        let costs_now = bench.costs(sustained.rate, probe)?;
        println!("{pair}  {}", costs_now.line());
        costs.push(costs_now);
    }
    publish(&bench, &sustained, &costs)
}

fn publish(bench: &Bench, sustained: &Lived, costs: &[Costs]) -> Result<bool, String> {
    let ratios: Vec<f64> = costs.iter().map(Costs::ratio).collect();
    let details = json!({
        "scenario": bench.scenario.as_str_name(),
        "sustained": sustained.json(),
        "asked_per_second": LEAST_PER_SECOND,
        "pairs": costs.iter().map(Costs::json).collect::<Vec<_>>(),
    });
    figure::publish_at_most("whole", &ratios, RATIO_MAX, details)?;
    let (rate, ratio) = (sustained.rate, Spread::of(ratios).median);
    let said = |met| if met { "met" } else { "MISSED" };
    let (fast, cheap) = (rate >= LEAST_PER_SECOND, ratio <= RATIO_MAX);
    println!("sustained {rate} whole payments/s; asked {LEAST_PER_SECOND}: {}", said(fast));
    println!("CPU ÷ sum of the parts; asked at most {RATIO_MAX}: {}", said(cheap));
    Ok(fast && cheap)
}

/// What payments go through.
#[derive(Clone, Copy)]
struct Way {
    scenario: PaymentScenario,
    events: bool,
    webhooks: bool,
}

struct Bench {
    sink: Sink,
    scenario: PaymentScenario,
    load: Load,
    dir: PathBuf,
    binary: PathBuf,
}

impl Bench {
    fn from_arguments() -> Result<Self, String> {
        let scenario = match argument("scenario", "approve".to_owned())?.as_str() {
            "approve" => PaymentScenario::Approve,
            "delay" => PaymentScenario::Delay,
            other => return Err(format!("scenario={other}: approve or delay")),
        };
        let parent: PathBuf = argument("dir", std::env::temp_dir())?;
        Ok(Self {
            sink: Sink::start()?,
            scenario,
            load: Load::from_arguments(Kind::Create, 20, 60)?,
            dir: parent.join(format!("payment-sim-whole-{}", std::process::id())),
            binary: argument("binary", beside("payment-sim")?)?,
        })
    }

    /// The highest of the rates that is sustained, for `probe` and then for `minute`.
    fn highest(
        &self,
        rates: &[u64],
        probe: Duration,
        minute: Duration,
    ) -> Result<Option<Lived>, String> {
        let whole = Way { scenario: self.scenario, events: true, webhooks: true };
        let mut held = Vec::new();
        for rate in rates {
            let lived = self.live(whole, *rate, probe)?;
            println!("{}", lived.line());
            if !lived.is_sustained() {
                break;
            }
            held.push(*rate);
        }
        while let Some(rate) = held.pop() {
            let lived = self.live(whole, rate, minute)?;
            println!("{}", lived.line());
            if lived.is_sustained() {
                return Ok(Some(lived));
            }
        }
        Ok(None)
    }

    fn costs(&self, rate: u64, length: Duration) -> Result<Costs, String> {
        let cost = |scenario, events, webhooks| {
            self.live(Way { scenario, events, webhooks }, rate, length).map(|lived| lived.cpu_us)
        };
        let (approve, scenario) = (PaymentScenario::Approve, self.scenario);
        let create = cost(approve, false, false)?;
        let beyond_create = |cost: f64| cost - create;
        Ok(Costs {
            create,
            settle: match scenario {
                PaymentScenario::Delay => beyond_create(cost(scenario, false, false)?),
                // Decided as it is created.
                _ => 0.0,
            },
            event: beyond_create(cost(approve, true, false)?),
            webhook: beyond_create(cost(approve, false, true)?),
            whole: cost(scenario, true, true)?,
        })
    }

    /// Payments at a constant rate, until nothing more is owed of any.
    fn live(&self, way: Way, rate: u64, length: Duration) -> Result<Lived, String> {
        // There is none before the first.
        let _ = fs::remove_dir_all(&self.dir);
        fs::create_dir_all(&self.dir)
            .map_err(|error| format!("{}: {error}", self.dir.display()))?;
        let service = self.service(way)?;
        let webhooks_to = way.webhooks.then(|| self.sink.address());
        let kind = Kind::Whole(Life { scenario: way.scenario, webhooks_to });
        let mut load = Load { rate: Some(rate), duration: length, ..self.load.clone() };
        load.calls.kind = kind;
        let cpu_us = || process_cpu_us(service.pid());
        let (before, received) = (cpu_us(), self.sink.received()?);
        let (report, pending) = watched(&service, || load.run(service.address()))?;
        self.drained(&service, way)?;
        let cpu_us = cpu_us() - before;
        let made = report.answered - report.failed;
        let now = self.sink.received()?;
        for (name, wanted, came) in [
            ("events", way.events, now.events - received.events),
            ("webhooks", way.webhooks, now.webhooks - received.webhooks),
        ] {
            if wanted && came < made {
                return Err(format!("{came} {name} came of {made} payments"));
            }
        }
        Ok(Lived { rate, report, pending_max: pending, cpu_us: cpu_us / made as f64 })
    }

    fn service(&self, way: Way) -> Result<Service, String> {
        let delay_ms = match way.scenario {
            PaymentScenario::Delay => DECIDED_AFTER.as_millis().to_string(),
            _ => "0".to_owned(),
        };
        let aws_url = self.sink.aws_url();
        let settings = [
            ("DEFAULT_DELAY_MS", delay_ms.as_str()),
            ("EVENT_SINK", if way.events { "eventbridge" } else { "none" }),
            ("EVENT_STARTUP_CHECK", "off"),
            ("AWS_ENDPOINT_URL", aws_url.as_str()),
            ("AWS_ACCESS_KEY_ID", "bench"),
            ("AWS_SECRET_ACCESS_KEY", "bench"),
        ];
        on_a_runtime(Service::start(&self.dir, &self.binary, &settings))
    }

    fn drained(&self, service: &Service, way: Way) -> Result<(), String> {
        if way.scenario == PaymentScenario::Delay {
            thread::sleep(2 * DECIDED_AFTER);
        }
        let waited = Stopwatch::start();
        while pending(service)? > 0.0 {
            if waited.elapsed() > PATIENCE {
                return Err(format!("something is owed {PATIENCE:?} after the load"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn pending(service: &Service) -> Result<f64, String> {
    let events = service.metric("outbox_pending{channel=\"event\"}")?;
    Ok(events.max(service.metric("outbox_pending{channel=\"webhook\"}")?))
}

/// What a load reports, and the most that was owed on a channel in its second half.
fn watched(
    service: &Service,
    load: impl FnOnce() -> Result<Report, String>,
) -> Result<(Report, f64), String> {
    let over = AtomicBool::new(false);
    let mut samples = Vec::new();
    let report = thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut samples = Vec::new();
            while !over.load(Ordering::Relaxed) {
                samples.push(pending(service)?);
                thread::sleep(SAMPLE_EVERY);
            }
            Ok::<_, String>(samples)
        });
        let report = load();
        over.store(true, Ordering::Relaxed);
        samples = sampler.join().map_err(|_| "the sampler panicked")??;
        report
    })?;
    let second_half = &samples[samples.len() / 2..];
    Ok((report, second_half.iter().copied().fold(0.0, f64::max)))
}

/// What was seen of payments at a rate.
struct Lived {
    rate: u64,
    report: Report,
    pending_max: f64,
    /// Microseconds of the service's CPU a payment.
    cpu_us: f64,
}

impl Lived {
    /// The load was made, and the outbox never held more than a second of it.
    fn is_sustained(&self) -> bool {
        let rate = self.rate as f64;
        let made = self.report.per_second() >= rate * RATE_SHARE;
        self.report.is_valid() && made && self.pending_max <= rate
    }

    fn line(&self) -> String {
        format!(
            "{:>6}/s  made {:>6.0}/s for {:.0} s  failed {:.3} %  create p99 {:.1} ms  owed at most {:.0}  \
             CPU a payment {:.1} µs  {}",
            self.rate,
            self.report.per_second(),
            self.report.seconds,
            100.0 * self.report.failed_share(),
            self.report.latency_ms(0.99),
            self.pending_max,
            self.cpu_us,
            if self.is_sustained() { "sustained" } else { "NOT sustained" },
        )
    }

    fn json(&self) -> Value {
        json!({
            "per_second": self.rate,
            "owed_max": self.pending_max,
            "cpu_us": self.cpu_us,
            "report": self.report.json(),
        })
    }
}

/// Microseconds of the service's CPU a payment: of each part beyond the create, and of the whole.
struct Costs {
    create: f64,
    settle: f64,
    event: f64,
    webhook: f64,
    whole: f64,
}

impl Costs {
    fn sum(&self) -> f64 {
        self.create + self.settle + self.event + self.webhook
    }

    fn ratio(&self) -> f64 {
        self.whole / self.sum()
    }

    fn line(&self) -> String {
        let Self { create, settle, event, webhook, whole } = self;
        format!(
            "CPU a payment: create {create:.1} + settle {settle:.1} + event {event:.1} + webhook \
             {webhook:.1} = {:.1} µs; whole {whole:.1} µs  ratio {:.3}",
            self.sum(),
            self.ratio()
        )
    }

    fn json(&self) -> Value {
        let Self { create, settle, event, webhook, whole } = self;
        json!({
            "create_us": create, "settle_us": settle, "event_us": event, "webhook_us": webhook,
            "whole_us": whole,
        })
    }
}
