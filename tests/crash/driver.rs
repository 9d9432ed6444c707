//! The caller: many tasks that create, process, replay, misuse, cancel and read, and write down what
//! they are about to ask before, and what they were answered after.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use payment_sim::{
    api::pb::{
        common::v1::Money,
        payment::v1::{
            CancelPaymentRequest, CreatePaymentIntentRequest, GetPaymentIntentRequest,
            PaymentMetadata, PaymentMethod, PaymentScenario, ProcessPaymentRequest,
        },
        simulation::v1::simulation_service_client::SimulationServiceClient,
    },
    clock::{Clock, SystemClock},
};
use prost::Message;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, transport::Channel};

use crate::{
    journal::Journal,
    support::{Client, chance::Chance, client, simulation},
};

pub const CURRENCY: &str = "KRW";
/// Connections, shared by the tasks.
const CONNECTIONS: usize = 4;
/// A call that waits for longer is given up; the service's own limit is 10 s.
const CALL_MAX: Duration = Duration::from_secs(15);
/// What is held is not waited for.
const PROCESS_MAX: Duration = Duration::from_millis(300);
/// Pause of a task whose call found nobody: the service is down, and asking faster proves nothing.
const DOWN_PAUSE: Duration = Duration::from_millis(10);

/// The delays that a service was started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    pub delay_ms: u64,
    pub settle_ms: u64,
    pub ttl_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    Create(Create),
    Process { id: String },
    Cancel { id: String, amount: Option<i64> },
}

/// The reservation is the key, so that a payment names the call that made it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    pub user: String,
    pub amount: i64,
    pub method: i32,
    pub scenario: i32,
    /// Empty: none.
    pub webhook_url: String,
}

/// A line of the driver's journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Record {
    Send {
        at: i64,
        key: String,
        call: Call,
        timing: Timing,
    },
    Ack {
        at: i64,
        key: String,
        ack: Ack,
    },
    /// An error that the service itself gave.
    Refused {
        at: i64,
        key: String,
        code: i32,
        message: String,
    },
    /// Nobody knows what became of it.
    Lost {
        at: i64,
        key: String,
        why: String,
    },
    /// A known key with another request.
    Reused {
        at: i64,
        key: String,
        code: i32,
    },
    Read {
        at: i64,
        id: String,
        version: i64,
        status: i32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    pub id: String,
    pub hash: String,
    pub status: i32,
    pub replayed: bool,
    pub refund: Option<(String, i64)>,
}

pub struct Driver {
    clients: Vec<Client>,
    pub simulation: SimulationServiceClient<Channel>,
    journal: Arc<Journal>,
    /// Webhook URLs to draw from.
    urls: Vec<String>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    sent: Vec<(String, Call)>,
    acked: Vec<(String, Call)>,
    payments: Vec<String>,
    acks: u64,
}

impl Driver {
    pub fn new(port: u16, journal: Arc<Journal>, urls: Vec<String>) -> Self {
        let clients = (0..CONNECTIONS).map(|_| client(port)).collect();
        let simulation = simulation(port);
        Self { clients, simulation, journal, urls, known: Mutex::default() }
    }

    pub fn client(&self, n: usize) -> Client {
        self.clients[n % CONNECTIONS].clone()
    }

    pub fn acks(&self) -> u64 {
        self.known().acks
    }

    /// Up to so many payments that were acknowledged, most of them young.
    pub fn some(&self, count: usize, chance: &mut Chance) -> BTreeSet<String> {
        let payments = &self.known().payments;
        (0..count).filter_map(|_| pick(chance, payments)).collect()
    }

    /// Starts the tasks; they end when `stop` is cancelled.
    pub fn load(
        self: &Arc<Self>,
        tasks: usize,
        name: &str,
        timing: Timing,
        chance: &Chance,
        stop: &CancellationToken,
    ) -> JoinSet<()> {
        let mut set = JoinSet::new();
        for n in 0..tasks {
            let task = Task {
                driver: Arc::clone(self),
                client: self.client(n),
                name: format!("{name}-{n}"),
                timing,
                chance: chance.branch(n as u64),
                own: Vec::new(),
                calls: 0,
            };
            set.spawn(task.run(stop.clone()));
        }
        set
    }

