//! The documents say what is so: their commands are run, their tables compared with the code.
//!
//! `UPDATE=1 cargo test --test docs` writes the two generated tables anew.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue};
use payment_sim::{
    api::{
        error::Reason,
        pb::{
            payment::v1::{self as pb, payment_service_client::PaymentServiceClient},
            simulation::v1::{self as sim, simulation_service_client::SimulationServiceClient},
        },
    },
    clock::Stopwatch,
    config::{
        self, EventSink,
        settings::{Binary, SETTINGS},
    },
    domain::{
        ids::PaymentId,
        money::{Currency, Money},
        payment::{Cancel, Command as Order, Method, Payment, Terms, Trace},
        scenario::{self, DrawKey, FailureReason, Plan, Scenario},
        time::Timestamp,
        timeline::Kind,
    },
    metrics::GRPC_METHODS,
    reservation::metrics::WorkerMetrics,
};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};
use standardwebhooks::{Webhook, WebhookError};
use tonic::transport::{Channel, Endpoint};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const BINARY: &str = env!("CARGO_BIN_EXE_payment-sim");
const SERVICE: &str = "payment.v1.PaymentService";
const SIMULATION: &str = "simulation.v1.SimulationService";
const DOCUMENTS: [&str; 11] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/api.md",
    "docs/simulation.md",
    "docs/webhooks.md",
    "docs/events.md",
    "docs/operations.md",
    "docs/performance.md",
    "docs/reservation-worker.md",
];
/// Longest wait for what must happen.
const SOON: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);
/// Another process may take a free port before the service does.
const STARTS_TRIED: usize = 3;
/// The id that the documents' examples name.
const EXAMPLE_ID: &str = "pi_01M7YXEA357V7JDH0C147D6FCY";

// ---- The documents as text ----

