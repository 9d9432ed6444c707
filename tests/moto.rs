//! EventBridge against moto, an AWS in Python: bus, rule, SQS target; what is published arrives where the
//! pattern says. Needs `PAYMENT_SIM_VENV`, a venv with moto[server,events,sqs] and boto3.

#[path = "support/moto.rs"]
mod moto;

use std::process::Command;

use aws_sdk_eventbridge::config::{Credentials, SharedCredentialsProvider};
use moto::Moto;
use payment_sim::{
    courier::{
        Courier, EventBridgeCourier, Parcel,
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

const BUS: &str = "ticket-reservation-events";
const NOW: Timestamp = Timestamp::from_ms(1_767_225_600_250);

fn bed(venv: &str, args: &[&str]) -> Value {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/py/aws_bed.py");
    let done = Command::new(format!("{venv}/bin/python")).arg(script).args(args).output().unwrap();
    assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

fn parcel(n: u32, topic: Topic) -> Parcel {
    let payment = PaymentId::from_parts(NOW, 7);
    let event_id = payment.event(n);
    let body =
        format!("{{\"event_id\":\"{event_id}\",\"status\":\"PAYMENT_STATUS_COMPLETED\"}}").into();
    let trace = Trace { trace_id: [1; 16], parent_span: [2; 8], sampled: true };
    Parcel { payment, n, event_id, topic, at: NOW, url: None, body, trace, death: None }
}

async fn courier(endpoint: &str, bus: &str) -> EventBridgeCourier {
    let settings = AwsSettings {
        region: Some("ap-northeast-2".into()),
        endpoint_url: Some(endpoint.to_owned()),
        ..AwsSettings::default()
    };
    let dummy =
        SharedCredentialsProvider::new(Credentials::new("test", "test", None, None, "test"));
    let config =
        aws::sdk_config(&settings).await.into_builder().credentials_provider(dummy).build();
    EventBridgeCourier::new(&config, bus.to_owned(), "payment-sim-api".to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_pattern_asks_for_arrives_in_the_queue() {
    let Some(venv) = moto::venv() else { return };
    let moto = Moto::start(&venv);
    let endpoint = moto.endpoint();
    let made = bed(&venv, &["setup", &endpoint, BUS]);
    let queue_url = made["queue_url"].as_str().unwrap();

    let batch = [
        parcel(1, Topic::RefundUpdated),
        parcel(2, Topic::StatusUpdated),
        parcel(3, Topic::StatusUpdated),
    ];
    let done = courier(&endpoint, BUS).await.attempt(&batch, NOW).await;
    assert!(done.iter().all(|d| d.verdict == Verdict::Accepted), "{done:?}");

    let mut messages = bed(&venv, &["receive", &endpoint, queue_url, "2"]);
    let messages = messages.as_array_mut().unwrap();
    messages.sort_by_key(|m| m["detail"]["event_id"].to_string());
    assert_eq!(messages.len(), 2, "two statuses, and not the refund: {messages:?}");
    for (message, sent) in messages.iter().zip(&batch[1..]) {
        assert_eq!(message["detail"], serde_json::from_slice::<Value>(&sent.body).unwrap());
        assert_eq!(message["detail-type"], "Payment Status Updated");
        assert_eq!(message["source"], "payment-sim-api");
        assert_eq!(message["time"], "2026-01-01T00:00:00Z");
    }

    // moto says what AWS does not: there is no such bus. It may be made later.
    let done = courier(&endpoint, "no-such-bus").await.attempt(&batch[1..], NOW).await;
    assert!(done.iter().all(|d| d.verdict == Verdict::Unavailable), "{done:?}");
}
