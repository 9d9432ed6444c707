//! What the worker counts and times. Labels are bounded: never an id, a host or a URL.

use std::time::Duration;

use prometheus::{Histogram, IntCounterVec, IntGauge, Registry};

use crate::metrics;

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    Confirmed,
    Cancelled,
    Duplicate,
    Stale,
    NoEffect,
    /// Left to the redrive policy: it cannot be read.
    Malformed,
    /// Left to the redrive policy: the reservation API refused it for good.
    Refused,
    /// Comes back: the reservation API failed for too long.
    GaveUp,
    /// Comes back: the worker was stopped meanwhile.
    Interrupted,
}

impl Outcome {
    pub const ALL: [Self; 9] = [
        Self::Confirmed,
        Self::Cancelled,
        Self::Duplicate,
        Self::Stale,
        Self::NoEffect,
        Self::Malformed,
        Self::Refused,
        Self::GaveUp,
        Self::Interrupted,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Confirmed => "confirmed",
            Self::Cancelled => "cancelled",
            Self::Duplicate => "duplicate",
            Self::Stale => "stale",
            Self::NoEffect => "no_effect",
            Self::Malformed => "malformed",
            Self::Refused => "refused",
            Self::GaveUp => "gave_up",
            Self::Interrupted => "interrupted",
        }
    }
}

/// A call of the queue.
#[derive(Clone, Copy, Debug)]
pub enum QueueCall {
    Receive,
    Delete,
    Hide,
}

impl QueueCall {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Receive => "receive",
            Self::Delete => "delete",
            Self::Hide => "hide",
        }
    }
}

/// A call to a neighbour up to the longest `RESERVATION_API_TIMEOUT_MS` (60 s).
const CALL_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

pub struct WorkerMetrics {
    registry: Registry,
    messages: IntCounterVec,
    calls: IntCounterVec,
    call_seconds: Histogram,
    in_flight: IntGauge,
    queue_errors: IntCounterVec,
    remembered: IntGauge,
}

impl WorkerMetrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        metrics::register_process(&registry);
        let counters = |name, help, label, values: &[&str]| {
            let counters = metrics::counters(&registry, name, help, &[label]);
            for value in values {
                // Known values are there from the start, at zero.
                let _zero = counters.with_label_values(&[value]);
            }
            counters
        };
        Self {
            messages: counters(
                "worker_messages_total",
                "Messages received, by what became of them.",
                "result",
                &Outcome::ALL.map(Outcome::as_str),
            ),
            calls: counters(
                "worker_calls_total",
                "Calls of the reservation API: done, to be made again, or refused.",
                "result",
                &["done", "retry", "refused"],
            ),
            call_seconds: metrics::histogram(
                &registry,
                "worker_call_seconds",
                "Duration of one call of the reservation API.",
                CALL_SECONDS,
            ),
            in_flight: metrics::gauge(
                &registry,
                "worker_in_flight",
                "Messages in hand: received, and neither deleted nor left.",
            ),
            queue_errors: counters(
                "worker_queue_errors_total",
                "Calls of the queue, or entries of one, that failed.",
                "call",
                &[QueueCall::Receive, QueueCall::Delete, QueueCall::Hide].map(QueueCall::as_str),
            ),
            remembered: metrics::gauge(
                &registry,
                "worker_remembered_events",
                "Applied events that are remembered.",
            ),
            registry,
        }
    }

    pub fn message(&self, outcome: Outcome) {
        self.messages.with_label_values(&[outcome.as_str()]).inc();
    }

    /// How many messages ended so.
    pub fn messages(&self, outcome: Outcome) -> u64 {
        self.messages.with_label_values(&[outcome.as_str()]).get()
    }

    pub fn called(&self, result: &'static str, took: Duration) {
        self.calls.with_label_values(&[result]).inc();
        self.call_seconds.observe(took.as_secs_f64());
    }

    pub fn in_flight(&self, messages: usize) {
        self.in_flight.set(i64::try_from(messages).unwrap_or(i64::MAX));
    }

    pub fn queue_failed(&self, call: QueueCall, entries: usize) {
        self.queue_errors.with_label_values(&[call.as_str()]).inc_by(entries as u64);
    }

    pub fn remembered(&self, events: u64) {
        self.remembered.set(i64::try_from(events).unwrap_or(i64::MAX));
    }

    /// Everything, in Prometheus' text format.
    pub fn render(&self) -> String {
        metrics::text(&self.registry)
    }
}

impl Default for WorkerMetrics {
    fn default() -> Self {
        Self::new()
    }
}
