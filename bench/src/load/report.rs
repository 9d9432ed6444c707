//! What a run came to: for people, and as JSON.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::micros;

/// More failed calls than this make a run worthless: what is refused is cheap.
pub const FAILED_SHARE_MAX: f64 = 0.001;

/// Microseconds, to three digits; it grows with what it sees.
const DIGITS: u8 = 3;

/// What one thread, or all of them, saw.
#[derive(Clone)]
pub struct Tally {
    /// From the intended start to the answer, of calls that did not fail.
    latency: Histogram<u64>,
    /// From the intended start to the start, where a stream was free: the generator's own lateness.
    late: Histogram<u64>,
    /// Calls of an open loop for which no stream was free in time.
    held_up: u64,
}

impl Tally {
    pub fn new() -> Self {
        let histogram = Histogram::new(DIGITS).expect("three digits are allowed");
        Self { latency: histogram.clone(), late: histogram, held_up: 0 }
    }

    pub fn answered(&mut self, latency: Duration) {
        self.latency += micros(latency);
    }

    pub fn sent(&mut self, late: Duration) {
        self.late += micros(late);
    }

    pub fn held_up(&mut self) {
        self.held_up += 1;
    }

    pub fn add(&mut self, other: &Self) {
        self.latency += &other.latency;
        self.late += &other.late;
        self.held_up += other.held_up;
    }
}

pub struct Report {
    /// Calls that came to an end, failed or not.
    pub answered: u64,
    pub failed: u64,
    /// Until the last answer.
    pub seconds: f64,
    /// The longest time without an answer.
    pub stall_ms: f64,
    pub tally: Tally,
}

impl Report {
    /// Calls a second that did not fail.
    pub fn per_second(&self) -> f64 {
        (self.answered - self.failed) as f64 / self.seconds
    }

    pub fn failed_share(&self) -> f64 {
        self.failed as f64 / self.answered.max(1) as f64
    }

    pub fn is_valid(&self) -> bool {
        self.answered > 0 && self.failed_share() <= FAILED_SHARE_MAX
    }

    pub fn held_up_share(&self) -> f64 {
        self.tally.held_up as f64 / self.answered.max(1) as f64
    }

    /// The latency that a share `q` of the calls did not pass.
    pub fn latency_ms(&self, q: f64) -> f64 {
        self.tally.latency.value_at_quantile(q) as f64 / 1e3
    }

    pub fn late_ms(&self, q: f64) -> f64 {
        self.tally.late.value_at_quantile(q) as f64 / 1e3
    }

    /// (share of calls, latency in ms), ever finer towards the slowest.
    pub fn curve(&self) -> Vec<(f64, f64)> {
        let steps = self.tally.latency.iter_quantiles(5);
        steps.map(|step| (step.quantile(), step.value_iterated_to() as f64 / 1e3)).collect()
    }

    pub fn table(&self) -> String {
        let ms = |q| self.latency_ms(q);
        format!(
            "calls      {} in {:.1} s: {:.0}/s, {} failed ({:.3} %)\n\
             latency    p50 {:.2}  p90 {:.2}  p95 {:.2}  p99 {:.2}  p99.9 {:.2}  max {:.1} ms\n\
             stall      {:.1} ms at most without an answer\n\
             generator  late p50 {:.2}  p99 {:.2}  max {:.1} ms; no stream free for {:.2} % of the calls",
            self.answered,
            self.seconds,
            self.per_second(),
            self.failed,
            100.0 * self.failed_share(),
            ms(0.5),
            ms(0.9),
            ms(0.95),
            ms(0.99),
            ms(0.999),
            ms(1.0),
            self.stall_ms,
            self.late_ms(0.5),
            self.late_ms(0.99),
            self.late_ms(1.0),
            100.0 * self.held_up_share(),
        )
    }

    pub fn json(&self) -> Value {
        json!({
            "answered": self.answered,
            "failed": self.failed,
            "seconds": self.seconds,
            "per_second": self.per_second(),
            "valid": self.is_valid(),
            "latency_ms": {
                "p50": self.latency_ms(0.5),
                "p90": self.latency_ms(0.9),
                "p95": self.latency_ms(0.95),
                "p99": self.latency_ms(0.99),
                "p99.9": self.latency_ms(0.999),
                "max": self.latency_ms(1.0),
            },
            "stall_ms": self.stall_ms,
            "generator": {
                "late_p50_ms": self.late_ms(0.5),
                "late_p99_ms": self.late_ms(0.99),
                "late_max_ms": self.late_ms(1.0),
                "held_up_share": self.held_up_share(),
            },
        })
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A thousand calls of 1 to 1,000 ms, one of them failed, in ten seconds.
    pub fn report() -> Report {
        let mut one = Tally::new();
        let mut other = Tally::new();
        for ms in 1..=1_000 {
            let tally = if ms % 2 == 0 { &mut one } else { &mut other };
            tally.answered(Duration::from_millis(ms));
        }
        one.sent(Duration::from_micros(700));
        other.held_up();
        one.add(&other);
        Report { answered: 1_001, failed: 1, seconds: 10.0, stall_ms: 42.0, tally: one }
    }

    #[test]
    fn the_percentiles_are_of_all_threads_calls() {
        let report = report();
        for (q, ms) in [(0.5, 500.0), (0.95, 950.0), (0.999, 999.0), (1.0, 1_000.0)] {
            let found = report.latency_ms(q);
            assert!((found - ms).abs() <= ms / 1_000.0, "{q}: {found}");
        }
        assert!((report.late_ms(1.0) - 0.7).abs() < 0.001);
    }

    #[test]
    fn failed_calls_count_for_no_rate_and_spoil_a_run() {
        let mut report = report();
        assert!((report.per_second() - 100.0).abs() < 1e-9);
        assert!(report.is_valid());
        report.failed = 2;
        assert!(!report.is_valid());
        assert_eq!(report.json()["valid"], false);
    }

    #[test]
    fn a_run_without_calls_is_no_run() {
        let report =
            Report { answered: 0, failed: 0, seconds: 1.0, stall_ms: 0.0, tally: Tally::new() };
        assert!(!report.is_valid());
    }

    #[test]
    fn the_curve_rises_to_the_slowest_call() {
        let curve = report().curve();
        assert!(curve.windows(2).all(|pair| pair[0].0 <= pair[1].0 && pair[0].1 <= pair[1].1));
        assert!(curve.len() > 20 && curve.last().is_some_and(|(_, ms)| *ms >= 1_000.0));
    }
}
