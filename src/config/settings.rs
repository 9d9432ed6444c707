//! The one table of settings. `--help`, parsing, `--check-config`, `.env.template` and the README's
//! table all come from it, so that none of them can say something else than the others.

use std::fmt::Write as _;

use super::value::{EventSink, Kind, LogLevel, Scenario, Stage, StartupCheck, Switch};

/// One setting, as an operator sees it.
#[derive(Debug)]
pub struct Setting {
    /// The environment variable; the flag is the same in lower case with dashes.
    pub name: &'static str,
    pub section: &'static str,
    pub kind: Kind,
    pub default: DefaultValue,
    pub help: &'static str,
    /// Never shown, neither in an error nor by `--check-config`.
    pub secret: bool,
}

/// What holds when nothing is given.
#[derive(Debug, Clone, Copy)]
pub enum DefaultValue {
    Unset,
    Fixed(&'static str),
    ByStage {
        development: &'static str,
        production: &'static str,
    },
    /// Outside development it must be given, and be something else.
    DevelopmentOnly(&'static str),
    ByStore {
        file: &'static str,
        memory: &'static str,
    },
    /// This profile where the AWS shared config has it, else unset.
    SharedProfile(&'static str),
    Cores,
}

impl Setting {
    pub fn flag(&self) -> String {
        self.name.to_ascii_lowercase().replace('_', "-")
    }

    /// The default, for people; backticks as in Markdown.
    pub fn default_text(&self) -> String {
        match self.default {
            DefaultValue::Unset => "unset".into(),
            DefaultValue::Fixed(text) => format!("`{text}`"),
            DefaultValue::ByStage { development, production } => {
                format!("`{development}` in development, `{production}` in production")
            }
            DefaultValue::DevelopmentOnly(text) => {
                format!("`{text}` in development; must be set, to something else, in production")
            }
            DefaultValue::ByStore { file, memory } => {
                format!("`{file}`; `{memory}` with `STORE_URL=memory:`")
            }
            DefaultValue::SharedProfile(name) => {
                format!("`{name}` where the AWS shared config has that profile, else unset")
            }
            DefaultValue::Cores => "the number of cores".into(),
        }
    }

    /// What stands behind the name in `.env.template`.
    fn template_value(&self) -> &'static str {
        match self.default {
            DefaultValue::Unset | DefaultValue::Cores => "",
            DefaultValue::Fixed(text)
            | DefaultValue::ByStage { development: text, .. }
            | DefaultValue::DevelopmentOnly(text)
            | DefaultValue::ByStore { file: text, .. }
            | DefaultValue::SharedProfile(text) => text,
        }
    }
}

/// The setting called `name`.
///
/// # Panics
/// When the table has no such row.
pub fn setting(name: &str) -> &'static Setting {
    SETTINGS
        .iter()
        .find(|setting| setting.name == name)
        .unwrap_or_else(|| panic!("{name} is not in the table of settings"))
}

/// `.env.template`, whole. Every line is a comment: a copy of it changes nothing by itself.
pub fn env_template() -> String {
    let mut text = String::from(
        "# payment-sim's settings and their defaults. Copy this to .env.local and take the # off\n\
         # what you change. Order: flag, environment, .env.local, .env, default.\n\
         # An empty value counts as not given.\n",
    );
    let mut section = "";
    for setting in SETTINGS {
        if section != setting.section {
            section = setting.section;
            let _infallible = write!(text, "\n# ---- {section} ----\n");
        }
        let _infallible = write!(
            text,
            "\n# {}\n# Allowed: {}. Default: {}.\n#{}={}\n",
            setting.help,
            setting.kind.allowed(),
            setting.default_text().replace('`', ""),
            setting.name,
            setting.template_value()
        );
    }
    text
}

/// The README's table of settings.
pub fn markdown_table() -> String {
    let mut text =
        String::from("| setting | default | what it is | allowed |\n| --- | --- | --- | --- |\n");
    for setting in SETTINGS {
        let _infallible = writeln!(
            text,
            "| `{}` | {} | {} | {} |",
            setting.name,
            setting.default_text(),
            setting.help,
            setting.kind.allowed()
        );
    }
    text
}

const SERVER: &str = "Server";
const STORAGE: &str = "Storage";
const SIMULATION: &str = "Simulation";
const WEBHOOKS: &str = "Webhooks";
const EVENTS: &str = "Events";

const PORT: Kind = Kind::Whole { min: 1, max: 65_535 };
/// A week: longer simulated delays serve no test, and stay clear of every overflow.
const MAX_DELAY_MS: u64 = 604_800_000;
const MAX_URL_CHARS: usize = 2_048;

const fn row(
    section: &'static str,
    name: &'static str,
    kind: Kind,
    default: DefaultValue,
    help: &'static str,
) -> Setting {
    let secret = matches!(kind, Kind::Secrets | Kind::Token);
    Setting { name, section, kind, default, help, secret }
}

use DefaultValue::{ByStage, ByStore, Cores, DevelopmentOnly, Fixed, SharedProfile, Unset};

#[rustfmt::skip] // one row, two lines: what it is, then what it is for
pub static SETTINGS: &[Setting] = &[
    row(SERVER, "ENVIRONMENT", Kind::Choice(Stage::NAMES), Fixed("development"),
        "Where this runs; decides several of the defaults below."),
    row(SERVER, "GRPC_PORT", PORT, Fixed("8030"),
        "Port of the gRPC API."),
    row(SERVER, "OPS_PORT", PORT, Fixed("8031"),
        "Port of /health, /livez, /readyz and /metrics."),
    row(SERVER, "BIND_ADDRESS", Kind::Address, ByStage { development: "127.0.0.1", production: "0.0.0.0" },
        "Address that all ports are bound to."),
    row(SERVER, "PUBLIC_URL", Kind::Url { max_chars: MAX_URL_CHARS }, Unset,
        "Where callers reach this from outside; payment_url is empty while it is unset."),
    row(SERVER, "MAX_IN_FLIGHT", Kind::Whole { min: 1, max: 1_000_000 }, Fixed("8192"),
        "Requests worked on at a time; more are refused at once with RESOURCE_EXHAUSTED."),
    row(SERVER, "RUNTIME_THREADS", Kind::Whole { min: 1, max: 256 }, Cores,
        "Threads that serve gRPC."),
    row(SERVER, "DRAIN_DELAY_MS", Kind::Millis { min: 0, max: 10_000 }, ByStage { development: "0", production: "5000" },
        "From SIGTERM, how long to go on accepting until balancers have seen /readyz turn false."),
    row(SERVER, "LOG_LEVEL", Kind::Choice(LogLevel::NAMES), ByStage { development: "debug", production: "info" },
        "Least level of log lines; they go to stderr, as JSON in production."),

    row(STORAGE, "STORE_URL", Kind::Store, Fixed("file:./data"),
        "Where payments are kept; memory: keeps nothing over a restart."),
    row(STORAGE, "RETENTION", Kind::Period { min: "1s", max: "3650d" }, Fixed("7d"),
        "How long a final payment with nothing owed is kept after its last change; never shorter than IDEMPOTENCY_TTL."),
    row(STORAGE, "RETENTION_MAX_PAYMENTS", Kind::Whole { min: 0, max: 1_000_000_000_000 }, ByStore { file: "20000000", memory: "1000000" },
        "Payments kept at most, the oldest final ones dropped first; 0: no cap."),
    row(STORAGE, "IDEMPOTENCY_TTL", Kind::Period { min: "1s", max: "365d" }, Fixed("24h"),
        "How long a reply is kept under its idempotency key."),

    row(SIMULATION, "DEFAULT_SCENARIO", Kind::Choice(Scenario::NAMES), Fixed("approve"),
        "What becomes of a payment that names no scenario."),
    row(SIMULATION, "DEFAULT_DELAY_MS", Kind::Millis { min: 0, max: MAX_DELAY_MS }, Fixed("2000"),
        "From creation to the notification; for delay, to the decision."),
    row(SIMULATION, "TIMEOUT_SETTLE_MS", Kind::Millis { min: 0, max: MAX_DELAY_MS }, Fixed("30000"),
        "From creation until a timeout payment completes by itself."),
    row(SIMULATION, "MANUAL_TTL_MS", Kind::Millis { min: 1, max: MAX_DELAY_MS }, Fixed("20000"),
        "From creation until a manual payment that nobody decides expires."),
    row(SIMULATION, "RANDOM_APPROVAL_RATE", Kind::Fraction, Fixed("0.8"),
        "Share of random payments that complete."),
    row(SIMULATION, "SIMULATION_SEED", Kind::Whole { min: 0, max: u64::MAX }, Fixed("0"),
        "Seed of every draw; the same seed and requests give the same fates."),
    row(SIMULATION, "SIMULATION_API", Kind::Choice(Switch::NAMES), ByStage { development: "on", production: "off" },
        "Whether simulation.v1.SimulationService is served."),
    row(SIMULATION, "SIMULATION_TOKEN", Kind::Token, Unset,
        "Callers of that API must send it as authorization: Bearer; must be set where it is on in production. Rather in the environment than as a flag, which every user of the machine can read."),

    row(WEBHOOKS, "WEBHOOK_SECRET", Kind::Secrets, DevelopmentOnly("payment-sim-dev-secret"),
        "Signs webhooks; several for rotation. Rather in the environment than as a flag, which every user of the machine can read."),
    row(WEBHOOKS, "WEBHOOK_TIMEOUT_MS", Kind::Millis { min: 1, max: 60_000 }, Fixed("5000"),
        "How long one attempt may take."),
    row(WEBHOOKS, "WEBHOOK_MAX_ATTEMPTS", Kind::Whole { min: 1, max: 100 }, Fixed("10"),
        "Attempts after which a webhook is given up."),
    row(WEBHOOKS, "WEBHOOK_BACKOFF_BASE_MS", Kind::Millis { min: 1, max: 3_600_000 }, Fixed("1000"),
        "Longest wait after the first failed attempt; it doubles with each further one."),
    row(WEBHOOKS, "WEBHOOK_BACKOFF_MAX_MS", Kind::Millis { min: 1, max: 86_400_000 }, Fixed("3600000"),
        "What the doubling stops at."),
    row(WEBHOOKS, "WEBHOOK_ORIGIN_CONCURRENCY", Kind::Whole { min: 1, max: 16_384 }, Fixed("64"),
        "Attempts under way at a time to one origin (scheme, host, port)."),
    row(WEBHOOKS, "WEBHOOK_CONCURRENCY", Kind::Whole { min: 1, max: 16_384 }, Fixed("1024"),
        "Attempts under way at a time in all; no origin has more places than are still free."),
    row(WEBHOOKS, "WEBHOOK_MAX_RPS", Kind::Whole { min: 0, max: 1_000_000 }, Fixed("0"),
        "Attempts a second to one origin at most; 0: no limit."),
    row(WEBHOOKS, "PAYMENT_WEBHOOK_DLQ_URL", Kind::Url { max_chars: MAX_URL_CHARS }, Unset,
        "SQS queue that gets the webhooks that were given up."),
    row(WEBHOOKS, "WEBHOOK_ALLOW_CIDRS", Kind::Networks, ByStage { development: "127.0.0.0/8,::1", production: "none" },
        "Private networks that webhooks may connect to; the internet needs no entry."),
    row(WEBHOOKS, "WEBHOOK_ALLOW_HOSTS", Kind::Hosts, Fixed("none"),
        "Host names that may resolve to private addresses."),

    row(EVENTS, "EVENT_SINK", Kind::Choice(EventSink::NAMES), ByStage { development: "log", production: "eventbridge" },
        "Where events go; log writes one JSON line each to stdout."),
    row(EVENTS, "EVENT_STARTUP_CHECK", Kind::Choice(StartupCheck::NAMES), Fixed("warn"),
        "Whether a bus, rule, target or queue that is not there is a warning or the end of the start."),
    row(EVENTS, "EVENT_BUS_NAME", Kind::Word { max_chars: 1_600 }, Fixed("ticket-reservation-events"),
        "EventBridge bus, by name or ARN."),
    row(EVENTS, "PAYMENT_EVENT_SOURCE", Kind::Word { max_chars: 256 }, Fixed("payment-sim-api"),
        "The events' source."),
    row(EVENTS, "PAYMENT_WEBHOOK_QUEUE_URL", Kind::Url { max_chars: MAX_URL_CHARS }, Unset,
        "SQS queue that EVENT_SINK=sqs sends to, and needs."),
    row(EVENTS, "AWS_PROFILE", Kind::Text { max_chars: 255 }, SharedProfile("tacos"),
        "Profile of the AWS credentials."),
    row(EVENTS, "AWS_REGION", Kind::Word { max_chars: 64 }, Fixed("ap-northeast-2"),
        "AWS region."),
    row(EVENTS, "AWS_ENDPOINT_URL", Kind::Url { max_chars: MAX_URL_CHARS }, Unset,
        "Another address for AWS, such as an emulator's."),
];
