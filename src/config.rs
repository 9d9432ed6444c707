//! What the operator has ordered: flags, environment, `.env.local`, `.env`, defaults, in that order.
//!
//! [`load`] reads the process's own; [`Invocation::from_args_and_env`] is the same without touching
//! the process, for tests. The settings themselves are one table, in [`settings`].

mod environment;
pub mod settings;
#[cfg(test)]
mod tests;
mod value;
mod worker;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};
use url::Url;

pub use environment::{Environment, Origin};
pub use settings::{env_template, markdown_table};
pub use value::{
    ApiStyle, EventSink, LogLevel, Scenario, Secrets, Stage, StartupCheck, StoreUrl, Switch, Token,
};
pub use worker::{ReservationApiConfig, WorkerConfig};

use settings::{Binary, DefaultValue, Setting, setting};
use value::{FromValue, Value};

use crate::egress;

/// Every setting of payment-sim, checked.
#[derive(Debug, Clone)]
pub struct Config {
    pub stage: Stage,
    pub grpc_port: u16,
    pub ops_port: u16,
    pub bind_address: IpAddr,
    /// Without a slash at its end.
    pub public_url: Option<String>,
    pub max_in_flight: usize,
    pub runtime_threads: usize,
    pub drain_delay: Duration,
    pub log_level: LogLevel,
    pub store: StoreUrl,
    pub retention: Duration,
    /// `None`: no cap.
    pub retention_max_payments: Option<u64>,
    pub idempotency_ttl: Duration,
    pub default_scenario: Scenario,
    pub default_delay: Duration,
    pub timeout_settle: Duration,
    pub manual_ttl: Duration,
    pub random_approval_rate: f64,
    pub simulation_seed: u64,
    pub simulation_api: Switch,
    /// `None`: everybody may call that API.
    pub simulation_token: Option<Token>,
    pub webhook: WebhookConfig,
    pub events: EventConfig,
}

#[derive(Debug, Clone)]
pub struct WebhookConfig {
    pub secrets: Secrets,
    pub timeout: Duration,
    pub max_attempts: u32,
    pub backoff_base: Duration,
    pub backoff_max: Duration,
    pub origin_concurrency: usize,
    pub concurrency: usize,
    /// Of one origin; `None`: no limit.
    pub max_rps: Option<u32>,
    pub dlq_url: Option<Url>,
    pub egress: egress::Policy,
}

#[derive(Debug, Clone)]
pub struct EventConfig {
    pub sink: EventSink,
    pub startup_check: StartupCheck,
    pub bus_name: String,
    pub source: String,
    /// Given wherever the sink is `sqs`.
    pub queue_url: Option<Url>,
    pub aws: AwsConfig,
}

/// How AWS is reached.
#[derive(Debug, Clone)]
pub struct AwsConfig {
    pub profile: Option<String>,
    pub region: String,
    /// Set only when it was given as a flag. From the environment and the `.env` files the SDK
    /// takes it by itself, by its own rules (`AWS_ENDPOINT_URL_EVENTBRIDGE` goes first).
    pub endpoint_url: Option<Url>,
}

/// What a binary's settings become.
pub trait BinaryConfig: Sized {
    const BINARY: Binary;

    fn new(given: &Resolved) -> Self;

    /// What log lines look like, and the least level of them.
    fn logs(&self) -> (Stage, LogLevel);
}

/// What the process was called to do.
#[derive(Debug)]
pub enum Invocation<C = Config> {
    Serve(Box<C>),
    /// Ask the instance on this machine whether it is ready.
    Healthcheck {
        ops: SocketAddr,
    },
}

/// Why the process ends without doing anything.
#[derive(Debug)]
pub enum Ended {
    /// What was asked for: `--help`, `--version`, `--check-config`.
    Told(String),
    /// A command line that is none.
    Usage(String),
    BadValues(Vec<BadValue>),
    /// `.env` files that cannot be read.
    BadFiles(Vec<String>),
}

/// A setting whose value is not allowed, or that is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadValue {
    pub name: &'static str,
    pub origin: Origin,
    /// The value, or what stands for it when it must not be shown.
    pub shown: String,
    pub allowed: String,
}

