//! EventBridge against moto, an AWS in Python: bus, rule, SQS target; what is published arrives where the
//! pattern says. Needs `PAYMENT_SIM_VENV`, a venv with moto[server,events,sqs] and boto3.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use aws_sdk_eventbridge::config::{Credentials, SharedCredentialsProvider};
use payment_sim::{
    clock::Stopwatch,
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
const READY_WITHIN: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// Another process may take a free port before moto does.
const PORTS_TRIED: usize = 3;

struct Moto {
    process: Child,
    addr: SocketAddr,
}

impl Drop for Moto {
    fn drop(&mut self) {
        self.process.kill().expect("it is our child, and not waited for yet");
        self.process.wait().expect("a killed child can be waited for");
    }
}

impl Moto {
    fn start(venv: &str) -> Self {
        (0..PORTS_TRIED).find_map(|_| Self::try_start(venv)).expect("moto came up on no port")
    }

    fn try_start(venv: &str) -> Option<Self> {
        let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let process = Command::new(format!("{venv}/bin/moto_server"))
            .args(["-H", "127.0.0.1", "-p", &addr.port().to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut moto = Self { process, addr };
        let watch = Stopwatch::start();
        while watch.elapsed() < READY_WITHIN {
            if moto.is_ready() {
                return Some(moto);
            }
            if moto.process.try_wait().unwrap().is_some() {
                return None;
            }
            thread::sleep(POLL);
        }
        None
    }

    /// Asks for a page that only moto has: the port alone could be anyone's.
    fn is_ready(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect_timeout(&self.addr, POLL) else { return false };
        stream.set_read_timeout(Some(READY_WITHIN)).unwrap();
        let asked = stream.write_all(b"GET /moto-api/ HTTP/1.0\r\n\r\n");
        let mut page = String::new();
        asked.is_ok() && stream.read_to_string(&mut page).is_ok() && page.contains(" 200 ")
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }
}

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

#[expect(
    clippy::disallowed_methods,
    reason = "a test that needs an interpreter is told so by its caller"
)]
fn venv() -> Option<String> {
    let venv = std::env::var("PAYMENT_SIM_VENV").ok();
    let is_ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(venv.is_some() || !is_ci, "PAYMENT_SIM_VENV is not set, and CI skips nothing");
    venv
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_pattern_asks_for_arrives_in_the_queue() {
    let Some(venv) = venv() else {
        // Past the capture of a passing test's output: what is skipped must be seen.
        writeln!(std::io::stderr(), "skipped: PAYMENT_SIM_VENV names no venv with moto").unwrap();
        return;
    };
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
