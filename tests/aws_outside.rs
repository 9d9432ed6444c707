//! The binary as a process, and boto3 as the consumer, on both sides of the fake AWS: neither shares a
//! line with it. The consumer needs `PAYMENT_SIM_VENV`.

#[path = "support/fake_aws/mod.rs"]
mod fake_aws;
#[path = "support/moto.rs"]
mod moto;
mod support;

use std::{process::Command, time::Duration};

use fake_aws::{FakeAws, Fault, Options};
use payment_sim::{
    api::pb::{
        common::v1::Money,
        payment::v1::{CreatePaymentIntentRequest, PaymentScenario},
    },
    clock::SystemClock,
};
use serde_json::Value;
use support::{client, process::Launch, until};

const BUS: &str = "ticket-reservation-events";
const SOON: Duration = Duration::from_secs(30);
const PAYMENTS: usize = 25;

/// In a thread that may wait: the fake answers on this runtime.
async fn bed(venv: &str, args: Vec<String>) -> Value {
    let python = format!("{venv}/bin/python");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/py/aws_bed.py");
    let run = move || Command::new(python).arg(script).args(args).output().unwrap();
    let done = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

/// Which payments events are of, each once: a lost reply makes a second event.
fn payments(bodies: &[String]) -> Vec<String> {
    let payment = |body: &String| {
        let event: Value = serde_json::from_str(body).unwrap();
        event["detail"]["payment_intent_id"].as_str().unwrap().to_owned()
    };
    let mut payments: Vec<_> = bodies.iter().map(payment).collect();
    payments.sort();
    payments.dedup();
    payments
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_payment_of_the_binary_reaches_boto3_through_throttling_and_lost_replies() {
    let Some(venv) = moto::venv() else { return };
    let fake = FakeAws::start(Options::new(SystemClock)).await;
    let made = bed(&venv, vec!["setup".into(), fake.url.clone(), BUS.into()]).await;
    let queue_url = made["queue_url"].as_str().unwrap().to_owned();
    let faults = [Fault::throttle(), Fault::CutAfter, Fault::entry(0, "InternalFailure")];
    fake.order("PutEvents", faults);

    let folder = tempfile::tempdir().unwrap();
    let launch = Launch::new(folder.path())
        .with("EVENT_SINK", "eventbridge")
        .with("EVENT_BUS_NAME", BUS)
        .with("AWS_ENDPOINT_URL", &fake.url)
        .with("AWS_ACCESS_KEY_ID", "test")
        .with("AWS_SECRET_ACCESS_KEY", "test")
        .with("DEFAULT_DELAY_MS", 0);
    let mut service = launch.start();
    service.ready(SOON).await.unwrap();
    let mut expected = Vec::new();
    for n in 0..PAYMENTS {
        let request = CreatePaymentIntentRequest {
            reservation_id: format!("reservation-{n}"),
            user_id: "user".into(),
            amount: Some(Money { amount: 1_000, currency: "KRW".into() }),
            scenario: PaymentScenario::Approve.into(),
            ..Default::default()
        };
        let reply = client(launch.grpc_port).create_payment_intent(request).await.unwrap();
        expected.push(reply.into_inner().payment_intent_id);
    }
    expected.sort();
    let queue = format!("{BUS}-queue");
    let all_arrived = || async { payments(&fake.bodies(&queue)) == expected };
    assert!(until(SOON, all_arrived).await, "{:#?}", fake.bodies(&queue));
    let at_least = fake.bodies(&queue).len().to_string();
    let bodies = bed(&venv, vec!["receive".into(), fake.url.clone(), queue_url, at_least]).await;
    let bodies: Vec<_> = bodies.as_array().unwrap().iter().map(Value::to_string).collect();
    assert_eq!(payments(&bodies), expected);
    service.terminate();
    assert!(service.exits(SOON).await.is_some_and(|status| status.success()));
}
