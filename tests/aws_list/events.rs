//! EventBridge.

use aws_sdk_eventbridge::{
    operation::put_events::PutEventsOutput,
    primitives::DateTime,
    types::{PutEventsRequestEntry, RuleState, Target},
};
use serde_json::{Value, json};

use super::sqs::{Queue, received};
use crate::{Bed, refused};

const PATTERN: &str =
    r#"{"source": ["payment-sim-api"], "detail-type": ["Payment Status Updated"]}"#;
const KIB: usize = 1024;

fn entry(bus: &str, detail: &str) -> PutEventsRequestEntry {
    PutEventsRequestEntry::builder()
        .event_bus_name(bus)
        .source("payment-sim-api")
        .detail_type("Payment Status Updated")
        .detail(detail)
        .build()
}

async fn put(bed: &Bed, entries: Vec<PutEventsRequestEntry>) -> PutEventsOutput {
    bed.events.put_events().set_entries(Some(entries)).send().await.unwrap()
}

async fn bus(bed: &Bed, name: &str) {
    bed.events.create_event_bus().name(name).send().await.unwrap();
}

/// A rule of this name that sends to a queue of this name.
async fn route(bed: &Bed, bus: &str, name: &str, pattern: &str) -> Queue {
    let queue = Queue::make(bed, name).await;
    rule(bed, bus, name, pattern, &queue.arn).await;
    queue
}

async fn rule(bed: &Bed, bus: &str, name: &str, pattern: &str, target_arn: &str) {
    let rule = bed.events.put_rule().event_bus_name(bus).name(name).event_pattern(pattern);
    rule.send().await.unwrap();
    let target = Target::builder().id("queue").arn(target_arn).build().unwrap();
    let targets = bed.events.put_targets().event_bus_name(bus).rule(name).targets(target);
    assert_eq!(targets.send().await.unwrap().failed_entry_count(), 0);
}

pub async fn buses_rules_and_targets_are_listed_as_they_were_made(bed: Bed) {
    bus(&bed, "listed").await;
    let queue = route(&bed, "listed", "listed-rule", PATTERN).await;

    let found = bed.events.describe_event_bus().name("listed").send().await.unwrap();
    assert_eq!(found.name(), Some("listed"));
    assert!(found.arn().unwrap().ends_with(":event-bus/listed"), "{found:?}");
    let rules = bed.events.list_rules().event_bus_name("listed").send().await.unwrap();
    let [rule] = rules.rules() else { panic!("{rules:?}") };
    assert_eq!(rule.name(), Some("listed-rule"));
    assert_eq!(rule.state(), Some(&RuleState::Enabled));
    let pattern: Value = serde_json::from_str(rule.event_pattern().unwrap()).unwrap();
    assert_eq!(pattern, serde_json::from_str::<Value>(PATTERN).unwrap());
    let targets = bed.events.list_targets_by_rule().event_bus_name("listed").rule("listed-rule");
    let targets = targets.send().await.unwrap();
    let [target] = targets.targets() else { panic!("{targets:?}") };
    assert_eq!((target.id(), target.arn()), ("queue", queue.arn.as_str()));
    assert!(rules.next_token().is_none() && targets.next_token().is_none());
}

pub async fn what_is_not_there_is_not_found(bed: Bed) {
    bus(&bed, "found").await;
    let events = &bed.events;
    let missing = "ResourceNotFoundException";
    assert_eq!(refused(events.describe_event_bus().name("none").send().await), missing);
    let targets = events.list_targets_by_rule().event_bus_name("found").rule("none");
    assert_eq!(refused(targets.send().await), missing);
    assert_eq!(refused(events.list_rules().event_bus_name("none").send().await), missing);
}

pub async fn a_pattern_that_is_none_is_refused(bed: Bed) {
    bus(&bed, "refusing").await;
    for pattern in ["[1]", "{\"source\": \"not in an array\"}", "not JSON"] {
        let rule = bed.events.put_rule().event_bus_name("refusing").name("bad");
        let made = rule.event_pattern(pattern).send().await;
        if bed.is_moto() && pattern == "[1]" {
            // moto breaks on it.
            assert_eq!(made.unwrap_err().raw_response().unwrap().status().as_u16(), 500);
        } else {
            assert_eq!(refused(made), "InvalidEventPatternException", "{pattern}");
        }
    }
}

