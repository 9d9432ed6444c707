//! Whole payments through the store alone: creates at a fixed rate, a batch to a commit call, each
//! settled two seconds later as the outbox does it. The load does not wait for the store. With `pending`, beside so
//! many others that wait for an hour.
//!
//! `rate=30000 seconds=60 pending=0 dir=PATH retention=SECONDS`; exit code 1 when the store fell behind.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bench::{
    argument, benchmark, check_arguments,
    filling::put,
    gauge::{cpu_us, disk_bytes, memory_mib, quantile, written_bytes},
    payments::{Maker, created, delivered},
};
use payment_sim::{
    clock::{Clock, Stopwatch, SystemClock},
    domain::time::Timestamp,
    process,
    store::{
        self, Change, Commit, Committed, Embedded, Lease, Location, Options, Retention, Store,
        StoreError, Work,
    },
};
use tokio::task::JoinSet;

const BATCH: u64 = 100;
/// Batches of settlements under way at a time.
const SETTLING_MAX: usize = 64;
const SETTLE_AFTER: Duration = Duration::from_secs(2);
/// When what is pending beside them falls due: long after the end.
const PENDING_FOR: Duration = Duration::from_secs(3_600);
/// They are numbered from here on.
const PENDING_FROM: u64 = 1 << 40;
/// Filling is over when so many seconds in a row took less CPU for merging: longer than what is derived waits to be
/// brought in. Some of its files are left to be merged with those of the load.
const RESTING_SECONDS: usize = 8;
const RESTING_US: f64 = 20_000.0;
/// Behind: what falls due is settled later than this, or creates are answered later.
const LATE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    // As the service does, parts of which run in this process.
    process::refuse_huge_pages();
    benchmark(run)
}

/// What was seen while it ran.
#[derive(Default)]
struct Seen {
    created: AtomicU64,
    settled: AtomicU64,
    /// Milliseconds from the moment a batch was due to be created until its answer.
    create_ms: Mutex<Vec<f64>>,
    /// Milliseconds of the store's own commits, and how many commits each took together.
    commit_ms: Mutex<Vec<f64>>,
    commits: AtomicU64,
    /// The furthest a settlement was behind its time.
    lag_ms: AtomicU64,
    problem: Mutex<Option<String>>,
}

impl Seen {
    fn fail(&self, why: String) {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
    }

