use super::*;
use settings::SETTINGS;
use std::collections::BTreeSet;
use std::fs;
use std::process;

fn start(args: &[&str], environment: &Environment) -> Result<Invocation, Ended> {
    let args = std::iter::once("payment-sim").chain(args.iter().copied());
    Invocation::from_args_and_env(args, environment)
}

fn config(args: &[&str], environment: impl Into<Environment>) -> Config {
    match start(args, &environment.into()) {
        Ok(Invocation::Serve(config)) => *config,
        other => panic!("{other:?}"),
    }
}

fn bad(args: &[&str], environment: impl Into<Environment>) -> Vec<BadValue> {
    match start(args, &environment.into()) {
        Err(Ended::BadValues(bad)) => bad,
        other => panic!("{other:?}"),
    }
}

fn told(args: &[&str], environment: impl Into<Environment>) -> String {
    match start(args, &environment.into()) {
        Err(Ended::Told(text)) => text,
        other => panic!("{other:?}"),
    }
}

fn is_allowed(name: &str, value: &str) -> bool {
    match start(&[], &Environment::from([(name, value)])) {
        Ok(Invocation::Serve(_)) => true,
        Err(Ended::BadValues(bad)) if bad.len() == 1 && bad[0].name == name => false,
        other => panic!("{name}={value}: {other:?}"),
    }
}

#[test]
fn the_defaults_are_the_contracts() {
    let c = Config::default();
    assert_eq!((c.grpc_port, c.ops_port), (8030, 8031));
    assert_eq!(c.stage, Stage::Development);
    assert_eq!(c.bind_address, IpAddr::from([127, 0, 0, 1]));
    assert_eq!(c.public_url, None);
    assert_eq!(c.max_in_flight, 8192);
    assert!(c.runtime_threads >= 1);
    assert_eq!(c.drain_delay, Duration::ZERO);
    assert_eq!(c.log_level, LogLevel::Debug);
    assert_eq!(c.store, StoreUrl::File("./data".into()));
    assert_eq!(c.retention, Duration::from_secs(7 * 86_400));
    assert_eq!(c.retention_max_payments, Some(20_000_000));
    assert_eq!(c.idempotency_ttl, Duration::from_secs(86_400));
    assert_eq!(c.default_scenario, Scenario::Approve);
    assert_eq!(c.default_delay, Duration::from_secs(2));
    assert_eq!(c.timeout_settle, Duration::from_secs(30));
    assert_eq!(c.manual_ttl, Duration::from_secs(20));
    assert_eq!(c.random_approval_rate, 0.8);
    assert_eq!(c.simulation_seed, 0);
    assert_eq!(c.webhook.secrets.newest(), "payment-sim-dev-secret");
    assert_eq!(c.webhook.timeout, Duration::from_secs(5));
    assert_eq!(c.webhook.max_attempts, 10);
    assert_eq!(c.webhook.backoff_base, Duration::from_secs(1));
    assert_eq!(c.webhook.backoff_max, Duration::from_secs(3_600));
    assert_eq!(c.webhook.origin_concurrency, 64);
    assert_eq!(c.webhook.concurrency, 1_024);
    assert_eq!(c.webhook.dlq_url, None);
    let loopback = egress::AllowedNetworks::parse("127.0.0.0/8,::1/128").unwrap();
    let hosts = egress::AllowedHosts::default();
    assert_eq!(c.webhook.egress, egress::Policy { networks: loopback, hosts });
    assert_eq!(c.events.sink, EventSink::Log);
    assert_eq!(c.events.startup_check, StartupCheck::Warn);
    assert_eq!(c.events.queue_url, None);
    assert_eq!(c.events.bus_name, "ticket-reservation-events");
    assert_eq!(c.events.source, "payment-sim-api");
    assert_eq!(c.events.aws_profile, None);
    assert_eq!(c.events.aws_region, "ap-northeast-2");
    assert_eq!(c.events.aws_endpoint_url, None);
}

