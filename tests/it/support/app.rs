use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use payment_sim::{
    clock::{Clock, ManualClock, SystemClock},
    config::{Config, StoreUrl},
    runtime::{Listeners, Running},
    service::Surroundings,
    store::Work,
};
use serde_json::Value;
use tokio::{runtime::Handle, task::block_in_place};
use tonic::{Request, Response, Status};

use super::{
    CreatePaymentIntentRequest, DEADLINE, Delivery, GetPaymentIntentRequest,
    GetPaymentIntentResponse, ListPaymentsRequest, Payment, PaymentScenario, PaymentStatus,
    ProcessPaymentRequest, ProcessPaymentResponse,
    client::{Client, SimulationClient, clients, create, http_get},
    event_log::EventLog,
    eventually,
};

/// The service, whole, with a clock of its own. It drains when it is dropped, and then nothing may be
/// left undelivered.
pub struct TestApp {
    pub clock: ManualClock,
    pub client: Client,
    pub simulation: SimulationClient,
    pub ops: SocketAddr,
    pub events: EventLog,
    config: Config,
    running: Option<Running>,
    leaves: bool,
}

impl TestApp {
    /// As in development, with the store in memory.
    pub async fn start() -> Self {
        Self::with(|_| ()).await
    }

    /// Without a sink for events: what nobody is told is owed to nobody.
    pub async fn quiet() -> Self {
        Self::with(|config| config.events.sink = payment_sim::config::EventSink::None).await
    }

    /// With its store in a folder, so that it can be started again.
    pub async fn stored_in(folder: &Path) -> Self {
        Self::with(|config| config.store = StoreUrl::File(folder.to_owned())).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config {
            grpc_port: 0,
            ops_port: 0,
            runtime_threads: 1,
            store: StoreUrl::Memory,
            drain_delay: Duration::ZERO,
            ..Config::default()
        };
        // A busy machine must not turn an attempt into a retry.
        config.webhook.timeout = Duration::from_secs(60);
        change(&mut config);
        let clock = ManualClock::at_ms(SystemClock.now_ms() / 1_000 * 1_000);
        Self::run(config, clock, EventLog::default()).await
    }

    async fn run(config: Config, clock: ManualClock, events: EventLog) -> Self {
        let listeners = Listeners::bind(&config).unwrap();
        let (grpc, ops) = listeners.addresses().unwrap();
        let log = events.clone();
        let surroundings = Surroundings {
            clock: Arc::new(clock.clone()),
            // Every wait between attempts is as long as it can be.
            chance: Arc::new(|| 1.0),
            event_log: Box::new(move || Ok(Box::new(log) as Box<dyn io::Write + Send>)),
        };
        let running = Running::start(&config, listeners, surroundings).await.unwrap();
        let ((client, simulation), running) = (clients(grpc), Some(running));
        Self { clock, client, simulation, ops, events, config, running, leaves: false }
    }

    /// What this test leaves undelivered is left on purpose.
    pub fn leave_undelivered(&mut self) {
        self.leaves = true;
    }

    /// Drains and starts again on the same store, with the clock further on by `down_ms`.
    pub async fn restart(mut self, down_ms: u64) -> Self {
        self.stop().await;
        self.clock.advance(Duration::from_millis(down_ms));
        self.leaves = true;
        Self::run(self.config.clone(), self.clock.clone(), self.events.clone()).await
    }

