//! What the service takes with millions of payments stored: time from its start to ready, and
//! resident memory then and after reads.
//!
//! `payments=5000000 owed=100000 dir=PATH binary=PATH`; exit code 1 when it takes more than it may.
//! A folder that was given and filled by an earlier run is used again.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use bench::{
    argument, check_arguments,
    client::Client,
    gauge::{disk_bytes, quantile},
    payments::{Maker, delivered, mix},
    service::{Service, beside},
};
use payment_sim::{
    api::pb::{
        common::v1::Pagination,
        payment::v1::{
            GetPaymentIntentRequest, GetPaymentIntentResponse, ListPaymentsRequest,
            ListPaymentsResponse,
        },
    },
    clock::{Clock, Stopwatch, SystemClock},
    domain::time::Timestamp,
    store::{
        self, Change, Commit, Embedded, Location, Options, Retention, Revision, Store, Versioned,
    },
};
use tokio::task::JoinSet;

const MEMORY_MIB_MAX: f64 = 512.0;
const START_MAX: Duration = Duration::from_secs(5);
const READS: u64 = 10_000;
const READS_AT_A_TIME: usize = 50;
const LISTS: u64 = 5;
/// Payments a commit while filling, and commits under way at a time.
const BATCH: u64 = 500;
const FILLING_MAX: usize = 8;
/// The stored payments were made over this time, the owed ones just now.
const SPREAD_MS: u64 = 60 * 60 * 1_000;
/// Due so late that nothing is posted while it is measured, yet in memory from the start.
const OWED_FOR: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::from(2)
        }
    }
}

/// What is stored: `settled` payments, made from `since_ms` on, and then those that are owed.
struct Filling {
    settled: u64,
    owed: u64,
    since_ms: i64,
}

impl Filling {
    fn made_at(&self, n: u64) -> Timestamp {
        Timestamp::from_ms(self.since_ms).plus_ms(n * SPREAD_MS / self.settled.max(1))
    }
}

fn run() -> Result<bool, String> {
    check_arguments(&["payments", "owed", "dir", "binary"])?;
    let (payments, owed) = (argument("payments", 5_000_000)?, argument("owed", 100_000)?);
    let given: String = argument("dir", String::new())?;
    let binary: PathBuf = argument("binary", beside("payment-sim")?)?;
    let dir = match given.as_str() {
        "" => std::env::temp_dir().join(format!("payment-sim-footprint-{}", std::process::id())),
        given => PathBuf::from(given),
    };
    let result = on_a_runtime(async {
        let filling = filled(&dir, payments, owed).await?;
        measure(&dir, &binary, &filling).await
    });
    if given.is_empty() {
        // Nobody asked for it to be kept.
        let _ = fs::remove_dir_all(&dir);
    }
    result
}

fn on_a_runtime<T>(task: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the machine has room for a runtime")
        .block_on(task)
}

/// Fills the folder unless that was done before.
async fn filled(dir: &Path, payments: u64, owed: u64) -> Result<Filling, String> {
    let note = dir.join("filled");
    let settled = payments.checked_sub(owed).ok_or("more are owed than stored")?;
    let text = format!("{settled} {owed}");
    if let Ok(found) = fs::read_to_string(&note) {
        let since_ms = found.strip_prefix(&text).and_then(|ms| ms.trim().parse().ok());
        let since_ms = since_ms.ok_or_else(|| format!("{} holds other payments", dir.display()))?;
        println!("{} is filled; what was owed there is overdue", dir.display());
        return Ok(Filling { settled, owed, since_ms });
    }
    fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let since_ms = SystemClock.now_ms() - SPREAD_MS.cast_signed();
    let filling = Filling { settled, owed, since_ms };
    let took = Stopwatch::start();
    fill(dir, &filling).await?;
    println!("stored {payments} payments in {:.0} s", took.elapsed().as_secs_f64());
    fs::write(&note, format!("{text} {since_ms}\n")).map_err(|error| error.to_string())?;
    Ok(filling)
}

async fn fill(dir: &Path, filling: &Filling) -> Result<(), String> {
    let day = Duration::from_secs(86_400);
    let options = Options {
        retention: Retention { payments: 7 * day, idempotency: day, payments_max: None },
        clock: Arc::new(SystemClock),
        on_commit: Arc::new(|_, _| {}),
        on_dropped_early: Arc::new(|_| {}),
    };
    let location = Location::Folder(dir.join("data"));
    let store = store::open(&location, options).map_err(|error| error.to_string())?;
    let (at_once, later) = (Maker::new(Duration::ZERO), Maker::new(OWED_FOR));
    let mut answers = JoinSet::new();
    let mut commits = Vec::new();
    let all = filling.settled + filling.owed;
    for n in 0..all {
        if n < filling.settled {
            commits.extend(settled(&at_once, n, filling.made_at(n))?);
        } else {
            let now = Timestamp::from_ms(SystemClock.now_ms());
            commits.push(created(later.payment(n, now)));
        }
        if n % BATCH == BATCH - 1 || n + 1 == all {
            answers.spawn(commit(Arc::clone(&store), std::mem::take(&mut commits)));
        }
        if answers.len() == FILLING_MAX {
            answers.join_next().await.transpose().map_err(|e| e.to_string())?.transpose()?;
        }
    }
    for answer in answers.join_all().await {
        answer?;
    }
    store.close().await;
    Ok(())
}

