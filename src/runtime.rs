//! From a configuration to a running service, and down again: what runs where, and in which order it
//! starts and stops.

use std::{
    future::Future,
    io,
    net::{SocketAddr, TcpListener},
    process::ExitCode,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    api::{self, grpc::Payments},
    app::{self, App},
    clock::{Clock, Stopwatch, SystemClock},
    config::{Config, EventSink, StoreUrl},
    courier::{
        Courier, EventBridgeCourier, LogCourier, WebhookCourier,
        aws::{self, AwsSettings},
        log,
        webhook::WebhookSettings,
    },
    domain::{
        delivery::RetryPolicy,
        scenario::{self, Scenario},
        signature::Signer,
        time::Timestamp,
    },
    driver::{self, Step},
    edge::{Edge, EdgeLimits},
    metrics::{Metrics, OutboxDepth},
    ops::{self, Phase, Report, StoreCondition},
    outbox::{Events, Finisher, Policies, Shared, WebhookLimits, Webhooks},
    scheduler::Scheduler,
    server::{self, Limits, Server},
    store::{self, Health, Location, Retention, Store, Work},
};

/// The payment service's name in `grpc.health.v1`; "" is the whole server.
const SERVICES: [&str; 2] = ["", "payment.v1.PaymentService"];
/// Threads for everything that serves no gRPC: deliveries, timers, ops.
const BACKGROUND_THREADS: usize = 2;
/// Attempts in flight at the end may take so long; what they carry stays owed.
const ATTEMPTS_GRACE: Duration = Duration::from_secs(8);
/// From the signal to the end, whatever hangs.
const STOP_MAX: Duration = Duration::from_secs(29);
/// sysexits.h: EX_SOFTWARE, EX_IOERR, EX_CONFIG, EX_UNAVAILABLE.
const EXIT_SOFTWARE: u8 = 70;
const EXIT_STORE_FAILED: u8 = 74;
const EXIT_CONFIG: u8 = 78;
const EXIT_UNAVAILABLE: u8 = 69;
/// As shells report an interrupt: the second signal asks for an end at once.
const EXIT_INTERRUPTED: i32 = 130;

/// The sockets of a service, bound before anything else is done.
pub struct Listeners {
    grpc: Vec<TcpListener>,
    ops: TcpListener,
}

impl Listeners {
    /// One gRPC listener for each runtime thread.
    ///
    /// # Errors
    /// With the address, when one is in use or may not be bound.
    pub fn bind(config: &Config) -> Result<Self, String> {
        let bind = |port, n| {
            let address = SocketAddr::new(config.bind_address, port);
            server::bind(address, n).map_err(|error| format!("{address} cannot be bound: {error}"))
        };
        let grpc = bind(config.grpc_port, config.runtime_threads)?;
        let ops = bind(config.ops_port, 1)?.pop().expect("one listener was asked for");
        Ok(Self { grpc, ops })
    }
}

/// Serves until a signal, then drains; the process's exit code says how it ended.
pub fn run(config: &Config, listeners: Listeners) -> ExitCode {
    let background = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(BACKGROUND_THREADS)
        .thread_name("background")
        .enable_all()
        .build();
    match background {
        Ok(background) => {
            let code = background.block_on(serve(config, listeners));
            // Look-ups of names cannot be cancelled; nothing waits for them.
            background.shutdown_background();
            code
        }
        Err(error) => {
            tracing::error!(%error, "no runtime could be made");
            ExitCode::from(EXIT_SOFTWARE)
        }
    }
}

async fn serve(config: &Config, listeners: Listeners) -> ExitCode {
    let Ok(mut signals) = Signals::listen() else {
        tracing::error!("signals cannot be listened to");
        return ExitCode::from(EXIT_SOFTWARE);
    };
    let status = Arc::new(ProcessStatus::new());
    let mut tasks = Tasks::default();
    let ops_end = CancellationToken::new();
    let ops_server = Server::new(Limits::ops());
    let ops_service = ops::service(Arc::clone(&status) as Arc<dyn Report>);
    let (ops_listener, end) = (listeners.ops, ops_end.clone());
    tasks.start("ops", async move {
        if let Err(error) = ops_server.serve_http(ops_listener, ops_service, end).await {
            tracing::error!(%error, "the ops port cannot be served");
        }
    });
    let mut service = match Service::build(config, &status).await {
        Ok(service) => service,
        Err((code, why)) => {
            tracing::error!("{why}");
            return ExitCode::from(code);
        }
    };
    service.start_loops(&mut tasks);
    service.start_grpc(&mut tasks, config, listeners.grpc);
    service.announce(ServingStatus::Serving).await;
    status.set(Phase::Serving);
    tracing::info!(
        grpc_port = config.grpc_port,
        ops_port = config.ops_port,
        bind_address = %config.bind_address,
        store = ?config.store,
        event_sink = config.events.sink.as_str(),
        "ready"
    );
    let ended = tokio::select! {
        name = signals.next() => Why::Signal(name),
        () = service.store.failed() => Why::StoreFailed,
        name = tasks.ended() => Why::TaskEnded(name),
    };
    let code = match ended {
        Why::Signal(name) => {
            tracing::info!(signal = name, "draining");
            signals.insist();
            0
        }
        // Nothing may be acknowledged or told any more: the next start recovers.
        Why::StoreFailed => return ExitCode::from(EXIT_STORE_FAILED),
        Why::TaskEnded(name) => {
            tracing::error!(task = name, "a task ended that never should");
            EXIT_SOFTWARE
        }
    };
    status.set(Phase::Draining);
    service.stop(config.drain_delay, tasks, &ops_end).await;
    tracing::info!("stopped");
    ExitCode::from(code)
}

