//! What the service takes with millions of payments stored: time from its start to ready, and
//! resident memory then and after reads.
//!
//! `payments=5000000 owed=100000 dir=PATH binary=PATH`; exit code 1 when it takes more than it may.
//! A folder that was given and filled by an earlier run is used again.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use bench::{
    argument, benchmark, check_arguments,
    client::Client,
    filling::{Filling, Settled},
    gauge::{disk_bytes, quantile},
    on_a_runtime,
    payments::{Maker, mix},
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
    clock::Stopwatch,
};
use tokio::task::JoinSet;

const MEMORY_MIB_MAX: f64 = 512.0;
const START_MAX: Duration = Duration::from_secs(5);
const READS: u64 = 10_000;
const READS_AT_A_TIME: usize = 50;
const LISTS: u64 = 5;

fn main() -> ExitCode {
    benchmark(run)
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
        let filling = Filling::fill(&dir, payments, owed, Settled::Told).await?;
        measure(&dir, &binary, &filling).await
    });
    if given.is_empty() {
        // Nobody asked for it to be kept.
        let _ = fs::remove_dir_all(&dir);
    }
    result
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
    let mut reads = JoinSet::new();
    let mut took_ms = Vec::new();
    for k in 0..READS {
        let n = mix(k) % filling.settled.max(1);
        let id = filling.id(n).intent();
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
        let user_id = maker.terms(n, filling.made_at(n)).user_id.to_string();
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
