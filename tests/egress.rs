//! Where the process connects to for webhooks, seen from outside: addresses, proxies, traces.

mod support;

use std::{
    fs,
    net::TcpListener,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use payment_sim::api::pb::{
    common::v1::Money,
    payment::v1::{CreatePaymentIntentRequest, Delivery, GetPaymentIntentRequest, PaymentScenario},
};
use support::{
    Client, client,
    process::{Launch, Service},
    receiver::Receiver,
    until,
};
use tonic::Request;

const SOON: Duration = Duration::from_secs(30);
const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLERS_SPAN: &str = "00f067aa0ba902b7";

/// The service and a receiver on loopback, which keeps the `traceparent`s.
struct Bed {
    launch: Launch,
    _service: Service,
    receiver: Receiver,
    traces: Arc<Mutex<Vec<String>>>,
    _folder: tempfile::TempDir,
}

impl Bed {
    async fn start(settings: impl FnOnce(Launch) -> Launch) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let launch = Launch::new(folder.path())
            .with("DEFAULT_DELAY_MS", 0)
            .with("WEBHOOK_BACKOFF_BASE_MS", 1)
            .with("EVENT_SINK", "none");
        let launch = settings(launch);
        let mut service = launch.start();
        service.ready(SOON).await.unwrap_or_else(|why| {
            panic!("{why}: {}", fs::read_to_string(launch.log()).unwrap_or_default())
        });
        let traces = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&traces);
        let receiver = Receiver::start(Arc::new(move |request| {
            let trace = request.headers()["traceparent"].to_str().expect("ASCII").to_owned();
            noted.lock().unwrap_or_else(PoisonError::into_inner).push(trace);
            Box::pin(async { Some(204) })
        }))
        .await;
        Self { launch, _service: service, receiver, traces, _folder: folder }
    }

    fn client(&self) -> Client {
        client(self.launch.grpc_port)
    }

    /// A payment's webhook once nothing more will be tried.
    async fn told(&self, webhook_url: &str) -> Delivery {
        let mut client = self.client();
        let mut create = Request::new(CreatePaymentIntentRequest {
            reservation_id: "r".to_owned(),
            user_id: "u".to_owned(),
            amount: Some(Money { amount: 1_000, currency: "KRW".to_owned() }),
            scenario: PaymentScenario::Approve.into(),
            webhook_url: webhook_url.to_owned(),
            ..Default::default()
        });
        let trace = format!("00-{TRACE_ID}-{CALLERS_SPAN}-01");
        create.metadata_mut().insert("traceparent", trace.parse().expect("ASCII"));
        let created = client.create_payment_intent(create).await.expect("created").into_inner();
        let last = Mutex::new(None);
        let is_over = || async {
            let payment_intent_id = created.payment_intent_id.clone();
            let request = GetPaymentIntentRequest { payment_intent_id, ..Default::default() };
            let reply = self.client().get_payment_intent(request).await.expect("it is there");
            let mut deliveries = reply.into_inner().deliveries.into_iter();
            let webhook = deliveries.find(|delivery| delivery.channel == "webhook").expect("one");
            let is_over = webhook.state != "OWED";
            *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(webhook);
            is_over
        };
        assert!(until(SOON, is_over).await, "{webhook_url}: still owed");
        last.into_inner().unwrap_or_else(PoisonError::into_inner).expect("a webhook")
    }

    fn traces(&self) -> Vec<String> {
        self.traces.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn in_production(launch: Launch) -> Launch {
    launch
        .with("ENVIRONMENT", "production")
        .with("BIND_ADDRESS", "127.0.0.1")
        .with("WEBHOOK_SECRET", "of our own")
}

#[track_caller]
fn assert_refused(delivery: &Delivery) {
    let errors: Vec<&str> = delivery.attempts.iter().map(|a| a.error.as_str()).collect();
    assert_eq!(
        (delivery.state.as_str(), errors),
        ("DEAD", vec!["ADDRESS_REFUSED"]),
        "{delivery:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_production_an_address_inside_is_dead_at_once_and_never_called() {
    let bed = Bed::start(in_production).await;
    let port = bed.receiver.port;
    for host in ["127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]", "2130706433"] {
        assert_refused(&bed.told(&format!("http://{host}:{port}/webhooks")).await);
    }
    for url in
        ["http://169.254.169.254/latest/meta-data/", "https://10.0.0.1/", "http://[fe80::1]/"]
    {
        assert_refused(&bed.told(url).await);
    }
    assert_eq!(bed.traces(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_allowed_is_called_by_its_name_alone() {
    let bed = Bed::start(|l| in_production(l).with("WEBHOOK_ALLOW_HOSTS", "localhost")).await;
    let port = bed.receiver.port;
    let allowed = bed.told(&format!("http://LOCALHOST:{port}/webhooks")).await;
    assert_eq!(allowed.state, "DELIVERED", "{allowed:?}");
    assert_refused(&bed.told(&format!("http://127.0.0.1:{port}/webhooks")).await);
    assert_eq!(bed.traces().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_development_loopback_is_allowed_and_no_proxy_is_asked() {
    let proxy = TcpListener::bind("127.0.0.1:0").expect("a port");
    proxy.set_nonblocking(true).expect("set");
    let url = format!("http://{}", proxy.local_addr().expect("its address"));
    let bed = Bed::start(|mut launch| {
        for name in
            ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"]
        {
            launch = launch.with(name, &url);
        }
        launch
    })
    .await;
    let told = bed.told(&bed.receiver.url()).await;
    assert_eq!(told.state, "DELIVERED", "{told:?}");
    assert_refused(&bed.told("http://10.0.0.1/").await);
    assert!(proxy.accept().is_err(), "the proxy was asked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_webhook_carries_the_trace_of_the_request_that_made_the_payment() {
    let bed = Bed::start(|launch| launch).await;
    bed.told(&bed.receiver.url()).await;
    let traces = bed.traces();
    let [trace] = &traces[..] else { panic!("{traces:?}") };
    let parts: Vec<&str> = trace.split('-').collect();
    assert_eq!((parts.len(), parts[0], parts[1], parts[3]), (4, "00", TRACE_ID, "01"), "{trace}");
    assert!(parts[2].len() == 16 && parts[2] != CALLERS_SPAN, "a span of its own: {trace}");
}
