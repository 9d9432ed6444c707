//! The process as its operator sees it: log lines, start-up, and what it refuses to start on.

mod support;

use std::{
    collections::BTreeSet,
    fs, io,
    net::TcpListener,
    path::Path,
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use payment_sim::{
    api::pb::{
        common::v1::Money,
        payment::v1::{
            CancelPaymentRequest, CreatePaymentIntentRequest, CreditCardDetails,
            GetPaymentIntentRequest, PaymentDetails, PaymentScenario, ProcessPaymentRequest,
        },
        simulation::v1::ListDeliveriesRequest,
    },
    clock::Stopwatch,
};
use serde_json::Value;
use support::{
    Client, client, free_ports,
    process::{Launch, Service, get},
    receiver::Receiver,
    simulation, until,
};
use tokio::task::JoinSet;
use tonic::Request;

const READY_WITHIN: Duration = Duration::from_secs(30);
const SOON: Duration = Duration::from_secs(30);
const LINES_PER_SECOND: usize = 100;

// ---- Log lines ----

const SECRET: &str = "a-secret-that-nobody-may-read-in-a-log";
const TOKEN: &str = "a-token-that-nobody-may-read-in-a-log";
const PAN: &str = "4000056655665556";
const CVV: &str = "907";
const HOLDER: &str = "Holder Of The Card";
const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_development_lines_are_coloured_and_at_debug_and_stdout_has_events_only() {
    let bed = Bed::start(|launch| launch.without("LOG_LEVEL")).await;
    bed.some_calls().await;
    let (log, out) = bed.stop().await;
    assert!(log.contains("\u{1b}["), "no colour: {log}");
    let plain = without_colour(&log);
    assert!(plain.contains("DEBUG") && plain.contains(" INFO "), "{plain}");
    assert!(plain.contains("handled") && plain.contains(TRACE_ID), "{plain}");
    for line in out.lines() {
        let event: Value =
            serde_json::from_str(line).unwrap_or_else(|_| panic!("no event: {line}"));
        assert_eq!(event["source"], "payment-sim-api", "{line}");
    }
    assert!(!out.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_color_is_heeded() {
    let bed = Bed::start(|launch| launch.without("LOG_LEVEL").with("NO_COLOR", "1")).await;
    let (log, _) = bed.stop().await;
    assert!(log.contains("INFO") && !log.contains('\u{1b}'), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_production_every_line_is_one_object_at_info() {
    let bed = Bed::start(|launch| in_production(launch.without("LOG_LEVEL"))).await;
    bed.some_calls().await;
    let (log, out) = bed.stop().await;
    let lines = json_lines(&log);
    let messages: Vec<&str> = lines.iter().filter_map(|line| line["message"].as_str()).collect();
    assert!(messages.contains(&"ready") && messages.contains(&"stopped"), "{log}");
    assert!(!messages.contains(&"handled"), "per-request lines are debug: {log}");
    let levels: BTreeSet<&str> = lines.iter().filter_map(|line| line["level"].as_str()).collect();
    assert!(levels.is_subset(&["INFO", "WARN"].into()), "{log}");
    assert!(!out.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_callers_trace_id_is_in_every_line_of_a_request() {
    let bed = Bed::start(|launch| in_production(launch).with("LOG_LEVEL", "debug")).await;
    let calls = bed.some_calls().await;
    let (log, _) = bed.stop().await;
    let lines = json_lines(&log);
    let handled: Vec<&Value> = lines.iter().filter(|line| line["message"] == "handled").collect();
    assert_eq!(handled.len(), calls, "{log}");
    for line in &handled {
        assert_eq!(line["trace_id"], TRACE_ID, "{line}");
        assert_eq!(line["level"], "DEBUG", "{line}");
        assert!(line["latency_us"].is_u64() && line["code"].is_string(), "{line}");
    }
    // A line that tells of a method is a request's line, whatever it says.
    let of_requests = lines.iter().filter(|line| !line["method"].is_null());
    assert_eq!(of_requests.count(), handled.len(), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_of_requests_are_at_most_a_hundred_a_second_and_the_rest_is_counted() {
    const CALLS: usize = 2_000;
    let bed = Bed::start(|launch| in_production(launch).with("LOG_LEVEL", "debug")).await;
    let watch = Stopwatch::start();
    let mut callers = JoinSet::new();
    for _ in 0..20 {
        let mut client = bed.client();
        callers.spawn(async move {
            for _ in 0..CALLS / 20 {
                let request = GetPaymentIntentRequest::default();
                client.get_payment_intent(request).await.expect_err("there is no such payment");
            }
        });
    }
    while let Some(ended) = callers.join_next().await {
        ended.expect("a caller");
    }
    let windows = usize::try_from(watch.elapsed().as_secs()).expect("short") + 2;
    let suppressed = || async {
        let metrics = get(bed.launch.ops_port, "/metrics").await.expect("metrics");
        let line =
            metrics.lines().find_map(|line| line.strip_prefix("log_lines_suppressed_total "));
        line.and_then(|n| n.parse::<usize>().ok()).expect("the metric")
    };
    // The next line after the flood tells how many were withheld.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    bed.client().get_payment_intent(GetPaymentIntentRequest::default()).await.expect_err("none");
    let counted = suppressed().await;
    let (log, _) = bed.stop().await;
    let lines = json_lines(&log);
    let handled: Vec<&Value> = lines.iter().filter(|line| line["message"] == "handled").collect();
    assert!(handled.len() <= LINES_PER_SECOND * windows, "{} in {windows} s", handled.len());
    let withheld: u64 = handled.iter().filter_map(|line| line["withheld"].as_u64()).sum();
    assert_eq!(
        handled.len() + usize::try_from(withheld).expect("few"),
        CALLS + 1,
        "each is told or counted"
    );
    assert_eq!(counted, usize::try_from(withheld).expect("few"));
    assert!(counted > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_card_or_signature_reaches_a_log_or_an_event() {
    let bed = Bed::start(|launch| in_production(launch).with("LOG_LEVEL", "trace")).await;
    bed.some_calls().await;
    // Also where something goes wrong: a bad card, a receiver that is not there.
    let mut bad = create("nobody-listens", "http://127.0.0.1:9/");
    let card = bad.payment_details.as_mut().and_then(|details| details.credit_card.as_mut());
    card.expect("a card").expiry_year = "1999".to_owned();
    bed.client().create_payment_intent(bad).await.expect_err("it has expired");
    let good = create("nobody-listens", "http://127.0.0.1:9/");
    bed.client().create_payment_intent(good).await.expect("created");
    // And with the token, right and nearly so.
    for (token, admitted) in [(TOKEN.to_owned(), true), (format!("{TOKEN}2"), false)] {
        let mut request = tonic::Request::new(ListDeliveriesRequest::default());
        let bearer = format!("Bearer {token}").parse().expect("a header");
        request.metadata_mut().insert("authorization", bearer);
        let listed = simulation(bed.launch.grpc_port).list_deliveries(request).await;
        assert_eq!(listed.is_ok(), admitted);
    }
    assert!(until(SOON, || async { bed.signatures().len() >= 2 }).await, "no webhook came");
    // What a failed attempt leaves in the log is there once it is counted.
    let failed = r#"webhook_deliveries_total{result="retry"} "#;
    let is_counted = || async {
        let metrics = get(bed.launch.ops_port, "/metrics").await.expect("metrics");
        metrics.lines().any(|line| line.strip_prefix(failed).is_some_and(|n| n != "0"))
    };
    assert!(until(SOON, is_counted).await, "the receiver that is not there was not tried");
    let signatures = bed.signatures();
    let data = bed.folder.path().join("data");
    let files = files(&data);
    let (log, out) = bed.stop().await;
    assert!(!files.is_empty());
    let dashed = "4000-0566-5566-5556";
    let spaced = "4000 0566 5566 5556";
    let base64 = "NDAwMDA1NjY1NTY2NTU1Ng";
    let hex = "34303030303536363535363635353536";
    for (what, text) in [("the log", &log), ("the events", &out)] {
        for secret in
            [SECRET, TOKEN, PAN, dashed, spaced, base64, hex, HOLDER, "cvv", "card_number"]
        {
            assert!(!text.contains(secret), "{secret} is in {what}: {text}");
        }
        for signature in &signatures {
            assert!(!text.contains(signature.as_str()), "a signature is in {what}: {text}");
        }
    }
    for line in json_lines(&log) {
        let (level, target) = (line["level"].as_str(), line["target"].as_str().unwrap_or_default());
        let ours = target.starts_with("payment_sim");
        assert!(ours || matches!(level, Some("WARN" | "ERROR")), "a library chatters: {line}");
    }
    // Three digits are in every timestamp: as a word of its own it would be the CVV.
    let words = log.split(|c: char| !c.is_ascii_alphanumeric());
    assert!(!words.into_iter().any(|word| word == CVV), "{log}");
    for path in files {
        let bytes = fs::read(&path).unwrap_or_default();
        for secret in [PAN, dashed, spaced, base64, hex, HOLDER, SECRET, TOKEN] {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{secret} is in {}", path.display());
        }
    }
}

/// Two live secrets, one of them a key, and every form in which they could leak.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_is_nowhere_in_any_form() {
    const KEY: &[u8] = b"marked-key-of-24-bytes!!";
    let key = BASE64.encode(KEY);
    let secrets = format!("{SECRET}, whsec_{key}");
    let forms = [SECRET.as_bytes(), KEY]
        .into_iter()
        .flat_map(|secret| {
            let base64 = BASE64.encode(secret).trim_end_matches('=').to_owned();
            [secret.to_vec(), base64.into_bytes(), hex::encode(secret).into_bytes()]
        })
        .collect::<Vec<_>>();
    let is_clean = |what: &str, bytes: &[u8]| {
        for form in &forms {
            let found = bytes.windows(form.len()).any(|window| window == form);
            assert!(!found, "{} is in {what}", String::from_utf8_lossy(form));
        }
    };
    let bed = Bed::start(|launch| {
        in_production(launch).with("LOG_LEVEL", "trace").with("WEBHOOK_SECRET", &secrets)
    })
    .await;
    bed.some_calls().await;
    // A receiver that cannot be reached, and one that may not.
    for url in ["https://127.0.0.1:9/", "http://10.0.0.1/"] {
        bed.client().create_payment_intent(create("r", url)).await.expect("created");
    }
    for path in ["/metrics", "/health", "/readyz", "/livez"] {
        is_clean(path, get(bed.launch.ops_port, path).await.expect("an answer").as_bytes());
    }
    let files = files(&bed.folder.path().join("data"));
    assert!(!files.is_empty());
    let folder = tempfile::tempdir().expect("a folder");
    let check = |settings: &[(&str, &str)]| {
        let ran = run(folder.path(), &["--check-config"], settings);
        is_clean("--check-config", &[ran.stdout, ran.stderr].concat());
    };
    check(&[("WEBHOOK_SECRET", &secrets)]);
    // Also where the start is refused, because of it or of another.
    check(&[("WEBHOOK_SECRET", &secrets), ("GRPC_PORT", "x")]);
    check(&[("WEBHOOK_SECRET", &format!("{secrets},"))]);
    check(&[("WEBHOOK_SECRET", &format!("{secrets},whsec_?"))]);
    for path in files {
        is_clean(&path.display().to_string(), &fs::read(&path).unwrap_or_default());
    }
    let (log, out) = bed.stop().await;
    assert!(!log.is_empty() && !out.is_empty());
    is_clean("the log", log.as_bytes());
    is_clean("the events", out.as_bytes());
}

fn in_production(launch: Launch) -> Launch {
    launch
        .with("ENVIRONMENT", "production")
        .with("BIND_ADDRESS", "127.0.0.1")
        .with("WEBHOOK_SECRET", SECRET)
        .with("WEBHOOK_ALLOW_CIDRS", "127.0.0.0/8")
        .with("SIMULATION_API", "on")
        .with("SIMULATION_TOKEN", TOKEN)
        .with("DRAIN_DELAY_MS", 0)
}

fn create(reservation: &str, webhook_url: &str) -> CreatePaymentIntentRequest {
    CreatePaymentIntentRequest {
        reservation_id: reservation.to_owned(),
        user_id: "user".to_owned(),
        amount: Some(Money { amount: 1_000, currency: "KRW".to_owned() }),
        scenario: PaymentScenario::Approve.into(),
        webhook_url: webhook_url.to_owned(),
        payment_details: Some(PaymentDetails {
            credit_card: Some(CreditCardDetails {
                card_number: PAN.to_owned(),
                expiry_month: "12".to_owned(),
                expiry_year: "2098".to_owned(),
                cardholder_name: HOLDER.to_owned(),
                cvv: CVV.to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn json_lines(log: &str) -> Vec<Value> {
    let parse = |line: &str| {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"));
        assert!(value.is_object() && !line.contains('\u{1b}'), "{line}");
        for key in ["timestamp", "level", "target", "message"] {
            assert!(value[key].is_string(), "{line}");
        }
        value
    };
    log.lines().map(parse).collect()
}

fn without_colour(text: &str) -> String {
    let mut parts = text.split("\u{1b}[");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once('m').map_or(part, |(_, rest)| rest))
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries =
        fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The service, a receiver that keeps signatures, and all that it writes.
struct Bed {
    launch: Launch,
    service: Service,
    receiver: Receiver,
    signatures: Arc<Mutex<Vec<String>>>,
    out: JoinSet<String>,
    folder: tempfile::TempDir,
}

impl Bed {
    async fn start(settings: impl FnOnce(Launch) -> Launch) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let launch = settings(Launch::new(folder.path()).with("DEFAULT_DELAY_MS", 50));
        let mut service = launch.start();
        let pipe = service.stdout();
        let mut out = JoinSet::new();
        out.spawn_blocking(move || io::read_to_string(pipe).expect("UTF-8"));
        service.ready(READY_WITHIN).await.unwrap_or_else(|why| panic!("{why}"));
        let signatures = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&signatures);
        let receiver = Receiver::start(Arc::new(move |request| {
            let mut noted = noted.lock().unwrap_or_else(PoisonError::into_inner);
            for name in ["x-webhook-signature", "webhook-signature"] {
                let value = request.headers()[name].to_str().expect("ASCII");
                let (_, signature) = value.split_once(['=', ',']).expect("a scheme");
                noted.push(signature.trim_end_matches('=').to_owned());
            }
            Box::pin(async { Some(204) })
        }))
        .await;
        Self { launch, service, receiver, signatures, out, folder }
    }

    fn client(&self) -> Client {
        client(self.launch.grpc_port)
    }

    fn signatures(&self) -> Vec<String> {
        self.signatures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Good ones and refused ones, all of one trace; how many. Their webhook has come.
    async fn some_calls(&self) -> usize {
        let mut client = self.client();
        let before = self.signatures().len();
        let created = client
            .create_payment_intent(traced(create("reservation", &self.receiver.url())))
            .await
            .expect("created")
            .into_inner();
        let id = created.payment_intent_id;
        let get_it =
            GetPaymentIntentRequest { payment_intent_id: id.clone(), ..Default::default() };
        client.get_payment_intent(traced(get_it)).await.expect("it is there");
        let details = create("", "").payment_details;
        let process = ProcessPaymentRequest {
            payment_intent_id: id.clone(),
            payment_details: details,
            ..Default::default()
        };
        client.process_payment(traced(process)).await.expect("processed");
        let cancel = CancelPaymentRequest { payment_intent_id: id, ..Default::default() };
        client.cancel_payment(traced(cancel)).await.expect("refunded");
        let nothing = CreatePaymentIntentRequest::default();
        client.create_payment_intent(traced(nothing)).await.expect_err("nothing is in it");
        let came = until(SOON, || async { self.signatures().len() >= before + 2 }).await;
        assert!(came, "no webhook came");
        5
    }

    /// SIGTERM, and all that was written: log, stdout.
    async fn stop(mut self) -> (String, String) {
        self.service.terminate();
        let status = self.service.exits(SOON).await.expect("it ends");
        let out = self.out.join_next().await.expect("a reader").expect("read");
        let log = fs::read_to_string(self.launch.log()).expect("a log");
        assert!(status.success(), "{status}: {log}");
        (log, out)
    }
}

fn traced<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let trace = format!("00-{TRACE_ID}-00f067aa0ba902b7-01");
    request.metadata_mut().insert("traceparent", trace.parse().expect("ASCII"));
    request
}

// ---- Start-up ----

/// Runs it to its end with these settings and nothing else.
fn run(folder: &Path, arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_payment-sim"))
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .envs(settings.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("it runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

#[test]
fn help_and_version_go_to_stdout() {
    let folder = tempfile::tempdir().expect("a folder");
    let help = run(folder.path(), &["--help"], &[]);
    assert!(help.status.success() && help.stderr.is_empty());
    let help = text(&help.stdout);
    for part in
        ["--grpc-port", "[GRPC_PORT; default: 8030", "--check-config", "healthcheck", ".env.local"]
    {
        assert!(help.contains(part), "{part}: {help}");
    }
    assert!(help.lines().all(|line| !line.ends_with(' ') || line.trim().is_empty()));
    let version = run(folder.path(), &["--version"], &[]);
    assert_eq!(text(&version.stdout).trim(), concat!("payment-sim ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn check_config_tells_where_each_value_is_from_and_no_secret() {
    let folder = tempfile::tempdir().expect("a folder");
    let local = "WEBHOOK_SECRET=\"in-dot-env-local, second-in-dot-env-local\"\nDEFAULT_SCENARIO=fail\nOPS_PORT=1111\n";
    fs::write(folder.path().join(".env.local"), local).expect("written");
    fs::write(folder.path().join(".env"), "DEFAULT_SCENARIO=delay\nMANUAL_TTL_MS=7\n")
        .expect("written");
    let ran =
        run(folder.path(), &["--check-config", "--grpc-port", "2222"], &[("OPS_PORT", "3333")]);
    assert!(ran.status.success() && ran.stderr.is_empty(), "{ran:?}");
    let told = text(&ran.stdout);
    let line = |name: &str| {
        let mut lines = told.lines().filter(|line| line.split_whitespace().next() == Some(name));
        lines.next().unwrap_or_else(|| panic!("{name}: {told}")).to_owned()
    };
    for (name, value, origin) in [
        ("GRPC_PORT", " 2222 ", "flag"),
        ("OPS_PORT", " 3333 ", "environment"),
        ("DEFAULT_SCENARIO", " fail ", ".env.local"),
        ("MANUAL_TTL_MS", " 7 ", ".env)"),
        ("DEFAULT_DELAY_MS", " 2000 ", "default"),
    ] {
        assert!(line(name).contains(value) && line(name).contains(origin), "{}", line(name));
    }
    assert!(line("WEBHOOK_SECRET").contains("2 set, not shown"), "{told}");
    assert!(!told.contains("in-dot-env-local"), "{told}");
    assert!(!folder.path().join("data").exists(), "it only looked");
}

/// The command that it prints makes the key that an off-the-shelf verifier takes.
#[test]
fn the_verifiers_key_is_made_by_the_command_that_check_config_prints() {
    let folder = tempfile::tempdir().expect("a folder");
    for (secrets, keys) in [
        ("plain secret", &["cGxhaW4gc2VjcmV0"][..]),
        ("first , second", &["Zmlyc3Q=", "c2Vjb25k"][..]),
        ("whsec_MDEyMzQ1Njc4OWFiY2RlZg==", &[][..]),
    ] {
        let settings = [("WEBHOOK_SECRET", secrets)];
        let told = text(&run(folder.path(), &["--check-config"], &settings).stdout);
        let commands: Vec<&str> =
            told.lines().map(str::trim).filter(|line| line.starts_with("printf ")).collect();
        let made = commands.iter().map(|command| {
            let mut bash = Command::new("bash");
            let output = bash.args(["-c", command]).envs(settings).output().expect("bash");
            text(&output.stdout).trim().to_owned()
        });
        let wanted: Vec<String> = keys.iter().map(|key| format!("whsec_{key}")).collect();
        assert_eq!(made.collect::<Vec<_>>(), wanted, "{told}");
    }
}

#[test]
fn all_bad_values_are_told_at_once_with_what_is_allowed() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join(".env"), "RETENTION=soon\n").expect("written");
    let settings = [
        ("ENVIRONMENT", "production"),
        ("WEBHOOK_SECRET", "good, payment-sim-dev-secret"),
        ("GRPC_PORT", "eighty"),
        ("DEFAULT_SCENARIO", "aprove"),
        ("RANDOM_APPROVAL_RATE", "1.5"),
        ("STORE_URL", "postgres://user:hunter2@h/db"),
        ("NO_SUCH_SETTING", "is no error"),
    ];
    let ran = run(folder.path(), &["--max-in-flight", "-1"], &settings);
    assert_eq!(ran.status.code(), Some(78), "{ran:?}");
    assert!(ran.stdout.is_empty());
    let told = text(&ran.stderr);
    for part in [
        "GRPC_PORT (environment): \"eighty\"",
        "DEFAULT_SCENARIO (environment): \"aprove\"; allowed: one of approve, fail,",
        "RANDOM_APPROVAL_RATE (environment): \"1.5\"; allowed: a number from 0 to 1",
        "RETENTION (.env): \"soon\"",
        "MAX_IN_FLIGHT (flag): \"-1\"",
        "WEBHOOK_SECRET (environment): (value not shown)",
        "STORE_URL (environment): (value not shown)",
        "bad settings: 7",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    for hidden in ["hunter2", "good, payment", "NO_SUCH_SETTING"] {
        assert!(!told.contains(hidden), "{hidden}: {told}");
    }
}

#[test]
fn a_port_in_use_is_named_and_ends_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("its address");
    let [free] = free_ports::<1>();
    for (grpc, ops) in [(taken.port(), free), (free, taken.port())] {
        let (grpc, ops) = (grpc.to_string(), ops.to_string());
        let ran = run(folder.path(), &[], &[("GRPC_PORT", &grpc), ("OPS_PORT", &ops)]);
        assert_eq!(ran.status.code(), Some(1), "{ran:?}");
        let told = text(&ran.stderr);
        assert!(told.contains(&taken.to_string()) && told.contains("in use"), "{told}");
        assert!(!folder.path().join("data").exists(), "the store was opened all the same");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_instance_fails_loudly_and_the_first_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let launch = Launch::new(folder.path());
    let mut first = launch.start();
    first.ready(READY_WITHIN).await.unwrap_or_else(|why| panic!("{why}"));
    let data = format!("file:{}", folder.path().join("data").display());
    let ports = [launch.grpc_port, launch.ops_port].map(|port| port.to_string());

    // On the same ports, and with a folder of its own: SO_REUSEPORT must not let it in.
    let elsewhere = tempfile::tempdir().expect("a folder");
    let ran = run(elsewhere.path(), &[], &[("GRPC_PORT", &ports[0]), ("OPS_PORT", &ports[1])]);
    assert_eq!(ran.status.code(), Some(1), "{ran:?}");
    assert!(text(&ran.stderr).contains(&format!("127.0.0.1:{}", ports[0])), "{ran:?}");

    // On ports of its own, and in the same folder.
    let [grpc, ops] = free_ports::<2>().map(|port| port.to_string());
    let settings =
        [("GRPC_PORT", &*grpc), ("OPS_PORT", &*ops), ("STORE_URL", &*data), ("NO_COLOR", "1")];
    let ran = run(elsewhere.path(), &[], &settings);
    assert_eq!(ran.status.code(), Some(69), "{ran:?}");
    let told = text(&ran.stderr);
    assert!(told.contains("the store cannot be opened") && told.contains("another"), "{told}");

    assert!(first.exited().is_none());
    let created = client(launch.grpc_port).create_payment_intent(create("r", "")).await;
    created.expect("the first one still works");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_of_a_newer_format_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let launch = Launch::new(folder.path());
    let mut service = launch.start();
    service.ready(READY_WITHIN).await.unwrap_or_else(|why| panic!("{why}"));
    let created = client(launch.grpc_port).create_payment_intent(create("r", "")).await;
    let id = created.expect("created").into_inner().payment_intent_id;
    service.kill();
    let format = folder.path().join("data/FORMAT");
    let ours = fs::read_to_string(&format).expect("a format");
    let next = ours.trim().parse::<u32>().expect("a number") + 1;
    for other in [format!("{next}\n"), "99\n".to_owned(), "x\n".to_owned(), String::new()] {
        fs::write(&format, &other).expect("written");
        let before = names_and_sizes(&folder.path().join("data"));
        let mut refused = launch.start();
        let status = refused.exits(SOON).await.expect("it ends");
        let log = fs::read_to_string(launch.log()).expect("a log");
        assert_eq!(status.code(), Some(69), "{other:?}: {log}");
        assert!(log.contains("FORMAT") || log.contains("format"), "{log}");
        assert_eq!(
            names_and_sizes(&folder.path().join("data")),
            before,
            "{other:?}: it was touched"
        );
    }
    fs::write(&format, ours).expect("written");
    let mut service = launch.start();
    service.ready(READY_WITHIN).await.unwrap_or_else(|why| panic!("{why}"));
    let request = GetPaymentIntentRequest { payment_intent_id: id, ..Default::default() };
    client(launch.grpc_port).get_payment_intent(request).await.expect("it is still there");
}

fn names_and_sizes(folder: &Path) -> Vec<(std::path::PathBuf, u64)> {
    let size = |path: std::path::PathBuf| {
        let size = fs::metadata(&path).expect("a file").len();
        (path, size)
    };
    let mut found: Vec<_> = files(folder).into_iter().map(size).collect();
    found.sort();
    found
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_may_open_as_many_files_as_the_system_allows() {
    let folder = tempfile::tempdir().unwrap();
    let launch = Launch::new(folder.path()).under(&[
        "sh",
        "-c",
        "ulimit -Sn 256; ulimit -Hn 5000; exec \"$0\"",
    ]);
    let mut service = launch.start();
    service.ready(READY_WITHIN).await.unwrap();
    let limits = fs::read_to_string(format!("/proc/{}/limits", service.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let [soft, hard]: [&str; 2] =
        line.split_whitespace().skip(3).take(2).collect::<Vec<_>>().try_into().unwrap();
    assert_eq!((soft, hard), ("5000", "5000"));
    service.kill();
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_has_small_pages_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut service = Launch::new(folder.path()).start();
    service.ready(READY_WITHIN).await.unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", service.id())).unwrap();
    // Kernels before 5.0 do not say.
    if let Some(line) = status.lines().find(|line| line.starts_with("THP_enabled:")) {
        assert_eq!(line.split_whitespace().last(), Some("0"));
    }
    service.kill();
}