pub async fn what_a_rule_matches_arrives_in_the_envelope(bed: Bed) {
    bus(&bed, "enveloping").await;
    let queue = route(&bed, "enveloping", "enveloping-queue", PATTERN).await;
    let detail = r#"{"event_id": "evt_1", "amount": 9007199254740993, "note": "원 \" \\ \n"}"#;
    let wanted = PutEventsRequestEntry::builder()
        .event_bus_name("enveloping")
        .source("payment-sim-api")
        .detail_type("Payment Status Updated")
        .time(DateTime::from_millis(1_767_225_600_750))
        .resources("arn:of:something")
        .detail(detail)
        .build();
    let mut other_source = entry("enveloping", "{}");
    other_source.source = Some("somebody".to_owned());
    let mut other_type = entry("enveloping", "{}");
    other_type.detail_type = Some("Payment Refund Updated".to_owned());
    let other_bus = entry("default", "{}");
    let put = put(&bed, vec![other_source, wanted, other_type, other_bus]).await;
    assert_eq!(put.failed_entry_count(), 0);

    let bodies = queue.bodies(&bed, 1).await;
    let [body] = &bodies[..] else { panic!("{bodies:?}") };
    let mut event: Value = serde_json::from_str(body).unwrap();
    let account = event.as_object_mut().unwrap().remove("account");
    // moto leaves the account out.
    assert_eq!(account.is_some(), !bed.is_moto(), "{body}");
    let detail: Value = serde_json::from_str(detail).unwrap();
    let expected = json!({
        "version": "0", "id": put.entries()[1].event_id(), "source": "payment-sim-api",
        "detail-type": "Payment Status Updated", "time": "2026-01-01T00:00:00Z",
        "region": "ap-northeast-2", "resources": ["arn:of:something"], "detail": detail,
    });
    assert_eq!(event, expected);
}

