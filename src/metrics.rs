//! What the process counts and times, rendered as Prometheus text.
//!
//! Every `Metrics` has a registry of its own, so that tests in parallel never see each other's
//! numbers. Children are resolved once, here: an event on a hot path is a short scan over static
//! names and an atomic add, without allocation or lock. Labels are bounded: never an id, a host or
//! a URL.

use std::sync::OnceLock;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};
use tonic::Code;

/// The RPCs with series of their own. Everything else counts as [`UNKNOWN_METHOD`], because a
/// caller chooses the path and would otherwise choose our labels too.
pub const GRPC_METHODS: &[(&str, &str)] = &[
    ("payment.v1.PaymentService", "CreatePaymentIntent"),
    ("payment.v1.PaymentService", "GetPaymentIntent"),
    ("payment.v1.PaymentService", "GetPaymentStatus"),
    ("payment.v1.PaymentService", "ProcessPayment"),
    ("payment.v1.PaymentService", "CancelPayment"),
    ("payment.v1.PaymentService", "ListPayments"),
    ("payment.v1.PaymentService", "SimulateWebhook"),
    ("simulation.v1.SimulationService", "ListDeliveries"),
    ("simulation.v1.SimulationService", "Redeliver"),
    ("grpc.health.v1.Health", "Check"),
    ("grpc.health.v1.Health", "Watch"),
    ("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo"),
    ("grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo"),
    UNKNOWN_METHOD,
];
pub const UNKNOWN_METHOD: (&str, &str) = ("unknown", "unknown");

/// Labels as the other gRPC implementations write them, so that their dashboards and alerts fit.
/// The position is the code's number on the wire.
const GRPC_CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

pub const SCENARIOS: &[&str] = &["approve", "fail", "delay", "random", "timeout", "manual"];
/// The provider of every payment as long as no simulation file names others.
pub const BUILT_IN_PROVIDER: &str = "sim";
/// What a payment can end as, with its reason ("" where there is none).
pub const OUTCOMES: &[(&str, &str)] = &[
    ("COMPLETED", ""),
    ("FAILED", "INSUFFICIENT_BALANCE"),
    ("FAILED", "INVALID_CARD"),
    ("FAILED", "EXPIRED_CARD"),
    ("FAILED", "LIMIT_EXCEEDED"),
    ("FAILED", "SYSTEM_ERROR"),
    ("CANCELLED", ""),
    ("EXPIRED", ""),
    ("REFUNDED", ""),
];
/// How an attempt at a delivery can end: done, to be tried again, or given up.
pub const WEBHOOK_RESULTS: &[&str] = &["delivered", "retry", "dead", "withheld"];
pub const EVENT_SINKS: &[&str] = &["eventbridge", "log", "none"];
pub const EVENT_RESULTS: &[&str] = &["published", "retry", "dead"];
pub const OUTBOX_CHANNELS: &[&str] = &["event", "webhook", "dead_letter"];

/// A fifth of a bare echo's time up to the longest deadline that the server grants (10 s).
const GRPC_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// A timer's own grain (1 ms) up to a minute behind, after which more detail says nothing.
const LAG_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];
/// A receiver on the same host up to the longest `WEBHOOK_TIMEOUT_MS` allowed (60 s).
const WEBHOOK_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// A commit to memory up to a disk that stalls.
const COMMIT_SECONDS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
const BATCH_SIZES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0];

/// What one channel of the outbox owes at the moment of asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutboxDepth {
    /// One of [`OUTBOX_CHANNELS`].
    pub channel: &'static str,
    pub pending: u64,
    /// How long the oldest due delivery has been waiting; zero when nothing waits.
    pub oldest_age: Duration,
}

type OutboxReader = Box<dyn Fn() -> Vec<OutboxDepth> + Send + Sync>;

/// All numbers of one process (or of one test). Share it in an `Arc`.
pub struct Metrics {
    registry: Registry,
    grpc: Vec<GrpcMethod>,
    created: Labelled,
    outcomes: Outcomes,
    decision_lag: Histogram,
    webhooks: Labelled,
    dead_letters: Labelled,
    webhook_seconds: Histogram,
    events: EventCounts,
    outbox_pending: IntGaugeVec,
    outbox_oldest: GaugeVec,
    outbox: OnceLock<OutboxReader>,
    commit_seconds: Histogram,
    batch_size: Histogram,
    idempotency_hits: IntCounter,
    dropped_early: IntCounter,
    panics: IntCounter,
    log_lines_suppressed: IntCounter,
}

impl Metrics {
    /// The media type of [`Metrics::render`].
    pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