/// sysexits.h: EX_CONFIG.
const EXIT_CONFIG: u8 = 78;
/// What clap and most tools use for a command line that is none.
const EXIT_USAGE: u8 = 2;
/// Longer values are cut in messages.
const SHOWN_CHARS: usize = 100;
const CHECK_CONFIG: &str = "check-config";
const HEALTHCHECK: &str = "healthcheck";

/// Reads flags, environment and `.env` files; tells the operator what there is to tell.
///
/// # Errors
/// With the code to exit with, when the process has nothing further to do.
pub fn load<C: BinaryConfig>() -> Result<Invocation<C>, ExitCode> {
    Environment::load(Path::new("."))
        .map_err(Ended::BadFiles)
        .and_then(|environment| Invocation::from_args_and_env(std::env::args_os(), &environment))
        .map_err(|ended| ended.tell(C::BINARY))
}

impl<C: BinaryConfig> Invocation<C> {
    /// # Errors
    /// When there is nothing to do but to tell something, all bad values at once.
    pub fn from_args_and_env<T: Into<OsString> + Clone>(
        args: impl IntoIterator<Item = T>,
        environment: &Environment,
    ) -> Result<Self, Ended> {
        let matches = command(C::BINARY).try_get_matches_from(args).map_err(|error| {
            let text = error.render().to_string();
            if error.use_stderr() { Ended::Usage(text) } else { Ended::Told(text) }
        })?;
        if let Some((HEALTHCHECK, matches)) = matches.subcommand() {
            let ops = healthcheck(C::BINARY, matches, environment)?;
            return Ok(Self::Healthcheck { ops });
        }
        let resolved = Resolved::new(C::BINARY, &matches, environment)?;
        if matches.get_flag(CHECK_CONFIG) {
            return Err(Ended::Told(resolved.report(C::BINARY)));
        }
        Ok(Self::Serve(Box::new(C::new(&resolved))))
    }
}

impl BinaryConfig for Config {
    const BINARY: Binary = Binary::PaymentSim;

    fn logs(&self) -> (Stage, LogLevel) {
        (self.stage, self.log_level)
    }

    fn new(given: &Resolved) -> Self {
        let public_url: Option<Url> = given.take("PUBLIC_URL");
        Self {
            stage: given.take("ENVIRONMENT"),
            grpc_port: given.take("GRPC_PORT"),
            ops_port: given.take("OPS_PORT"),
            bind_address: given.take("BIND_ADDRESS"),
            public_url: public_url.map(|url| url.as_str().trim_end_matches('/').to_owned()),
            max_in_flight: given.take("MAX_IN_FLIGHT"),
            runtime_threads: given.take("RUNTIME_THREADS"),
            drain_delay: given.take("DRAIN_DELAY_MS"),
            log_level: given.take("LOG_LEVEL"),
            store: given.take("STORE_URL"),
            retention: given.take("RETENTION"),
            retention_max_payments: Some(given.take("RETENTION_MAX_PAYMENTS")).filter(|n| *n > 0),
            idempotency_ttl: given.take("IDEMPOTENCY_TTL"),
            default_scenario: given.take("DEFAULT_SCENARIO"),
            default_delay: given.take("DEFAULT_DELAY_MS"),
            timeout_settle: given.take("TIMEOUT_SETTLE_MS"),
            manual_ttl: given.take("MANUAL_TTL_MS"),
            random_approval_rate: given.take("RANDOM_APPROVAL_RATE"),
            simulation_seed: given.take("SIMULATION_SEED"),
            simulation_api: given.take("SIMULATION_API"),
            simulation_token: given.take("SIMULATION_TOKEN"),
            webhook: WebhookConfig {
                secrets: given.take("WEBHOOK_SECRET"),
                timeout: given.take("WEBHOOK_TIMEOUT_MS"),
                max_attempts: given.take("WEBHOOK_MAX_ATTEMPTS"),
                backoff_base: given.take("WEBHOOK_BACKOFF_BASE_MS"),
                backoff_max: given.take("WEBHOOK_BACKOFF_MAX_MS"),
                origin_concurrency: given.take("WEBHOOK_ORIGIN_CONCURRENCY"),
                concurrency: given.take("WEBHOOK_CONCURRENCY"),
                max_rps: Some(given.take("WEBHOOK_MAX_RPS")).filter(|n| *n > 0),
                dlq_url: given.take("PAYMENT_WEBHOOK_DLQ_URL"),
                egress: egress::Policy {
                    networks: given.take("WEBHOOK_ALLOW_CIDRS"),
                    hosts: given.take("WEBHOOK_ALLOW_HOSTS"),
                },
            },
            events: EventConfig {
                sink: given.take("EVENT_SINK"),
                startup_check: given.take("EVENT_STARTUP_CHECK"),
                bus_name: given.take("EVENT_BUS_NAME"),
                source: given.take("PAYMENT_EVENT_SOURCE"),
                queue_url: given.take("PAYMENT_WEBHOOK_QUEUE_URL"),
                aws: AwsConfig::new(given),
            },
        }
    }
}

