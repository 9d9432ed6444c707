//! What a message says: EventBridge's envelope around the body of a webhook, checked whole before
//! anything is done about it.

use serde::Deserialize;
use serde_json::Value;

use crate::domain::{delivery::Topic, status::Status};

/// EventBridge carries no more in one entry; our own events are a few KiB.
pub const BODY_MAX_BYTES: usize = 256 * 1024;
/// As an `Idempotency-Key` it becomes a header.
const EVENT_ID_MAX_CHARS: usize = 255;
/// The payment service's own bound on both.
const ID_MAX_CHARS: usize = 128;
/// Of what is said about a message that is wrong: the other side may have chosen the text.
const WHY_MAX_CHARS: usize = 200;

/// What happened to a payment, as far as its reservation cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub id: String,
    pub topic: Topic,
    pub status: Status,
    pub version: u64,
    pub payment_id: String,
    pub reservation_id: String,
    /// To be passed on.
    pub traceparent: Option<String>,
}

/// No message of ours. Receiving it again will not mend it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct Malformed(String);

#[derive(Deserialize)]
struct Envelope {
    source: String,
    #[serde(rename = "detail-type")]
    detail_type: String,
    detail: Detail,
    #[serde(default)]
    traceparent: Value,
}

#[derive(Deserialize)]
struct Detail {
    event_id: String,
    event_type: String,
    version: u64,
    payment_id: String,
    reservation_id: String,
    status: String,
    #[serde(default)]
    traceparent: Value,
}

impl Event {
    /// Fields that are not known are ignored; those that are needed must be there, of their type and
    /// within their bounds.
    pub fn parse(body: &str) -> Result<Self, Malformed> {
        if body.len() > BODY_MAX_BYTES {
            let why = format!("{} bytes; at most {BODY_MAX_BYTES} are read", body.len());
            return Err(Malformed(why));
        }
        let envelope: Envelope =
            serde_json::from_str(body).map_err(|error| Malformed(shortened(&error.to_string())))?;
        let Envelope { source, detail_type, detail, traceparent } = envelope;
        check("source", &source, EVENT_ID_MAX_CHARS, |c| !c.is_control())?;
        check("event_id", &detail.event_id, EVENT_ID_MAX_CHARS, |c| c.is_ascii_graphic())?;
        check("payment_id", &detail.payment_id, ID_MAX_CHARS, |c| !c.is_control())?;
        check("reservation_id", &detail.reservation_id, ID_MAX_CHARS, |c| !c.is_control())?;
        // As a segment of a URL these two name the folder and the one above.
        if matches!(detail.reservation_id.as_str(), "." | "..") {
            return Err(Malformed("reservation_id cannot be a segment of a path".to_owned()));
        }
        if detail.version == 0 {
            return Err(Malformed("version is 0; versions count from 1".to_owned()));
        }
        let of_detail = traceparent_of(&detail.traceparent);
        Ok(Self {
            topic: topic(&detail_type, &detail.event_type)?,
            status: status(&detail.status)?,
            id: detail.event_id,
            version: detail.version,
            payment_id: detail.payment_id,
            reservation_id: detail.reservation_id,
            traceparent: of_detail.or_else(|| traceparent_of(&traceparent)),
        })
    }
}

fn check(
    field: &str,
    text: &str,
    max_chars: usize,
    allowed: impl Fn(&char) -> bool,
) -> Result<(), Malformed> {
    if (1..=max_chars).contains(&text.chars().count()) && text.chars().all(|c| allowed(&c)) {
        return Ok(());
    }
    Err(Malformed(format!("{field} is not 1 to {max_chars} characters of those allowed")))
}

/// Envelope and body must agree on what they are about.
fn topic(detail_type: &str, event_type: &str) -> Result<Topic, Malformed> {
    [Topic::StatusUpdated, Topic::RefundUpdated]
        .into_iter()
        .find(|topic| topic.detail_type() == detail_type && topic.event_type() == event_type)
        .ok_or_else(|| Malformed(shortened(&format!("no such event: {detail_type}, {event_type}"))))
}

fn status(name: &str) -> Result<Status, Malformed> {
    Status::ALL
        .into_iter()
        .find(|status| status.as_str() == name)
        .ok_or_else(|| Malformed(shortened(&format!("no such status: {name}"))))
}

/// A trace that cannot be followed is no reason to leave a reservation as it is.
fn traceparent_of(value: &Value) -> Option<String> {
    value.as_str().filter(|text| is_traceparent(text)).map(str::to_owned)
}