    pub fn new() -> Self {
        let registry = Registry::new();
        register_process(&registry);
        let r = &registry;
        Self {
            grpc: grpc_methods(r),
            created: Labelled::new(
                r,
                "payment_intents_created_total",
                "Payment intents stored, by scenario.",
                ("scenario", SCENARIOS),
            ),
            outcomes: Outcomes::new(r),
            decision_lag: histogram(
                r,
                "payment_decision_lag_seconds",
                "Time from a decision's due moment to its commit.",
                LAG_SECONDS,
            ),
            webhooks: webhook_results(r),
            dead_letters: letter_results(r),
            webhook_seconds: histogram(
                r,
                "webhook_delivery_seconds",
                "Duration of one attempt at a webhook.",
                WEBHOOK_SECONDS,
            ),
            events: EventCounts::new(r),
            outbox_pending: outbox_pending(r),
            outbox_oldest: outbox_oldest(r),
            outbox: OnceLock::new(),
            commit_seconds: histogram(
                r,
                "store_commit_seconds",
                "Duration of one commit of the store, its sync included.",
                COMMIT_SECONDS,
            ),
            batch_size: histogram(
                r,
                "store_batch_size",
                "Transitions in one commit of the store.",
                BATCH_SIZES,
            ),
            idempotency_hits: counter(
                r,
                "idempotency_hits_total",
                "Requests answered with the reply stored under their idempotency key.",
            ),
            dropped_early: counter(
                r,
                "payments_dropped_early_total",
                "Payments dropped before their retention ended, because the store was at its cap.",
            ),
            panics: counter(r, "panics_total", "Panics caught at the server's boundary."),
            log_lines_suppressed: counter(
                r,
                "log_lines_suppressed_total",
                "Per-request log lines not written, because the second's budget was spent.",
            ),
            registry,
        }
    }

    /// One RPC has ended, with what and after how long.
    pub fn grpc_handled(&self, service: &str, method: &str, code: Code, elapsed: Duration) {
        let entry = self
            .grpc
            .iter()
            .find(|m| m.method == method && m.service == service)
            .unwrap_or_else(|| self.grpc.last().expect("the list ends with UNKNOWN_METHOD"));
        entry.handled[code as usize].inc();
        entry.seconds.observe(elapsed.as_secs_f64());
    }

    pub fn payment_created(&self, scenario: &'static str) {
        self.created.add(scenario, 1);
    }

    /// A payment reached a final status; `reason` is "" where the status has none.
    pub fn payment_outcome(&self, status: &'static str, reason: &'static str, provider: &str) {
        self.outcomes.inc(status, reason, provider);
    }

    pub fn decision_lag(&self, lag: Duration) {
        self.decision_lag.observe(lag.as_secs_f64());
    }

    /// One attempt at a webhook ended; `result` is one of [`WEBHOOK_RESULTS`].
    pub fn webhook_attempted(&self, result: &'static str, elapsed: Duration) {
        self.webhooks.add(result, 1);
        self.webhook_seconds.observe(elapsed.as_secs_f64());
    }

    /// An attempt at a webhook was not made: its origin is down.
    pub fn webhook_withheld(&self) {
        self.webhooks.add("withheld", 1);
    }

    /// `n` letters got `result` (one of [`EVENT_RESULTS`]) from the dead-letter queue.
    pub fn dead_letter(&self, result: &'static str, n: u64) {
        self.dead_letters.add(result, n);
    }

    /// `n` events got `result` (one of [`EVENT_RESULTS`]) from `sink` (one of [`EVENT_SINKS`]).
    pub fn event_published(&self, sink: &'static str, result: &'static str, n: u64) {
        self.events.add(sink, result, n);
    }

    pub fn store_committed(&self, batch: usize, elapsed: Duration) {
        self.batch_size.observe(batch as f64);
        self.commit_seconds.observe(elapsed.as_secs_f64());
    }

    pub fn idempotency_hit(&self) {
        self.idempotency_hits.inc();
    }

    pub fn payments_dropped_early(&self, n: u64) {
        self.dropped_early.inc_by(n);
    }

    pub fn panicked(&self) {
        self.panics.inc();
    }

    pub fn log_lines_suppressed(&self, n: u64) {
        self.log_lines_suppressed.inc_by(n);
    }

    /// Names who is asked for the outbox's depth (of every channel) at each [`Metrics::render`]. A
    /// pull, because a gauge that is pushed on every change costs the hot path and drifts after an error.
    ///
    /// # Panics
    /// When called twice: two outboxes on one `Metrics` would hide each other.
    pub fn read_outbox_from(&self, reader: impl Fn() -> Vec<OutboxDepth> + Send + Sync + 'static) {
        assert!(self.outbox.set(Box::new(reader)).is_ok(), "the outbox of a process is named once");
    }