#[test]
fn production_has_defaults_of_its_own() {
    let c = config(&[], [("ENVIRONMENT", "production"), ("WEBHOOK_SECRET", "of our own")]);
    assert_eq!(c.bind_address, IpAddr::from([0, 0, 0, 0]));
    assert_eq!(c.drain_delay, Duration::from_secs(5));
    assert_eq!(c.events.sink, EventSink::EventBridge);
    assert_eq!(c.log_level, LogLevel::Info);
    assert_eq!(c.webhook.egress, egress::Policy::default());
}

#[test]
fn memory_has_a_cap_of_its_own_and_zero_is_none() {
    let memory = ("STORE_URL", "memory:");
    assert_eq!(config(&[], [memory]).retention_max_payments, Some(1_000_000));
    let zero = ("RETENTION_MAX_PAYMENTS", "0");
    assert_eq!(config(&[], [memory, zero]).retention_max_payments, None);
}

#[test]
fn the_seeds_profile_is_taken_only_where_it_exists() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config");
    let path = file.to_str().unwrap();
    let profile = |text: &str| {
        fs::write(&file, text).unwrap();
        config(&[], [("AWS_CONFIG_FILE", path)]).events.aws_profile
    };
    let tacos = Some("tacos".to_owned());
    assert_eq!(profile("[default]\n[profile tacos]\nregion = x\n"), tacos);
    assert_eq!(profile("[ profile  \"tacos\" ] ; ours\n"), tacos);
    assert_eq!(profile("[tacos]\n"), tacos);
    assert_eq!(profile("[profile tacos2]\n# [profile tacos]\n"), None);
    let given = config(&[], [("AWS_CONFIG_FILE", path), ("AWS_PROFILE", "mine")]);
    assert_eq!(given.events.aws_profile.as_deref(), Some("mine"));

    fs::create_dir(folder.path().join(".aws")).unwrap();
    fs::write(folder.path().join(".aws/credentials"), "[tacos]\n").unwrap();
    let home = config(&[], [("HOME", folder.path().to_str().unwrap())]);
    assert_eq!(home.events.aws_profile, tacos);
}

#[test]
fn the_first_place_that_gives_a_value_holds() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let load = |mut environment: Environment| {
        for (name, origin) in Environment::FILES {
            environment.add_file(&folder.path().join(name), origin).unwrap();
        }
        environment
    };
    assert_eq!(config(&[], load(Environment::default())).grpc_port, 8030);
    write(".env", "GRPC_PORT=1001\nOPS_PORT=2001\n# a comment\nMAX_IN_FLIGHT=7\n");
    assert_eq!(config(&[], load(Environment::default())).grpc_port, 1001);
    write(".env.local", "export GRPC_PORT='1002'\nOPS_PORT=2002\n");
    let files = config(&[], load(Environment::default()));
    assert_eq!((files.grpc_port, files.ops_port, files.max_in_flight), (1002, 2002, 7));
    let environment = || load([("GRPC_PORT", "1003")].into());
    assert_eq!(config(&[], environment()).grpc_port, 1003);
    let flag = ["--grpc-port", "1004"];
    assert_eq!(config(&flag, environment()).grpc_port, 1004);

    let report =
        told(&["--check-config", "--grpc-port=1004"], load([("LOG_LEVEL", "warn")].into()));
    for line in [
        "GRPC_PORT                   1004  (flag)",
        "LOG_LEVEL                   warn  (environment)",
        "OPS_PORT                    2002  (.env.local)",
        "MAX_IN_FLIGHT               7  (.env)",
        "EVENT_SINK                  log  (default)",
        "PUBLIC_URL                  (unset)  (default)",
    ] {
        assert!(report.lines().any(|l| l == line), "{line}\n{report}");
    }
}

#[test]
fn an_empty_value_counts_as_not_given() {
    let c = config(&["--public-url="], [("GRPC_PORT", ""), ("AWS_ENDPOINT_URL", " ")]);
    assert_eq!((c.grpc_port, c.public_url), (8030, None));
    let production = [("ENVIRONMENT", "production"), ("WEBHOOK_SECRET", "")];
    assert_eq!(bad(&[], production)[0].shown, "not set");
}

