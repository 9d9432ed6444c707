//! The wiring: from a configuration, and what a service finds around it, to parts that know each other.
//! Nothing runs yet; that is runtime.rs.

use std::{io, sync::Arc, time::Duration};

use aws_config::SdkConfig;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    api::{self, SimulationServer, grpc::Payments, simulation::Simulation, token::Guard},
    app::{self, App},
    chance::chance,
    clock::{Clock, SystemClock},
    config::{Config, EventSink, StartupCheck as OnMiss, StoreUrl, Switch, Token},
    courier::{
        Courier, DeadLetterCourier, EventBridgeCourier, LogCourier, NoDeadLetterQueue, SqsCourier,
        WebhookCourier,
        aws::{self, AwsSettings},
        log,
        startup_check::{CHECK_MAX, StartupCheck},
        webhook::WebhookSettings,
    },
    domain::{
        delivery::RetryPolicy,
        scenario::{self, Scenario},
        signature::Signer,
        time::Timestamp,
    },
    edge::{Edge, EdgeLimits},
    metrics::{Metrics, OutboxDepth},
    outbox::{Batches, Finisher, Jitter, Mail, Policies, RETRIES, Shared, WebhookLimits, Webhooks},
    process::{EXIT_SOFTWARE, EXIT_UNAVAILABLE},
    scheduler::Scheduler,
    store::{self, Embedded, Gatherer, Location, Retention, Store, Work},
};

/// The payment service's name in `grpc.health.v1`; "" is the whole server.
const SERVICES: [&str; 2] = ["", "payment.v1.PaymentService"];
/// sysexits.h: EX_CONFIG.
const EXIT_CONFIG: u8 = 78;

/// Why there is no service: the process's exit code, and the words to end with.
pub type Failed = (u8, String);

/// Opened only where events go to the log.
pub type OpenEventLog = Box<dyn FnOnce() -> io::Result<Box<dyn io::Write + Send>> + Send>;

/// What a service finds around it. Time and chance are arguments: who gives others gets the same run
/// again.
pub struct Surroundings {
    pub clock: Arc<dyn Clock>,
    /// Uniform in 0 … 1: the waits between attempts, the age of connections.
    pub chance: Jitter,
    pub event_log: OpenEventLog,
}

impl Surroundings {
    /// The machine's own clock, randomness and standard output.
    pub fn of_this_machine() -> Self {
        Self {
            clock: Arc::new(SystemClock),
            chance: Arc::new(chance),
            event_log: Box::new(|| Ok(Box::new(log::stdout()?))),
        }
    }
}

/// Everything that serves payments.
pub struct Service {
    pub store: Arc<dyn Store>,
    /// For the threads that serve gRPC.
    pub gatherer: Gatherer,
    pub clock: Arc<dyn Clock>,
    pub scheduler: Arc<Scheduler>,
    pub outbox: Outbox,
    pub edge: Edge<Payments>,
    /// Until it is started.
    pub startup_check: Option<StartupCheck>,
    health: HealthReporter,
    /// Stops leasing.
    pub work_end: CancellationToken,
    /// Stops accepting, and ends held calls.
    pub grpc_end: CancellationToken,
}

