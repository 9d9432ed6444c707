//! Log lines: to stderr (stdout belongs to the `log` event sink), for people in development, one
//! JSON object a line in production.

use std::fmt::{self, Write as _};
use std::io;
use std::panic;

use serde::ser::{SerializeMap, Serializer as _};
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{FormatEvent, JsonFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormattedFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::config::{LogLevel, Stage};

/// Libraries that tell of every frame, page or retry: of them only what goes wrong. A prefix of the
/// target, so `aws` is all of the SDK and `hyper` also `hyper_util`.
const NOISY: &[&str] = &[
    "aws",
    "fjall",
    "h2",
    "hyper",
    "lsm_tree",
    "mio",
    "rustls",
    "sfa",
    "tonic",
    "tower",
    "value_log",
];

/// Sends the process's log lines and panics to stderr from here on.
///
/// # Errors
/// When the process has a logger already.
pub fn init(stage: Stage, level: LogLevel) -> Result<(), TryInitError> {
    let filter = filter(level);
    match stage {
        Stage::Development => for_people(filter, io::stderr).try_init(),
        Stage::Production => for_machines(filter, io::stderr).try_init(),
    }?;
    // The default hook's text is no log line of either form and carries no level.
    panic::set_hook(Box::new(|panic| {
        let message = panic.payload_as_str().unwrap_or("no text");
        let place = panic.location().map(ToString::to_string);
        tracing::error!(place, "panic: {message}");
    }));
    Ok(())
}

fn filter(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let of_noisy = level.min(LevelFilter::WARN);
    Targets::new().with_default(level).with_targets(NOISY.iter().map(|target| (*target, of_noisy)))
}

// The filter stands in front of everything and not on the layer: events of the `log` crate show
// their own target only there.
fn for_people<W>(filter: Targets, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // Coloured unless NO_COLOR is set, which the layer looks at by itself.
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    tracing_subscriber::registry().with(filter).with(layer)
}

fn for_machines<W>(filter: Targets, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer()
        .fmt_fields(JsonFields::new())
        .event_format(JsonLine)
        .with_writer(writer);
    tracing_subscriber::registry().with(filter).with(layer)
}

/// One flat object: timestamp, level, target, message, then the fields of the event and of the
/// spans around it. The library's own JSON form nests the spans' fields, and a `trace_id` must be
/// found at the same place whoever wrote the line.
struct JsonLine;

impl<S> FormatEvent<S, JsonFields> for JsonLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        for span in context.event_scope().into_iter().flat_map(|s| s.from_root()) {
            if let Some(formatted) = span.extensions().get::<FormattedFields<JsonFields>>()
                && let Ok(Value::Object(of_span)) = serde_json::from_str(&formatted.fields)
            {
                fields.0.extend(of_span);
            }
        }
        event.record(&mut fields);
        let line = fields.line(event).map_err(|_| fmt::Error)?;
        writeln!(writer, "{line}")
    }
}

#[derive(Default)]
struct Fields(Map<String, Value>);

impl Fields {
    fn line(mut self, event: &Event<'_>) -> Result<String, LineError> {
        let metadata = event.metadata();
        let message = self.0.remove("message").unwrap_or_default();
        // What comes through the `log` crate carries its own target as a field.
        let of_log = self.0.remove("log.target");
        let target = of_log.unwrap_or_else(|| metadata.target().into());
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;

        let mut line = Vec::new();
        let mut serializer = serde_json::Serializer::new(&mut line);
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("timestamp", &timestamp)?;
        map.serialize_entry("level", metadata.level().as_str())?;
        map.serialize_entry("target", &target)?;
        map.serialize_entry("message", &message)?;
        for (name, value) in &self.0 {
            let taken = matches!(name.as_str(), "timestamp" | "level" | "target");
            if !taken && !name.starts_with("log.") {
                map.serialize_entry(name, value)?;
            }
        }
        map.end()?;
        Ok(String::from_utf8(line)?)
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        let _infallible = write!(text, "{value:?}");
        self.set(field, text);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value);
    }
}