#[test]
fn a_file_that_cannot_be_read_is_told_without_its_secrets() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(".env");
    let text = "WEBHOOK_SECRET='hunter2\nGRPC_PORT=1\nhunter3 and more\n";
    fs::write(&file, text).unwrap();
    let errors = Environment::default().add_file(&file, Origin::DotEnv).unwrap_err();
    let errors = Ended::BadFiles(errors).to_string();
    assert!(errors.contains("WEBHOOK_SECRET"), "{errors}");
    assert!(!errors.contains("hunter"), "{errors}");

    let missing = Environment::default().add_file(&folder.path().join("none"), Origin::DotEnv);
    assert_eq!(missing, Ok(environment::Found::Missing));
    assert!(Environment::default().add_file(folder.path(), Origin::DotEnv).is_err());
}

#[test]
fn all_bad_values_are_told_at_once() {
    let found = bad(
        &["--max-in-flight=many"],
        [
            ("GRPC_PORT", "70000"),
            ("BIND_ADDRESS", "localhost"),
            ("ENVIRONMENT", "staging"),
            ("RETENTION", "forever"),
            ("RANDOM_APPROVAL_RATE", "NaN"),
            ("STORE_URL", "postgres://user:hunter2@db/payments"),
            ("UNKNOWN_NAME", "is nobody's business"),
        ],
    );
    let names: BTreeSet<_> = found.iter().map(|bad| bad.name).collect();
    let expected = [
        "BIND_ADDRESS",
        "ENVIRONMENT",
        "GRPC_PORT",
        "MAX_IN_FLIGHT",
        "RANDOM_APPROVAL_RATE",
        "RETENTION",
        "STORE_URL",
    ];
    assert_eq!(names, expected.into());
    let text = Ended::BadValues(found).to_string();
    for line in [
        r#"GRPC_PORT (environment): "70000"; allowed: a whole number from 1 to 65535"#,
        r#"MAX_IN_FLIGHT (flag): "many"; allowed: a whole number from 1 to 1000000"#,
        r#"ENVIRONMENT (environment): "staging"; allowed: one of development, production"#,
        "STORE_URL (environment): (value not shown); allowed: file:PATH or memory:",
    ] {
        assert!(text.lines().any(|l| l.trim() == line), "{line}\n{text}");
    }
    assert!(!text.contains("hunter2"));
}

#[test]
fn a_bad_value_breaks_no_line_and_fills_no_screen() {
    let long = "x\n\u{1b}[31m".repeat(100);
    let found = bad(&[], [("GRPC_PORT", long.as_str())]);
    assert!(!found[0].to_string().contains(['\n', '\u{1b}']));
    assert!(found[0].shown.len() < 5 * SHOWN_CHARS, "{}", found[0].shown);
}

#[cfg(unix)]
#[test]
fn a_value_that_is_no_text_is_refused() {
    use std::os::unix::ffi::OsStringExt;
    let args = ["payment-sim".into(), "--aws-region".into(), OsString::from_vec(vec![0xff])];
    match Invocation::from_args_and_env(args, &Environment::default()) {
        Err(Ended::BadValues(bad)) => assert_eq!(bad[0].name, "AWS_REGION"),
        other => panic!("{other:?}"),
    }
}

