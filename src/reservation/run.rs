//! From the worker's configuration to a worker that runs, and down again.

use std::{
    net::{SocketAddr, TcpListener},
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::{
    calls::{HttpReservations, LoggedReservations, Reservations},
    metrics::WorkerMetrics,
    sqs::SqsQueue,
    state::State,
    worker::{Limits, Parts, Worker},
};
use crate::{
    chance::chance,
    clock::{Clock, Stopwatch, SystemClock},
    config::{StoreUrl, WorkerConfig},
    courier::aws::{self, AwsSettings},
    ops::{self, Phase, Report, StoreCondition},
    process::{
        EXIT_SOFTWARE, EXIT_STORE_FAILED, EXIT_UNAVAILABLE, Signals, Tasks, end_anyway_after,
    },
    server,
};

/// It waits for others most of the time.
const THREADS: usize = 2;
/// From the signal to the end, whatever hangs; longer than the worker's own bounds together.
const STOP_MAX: Duration = Duration::from_secs(29);

/// The ops port's socket, bound before anything else is done.
///
/// # Errors
/// With the address, when it is in use or may not be bound.
pub fn bind(config: &WorkerConfig) -> Result<TcpListener, String> {
    let address = SocketAddr::new(config.bind_address, config.port);
    let bound = server::bind(address, 1).map(|mut all| all.swap_remove(0));
    bound.map_err(|error| format!("{address} cannot be bound: {error}"))
}

/// Works until a signal, then drains; the process's exit code says how it ended.
pub fn run(config: &WorkerConfig, ops: TcpListener) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("worker")
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => {
            let code = runtime.block_on(serve(config, ops));
            // Look-ups of names cannot be cancelled; nothing waits for them.
            runtime.shutdown_background();
            code
        }
        Err(error) => {
            tracing::error!(%error, "no runtime could be made");
            ExitCode::from(EXIT_SOFTWARE)
        }
    }
}

async fn serve(config: &WorkerConfig, ops: TcpListener) -> ExitCode {
    let Ok(mut signals) = Signals::listen() else {
        tracing::error!("signals cannot be listened to");
        return ExitCode::from(EXIT_SOFTWARE);
    };
    let status = Arc::new(Status::new());
    let (mut tasks, ops_end, stop) =
        (Tasks::default(), CancellationToken::new(), CancellationToken::new());
    ops::start(&mut tasks, ops, Arc::clone(&status) as _, &ops_end);
    let parts = match parts(config, &status.metrics).await {
        Ok(parts) => parts,
        Err(why) => {
            tracing::error!("the state cannot be opened: {why}");
            return ExitCode::from(EXIT_UNAVAILABLE);
        }
    };
    let limits = Limits {
        concurrency: config.concurrency,
        visibility: config.visibility,
        retry_for: config.retry_for,
    };
    let (worker, result) = (Worker::new(parts, limits, stop.clone()), Arc::default());
    tasks.start("worker", keep_result(worker, Arc::clone(&result)));
    status.set(Phase::Serving);
    tracing::info!(port = config.port, queue = %config.queue_url, state = ?config.state, "ready");

    let asked = tokio::select! {
        name = signals.next() => {
            tracing::info!(signal = name, "draining");
            true
        }
        name = tasks.ended() => {
            tracing::error!(task = name, "a task ended that never should");
            false
        }
    };
    status.set(Phase::Draining);
    signals.insist();
    end_anyway_after(STOP_MAX);
    stop.cancel();
    tasks.join(&["worker"]).await;
    ops_end.cancel();
    tasks.join(&["ops"]).await;
    let failed = result.lock().unwrap_or_else(PoisonError::into_inner).take();
    match failed {
        Some(error) => {
            tracing::error!(%error, "the state failed; what was not remembered comes again");
            ExitCode::from(EXIT_STORE_FAILED)
        }
        None if asked => {
            tracing::info!("stopped");
            ExitCode::SUCCESS
        }
        None => ExitCode::from(EXIT_SOFTWARE),
    }
}

type Failure = Arc<Mutex<Option<super::state::Broken>>>;

async fn keep_result(worker: Arc<Worker>, failure: Failure) {
    if let Err(error) = worker.run().await {
        *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

async fn parts(config: &WorkerConfig, metrics: &Arc<WorkerMetrics>) -> Result<Parts, String> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let (url, of_state) = (config.state.clone(), Arc::clone(&clock));
    let state = tokio::task::spawn_blocking(move || match url {
        StoreUrl::File(folder) => State::in_folder(&folder, of_state),
        StoreUrl::Memory => State::in_memory(of_state),
    });
    let state = state.await.map_err(|error| error.to_string())??;
    metrics.remembered(state.remembered());
    let aws = AwsSettings {
        profile: config.aws.profile.clone(),
        region: Some(config.aws.region.clone()),
        default_region: config.aws.region.clone(),
        endpoint_url: config.aws.endpoint_url.as_ref().map(ToString::to_string),
    };
    let queue = SqsQueue::new(&aws::sdk_config(&aws).await, config.queue_url.to_string());
    let reservations: Arc<dyn Reservations> = match &config.api {
        Some(api) => Arc::new(HttpReservations::new(api, config.concurrency)),
        None => Arc::new(LoggedReservations),
    };
    Ok(Parts {
        queue: Arc::new(queue),
        reservations,
        state,
        clock,
        chance: Arc::new(chance),
        metrics: Arc::clone(metrics),
    })
}

/// What is asked of the process as a whole.
struct Status {
    phase: Mutex<Phase>,
    metrics: Arc<WorkerMetrics>,
    started: Stopwatch,
}

impl Status {
    fn new() -> Self {
        let phase = Mutex::new(Phase::Starting);
        Self { phase, metrics: Arc::default(), started: Stopwatch::start() }
    }

    fn set(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }
}

impl Report for Status {
    fn service(&self) -> &'static str {
        "reservation-worker"
    }

    fn phase(&self) -> Phase {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state: open from the start of the work, and its failure ends the process.
    fn store(&self) -> StoreCondition {
        match self.phase() {
            Phase::Starting => StoreCondition::Opening,
            Phase::Serving | Phase::Draining => StoreCondition::Open,
        }
    }

    fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    fn metrics(&self) -> String {
        self.metrics.render()
    }
}
