//! From a configuration to a running service, and down again: what runs where, and in which order it
//! starts and stops.

use std::{
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

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;

use crate::{
    api::grpc::Payments,
    clock::Stopwatch,
    config::Config,
    courier::startup_check::{CHECK_MAX, StartupCheck},
    driver::{self, Step},
    edge::Edge,
    metrics::Metrics,
    ops::{self, Phase, Report, StoreCondition},
    process::{EXIT_SOFTWARE, EXIT_STORE_FAILED, Signals, Tasks, end_anyway_after},
    server::{self, Limits, Server},
    service::{Failed, Service, Surroundings},
    store::{Gatherer, Health, Store},
};

/// Threads for everything that serves no gRPC: deliveries, timers, ops.
const BACKGROUND_THREADS: usize = 2;
/// Attempts in flight at the end may take so long (`WEBHOOK_TIMEOUT_MS` is 5 s); what they carry stays
/// owed. Three of these and the longest `DRAIN_DELAY_MS` (10 s) are less than [`STOP_MAX`].
const ATTEMPTS_GRACE: Duration = Duration::from_secs(6);
/// From the signal to the end, whatever hangs.
const STOP_MAX: Duration = Duration::from_secs(29);

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

    /// Where gRPC and ops listen, with the ports that the system chose where 0 was asked for.
    ///
    /// # Errors
    /// The system's, which knows why.
    pub fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        let grpc = self.grpc.first().ok_or(io::ErrorKind::NotConnected)?;
        Ok((grpc.local_addr()?, self.ops.local_addr()?))
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
    let starting = Running::start(config, listeners, Surroundings::of_this_machine());
    let started = tokio::select! {
        started = starting => started,
        // Nothing has been acknowledged yet, so there is nothing to drain.
        name = signals.next() => {
            tracing::info!(signal = name, "stopped before it was ready");
            return ExitCode::SUCCESS;
        }
    };
    let mut running = match started {
        Ok(running) => running,
        Err((code, why)) => {
            tracing::error!("{why}");
            return ExitCode::from(code);
        }
    };
    let code = tokio::select! {
        name = signals.next() => {
            tracing::info!(signal = name, "draining");
            0
        }
        ended = running.ended() => match ended {
            // Nothing may be acknowledged or told any more: the next start recovers.
            Ended::StoreFailed => return ExitCode::from(EXIT_STORE_FAILED),
            Ended::Task(name) => {
                tracing::error!(task = name, "a task ended that never should");
                EXIT_SOFTWARE
            }
        },
    };
    signals.insist();
    end_anyway_after(STOP_MAX);
    let store = Arc::clone(running.store());
    running.stop().await;
    if store.health() == Health::Failed {
        return ExitCode::from(EXIT_STORE_FAILED);
    }
    tracing::info!("stopped");
    ExitCode::from(code)
}

/// Why a service ends without having been asked to.
#[derive(Debug)]
pub enum Ended {
    StoreFailed,
    Task(&'static str),
}

/// A service with all that runs for it. It needs a runtime with timer and I/O around it; gRPC brings
/// threads of its own.
pub struct Running {
    service: Service,
    tasks: Tasks,
    status: Arc<ProcessStatus>,
    drain_delay: Duration,
    /// Comes last of all: readiness is asked for until the end.
    ops_end: CancellationToken,
}

impl Running {
    /// Ops first, so that a store that takes its time to open is seen to be opening.
    ///
    /// # Errors
    /// With what the process should exit with, when a part cannot be made.
    pub async fn start(
        config: &Config,
        listeners: Listeners,
        surroundings: Surroundings,
    ) -> Result<Self, Failed> {
        let status = Arc::new(ProcessStatus::new());
        let mut tasks = Tasks::default();
        let ops_end = CancellationToken::new();
        ops::start(&mut tasks, listeners.ops, Arc::clone(&status) as _, &ops_end);
        let limits = Limits::default().drawn((surroundings.chance)());
        let mut service = Service::build(config, surroundings, &status.metrics).await?;
        status.opened(&service.store);
        start_loops(&mut tasks, &mut service);
        start_grpc(&mut tasks, &service, limits, listeners.grpc);
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
        Ok(Self { service, tasks, status, drain_delay: config.drain_delay, ops_end })
    }

