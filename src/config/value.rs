//! The kinds of values that settings take: what is allowed, said and checked in one place.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use url::Url;

use crate::egress::{self, AllowedHosts, AllowedNetworks};

/// An enum whose values have the names that an operator writes.
macro_rules! choices {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($variant),+ }

        impl $name {
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$variant),)+ _ => None }
            }
        }

        impl FromValue for $name {
            fn from_value(value: &Value) -> Option<Self> {
                match value { Value::Choice(name) => Self::from_name(name), _ => None }
            }
        }
    };
}

choices! {
    /// Where the process runs; decides several defaults.
    Stage { Development = "development", Production = "production" }
}
choices! {
    Switch { On = "on", Off = "off" }
}
choices! {
    /// Where events go.
    EventSink { EventBridge = "eventbridge", Sqs = "sqs", Log = "log", None = "none" }
}
choices! {
    /// What a start makes of a bus, rule, target or queue that is not there.
    StartupCheck { Warn = "warn", Require = "require", Off = "off" }
}
choices! {
    /// What becomes of a payment that names no scenario.
    Scenario {
        Approve = "approve", Fail = "fail", Delay = "delay",
        Random = "random", Timeout = "timeout", Manual = "manual",
    }
}
choices! {
    LogLevel { Error = "error", Warn = "warn", Info = "info", Debug = "debug", Trace = "trace" }
}

/// Where payments are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// In this folder.
    File(PathBuf),
    /// Nowhere: gone with the process.
    Memory,
}

impl StoreUrl {
    fn parse(text: &str) -> Option<Self> {
        match text.split_once(':')? {
            ("memory", "") => Some(Self::Memory),
            ("file", path) => {
                // In `file://name` a URL's reader sees a host and a shell user a path: refuse it.
                let ambiguous = path.starts_with("//") && !path.starts_with("///");
                (!path.is_empty() && !ambiguous).then(|| Self::File(PathBuf::from(path)))
            }
            _ => None,
        }
    }
}

/// Secrets for signing, newest first, never empty. Neither `Debug` nor any serialiser shows them.
#[derive(Clone)]
pub struct Secrets(Vec<String>);

impl Secrets {
    /// As many as a Standard Webhooks header of a sane size carries signatures for.
    pub const MAX: usize = 8;
    const MAX_CHARS: usize = 255;
    /// Before the base64 of a Standard Webhooks key.
    pub const KEY_PREFIX: &str = "whsec_";

    /// Reads a comma-separated list; `None` when one of them is not allowed.
    pub fn parse(text: &str) -> Option<Self> {
        let secrets: Vec<String> = text.split(',').map(|s| s.trim().to_owned()).collect();
        let allowed = secrets.len() <= Self::MAX && secrets.iter().all(|s| Self::is_allowed(s));
        allowed.then_some(Self(secrets))
    }

    /// Whether a secret signs as `text` does: as it stands, or as the key that a verifier of it is given.
    pub fn is_key_of(secret: &str, text: &str) -> bool {
        let key = secret.strip_prefix(Self::KEY_PREFIX).and_then(|key| BASE64.decode(key).ok());
        secret == text || key.is_some_and(|key| key == text.as_bytes())
    }

    fn is_allowed(secret: &str) -> bool {
        let key_decodes = match secret.strip_prefix(Self::KEY_PREFIX) {
            Some(key) => BASE64.decode(key).is_ok_and(|bytes| !bytes.is_empty()),
            None => true,
        };
        let length = secret.chars().count();
        key_decodes && (1..=Self::MAX_CHARS).contains(&length) && !secret.contains(char::is_control)
    }

    pub fn newest(&self) -> &str {
        self.0.first().expect("parse refuses an empty list")
    }

    /// Newest first.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({}, not shown)", self.0.len())
    }
}

/// What a caller has to show. Neither `Debug` nor any serialiser shows it.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    const MAX_CHARS: usize = 255;

    /// What a header can carry behind "Bearer".
    pub fn parse(text: &str) -> Option<Self> {
        let allowed = (1..=Self::MAX_CHARS).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_graphic());
        allowed.then(|| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(not shown)")
    }
}

/// What a setting takes.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Whole {
        min: u64,
        max: u64,
    },
    Millis {
        min: u64,
        max: u64,
    },
    /// A duration with its unit, between two of the same form.
    Period {
        min: &'static str,
        max: &'static str,
    },
    Fraction,
    Choice(&'static [&'static str]),
    Address,
    /// Printable ASCII without spaces, as AWS names are.
    Word {
        max_chars: usize,
    },
    Text {
        max_chars: usize,
    },
    Url {
        max_chars: usize,
    },
    Store,
    Secrets,
    Networks,
    Hosts,
    Token,
}