impl AwsConfig {
    fn new(given: &Resolved) -> Self {
        Self {
            profile: given.take("AWS_PROFILE"),
            region: given.take("AWS_REGION"),
            endpoint_url: given.take_flag("AWS_ENDPOINT_URL"),
        }
    }
}

/// Development, with nothing given.
impl Default for Config {
    fn default() -> Self {
        match Invocation::from_args_and_env(["payment-sim"], &Environment::default()) {
            Ok(Invocation::Serve(config)) => *config,
            other => {
                unreachable!("the table's own defaults are allowed, a test sees to it: {other:?}")
            }
        }
    }
}

impl Ended {
    /// Tells the operator and gives the code to exit with.
    fn tell(self, binary: Binary) -> ExitCode {
        // A reader who has gone (`--help | head`) wants no more: nothing to do about an error.
        match self {
            Self::Told(text) => {
                let _gone = write!(io::stdout(), "{text}");
                ExitCode::SUCCESS
            }
            Self::Usage(text) => {
                let _gone = write!(io::stderr(), "{text}");
                ExitCode::from(EXIT_USAGE)
            }
            bad @ (Self::BadValues(_) | Self::BadFiles(_)) => {
                let _gone = writeln!(io::stderr(), "{} {bad}", binary.name());
                ExitCode::from(EXIT_CONFIG)
            }
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Told(text) | Self::Usage(text) => f.write_str(text),
            Self::BadValues(bad) => {
                write!(f, "cannot start, bad settings: {}", bad.len())?;
                bad.iter().try_for_each(|bad| write!(f, "\n  {bad}"))
            }
            Self::BadFiles(bad) => {
                f.write_str("cannot start, settings that cannot be read:")?;
                bad.iter().try_for_each(|bad| write!(f, "\n  {bad}"))
            }
        }
    }
}

impl fmt::Display for BadValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, origin, shown, allowed } = self;
        write!(f, "{name} ({origin}): {shown}; allowed: {allowed}")
    }
}

/// A binary's command line, made from the table.
fn command(binary: Binary) -> Command {
    Command::new(binary.name())
        .version(env!("CARGO_PKG_VERSION"))
        .about(binary.about())
        .after_help(
            "Every flag is also an environment variable, named in brackets. Order: flag, \
             environment, .env.local, .env, default. An empty value counts as not given.",
        )
        .next_line_help(true)
        .disable_help_subcommand(true)
        .args_conflicts_with_subcommands(true)
        .args(binary.settings().map(flag))
        .arg(
            Arg::new(CHECK_CONFIG)
                .long(CHECK_CONFIG)
                .action(ArgAction::SetTrue)
                .help("Print every setting, where it comes from, and exit"),
        )
        .subcommand(
            Command::new(HEALTHCHECK)
                .about("Exit with 0 when the instance on this machine is ready, else with 1")
                .args(healthcheck_settings(binary).map(flag)),
        )
}

/// All that `healthcheck` needs to know; a bad value elsewhere is not its business.
fn healthcheck_settings(binary: Binary) -> [&'static Setting; 2] {
    [binary.ops_port(), "BIND_ADDRESS"].map(setting)
}

