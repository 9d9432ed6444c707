//! The commands of the first system's README, word for word but for the port and the receiver: the
//! tools that people use find the service as they left it.
//!
//! They need grpcurl and ghz, which `make test` sets up. What grpcui shows is made of what grpcurl's
//! `describe` and `-msg-template` ask for: reflection alone.

#![allow(clippy::disallowed_methods, reason = "a test of its own process, with tasks of its own")]

mod support;

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use payment_sim::clock::{Clock, SystemClock};
use prost_reflect::DescriptorPool;
use serde_json::Value;
use support::{
    process::{Launch, Service, get},
    setting, until,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

const READY_WITHIN: Duration = Duration::from_secs(30);
const SOON: Duration = Duration::from_secs(30);
/// `DEFAULT_DELAY_MS`.
const DELAY_MS: i64 = 2_000;
const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// `None` after a visible line; on CI the tools must be there.
fn tool(name: &str) -> Option<PathBuf> {
    match setting("PAYMENT_SIM_TOOLS").map(|folder| PathBuf::from(folder).join("bin").join(name)) {
        Some(path) if path.exists() => Some(path),
        Some(_) | None => {
            assert_ne!(setting("CI").as_deref(), Some("true"), "{name} is missing on CI");
            eprintln!("skipped: there is no {name} (run `make test`)");
            None
        }
    }
}

/// Standard output of a command that must succeed.
fn output(program: &PathBuf, args: &[&str]) -> String {
    let done = Command::new(program).args(args).current_dir(ROOT).output().unwrap();
    let (out, error) =
        (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{program:?} {args:?}: {out}{error}");
    out.into_owned()
}

struct Bed {
    _folder: tempfile::TempDir,
    service: Service,
    ops_port: u16,
    address: String,
}

impl Bed {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let launch = Launch::new(folder.path());
        let mut service = launch.start();
        service.ready(READY_WITHIN).await.unwrap();
        let address = format!("localhost:{}", launch.grpc_port);
        Self { _folder: folder, service, ops_port: launch.ops_port, address }
    }

    /// Events as they are written, each with the moment it was read.
    fn events(&mut self) -> mpsc::Receiver<(i64, Value)> {
        let lines = BufReader::new(self.service.stdout()).lines();
        let (send, events) = mpsc::channel();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let event = serde_json::from_str(&line).expect("an event is one line of JSON");
                if send.send((SystemClock.now_ms(), event)).is_err() {
                    return;
                }
            }
        });
        events
    }
}