pub async fn patterns_match_as_documented(bed: Bed) {
    bus(&bed, "matching").await;
    let event = r#"{"status": "COMPLETED", "n": 3, "tags": ["a", "b"], "in": {"deep": null}}"#;
    let patterns = [
        (r#"{"source": ["x", "payment-sim-api"]}"#, true),
        (r#"{"source": ["payment"]}"#, false),
        (r#"{"source": ["payment-sim-api"], "detail": {"status": ["FAILED"]}}"#, false),
        (r#"{"detail": {"status": ["COMPLETED"], "n": [3]}}"#, true),
        (r#"{"detail": {"n": ["3"]}}"#, false),
        (r#"{"detail": {"tags": ["b"]}}"#, true),
        (r#"{"detail": {"in": {"deep": [null]}}}"#, true),
        (r#"{"detail": {"status": [{"prefix": "COMP"}]}}"#, true),
        (r#"{"detail": {"status": [{"prefix": "FAIL"}]}}"#, false),
        (r#"{"detail": {"status": [{"anything-but": ["FAILED", "EXPIRED"]}]}}"#, true),
        (r#"{"detail": {"status": [{"anything-but": "COMPLETED"}]}}"#, false),
        (r#"{"detail": {"status": [{"exists": true}]}}"#, true),
        (r#"{"detail": {"status": [{"exists": false}]}}"#, false),
        (r#"{"detail": {"nothing": [{"exists": false}]}}"#, true),
    ];
    let mut queues = Vec::new();
    for (n, (pattern, _)) in patterns.iter().enumerate() {
        queues.push(route(&bed, "matching", &format!("matching-{n}"), pattern).await);
    }
    put(&bed, vec![entry("matching", event)]).await;
    for (queue, (pattern, matches)) in queues.iter().zip(patterns) {
        let expected = usize::from(matches);
        assert_eq!(queue.bodies(&bed, expected).await.len(), expected, "{pattern}");
    }
}

pub async fn a_rule_that_is_disabled_sends_nothing(bed: Bed) {
    bus(&bed, "disabling").await;
    let queue = route(&bed, "disabling", "disabling-queue", PATTERN).await;
    let rule = bed.events.put_rule().event_bus_name("disabling").name("disabling-queue");
    rule.event_pattern(PATTERN).state(RuleState::Disabled).send().await.unwrap();
    put(&bed, vec![entry("disabling", "{}")]).await;
    // moto sends all the same.
    let expected = usize::from(bed.is_moto());
    assert_eq!(queue.bodies(&bed, expected).await.len(), expected);
}

pub async fn entries_fail_one_by_one(bed: Bed) {
    bus(&bed, "failing").await;
    let queue = route(&bed, "failing", "failing-queue", PATTERN).await;
    let good = |n| entry("failing", &format!("{{\"n\": {n}}}"));
    let (mut no_source, mut no_type, mut no_detail) = (good(1), good(2), good(3));
    no_source.source = None;
    no_type.detail_type = None;
    no_detail.detail = None;
    let (malformed, array) = (entry("failing", "{\"n\": 4"), entry("failing", "[1, 2]"));
    let batch = vec![good(0), no_source, no_type, no_detail, malformed, array, good(6)];
    let put = put(&bed, batch).await;

    let codes: Vec<_> = put.entries().iter().map(|entry| entry.error_code()).collect();
    let [invalid, malformed] = [Some("InvalidArgument"), Some("MalformedDetail")];
    // moto takes an array for a detail.
    let array = if bed.is_moto() { None } else { malformed };
    assert_eq!(codes, [None, invalid, invalid, invalid, malformed, array, None]);
    for entry in put.entries() {
        assert_ne!(entry.event_id().is_some(), entry.error_code().is_some(), "{entry:?}");
        assert_eq!(entry.error_message().is_some(), entry.error_code().is_some(), "{entry:?}");
    }
    let failed = codes.iter().flatten().count();
    assert_eq!(put.failed_entry_count() as usize, failed);
    assert_eq!(queue.bodies(&bed, 7 - failed).await.len(), 7 - failed);
}

pub async fn more_than_ten_entries_or_none_are_refused(bed: Bed) {
    bus(&bed, "counting").await;
    let queue = route(&bed, "counting", "counting-queue", PATTERN).await;
    let eleven = vec![entry("counting", "{}"); 11];
    let many = bed.events.put_events().set_entries(Some(eleven)).send().await;
    assert_eq!(refused(many), "ValidationException");
    let none = bed.events.put_events().set_entries(Some(Vec::new())).send().await;
    if bed.is_moto() {
        // moto sees nothing wrong in it.
        assert!(none.unwrap().entries().is_empty());
    } else {
        assert_eq!(refused(none), "ValidationException");
    }
    let ten = vec![entry("counting", "{}"); 10];
    assert_eq!(put(&bed, ten).await.entries().len(), 10);
    assert_eq!(queue.bodies(&bed, 10).await.len(), 10);
}

/// The older limit of 256 KiB, which is what we keep; AWS takes 1 MiB since January 2026.
pub async fn a_call_that_is_too_large_is_refused(bed: Bed) {
    bus(&bed, "sizing").await;
    let around = "payment-sim-api".len() + "Payment Status Updated".len();
    let sized = |bytes: usize| {
        let filling = "x".repeat(bytes - around - "{\"x\":\"\"}".len());
        entry("sizing", &format!("{{\"x\":\"{filling}\"}}"))
    };
    let half = 128 * KIB;
    assert_eq!(put(&bed, vec![sized(half), sized(half)]).await.failed_entry_count(), 0);
    let events = &bed.events;
    let over = events.put_events().entries(sized(half)).entries(sized(half + 1)).send().await;
    if bed.is_moto() {
        // moto does not count.
        assert_eq!(over.unwrap().failed_entry_count(), 0);
    } else {
        assert_eq!(refused(over), "ValidationException");
    }
}

/// What makes a look at the start necessary: nothing says that the events are gone.
pub async fn a_bus_that_is_not_there_takes_everything(bed: Bed) {
    let put = bed.events.put_events().entries(entry("not-there", "{}")).send().await;
    if bed.is_moto() {
        // moto says so, and real EventBridge does not.
        assert_eq!(refused(put), "ResourceNotFoundException");
    } else {
        let put = put.unwrap();
        assert_eq!(put.failed_entry_count(), 0);
        assert!(put.entries()[0].event_id().is_some());
    }
}

pub async fn a_target_that_is_not_there_loses_events(bed: Bed) {
    bus(&bed, "losing").await;
    let queue = Queue::make(&bed, "losing-queue").await;
    let arn = queue.arn.replace("losing-queue", "no-such-queue");
    rule(&bed, "losing", "losing-rule", PATTERN, &arn).await;
    let put = bed.events.put_events().entries(entry("losing", "{}")).send().await;
    // moto fails the whole call, in SQS's words.
    assert_eq!(put.is_err(), bed.is_moto(), "{put:?}");
}

pub async fn the_trace_header_goes_with_the_message(bed: Bed) {
    bus(&bed, "tracing").await;
    let queue = route(&bed, "tracing", "tracing-queue", PATTERN).await;
    let header = "Root=1-01010101-010101010101010101010101;Parent=0202020202020202;Sampled=1";
    let mut traced = entry("tracing", "{}");
    traced.trace_header = Some(header.to_owned());
    put(&bed, vec![traced]).await;
    let message = received(&bed, &queue).await;
    let attributes = message.attributes().unwrap();
    let found = attributes.iter().find(|(name, _)| name.as_str() == "AWSTraceHeader");
    // moto drops it.
    let expected = (!bed.is_moto()).then_some(header);
    assert_eq!(found.map(|(_, value)| value.as_str()), expected);
}