    /// Sends a call under a key and writes both sides of it down.
    pub async fn send(
        &self,
        client: Client,
        key: &str,
        call: &Call,
        timing: Timing,
    ) -> Result<Ack, Status> {
        let owned = || (key.to_owned(), SystemClock.now_ms());
        let (name, at) = owned();
        self.journal.write(&Record::Send { at, key: name, call: call.clone(), timing }).await;
        let result = self.perform(client, key, call).await;
        let (key, at) = owned();
        match &result {
            Ok(ack) => {
                self.journal.write(&Record::Ack { at, key: key.clone(), ack: ack.clone() }).await;
                let mut known = self.known();
                known.acks += 1;
                if matches!(call, Call::Create(_)) {
                    known.payments.push(ack.id.clone());
                }
                known.acked.push((key, call.clone()));
            }
            Err(status) if is_lost(status) => {
                self.journal.write(&Record::Lost { at, key, why: status.to_string() }).await;
            }
            Err(status) => {
                let (code, message) = (status.code().into(), status.message().to_owned());
                self.journal.write(&Record::Refused { at, key, code, message }).await;
            }
        }
        result
    }

    async fn perform(&self, client: Client, key: &str, call: &Call) -> Result<Ack, Status> {
        tokio::time::timeout(CALL_MAX, self.ask(client, key, call))
            .await
            .unwrap_or_else(|_| Err(Status::from_error("nobody answered".into())))
    }

