//! The first system's README, command by command: what its users type must do here what they expect.
//!
//! The commands are verbatim, but for the port and for webhook_url, which points at a receiver of ours.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Write},
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use payment_sim::{
    api::pb::payment::v1::GetPaymentIntentRequest,
    clock::{Clock, SystemClock},
};
use prost::Message;
use prost_reflect::DescriptorPool;
use prost_types::{FileDescriptorProto, FileDescriptorSet};
use serde_json::Value;
use support::{
    client,
    process::{Launch, Service, get},
    receiver::Receiver,
    setting, until,
};
use tonic::transport::{Channel, Endpoint};
use tonic_reflection::pb::{v1, v1alpha};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const READY_WITHIN: Duration = Duration::from_secs(30);
const SOON: Duration = Duration::from_secs(30);
/// From creation to the notification, by default.
const DELAY_MS: i64 = 2_000;
const SERVICES: [&str; 5] = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "payment.v1.PaymentService",
    "simulation.v1.SimulationService",
];

// ---- The README's commands ----

const LIST: &str = "grpcurl -plaintext localhost:8030 list";

const CREATE: &str = r#"grpcurl -plaintext -d '{
  "reservation_id": "res_123",
  "user_id": "user_456",
  "amount": {"amount": 100000, "currency": "KRW"},
  "scenario": "approve",
  "webhook_url": "https://httpbin.org/post"
}' localhost:8030 payment.v1.PaymentService/CreatePaymentIntent"#;

const CREATE_IN_ONE_LINE: &str = r#"grpcurl -plaintext -d '{"reservation_id":"test-123","user_id":"user-456","amount":{"amount":100000,"currency":"KRW"},"scenario":"approve","webhook_url":"https://httpbin.org/post"}' localhost:8030 payment.v1.PaymentService/CreatePaymentIntent"#;

/// What its users paste into grpcui.
const TEST_DATA: &str = r#"{
  "reservation_id": "res-test-123",
  "user_id": "user-test-456",
  "amount": {
    "amount": 100000,
    "currency": "KRW"
  },
  "scenario": "approve",
  "webhook_url": "https://httpbin.org/post"
}"#;

const GHZ_CREATES: &str = r#"ghz --insecure --proto proto/payment/v1/payment.proto \
  --call payment.v1.PaymentService.CreatePaymentIntent \
  -d '{"reservation_id":"perf-test","user_id":"user-test","amount":{"amount":100000,"currency":"KRW"},"scenario":"approve"}' \
  -c 10 -n 1000 localhost:8030"#;

const GHZ_LOAD: &str = r#"ghz --insecure --proto proto/payment/v1/payment.proto \
  --call payment.v1.PaymentService.CreatePaymentIntent \
  -d '{"reservation_id":"load-test","user_id":"user-load","amount":{"amount":50000,"currency":"KRW"},"scenario":"random"}' \
  -c 50 -z 30s localhost:8030"#;
