//! Queues against moto, an AWS in Python: events straight to one look as if a rule of EventBridge had
//! brought them, dead letters carry their story, and a start sees what is missing. Needs
//! `PAYMENT_SIM_VENV`, a venv with moto[server,events,sqs] and boto3.

#[path = "support/moto.rs"]
mod moto;
mod support;

use std::{collections::BTreeMap, net::TcpListener, path::Path, process::Command, time::Duration};

use aws_config::SdkConfig;
use aws_sdk_sqs::{
    Client as Sqs,
    config::{Credentials, SharedCredentialsProvider},
    types::Message,
};
use moto::Moto;
use payment_sim::{
    api::pb::{
        common::v1::Money,
        payment::v1::{CreatePaymentIntentRequest, PaymentScenario},
    },
    courier::{
        Courier, DeadLetterCourier, Death, EventBridgeCourier, Parcel, SqsCourier,
        aws::{self, AwsSettings},
    },
    domain::{
        delivery::{Topic, Verdict},
        ids::PaymentId,
        payment::Trace,
        time::Timestamp,
    },
};
use serde_json::Value;
use support::process::Launch;

const BUS: &str = "ticket-reservation-events";
const SOURCE: &str = "payment-sim-api";
/// As `scripts/aws_setup.py` names it.
const QUEUE: &str = "traffic-tacos-payment-webhooks";
const REGION: &str = "ap-northeast-2";
const NOW: Timestamp = Timestamp::from_ms(1_767_225_600_250);
const READY_WITHIN: Duration = Duration::from_secs(30);
const EX_UNAVAILABLE: i32 = 69;

fn set_up(venv: &str, moto: &Moto) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/aws_setup.py");
    let done = Command::new(format!("{venv}/bin/python"))
        .args([script, "setup"])
        .envs(credentials())
        .env("AWS_ENDPOINT_URL", moto.endpoint())
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

fn credentials() -> [(&'static str, &'static str); 3] {
    [
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ]
}

async fn config(endpoint: String) -> SdkConfig {
    let settings = AwsSettings {
        region: Some(REGION.into()),
        endpoint_url: Some(endpoint),
        ..AwsSettings::default()
    };
    let dummy =
        SharedCredentialsProvider::new(Credentials::new("test", "test", None, None, "test"));
    aws::sdk_config(&settings).await.into_builder().credentials_provider(dummy).build()
}

async fn queue(sqs: &Sqs, name: &str) -> String {
    sqs.create_queue().queue_name(name).send().await.unwrap().queue_url.unwrap()
}

/// The next message, which is waited for.
async fn next(sqs: &Sqs, url: &str) -> Message {
    // moto answers a long poll when a message comes, and as AWS does within 20 s.
    let call = sqs.receive_message().queue_url(url).wait_time_seconds(4);
    let call = call.message_attribute_names("All");
    for _ in 0..5 {
        let received = call.clone().send().await.unwrap();
        if let Some(message) = received.messages.unwrap_or_default().pop() {
            let handle = message.receipt_handle().unwrap();
            sqs.delete_message().queue_url(url).receipt_handle(handle).send().await.unwrap();
            return message;
        }
    }
    panic!("nothing came to {url}");
}

fn envelope(message: &Message) -> BTreeMap<String, Value> {
    serde_json::from_str(message.body().unwrap()).unwrap()
}

fn parcel(n: u32) -> Parcel {
    let payment = PaymentId::from_parts(NOW, 7);
    let event_id = payment.event(n);
    let body = format!("{{\"event_id\":\"{event_id}\",\"amount\":100,\"echo\":null}}").into();
    let trace = Trace { trace_id: [1; 16], parent_span: [2; 8], sampled: true };
    let topic = Topic::StatusUpdated;
    Parcel { payment, n, event_id, topic, at: NOW, url: None, body, trace, death: None }
}