    /// Drains, as on SIGTERM.
    pub async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            tokio::time::timeout(DEADLINE, running.stop()).await.expect("the drain ends");
        }
    }

    /// Takes the service out, to drain it beside what a test does meanwhile.
    pub fn take_running(&mut self) -> Running {
        self.running.take().expect("it runs")
    }

    pub fn advance_ms(&self, ms: u64) {
        self.clock.advance(Duration::from_millis(ms));
    }

    pub fn now_ms(&self) -> i64 {
        self.clock.now_ms()
    }

    /// Creates a payment for `webhook_url` ("": none) and returns its id.
    pub async fn pay(&self, scenario: PaymentScenario, webhook_url: &str) -> String {
        self.create(CreatePaymentIntentRequest {
            scenario: scenario.into(),
            webhook_url: webhook_url.to_owned(),
            ..create("reservation-1")
        })
        .await
    }

    pub async fn create(&self, request: CreatePaymentIntentRequest) -> String {
        let reply = self.client.clone().create_payment_intent(request).await.unwrap().into_inner();
        assert_eq!(reply.status(), PaymentStatus::Pending);
        reply.payment_intent_id
    }

    pub async fn process(&self, id: &str) -> Result<Response<ProcessPaymentResponse>, Status> {
        let request =
            ProcessPaymentRequest { payment_intent_id: id.to_owned(), ..Default::default() };
        self.client.clone().process_payment(request).await
    }

    pub async fn get(&self, id: &str) -> GetPaymentIntentResponse {
        let request =
            GetPaymentIntentRequest { payment_intent_id: id.to_owned(), ..Default::default() };
        self.client.clone().get_payment_intent(request).await.unwrap().into_inner()
    }

    pub async fn payment(&self, id: &str) -> Payment {
        self.get(id).await.payment.unwrap()
    }

    pub async fn status(&self, id: &str) -> PaymentStatus {
        self.payment(id).await.status()
    }

    /// The payment, once it has this status.
    pub async fn becomes(&self, id: &str, status: PaymentStatus) -> Payment {
        eventually(&format!("{id} becomes {status:?}"), || async {
            Some(self.payment(id).await).filter(|payment| payment.status() == status)
        })
        .await
    }

    /// A payment's deliveries on a channel, oldest first.
    pub async fn deliveries(&self, id: &str, channel: &str) -> Vec<Delivery> {
        let deliveries = self.get(id).await.deliveries;
        deliveries.into_iter().filter(|delivery| delivery.channel == channel).collect()
    }

    /// The last webhook of a payment, once it is in this state.
    pub async fn webhook_becomes(&self, id: &str, state: &str) -> Delivery {
        eventually(&format!("the webhook of {id} becomes {state}"), || async {
            let last = self.deliveries(id, "webhook").await.pop();
            last.filter(|delivery| delivery.state == state)
        })
        .await
    }

    /// The last webhook of a payment, once so many attempts at it have been written down.
    pub async fn webhook_attempted(&self, id: &str, attempts: i32) -> Delivery {
        eventually(&format!("{attempts} attempts at the webhook of {id}"), || async {
            let last = self.deliveries(id, "webhook").await.pop();
            last.filter(|delivery| delivery.attempts_made == attempts)
        })
        .await
    }

    /// The first `n` events, once they are in the log.
    pub async fn events(&self, n: usize) -> Vec<Value> {
        eventually(&format!("{n} events"), || async {
            Some(self.events.lines()).filter(|lines| lines.len() >= n)
        })
        .await
    }

    /// What stands in `/metrics` behind this name and these labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let (_, text) = http_get(self.ops, "/metrics").await.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    }

    async fn everything_is_delivered(&self, running: &Running) {
        let delivered = async {
            while Self::owed(running) > 0 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        if tokio::time::timeout(DEADLINE, delivered).await.is_ok() {
            return;
        }
        let all = self.client.clone().list_payments(ListPaymentsRequest::default()).await.unwrap();
        let mut left = Vec::new();
        for payment in all.into_inner().payments {
            left.extend(self.get(&payment.payment_intent_id).await.deliveries);
        }
        left.retain(|delivery| !matches!(delivery.state.as_str(), "DELIVERED" | "DEAD"));
        panic!("left undelivered at {} ms: {left:#?}", self.now_ms());
    }

    /// How many deliveries wait, now or for later.
    fn owed(running: &Running) -> usize {
        let store = running.store();
        store.backlog(Work::Event).pending + store.backlog(Work::Webhook).pending
    }

    async fn end(&mut self) {
        let Some(running) = self.running.take() else { return };
        let store = Arc::clone(running.store());
        if !self.leaves {
            self.everything_is_delivered(&running).await;
        }
        tokio::time::timeout(DEADLINE, running.stop()).await.expect("the drain ends");
        if !self.leaves {
            let left = [Work::Event, Work::Webhook].map(|work| store.backlog(work).pending);
            assert_eq!(left, [0, 0], "events and webhooks left undelivered");
        }
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        self.leaves |= std::thread::panicking();
        block_in_place(|| Handle::current().block_on(self.end()));
    }
}

/// A request with a header.
pub fn with_header<T>(message: T, name: &'static str, value: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(name, value.parse().unwrap());
    request
}