/// Takes one POST, and tells when it came and what it said.
async fn receive(listener: TcpListener) -> (i64, Value) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut request = Vec::new();
    loop {
        stream.read_buf(&mut request).await.unwrap();
        let text = String::from_utf8_lossy(&request);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        assert!(head.starts_with("POST /post HTTP/1.1"), "{head}");
        if let Ok(body) = serde_json::from_str(body) {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            return (SystemClock.now_ms(), body);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpcurl_pays_and_the_results_come_two_seconds_later() {
    let Some(grpcurl) = tool("grpcurl") else { return };
    let mut bed = Bed::start().await;
    let events = bed.events();
    let list = output(&grpcurl, &["-plaintext", &bed.address, "list"]);
    for service in ["grpc.health.v1.Health", "payment.v1.PaymentService"] {
        assert!(list.lines().any(|line| line == service), "{list}");
    }
    for scenario in ["approve", "PAYMENT_SCENARIO_APPROVE"] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let hook = format!("http://{}/post", listener.local_addr().unwrap());
        let body = format!(
            r#"{{
  "reservation_id": "res_123",
  "user_id": "user_456",
  "amount": {{"amount": 100000, "currency": "KRW"}},
  "scenario": "{scenario}",
  "webhook_url": "{hook}"
}}"#
        );
        let receiver = tokio::spawn(receive(listener));
        let before = SystemClock.now_ms();
        let call = "payment.v1.PaymentService/CreatePaymentIntent";
        let reply = output(&grpcurl, &["-plaintext", "-d", &body, &bed.address, call]);
        let reply: Value = serde_json::from_str(&reply).unwrap();
        assert_eq!(reply["status"], "PAYMENT_STATUS_PENDING");
        let (came, webhook) = tokio::time::timeout(SOON, receiver).await.unwrap().unwrap();
        assert!(came - before >= DELAY_MS, "{} ms after the call", came - before);
        assert_eq!(webhook["payment_intent_id"], reply["paymentIntentId"]);
        assert_eq!(webhook["status"], "PAYMENT_STATUS_COMPLETED");
        let (came, event) = events.recv_timeout(SOON).unwrap();
        assert!(came - before >= DELAY_MS, "{} ms after the call", came - before);
        assert_eq!(
            (&event["detail"], &event["source"]),
            (&webhook, &Value::from("payment-sim-api"))
        );
        assert_eq!(event["detail-type"], "Payment Status Updated");
    }
    let health = get(bed.ops_port, "/health").await.unwrap();
    assert!(health.starts_with("HTTP/1.1 200") && health.contains(r#""status":"ok""#), "{health}");
    let delivered = r#"webhook_deliveries_total{result="delivered"} 2"#;
    let moved =
        until(SOON, || async { get(bed.ops_port, "/metrics").await.unwrap().contains(delivered) });
    assert!(moved.await, "{delivered}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_symbol_and_every_request_resolves_by_reflection_alone() {
    let Some(grpcurl) = tool("grpcurl") else { return };
    let bed = Bed::start().await;
    let describe = |args: &[&str]| {
        output(&grpcurl, &[&["-plaintext"], args, &[bed.address.as_str(), "describe"]].concat())
    };
    assert!(describe(&[]).contains("payment.v1.PaymentService is a service"));
    let files = include_bytes!(concat!(env!("OUT_DIR"), "/payment_sim_descriptor.bin"));
    let pool = DescriptorPool::decode(&files[..]).unwrap();
    let ours = |name: &str| name.starts_with("payment.v1.") || name.starts_with("common.v1.");
    let messages = pool.all_messages().map(|message| message.full_name().to_owned());
    let enums = pool.all_enums().map(|one| one.full_name().to_owned());
    let services = pool.services().flat_map(|service| {
        let methods = service.methods().map(|method| method.full_name().to_owned());
        methods.chain([service.full_name().to_owned()]).collect::<Vec<_>>()
    });
    let symbols: Vec<_> = messages.chain(enums).chain(services).filter(|name| ours(name)).collect();
    assert!(symbols.len() > 40, "{symbols:?}");
    for symbol in &symbols {
        // The entries of maps have no name that a person would ask for.
        if symbol.ends_with("Entry") {
            continue;
        }
        let args = ["-plaintext", &bed.address, "describe", symbol];
        assert!(output(&grpcurl, &args).contains(symbol.as_str()), "{symbol}");
    }
    for request in symbols.iter().filter(|name| name.ends_with("Request")) {
        let args = ["-plaintext", "-msg-template", &bed.address, "describe", request];
        assert!(output(&grpcurl, &args).contains("Message template:"), "{request}");
    }
    let args = ["-plaintext", &bed.address, "describe", "google.rpc.BadRequest"];
    assert!(output(&grpcurl, &args).contains("field_violations"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpcurl_shows_every_bad_field() {
    let Some(grpcurl) = tool("grpcurl") else { return };
    let bed = Bed::start().await;
    let call = "payment.v1.PaymentService/CreatePaymentIntent";
    let args = ["-plaintext", "-d", "{}", bed.address.as_str(), call];
    let done = Command::new(grpcurl).args(args).output().unwrap();
    let shown = String::from_utf8_lossy(&done.stderr);
    for text in ["InvalidArgument", "VALIDATION_FAILED", "reservation_id", "user_id", "amount"] {
        assert!(shown.contains(text), "{text} in {shown}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_load_tests_end_without_an_error() {
    let Some(ghz) = tool("ghz") else { return };
    let mut bed = Bed::start().await;
    // A full pipe would hold up the events.
    let mut events = bed.service.stdout();
    thread::spawn(move || std::io::copy(&mut events, &mut std::io::sink()));
    let common = [
        "--insecure",
        "--proto",
        "proto/payment/v1/payment.proto",
        "--call",
        "payment.v1.PaymentService.CreatePaymentIntent",
        "--format",
        "json",
    ];
    let first = r#"{"reservation_id":"perf-test","user_id":"user-test","amount":{"amount":100000,"currency":"KRW"},"scenario":"approve"}"#;
    let second = r#"{"reservation_id":"load-test","user_id":"user-load","amount":{"amount":50000,"currency":"KRW"},"scenario":"random"}"#;
    // The second runs for 30 s in `make perf-test`.
    let runs: [(&str, &[&str]); 2] = [
        (first, &["-c", "10", "-n", "1000"]),
        (second, &["-c", "50", "-z", "2s", "--duration-stop", "wait"]),
    ];
    for (body, load) in runs {
        let args = [&common[..], &["-d", body], load, &[bed.address.as_str()]].concat();
        let mut command = Command::new(&ghz);
        let done = command.args(args).current_dir(ROOT).stderr(Stdio::inherit()).output().unwrap();
        let report: Value = serde_json::from_slice(&done.stdout).unwrap();
        let codes = &report["statusCodeDistribution"];
        let count = report["count"].as_u64().unwrap();
        assert_eq!(codes["OK"].as_u64(), Some(count), "{codes}");
        assert!(count >= 100, "{count} calls");
    }
    let metrics = get(bed.ops_port, "/metrics").await.unwrap();
    let outcome = |name: &str| {
        let lines = metrics.lines().filter(|line| line.contains(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>()
    };
    let failed = outcome(r#"payment_outcomes_total{provider="sim",reason="#)
        - outcome(r#"payment_outcomes_total{provider="sim",reason="","#);
    assert!(failed > 0, "`random` declines some");
}