fn launch(folder: &Path, endpoint: &str) -> Launch {
    let launch = Launch::new(folder).with("AWS_ENDPOINT_URL", endpoint).with("DEFAULT_DELAY_MS", 0);
    credentials().into_iter().fold(launch, |launch, (name, value)| launch.with(name, value))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_sent_straight_is_the_one_that_a_rule_would_bring() {
    let Some(venv) = moto::venv() else { return };
    let moto = Moto::start(&venv);
    set_up(&venv, &moto);
    let config = config(moto.endpoint()).await;
    let sqs = Sqs::new(&config);
    let (routed, straight) = (queue(&sqs, QUEUE).await, queue(&sqs, "straight").await);

    let rule = EventBridgeCourier::new(&config, BUS.into(), SOURCE.into());
    let ours = SqsCourier::new(&config, straight.clone(), SOURCE.into());
    for courier in [&rule as &dyn Courier, &ours] {
        let done = courier.attempt(&[parcel(1)], NOW).await;
        assert_eq!(done[0].verdict, Verdict::Accepted, "{done:?}");
    }
    let mut theirs = envelope(&next(&sqs, &routed).await);
    let mut ours = envelope(&next(&sqs, &straight).await);
    let (their_id, our_id) = (theirs.remove("id").unwrap(), ours.remove("id").unwrap());
    let form = |id: &Value| id.as_str().unwrap().split('-').map(str::len).collect::<Vec<_>>();
    assert_eq!(form(&their_id), form(&our_id));
    // AWS says it, moto doesn't.
    assert_eq!(ours.remove("account").unwrap(), "123456789012");
    theirs.remove("account");
    assert_eq!(theirs, ours);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fifo_queue_drops_the_repeat_of_an_event() {
    let Some(venv) = moto::venv() else { return };
    let moto = Moto::start(&venv);
    let config = config(moto.endpoint()).await;
    let sqs = Sqs::new(&config);
    let fifo = sqs.create_queue().queue_name("straight.fifo");
    let fifo = fifo.attributes(aws_sdk_sqs::types::QueueAttributeName::FifoQueue, "true");
    let url = fifo.send().await.unwrap().queue_url.unwrap();
    let courier = SqsCourier::new(&config, url.clone(), SOURCE.into());
    for n in [1, 1, 2] {
        let done = courier.attempt(&[parcel(n)], NOW).await;
        assert_eq!(done[0].verdict, Verdict::Accepted, "{done:?}");
    }
    for n in [1, 2] {
        assert_eq!(envelope(&next(&sqs, &url).await)["detail"]["event_id"], parcel(n).event_id);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_arrives_with_its_body_and_story() {
    let Some(venv) = moto::venv() else { return };
    let moto = Moto::start(&venv);
    let config = config(moto.endpoint()).await;
    let sqs = Sqs::new(&config);
    let url = queue(&sqs, "dead").await;
    let death = Death { at: NOW, why: "HTTP 500".into(), attempts_made: 10 };
    let hook = "http://receiver.test/hook?a=1&b=%20".to_owned();
    let letter = Parcel { death: Some(death), url: Some(hook.clone()), ..parcel(1) };
    let courier = DeadLetterCourier::new(&config, url.clone());
    let done = courier.attempt(std::slice::from_ref(&letter), NOW).await;
    assert_eq!(done[0].verdict, Verdict::Accepted, "{done:?}");

    let message = next(&sqs, &url).await;
    assert_eq!(message.body().unwrap().as_bytes(), &letter.body[..]);
    let attributes = message.message_attributes().unwrap().iter();
    let attributes: BTreeMap<_, _> =
        attributes.map(|(name, value)| (&**name, value.string_value().unwrap())).collect();
    let expected = [
        ("attempts", "10"),
        ("died_at", "2026-01-01T00:00:00.25Z"),
        ("event_id", &*letter.event_id),
        ("event_type", "payment.status_updated"),
        ("reason", "HTTP 500"),
        ("webhook_url", &*hook),
    ];
    assert_eq!(attributes, expected.into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_binary_checks_its_queue_and_sends_there() {
    let Some(venv) = moto::venv() else { return };
    let moto = Moto::start(&venv);
    let sqs = Sqs::new(&config(moto.endpoint()).await);
    let url = queue(&sqs, "straight").await;
    let folder = tempfile::tempdir().unwrap();
    let launch = launch(folder.path(), &moto.endpoint())
        .with("EVENT_SINK", "sqs")
        .with("EVENT_STARTUP_CHECK", "require")
        .with("PAYMENT_WEBHOOK_QUEUE_URL", &url);
    let mut service = launch.start();
    service.ready(READY_WITHIN).await.unwrap();
    let request = CreatePaymentIntentRequest {
        reservation_id: "r-1".into(),
        user_id: "u-1".into(),
        amount: Some(Money { amount: 1_000, currency: "KRW".into() }),
        scenario: PaymentScenario::Approve.into(),
        ..Default::default()
    };
    let created = support::client(launch.grpc_port).create_payment_intent(request).await.unwrap();

    let envelope = envelope(&next(&sqs, &url).await);
    let id = created.into_inner().payment_intent_id;
    assert_eq!(envelope["detail"]["payment_intent_id"], id);
    assert_eq!(envelope["detail"]["status"], "PAYMENT_STATUS_COMPLETED");
    assert_eq!(envelope["source"], SOURCE);
    service.terminate();
    assert_eq!(service.exits(READY_WITHIN).await.unwrap().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_missing_ends_a_start_that_requires_it_until_it_is_set_up() {
    let Some(venv) = moto::venv() else { return };
    let moto = Moto::start(&venv);
    let folder = tempfile::tempdir().unwrap();
    let launch = launch(folder.path(), &moto.endpoint())
        .with("EVENT_SINK", "eventbridge")
        .with("PAYMENT_WEBHOOK_DLQ_URL", format!("{}/123456789012/dead", moto.endpoint()));
    let strict = launch.clone().with("EVENT_STARTUP_CHECK", "require");
    assert_eq!(strict.start().exits(READY_WITHIN).await.unwrap().code(), Some(EX_UNAVAILABLE));
    let log = std::fs::read_to_string(launch.log()).unwrap();
    for said in [
        format!("the bus {BUS} does not exist"),
        "/dead (PAYMENT_WEBHOOK_DLQ_URL) does not exist".to_owned(),
    ] {
        assert!(log.contains(&said), "{said}: {log}");
    }
    assert!(!folder.path().join("data").exists(), "it ended before it opened a store");

    set_up(&venv, &moto);
    let strict = strict.without("PAYMENT_WEBHOOK_DLQ_URL");
    let mut service = strict.start();
    service.ready(READY_WITHIN).await.unwrap();
}

/// No moto: what is connected to here never answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aws_that_cannot_be_reached_is_a_warning_beside_a_start_unless_it_is_required() {
    let unused = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", unused.local_addr().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let launch = launch(folder.path(), &endpoint)
        .with("EVENT_SINK", "eventbridge")
        .with("LOG_LEVEL", "info");
    let mut service = launch.start();
    service.ready(READY_WITHIN).await.unwrap();
    let log = || std::fs::read_to_string(launch.log()).unwrap();
    let warning = format!("the bus {BUS} could not be looked at: TIMEOUT");
    assert!(support::until(READY_WITHIN, || async { log().contains(&warning) }).await, "{}", log());
    assert!(log().find(" ready ") < log().find(&warning), "the start waited: {}", log());
    service.kill();

    let mut strict = launch.clone().with("EVENT_STARTUP_CHECK", "require").start();
    assert_eq!(strict.exits(READY_WITHIN).await.unwrap().code(), Some(EX_UNAVAILABLE));
    let mut off = launch.with("EVENT_STARTUP_CHECK", "off").start();
    off.ready(READY_WITHIN).await.unwrap();
}