fn created(payment: payment_sim::domain::payment::Payment) -> Commit {
    Commit { change: Some(Change::Create { payment, draw: None }), reply: None }
}

/// A payment's whole life: its creation, and its webhook delivered.
fn settled(maker: &Maker, n: u64, at: Timestamp) -> Result<[Commit; 2], String> {
    let payment = maker.payment(n, at);
    let after = delivered(&payment, at).ok_or("nothing was owed")?;
    let before = Versioned { payment: payment.clone(), revision: Revision(0) };
    let change = Change::Update { before, after };
    Ok([created(payment), Commit { change: Some(change), reply: None }])
}

async fn commit(store: Arc<Embedded>, commits: Vec<Commit>) -> Result<(), String> {
    match store.commit(commits).await.into_iter().find_map(Result::err) {
        Some(error) => Err(format!("a commit came to {error:?}")),
        None => Ok(()),
    }
}

async fn measure(dir: &Path, binary: &Path, filling: &Filling) -> Result<bool, String> {
    let took = Stopwatch::start();
    let service = Service::start(dir, binary, &[]).await?;
    let start = took.elapsed();
    println!("ready {:.2} s after its start", start.as_secs_f64());
    let mut most = memory(&service, "after the start");
    let client = service.connect().await?;
    read(&client, filling).await?;
    most = most.max(memory(&service, &format!("after {READS} payments read")));
    list(&client, filling).await?;
    most = most.max(memory(&service, &format!("after {LISTS} lists of a user, {LISTS} of all")));
    let stored = disk_bytes(&dir.join("data")).map_err(|error| error.to_string())? as f64;
    println!("disk {:.0} bytes a payment", stored / (filling.settled + filling.owed) as f64);
    let fits = most < MEMORY_MIB_MAX && start < START_MAX;
    println!(
        "{}: {most:.0} of {MEMORY_MIB_MAX} MiB, {:.2} of {} s",
        if fits { "fits" } else { "TOO MUCH" },
        start.as_secs_f64(),
        START_MAX.as_secs()
    );
    Ok(fits)
}

async fn read(client: &Client, filling: &Filling) -> Result<(), String> {
    let maker = Maker::new(Duration::ZERO);
    let mut reads = JoinSet::new();
    let mut took_ms = Vec::new();
    for k in 0..READS {
        let n = mix(k) % filling.settled.max(1);
        let id = maker.payment(n, filling.made_at(n)).terms.id.intent();
        let client = client.clone();
        reads.spawn(async move {
            let took = Stopwatch::start();
            let request =
                GetPaymentIntentRequest { payment_intent_id: id.clone(), ..Default::default() };
            let _: GetPaymentIntentResponse = client
                .call("/payment.v1.PaymentService/GetPaymentIntent", &request)
                .await
                .map_err(|error| format!("{id}: {error}"))?;
            Ok::<_, String>(took.elapsed().as_secs_f64() * 1e3)
        });
        if reads.len() == READS_AT_A_TIME
            && let Some(read) = reads.join_next().await
        {
            took_ms.push(read.map_err(|error| error.to_string())??);
        }
    }
    for read in reads.join_all().await {
        took_ms.push(read?);
    }
    took_ms.sort_by(f64::total_cmp);
    let q = |q| quantile(&took_ms, q);
    println!("reads p50 {:.2} p99 {:.2} max {:.0} ms", q(0.5), q(0.99), q(1.0));
    Ok(())
}

/// Lists by user, who has hundreds of payments here, and of all.
async fn list(client: &Client, filling: &Filling) -> Result<(), String> {
    let maker = Maker::new(Duration::ZERO);
    for n in 0..LISTS {
        let user_id = maker.payment(n, filling.made_at(n)).terms.user_id.clone();
        for user_id in [user_id, String::new()] {
            let pagination = Some(Pagination { page_size: 100, ..Default::default() });
            let request = ListPaymentsRequest { user_id, pagination, ..Default::default() };
            let took = Stopwatch::start();
            let page: ListPaymentsResponse =
                client.call("/payment.v1.PaymentService/ListPayments", &request).await?;
            println!(
                "list of {} payments, user {:?}: {:.0} ms",
                page.payments.len(),
                request.user_id,
                took.elapsed().as_secs_f64() * 1e3
            );
        }
    }
    Ok(())
}

/// Prints what is resident; returns all of it, in MiB.
fn memory(service: &Service, when: &str) -> f64 {
    let [rss, own, file] = ["VmRSS", "RssAnon", "RssFile"].map(|name| service.memory_mib(name));
    println!("RSS {rss:.0} MiB {when} ({own:.0} of its own, {file:.0} of files)");
    rss
}