/// Why the service stops.
enum Why {
    Signal(&'static str),
    StoreFailed,
    TaskEnded(&'static str),
}

/// Everything that serves payments.
struct Service {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    scheduler: Arc<Scheduler>,
    events: Option<Arc<Events>>,
    webhooks: Arc<Webhooks>,
    /// Until it is started.
    finisher: Option<Finisher>,
    edge: Edge<Payments>,
    health: HealthReporter,
    /// Stops leasing.
    work_end: CancellationToken,
    /// Stops accepting, and ends held calls.
    grpc_end: CancellationToken,
}

type Failed = (u8, String);

impl Service {
    async fn build(config: &Config, status: &Arc<ProcessStatus>) -> Result<Self, Failed> {
        let metrics = Arc::clone(&status.metrics);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let store = open_store(config, &clock, &metrics).await?;
        watch_outbox(&metrics, &store, &clock);
        status.opened(&store);
        let settings = app::Settings {
            scenario: scenario_settings(config),
            events: config.events.sink != EventSink::None,
        };
        let shared = Shared {
            store: Arc::clone(&store),
            clock: Arc::clone(&clock),
            metrics: Arc::clone(&metrics),
        };
        let app = App::new(Arc::clone(&store), Arc::clone(&clock), Arc::clone(&metrics), settings);
        let (finisher, done) = Finisher::new(shared.clone(), policies(config), Arc::new(chance));
        let events = match events_courier(config).await? {
            None => None,
            Some(courier) => {
                let sink = config.events.sink.as_str();
                Some(Arc::new(Events::new(shared.clone(), courier, sink, done.clone())))
            }
        };
        let limits = WebhookLimits {
            concurrency: config.webhook.concurrency,
            origin_concurrency: config.webhook.origin_concurrency,
        };
        let webhooks = Webhooks::new(shared, webhook_courier(config)?, limits, done);
        let grpc_end = CancellationToken::new();
        let (health, health_server) = tonic_health::server::health_reporter();
        let payments = Payments::new(Arc::new(app), config.public_url.clone(), grpc_end.clone());
        let edge_limits = EdgeLimits { max_in_flight: config.max_in_flight, ..Default::default() };
        let routes = api::routes(health_server);
        Ok(Self {
            edge: Edge::new(payments, routes, edge_limits, Arc::clone(&metrics) as _),
            scheduler: Arc::new(Scheduler {
                store: Arc::clone(&store),
                clock: Arc::clone(&clock),
                metrics: Arc::clone(&metrics),
            }),
            events,
            webhooks: Arc::new(webhooks),
            finisher: Some(finisher),
            store,
            clock,
            health,
            work_end: CancellationToken::new(),
            grpc_end,
        })
    }

    fn start_loops(&mut self, tasks: &mut Tasks) {
        self.start_loop(tasks, "scheduler", Arc::clone(&self.scheduler) as _);
        self.start_loop(tasks, "webhooks", Arc::clone(&self.webhooks) as _);
        if let Some(events) = &self.events {
            self.start_loop(tasks, "events", Arc::clone(events) as _);
        }
        if let Some(finisher) = self.finisher.take() {
            tasks.start("finisher", finisher.run());
        }
    }

    fn start_loop(&self, tasks: &mut Tasks, name: &'static str, step: Arc<dyn Step>) {
        let (store, clock) = (Arc::clone(&self.store), Arc::clone(&self.clock));
        let end = self.work_end.clone();
        tasks.start(name, async move { driver::drive(&*step, store, clock, end).await });
    }

    /// One thread with a runtime of its own for each listener: a connection never leaves its core.
    fn start_grpc(&self, tasks: &mut Tasks, config: &Config, listeners: Vec<TcpListener>) {
        let limits = Limits::default().drawn(chance());
        let server = Server::new(limits);
        for listener in listeners {
            let (server, edge, end) = (server.clone(), self.edge.clone(), self.grpc_end.clone());
            let (ended, wait) = oneshot::channel();
            let thread = thread::Builder::new().name("grpc".to_owned()).spawn(move || {
                if let Err(error) = serve_listener(&server, listener, &edge, end) {
                    tracing::error!(%error, "the gRPC port cannot be served");
                }
                // The other side is gone only when the process ends.
                let _ = ended.send(());
            });
            if let Err(error) = thread {
                tracing::error!(%error, "no thread for gRPC");
            }
            tasks.start("grpc", async move {
                let _ = wait.await;
            });
        }
        tracing::debug!(threads = config.runtime_threads, "gRPC threads started");
    }

    async fn announce(&self, status: ServingStatus) {
        for service in SERVICES {
            self.health.set_service_status(service, status).await;
        }
    }

    /// Not ready → out of rotation → no new connections, no new leases → what is in flight → close.
    async fn stop(self, delay: Duration, mut tasks: Tasks, ops_end: &CancellationToken) {
        end_anyway_after(STOP_MAX);
        self.announce(ServingStatus::NotServing).await;
        tokio::time::sleep(delay).await;
        self.grpc_end.cancel();
        self.work_end.cancel();
        tasks.join(&["grpc", "scheduler", "webhooks", "events"]).await;
        let Self { webhooks, events, store, .. } = self;
        if tokio::time::timeout(ATTEMPTS_GRACE, webhooks.drain()).await.is_err() {
            tracing::warn!("webhooks in flight were left; they are still owed");
        }
        // With the last feeder gone the finisher writes what it has and ends.
        drop((webhooks, events));
        if tokio::time::timeout(ATTEMPTS_GRACE, tasks.join(&["finisher"])).await.is_err() {
            tracing::warn!("results of deliveries were left; the deliveries are still owed");
        }
        store.close().await;
        ops_end.cancel();
        tasks.join(&["ops"]).await;
    }
}

fn serve_listener(
    server: &Server,
    listener: TcpListener,
    edge: &Edge<Payments>,
    end: CancellationToken,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(server.serve_grpc(listener, |ending| edge.connection(ending), end))
}

async fn open_store(
    config: &Config,
    clock: &Arc<dyn Clock>,
    metrics: &Arc<Metrics>,
) -> Result<Arc<dyn Store>, Failed> {
    let location = match &config.store {
        StoreUrl::File(path) => Location::Folder(path.clone()),
        StoreUrl::Memory => Location::Memory,
    };
    let (committed, dropped) = (Arc::clone(metrics), Arc::clone(metrics));
    let options = store::Options {
        retention: Retention {
            payments: config.retention,
            idempotency: config.idempotency_ttl,
            payments_max: config.retention_max_payments,
        },
        clock: Arc::clone(clock),
        on_commit: Arc::new(move |batch, took| committed.store_committed(batch, took)),
        on_dropped_early: Arc::new(move |n| dropped.payments_dropped_early(n)),
    };
    let opened = tokio::task::spawn_blocking(move || store::open(&location, options)).await;
    match opened {
        Ok(Ok(store)) => Ok(store),
        Ok(Err(error)) => Err((EXIT_UNAVAILABLE, format!("the store cannot be opened: {error}"))),
        Err(error) => Err((EXIT_SOFTWARE, format!("the store cannot be opened: {error}"))),
    }
}

fn watch_outbox(metrics: &Metrics, store: &Arc<dyn Store>, clock: &Arc<dyn Clock>) {
    let (store, clock) = (Arc::clone(store), Arc::clone(clock));
    metrics.read_outbox_from(move || {
        let now = Timestamp::from_ms(clock.now_ms());
        let depth = |channel, work| {
            let backlog = store.backlog(work);
            let oldest_age = backlog.oldest.map_or(Duration::ZERO, |due| now.since(due));
            OutboxDepth { channel, pending: backlog.pending as u64, oldest_age }
        };
        vec![depth("event", Work::Event), depth("webhook", Work::Webhook)]
    });
}

fn scenario_settings(config: &Config) -> scenario::Settings {
    scenario::Settings {
        default_scenario: Scenario::parse(config.default_scenario.as_str())
            .expect("the configuration knows the same six scenarios"),
        default_delay: config.default_delay,
        timeout_settle: config.timeout_settle,
        manual_ttl: config.manual_ttl,
        random_approval_rate: config.random_approval_rate,
        seed: config.simulation_seed,
    }
}

fn policies(config: &Config) -> Policies {
    Policies {
        event: Policies::event(),
        webhook: RetryPolicy {
            max_attempts: Some(config.webhook.max_attempts),
            backoff_base: config.webhook.backoff_base,
            backoff_max: config.webhook.backoff_max,
        },
    }
}

async fn events_courier(config: &Config) -> Result<Option<Arc<dyn Courier>>, Failed> {
    let events = &config.events;
    let courier: Arc<dyn Courier> = match events.sink {
        EventSink::None => return Ok(None),
        EventSink::Log => {
            let started =
                log::stdout().and_then(|out| LogCourier::start(events.source.clone(), out));
            Arc::new(started.map_err(|e| (EXIT_SOFTWARE, format!("no event log: {e}")))?)
        }
        EventSink::EventBridge => {
            let settings = AwsSettings {
                profile: events.aws_profile.clone(),
                region: Some(events.aws_region.clone()),
                default_region: events.aws_region.clone(),
                endpoint_url: events.aws_endpoint_url.as_ref().map(ToString::to_string),
            };
            let sdk = aws::sdk_config(&settings).await;
            Arc::new(EventBridgeCourier::new(&sdk, events.bus_name.clone(), events.source.clone()))
        }
    };
    Ok(Some(courier))
}

fn webhook_courier(config: &Config) -> Result<Arc<dyn Courier>, Failed> {
    let secrets: Vec<&str> = config.webhook.secrets.iter().collect();
    let signer =
        Signer::new(&secrets).map_err(|error| (EXIT_CONFIG, format!("WEBHOOK_SECRET: {error}")))?;
    Ok(Arc::new(WebhookCourier::new(WebhookSettings {
        signer,
        timeout: config.webhook.timeout,
        idle_per_origin: config.webhook.origin_concurrency,
    })))
}

/// Uniform in 0 … 1.
fn chance() -> f64 {
    let random = getrandom::u64().expect("the system gives randomness, or nothing here is safe");
    random as f64 / 2_f64.powi(64)
}

/// What is asked of the process as a whole.
struct ProcessStatus {
    phase: AtomicU8,
    store: OnceLock<Arc<dyn Store>>,
    metrics: Arc<Metrics>,
    started: Stopwatch,
}

impl ProcessStatus {
    fn new() -> Self {
        Self {
            phase: AtomicU8::new(Phase::Starting as u8),
            store: OnceLock::new(),
            metrics: Arc::new(Metrics::new()),
            started: Stopwatch::start(),
        }
    }

    fn set(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    fn opened(&self, store: &Arc<dyn Store>) {
        // Opened once; a second store would be a bug that the tests of this module see.
        let _ = self.store.set(Arc::clone(store));
    }
}

impl Report for ProcessStatus {
    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            phase if phase == Phase::Serving as u8 => Phase::Serving,
            phase if phase == Phase::Draining as u8 => Phase::Draining,
            _ => Phase::Starting,
        }
    }

    fn store(&self) -> StoreCondition {
        match self.store.get().map(|store| store.health()) {
            None => StoreCondition::Opening,
            Some(Health::Good) => StoreCondition::Open,
            Some(Health::Full) => StoreCondition::Full,
            Some(Health::Failed) => StoreCondition::Unavailable,
        }
    }

    fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    fn metrics(&self) -> String {
        self.metrics.render()
    }
}

/// Long tasks, by name. None of them ends by itself while the service runs.
#[derive(Default)]
struct Tasks {
    running: JoinSet<&'static str>,
    left: Vec<&'static str>,
}

impl Tasks {
    fn start(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.left.push(name);
        self.running.spawn(async move {
            task.await;
            name
        });
    }

