//! Two servers under the same load in turn: yardstick, service, yardstick, service.
//!
//! Each is started for its round and ended after it. So neither runs beside the other: no compaction or
//! write-back of the service falls into a round of the yardstick, and no memory of an earlier round weighs
//! on a later one. What the service defers, it defers past the end only once: in a round of 60 s that is
//! little.

use std::{net::SocketAddr, time::Duration};

use serde_json::{Value, json};

use crate::{
    companion::Companion,
    figure::{self, Spread},
    gauge::process_cpu_us,
    load::{Load, Report},
    service::Service,
};

const WARM_UP: Duration = Duration::from_secs(2);

/// A process that answers gRPC until it is dropped.
pub trait Server {
    fn address(&self) -> SocketAddr;
    fn pid(&self) -> u32;
}

impl Server for Service {
    fn address(&self) -> SocketAddr {
        self.address()
    }

    fn pid(&self) -> u32 {
        self.pid()
    }
}

impl Server for Companion {
    fn address(&self) -> SocketAddr {
        self.address()
    }

    fn pid(&self) -> u32 {
        self.pid()
    }
}

/// One server's part of a pair.
pub struct Round {
    pub report: Report,
    /// Microseconds of CPU a call, of the server and of the load.
    pub server_us: f64,
    pub load_us: f64,
}

impl Round {
    /// Warms the server up, then measures it.
    ///
    /// # Errors
    /// Where the server breaks connections.
    pub fn measure(server: &impl Server, load: &Load) -> Result<Self, String> {
        Load { duration: WARM_UP, ..load.clone() }.run(server.address())?;
        let cpu_us = || [server.pid(), std::process::id()].map(process_cpu_us);
        let before = cpu_us();
        let report = Load { calls: load.calls.more(), ..load.clone() }.run(server.address())?;
        let after = cpu_us();
        let [server_us, load_us] =
            [0, 1].map(|at| (after[at] - before[at]) / report.answered as f64);
        Ok(Self { report, server_us, load_us })
    }

    fn line(&self, name: &str) -> String {
        let invalid = if self.report.is_valid() { "" } else { "  INVALID" };
        format!(
            "{name:<8} {:>7.0}/s  CPU a call {:>5.2} µs, of the load {:>5.2}  p50 {:.2} p99 {:.2} ms  \
             failed {:.3} %{invalid}",
            self.report.per_second(),
            self.server_us,
            self.load_us,
            self.report.latency_ms(0.5),
            self.report.latency_ms(0.99),
            100.0 * self.report.failed_share(),
        )
    }

    pub fn json(&self) -> Value {
        json!({
            "server_cpu_us": self.server_us,
            "load_cpu_us": self.load_us,
            "report": self.report.json(),
        })
    }
}

/// What is to be measured: the service's calls a second ÷ the yardstick's.
pub struct Pairs {
    pub name: &'static str,
    /// The ratio that is asked for.
    pub least: f64,
    pub pairs: usize,
    pub load: Load,
}

impl Pairs {
    /// Whether the ratio is reached, by runs that count.
    ///
    /// # Errors
    /// Where a server does not start or breaks connections.
    pub fn measure<S: Server>(
        &self,
        echo: impl Fn() -> Result<Companion, String>,
        service: impl Fn() -> Result<S, String>,
    ) -> Result<bool, String> {
        if self.pairs == 0 {
            return Err("pairs: at least 1".to_owned());
        }
        let mut rounds = Vec::new();
        for pair in 1..=self.pairs {
            let yardstick = Round::measure(&echo()?, &self.load)?;
            println!("{pair}  {}", yardstick.line("echo"));
            let measured = Round::measure(&service()?, &self.load)?;
            println!(
                "{pair}  {}  ratio {:.3}",
                measured.line("service"),
                ratio(&yardstick, &measured)
            );
            rounds.push((yardstick, measured));
        }
        self.publish(&rounds)
    }

    fn publish(&self, rounds: &[(Round, Round)]) -> Result<bool, String> {
        let ratios: Vec<f64> = rounds.iter().map(|(echo, service)| ratio(echo, service)).collect();
        let cpu =
            Spread::of(rounds.iter().map(|(echo, service)| service.server_us / echo.server_us));
        println!("CPU a call of the service ÷ of the yardstick: {:.2}", cpu.median);
        let Load { connections, streams, threads, duration, .. } = self.load;
        let valid = rounds
            .iter()
            .all(|(echo, service)| echo.report.is_valid() && service.report.is_valid());
        let pairs: Vec<Value> = rounds
            .iter()
            .map(|(echo, service)| json!({ "echo": echo.json(), "service": service.json() }))
            .collect();
        let details = json!({
            "connections": connections,
            "streams": streams,
            "load_threads": threads,
            "seconds": duration.as_secs(),
            "cpu_ratio": cpu.json(),
            "valid": valid,
            "pairs": pairs,
        });
        figure::publish(self.name, &ratios, self.least, details)?;
        let reached = valid && Spread::of(ratios).median >= self.least;
        let verdict = match (valid, reached) {
            (false, _) => "INVALID: calls failed",
            (true, false) => "MISSED",
            (true, true) => "met",
        };
        println!("asked: {:.2}: {verdict}", self.least);
        Ok(reached)
    }
}

fn ratio(echo: &Round, service: &Round) -> f64 {
    service.report.per_second() / echo.report.per_second()
}