fn read(path: impl AsRef<Path>) -> String {
    let path = Path::new(ROOT).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What stands under a heading, up to the next one of its level or above.
fn section(document: &str, heading: &str) -> String {
    let text = read(document);
    let level = heading.split(' ').next().unwrap().len();
    let start = text
        .find(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("{document} has no {heading}"));
    let mut fenced = false;
    let ends = |line: &str| {
        let hashes = line.chars().take_while(|c| *c == '#').count();
        (1..=level).contains(&hashes) && line[hashes..].starts_with(' ')
    };
    let lines = text[start + heading.len() + 2..].lines();
    let lines = lines.take_while(|line| {
        fenced ^= line.trim_start().starts_with("```");
        fenced || !ends(line)
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The cells of every row of the tables in a text, without their heads.
fn rows(text: &str) -> Vec<Vec<String>> {
    let table_lines: Vec<&str> = text.lines().filter(|line| line.starts_with("| ")).collect();
    let is_head = |at: usize| table_lines.get(at + 1).is_some_and(|next| next.starts_with("| ---"));
    let body = table_lines
        .iter()
        .enumerate()
        .filter(|(at, line)| !is_head(*at) && !line.starts_with("| ---"));
    body.map(|(_, line)| {
        line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
    })
    .collect()
}

/// What stands between single backticks, code blocks aside.
fn code_spans(text: &str) -> Vec<String> {
    let mut fenced = false;
    let lines = text.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fence && !fenced
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The code blocks of a language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut current: Option<String> = None;
    for line in text.lines() {
        match &mut current {
            None if line.trim_start() == format!("```{language}") => current = Some(String::new()),
            Some(_) if line.trim_start() == "```" => found.extend(current.take()),
            Some(block) => {
                block.push_str(line);
                block.push('\n');
            }
            None => {}
        }
    }
    found
}

#[expect(clippy::disallowed_methods, reason = "a test has no Config")]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Compares what stands between two markers, or writes it.
fn compare_generated(document: &str, name: &str, wanted: &str) {
    let text = read(document);
    let begin = format!("<!-- {name}: written by `UPDATE=1 cargo test --test docs` -->\n");
    let end = format!("<!-- /{name} -->");
    let (before, rest) =
        text.split_once(&begin).unwrap_or_else(|| panic!("{document}: no {begin}"));
    let (found, after) = rest.split_once(&end).unwrap_or_else(|| panic!("{document}: no {end}"));
    if variable("UPDATE").is_some() {
        fs::write(Path::new(ROOT).join(document), [before, &begin, wanted, &end, after].concat())
            .unwrap();
    } else {
        assert_eq!(found, wanted, "{document}: run UPDATE=1 cargo test --test docs");
    }
}

fn set<T: Into<String>>(names: impl IntoIterator<Item = T>) -> BTreeSet<String> {
    names.into_iter().map(Into::into).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> =
        entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect();
    found.sort();
    found
}

// ---- Tables against the code ----

/// One test for both generated parts: two that write one file at a time would undo each other.
#[test]
fn the_generated_tables_are_the_codes() {
    compare_generated("README.md", "settings", &config::markdown_table());
    compare_generated("ARCHITECTURE.md", "layout", &layout());
}

/// Every file of `src/` with the beginning of its comment.
fn layout() -> String {
    let root = Path::new(ROOT).join("src");
    let mut table = String::from("| file | what it is |\n| --- | --- |\n");
    for path in files(&root) {
        let name = path.strip_prefix(&root).unwrap().to_str().unwrap();
        if name.ends_with("tests.rs") {
            continue;
        }
        let text = read(&path);
        let comment = text.lines().map_while(|line| line.strip_prefix("//! "));
        let comment = comment.collect::<Vec<_>>().join(" ");
        assert!(!comment.is_empty(), "src/{name} does not say what it is");
        // "Identifiers." says too little: then the next sentence too.
        let mut sentence = String::new();
        for next in comment.split_inclusive(". ") {
            if sentence.len() < 32 {
                sentence.push_str(next);
            }
        }
        let sentence = sentence.trim_end();
        // rustdoc's links are none here.
        let sentence = sentence.replace("[`", "`").replace("`]", "`");
        table.push_str(&format!("| `src/{name}` | {sentence} |\n"));
    }
    table
}

#[test]
fn every_setting_is_in_help() {
    let help = run(&["--help"], &[]);
    for setting in Binary::PaymentSim.settings() {
        let flag = format!("--{} ", setting.name.to_lowercase().replace('_', "-"));
        assert!(
            help.out.contains(&flag) && help.out.contains(&format!("[{};", setting.name)),
            "{}",
            setting.name
        );
    }
}

#[test]
fn settings_that_documents_and_manifests_name_exist() {
    let known = set(SETTINGS.iter().map(|setting| setting.name));
    let mut named = BTreeSet::new();
    for path in files(&Path::new(ROOT).join("k8s")) {
        for line in read(&path).lines().map(str::trim) {
            let literal =
                line.strip_prefix("- ").and_then(|line| line.split_once('=')).map(|(name, _)| name);
            let name = literal.or(line.strip_prefix("- name: "));
            let entry = line.split_once(": ").map(|(name, _)| name);
            named.extend(
                [name, entry]
                    .into_iter()
                    .flatten()
                    .filter(|name| is_variable(name))
                    .map(str::to_owned),
            );
        }
    }
    assert!(named.contains("STORE_URL") && named.contains("WEBHOOK_SECRET"), "{named:?}");
    assert!(named.is_subset(&known), "{:?}", named.difference(&known));
    // In prose a setting may have a value; what looks like one and is none must be known to us.
    let ours = known.iter().map(|name| name.split('_').next().unwrap()).collect::<BTreeSet<_>>();
    let mut no_settings = set(Reason::ALL.map(Reason::name));
    no_settings.extend(["NO_COLOR", "NO_WEBHOOK_URL", "AWS_ACCESS_KEY_ID"].map(str::to_owned));
    let constants = all_source();
    for document in DOCUMENTS {
        for span in code_spans(&read(document)) {
            let name = span.split('=').next().unwrap();
            let is_ours = is_variable(name)
                && name.contains('_')
                && ours.contains(name.split('_').next().unwrap());
            let is_constant = constants.contains(&format!("const {name}:"));
            let fine =
                !is_ours || is_constant || known.contains(name) || no_settings.contains(name);
            assert!(fine, "{document}: {span}");
        }
    }
}

fn is_variable(name: &str) -> bool {
    name.len() > 3
        && name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_' || b.is_ascii_digit())
}

fn all_source() -> String {
    files(&Path::new(ROOT).join("src")).iter().map(read).collect()
}

#[test]
fn the_errors_table_is_the_codes() {
    let documented: Vec<[String; 3]> = rows(&section("docs/api.md", "## Errors"))
        .into_iter()
        .map(|row| [row[0].trim_matches('`').to_owned(), row[1].clone(), row[2].clone()])
        .collect();
    let wanted: Vec<[String; 3]> = Reason::ALL
        .iter()
        .map(|reason| {
            let retry = reason
                .retry_after()
                .map_or(String::new(), |after| format!("{} ms", after.as_millis()));
            [reason.name().to_owned(), wire_name(&format!("{:?}", reason.code())), retry]
        })
        .collect();
    assert_eq!(documented, wanted);
}

/// `InvalidArgument` as the gRPC documents spell it.
fn wire_name(camel: &str) -> String {
    let mut name = String::new();
    for c in camel.chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

#[test]
fn the_calls_tables_are_the_protocols() {
    calls_table_is_the_protocols("docs/api.md", SERVICE);
    calls_table_is_the_protocols("docs/simulation.md", SIMULATION);
}

fn calls_table_is_the_protocols(document: &str, service_name: &str) {
    let pool = protocol();
    let service = pool.get_service_by_name(service_name).unwrap();
    let wanted: Vec<(String, Vec<String>)> = service
        .methods()
        .map(|method| {
            let fields = method.input().fields().map(|field| field.name().to_owned()).collect();
            (method.name().to_owned(), fields)
        })
        .collect();
    let documented: Vec<(String, Vec<String>)> = rows(&section(document, "## Calls"))
        .iter()
        .filter(|row| row.len() == 3)
        .map(|row| (row[0].trim_matches('`').to_owned(), code_spans(&row[2])))
        .collect();
    assert_eq!(documented, wanted);
    let measured = GRPC_METHODS.iter().filter(|(service, _)| *service == service_name);
    let measured = measured.map(|(_, method)| *method);
    assert_eq!(set(measured), set(wanted.into_iter().map(|(name, _)| name)));
}

#[test]
fn the_short_lists_are_the_codes() {
    let first = |rows: Vec<Vec<String>>| {
        rows.into_iter().map(|row| row[0].trim_matches('`').to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(
        first(rows(&section("README.md", "## Scenarios"))),
        Scenario::ALL.map(Scenario::as_str)
    );
    let events = read("docs/events.md");
    let sinks = first(rows(events.split("\n## ").next().unwrap()));
    assert_eq!(set(sinks), set(EventSink::NAMES.iter().copied()));

    let statuses = section("docs/api.md", "## Statuses");
    let reasons: Vec<String> =
        rows(&statuses).into_iter().filter(|row| row.len() == 2).map(|row| row.join(" ")).collect();
    let wanted = FailureReason::ALL
        .map(|reason| format!("`{}` {}", reason.as_str(), reason.response_code()));
    assert_eq!(reasons, wanted);

    let courier = read("src/courier/webhook.rs") + &read("src/outbox/webhooks.rs");
    let is_error = |text: &str| {
        let is_word = text.len() >= 3 && text.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
        is_word && text != "CARGO_PKG_VERSION"
    };
    let in_code = set(courier.split('"').skip(1).step_by(2).filter(|text| is_error(text)));
    let delivery = section("docs/webhooks.md", "## Delivery");
    let (_, listed) = delivery.split_once("An attempt's `error` is").unwrap();
    let listed = code_spans(listed.split(".\n").next().unwrap());
    let settings = set(SETTINGS.iter().map(|setting| setting.name));
    let documented =
        set(listed.into_iter().filter(|name| is_error(name) && !settings.contains(name)));
    assert_eq!(documented, in_code);
}

#[test]
fn the_dependencies_are_those_of_the_manifest() {
    let manifest = read("Cargo.toml");
    let mut names = BTreeSet::new();
    let mut is_dependencies = false;
    for line in manifest.lines() {
        if line.starts_with('[') {
            is_dependencies = line.ends_with("dependencies]");
        } else if is_dependencies && let Some((name, _)) = line.split_once(" = ") {
            names.insert(name.to_owned());
        }
    }
    let table = rows(&section("ARCHITECTURE.md", "## Dependencies"));
    assert!(
        table.iter().all(|row| row.len() == 2 && !row[1].is_empty()),
        "every one has its reason"
    );
    let justified: Vec<String> =
        table.iter().map(|row| row[0].trim_matches('`').to_owned()).collect();
    let found = set(justified.clone());
    let differing: Vec<_> = names.symmetric_difference(&found).collect();
    assert!(differing.is_empty(), "only on one side: {differing:?}");
    assert_eq!(justified.len(), names.len(), "each once");
}

#[test]
fn the_tables_of_the_store_are_the_codes() {
    let source = read("src/store/tables.rs");
    let (_, arms) = source.split_once("fn name(self)").unwrap();
    let arms = arms.split("}\n    }").next().unwrap();
    let wanted: Vec<&str> = arms.split('"').skip(1).step_by(2).collect();
    let documented = rows(&section("ARCHITECTURE.md", "## The store"));
    let documented: Vec<&str> = documented.iter().map(|row| row[0].trim_matches('`')).collect();
    assert_eq!(documented, wanted);
}

// ---- Numbers against constants ----

/// "`src/x.rs`: `NAME = expr`, `field: expr`": the file has it, and the line tells its value.
#[test]
fn the_numbers_are_the_constants() {
    let mut compared = 0;
    for document in DOCUMENTS {
        for line in read(document).lines() {
            for reference in line.split("`src/").skip(1) {
                let Some((file, rest)) = reference.split_once("`: `") else { continue };
                let source =
                    read(format!("src/{file}")).split_whitespace().collect::<Vec<_>>().join(" ");
                let rest = rest.split(['|', ')']).next().map_or(rest, |_| rest);
                for snippet in
                    rest.split("` |").next().unwrap().split("`)").next().unwrap().split("`, `")
                {
                    let snippet = snippet.trim_end_matches('`');
                    let value = constant(&source, snippet)
                        .unwrap_or_else(|| panic!("{document}: src/{file} has no {snippet}"));
                    let said = value.iter().any(|text| line.contains(text.as_str()));
                    assert!(said, "{document} should say one of {value:?}: {line}");
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 40, "only {compared} were found");
}

/// How people write the value of a constant or field, where the source gives it that value.
fn constant(source: &str, snippet: &str) -> Option<Vec<String>> {
    let expression = match snippet.split_once(" = ") {
        Some((name, expression)) => {
            let is_it = |at: usize| {
                let declaration = source[at..].split(';').next().unwrap();
                declaration.split_once(" = ").is_some_and(|(_, found)| found == expression)
            };
            let declared = format!("const {name}: ");
            source.match_indices(&declared).any(|(at, _)| is_it(at)).then_some(expression)
        }
        None => {
            let (_, expression) = snippet.split_once(": ")?;
            let follows = |end: &str| source.contains(&format!("{snippet}{end}"));
            [",", " }"].into_iter().any(follows).then_some(expression)
        }
    }?;
    Some(readings(expression))
}

fn readings(expression: &str) -> Vec<String> {
    let inner =
        |prefix: &str| expression.strip_prefix(prefix)?.strip_suffix(')')?.parse::<u64>().ok();
    if let Some(seconds) = inner("Duration::from_secs(") {
        return vec![format!("{seconds} s"), format!("{} min", seconds / 60)];
    }
    if let Some(ms) = inner("Duration::from_millis(") {
        return vec![format!("{ms} ms")];
    }
    let number = |text: &str| {
        text.trim().replace('_', "").parse::<u64>().unwrap_or_else(|_| panic!("{expression}"))
    };
    let value = match (expression.split_once(" * "), expression.split_once(" << ")) {
        (Some((a, b)), _) => number(a) * number(b),
        (None, Some((a, b))) => number(a) << number(b),
        (None, None) => number(expression),
    };
    let mut texts = vec![grouped(value)];
    for (unit, name) in [(1 << 10, "KiB"), (1 << 20, "MiB")] {
        if value % unit == 0 {
            texts.push(format!("{} {name}", value / unit));
        }
    }
    if value == 1_000_000_000_000 {
        texts.push("10¹²".to_owned());
    }
    if value == 60_000 {
        texts.push("a minute".to_owned());
    }
    texts
}

/// 4096 as 4,096.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

// ---- Names of files, targets and tests ----

#[test]
fn files_that_documents_name_exist() {
    // Made by a build or by the tools, or somewhere else altogether.
    const MADE: [&str; 11] = [
        "bin/",
        "target/",
        "data/",
        "worker-data/",
        ".tools/",
        ".venv",
        "fjall/",
        "derived/",
        ".run/",
        "application/",
        "payment-sim/",
    ];
    for document in DOCUMENTS {
        let text = read(document);
        let folder = Path::new(ROOT).join(document).parent().unwrap().to_owned();
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            if path.contains("://") {
                continue;
            }
            let target =
                if path.is_empty() { Path::new(ROOT).join(document) } else { folder.join(path) };
            assert!(target.exists(), "{document} links to {link}");
            if !anchor.is_empty() {
                assert!(anchors(&read(&target)).contains(anchor), "{document} links to {link}");
            }
        }
        for span in code_spans(&text) {
            let (path, test) = span.split_once("::").unwrap_or((&span, ""));
            let is_path = path.chars().all(|c| c.is_ascii_alphanumeric() || "./_-".contains(c));
            let is_source =
                path.ends_with(".rs") || path.ends_with(".toml") || path.ends_with(".md");
            let names_a_file =
                is_path && (path.contains('/') || is_source) && !path.starts_with('/');
            if !names_a_file || MADE.iter().any(|made| path.starts_with(made)) {
                continue;
            }
            let found = [path.to_owned(), format!("src/{path}")]
                .into_iter()
                .find(|path| Path::new(ROOT).join(path).exists());
            let found = found.unwrap_or_else(|| panic!("{document} names {path}"));
            assert!(
                test.is_empty() || read(found).contains(&format!("fn {test}(")),
                "{document} names {span}"
            );
        }
    }
}

/// The anchors that headings get.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter_map(|line| {
        line.trim_start_matches('#').strip_prefix(' ').filter(|_| line.starts_with('#'))
    });
    let kept = |c: &char| c.is_alphanumeric() || *c == '-' || *c == ' ';
    headings
        .map(|heading| {
            heading.to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")
        })
        .collect()
}

#[test]
fn commands_that_documents_name_exist() {
    let makefile = read("Makefile");
    let script = read("scripts/run_local.sh");
    let mut named = BTreeSet::new();
    for document in DOCUMENTS {
        let text = read(document);
        let commands = blocks(&text, "bash").join("\n");
        let lines = commands.lines().map(str::to_owned).chain(code_spans(&text));
        for line in lines {
            let line = line.trim();
            if let Some(rest) = line.strip_prefix("make ") {
                let target: String =
                    rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
                assert!(makefile.contains(&format!("\n{target}:")), "{document}: make {target}");
                named.insert(target);
            }
            if let Some(rest) = line.strip_prefix("scripts/run_local.sh ") {
                let verb = rest.split(' ').next().unwrap();
                assert!(script.contains(&format!("\n{verb}() {{")), "{document}: {line}");
            }
            let flag = line.strip_prefix("payment-sim ").and_then(|rest| rest.split(' ').next());
            if let Some(flag) = flag {
                assert!(run(&["--help"], &[]).out.contains(flag), "{document}: {line}");
            }
        }
    }
    for target in ["run", "test", "perf-test", "docker-run", "crash-test"] {
        assert!(named.contains(target), "no document names make {target}");
    }
    let readme = read("README.md");
    let first_screen: String = readme.lines().take(20).collect::<Vec<_>>().join("\n");
    assert!(first_screen.contains("make run ") && first_screen.contains("make test "));
}

// ---- The state diagram against the state machine ----

#[test]
fn the_state_diagram_is_what_the_state_machine_does() {
    let diagram = blocks(&section("docs/api.md", "## Statuses"), "mermaid").concat();
    let drawn = diagram.lines().filter_map(|line| line.trim().split_once(" --> "));
    let drawn: BTreeSet<(String, String)> = drawn
        .map(|(from, to)| (from.to_owned(), to.to_owned()))
        .filter(|(from, _)| from != "[*]")
        .collect();
    let mut seen = BTreeSet::new();
    for scenario in Scenario::ALL {
        walk(new_payment(scenario), 4, &mut seen);
    }
    assert_eq!(drawn, seen);
}

const NOW: Timestamp = Timestamp::from_ms(1_767_225_600_000);

fn new_payment(scenario: Scenario) -> Payment {
    let settings = scenario::Settings {
        default_scenario: scenario,
        default_delay: Duration::from_secs(2),
        timeout_settle: Duration::from_secs(30),
        manual_ttl: Duration::from_secs(20),
        random_approval_rate: 0.8,
        seed: 0,
    };
    Payment::create(Arc::new(Terms {
        id: PaymentId::from_parts(NOW, 1),
        reservation_id: "r".into(),
        user_id: "u".into(),
        amount: Money { amount: 1_000, currency: Currency::parse("KRW").unwrap() },
        vat: None,
        method: Method::Unspecified,
        plan: Plan::draw(scenario, &settings, &DrawKey::Idempotency("k"), NOW),
        provider: "sim".into(),
        webhook_url: Some("http://localhost/".into()),
        events: true,
        metadata: None,
        echo: None,
        card: None,
        created_at: NOW,
        trace: Trace::default(),
        idempotency: None,
        renderer: 1,
    }))
}

/// Every sequence of commands of a length, now and when everything is due; a payment's own timeline tells
/// which way it went, also where one command took two steps.
fn walk(payment: Payment, steps: usize, seen: &mut BTreeSet<(String, String)>) {
    let entries = payment.progress.timeline.entries().iter();
    let statuses: Vec<_> = entries
        .filter(|entry| matches!(entry.kind, Kind::Created | Kind::StatusChanged))
        .map(|entry| entry.status.short().to_owned())
        .collect();
    seen.extend(statuses.windows(2).map(|pair| (pair[0].clone(), pair[1].clone())));
    if steps == 0 {
        return;
    }
    let part = Money { amount: 300, ..payment.terms.amount };
    let orders = [
        Order::Wake,
        Order::Process { card: None, vat: None },
        Order::Cancel(Cancel::default()),
        Order::Cancel(Cancel { amount: Some(part), ..Cancel::default() }),
        Order::SimulateWebhook { target: None, at: NOW },
    ];
    for order in orders {
        for now in [NOW, NOW.plus_ms(60_000)] {
            if let Some(after) = payment.transition(order.clone(), now).changed {
                walk(after, steps - 1, seen);
            }
        }
    }
}

// ---- The binary, from outside ----

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

/// Runs the binary to its end, in a folder and an environment of its own.
fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
    let folder = tempfile::tempdir().unwrap();
    let output = command(folder.path(), environment).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

fn command(folder: &Path, environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(BINARY);
    command.current_dir(folder).env_clear().envs(environment.iter().copied()).stdin(Stdio::null());
    command
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The service on free ports; killed when dropped.
struct Service {
    process: Child,
    grpc: u16,
    ops: u16,
    /// Its standard output, line by line.
    events: mpsc::Receiver<String>,
    _folder: tempfile::TempDir,
}

impl Service {
    fn start() -> Self {
        Self::start_with(&[])
    }

    fn start_with(settings: &[(&str, &str)]) -> Self {
        let started = (0..STARTS_TRIED).find_map(|_| Self::try_start(settings));
        started.expect("the service did not become ready")
    }

    fn try_start(settings: &[(&str, &str)]) -> Option<Self> {
        let (folder, grpc, ops) = (tempfile::tempdir().unwrap(), free_port(), free_port());
        let (grpc_text, ops_text) = (grpc.to_string(), ops.to_string());
        let ports = [("GRPC_PORT", &*grpc_text), ("OPS_PORT", &*ops_text), ("LOG_LEVEL", "warn")];
        let environment = [&ports[..], settings].concat();
        let mut command = command(folder.path(), &environment);
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        let (sender, events) = mpsc::channel();
        thread::spawn(move || {
            out.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let mut service = Self { process, grpc, ops, events, _folder: folder };
        let watch = Stopwatch::start();
        while watch.elapsed() < SOON && service.process.try_wait().unwrap().is_none() {
            if get(ops, "/readyz").is_some_and(|(status, _)| status == 200) {
                return Some(service);
            }
            thread::sleep(POLL);
        }
        None
    }

    async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{}", self.grpc)).unwrap();
        endpoint.connect().await.unwrap()
    }

    async fn client(&self) -> PaymentServiceClient<Channel> {
        PaymentServiceClient::new(self.channel().await)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended already.
        let _gone = self.process.kill();
        let _status = self.process.wait();
    }
}

fn get(port: u16, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(SOON)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).ok()?;
    let (head, body) = reply.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let is_chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    assert!(!is_chunked, "this reader does not unchunk");
    Some((status, body.to_owned()))
}

#[test]
fn the_exit_codes_are_the_documents() {
    let documented: BTreeSet<i32> = rows(&section("docs/operations.md", "## Exit codes"))
        .iter()
        .map(|row| row[0].parse().unwrap())
        .collect();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().port().to_string();
    let free = free_port().to_string();
    let newer = tempfile::tempdir().unwrap();
    fs::write(newer.path().join("FORMAT"), "99\n").unwrap();
    let newer = format!("file:{}", newer.path().display());
    let ports = [("GRPC_PORT", &*free), ("OPS_PORT", &*taken)];
    let other = free_port().to_string();
    let store = [("GRPC_PORT", &*free), ("OPS_PORT", &*other), ("STORE_URL", &*newer)];
    for (code, ran, said) in [
        (0, run(&["--help"], &[]), ""),
        (0, run(&["--version"], &[]), ""),
        (0, run(&["--check-config"], &[]), ""),
        (1, run(&[], &ports), "cannot be bound: Address already in use"),
        (1, run(&["healthcheck"], &[("OPS_PORT", &other)]), "does not answer"),
        (2, run(&["--no-such-flag"], &[]), "--no-such-flag"),
        (69, run(&[], &store), "has format 99"),
        (78, run(&[], &[("GRPC_PORT", "0"), ("RETENTION", "soon")]), "RETENTION"),
        (78, run(&[], &[("ENVIRONMENT", "production")]), "WEBHOOK_SECRET (default): not set"),
    ] {
        assert_eq!(ran.code, Some(code), "{}{}", ran.out, ran.err);
        assert!(ran.err.contains(said), "{said}: {}", ran.err);
        assert!(documented.contains(&code), "{code} is in no document");
    }
    // 70, 74, 130 and 134 take a bug, a broken disk or a second signal: other tests' business.
    let in_source: BTreeSet<i32> = all_source()
        .split("const EXIT_")
        .skip(1)
        .map(|rest| rest.split(" = ").nth(1).unwrap().split(';').next().unwrap().parse().unwrap())
        .collect();
    assert!(in_source.is_subset(&documented), "{in_source:?}");
}

#[test]
fn health_and_metrics_are_as_documented() {
    let service = Service::start();
    let (status, health) = get(service.ops, "/health").unwrap();
    assert_eq!(status, 200);
    let example = blocks(&section("README.md", "## Quick start"), "json").pop().unwrap();
    let still = |text: &str| {
        let mut health: serde_json::Value = serde_json::from_str(text).unwrap();
        assert!(health["uptime_seconds"].take().is_u64());
        health
    };
    assert_eq!(still(&health), still(&example));

    let (_, text) = get(service.ops, "/metrics").unwrap();
    check_metrics(&text, &section("docs/operations.md", "## Metrics"));
    let text = text + &WorkerMetrics::new().render();
    for document in DOCUMENTS {
        for span in code_spans(&read(document)) {
            let name = span.split('{').next().unwrap();
            let is_metric =
                ["_total", "_seconds"].iter().any(|end| name.ends_with(end)) && name.contains("_");
            let is_field = ["delay_seconds", "uptime_seconds"].contains(&name);
            assert!(
                !is_metric || is_field || text.contains(&format!("# TYPE {name} ")),
                "{document}: {span}"
            );
        }
    }
}

#[test]
fn the_workers_metrics_are_as_documented() {
    let table = section("docs/reservation-worker.md", "## Probes and metrics");
    check_metrics(&WorkerMetrics::new().render(), &table);
}

/// What is served is in the table, and the other way round, with its labels.
fn check_metrics(text: &str, table: &str) {
    let served = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let table = rows(table);
    let documented = set(table.iter().flat_map(|row| code_spans(&row[0])));
    // process_* is Linux's alone.
    let here = |name: &String| cfg!(target_os = "linux") || !name.starts_with("process_");
    assert_eq!(set(served), documented.into_iter().filter(here).collect());
    for row in table {
        for label in code_spans(&row[1]) {
            let name = code_spans(&row[0]).remove(0);
            let labelled = text
                .lines()
                .any(|line| line.starts_with(&name) && line.contains(&format!("{label}=\"")));
            assert!(labelled, "{name} has no label {label}");
        }
    }
}

#[test]
fn sigterm_drains_and_ends_with_zero() {
    let mut service = Service::start();
    let asked =
        Command::new("kill").args(["-TERM", &service.process.id().to_string()]).status().unwrap();
    assert!(asked.success());
    let watch = Stopwatch::start();
    let status = service.process.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(watch.elapsed() < Duration::from_secs(29));
}

// ---- The README's commands ----

/// What the build compiled.
fn protocol() -> DescriptorPool {
    let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/payment_sim_descriptor.bin"));
    DescriptorPool::decode(&bytes[..]).unwrap()
}

/// Reads JSON as grpcurl does: by the descriptors.
fn message<T: Message + Default>(name: &str, json: &str) -> T {
    let descriptor = protocol().get_message_by_name(name).unwrap();
    let mut reader = serde_json::Deserializer::from_str(json);
    let read = DynamicMessage::deserialize(descriptor, &mut reader);
    let read = read.unwrap_or_else(|error| panic!("{name}: {error} in {json}"));
    T::decode(&*read.encode_to_vec()).unwrap()
}

/// The calls of a document's grpcurl and ghz commands: method and body, in order.
fn calls(text: &str, service: &str) -> Vec<(String, String)> {
    let commands = format!("\n{}", blocks(text, "bash").join("\n")).replace("\\\n", " ");
    let mut found = Vec::new();
    for part in commands.split("\ngrpcurl ").skip(1) {
        let Some((_, rest)) = part.split_once("-d '") else { continue };
        let (body, rest) = rest.split_once('\'').unwrap();
        let method = rest.split_once(&format!("localhost:8030 {service}/")).unwrap().1;
        found.push((method.split_whitespace().next().unwrap().to_owned(), body.to_owned()));
    }
    for part in commands.split("\nghz ").skip(1) {
        let (_, rest) = part.split_once(&format!("--call {service}.")).unwrap();
        let method = rest.split_whitespace().next().unwrap().to_owned();
        let body = rest.split_once("-d '").unwrap().1.split_once('\'').unwrap().0;
        found.push((method, body.to_owned()));
    }
    found
}

/// One request as a receiver got it.
struct Received {
    headers: HeaderMap,
    body: Vec<u8>,
}

/// A webhook receiver that says 204 to everything.
fn receiver() -> (SocketAddr, mpsc::Receiver<Received>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (listener.local_addr().unwrap(), receive(listener))
}

fn receive(listener: TcpListener) -> mpsc::Receiver<Received> {
    let (sender, received) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut headers = HeaderMap::new();
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            loop {
                line.clear();
                stream.read_line(&mut line).unwrap();
                let Some((name, value)) = line.trim_end().split_once(": ") else { break };
                let name = HeaderName::try_from(name).unwrap();
                headers.insert(name, HeaderValue::try_from(value).unwrap());
            }
            let length = headers["content-length"].to_str().unwrap().parse().unwrap();
            let mut body = vec![0; length];
            stream.read_exact(&mut body).unwrap();
            stream
                .get_mut()
                .write_all(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
                .unwrap();
            if sender.send(Received { headers, body }).is_err() {
                break;
            }
        }
    });
    received
}

#[tokio::test]
async fn the_readmes_commands_do_what_it_says() {
    let service = Service::start();
    let mut client = service.client().await;
    let (address, webhooks) = receiver();
    let name = |method: &str, end: &str| format!("payment.v1.{method}{end}");
    let mut id = String::new();
    let mut created = Stopwatch::start();
    let calls = calls(&read("README.md"), SERVICE);
    let methods: Vec<&str> = calls.iter().map(|(method, _)| method.as_str()).collect();
    assert_eq!(
        methods,
        ["CreatePaymentIntent", "GetPaymentIntent", "CancelPayment", "CreatePaymentIntent"]
    );
    for (method, body) in &calls {
        let body = body.replace(EXAMPLE_ID, &id).replace("127.0.0.1:9000", &address.to_string());
        match method.as_str() {
            "CreatePaymentIntent" => {
                created = if id.is_empty() { Stopwatch::start() } else { created };
                let request: pb::CreatePaymentIntentRequest =
                    message(&name(method, "Request"), &body);
                let reply = client.create_payment_intent(request).await.unwrap().into_inner();
                assert_eq!(reply.status(), pb::PaymentStatus::Pending);
                id = if id.is_empty() { reply.payment_intent_id } else { id };
            }
            "GetPaymentIntent" => {
                let request: pb::GetPaymentIntentRequest = message(&name(method, "Request"), &body);
                let reply = client.get_payment_intent(request).await.unwrap().into_inner();
                let payment = reply.payment.unwrap();
                assert_eq!(payment.status(), pb::PaymentStatus::Completed);
                assert_eq!((payment.timeline.len(), reply.deliveries.len()), (2, 2));
            }
            "CancelPayment" => {
                let request: pb::CancelPaymentRequest = message(&name(method, "Request"), &body);
                let reply = client.cancel_payment(request).await.unwrap().into_inner();
                assert_eq!(reply.refunded_amount.unwrap().amount, 40_000);
            }
            other => panic!("the README calls {other}, which this test does not know"),
        }
    }
    // Its example of a reply has the reply's fields.
    let example = blocks(&section("README.md", "## Quick start"), "json").remove(0);
    let example: pb::CreatePaymentIntentResponse =
        message(&name("CreatePaymentIntent", "Response"), &example);
    assert_eq!(example.payment_intent_id, EXAMPLE_ID);
    assert_eq!(example.client_secret.len() - EXAMPLE_ID.len(), "_secret_".len() + 24);

    let webhook = webhooks.recv_timeout(SOON).unwrap();
    assert!(created.elapsed() >= Duration::from_secs(2), "told too early");
    assert!(created.elapsed() < Duration::from_secs(6), "told too late");
    let event = service.events.recv_timeout(SOON).unwrap();
    check_webhook(&webhook, &event, &id);
}

/// The only dead delivery, once there is one.
async fn dead(
    client: &mut SimulationServiceClient<Channel>,
    request: &sim::ListDeliveriesRequest,
) -> sim::ListedDelivery {
    let watch = Stopwatch::start();
    loop {
        let reply = client.list_deliveries(request.clone()).await.unwrap().into_inner();
        match <[_; 1]>::try_from(reply.deliveries) {
            Ok([delivery]) => return delivery,
            Err(_) if watch.elapsed() < SOON => tokio::time::sleep(POLL).await,
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn the_simulation_pages_commands_do_what_it_says() {
    let settings = [("WEBHOOK_MAX_ATTEMPTS", "1"), ("DEFAULT_DELAY_MS", "0")];
    let service = Service::start_with(&settings);
    let mut client = SimulationServiceClient::new(service.channel().await);
    let port = free_port();
    let url = format!("http://127.0.0.1:{port}/webhooks");
    let body = format!(
        r#"{{"reservation_id": "r", "user_id": "u", "webhook_url": "{url}",
            "amount": {{"amount": 1, "currency": "KRW"}}}}"#
    );
    let create: pb::CreatePaymentIntentRequest =
        message("payment.v1.CreatePaymentIntentRequest", &body);
    let reply = service.client().await.create_payment_intent(create).await.unwrap();
    let id = reply.into_inner().payment_intent_id;

    let page = read("docs/simulation.md");
    let calls = calls(&page, SIMULATION);
    let methods: Vec<&str> = calls.iter().map(|(method, _)| method.as_str()).collect();
    assert_eq!(methods, ["ListDeliveries", "Redeliver", "Redeliver", "ListDeliveries"]);
    let request = |at: usize, kind: &str| {
        let body = calls[at].1.replace(&EXAMPLE_ID[3..], &id[3..]);
        (kind.to_owned(), body.replace("127.0.0.1:9000", &format!("127.0.0.1:{port}")))
    };
    let (name, list) = request(0, "simulation.v1.ListDeliveriesRequest");
    let died = dead(&mut client, &message(&name, &list)).await;
    let example = blocks(&section("docs/simulation.md", "## Calls"), "json").remove(0);
    let example: sim::ListDeliveriesResponse =
        message("simulation.v1.ListDeliveriesResponse", &example);
    let example = example.deliveries[0].delivery.clone().unwrap();
    let delivery = died.delivery.unwrap();
    assert_eq!((died.payment_intent_id, &delivery.url), (id.clone(), &url));
    assert_eq!(delivery.delivery_id, example.delivery_id.replace(&EXAMPLE_ID[3..], &id[3..]));
    assert_eq!(delivery.attempts[0].error, example.attempts[0].error);

    let webhooks = receive(TcpListener::bind(("127.0.0.1", port)).unwrap());
    let (name, order) = request(1, "simulation.v1.RedeliverRequest");
    let reply = client.redeliver(message::<sim::RedeliverRequest>(&name, &order)).await.unwrap();
    assert_eq!(reply.into_inner().ordered, 1);
    let webhook = webhooks.recv_timeout(SOON).unwrap();
    assert_eq!(webhook.headers["webhook-id"], format!("evt_{}_1", &id[3..]));
    let (name, order) = request(2, "simulation.v1.RedeliverRequest");
    let reply = client.redeliver(message::<sim::RedeliverRequest>(&name, &order)).await.unwrap();
    assert_eq!(reply.into_inner().ordered, 0, "none is dead any more");
    let (name, all) = request(3, "simulation.v1.ListDeliveriesRequest");
    let all: sim::ListDeliveriesRequest = message(&name, &all);
    assert_eq!(client.list_deliveries(all).await.unwrap().into_inner().deliveries.len(), 2);
}

/// Headers, keys, signatures and event are what the pages on them say.
fn check_webhook(webhook: &Received, event: &str, id: &str) {
    let documented = rows(&section("docs/webhooks.md", "## Headers"));
    for header in documented.iter().map(|row| row[0].trim_matches('`')) {
        assert!(webhook.headers.contains_key(header), "no {header}");
    }
    let text = std::str::from_utf8(&webhook.body).unwrap();
    let page = section("docs/webhooks.md", "## Body");
    let example = blocks(&page, "json").remove(0);
    assert_eq!(keys(text), keys(&example), "the keys in their order");
    let explained: Vec<String> = rows(&page).iter().flat_map(|row| code_spans(&row[0])).collect();
    assert_eq!(set(explained), set(keys(text)));

    verified("payment-sim-dev-secret", &webhook.body, &webhook.headers).unwrap();
    let mut changed = webhook.body.clone();
    changed[0] ^= 1;
    verified("payment-sim-dev-secret", &changed, &webhook.headers).unwrap_err();
    check_with_python(webhook);

    let line: serde_json::Value = serde_json::from_str(event).unwrap();
    let body: serde_json::Value = serde_json::from_str(text).unwrap();
    assert_eq!(body["payment_intent_id"], id);
    assert_eq!(line["detail"], body);
    let example = blocks(&section("docs/events.md", "## The log sink"), "json").remove(0);
    assert_eq!(keys(event), keys(&example));
    let names = [&line["source"], &line["detail-type"]];
    let events = read("docs/events.md");
    assert!(
        names.iter().all(|name| events.contains(&name.to_string())),
        "the rule matches what is sent"
    );
}

/// The names of an object, not of the objects within, in their order.
fn keys(json: &str) -> Vec<String> {
    let (mut depth, mut found, mut rest) = (0, Vec::new(), json);
    while let Some(at) = rest.find(['{', '}', '"']) {
        match rest.as_bytes()[at] {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {
                let (text, after) = rest[at + 1..].split_once('"').unwrap();
                if depth == 1 && after.starts_with(':') {
                    found.push(text.to_owned());
                }
                rest = after;
                continue;
            }
        }
        rest = &rest[at + 1..];
    }
    found
}

/// The README's Rust verifier; the next test compares the two.
#[rustfmt::skip]
fn verified(secret: &str, body: &[u8], headers: &HeaderMap) -> Result<(), WebhookError> {
    let webhook = match secret.starts_with("whsec_") {
        true => Webhook::new(secret)?,
        false => Webhook::from_bytes(secret.as_bytes().to_vec())?,
    };
    webhook.verify(body, headers)
}

#[test]
fn the_readmes_rust_verifier_is_the_one_tested_here() {
    let block = blocks(&section("README.md", "## Verify a webhook"), "rust").remove(0);
    let (_, function) = block.split_once("\n\n").unwrap();
    assert!(read("tests/docs.rs").contains(function));
}

/// The README's Python verifier, and the receiver's own check, on a request that was really sent.
fn check_with_python(webhook: &Received) {
    let headers: Vec<(&str, &str)> = webhook
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.to_str().unwrap()))
        .collect();
    let given = serde_json::json!([headers, String::from_utf8_lossy(&webhook.body)]).to_string();
    let receiver = read("scripts/receive_webhooks.py");
    let (checks, _) = receiver.split_once("\nclass Receiver").unwrap();
    let ask = "\nimport json\nheaders, body = json.loads(sys.stdin.read())\n";
    let own = format!(
        "{checks}{ask}assert is_signed(dict(headers), body.encode())\nassert not is_signed(dict(headers), b'x')\n"
    );
    match python("python3", &own, &given) {
        Some(ran) => assert!(ran.is_ok(), "scripts/receive_webhooks.py: {ran:?}"),
        None => skipped("scripts/receive_webhooks.py, there is no python3"),
    }
    let verifier = blocks(&section("README.md", "## Verify a webhook"), "python").remove(0);
    let verifier = format!("import sys\n{verifier}{ask}verified(body.encode(), dict(headers))\n");
    let venv = variable("PAYMENT_SIM_VENV");
    match venv.and_then(|venv| python(&format!("{venv}/bin/python"), &verifier, &given)) {
        Some(ran) => assert!(ran.is_ok(), "the README's Python: {ran:?}"),
        None => skipped("the README's Python verifier, there is no PAYMENT_SIM_VENV"),
    }
}

/// `None`: no such interpreter.
fn python(interpreter: &str, code: &str, input: &str) -> Option<Result<(), String>> {
    let mut command = Command::new(interpreter);
    command.args(["-c", code]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = command.spawn().ok()?;
    process.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = process.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    Some(if output.status.success() { Ok(()) } else { Err(error) })
}

/// One visible line; in CI nothing may be skipped.
fn skipped(what: &str) {
    assert!(variable("CI").is_none_or(|ci| ci != "true"), "skipped in CI: {what}");
    // Past the capture of the test harness.
    let _seen = writeln!(std::io::stderr(), "skipped: {what}");
}
