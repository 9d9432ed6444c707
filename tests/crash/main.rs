//! The crash test: `kill -9` under load, again and again, judged from outside the process. Receivers and
//! the queue die as well, in turn and together, and the queue errs all the time.
//!
//! Driver, sink and queue keep journals of their own; a checker compares them with what the service says,
//! in the middle of a run (what is decided is delivered, dead or owed) and once it has come to rest (and
//! nothing is owed). Built with the feature `faults`, the five ways to get it wrong must each be caught,
//! too: a checker that misses one proves nothing about the run without.
//!
//! `CRASH_CYCLES` (3) kills, `CRASH_SEED` repeats a run's chance, `CRASH_FAULT` runs one control alone.

mod arrival;
mod checker;
mod driver;
#[path = "../support/fake_aws/mod.rs"]
mod fake_aws;
mod journal;
mod queue;
mod sink;
#[path = "../support/mod.rs"]
mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use payment_sim::clock::Stopwatch;
use tokio_util::sync::CancellationToken;

use checker::{Seen, Stdout, Violation};
use driver::{Driver, Story, Timing};
use journal::Journal;
use queue::Queue;
use sink::Sink;
use support::{
    chance::Chance,
    process::{Launch, Service},
    setting,
};

const CYCLES: u64 = 3;
/// A control that is not caught in so many cycles counts as missed.
const CONTROL_CYCLES: u64 = 30;
/// The journals are checked every so many cycles, and at the end.
const CHECK_EVERY: u64 = 10;
const TASKS: usize = 24;
const READY_WITHIN: Duration = Duration::from_secs(30);
/// Load, kill and check together; only something that hangs takes so long.
const CYCLE_WITHIN: Duration = Duration::from_secs(180);
/// Payments that are looked at in the middle of a cycle.
const SAMPLE: usize = 300;
/// Where events go; the service changes it from start to start, and what is owed goes along.
const SINKS: [&str; 3] = ["eventbridge", "sqs", "log"];
/// What a failure prints of each kind of violation.
const PRINTED: usize = 3;
const PRINTED_LINES: usize = 40;

/// The controls, with the invariants that each breaks.
const CONTROLS: [(&str, &[&str]); 5] = [
    ("ack_before_commit", &[checker::I1_ACKNOWLEDGED]),
    ("outbox_after_commit", &[checker::I3_TOLD]),
    ("double_tick", &[checker::I2_DECIDED_ONCE, checker::I7_SAME_BYTES]),
    ("event_done_before_sent", &[checker::I3_TOLD]),
    ("letter_forgotten", &[checker::I3_TOLD]),
];