    /// Everything, in Prometheus' text format.
    pub fn render(&self) -> String {
        for depth in self.outbox.get().map(|read| read()).unwrap_or_default() {
            let labels = &[depth.channel];
            let pending = i64::try_from(depth.pending).unwrap_or(i64::MAX);
            self.outbox_pending.with_label_values(labels).set(pending);
            self.outbox_oldest.with_label_values(labels).set(depth.oldest_age.as_secs_f64());
        }
        text(&self.registry)
    }
}

/// All of a registry, in Prometheus' text format.
pub fn text(registry: &Registry) -> String {
    let mut text = String::new();
    if let Err(error) = TextEncoder::new().encode_utf8(&registry.gather(), &mut text) {
        tracing::error!(%error, "metrics could not be written in full");
    }
    text
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// One RPC's series; `handled` is in the order of [`GRPC_CODES`].
struct GrpcMethod {
    service: &'static str,
    method: &'static str,
    handled: Vec<IntCounter>,
    seconds: Histogram,
}

fn grpc_methods(registry: &Registry) -> Vec<GrpcMethod> {
    let handled = counters(
        registry,
        "grpc_server_handled_total",
        "RPCs completed, by their code.",
        &["grpc_service", "grpc_method", "grpc_code"],
    );
    let seconds = HistogramVec::new(
        HistogramOpts::new(
            "grpc_server_handling_seconds",
            "Duration of an RPC, from its headers to its trailers.",
        )
        .buckets(GRPC_SECONDS.to_vec()),
        &["grpc_service", "grpc_method"],
    )
    .expect(VALID);
    register(registry, &seconds);
    GRPC_METHODS
        .iter()
        .map(|&(service, method)| GrpcMethod {
            service,
            method,
            handled: GRPC_CODES
                .iter()
                .map(|code| handled.with_label_values(&[service, method, code]))
                .collect(),
            seconds: seconds.with_label_values(&[service, method]),
        })
        .collect()
}

/// A counter with one label, its known values resolved. A name outside the list still gets its own
/// series (it is a constant of ours, so the set stays bounded), by the slower look-up.
struct Labelled {
    all: IntCounterVec,
    known: Vec<(&'static str, IntCounter)>,
}

impl Labelled {
    fn new(
        registry: &Registry,
        name: &str,
        help: &str,
        (label, values): (&str, &[&'static str]),
    ) -> Self {
        let all = counters(registry, name, help, &[label]);
        let known = values.iter().map(|&name| (name, all.with_label_values(&[name]))).collect();
        Self { all, known }
    }

    fn add(&self, name: &'static str, n: u64) {
        match self.known.iter().find(|(known, _)| *known == name) {
            Some((_, counter)) => counter.inc_by(n),
            None => self.all.with_label_values(&[name]).inc_by(n),
        }
    }
}

struct Outcomes {
    all: IntCounterVec,
    /// Of [`BUILT_IN_PROVIDER`], in the order of [`OUTCOMES`].
    built_in: Vec<IntCounter>,
}

impl Outcomes {
    fn new(registry: &Registry) -> Self {
        let all = counters(
            registry,
            "payment_outcomes_total",
            "Payments that reached a final status, by reason and provider.",
            &["status", "reason", "provider"],
        );
        let built_in = OUTCOMES
            .iter()
            .map(|(status, reason)| all.with_label_values(&[status, reason, BUILT_IN_PROVIDER]))
            .collect();
        Self { all, built_in }
    }

    fn inc(&self, status: &'static str, reason: &'static str, provider: &str) {
        let known = (provider == BUILT_IN_PROVIDER)
            .then(|| OUTCOMES.iter().position(|o| *o == (status, reason)))
            .flatten();
        match known {
            Some(position) => self.built_in[position].inc(),
            // Providers come from the operator's own file, never from a request.
            None => self.all.with_label_values(&[status, reason, provider]).inc(),
        }
    }
}

struct EventCounts {
    all: IntCounterVec,
    known: Vec<(&'static str, &'static str, IntCounter)>,
}

impl EventCounts {
    fn new(registry: &Registry) -> Self {
        let all = counters(
            registry,
            "events_published_total",
            "Events handed to a sink: published, to be tried again, or given up.",
            &["sink", "result"],
        );
        let known = EVENT_SINKS
            .iter()
            .flat_map(|&sink| EVENT_RESULTS.iter().map(move |&result| (sink, result)))
            .map(|(sink, result)| (sink, result, all.with_label_values(&[sink, result])))
            .collect();
        Self { all, known }
    }

    fn add(&self, sink: &'static str, result: &'static str, n: u64) {
        let known = self.known.iter().find(|(s, r, _)| *s == sink && *r == result);
        match known {
            Some((_, _, counter)) => counter.inc_by(n),
            None => self.all.with_label_values(&[sink, result]).inc_by(n),
        }
    }
}

fn webhook_results(registry: &Registry) -> Labelled {
    let help = "Attempts at a webhook: delivered, to be tried again, given up, or withheld from an \
                origin that is down.";
    Labelled::new(registry, "webhook_deliveries_total", help, ("result", WEBHOOK_RESULTS))
}

fn letter_results(registry: &Registry) -> Labelled {
    let help =
        "Letters handed to the dead-letter queue: published, to be tried again, or given up.";
    Labelled::new(registry, "dead_letters_total", help, ("result", EVENT_RESULTS))
}

fn outbox_pending(registry: &Registry) -> IntGaugeVec {
    let opts = Opts::new("outbox_pending", "Deliveries owed and not yet done.");
    let gauges = IntGaugeVec::new(opts, &["channel"]).expect(VALID);
    for channel in OUTBOX_CHANNELS {
        let _zero: IntGauge = gauges.with_label_values(&[channel]);
    }
    register(registry, &gauges);
    gauges
}

fn outbox_oldest(registry: &Registry) -> GaugeVec {
    let opts = Opts::new(
        "outbox_oldest_age_seconds",
        "How long the oldest due delivery has been waiting.",
    );
    let gauges = GaugeVec::new(opts, &["channel"]).expect(VALID);
    for channel in OUTBOX_CHANNELS {
        let _zero: Gauge = gauges.with_label_values(&[channel]);
    }
    register(registry, &gauges);
    gauges
}

/// Why making and registering a metric cannot fail: names, labels and buckets are constants here.
const VALID: &str =
    "metric names are valid and distinct: every test that makes a Metrics checks it";

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    let counter = IntCounter::new(name, help).expect(VALID);
    register(registry, &counter);
    counter
}

pub fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    let gauge = IntGauge::new(name, help).expect(VALID);
    register(registry, &gauge);
    gauge
}

pub fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    let counters = IntCounterVec::new(Opts::new(name, help), labels).expect(VALID);
    register(registry, &counters);
    counters
}

pub fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    let histogram = Histogram::with_opts(opts).expect(VALID);
    register(registry, &histogram);
    histogram
}