fn flag(setting: &'static Setting) -> Arg {
    Arg::new(setting.name)
        .long(setting.flag())
        .value_name("VALUE")
        // Checked with all others, so that every bad value is told at once.
        .value_parser(clap::value_parser!(OsString))
        .allow_negative_numbers(true)
        .hide_default_value(true)
        .help_heading(setting.section)
        .help(format!(
            "{}\n[{}; default: {}; allowed: {}]",
            setting.help,
            setting.name,
            setting.default_text().replace('`', ""),
            setting.kind.allowed()
        ))
}

fn healthcheck(
    binary: Binary,
    matches: &ArgMatches,
    environment: &Environment,
) -> Result<SocketAddr, Ended> {
    // Both stages' defaults for the address answer on loopback, so the stage does not matter here.
    let basis = Basis { binary, stage: Stage::Development, in_memory: false, environment };
    let given = Resolved::of(healthcheck_settings(binary), matches, &basis)?;
    let address = reachable(given.take("BIND_ADDRESS"));
    Ok(SocketAddr::new(address, given.take(binary.ops_port())))
}

/// Where an instance bound to `address` answers on its own machine.
fn reachable(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        specific => specific,
    }
}

/// A value as it was given, not yet checked.
struct Given {
    text: OsString,
    origin: Origin,
}

impl Given {
    /// From the first place that has it; empty there counts as not given at all.
    fn find(setting: &Setting, matches: &ArgMatches, environment: &Environment) -> Option<Self> {
        let flag = matches.get_one::<OsString>(setting.name);
        let (text, origin) = match flag {
            Some(text) => (text.as_os_str(), Origin::Flag),
            None => environment.get(setting.name)?,
        };
        let text = text.to_owned();
        let empty = text.to_str().is_some_and(|text| text.trim().is_empty());
        (!empty).then_some(Self { text, origin })
    }

    fn parse(&self, setting: &'static Setting) -> Result<Value, BadValue> {
        let value = self.text.to_str().and_then(|text| setting.kind.parse(text.trim()));
        value.ok_or_else(|| {
            // As in `shown`: what may hold a password is not repeated.
            let text = self.text.to_str().filter(|text| !text.contains('@'));
            let objection = text.and_then(|text| setting.kind.objection(text.trim()));
            let why = objection.map(|objection| format!(" ({objection})")).unwrap_or_default();
            self.refused(setting, setting.kind.allowed() + &why)
        })
    }

    fn refused(&self, setting: &'static Setting, allowed: String) -> BadValue {
        BadValue {
            name: setting.name,
            origin: self.origin,
            shown: shown(setting, &self.text),
            allowed,
        }
    }
}

/// A value for a message. What may hold a password (`postgres://user:password@host`) is not shown
/// either: it was refused, so it can be anything.
fn shown(setting: &Setting, text: &OsStr) -> String {
    let text = text.to_string_lossy();
    if setting.secret || text.contains('@') {
        return "(value not shown)".into();
    }
    let mut chars = text.chars();
    let head: String = chars.by_ref().take(SHOWN_CHARS).collect();
    let more = if chars.next().is_some() { "…" } else { "" };
    format!("{head:?}{more}")
}

/// All settings of a binary, checked, with where each comes from.
pub struct Resolved(BTreeMap<&'static str, Row>);

/// A value, its text and who gave it.
type Row = (Value, String, Origin);

/// What some defaults depend on.
struct Basis<'a> {
    binary: Binary,
    stage: Stage,
    in_memory: bool,
    environment: &'a Environment,
}

impl Resolved {
    fn new(binary: Binary, matches: &ArgMatches, environment: &Environment) -> Result<Self, Ended> {
        let text = |name| {
            let setting = binary.settings().find(|setting| setting.name == name)?;
            Given::find(setting, matches, environment)?.text.into_string().ok()
        };
        // A bad one is told below; until then the others are checked as in development.
        let stage = text("ENVIRONMENT").and_then(|name| Stage::from_name(name.trim()));
        let basis = Basis {
            binary,
            stage: stage.unwrap_or(Stage::Development),
            in_memory: text("STORE_URL").is_some_and(|url| url.trim() == "memory:"),
            environment,
        };
        Self::of(binary.settings(), matches, &basis)
    }