const LOAD_CALLERS: u64 = 50;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payment_is_made_and_told_two_seconds_later() {
    let Some(tools) = tools() else { return };
    let bed = Bed::start(tools).await;
    assert_eq!(bed.run(LIST).out.lines().collect::<Vec<_>>(), SERVICES);

    let canonical = CREATE.replace("\"approve\"", "\"PAYMENT_SCENARIO_APPROVE\"");
    let pasted = format!(
        "grpcurl -plaintext -d '{TEST_DATA}' localhost:8030 payment.v1.PaymentService/CreatePaymentIntent"
    );
    for command in [CREATE, &canonical, CREATE_IN_ONE_LINE, &pasted] {
        let ran = bed.run(command);
        let reply: Value = serde_json::from_str(&ran.out).unwrap_or_else(|_| panic!("{ran:?}"));
        assert_eq!(reply["status"], "PAYMENT_STATUS_PENDING", "{ran:?}");
        bed.is_told_in_time(reply["paymentIntentId"].as_str().expect("an id")).await;
    }

    let health = get(bed.launch.ops_port, "/health").await.expect("health");
    assert!(health.starts_with("HTTP/1.1 200") && health.contains("\"status\":\"ok\""), "{health}");
    let metrics = get(bed.launch.ops_port, "/metrics").await.expect("metrics");
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
    let four = "payment_intents_created_total{scenario=\"approve\"} 4";
    assert!(metrics.lines().any(|line| line == four), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_load_commands_end_well() {
    let Some(tools) = tools() else { return };
    let bed = Bed::start(tools).await;
    let codes = ghz_codes(&bed.run(GHZ_CREATES).out);
    assert_eq!(codes, BTreeMap::from([("OK".to_owned(), 1_000)]));

    let cut = GHZ_LOAD.replace("-z 30s", "-z 2s");
    assert_ne!(cut, GHZ_LOAD);
    let mut codes = ghz_codes(&bed.run(&cut).out);
    let ok = codes.remove("OK").unwrap_or_default();
    assert!(ok > 0, "{codes:?}");
    // At the end of its time ghz closes the connection under the calls that are still open.
    let broken_off: u64 = codes.values().sum();
    assert!(broken_off <= LOAD_CALLERS, "{codes:?}");
    let by_ghz = |code: &String| ["Canceled", "Unavailable"].contains(&code.as_str());
    assert!(codes.keys().all(by_ghz), "{codes:?}");
    // What the service itself answered is all OK.
    let metrics = get(bed.launch.ops_port, "/metrics").await.expect("metrics");
    let method = "grpc_method=\"CreatePaymentIntent\"";
    let counted = metrics.lines().filter(|line| {
        line.starts_with("grpc_server_handled_total")
            && line.contains(method)
            && !line.ends_with(" 0")
    });
    for line in counted {
        assert!(
            line.contains("grpc_code=\"OK\"") || line.contains("grpc_code=\"Canceled\""),
            "{line}"
        );
    }
}

/// "[OK]  1000 responses", one line a code.
fn ghz_codes(report: &str) -> BTreeMap<String, u64> {
    let (_, codes) =
        report.split_once("Status code distribution:").unwrap_or_else(|| panic!("{report}"));
    let lines = codes.lines().map_while(|line| match line.trim() {
        "" => Some(None),
        line if line.starts_with('[') => Some(Some(line)),
        _ => None,
    });
    let codes = lines.flatten().map(|line| {
        let (code, rest) = line[1..].split_once(']').expect("a code in brackets");
        let count = rest.split_whitespace().next().and_then(|count| count.parse().ok());
        (code.to_owned(), count.unwrap_or_else(|| panic!("{line}")))
    });
    codes.collect()
}

// ---- What grpcui lives on ----

/// Services, methods, messages and enums, and the request messages among them.
struct Symbols {
    all: BTreeSet<String>,
    requests: BTreeSet<String>,
}

/// By what is compiled in; asked for by reflection below.
fn symbols() -> Symbols {
    let ours: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/payment_sim_descriptor.bin"));
    let sets = [
        ours,
        tonic_types::pb::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        v1::FILE_DESCRIPTOR_SET,
        v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let mut pool = DescriptorPool::new();
    for set in sets {
        pool.decode_file_descriptor_set(set).expect("descriptors");
    }
    let services: Vec<_> = pool.services().collect();
    let methods: Vec<_> = services.iter().flat_map(|service| service.methods()).collect();
    let requests = methods.iter().map(|method| method.input().full_name().to_owned()).collect();
    let messages = pool.all_messages().filter(|message| !message.is_map_entry());
    let all = (services.iter().map(|s| s.full_name().to_owned()))
        .chain(methods.iter().map(|m| m.full_name().to_owned()))
        .chain(messages.map(|m| m.full_name().to_owned()))
        .chain(pool.all_enums().map(|e| e.full_name().to_owned()))
        .collect();
    Symbols { all, requests }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpcurl_describes_every_symbol_and_fills_every_request() {
    let Some(tools) = tools() else { return };
    let bed = Bed::start(tools).await;
    let symbols = symbols();
    println!("{} symbols", symbols.all.len());
    assert!(symbols.all.len() > 60 && symbols.requests.len() > 7);
    for symbol in &symbols.all {
        let ran = bed
            .run(&format!("grpcurl -plaintext -use-reflection localhost:8030 describe {symbol}"));
        assert!(ran.out.starts_with(&format!("{symbol} is ")), "{ran:?}");
    }
    for request in &symbols.requests {
        let command = format!("grpcurl -plaintext -msg-template localhost:8030 describe {request}");
        let ran = bed.run(&command);
        let (_, template) =
            ran.out.split_once("Message template:").unwrap_or_else(|| panic!("{ran:?}"));
        serde_json::from_str::<Value>(template).unwrap_or_else(|_| panic!("{ran:?}"));
    }
    let ran = bed.run("grpcurl -plaintext -msg-template localhost:8030 describe payment.v1.CreatePaymentIntentRequest");
    for field in ["reservationId", "webhookUrl", "creditCard", "echo"] {
        assert!(ran.out.contains(&format!("\"{field}\"")), "{ran:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpcurl_shows_what_is_wrong() {
    let Some(tools) = tools() else { return };
    let bed = Bed::start(tools).await;
    let ran = bed.run_whatever_comes(&CREATE.replace("KRW", "krw").replace("user_456", ""));
    assert!(!ran.success, "{ran:?}");
    for shown in [
        "Code: InvalidArgument",
        "type.googleapis.com/google.rpc.ErrorInfo",
        "type.googleapis.com/google.rpc.BadRequest",
        "\"reason\":\"VALIDATION_FAILED\"",
        "\"domain\":\"payment-sim\"",
        "\"field\":\"amount.currency\"",
        "\"field\":\"user_id\"",
    ] {
        let err: String = ran.err.split_whitespace().collect();
        let shown_tight: String = shown.split_whitespace().collect();
        assert!(err.contains(&shown_tight), "{shown}: {ran:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn buf_curl_calls_by_reflection() {
    let Some(tools) = tools() else { return };
    if !std::path::Path::new(&tools).join("bin/buf").exists() {
        return skipped("buf curl: PAYMENT_SIM_TOOLS has no bin/buf");
    }
    let bed = Bed::start(tools).await;
    for version in ["grpc-v1", "grpc-v1alpha"] {
        let body = TEST_DATA.replace("https://httpbin.org/post", &bed.receiver.url());
        let ran = bed.run(&format!(
            "buf curl --protocol grpc --http2-prior-knowledge --reflect-protocol {version} -d '{body}' \
             http://127.0.0.1:8030/payment.v1.PaymentService/CreatePaymentIntent"
        ));
        let reply: Value = serde_json::from_str(&ran.out).unwrap_or_else(|_| panic!("{ran:?}"));
        assert_eq!(reply["status"], "PAYMENT_STATUS_PENDING", "{version}: {ran:?}");
    }
}

/// A client that knows nothing but reflection: what it is told must be whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_reflections_tell_all_that_there_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let launch = Launch::new(folder.path()).with("EVENT_SINK", "none");
    let mut service = launch.start();
    service.ready(READY_WITHIN).await.unwrap_or_else(|why| panic!("{why}"));
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{}", launch.grpc_port));
    let channel = endpoint.expect("a URL").connect().await.expect("a connection");
    let symbols = symbols();
    for (version, services, files) in
        [("v1", of_v1(&channel, &symbols).await), ("v1alpha", of_v1alpha(&channel, &symbols).await)]
            .map(|(version, (services, files))| (version, services, files))
    {
        assert_eq!(services, SERVICES.map(str::to_owned).into(), "{version}");
        let mut pool = DescriptorPool::new();
        let file = files.into_values().collect();
        pool.add_file_descriptor_set(FileDescriptorSet { file }).expect("all that files import");
        for request in &symbols.requests {
            assert!(pool.get_message_by_name(request).is_some(), "{version}: {request}");
        }
        for service in SERVICES {
            assert!(pool.get_service_by_name(service).is_some(), "{version}: {service}");
        }
    }
}

type Told = (BTreeSet<String>, BTreeMap<String, FileDescriptorProto>);

/// The same for both versions, whose messages are alike but not the same types.
macro_rules! reflection_client {
    ($name:ident, $version:ident) => {
        async fn $name(channel: &Channel, symbols: &Symbols) -> Told {
            use $version::{
                ServerReflectionRequest as Ask, server_reflection_client::ServerReflectionClient,
                server_reflection_request::MessageRequest as For,
                server_reflection_response::MessageResponse as Reply,
            };
            let mut client = ServerReflectionClient::new(channel.clone());
            let mut told = Told::default();
            let mut wanted = vec![For::ListServices("*".to_owned())];
            wanted.extend(symbols.all.iter().cloned().map(For::FileContainingSymbol));
            while !wanted.is_empty() {
                let asked: Vec<_> = wanted
                    .drain(..)
                    .map(|request| Ask { host: String::new(), message_request: Some(request) })
                    .collect();
                let expected = asked.len();
                let stream = stream_of(asked);
                let mut replies =
                    client.server_reflection_info(stream).await.expect("a stream").into_inner();
                let mut count = 0;
                while let Some(reply) = replies.message().await.expect("a reply") {
                    count += 1;
                    match reply.message_response {
                        Some(Reply::ListServicesResponse(list)) => {
                            told.0.extend(list.service.into_iter().map(|service| service.name));
                        }
                        Some(Reply::FileDescriptorResponse(files)) => {
                            for bytes in files.file_descriptor_proto {
                                let file = FileDescriptorProto::decode(&*bytes).expect("a file");
                                told.1.insert(file.name().to_owned(), file);
                            }
                        }
                        other => panic!("{:?}: {other:?}", reply.original_request),
                    }
                }
                assert_eq!(count, expected);
                let imported = told.1.values().flat_map(|file| file.dependency.iter().cloned());
                let missing: BTreeSet<String> =
                    imported.filter(|name| !told.1.contains_key(name)).collect();
                wanted.extend(missing.into_iter().map(For::FileByFilename));
            }
            told
        }
    };
}

reflection_client!(of_v1, v1);
reflection_client!(of_v1alpha, v1alpha);

fn stream_of<T: Send + 'static>(items: Vec<T>) -> impl tonic::IntoStreamingRequest<Message = T> {
    tonic::codegen::tokio_stream::iter(items)
}

// ---- The bed ----

/// The service with its defaults, on free ports, with a receiver and a reader of its events.
struct Bed {
    launch: Launch,
    tools: String,
    receiver: Receiver,
    webhooks: Arc<Mutex<Vec<Notice>>>,
    events: Arc<Mutex<Vec<Notice>>>,
    _service: Service,
    _folder: tempfile::TempDir,
}

/// What was told, and when it was here.
struct Notice {
    at_ms: i64,
    body: Value,
}

#[derive(Debug)]
struct Ran {
    success: bool,
    out: String,
    err: String,
}

impl Bed {
    async fn start(tools: String) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let launch = Launch::new(folder.path());
        let mut service = launch.start();
        let events = Arc::new(Mutex::new(Vec::new()));
        let (noted, stdout) = (Arc::clone(&events), service.stdout());
        // A thread of its own, which ends with the pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let body =
                    serde_json::from_str(&line).unwrap_or_else(|_| panic!("no event: {line}"));
                note(&noted, body);
            }
        });
        service.ready(READY_WITHIN).await.unwrap_or_else(|why| panic!("{why}"));
        let webhooks = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&webhooks);
        let receiver = Receiver::start(Arc::new(move |request| {
            note(&noted, serde_json::from_slice(request.body()).expect("a webhook is JSON"));
            Box::pin(async { Some(204) })
        }))
        .await;
        Self { launch, tools, receiver, webhooks, events, _service: service, _folder: folder }
    }

    fn run(&self, command: &str) -> Ran {
        let ran = self.run_whatever_comes(command);
        assert!(ran.success, "{command}\n{ran:?}");
        ran
    }

    fn run_whatever_comes(&self, command: &str) -> Ran {
        let command = command
            .replace(":8030", &format!(":{}", self.launch.grpc_port))
            .replace("https://httpbin.org/post", &self.receiver.url());
        let output = Command::new("bash")
            .args(["-c", &command])
            .current_dir(ROOT)
            .env("PATH", format!("{}/bin:/usr/local/bin:/usr/bin:/bin", self.tools))
            .output()
            .expect("bash");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ran { success: output.status.success(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// Webhook and event come, with the same body, and neither before its time.
    async fn is_told_in_time(&self, payment_intent_id: &str) {
        let of = |notices: &Mutex<Vec<Notice>>, at: &str| {
            let notices = notices.lock().unwrap_or_else(PoisonError::into_inner);
            let found = notices.iter().find(|notice| {
                let body = if at.is_empty() { &notice.body } else { &notice.body[at] };
                body["payment_intent_id"] == payment_intent_id
            });
            found.map(|notice| (notice.at_ms, notice.body.clone()))
        };
        let both = || (of(&self.webhooks, ""), of(&self.events, "detail"));
        let is_told = until(SOON, || async { matches!(both(), (Some(_), Some(_))) }).await;
        assert!(is_told, "{payment_intent_id}: {:?}", both());
        let (Some((webhook_ms, webhook)), Some((event_ms, event))) = both() else { unreachable!() };

        let request = GetPaymentIntentRequest {
            payment_intent_id: payment_intent_id.to_owned(),
            ..Default::default()
        };
        let reply = client(self.launch.grpc_port).get_payment_intent(request).await.expect("it");
        let created = reply.into_inner().payment.and_then(|p| p.created_at).expect("its creation");
        let created_ms = created.seconds * 1_000 + i64::from(created.nanos) / 1_000_000;
        for (what, at_ms) in [("webhook", webhook_ms), ("event", event_ms)] {
            assert!(
                at_ms >= created_ms + DELAY_MS,
                "the {what} came after {} ms",
                at_ms - created_ms
            );
        }
        assert_eq!(webhook["status"], "PAYMENT_STATUS_COMPLETED");
        assert_eq!(event["detail"], webhook);
        assert_eq!(event["source"], "payment-sim-api");
        assert_eq!(event["detail-type"], "Payment Status Updated");
    }
}

fn note(notices: &Mutex<Vec<Notice>>, body: Value) {
    let notice = Notice { at_ms: SystemClock.now_ms(), body };
    notices.lock().unwrap_or_else(PoisonError::into_inner).push(notice);
}

/// `None`, and a visible line, where there are no tools.
fn tools() -> Option<String> {
    let tools = setting("PAYMENT_SIM_TOOLS");
    if tools.is_none() {
        skipped("seed_commands, PAYMENT_SIM_TOOLS names no grpcurl and ghz (run `make test`)");
    }
    tools
}

/// One visible line; in CI nothing may be skipped.
fn skipped(what: &str) {
    assert!(setting("CI").is_none_or(|ci| ci != "true"), "skipped in CI: {what}");
    // Past the capture of a passing test's output.
    writeln!(std::io::stderr(), "skipped: {what}").expect("stderr");
}
