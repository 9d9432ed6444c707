//! SIGTERM under load: what was acknowledged is there afterwards, callers see nothing that they may not
//! simply send again, and the process ends by itself, whoever is still connected.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    io::Read,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use payment_sim::{
    api::pb::{
        common::v1::Money,
        payment::v1::{
            CreatePaymentIntentRequest, GetPaymentIntentRequest, ListPaymentsRequest,
            PaymentScenario,
        },
    },
    clock::Stopwatch,
};
use support::{
    Client, client,
    process::{Launch, Service},
    until,
};
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

const CALLERS: usize = 32;
const CONNECTIONS: usize = 4;
const SILENT_CLIENTS: usize = 20;
const HALF_PREFACE_CLIENTS: usize = 5;
/// Load that has run before the signal.
const ACKS_BEFORE: u64 = 300;
const READY_WITHIN: Duration = Duration::from_secs(30);
const ENDS_WITHIN: Duration = Duration::from_secs(30);
const LOAD_WITHIN: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_and_the_process_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let launch = Launch::new(folder.path()).with("DRAIN_DELAY_MS", 200);
    let mut service = start(&launch).await;
    let callers = Callers::start(launch.grpc_port);
    let acks = || callers.shared.acks.load(Ordering::Relaxed);
    assert!(until(LOAD_WITHIN, || async { acks() >= ACKS_BEFORE }).await, "{} acks", acks());
    let _idle = clients_that_do_nothing(launch.grpc_port).await;

    let watch = Stopwatch::start();
    service.terminate();
    let status = service.exits(ENDS_WITHIN).await;
    let took = watch.elapsed();
    let calls = callers.stop().await;
    let status = status.unwrap_or_else(|| panic!("still running after {took:?}"));
    assert!(status.success(), "{status}\n{}", log(&launch));
    assert!(took < ENDS_WITHIN, "{took:?}");
    assert_eq!(calls.refused, Vec::<String>::new(), "not to be sent again");

    let _service = start(&launch).await;
    let client = client(launch.grpc_port);
    all_acknowledged_are_stored(client.clone(), &calls.acked).await;
    the_rest_can_be_sent_again(client, &calls).await;
}

fn log(launch: &Launch) -> String {
    std::fs::read_to_string(launch.log()).unwrap_or_default()
}

async fn start(launch: &Launch) -> Service {
    let mut service = launch.start();
    let mut events = service.stdout();
    // A thread of its own, which ends with the pipe.
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while events.read(&mut buffer).is_ok_and(|count| count > 0) {}
    });
    service.ready(READY_WITHIN).await.unwrap_or_else(|why| panic!("{why}\n{}", log(launch)));
    service
}

/// Connected, and silent or stuck in the middle of the preface.
async fn clients_that_do_nothing(port: u16) -> Vec<TcpStream> {
    let mut clients = Vec::new();
    for n in 0..SILENT_CLIENTS + HALF_PREFACE_CLIENTS {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("a connection");
        if n >= SILENT_CLIENTS {
            stream.write_all(b"PRI * HTTP/2.0\r\n").await.expect("half a preface");
        }
        clients.push(stream);
    }
    clients
}

/// What the callers did, by key.
#[derive(Default)]
struct Calls {
    /// With the payment that they made.
    acked: BTreeMap<String, String>,
    /// Broken off, or turned away by a service that is going: may be sent again.
    open: BTreeSet<String>,
    refused: Vec<String>,
}

#[derive(Default)]
struct Shared {
    acks: AtomicU64,
    calls: Mutex<Calls>,
}

impl Shared {
    /// Whether it is acknowledged.
    fn note(&self, key: String, reply: Result<String, Status>) -> bool {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        match reply {
            Ok(id) => {
                self.acks.fetch_add(1, Ordering::Relaxed);
                calls.open.remove(&key);
                calls.acked.insert(key, id);
                return true;
            }
            Err(status) if may_be_sent_again(&status) => drop(calls.open.insert(key)),
            Err(status) => calls.refused.push(format!("{key}: {status:?}")),
        }
        false
    }
}

/// UNAVAILABLE, or a request that never ran: hyper's client had not sent it when its connection closed,
/// or it came after the stream that GOAWAY names as the last. tonic has other codes for these.
fn may_be_sent_again(status: &Status) -> bool {
    let mut causes = std::iter::successors(status.source(), |&error| error.source());
    let never_ran = causes.any(|error| {
        let unsent = error.downcast_ref::<hyper::Error>().is_some_and(|error| error.is_canceled());
        let after_goaway = error.downcast_ref::<h2::Error>().is_some_and(|error| {
            error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR)
        });
        unsent || after_goaway
    });
    status.code() == Code::Unavailable || never_ran
}

struct Callers {
    shared: Arc<Shared>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Callers {
    fn start(port: u16) -> Self {
        let (shared, stop) = (Arc::<Shared>::default(), CancellationToken::new());
        let clients: Vec<Client> = (0..CONNECTIONS).map(|_| client(port)).collect();
        let mut tasks = JoinSet::new();
        for n in 0..CALLERS {
            let client = clients[n % CONNECTIONS].clone();
            tasks.spawn(call_until_it_is_gone(client, n, Arc::clone(&shared), stop.clone()));
        }
        Self { shared, stop, tasks }
    }

    async fn stop(self) -> Calls {
        self.stop.cancel();
        self.tasks.join_all().await;
        std::mem::take(&mut *self.shared.calls.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Creates without a pause, each until it is acknowledged: a service that is draining must not refuse
/// for good, however often it is asked.
async fn call_until_it_is_gone(
    client: Client,
    task: usize,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    let mut n = 0;
    while !stop.is_cancelled() {
        let key = format!("sigterm-{task}-{n}");
        if shared.note(key.clone(), create(client.clone(), &key).await) {
            n += 1;
        } else {
            // It is going: asking faster shows no more.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn create(mut client: Client, key: &str) -> Result<String, Status> {
    let request = CreatePaymentIntentRequest {
        reservation_id: key.to_owned(),
        user_id: "sigterm".to_owned(),
        amount: Some(Money { amount: 1_000, currency: "KRW".to_owned() }),
        scenario: PaymentScenario::Approve as i32,
        idempotency_key: key.to_owned(),
        ..Default::default()
    };
    let reply = client.create_payment_intent(request).await?;
    Ok(reply.into_inner().payment_intent_id)
}

async fn all_acknowledged_are_stored(mut client: Client, acked: &BTreeMap<String, String>) {
    assert!(acked.len() as u64 >= ACKS_BEFORE);
    for (key, id) in acked {
        let request =
            GetPaymentIntentRequest { payment_intent_id: id.clone(), ..Default::default() };
        let reply = client.get_payment_intent(request).await;
        let reply = reply.unwrap_or_else(|status| panic!("{key} {id} is lost: {status}"));
        let payment = reply.into_inner().payment.expect("a payment");
        assert_eq!(payment.reservation_id, *key);
    }
}

/// Each then has one payment, whether the first sending had made it or not.
async fn the_rest_can_be_sent_again(mut client: Client, calls: &Calls) {
    for key in &calls.open {
        let id = create(client.clone(), key).await.unwrap_or_else(|e| panic!("{key}: {e}"));
        let request = ListPaymentsRequest { reservation_id: key.clone(), ..Default::default() };
        let page = client.list_payments(request).await.expect("a list").into_inner();
        let ids: Vec<_> = page.payments.iter().map(|p| p.payment_intent_id.as_str()).collect();
        assert_eq!(ids, [id.as_str()], "{key}");
    }
}