    pub fn store(&self) -> &Arc<dyn Store> {
        &self.service.store
    }

    /// Resolves only when something is wrong.
    pub async fn ended(&mut self) -> Ended {
        tokio::select! {
            () = self.service.store.failed() => Ended::StoreFailed,
            name = self.tasks.ended() => Ended::Task(name),
        }
    }

    /// Not ready → out of rotation → no new connections, no new leases → what is in flight → close.
    pub async fn stop(self) {
        let Self { service, mut tasks, status, drain_delay, ops_end } = self;
        status.set(Phase::Draining);
        service.announce(ServingStatus::NotServing).await;
        tokio::time::sleep(drain_delay).await;
        service.grpc_end.cancel();
        service.work_end.cancel();
        // The feeders end while the calls in flight do: neither waits for the other.
        let feeders = ["startup-check", "scheduler", "webhooks", "events", "letters"];
        tasks.end(&feeders, ATTEMPTS_GRACE).await;
        let Service { outbox, store, .. } = service;
        if !outbox.drain(ATTEMPTS_GRACE).await {
            tracing::warn!("deliveries in flight were abandoned; they are still owed");
        }
        // With the last feeder gone the finisher writes what it has and ends.
        drop(outbox);
        tasks.end(&["finisher"], ATTEMPTS_GRACE).await;
        tasks.join(&["grpc"]).await;
        store.close().await;
        ops_end.cancel();
        tasks.join(&["ops"]).await;
    }
}

fn start_loops(tasks: &mut Tasks, service: &mut Service) {
    start_loop(tasks, service, "scheduler", Arc::clone(&service.scheduler) as _);
    start_loop(tasks, service, "webhooks", Arc::clone(&service.outbox.webhooks) as _);
    start_loop(tasks, service, "letters", Arc::clone(&service.outbox.letters) as _);
    if let Some(events) = &service.outbox.events {
        start_loop(tasks, service, "events", Arc::clone(events) as _);
    }
    if let Some(check) = service.startup_check.take() {
        tasks.start("startup-check", look_for_what_is_missing(check, service.work_end.clone()));
    }
    if let Some(finisher) = service.outbox.finisher.take() {
        tasks.start("finisher", finisher.run());
    }
}

/// Beside everything else, so that an AWS that does not answer delays no start. Tasks end when they are
/// told to, and so does this one.
async fn look_for_what_is_missing(check: StartupCheck, end: CancellationToken) {
    for problem in end.run_until_cancelled(check.problems(CHECK_MAX)).await.unwrap_or_default() {
        tracing::warn!("{problem}");
    }
    end.cancelled().await;
}

fn start_loop(tasks: &mut Tasks, service: &Service, name: &'static str, step: Arc<dyn Step>) {
    let (store, clock) = (Arc::clone(&service.store), Arc::clone(&service.clock));
    let end = service.work_end.clone();
    tasks.start(name, async move { driver::drive(&*step, store, clock, end).await });
}

/// One thread with a runtime of its own for each listener: a connection never leaves its core.
fn start_grpc(tasks: &mut Tasks, service: &Service, limits: Limits, listeners: Vec<TcpListener>) {
    let server = Server::new(limits);
    tracing::debug!(threads = listeners.len(), "starting gRPC threads");
    for listener in listeners {
        let (server, edge, end) = (server.clone(), service.edge.clone(), service.grpc_end.clone());
        let gatherer = service.gatherer.clone();
        let (ended, wait) = oneshot::channel();
        let thread = thread::Builder::new().name("grpc".to_owned()).spawn(move || {
            if let Err(error) = serve_listener(&server, listener, edge, gatherer, end) {
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
}

/// Ends with nothing left of its connections, nor of `edge` and the store behind it.
fn serve_listener(
    server: &Server,
    listener: TcpListener,
    edge: Edge<Payments>,
    gatherer: Gatherer,
    end: CancellationToken,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let serving = server.serve_grpc(listener, |ending| edge.connection(ending), end);
    runtime.block_on(gatherer.around(serving))
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
    fn service(&self) -> &'static str {
        "payment-sim-api"
    }

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