fn register(registry: &Registry, metric: &(impl Collector + Clone + 'static)) {
    registry.register(Box::new(metric.clone())).expect(VALID);
}

#[cfg(target_os = "linux")]
pub fn register_process(registry: &Registry) {
    let process = prometheus::process_collector::ProcessCollector::for_self();
    registry.register(Box::new(process)).expect(VALID);
}

/// `process_*` is read from /proc, which only Linux has.
#[cfg(not(target_os = "linux"))]
pub fn register_process(_registry: &Registry) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str, series: &str) -> Option<f64> {
        text.lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
            .map(|number| number.parse().unwrap())
    }

    #[test]
    fn every_name_of_the_contract_is_there_from_the_start() {
        let text = Metrics::new().render();
        for series in [
            r#"grpc_server_handled_total{grpc_code="OK",grpc_method="CreatePaymentIntent",grpc_service="payment.v1.PaymentService"}"#,
            r#"grpc_server_handling_seconds_count{grpc_method="ListPayments",grpc_service="payment.v1.PaymentService"}"#,
            r#"payment_intents_created_total{scenario="timeout"}"#,
            r#"payment_outcomes_total{provider="sim",reason="",status="COMPLETED"}"#,
            r#"payment_outcomes_total{provider="sim",reason="INVALID_CARD",status="FAILED"}"#,
            "payment_decision_lag_seconds_count",
            r#"webhook_deliveries_total{result="dead"}"#,
            "webhook_delivery_seconds_count",
            r#"events_published_total{result="published",sink="eventbridge"}"#,
            r#"outbox_pending{channel="webhook"}"#,
            r#"outbox_oldest_age_seconds{channel="event"}"#,
            "store_commit_seconds_count",
            "store_batch_size_count",
            "idempotency_hits_total",
            "payments_dropped_early_total",
            "panics_total",
            "log_lines_suppressed_total",
        ] {
            assert_eq!(value(&text, series), Some(0.0), "{series}\n{text}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_is_measured() {
        let text = Metrics::new().render();
        assert!(value(&text, "process_resident_memory_bytes").unwrap() > 0.0);
        assert!(value(&text, "process_open_fds").unwrap() > 0.0);
    }

    #[test]
    fn each_event_lands_on_its_own_series() {
        let m = Metrics::new();
        m.grpc_handled(
            "payment.v1.PaymentService",
            "GetPaymentIntent",
            Code::NotFound,
            Duration::from_millis(3),
        );
        m.payment_created("delay");
        m.payment_outcome("FAILED", "EXPIRED_CARD", "sim");
        m.payment_outcome("COMPLETED", "", "acme");
        m.webhook_attempted("retry", Duration::from_secs(2));
        m.event_published("log", "published", 7);
        m.store_committed(100, Duration::from_millis(2));
        m.idempotency_hit();
        m.payments_dropped_early(5);
        m.panicked();
        m.log_lines_suppressed(9);
        m.decision_lag(Duration::from_millis(4));
        let text = m.render();
        for (series, expected) in [
            (
                r#"grpc_server_handled_total{grpc_code="NotFound",grpc_method="GetPaymentIntent",grpc_service="payment.v1.PaymentService"}"#,
                1.0,
            ),
            (
                r#"grpc_server_handling_seconds_bucket{grpc_method="GetPaymentIntent",grpc_service="payment.v1.PaymentService",le="0.0025"}"#,
                0.0,
            ),
            (
                r#"grpc_server_handling_seconds_bucket{grpc_method="GetPaymentIntent",grpc_service="payment.v1.PaymentService",le="0.005"}"#,
                1.0,
            ),
            (r#"payment_intents_created_total{scenario="delay"}"#, 1.0),
            (
                r#"payment_outcomes_total{provider="sim",reason="EXPIRED_CARD",status="FAILED"}"#,
                1.0,
            ),
            (r#"payment_outcomes_total{provider="acme",reason="",status="COMPLETED"}"#, 1.0),
            (r#"webhook_deliveries_total{result="retry"}"#, 1.0),
            ("webhook_delivery_seconds_sum", 2.0),
            (r#"events_published_total{result="published",sink="log"}"#, 7.0),
            ("store_batch_size_sum", 100.0),
            ("store_commit_seconds_count", 1.0),
            ("payment_decision_lag_seconds_count", 1.0),
            ("idempotency_hits_total", 1.0),
            ("payments_dropped_early_total", 5.0),
            ("panics_total", 1.0),
            ("log_lines_suppressed_total", 9.0),
        ] {
            assert_eq!(value(&text, series), Some(expected), "{series}");
        }
    }

    #[test]
    fn a_path_of_the_callers_making_makes_no_series() {
        let m = Metrics::new();
        m.grpc_handled(
            "payment.v1.PaymentService",
            "Nonsense",
            Code::Unimplemented,
            Duration::ZERO,
        );
        let text = m.render();
        assert!(!text.contains("Nonsense"));
        let series = r#"grpc_server_handled_total{grpc_code="Unimplemented",grpc_method="unknown",grpc_service="unknown"}"#;
        assert_eq!(value(&text, series), Some(1.0));
    }

    #[test]
    fn every_code_has_its_own_label() {
        for (number, label) in GRPC_CODES.iter().enumerate() {
            let code = Code::from(i32::try_from(number).unwrap());
            assert_eq!(code as usize, number);
            let spelled = format!("{code:?}").replace("Cancelled", "Canceled");
            assert_eq!(spelled.to_lowercase(), label.to_lowercase());
        }
    }

    #[test]
    fn the_outbox_is_asked_at_each_render() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicU64, Ordering};
        let m = Metrics::new();
        let pending = Arc::new(AtomicU64::new(3));
        let shared = Arc::clone(&pending);
        m.read_outbox_from(move || {
            vec![OutboxDepth {
                channel: "webhook",
                pending: shared.load(Ordering::Relaxed),
                oldest_age: Duration::from_millis(1500),
            }]
        });
        let text = m.render();
        assert_eq!(value(&text, r#"outbox_pending{channel="webhook"}"#), Some(3.0));
        assert_eq!(value(&text, r#"outbox_pending{channel="event"}"#), Some(0.0));
        let age = r#"outbox_oldest_age_seconds{channel="webhook"}"#;
        assert_eq!(value(&text, age), Some(1.5));
        pending.store(0, Ordering::Relaxed);
        let text = m.render();
        assert_eq!(value(&text, r#"outbox_pending{channel="webhook"}"#), Some(0.0));
    }
}