    fn of(
        wanted: impl IntoIterator<Item = &'static Setting>,
        matches: &ArgMatches,
        basis: &Basis<'_>,
    ) -> Result<Self, Ended> {
        let mut rows = BTreeMap::new();
        let mut bad = Vec::new();
        for setting in wanted {
            let given = Given::find(setting, matches, basis.environment);
            match resolve(setting, given, basis) {
                Ok(row) => {
                    rows.insert(setting.name, row);
                }
                Err(refused) => bad.push(refused),
            }
        }
        bad.extend(same_port_twice(&rows));
        bad.extend(sink_without_queue(&rows));
        bad.extend(token_missing(&rows));
        if bad.is_empty() { Ok(Self(rows)) } else { Err(Ended::BadValues(bad)) }
    }

    fn take<T: FromValue>(&self, name: &str) -> T {
        let (value, _, _) = &self.0[setting(name).name];
        T::from_value(value)
            .unwrap_or_else(|| unreachable!("the table gives {name} another kind of value"))
    }

    /// `None` when the value was not given as a flag.
    fn take_flag<T: FromValue>(&self, name: &str) -> Option<T> {
        let (_, _, origin) = &self.0[setting(name).name];
        (*origin == Origin::Flag).then(|| self.take(name))
    }

    fn report(&self, binary: Binary) -> String {
        let (mut text, mut more) = (String::new(), String::new());
        let width = binary.settings().map(|s| s.name.len()).max().unwrap_or(0);
        for setting in binary.settings() {
            let (set, given, origin) = &self.0[setting.name];
            let value = match set {
                Value::Unset => "(unset)".into(),
                Value::Secrets(secrets) => format!("({} set, not shown)", secrets.iter().len()),
                Value::Token(_) => "(set, not shown)".into(),
                _ => given.escape_debug().to_string(),
            };
            let _infallible = writeln!(text, "{:width$}  {value}  ({origin})", setting.name);
            if let Value::Secrets(secrets) = set {
                more.push_str(&verifier_keys(secrets));
            }
        }
        text.push_str(&more);
        text
    }
}

fn resolve(
    setting: &'static Setting,
    given: Option<Given>,
    basis: &Basis<'_>,
) -> Result<Row, BadValue> {
    if let DefaultValue::DevelopmentOnly(refused) = setting.default
        && basis.stage == Stage::Production
    {
        production_needs_its_own(setting, given.as_ref(), refused)?;
    }
    if let DefaultValue::RequiredBy(binary) = setting.default
        && binary == basis.binary
        && given.is_none()
    {
        return Err(not_set(setting, setting.kind.allowed()));
    }
    if let Some(given) = given {
        let value = given.parse(setting)?;
        let text = given.text.to_string_lossy().trim().to_owned();
        return Ok((value, text, given.origin));
    }
    let Some(text) = default(setting, basis) else {
        return Ok((Value::Unset, String::new(), Origin::Default));
    };
    let value =
        setting.kind.parse(&text).expect("a default is allowed: a test goes through all of them");
    Ok((value, text, Origin::Default))
}

fn default(setting: &Setting, basis: &Basis<'_>) -> Option<String> {
    let text = match setting.default {
        DefaultValue::Unset | DefaultValue::RequiredBy(_) => return None,
        DefaultValue::Fixed(text) | DefaultValue::DevelopmentOnly(text) => text,
        DefaultValue::ByStage { development, production } => match basis.stage {
            Stage::Development => development,
            Stage::Production => production,
        },
        DefaultValue::ByStore { memory, .. } if basis.in_memory => memory,
        DefaultValue::ByStore { file, .. } => file,
        DefaultValue::SharedProfile(name) => {
            return basis.environment.has_aws_profile(name).then(|| name.to_owned());
        }
        DefaultValue::Cores => return Some(cores().to_string()),
    };
    Some(text.to_owned())
}

fn cores() -> usize {
    // The table's upper bound; a machine with more has to be told so.
    const MOST: usize = 256;
    std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST))
}

