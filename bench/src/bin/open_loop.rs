//! Latency of creates at a constant rate, whatever the service does: from each call's intended start.
//!
//! `rate=30000 runs=3 seconds=30 connections=50 streams=40 threads=CORES dir=PATH binary=PATH`; exit code
//! 1 when a percentile is more than what is asked. The echo is called first: where the load itself does
//! not keep up with `rate` on this machine, the service is measured at the highest rate at which it does.

use std::{process::ExitCode, time::Duration};

use bench::{
    argument, benchmark, check_arguments, echo,
    figure::{self, Spread},
    load::{Kind, Load, Report, page},
    pairs::Round,
    subject::Subject,
};
use serde_json::{Value, json};

const P95_MS_MAX: f64 = 10.0;
const P99_MS_MAX: f64 = 50.0;
/// A load that finds no free stream for more of its calls does not keep up.
const HELD_UP_SHARE_MAX: f64 = 0.01;
/// A load that begins its calls later than this measures the machine rather than the service.
const LATE_P99_MS_MAX: f64 = 5.0;
/// Where it does not keep up, this much of the rate is tried next.
const STEP: f64 = 0.9;
const PROBE: Duration = Duration::from_secs(5);
/// Enough for a stall of 60 ms at the full rate; the service takes 128 a connection.
const STREAMS: usize = 40;

fn main() -> ExitCode {
    benchmark(run)
}

fn run() -> Result<bool, String> {
    check_arguments(&[
        "rate",
        "runs",
        "seconds",
        "connections",
        "streams",
        "threads",
        "dir",
        "binary",
    ])?;
    let runs: usize = argument("runs", 3)?;
    let asked_rate = argument("rate", 30_000)?;
    if runs == 0 {
        return Err("runs: at least 1".to_owned());
    }
    let load = Load::from_arguments(Kind::Create, STREAMS, 30)?;
    let subject = Subject::from_arguments(&[])?;
    let (rate, echo) = highest_rate(&subject, &load, asked_rate)?;
    let load = Load { rate: Some(rate), ..load };
    let mut rounds = Vec::new();
    for run in 1..=runs {
        let round = Round::measure(&subject.service()?, &load)?;
        show(&format!("service, run {run}"), &round);
        rounds.push(round);
    }
    publish(&load, rate, &echo, &rounds)
}

/// The highest rate at which the load keeps up with a server that does next to nothing, and how that went.
fn highest_rate(subject: &Subject, load: &Load, asked: u64) -> Result<(u64, Round), String> {
    let reply = subject.reply(&load.calls)?;
    let mut rate = asked;
    loop {
        let load = Load { rate: Some(rate), duration: PROBE, ..load.clone() };
        let round = Round::measure(&echo::start(&load.calls, &reply)?, &load)?;
        show(&format!("echo at {rate}/s"), &round);
        let next = (rate as f64 * STEP) as u64;
        if keeps_up(&round.report) || next == 0 {
            return Ok((rate, round));
        }
        println!("the load does not keep up: {next}/s is next");
        rate = next;
    }
}

fn keeps_up(report: &Report) -> bool {
    report.is_valid() && report.held_up_share() <= HELD_UP_SHARE_MAX
}

fn show(name: &str, round: &Round) {
    println!(
        "{name}\n{}\nCPU a call  {:.2} µs, of the load {:.2}\n",
        round.report.table(),
        round.server_us,
        round.load_us
    );
}

fn publish(load: &Load, rate: u64, echo: &Round, rounds: &[Round]) -> Result<bool, String> {
    let spread = |value: &dyn Fn(&Report) -> f64| {
        Spread::of(rounds.iter().map(|round| value(&round.report)))
    };
    let [p95, p99, p999] = [0.95, 0.99, 0.999].map(|q| spread(&|report| report.latency_ms(q)));
    let (stall, failed) = (spread(&|report| report.stall_ms), spread(&Report::failed_share));
    println!(
        "{} runs of {} s at {rate} creates/s: median (min … max)",
        rounds.len(),
        load.duration.as_secs()
    );
    for (name, Spread { median, min, max }) in
        [("p95", p95), ("p99", p99), ("p99.9", p999), ("longest stall", stall)]
    {
        println!("{name} = {median:.2} ({min:.2} … {max:.2}) ms");
    }
    let valid = rounds.iter().all(|round| round.report.is_valid());
    let reached = valid && p95.median <= P95_MS_MAX && p99.median <= P99_MS_MAX;
    println!(
        "failed {:.3} % at most; asked: p95 ≤ {P95_MS_MAX}, p99 ≤ {P99_MS_MAX} ms: {}",
        100.0 * failed.max,
        if reached { "met" } else { "MISSED" }
    );
    if rounds.iter().any(|round| round.report.late_ms(0.99) > LATE_P99_MS_MAX) {
        println!("the load itself was late: this machine is busy, and the figures say little");
    }
    let runs: Vec<Value> = rounds.iter().map(Round::json).collect();
    let figure = json!({
        "name": "open-loop",
        "rate": rate,
        "p95_ms": p95.json(),
        "p99_ms": p99.json(),
        "p99.9_ms": p999.json(),
        "stall_ms": stall.json(),
        "failed_share": failed.json(),
        "most": { "p95_ms": P95_MS_MAX, "p99_ms": P99_MS_MAX },
        "details": {
            "connections": load.connections,
            "streams": load.streams,
            "load_threads": load.threads,
            "seconds": load.duration.as_secs(),
            "valid": valid,
            "echo": echo.json(),
            "runs": runs,
        },
    });
    figure::save("open-loop.json", &format!("{figure:#}\n"))?;
    let mut curves = vec![("echo".to_owned(), &echo.report)];
    for (n, round) in (1..).zip(rounds) {
        curves.push((format!("service, run {n}"), &round.report));
    }
    let title = format!("Open loop at {rate} creates a second");
    let plot = figure::save("open-loop.html", &page(&title, &curves))?;
    println!("plot: {}", plot.display());
    Ok(reached)
}