/// A setting's value, checked.
#[derive(Debug, Clone)]
pub enum Value {
    Unset,
    Whole(u64),
    Duration(Duration),
    Fraction(f64),
    Choice(&'static str),
    Address(IpAddr),
    Text(String),
    Url(Url),
    Store(StoreUrl),
    Secrets(Secrets),
    Networks(AllowedNetworks),
    Hosts(AllowedHosts),
    Token(Token),
}

impl Kind {
    /// What is allowed, for people.
    pub fn allowed(&self) -> String {
        match self {
            Self::Whole { min, max } => format!("a whole number from {min} to {max}"),
            Self::Millis { min, max } => format!("milliseconds from {min} to {max}"),
            Self::Period { min, max } => {
                format!("a duration from {min} to {max}, such as 10s, 24h, 7d")
            }
            Self::Fraction => "a number from 0 to 1".into(),
            Self::Choice(names) => format!("one of {}", names.join(", ")),
            Self::Address => "an IPv4 or IPv6 address".into(),
            Self::Word { max_chars } => {
                format!("1 to {max_chars} printable ASCII characters without spaces")
            }
            Self::Text { max_chars } => {
                format!("1 to {max_chars} characters, none of them a control character")
            }
            Self::Url { max_chars } => format!(
                "an absolute http or https URL without user info, query and fragment, \
                 at most {max_chars} characters"
            ),
            Self::Store => "file:PATH or memory:".into(),
            Self::Secrets => format!(
                "1 to {} secrets, comma-separated, newest first, each at most {} characters without control characters; \
                 base64 after {}",
                Secrets::MAX,
                Secrets::MAX_CHARS,
                Secrets::KEY_PREFIX
            ),
            Self::Networks => format!(
                "{} or at most {} networks such as 10.1.0.0/16 or fd12::/48, comma-separated; \
                 metadata, link-local and multicast addresses stay refused",
                egress::NONE,
                egress::ENTRIES_MAX
            ),
            Self::Hosts => format!(
                "{} or at most {} host names, comma-separated; *.example.com is every name below example.com",
                egress::NONE,
                egress::ENTRIES_MAX
            ),
            Self::Token => {
                format!("1 to {} printable ASCII characters without spaces", Token::MAX_CHARS)
            }
        }
    }

    /// What is wrong with `text`, where [`Kind::allowed`] alone leaves an operator searching in a list.
    pub fn objection(&self, text: &str) -> Option<String> {
        let bad = match self {
            Self::Networks => AllowedNetworks::parse(text).err(),
            Self::Hosts => AllowedHosts::parse(text).err(),
            _ => None,
        };
        bad.map(|bad| bad.to_string())
    }

    /// `None` when `text` is not what [`Kind::allowed`] says.
    pub fn parse(&self, text: &str) -> Option<Value> {
        match self {
            Self::Whole { min, max } => {
                let n: u64 = text.parse().ok()?;
                (*min..=*max).contains(&n).then_some(Value::Whole(n))
            }
            Self::Millis { min, max } => {
                let n: u64 = text.parse().ok()?;
                let allowed = (*min..=*max).contains(&n);
                allowed.then(|| Value::Duration(Duration::from_millis(n)))
            }
            Self::Period { min, max } => {
                let bound = |text| {
                    humantime::parse_duration(text).expect("the table's bounds are durations")
                };
                let period = humantime::parse_duration(text).ok()?;
                let allowed = (bound(min)..=bound(max)).contains(&period);
                allowed.then_some(Value::Duration(period))
            }
            Self::Fraction => {
                let n: f64 = text.parse().ok()?;
                (0.0..=1.0).contains(&n).then_some(Value::Fraction(n))
            }
            Self::Choice(names) => {
                let name = names.iter().find(|name| **name == text)?;
                Some(Value::Choice(name))
            }
            Self::Address => text.parse().ok().map(Value::Address),
            Self::Word { max_chars } => {
                let allowed =
                    text.len() <= *max_chars && text.bytes().all(|b| b.is_ascii_graphic());
                allowed.then(|| Value::Text(text.to_owned()))
            }
            Self::Text { max_chars } => {
                let allowed =
                    text.chars().count() <= *max_chars && !text.contains(char::is_control);
                allowed.then(|| Value::Text(text.to_owned()))
            }
            Self::Url { max_chars } => parse_url(text, *max_chars).map(Value::Url),
            Self::Store => StoreUrl::parse(text).map(Value::Store),
            Self::Secrets => Secrets::parse(text).map(Value::Secrets),
            Self::Networks => AllowedNetworks::parse(text).ok().map(Value::Networks),
            Self::Hosts => AllowedHosts::parse(text).ok().map(Value::Hosts),
            Self::Token => Token::parse(text).map(Value::Token),
        }
    }
}

fn parse_url(text: &str, max_chars: usize) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let plain = matches!(url.scheme(), "http" | "https")
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    (plain && text.chars().count() <= max_chars).then_some(url)
}

/// How a field of `Config` is made from a value of the kind that the table gives its setting.
pub trait FromValue: Sized {
    fn from_value(value: &Value) -> Option<Self>;
}

macro_rules! from_value {
    ($($type:ty: $pattern:pat => $result:expr),+ $(,)?) => {$(
        impl FromValue for $type {
            fn from_value(value: &Value) -> Option<Self> {
                match value { $pattern => $result, _ => None }
            }
        }
    )+};
}

from_value! {
    u16: Value::Whole(n) => (*n).try_into().ok(),
    u32: Value::Whole(n) => (*n).try_into().ok(),
    u64: Value::Whole(n) => Some(*n),
    usize: Value::Whole(n) => (*n).try_into().ok(),
    f64: Value::Fraction(n) => Some(*n),
    Duration: Value::Duration(d) => Some(*d),
    IpAddr: Value::Address(a) => Some(*a),
    String: Value::Text(t) => Some(t.clone()),
    Url: Value::Url(u) => Some(u.clone()),
    StoreUrl: Value::Store(s) => Some(s.clone()),
    Secrets: Value::Secrets(s) => Some(s.clone()),
    AllowedNetworks: Value::Networks(n) => Some(n.clone()),
    AllowedHosts: Value::Hosts(h) => Some(h.clone()),
    Token: Value::Token(t) => Some(t.clone()),
}

impl<T: FromValue> FromValue for Option<T> {
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Unset => Some(None),
            set => T::from_value(set).map(Some),
        }
    }
}