    fn failed(&self) -> bool {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

struct Load {
    rate: u64,
    seconds: u64,
    pending: u64,
}

fn run() -> Result<bool, String> {
    check_arguments(&["rate", "seconds", "pending", "dir", "retention"])?;
    let load = Load {
        rate: argument("rate", 30_000)?,
        seconds: argument("seconds", 60)?,
        pending: argument("pending", 0)?,
    };
    let kept = Duration::from_secs(argument("retention", 7 * 86_400)?);
    let given: String = argument("dir", String::new())?;
    let dir = match given.as_str() {
        "" => std::env::temp_dir().join(format!("payment-sim-bench-{}", std::process::id())),
        given => PathBuf::from(given),
    };
    std::fs::remove_dir_all(&dir).or_else(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(format!("{}: {error}", dir.display())),
    })?;
    let fits = measure(&load, kept, &dir);
    if given.is_empty() {
        // Nobody asked for it to be kept.
        let _ = std::fs::remove_dir_all(&dir);
    }
    fits
}

fn measure(load: &Load, kept: Duration, dir: &Path) -> Result<bool, String> {
    let seen = Arc::new(Seen::default());
    let noted = Arc::clone(&seen);
    let options = Options {
        retention: Retention { payments: kept, idempotency: kept, payments_max: None },
        clock: Arc::new(SystemClock),
        on_commit: Arc::new(move |commits, took| {
            noted.commits.fetch_add(commits as u64, Ordering::Relaxed);
            let mut all = noted.commit_ms.lock().unwrap_or_else(PoisonError::into_inner);
            all.push(took.as_secs_f64() * 1e3);
        }),
        on_dropped_early: Arc::new(|_| {}),
    };
    let store = store::open(&Location::Folder(dir.to_owned()), options)
        .map_err(|error| error.to_string())?;
    if load.pending > 0 {
        on_a_runtime(fill(load.pending, &store))?;
        seen.commits.store(0, Ordering::Relaxed);
        seen.commit_ms.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
    let generating = generator_us();
    let (cpu, written) = (cpu_us(), written_bytes());
    let took = Stopwatch::start();
    let (fell_behind, threads) = std::thread::scope(|scope| {
        let spawn = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let creates = spawn("bench-create")
            .spawn_scoped(scope, || {
                on_a_runtime(create(load, Arc::clone(&store), Arc::clone(&seen)))
            })
            .map_err(|error| error.to_string())?;
        let settles = spawn("bench-settle")
            .spawn_scoped(scope, || on_a_runtime(settle(load, &store, &seen)))
            .map_err(|error| error.to_string())?;
        let watched = watch(load, &store, &seen, &took);
        // Before they end, and with them what the kernel says of each.
        let threads = cpu_us();
        creates.join().map_err(|_| "the creates broke off")?;
        settles.join().map_err(|_| "the settlements broke off")?;
        Ok::<_, String>((watched, threads))
    })?;
    let all = cpu_us();
    report(&seen, load, fell_behind, took.elapsed());
    let each = |us: f64| us / seen.created.load(Ordering::Relaxed) as f64;
    let spent = |name: &str| threads.get(name).unwrap_or(&0.0) - cpu.get(name).unwrap_or(&0.0);
    println!(
        "CPU {:.1} µs a payment, of which about {generating:.1} make the load itself",
        each(all.get("").unwrap_or(&0.0) - cpu.get("").unwrap_or(&0.0))
    );
    for name in threads.keys().filter(|name| !name.is_empty() && spent(name) > 0.0) {
        println!("    {name:<16} {:>5.1} µs", each(spent(name)));
    }
    let bytes = disk_bytes(dir).map_err(|error| error.to_string())? as f64;
    println!(
        "disk {:.0} bytes a payment at the end ({} payments stored), {:.0} written",
        bytes / store.payments().max(1) as f64,
        store.payments(),
        each(written_bytes() - written)
    );
    println!("RSS peak {:.0} MiB", memory_mib("self", "VmHWM"));
    on_a_runtime(store.close());
    match seen.problem.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(problem) => Err(problem),
        None => Ok(!fell_behind),
    }
}

fn on_a_runtime<T>(task: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("the machine has room for a runtime")
        .block_on(task)
}

/// What making a payment and its delivery cost, so that it can be told from the store.
fn generator_us() -> f64 {
    const COUNT: u64 = 100_000;
    let maker = Maker::new(Duration::ZERO);
    let before = cpu_us();
    for n in 0..COUNT {
        let now = Timestamp::from_ms(SystemClock.now_ms());
        let payment = maker.payment(n, now);
        std::hint::black_box(delivered(&payment, now));
    }
    let spent = |used: &std::collections::BTreeMap<String, f64>| used.get("").copied();
    (spent(&cpu_us()).unwrap_or(0.0) - spent(&before).unwrap_or(0.0)) / COUNT as f64
}

/// Payments that wait beside those that are measured.
async fn fill(pending: u64, store: &Arc<Embedded>) -> Result<(), String> {
    let maker = Maker::new(PENDING_FOR);
    let batches = (0..pending).step_by(BATCH as usize).map(|first| {
        let now = Timestamp::from_ms(SystemClock.now_ms());
        let numbers = first..(first + BATCH).min(pending);
        Ok(numbers.map(|n| created(maker.terms(PENDING_FROM + n, now))).collect())
    });
    put(store, batches).await?;
    let mut resting = 0;
    while resting < RESTING_SECONDS {
        let is_resting = merging_us(Duration::from_secs(1)).await < RESTING_US;
        resting = if is_resting { resting + 1 } else { 0 };
    }
    println!("{pending} are pending, {:.0} MiB", memory_mib("self", "VmRSS"));
    Ok(())
}

/// What the engines' workers use meanwhile.
async fn merging_us(meanwhile: Duration) -> f64 {
    let used = || cpu_us().get("fjall:worker").copied().unwrap_or(0.0);
    let before = used();
    tokio::time::sleep(meanwhile).await;
    used() - before
}

async fn create(load: &Load, store: Arc<Embedded>, seen: Arc<Seen>) {
    let maker = Maker::new(SETTLE_AFTER);
    let start = Stopwatch::start();
    let mut answers = JoinSet::new();
    for i in 0..load.rate * load.seconds / BATCH {
        let due = Duration::from_nanos(i * BATCH * 1_000_000_000 / load.rate);
        if let Some(left) = due.checked_sub(start.elapsed()) {
            tokio::time::sleep(left).await;
        }
        let now = Timestamp::from_ms(SystemClock.now_ms());
        let commits = (0..BATCH).map(|k| created(maker.terms(i * BATCH + k, now))).collect();
        let (store, seen) = (Arc::clone(&store), Arc::clone(&seen));
        answers.spawn(async move {
            for answer in store.commit(commits).await {
                match answer {
                    Ok(Committed::Done(_)) => drop(seen.created.fetch_add(1, Ordering::Relaxed)),
                    other => seen.fail(format!("a create came to {other:?}")),
                }
            }
            let late = start.elapsed().saturating_sub(due).as_secs_f64() * 1e3;
            seen.create_ms.lock().unwrap_or_else(PoisonError::into_inner).push(late);
        });
        while answers.try_join_next().is_some() {}
    }
    answers.join_all().await;
}

/// As the outbox: lease what is due, read it, apply the attempt, commit; here without the attempt.
async fn settle(load: &Load, store: &Arc<Embedded>, seen: &Arc<Seen>) {
    let all = load.rate * load.seconds / BATCH * BATCH;
    let mut answers = JoinSet::new();
    while seen.settled.load(Ordering::Relaxed) < all && !seen.failed() {
        let now = Timestamp::from_ms(SystemClock.now_ms());
        let batch = match answers.len() {
            SETTLING_MAX => Ok(None),
            _ => lease(store, seen, now).await,
        };
        match batch {
            Ok(Some((leases, commits))) => {
                let (store, seen) = (Arc::clone(store), Arc::clone(seen));
                answers.spawn(async move {
                    finish(&seen, store.commit(commits).await);
                    drop(leases);
                });
                // Lets the commit start before the next batch is read.
                tokio::task::yield_now().await;
            }
            Ok(None) => tokio::time::sleep(Duration::from_millis(2)).await,
            Err(why) => seen.fail(why),
        }
        while answers.try_join_next().is_some() {}
    }
    answers.join_all().await;
}

/// What is due, with the commits that settle it.
async fn lease(
    store: &Embedded,
    seen: &Seen,
    now: Timestamp,
) -> Result<Option<(Vec<Lease>, Vec<Commit>)>, String> {
    let oldest = store.backlog(Work::Webhook).oldest;
    let lag = oldest.map_or(Duration::ZERO, |due| now.since(due));
    seen.lag_ms.fetch_max(lag.as_millis() as u64, Ordering::Relaxed);
    let leases = store.due(Work::Webhook, now, BATCH as usize).await.map_err(|e| e.to_string())?;
    let mut commits = Vec::with_capacity(leases.len());
    for lease in &leases {
        let stored = store.get(lease.id).await.map_err(|error| error.to_string())?;
        let before = stored.ok_or("a payment is gone")?;
        let after = delivered(&before.payment, now).ok_or("a due delivery is not owed")?;
        commits.push(Commit { change: Some(Change::update(before, after)), reply: None });
    }
    Ok((!commits.is_empty()).then_some((leases, commits)))
}

fn finish(seen: &Seen, answers: Vec<Result<Committed, StoreError>>) {
    for answer in answers {
        match answer {
            Ok(Committed::Done(_)) => drop(seen.settled.fetch_add(1, Ordering::Relaxed)),
            other => seen.fail(format!("a settlement came to {other:?}")),
        }
    }
}

/// Looks once a second; true when the load was not kept up with.
fn watch(load: &Load, store: &Embedded, seen: &Seen, took: &Stopwatch) -> bool {
    let mut behind = false;
    for second in 1..=load.seconds {
        let left = Duration::from_secs(second).saturating_sub(took.elapsed());
        std::thread::sleep(left);
        let now = Timestamp::from_ms(SystemClock.now_ms());
        let lag = store.backlog(Work::Webhook).oldest.map_or(Duration::ZERO, |at| now.since(at));
        let created = seen.created.load(Ordering::Relaxed);
        let late = (second * load.rate).saturating_sub(created);
        // At the end is what counts: a stall that is made up for is seen in the latencies.
        behind = lag > LATE || late as f64 > LATE.as_secs_f64() * load.rate as f64;
        if second % 10 == 0 || second == load.seconds {
            println!(
                "{second:>4} s: {created} created, {late} late; {} settled, {} ms behind; {} open, {} stored; {:.0} MiB",
                seen.settled.load(Ordering::Relaxed),
                lag.as_millis(),
                store.backlog(Work::Webhook).pending,
                store.payments(),
                memory_mib("self", "VmRSS"),
            );
        }
    }
    behind
}

fn report(seen: &Seen, load: &Load, fell_behind: bool, took: Duration) {
    let sorted = |values: &Mutex<Vec<f64>>| {
        let mut values =
            std::mem::take(&mut *values.lock().unwrap_or_else(PoisonError::into_inner));
        values.sort_by(f64::total_cmp);
        values
    };
    let created = seen.created.load(Ordering::Relaxed);
    // The last payments are settled after the last create.
    let rate = created as f64 / took.saturating_sub(SETTLE_AFTER).as_secs_f64();
    println!(
        "{} {} payments/s for {} s: {created} whole payments, {rate:.0} a second; largest lag of a settlement {} ms",
        if fell_behind { "FELL BEHIND" } else { "kept up with" },
        load.rate,
        load.seconds,
        seen.lag_ms.load(Ordering::Relaxed),
    );
    let (commits, creates) = (sorted(&seen.commit_ms), sorted(&seen.create_ms));
    let line = |name: &str, of: &[f64]| {
        let q = |q| quantile(of, q);
        println!("{name} p50 {:.2} p99 {:.2} max {:.0} ms", q(0.5), q(0.99), q(1.0));
    };
    println!(
        "{} syncs, {:.0} commits each",
        commits.len(),
        seen.commits.load(Ordering::Relaxed) as f64 / commits.len() as f64
    );
    line("sync  ", &commits);
    line("create", &creates);
}