/// `00-<32 hex>-<16 hex>-<2 hex>`, the ids not all zero (W3C Trace Context).
pub fn is_traceparent(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let is_hex = |text: &str, length| {
        text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_zero = |text: &str| text.bytes().all(|b| b == b'0');
    match parts[..] {
        ["00", trace, span, flags] => {
            is_hex(trace, 32)
                && is_hex(span, 16)
                && is_hex(flags, 2)
                && !is_zero(trace)
                && !is_zero(span)
        }
        _ => false,
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(WHY_MAX_CHARS).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn sample() -> Value {
        json!({
            "version": "0", "id": "x", "source": "payment-sim-api", "account": "1",
            "detail-type": "Payment Status Updated", "time": "2026-01-01T00:00:00Z",
            "region": "ap-northeast-2", "resources": [],
            "detail": {
                "event_id": "evt_1_2", "event_type": "payment.status_updated", "version": 2,
                "payment_id": "pay_1", "payment_intent_id": "pi_1", "reservation_id": "res 1/2",
                "user_id": "u", "status": "PAYMENT_STATUS_COMPLETED", "amount": 1, "echo": {"a": []},
            },
        })
    }

    #[test]
    fn a_message_is_read_and_what_is_not_known_is_ignored() {
        let event = Event::parse(&sample().to_string()).unwrap();
        let expected = Event {
            id: "evt_1_2".into(),
            topic: Topic::StatusUpdated,
            status: Status::Completed,
            version: 2,
            payment_id: "pay_1".into(),
            reservation_id: "res 1/2".into(),
            traceparent: None,
        };
        assert_eq!(event, expected);
    }

    #[test]
    fn every_field_that_is_needed_must_be_there_and_of_its_type() {
        let fields =
            ["event_id", "event_type", "version", "payment_id", "reservation_id", "status"];
        let wrong = [Value::Null, json!(-1), json!(1.5), json!(true), json!([]), json!({})];
        for (place, names) in [("", &["source", "detail-type", "detail"][..]), ("/detail", &fields)]
        {
            for name in names {
                let mut message = sample();
                message.pointer_mut(place).unwrap().as_object_mut().unwrap().remove(*name);
                assert!(Event::parse(&message.to_string()).is_err(), "without {name}");
                for value in &wrong {
                    let mut message = sample();
                    message.pointer_mut(place).unwrap()[*name] = value.clone();
                    assert!(Event::parse(&message.to_string()).is_err(), "{name} = {value}");
                }
            }
        }
    }

    #[test]
    fn values_out_of_bounds_are_refused() {
        let long = "x".repeat(129);
        for (name, value) in [
            ("event_id", json!("")),
            ("event_id", json!("x".repeat(256))),
            ("event_id", json!("two words")),
            ("event_id", json!("line\r\nbreak")),
            ("event_id", json!("\u{e9}")),
            ("payment_id", json!("")),
            ("payment_id", json!(long)),
            ("reservation_id", json!("")),
            ("reservation_id", json!(long)),
            ("reservation_id", json!("a\nb")),
            ("reservation_id", json!("..")),
            ("reservation_id", json!(".")),
            ("version", json!(0)),
            ("version", json!("2")),
            ("status", json!("COMPLETED")),
            ("status", json!("PAYMENT_STATUS_UNSPECIFIED")),
            ("event_type", json!("payment.refund_updated")),
            ("event_type", json!("payment.created")),
        ] {
            let mut message = sample();
            message["detail"][name] = value.clone();
            assert!(Event::parse(&message.to_string()).is_err(), "{name} = {value}");
        }
    }

    #[test]
    fn what_is_no_message_at_all_is_refused_in_few_words() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let twice = sample().to_string().replace("\"version\":2", "\"version\":2,\"version\":3");
        let large = format!("{}{}", sample(), " ".repeat(BODY_MAX_BYTES));
        let shown = format!("{{\"source\": {{\"{}\u{1b}[31m\": 1}}", "x".repeat(1_000));
        for body in ["", "null", "[]", "{}", "poison", &deep, &twice, &large, &shown] {
            let why = Event::parse(body).unwrap_err().to_string();
            assert!(why.len() <= 4 * WHY_MAX_CHARS && !why.contains('\u{1b}'), "{why}");
        }
    }

    #[test]
    fn a_trace_is_taken_from_the_detail_or_the_envelope_and_never_refused() {
        let traceparent = |place: &str, value: Value| {
            let mut message = sample();
            message.pointer_mut(place).unwrap()["traceparent"] = value;
            Event::parse(&message.to_string()).unwrap().traceparent
        };
        assert_eq!(traceparent("/detail", json!(TRACE)).as_deref(), Some(TRACE));
        assert_eq!(traceparent("", json!(TRACE)).as_deref(), Some(TRACE));
        let zero = format!("00-{}-b7ad6b7169203331-01", "0".repeat(32));
        for wrong in [json!(7), Value::Null, json!("x"), json!(zero), json!(TRACE.to_uppercase())] {
            assert_eq!(traceparent("/detail", wrong.clone()), None, "{wrong}");
        }
    }
}