impl Service {
    pub async fn build(
        config: &Config,
        surroundings: Surroundings,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, Failed> {
        let Surroundings { clock, chance, event_log } = surroundings;
        let aws = Aws::new(config);
        let startup_check = startup_check(config, &aws).await?;
        let opened = open_store(config, &clock, metrics).await?;
        let gatherer = opened.gatherer();
        let store: Arc<dyn Store> = opened;
        watch_outbox(metrics, &store, &clock);
        let shared = Shared::new(Arc::clone(&store), Arc::clone(&clock), Arc::clone(metrics));
        let couriers = Couriers {
            events: events_courier(config, &aws, event_log).await?,
            webhooks: webhook_courier(config)?,
            letters: dead_letter_courier(config, &aws).await,
        };
        let outbox = Outbox::new(config, shared, couriers, chance);
        let grpc_end = CancellationToken::new();
        let (health, health_server) = tonic_health::server::health_reporter();
        let settings = app::Settings {
            scenario: scenario_settings(config),
            events: config.events.sink != EventSink::None,
        };
        let app = App::new(Arc::clone(&store), Arc::clone(&clock), Arc::clone(metrics), settings);
        let app = Arc::new(app);
        let simulation = simulation_server(config, &app);
        let payments = Payments::new(app, config.public_url.clone(), grpc_end.clone());
        let edge_limits = EdgeLimits { max_in_flight: config.max_in_flight, ..Default::default() };
        let routes = api::routes(health_server, simulation);
        Ok(Self {
            edge: Edge::new(payments, routes, edge_limits, Arc::clone(metrics) as _),
            scheduler: Arc::new(Scheduler {
                store: Arc::clone(&store),
                clock: Arc::clone(&clock),
                metrics: Arc::clone(metrics),
            }),
            outbox,
            startup_check,
            store,
            gatherer,
            clock,
            health,
            work_end: CancellationToken::new(),
            grpc_end,
        })
    }

    /// To whoever asks `grpc.health.v1`.
    pub async fn announce(&self, status: ServingStatus) {
        for service in SERVICES {
            self.health.set_service_status(service, status).await;
        }
    }
}

/// What brings deliveries out, and writes down what came of them.
pub struct Outbox {
    pub events: Option<Arc<Batches>>,
    pub letters: Arc<Batches>,
    pub webhooks: Arc<Webhooks>,
    /// Until it is started.
    pub finisher: Option<Finisher>,
}

struct Couriers {
    events: Option<Arc<dyn Courier>>,
    webhooks: Arc<dyn Courier>,
    letters: Arc<dyn Courier>,
}

impl Outbox {
    fn new(config: &Config, shared: Shared, couriers: Couriers, chance: Jitter) -> Self {
        let (finisher, done) = Finisher::new(shared.clone(), policies(config), Arc::clone(&chance));
        let batches = |courier, mail| {
            let (shared, chance, done) = (shared.clone(), Arc::clone(&chance), done.clone());
            Arc::new(Batches::new(shared, courier, mail, chance, done))
        };
        let sink = Mail::Events(config.events.sink.as_str());
        let limits = WebhookLimits {
            concurrency: config.webhook.concurrency,
            origin_concurrency: config.webhook.origin_concurrency,
            origin_max_rps: config.webhook.max_rps,
        };
        Self {
            events: couriers.events.map(|courier| batches(courier, sink)),
            letters: batches(couriers.letters, Mail::DeadLetters),
            webhooks: Arc::new(Webhooks::new(shared, couriers.webhooks, limits, done)),
            finisher: Some(finisher),
        }
    }