fn production_needs_its_own(
    setting: &'static Setting,
    given: Option<&Given>,
    refused: &str,
) -> Result<(), BadValue> {
    let allowed =
        format!("{}; in production it must be set, and not to the default", setting.kind.allowed());
    let Some(given) = given else { return Err(not_set(setting, allowed)) };
    let text = given.text.to_string_lossy();
    if text.split(',').any(|one| Secrets::is_key_of(one.trim(), refused)) {
        return Err(given.refused(setting, allowed));
    }
    Ok(())
}

fn not_set(setting: &'static Setting, allowed: String) -> BadValue {
    BadValue { name: setting.name, origin: Origin::Default, shown: "not set".into(), allowed }
}

fn same_port_twice(rows: &BTreeMap<&'static str, Row>) -> Option<BadValue> {
    let (grpc, ops) = (rows.get("GRPC_PORT")?, rows.get("OPS_PORT")?);
    match (&grpc.0, &ops.0) {
        (Value::Whole(grpc_port), Value::Whole(ops_port)) if grpc_port == ops_port => {
            Some(BadValue {
                name: "OPS_PORT",
                origin: ops.2,
                shown: format!("{:?}", ops.1),
                allowed: "another port than GRPC_PORT's".into(),
            })
        }
        _ => None,
    }
}

fn sink_without_queue(rows: &BTreeMap<&'static str, Row>) -> Option<BadValue> {
    let (sink, queue) = (rows.get("EVENT_SINK")?, rows.get("PAYMENT_WEBHOOK_QUEUE_URL")?);
    match (EventSink::from_value(&sink.0)?, &queue.0) {
        (EventSink::Sqs, Value::Unset) => Some(BadValue {
            name: "PAYMENT_WEBHOOK_QUEUE_URL",
            origin: queue.2,
            shown: "not set".into(),
            allowed: format!(
                "{}; EVENT_SINK=sqs needs it",
                setting("PAYMENT_WEBHOOK_QUEUE_URL").kind.allowed()
            ),
        }),
        _ => None,
    }
}

/// What steers the simulation in production is nobody's without a token.
fn token_missing(rows: &BTreeMap<&'static str, Row>) -> Option<BadValue> {
    let (stage, api) = (rows.get("ENVIRONMENT")?, rows.get("SIMULATION_API")?);
    let (token, _, origin) = rows.get("SIMULATION_TOKEN")?;
    let is_needed = Stage::from_value(&stage.0)? == Stage::Production
        && Switch::from_value(&api.0)? == Switch::On;
    (is_needed && matches!(token, Value::Unset)).then(|| BadValue {
        name: "SIMULATION_TOKEN",
        origin: *origin,
        shown: "not set".into(),
        allowed: format!(
            "{}; in production it must be set where SIMULATION_API is on",
            setting("SIMULATION_TOKEN").kind.allowed()
        ),
    })
}

/// How to make the key that an off-the-shelf Standard Webhooks verifier takes, for each secret that
/// is not such a key itself. A command and not the key: what this prints ends up in build logs.
fn verifier_keys(secrets: &Secrets) -> String {
    let several = secrets.iter().len() > 1;
    let mut text = String::new();
    for (n, secret) in (1..).zip(secrets.iter()) {
        if secret.starts_with(Secrets::KEY_PREFIX) {
            continue;
        }
        let which = if several { format!(" {n}") } else { String::new() };
        let one = if several {
            format!(" | cut -d, -f{n} | sed 's/^[[:space:]]*//;s/[[:space:]]*$//' | tr -d '\\n'")
        } else {
            String::new()
        };
        let _infallible = write!(
            text,
            "\nWebhook secret{which} does not begin with {prefix}: an off-the-shelf Standard Webhooks \
             verifier takes for it what\nthis prints, where the shell has WEBHOOK_SECRET:\n  \
             printf '{prefix}%s\\n' \"$(printf %s \"$WEBHOOK_SECRET\"{one} | base64 | tr -d '\\n')\"\n",
            prefix = Secrets::KEY_PREFIX
        );
    }
    text
}