    async fn ask(&self, mut client: Client, key: &str, call: &Call) -> Result<Ack, Status> {
        match call {
            Call::Create(create) => {
                let request = create_request(key, create);
                let reply = client.create_payment_intent(request).await?;
                let id = reply.get_ref().payment_intent_id.clone();
                let status = reply.get_ref().status;
                Ok(ack(&reply, id, status, None))
            }
            Call::Process { id } => {
                let mut request = Request::new(ProcessPaymentRequest {
                    payment_intent_id: id.clone(),
                    payment_details: None,
                    idempotency_key: key.to_owned(),
                });
                request.set_timeout(PROCESS_MAX);
                let reply = client.process_payment(request).await?;
                let status = reply.get_ref().status;
                Ok(ack(&reply, id.clone(), status, None))
            }
            Call::Cancel { id, amount } => {
                let request = CancelPaymentRequest {
                    payment_intent_id: id.clone(),
                    reason: key.to_owned(),
                    refund_amount: amount.map(money),
                    idempotency_key: key.to_owned(),
                    refund_vat: None,
                };
                let reply = client.cancel_payment(request).await?;
                let message = reply.get_ref();
                let amount = message.refunded_amount.as_ref().map_or(0, |money| money.amount);
                let refund =
                    (!message.refund_id.is_empty()).then(|| (message.refund_id.clone(), amount));
                Ok(ack(&reply, id.clone(), message.status, refund))
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Task {
    driver: Arc<Driver>,
    client: Client,
    name: String,
    timing: Timing,
    chance: Chance,
    /// Payments that only this task reads, one read after the other.
    own: Vec<String>,
    calls: u64,
}

impl Task {
    async fn run(mut self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let result = match self.chance.below(100) {
                0..60 => self.create().await,
                60..80 => self.process().await,
                80..90 => self.replay().await,
                90..95 => self.reuse().await,
                _ => self.cancel().await,
            };
            if result.is_err_and(|status| is_lost(&status)) {
                tokio::time::sleep(DOWN_PAUSE).await;
            }
            if self.chance.percent(15) {
                self.read().await;
            }
        }
    }

    async fn send(&self, key: &str, call: &Call) -> Result<Ack, Status> {
        self.driver.known().sent.push((key.to_owned(), call.clone()));
        self.driver.send(self.client.clone(), key, call, self.timing).await
    }

    fn key(&mut self) -> String {
        self.calls += 1;
        format!("k-{}-{}", self.name, self.calls)
    }

    async fn create(&mut self) -> Result<(), Status> {
        let key = self.key();
        let scenarios = [
            PaymentScenario::Delay,
            PaymentScenario::Delay,
            PaymentScenario::Delay,
            PaymentScenario::Approve,
            PaymentScenario::Approve,
            PaymentScenario::Random,
            PaymentScenario::Fail,
            PaymentScenario::Timeout,
            PaymentScenario::Manual,
        ];
        let call = Call::Create(Create {
            user: format!("u-{}", self.name),
            amount: i64::try_from(self.chance.between(1, 1_000_000)).expect("small"),
            method: *self.chance.pick(&[PaymentMethod::CreditCard, PaymentMethod::MobilePay])
                as i32,
            scenario: *self.chance.pick(&scenarios) as i32,
            webhook_url: self.chance.pick(&self.driver.urls).clone(),
        });
        let ack = self.send(&key, &call).await?;
        self.own.push(ack.id);
        Ok(())
    }

    async fn process(&mut self) -> Result<(), Status> {
        let Some(id) = pick(&mut self.chance, &self.driver.known().payments) else {
            return Ok(());
        };
        let key = self.key();
        self.send(&key, &Call::Process { id }).await.map(drop)
    }

    async fn cancel(&mut self) -> Result<(), Status> {
        let Some(id) = pick(&mut self.chance, &self.driver.known().payments) else {
            return Ok(());
        };
        let key = self.key();
        let part = i64::try_from(self.chance.between(1, 300_000)).expect("small");
        let amount = self.chance.percent(60).then_some(part);
        self.send(&key, &Call::Cancel { id, amount }).await.map(drop)
    }

    async fn replay(&mut self) -> Result<(), Status> {
        let Some((key, call)) = pick(&mut self.chance, &self.driver.known().sent) else {
            return Ok(());
        };
        self.driver.send(self.client.clone(), &key, &call, self.timing).await.map(drop)
    }

    async fn reuse(&mut self) -> Result<(), Status> {
        let Some((key, call)) = pick(&mut self.chance, &self.driver.known().acked) else {
            return Ok(());
        };
        let other = match call {
            Call::Create(create) => Call::Create(Create { amount: create.amount + 1, ..create }),
            Call::Cancel { id, amount } => {
                Call::Cancel { id, amount: Some(amount.map_or(1, |amount| amount + 1)) }
            }
            Call::Process { .. } => return Ok(()),
        };
        let result = self.driver.perform(self.client.clone(), &key, &other).await;
        let code = match &result {
            Ok(_) => Code::Ok,
            Err(status) if is_lost(status) => return result.map(drop),
            Err(status) => status.code(),
        };
        let at = SystemClock.now_ms();
        self.driver.journal.write(&Record::Reused { at, key, code: code.into() }).await;
        Ok(())
    }

    async fn read(&mut self) {
        let Some(id) = pick(&mut self.chance, &self.own) else { return };
        let request =
            GetPaymentIntentRequest { payment_intent_id: id.clone(), ..Default::default() };
        let Ok(reply) = self.client.get_payment_intent(request).await else { return };
        let payment = reply.into_inner().payment.expect("a reply has a payment");
        let at = SystemClock.now_ms();
        let read = Record::Read { at, id, version: payment.version, status: payment.status };
        self.driver.journal.write(&read).await;
    }
}

/// Mostly one of the last: those are still on their way.
fn pick<T: Clone>(chance: &mut Chance, from: &[T]) -> Option<T> {
    if from.is_empty() {
        return None;
    }
    let recent = &from[from.len().saturating_sub(100)..];
    let from = if chance.percent(70) { recent } else { from };
    Some(chance.pick(from).clone())
}

pub fn create_request(key: &str, create: &Create) -> CreatePaymentIntentRequest {
    CreatePaymentIntentRequest {
        reservation_id: key.to_owned(),
        user_id: create.user.clone(),
        amount: Some(money(create.amount)),
        method: create.method,
        scenario: create.scenario,
        webhook_url: create.webhook_url.clone(),
        idempotency_key: key.to_owned(),
        metadata: Some(PaymentMetadata {
            source: "crash".to_owned(),
            tags: [("key".to_owned(), key.to_owned())].into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn money(amount: i64) -> Money {
    Money { amount, currency: CURRENCY.to_owned() }
}

fn ack<T: Message>(
    reply: &Response<T>,
    id: String,
    status: i32,
    refund: Option<(String, i64)>,
) -> Ack {
    Ack {
        id,
        hash: hex::encode(Sha256::digest(reply.get_ref().encode_to_vec())),
        status,
        replayed: reply.metadata().get("idempotent-replayed").is_some(),
        refund,
    }
}

/// Whether the call may have run or not: it broke off, ran out of time, or was turned away while the
/// service was going or coming.
fn is_lost(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
        || matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded)
}

/// What the driver's journal says, by key.
#[derive(Default)]
pub struct Story {
    pub sends: HashMap<String, (Call, Vec<(i64, Timing)>)>,
    pub acks: HashMap<String, Vec<Ack>>,
    pub refused: Vec<(String, Code, String)>,
    pub reused: Vec<(String, Code)>,
    pub reads: Vec<(String, i64, i32)>,
}

impl Story {
    pub fn of(records: Vec<Record>) -> Self {
        let mut story = Self::default();
        for record in records {
            match record {
                Record::Send { at, key, call, timing } => {
                    story.sends.entry(key).or_insert((call, Vec::new())).1.push((at, timing));
                }
                Record::Ack { key, ack, .. } => story.acks.entry(key).or_default().push(ack),
                Record::Refused { key, code, message, .. } => {
                    story.refused.push((key, code.into(), message));
                }
                Record::Lost { .. } => {}
                Record::Reused { key, code, .. } => story.reused.push((key, code.into())),
                Record::Read { id, version, status, .. } => story.reads.push((id, version, status)),
            }
        }
        story
    }
}