    /// Waits for what is in flight, and abandons what takes longer; false: there was some.
    pub async fn drain(&self, grace: Duration) -> bool {
        let events = async {
            match &self.events {
                Some(events) => events.drain(grace).await,
                None => true,
            }
        };
        let all = tokio::join!(events, self.letters.drain(grace), self.webhooks.drain(grace));
        all == (true, true, true)
    }
}

/// `None` where it is off.
fn simulation_server(config: &Config, app: &Arc<App>) -> Option<SimulationServer> {
    match config.simulation_api {
        Switch::On => {
            let token = config.simulation_token.as_ref().map(Token::as_str);
            let guard = Guard::new(token, app.secret());
            Some(api::simulation_server(Simulation::new(Arc::clone(app)), guard))
        }
        Switch::Off => None,
    }
}

async fn open_store(
    config: &Config,
    clock: &Arc<dyn Clock>,
    metrics: &Arc<Metrics>,
) -> Result<Arc<Embedded>, Failed> {
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

/// The store counts its commits in the metrics, so these must not keep the store: neither would ever go.
fn watch_outbox(metrics: &Metrics, store: &Arc<dyn Store>, clock: &Arc<dyn Clock>) {
    let (store, clock) = (Arc::downgrade(store), Arc::clone(clock));
    metrics.read_outbox_from(move || {
        let Some(store) = store.upgrade() else { return Vec::new() };
        let now = Timestamp::from_ms(clock.now_ms());
        let depth = |channel, work| {
            let backlog = store.backlog(work);
            let oldest_age = backlog.oldest.map_or(Duration::ZERO, |due| now.since(due));
            OutboxDepth { channel, pending: backlog.pending as u64, oldest_age }
        };
        vec![
            depth("event", Work::Event),
            depth("webhook", Work::Webhook),
            depth("dead_letter", Work::DeadLetter),
        ]
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
        batched: RETRIES,
        webhook: RetryPolicy {
            max_attempts: Some(config.webhook.max_attempts),
            backoff_base: config.webhook.backoff_base,
            backoff_max: config.webhook.backoff_max,
            dead_letters: writes_letters(config),
        },
    }
}

fn writes_letters(config: &Config) -> bool {
    #[cfg(feature = "faults")]
    if crate::faults::chosen() == Some(crate::faults::Fault::LetterForgotten) {
        return false;
    }
    config.webhook.dlq_url.is_some()
}

/// How to reach AWS: read from files and environment when something first asks, and no more than once.
pub struct Aws<'a> {
    config: &'a Config,
    sdk: OnceCell<SdkConfig>,
}

impl<'a> Aws<'a> {
    pub fn new(config: &'a Config) -> Self {
        Self { config, sdk: OnceCell::new() }
    }

    async fn sdk(&self) -> &SdkConfig {
        let read = async || {
            let events = &self.config.events;
            let settings = AwsSettings {
                profile: events.aws.profile.clone(),
                region: Some(events.aws.region.clone()),
                default_region: events.aws.region.clone(),
                endpoint_url: events.aws.endpoint_url.as_ref().map(ToString::to_string),
            };
            aws::sdk_config(&settings).await
        };
        self.sdk.get_or_init(read).await
    }
}

/// Where a miss ends the start, it is looked for here and now; else there is something to look at later.
async fn startup_check(config: &Config, aws: &Aws<'_>) -> Result<Option<StartupCheck>, Failed> {
    let on_miss = config.events.startup_check;
    let check = match on_miss {
        OnMiss::Off => return Ok(None),
        OnMiss::Warn | OnMiss::Require => what_has_to_be_there(config, aws).await,
    };
    if on_miss == OnMiss::Warn {
        return Ok(Some(check));
    }
    match check.problems(CHECK_MAX).await {
        problems if problems.is_empty() => Ok(None),
        problems => Err((
            EXIT_UNAVAILABLE,
            format!("EVENT_STARTUP_CHECK=require ends the start: {}", problems.join(" | ")),
        )),
    }
}

async fn what_has_to_be_there(config: &Config, aws: &Aws<'_>) -> StartupCheck {
    let mut check = StartupCheck::default();
    let Config { events, webhook, .. } = config;
    match (events.sink, &events.queue_url) {
        (EventSink::EventBridge, _) => {
            check.wants_bus(aws.sdk().await, events.bus_name.clone(), events.source.clone());
        }
        (EventSink::Sqs, Some(url)) => {
            check.wants_queue(aws.sdk().await, url.to_string(), "PAYMENT_WEBHOOK_QUEUE_URL");
        }
        (EventSink::Sqs, None) | (EventSink::Log | EventSink::None, _) => {}
    }
    if let Some(url) = &webhook.dlq_url {
        check.wants_queue(aws.sdk().await, url.to_string(), "PAYMENT_WEBHOOK_DLQ_URL");
    }
    check
}

async fn events_courier(
    config: &Config,
    aws: &Aws<'_>,
    event_log: OpenEventLog,
) -> Result<Option<Arc<dyn Courier>>, Failed> {
    let events = &config.events;
    let courier: Arc<dyn Courier> = match events.sink {
        EventSink::None => return Ok(None),
        EventSink::Log => {
            let started = event_log().and_then(|out| LogCourier::start(events.source.clone(), out));
            Arc::new(started.map_err(|e| (EXIT_SOFTWARE, format!("no event log: {e}")))?)
        }
        EventSink::EventBridge => {
            let sdk = aws.sdk().await;
            Arc::new(EventBridgeCourier::new(sdk, events.bus_name.clone(), events.source.clone()))
        }
        EventSink::Sqs => {
            let url = events.queue_url.as_ref().ok_or_else(|| {
                (
                    EXIT_CONFIG,
                    "PAYMENT_WEBHOOK_QUEUE_URL is not set, EVENT_SINK=sqs needs it".into(),
                )
            })?;
            let sdk = aws.sdk().await;
            Arc::new(SqsCourier::new(sdk, url.to_string(), events.source.clone()))
        }
    };
    #[cfg(feature = "faults")]
    let courier = crate::faults::events_courier(courier);
    Ok(Some(courier))
}

/// Letters that an earlier run still owes have to end somewhere, so there always is one.
async fn dead_letter_courier(config: &Config, aws: &Aws<'_>) -> Arc<dyn Courier> {
    match &config.webhook.dlq_url {
        Some(url) => Arc::new(DeadLetterCourier::new(aws.sdk().await, url.to_string())),
        None => Arc::new(NoDeadLetterQueue),
    }
}

fn webhook_courier(config: &Config) -> Result<Arc<dyn Courier>, Failed> {
    let secrets: Vec<&str> = config.webhook.secrets.iter().collect();
    let signer =
        Signer::new(&secrets).map_err(|error| (EXIT_CONFIG, format!("WEBHOOK_SECRET: {error}")))?;
    let settings = WebhookSettings {
        signer,
        timeout: config.webhook.timeout,
        idle_per_origin: config.webhook.origin_concurrency,
    };
    Ok(Arc::new(WebhookCourier::new(config.webhook.egress.clone(), settings)))
}