/// A setting, values that it takes, values that it refuses.
type Bounds = (&'static str, &'static [&'static str], &'static [&'static str]);

const BOUNDS: &[Bounds] = &[
    ("GRPC_PORT", &["1", "65535", " 9000 "], &["0", "65536", "-1", "8030.0", "http"]),
    ("OPS_PORT", &["8029"], &["0", "8030"]),
    ("BIND_ADDRESS", &["::", "::1", "10.0.0.1"], &["*", "1.2.3", "127.0.0.1:80"]),
    ("MAX_IN_FLIGHT", &["1", "1000000"], &["0", "1000001"]),
    ("RUNTIME_THREADS", &["1", "256"], &["0", "257"]),
    ("DRAIN_DELAY_MS", &["0", "10000"], &["10001", "5s"]),
    ("LOG_LEVEL", &["error", "trace"], &["INFO", "verbose"]),
    (
        "STORE_URL",
        &["file:data", "file:/data", "file:///data", "memory:"],
        &["data", "file:", "file://data", "memory", "memory:x", "postgres://h/d", "sqlite:x"],
    ),
    ("RETENTION", &["1s", "3650d", "36h", "1h 30m"], &["0s", "999ms", "3651d", "10", "7 dogs"]),
    ("IDEMPOTENCY_TTL", &["1s", "365d"], &["0s", "366d", "24"]),
    ("RETENTION_MAX_PAYMENTS", &["0", "1000000000000"], &["1000000000001", "1e6", "20,000"]),
    (
        "DEFAULT_SCENARIO",
        &["approve", "fail", "delay", "random", "timeout", "manual"],
        &["APPROVE", "decline"],
    ),
    ("DEFAULT_DELAY_MS", &["0", "604800000"], &["604800001", "2s"]),
    ("TIMEOUT_SETTLE_MS", &["0", "604800000"], &["604800001"]),
    ("MANUAL_TTL_MS", &["1", "604800000"], &["0", "604800001"]),
    ("RANDOM_APPROVAL_RATE", &["0", "1", "0.5"], &["-0.1", "1.1", "inf", "80%"]),
    ("SIMULATION_SEED", &["0", "18446744073709551615"], &["-1", "18446744073709551616"]),
    ("SIMULATION_API", &["on", "off"], &["true", "1", "ON"]),
    ("SIMULATION_TOKEN", &["t", "a-b.c_d~e+f/g=", "a,b"], &["a b", "a\tb", "t\u{e9}"]),
    ("WEBHOOK_TIMEOUT_MS", &["1", "60000"], &["0", "60001"]),
    ("WEBHOOK_MAX_ATTEMPTS", &["1", "100"], &["0", "101"]),
    ("WEBHOOK_BACKOFF_BASE_MS", &["1", "3600000"], &["0", "3600001"]),
    ("WEBHOOK_BACKOFF_MAX_MS", &["1", "86400000"], &["0", "86400001"]),
    ("WEBHOOK_ORIGIN_CONCURRENCY", &["1", "16384"], &["0", "16385"]),
    ("WEBHOOK_CONCURRENCY", &["1", "16384"], &["0", "16385"]),
    ("EVENT_SINK", &["eventbridge", "log", "none"], &["kafka"]),
    ("EVENT_STARTUP_CHECK", &["warn", "require", "off"], &["error", "true"]),
    ("PAYMENT_WEBHOOK_QUEUE_URL", &["https://sqs.x.amazonaws.com/123/q"], &["arn:aws:sqs:x:1:q"]),
    ("PAYMENT_WEBHOOK_DLQ_URL", &["http://127.0.0.1:5555/123/q"], &["q", "https://u:p@x/123/q"]),
    (
        "WEBHOOK_ALLOW_CIDRS",
        &["none", "10.0.0.0/8", "10.1.2.3, fd12::/48"],
        &["10.0.0.1/8", "169.254.169.254", "0.0.0.0/0", "localhost", "10.0.0.0/8,,"],
    ),
    (
        "WEBHOOK_ALLOW_HOSTS",
        &["none", "reservation-api", "a.example,*.b.example"],
        &["10.0.0.1", "a:80", "*", "http://a", "a,,b"],
    ),
    ("EVENT_BUS_NAME", &["b", "arn:aws:events:x:1:event-bus/b"], &["two words", "b\u{e9}"]),
    ("PAYMENT_EVENT_SOURCE", &["a.b"], &["a b"]),
    ("AWS_PROFILE", &["my profile"], &["a\nb"]),
    ("AWS_REGION", &["eu-central-1"], &["eu central"]),
    ("AWS_ENDPOINT_URL", &["http://127.0.0.1:5555"], &["localhost:5555", "ftp://x", "http://"]),
    (
        "PUBLIC_URL",
        &["https://pay.example/sim/"],
        &["/pay", "https://u:p@x", "https://x?y", "https://x#y"],
    ),
    ("ENVIRONMENT", &["development"], &["prod", "Production"]),
    (
        "WEBHOOK_SECRET",
        &["a", "a b", "a,b,c,d,e,f,g,h", "whsec_c2VjcmV0"],
        &["a,,b", ",", "a,b,c,d,e,f,g,h,i", "whsec_", "whsec_?", "a\tb"],
    ),
];

#[test]
fn bounds_hold_on_both_sides() {
    for (name, allowed, refused) in BOUNDS {
        for value in *allowed {
            assert!(is_allowed(name, value), "{name}={value}");
        }
        for value in *refused {
            assert!(!is_allowed(name, value), "{name}={value}");
        }
    }
}

#[test]
fn the_sqs_sink_needs_its_queue() {
    let sqs = ("EVENT_SINK", "sqs");
    let queue = ("PAYMENT_WEBHOOK_QUEUE_URL", "http://127.0.0.1:5555/123456789012/events.fifo");
    let events = config(&[], [sqs, queue]).events;
    assert_eq!(events.sink, EventSink::Sqs);
    assert_eq!(events.queue_url.unwrap().as_str(), queue.1);

    let found = bad(&[], [sqs]);
    assert_eq!(found.len(), 1);
    let text = found[0].to_string();
    assert!(text.starts_with("PAYMENT_WEBHOOK_QUEUE_URL (default): not set; allowed: "), "{text}");
    assert!(text.ends_with("; EVENT_SINK=sqs needs it"), "{text}");
    let empty = (queue.0, "");
    assert_eq!(bad(&[], [sqs, empty])[0].name, queue.0);
    let two = bad(&[], [sqs, ("GRPC_PORT", "0")]);
    assert_eq!(two.len(), 2, "told at once: {two:?}");
}

#[test]
fn a_bad_entry_of_a_list_is_named_unless_it_may_hold_a_password() {
    let told = |name, value| bad(&[], [(name, value)])[0].to_string();
    let networks = told("WEBHOOK_ALLOW_CIDRS", "10.0.0.0/8,169.254.169.254/32");
    assert!(
        networks.contains("(169.254.169.254/32 reaches 169.254.0.0/16, which is always"),
        "{networks}"
    );
    let hosts = told("WEBHOOK_ALLOW_HOSTS", "a,10.0.0.1");
    assert!(hosts.contains("(10.0.0.1 is an address"), "{hosts}");
    let hidden = told("WEBHOOK_ALLOW_HOSTS", "user:hunter2@host");
    assert!(hidden.contains("(value not shown)") && !hidden.contains("hunter2"), "{hidden}");
}

#[test]
fn secrets_are_a_list_newest_first_with_spaces_cut() {
    let c = config(&[], [("WEBHOOK_SECRET", " new , of last year,whsec_c2VjcmV0 ")]);
    let secrets: Vec<_> = c.webhook.secrets.iter().collect();
    assert_eq!(secrets, ["new", "of last year", "whsec_c2VjcmV0"]);
    assert_eq!(c.webhook.secrets.newest(), "new");
}

#[test]
fn production_refuses_the_default_secret_wherever_it_stands() {
    for secret in [
        "payment-sim-dev-secret",
        "new, payment-sim-dev-secret",
        "whsec_cGF5bWVudC1zaW0tZGV2LXNlY3JldA==",
        "new,  whsec_cGF5bWVudC1zaW0tZGV2LXNlY3JldA== ,old",
    ] {
        let found = bad(&[], [("ENVIRONMENT", "production"), ("WEBHOOK_SECRET", secret)]);
        assert_eq!(found[0].name, "WEBHOOK_SECRET");
        assert_eq!(found[0].shown, "(value not shown)");
    }
    assert_eq!(bad(&["--environment=production"], []).len(), 1);
}

#[test]
fn a_secret_is_never_shown() {
    const SECRET: &str = "hunter2";
    let given = || Environment::from([("WEBHOOK_SECRET", SECRET)]);
    assert!(!format!("{:?}", config(&[], given())).contains(SECRET));
    let report = told(&["--check-config"], given());
    assert!(report.contains("(1 set, not shown)"));
    assert!(!report.contains(SECRET));
    assert!(!report.contains(&BASE64_OF_SECRET[..8]), "{report}");
    let found = bad(&["--webhook-secret", "hunter2,,"], []);
    assert!(!Ended::BadValues(found).to_string().contains(SECRET));
    for args in [
        ["--webhook-secrets=hunter2", "--check-config"],
        ["--webhook-secret=hunter2", "--webhook-secret=hunter2"],
    ] {
        match start(&args, &Environment::default()) {
            Err(Ended::Usage(text)) => assert!(!text.contains(SECRET), "{text}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_simulation_api_is_off_in_production_unless_it_has_a_token() {
    let production = |[api, token]: [(&str, &str); 2]| {
        let given = [("ENVIRONMENT", "production"), ("WEBHOOK_SECRET", "of our own"), api, token];
        Environment::from(given)
    };
    let none = ("SIMULATION_TOKEN", "");
    let open = config(&[], []);
    assert!(open.simulation_api == Switch::On && open.simulation_token.is_none());
    assert_eq!(config(&[], production([("SIMULATION_API", ""), none])).simulation_api, Switch::Off);
    let found = bad(&[], production([("SIMULATION_API", "on"), none]));
    assert_eq!((found.len(), found[0].name), (1, "SIMULATION_TOKEN"));
    assert!(found[0].allowed.contains("must be set where SIMULATION_API is on"));
    let guarded = production([("SIMULATION_API", "on"), ("SIMULATION_TOKEN", "hunter2")]);
    let guarded = config(&[], guarded);
    assert_eq!(guarded.simulation_token.unwrap().as_str(), "hunter2");
}

#[test]
fn the_token_is_never_shown() {
    const TOKEN: &str = "hunter2";
    let given = || Environment::from([("SIMULATION_TOKEN", TOKEN)]);
    assert!(!format!("{:?}", config(&[], given())).contains(TOKEN));
    let report = told(&["--check-config"], given());
    let line = report.lines().find(|line| line.starts_with("SIMULATION_TOKEN")).unwrap();
    assert!(line.contains("(set, not shown)") && !report.contains(TOKEN), "{report}");
    let found = bad(&["--simulation-token", "hunter2 hunter2"], []);
    assert!(!Ended::BadValues(found).to_string().contains(TOKEN));
}

const BASE64_OF_SECRET: &str = "aHVudGVyMg==";

#[test]
fn the_told_command_derives_the_key_that_a_verifier_takes() {
    for (secrets, keys) in [
        ("hunter2", vec!["whsec_aHVudGVyMg=="]),
        ("whsec_c2VjcmV0", vec![]),
        ("  hunter2 , whsec_c2VjcmV0,a b", vec!["whsec_aHVudGVyMg==", "whsec_YSBi"]),
    ] {
        let report = told(&["--check-config"], [("WEBHOOK_SECRET", secrets)]);
        let commands = report.lines().filter(|line| line.starts_with("  printf"));
        let printed: Vec<String> = commands
            .map(|command| {
                let output = process::Command::new("sh")
                    .args(["-c", command])
                    .env("WEBHOOK_SECRET", secrets)
                    .output()
                    .unwrap();
                String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
            })
            .collect();
        assert_eq!(printed, keys, "{report}");
    }
}

#[test]
fn every_setting_is_a_flag_and_in_help_with_its_default_and_bounds() {
    let help = told(&["--help"], []);
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for setting in SETTINGS {
        assert!(help.contains(&format!("--{} <", setting.flag())), "{}", setting.name);
        let facts = format!(
            "[{}; default: {}; allowed: {}]",
            setting.name,
            setting.default_text().replace('`', ""),
            setting.kind.allowed()
        );
        assert!(words.contains(&facts), "{facts}\n{words}");
        assert!(words.contains(setting.help), "{}", setting.name);
    }
    for other in ["--check-config", "--version", "healthcheck"] {
        assert!(help.contains(other), "{other}");
    }
}

#[test]
fn every_default_is_allowed_in_every_case() {
    for stage in [Stage::Development, Stage::Production] {
        for store in ["memory:", "file:x"] {
            config(
                &["--webhook-secret=x"],
                [("ENVIRONMENT", stage.as_str()), ("STORE_URL", store)],
            );
        }
    }
}

#[test]
fn names_are_distinct() {
    let names: BTreeSet<_> = SETTINGS.iter().map(|s| s.name).collect();
    assert_eq!(names.len(), SETTINGS.len());
}

#[test]
fn an_unknown_flag_is_refused_and_an_unknown_variable_is_not() {
    assert!(matches!(start(&["--grpc-prot=1"], &Environment::default()), Err(Ended::Usage(_))));
    assert!(matches!(start(&["serve"], &Environment::default()), Err(Ended::Usage(_))));
    config(&[], [("GRPC_PROT", "1")]);
}

#[test]
fn version_is_the_packages() {
    let version = concat!("payment-sim ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(told(&["--version"], []), version);
}

#[test]
fn healthcheck_asks_where_the_instance_answers() {
    let target = |args: &[&str], environment: Environment| match start(args, &environment) {
        Ok(Invocation::Healthcheck { ops }) => ops.to_string(),
        other => panic!("{other:?}"),
    };
    assert_eq!(target(&["healthcheck"], [].into()), "127.0.0.1:8031");
    let given = Environment::from([("OPS_PORT", "9"), ("BIND_ADDRESS", "0.0.0.0")]);
    assert_eq!(target(&["healthcheck"], given), "127.0.0.1:9");
    let flags = ["healthcheck", "--ops-port=10", "--bind-address=::"];
    assert_eq!(target(&flags, [].into()), "[::1]:10");
    // In production without a secret, and with a bad value elsewhere: not its business.
    let broken = Environment::from([("ENVIRONMENT", "production"), ("GRPC_PORT", "x")]);
    assert_eq!(target(&["healthcheck"], broken), "127.0.0.1:8031");
    assert_eq!(bad(&["healthcheck"], [("OPS_PORT", "x")])[0].name, "OPS_PORT");
}

#[test]
fn an_endpoint_from_the_environment_is_left_to_the_sdk() {
    let url = "http://127.0.0.1:5555/";
    let from_environment = config(&[], [("AWS_ENDPOINT_URL", url)]);
    assert_eq!(from_environment.events.aws_endpoint_url, None);
    let from_flag = config(&["--aws-endpoint-url", url], []);
    assert_eq!(from_flag.events.aws_endpoint_url.unwrap().as_str(), url);
}

#[test]
fn the_public_url_loses_its_last_slash() {
    let c = config(&[], [("PUBLIC_URL", "https://pay.example/sim/")]);
    assert_eq!(c.public_url.as_deref(), Some("https://pay.example/sim"));
}

/// `UPDATE=1 cargo test env_template` writes the file anew.
#[test]
fn env_template_is_the_tables() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/.env.template");
    #[expect(clippy::disallowed_methods, reason = "an order to this test, no setting")]
    if std::env::var_os("UPDATE").is_some() {
        fs::write(path, env_template()).unwrap();
    }
    assert_eq!(fs::read_to_string(path).unwrap(), env_template());
}

#[test]
fn env_template_with_all_its_lines_in_force_is_the_default() {
    let mut environment = Environment::default();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(".env");
    let lines: Vec<_> = env_template()
        .lines()
        .filter_map(|line| line.strip_prefix('#'))
        .filter(|line| !line.starts_with([' ', '#']))
        .map(str::to_owned)
        .collect();
    assert_eq!(lines.len(), SETTINGS.len());
    fs::write(&file, lines.join("\n")).unwrap();
    environment.add_file(&file, Origin::DotEnv).unwrap();
    let mut c = config(&[], environment);
    assert_eq!(c.events.aws_profile.take().as_deref(), Some("tacos"));
    assert_eq!(format!("{c:?}"), format!("{:?}", Config::default()));
}

#[test]
fn the_readmes_table_has_every_setting_in_four_columns() {
    let table = markdown_table();
    assert_eq!(table.lines().count(), SETTINGS.len() + 2);
    assert!(table.lines().all(|line| line.matches('|').count() == 5), "{table}");
}