fn main() -> ExitCode {
    // Called as the tests that cargo knows are called: with a filter, or for a list.
    let mut words = std::env::args().skip(1);
    if words.any(|word| word == "--list" || (!word.starts_with('-') && !"crash".contains(&word))) {
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let (passed, failed) = runtime.block_on(run_all());
    // Threads that hang have failed the run; nobody waits for them.
    runtime.shutdown_background();
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn run_all() -> (u32, u32) {
    let number = |name: &str| {
        setting(name).map(|text| text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
    };
    let seed = number("CRASH_SEED").unwrap_or_else(|| Chance::of_the_machine().below(1 << 32));
    let cycles = number("CRASH_CYCLES").unwrap_or(CYCLES);
    let only = setting("CRASH_FAULT");
    println!("crash test: CRASH_SEED={seed} CRASH_CYCLES={cycles}");
    assert!(
        only.is_none() || cfg!(feature = "faults"),
        "CRASH_FAULT needs a build with --features faults"
    );
    let (mut passed, mut failed) = (0, 0);
    let mut count = |held: bool| if held { passed += 1 } else { failed += 1 };
    if only.is_none() {
        count(honest(seed, cycles).await);
    }
    if cfg!(feature = "faults") {
        let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
        let controls: Vec<_> = CONTROLS.iter().filter(|(name, _)| wanted(name)).collect();
        assert!(!controls.is_empty(), "CRASH_FAULT={only:?}: there is no such fault");
        for (fault, breaks) in controls {
            count(control(seed, fault, breaks).await);
        }
    }
    (passed, failed)
}

async fn honest(seed: u64, cycles: u64) -> bool {
    let mut run = Run::start("honest", seed, None).await;
    for n in 1..=cycles {
        let check = n.is_multiple_of(CHECK_EVERY) || n == cycles;
        if let Err(why) = run.cycle(n, cycles, check).await {
            return run.fail(&why);
        }
        if !run.violations.is_empty() {
            return run.fail("an invariant does not hold");
        }
    }
    run.say("all invariants hold");
    true
}

async fn control(seed: u64, fault: &'static str, breaks: &[&str]) -> bool {
    let mut run = Run::start(fault, seed, Some(fault)).await;
    for n in 1..=CONTROL_CYCLES {
        if let Err(why) = run.cycle(n, CONTROL_CYCLES, true).await {
            return run.fail(&why);
        }
        let mut caught: BTreeMap<&str, usize> = BTreeMap::new();
        for violation in &run.violations {
            *caught.entry(violation.invariant).or_default() += 1;
        }
        if breaks.iter().any(|invariant| caught.contains_key(invariant)) {
            run.say(&format!("caught in cycle {n} by {caught:?}"));
            return true;
        }
    }
    run.fail(&format!("not caught in {CONTROL_CYCLES} cycles by any of {breaks:?}"))
}

/// One run on one folder: the service, killed and started again, between driver, sink and queue.
struct Run {
    name: &'static str,
    seed: u64,
    folder: tempfile::TempDir,
    launch: Launch,
    fault: Option<&'static str>,
    chance: Chance,
    told: Arc<Journal>,
    said: Arc<Journal>,
    sink: Sink,
    queue: Queue,
    driver: Arc<Driver>,
    running: Option<Running>,
    /// Which of [`SINKS`] the next service has.
    next_sink: u64,
    deaths: Deaths,
    seen: Seen,
    watch: Stopwatch,
    violations: Vec<Violation>,
}

struct Running {
    service: Service,
    timing: Timing,
    sink: &'static str,
    events: JoinHandle<()>,
}

impl Running {
    /// Gone, and all that it wrote is read.
    async fn kill(mut self) {
        self.service.kill();
        let events = self.events;
        tokio::task::spawn_blocking(|| events.join())
            .await
            .ok()
            .and_then(Result::ok)
            .expect("the reader of events ends with the pipe");
    }
}

/// How often each was killed.
#[derive(Debug, Default)]
struct Deaths {
    service: u64,
    receivers: u64,
    queue: u64,
}

/// Who dies in a cycle, and when.
struct Plan {
    service: bool,
    receivers: bool,
    queue: bool,
    /// The service dies in its start and recovery, the others before that.
    early: bool,
    /// The others are back when the service dies.
    in_turn: bool,
}

impl Plan {
    /// The service dies in each cycle but every tenth, where it sees the others die; every twentieth, and
    /// the last of a run too short for that, kills all. In between, receivers and queue take turns.
    fn draw(n: u64, cycles: u64, is_control: bool, chance: &mut Chance) -> Self {
        let (both, in_turn) = (chance.percent(30), chance.percent(50));
        if is_control {
            let (receivers, queue, early) = (false, false, false);
            return Self { service: true, receivers, queue, early, in_turn };
        }
        let last_of_few = cycles < CHECK_EVERY && n == cycles;
        let kills_all = last_of_few || n.is_multiple_of(2 * CHECK_EVERY);
        let kills_others = kills_all || n.is_multiple_of(CHECK_EVERY);
        Self {
            service: kills_all || !kills_others,
            receivers: kills_others || both || n % 3 == 2,
            queue: kills_others || both || n % 3 == 1,
            // Half of the kills fall into start and recovery.
            early: !kills_others && n.is_multiple_of(2),
            in_turn: !kills_all && in_turn,
        }
    }
}

impl Run {
    async fn start(name: &'static str, seed: u64, fault: Option<&'static str>) -> Self {
        let folder = tempfile::Builder::new().prefix("crash-").tempdir().expect("a folder");
        let chance = Chance::seeded(seed);
        let told = Arc::new(Journal::create(folder.path().join("sink.journal")));
        let said = Arc::new(Journal::create(folder.path().join("driver.journal")));
        let sink = Sink::start(Arc::clone(&told), chance.branch(u64::MAX)).await;
        let queue = Queue::start(Arc::clone(&told)).await;
        let launch = Launch::new(folder.path())
            .with("WEBHOOK_TIMEOUT_MS", 1_000)
            .with("WEBHOOK_BACKOFF_BASE_MS", 20)
            .with("WEBHOOK_BACKOFF_MAX_MS", 500)
            .with("WEBHOOK_MAX_ATTEMPTS", 6);
        let launch = queue.reached_by(launch);
        let driver = Driver::new(launch.grpc_port, Arc::clone(&said), sink.urls());
        Self {
            name,
            seed,
            launch,
            fault,
            chance,
            told,
            said,
            sink,
            queue,
            driver: Arc::new(driver),
            folder,
            running: None,
            next_sink: 0,
            deaths: Deaths::default(),
            seen: Seen::default(),
            watch: Stopwatch::start(),
            violations: Vec::new(),
        }
    }

    async fn cycle(&mut self, n: u64, cycles: u64, check: bool) -> Result<(), String> {
        tokio::time::timeout(CYCLE_WITHIN, self.kill_and_check(n, cycles, check))
            .await
            .unwrap_or_else(|_| Err(format!("cycle {n} did not end within {CYCLE_WITHIN:?}")))
    }

    /// Load, then who is to die.
    async fn kill_and_check(&mut self, n: u64, cycles: u64, check: bool) -> Result<(), String> {
        let is_control = self.fault.is_some();
        let plan = Plan::draw(n, cycles, is_control, &mut self.chance);
        self.queue.errs(&self.chance.branch(n));
        if plan.early {
            self.kill_others(&plan).await;
        }
        let mut running = match self.running.take() {
            Some(running) => running,
            None => self.serve(self.fault),
        };
        let stop = CancellationToken::new();
        let name = format!("{}-{n}", self.name);
        let load = self.driver.load(TASKS, &name, running.timing, &self.chance.branch(n), &stop);
        if plan.early {
            self.load_for(0, 200).await;
        } else {
            running.service.ready(READY_WITHIN).await?;
            let most = if is_control { 500 } else { 3_000 };
            self.load_for(50, most).await;
            self.kill_others(&plan).await;
            self.load_for(50, 500).await;
            if !is_control {
                self.check_books(&running).await?;
            }
            if plan.in_turn {
                self.revive_others().await;
            }
        }
        if plan.service {
            running.service.kill();
        }
        // Before the last events are waited for, because the receivers' death holds up their reader.
        self.revive_others().await;
        if plan.service {
            running.kill().await;
            self.deaths.service += 1;
        } else {
            self.running = Some(running);
        }
        stop.cancel();
        load.join_all().await;
        if check { self.check().await } else { Ok(()) }
    }

    async fn kill_others(&mut self, plan: &Plan) {
        if plan.receivers {
            self.sink.die().await;
            self.deaths.receivers += 1;
        }
        if plan.queue {
            self.queue.set_away(true);
            self.deaths.queue += 1;
        }
    }

    async fn revive_others(&self) {
        self.sink.revive().await;
        self.queue.set_away(false);
    }

    /// Load goes on for so long: this measures nothing and waits for nothing.
    async fn load_for(&mut self, least_ms: u64, most_ms: u64) {
        let ms = self.chance.between(least_ms, most_ms);
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }

    fn serve(&mut self, fault: Option<&'static str>) -> Running {
        let most = if self.fault.is_some() { 300 } else { 3_000 };
        let timing = Timing {
            delay_ms: self.chance.below(4) * most / 3,
            settle_ms: self.chance.between(100, most),
            ttl_ms: self.chance.between(100, most),
        };
        let sink = SINKS[usize::try_from(self.next_sink % 3).expect("small")];
        // Never the same twice in a row.
        self.next_sink += self.chance.between(1, 2);
        let mut service = self
            .launch
            .clone()
            .with("DEFAULT_DELAY_MS", timing.delay_ms)
            .with("TIMEOUT_SETTLE_MS", timing.settle_ms)
            .with("MANUAL_TTL_MS", timing.ttl_ms)
            .with("EVENT_SINK", sink)
            .with("PAYMENT_SIM_FAULT", fault.unwrap_or_default())
            .start();
        let events = self.sink.follow(service.stdout());
        Running { service, timing, sink, events }
    }

    /// Under load, and with whoever is away.
    async fn check_books(&mut self, running: &Running) -> Result<(), String> {
        let stdout = if running.sink == "log" { Stdout::Behind } else { Stdout::Read };
        let sample: BTreeSet<String> = self.driver.some(SAMPLE, &mut self.chance);
        let journals = async || (Story::of(self.said.read().await), self.told.read().await);
        let found = checker::check_books(&self.driver, &sample, journals, stdout).await?;
        self.violations.extend(found.0);
        Ok(())
    }

    /// Judged with everything healthy and on a service without the fault: what it did wrong is done.
    async fn check(&mut self) -> Result<(), String> {
        self.queue.behaves();
        let mut running = match self.running.take() {
            Some(running) => running,
            None => self.serve(None),
        };
        running.service.ready(READY_WITHIN).await?;
        let story = Story::of(self.said.read().await);
        let arrivals = async || self.told.read().await;
        let (seen, found) =
            checker::check(&self.driver, &story, arrivals, running.timing, &mut self.chance)
                .await?;
        self.seen = seen;
        self.violations.extend(found.0);
        match self.fault {
            None => self.running = Some(running),
            Some(_) => running.kill().await,
        }
        Ok(())
    }

    fn say(&self, result: &str) {
        let took = self.watch.elapsed().as_secs_f64();
        let Deaths { service, receivers, queue } = self.deaths;
        println!(
            "{}: {service} kills (receivers {receivers}, queue {queue}), {} acknowledgements in \
             {took:.1} s: {result}",
            self.name,
            self.driver.acks(),
        );
        println!("  {}", self.seen);
    }

    fn fail(mut self, why: &str) -> bool {
        self.running = None;
        self.say(&format!("FAILED (CRASH_SEED={}): {why}", self.seed));
        let folder: PathBuf = self.folder.keep();
        print_violations(&folder, &self.violations);
        println!("journals, data and the service's log are kept in {}", folder.display());
        false
    }
}

fn print_violations(folder: &Path, violations: &[Violation]) {
    let mut by_invariant: BTreeMap<&str, Vec<&Violation>> = BTreeMap::new();
    for violation in violations {
        by_invariant.entry(violation.invariant).or_default().push(violation);
    }
    for (invariant, violations) in by_invariant {
        println!("{invariant}: violated {} times", violations.len());
        for violation in violations.iter().take(PRINTED) {
            println!("  {}: {}", violation.names.join(" "), violation.what);
            let names: Vec<&str> = violation.names.iter().map(String::as_str).collect();
            for line in journal::lines_about(folder, &names).iter().take(PRINTED_LINES) {
                println!("    {line}");
            }
        }
    }
}