    /// The next task to end, or "a task" where it panicked.
    async fn ended(&mut self) -> &'static str {
        match self.running.join_next().await {
            Some(Ok(name)) => {
                self.forget(name);
                name
            }
            Some(Err(_)) | None => "a task",
        }
    }

    /// Waits for all tasks of these names.
    async fn join(&mut self, names: &[&str]) {
        while self.left.iter().any(|name| names.contains(name)) {
            if self.ended().await == "a task" {
                return;
            }
        }
    }

    fn forget(&mut self, name: &str) {
        if let Some(at) = self.left.iter().position(|left| *left == name) {
            self.left.swap_remove(at);
        }
    }
}

struct Signals {
    term: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        let (term, interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self { term, interrupt })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Whoever sends a second signal does not want to wait.
    #[expect(clippy::disallowed_methods, reason = "it ends with the process, which is its purpose")]
    fn insist(mut self) {
        tokio::spawn(async move {
            let signal = self.next().await;
            tracing::warn!(signal, "ending at once");
            std::process::exit(EXIT_INTERRUPTED);
        });
    }
}

/// A thread of its own, so that not even a runtime that hangs keeps the process.
fn end_anyway_after(max: Duration) {
    let watchdog = thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
        thread::sleep(max);
        tracing::error!("did not stop in time; ending anyway");
        std::process::exit(i32::from(EXIT_SOFTWARE));
    });
    if let Err(error) = watchdog {
        tracing::error!(%error, "no watchdog over the stop");
    }
}