impl Fields {
    fn set(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

#[derive(Debug, thiserror::Error)]
enum LineError {
    #[error(transparent)]
    Time(#[from] fmt::Error),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Text(#[from] std::string::FromUtf8Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Written {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn in_production(level: LogLevel, log: impl FnOnce()) -> Vec<Value> {
        let written = Written::default();
        let writer = written.clone();
        let subscriber = for_machines(filter(level), move || writer.clone());
        tracing::subscriber::with_default(subscriber, log);
        let text = written.text();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn in_development(level: LogLevel, log: impl FnOnce()) -> String {
        let written = Written::default();
        let writer = written.clone();
        let subscriber = for_people(filter(level), move || writer.clone());
        tracing::subscriber::with_default(subscriber, log);
        written.text()
    }

    #[test]
    fn a_line_in_production_is_one_flat_object() {
        let lines = in_production(LogLevel::Info, || {
            let error = io::Error::other("gone\nfor good");
            tracing::info!(
                trace_id = "4bf92f3577b34da6a3ce929d0e0e4736",
                attempts = 3_u64, left_ms = -5_i64, rate = 0.5, last = true, %error,
                "webhook \"given up\""
            );
        });
        assert_eq!(lines.len(), 1);
        let line = &lines[0];
        assert_eq!(line["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["target"], "payment_sim::telemetry::tests");
        assert_eq!(line["message"], "webhook \"given up\"");
        assert_eq!(line["attempts"], 3);
        assert_eq!(line["left_ms"], -5);
        assert_eq!(line["rate"], 0.5);
        assert_eq!(line["last"], true);
        assert_eq!(line["error"], "gone\nfor good");
        let timestamp = line["timestamp"].as_str().unwrap();
        assert!(timestamp.parse::<jiff::Timestamp>().is_ok(), "{timestamp}");
    }

    #[test]
    fn a_spans_trace_id_is_on_every_line_within() {
        let lines = in_production(LogLevel::Info, || {
            let request = tracing::info_span!("request", trace_id = "abc", step = 1).entered();
            let _inner = tracing::info_span!("inner", step = 2).entered();
            tracing::info!("one");
            tracing::warn!(step = 3, "two");
            drop(request);
        });
        assert_eq!((&lines[0]["trace_id"], &lines[1]["trace_id"]), (&"abc".into(), &"abc".into()));
        assert_eq!((&lines[0]["step"], &lines[1]["step"]), (&2.into(), &3.into()));
    }

    #[test]
    fn an_events_field_cannot_pass_for_the_lines_own() {
        let lines = in_production(LogLevel::Info, || {
            tracing::info!(level = "FAKE", timestamp = 0, "x");
        });
        assert_eq!(lines[0]["level"], "INFO");
        assert!(lines[0]["timestamp"].is_string());
    }

    #[test]
    fn a_line_of_the_log_crate_has_its_own_target() {
        let lines = in_production(LogLevel::Info, || {
            tracing::info!(target: "log", { "log.target" = "some::module", "log.line" = 7 }, "from log");
        });
        assert_eq!(lines[0]["target"], "some::module");
        assert!(lines[0].get("log.line").is_none());
    }

    #[test]
    fn the_level_holds_and_noise_is_held_at_warn() {
        let log = || {
            tracing::debug!("ours");
            tracing::debug!(target: "hyper_util::client", "noise");
            tracing::info!(target: "aws_config::profile", "noise");
            tracing::trace!(target: "sfa::writer", "noise");
            tracing::warn!(target: "h2::proto", "of note");
            tracing::error!(target: "fjall::journal", "grave");
        };
        let messages = |level| {
            let lines = in_production(level, log);
            let messages = lines.iter().map(|l| l["message"].as_str().unwrap().to_owned());
            messages.collect::<Vec<_>>()
        };
        assert_eq!(messages(LogLevel::Trace), ["ours", "of note", "grave"]);
        assert_eq!(messages(LogLevel::Debug), ["ours", "of note", "grave"]);
        assert_eq!(messages(LogLevel::Info), ["of note", "grave"]);
        assert_eq!(messages(LogLevel::Error), ["grave"]);
    }

    #[test]
    fn development_is_for_people() {
        let text = in_development(LogLevel::Debug, || {
            tracing::debug!(trace_id = "abc", "a line\u{1b}[2J of its own");
        });
        assert!(text.contains("DEBUG") && text.contains("abc"), "{text}");
        assert!(!text.contains("\u{1b}[2J"), "a value must not drive the terminal: {text:?}");
        #[expect(clippy::disallowed_methods, reason = "what the layer itself looks at")]
        let colour = std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
        assert_eq!(text.contains("\u{1b}["), colour);
    }
}
