use std::{sync::Mutex, time::Duration};

use serde_json::{Value, json};

use super::{
    Courier, EventBridgeCourier, Parcel, aws,
    receiver::{
        Answer, DEADLINE, NOW, Receiver, Seen, aws_config, aws_reply as reply, deaf_port, parcel,
    },
};
use crate::domain::delivery::{Attempted, Topic, Verdict};

const RETRY: Verdict = Verdict::Retry { not_before: None };

async fn courier(receiver: &Receiver) -> EventBridgeCourier {
    let config = aws_config(receiver.addr).await;
    EventBridgeCourier::new(&config, "the-bus".into(), "payment-sim-api".into())
}

fn parcels(count: u32) -> Vec<Parcel> {
    (1..=count).map(|n| parcel(n, None)).collect()
}

/// What the bus says when `fails` names an entry's code, and an event id for the others.
fn results(count: usize, fails: impl Fn(usize) -> Option<&'static str>) -> Answer {
    let entry = |n| match fails(n) {
        Some(code) => json!({"ErrorCode": code, "ErrorMessage": "no"}),
        None => json!({"EventId": format!("aws-{n}")}),
    };
    let entries: Vec<Value> = (0..count).map(entry).collect();
    let failed = (0..count).filter(|n| fails(*n).is_some()).count();
    reply(200, &json!({"FailedEntryCount": failed, "Entries": entries}).to_string())
}

fn entries(seen: &Seen) -> Vec<Value> {
    let body: Value = serde_json::from_slice(&seen.body).unwrap();
    body["Entries"].as_array().unwrap().clone()
}

/// A bus that says nothing but this.
async fn against(
    answer: impl Fn() -> Answer + Send + Sync + 'static,
    count: u32,
) -> Vec<Attempted> {
    let receiver = Receiver::start(move |_, _| answer()).await;
    let courier = courier(&receiver).await;
    let batch = parcels(count);
    let done = tokio::time::timeout(DEADLINE, courier.attempt(&batch, NOW)).await.unwrap();
    assert_eq!(done.len(), batch.len());
    done
}

#[tokio::test]
async fn ten_entries_go_in_one_call_as_the_contract_says() {
    let mut receiver = Receiver::start(|_, seen| results(entries(seen).len(), |_| None)).await;
    let courier = courier(&receiver).await;
    let mut batch = parcels(10);
    batch[3].topic = Topic::RefundUpdated;
    batch[4].trace = Default::default();
    assert_eq!(courier.batch_max(), batch.len());
    let done = courier.attempt(&batch, NOW).await;
    assert!(done.iter().all(|d| d.verdict == Verdict::Accepted), "{done:?}");
    assert!(done.iter().all(|d| d.attempt.http_status == Some(200) && d.attempt.at == NOW));

    let seen = receiver.next().await;
    assert_eq!(seen.headers["x-amz-target"], "AWSEvents.PutEvents");
    let signed = seen.headers["authorization"].to_str().unwrap();
    assert!(signed.contains("/ap-northeast-2/events/aws4_request"), "{signed}");
    let sent = entries(&seen);
    for (n, entry) in sent.iter().enumerate() {
        assert_eq!(entry["Source"], "payment-sim-api");
        assert_eq!(entry["EventBusName"], "the-bus");
        assert_eq!(entry["Detail"].as_str().unwrap().as_bytes(), &batch[n].body[..]);
        assert_eq!(entry["DetailType"], batch[n].topic.detail_type());
        assert_eq!(entry["Time"].as_f64(), Some(NOW.ms() as f64 / 1000.0));
    }
    let trace = "Root=1-abababab-abababababababababababab;Parent=cdcdcdcdcdcdcdcd;Sampled=1";
    assert_eq!(sent[0]["TraceHeader"], trace);
    assert!(sent[4].get("TraceHeader").is_none());
    assert!(receiver.seen.try_recv().is_err(), "one call");
}

#[tokio::test]
async fn only_the_failed_entry_is_tried_again_or_given_up_at_every_position() {
    let codes = [
        ("InternalFailure", RETRY),
        ("InternalException", RETRY),
        ("ThrottlingException", Verdict::Unavailable),
        ("ServiceUnavailable", Verdict::Unavailable),
        ("LimitExceededException", Verdict::Unavailable),
        ("RequestTimeout", RETRY),
        ("ResourceNotFoundException", RETRY),
        ("NeverHeardOf", RETRY),
        ("AccessDeniedException", Verdict::Refused),
        ("InvalidAccountIdException", Verdict::Refused),
        ("InvalidArgument", Verdict::Refused),
        ("MalformedDetail", Verdict::Refused),
        ("RedactionFailure", Verdict::Refused),
        ("NotAuthorizedForSourceException", Verdict::Refused),
        ("NotAuthorizedForDetailTypeException", Verdict::Refused),
        ("ValidationException", Verdict::Refused),
    ];
    let names = codes.clone().map(|(code, _)| code);
    let receiver = Receiver::start(move |n, _| {
        results(10, |entry| (entry == n % 10).then_some(names[n / 10]))
    })
    .await;
    let courier = courier(&receiver).await;
    let batch = parcels(10);
    for (code, verdict) in &codes {
        for place in 0..10 {
            let done = courier.attempt(&batch, NOW).await;
            for (n, done) in done.iter().enumerate() {
                let (error, verdict) = match n == place {
                    true => (Some(*code), verdict),
                    false => (None, &Verdict::Accepted),
                };
                assert_eq!(
                    (done.attempt.error.as_deref(), &done.verdict),
                    (error, verdict),
                    "{code} at {place}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_repeat_sends_the_same_entry_bytes() {
    let mut receiver = Receiver::start(|_, _| results(3, |_| Some("ThrottlingException"))).await;
    let courier = courier(&receiver).await;
    for later_ms in [0, 60_000] {
        courier.attempt(&parcels(3), NOW.plus_ms(later_ms)).await;
    }
    assert_eq!(receiver.next().await.body, receiver.next().await.body);
}

#[tokio::test]
async fn a_call_that_fails_is_the_trouble_of_the_whole_sink() {
    fn error(status: u16, code: &str) -> Answer {
        reply(status, &json!({"__type": code, "message": "secret words"}).to_string())
    }
    type Case = (fn() -> Answer, &'static str, Option<u16>);
    let cases: [Case; 13] = [
        (|| error(500, "InternalException"), "InternalException", Some(500)),
        (|| error(400, "ThrottlingException"), "ThrottlingException", Some(400)),
        (|| error(400, "ResourceNotFoundException"), "ResourceNotFoundException", Some(400)),
        (|| error(400, "AccessDeniedException"), "AccessDeniedException", Some(400)),
        (|| error(400, "ExpiredTokenException"), "ExpiredTokenException", Some(400)),
        (|| error(403, "UnrecognizedClientException"), "UnrecognizedClientException", Some(403)),
        (|| reply(500, "no JSON"), "HTTP 500", Some(500)),
        (|| reply(503, ""), "HTTP 503", Some(503)),
        (|| reply(200, "<html>not JSON</html>"), "MALFORMED_REPLY", Some(200)),
        (
            || Answer::Reset(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_vec()),
            "MALFORMED_REPLY",
            Some(200),
        ),
        (
            || Answer::Close(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".to_vec()),
            "MALFORMED_REPLY",
            Some(200),
        ),
        (|| Answer::Reset(Vec::new()), "CONNECTION", None),
        (|| Answer::Keep(b"what?\r\n\r\n".to_vec()), "CONNECTION", None),
    ];
    let mut wrong = Vec::new();
    for (n, (answer, why, status)) in cases.into_iter().enumerate() {
        for done in against(answer, 3).await {
            let seen = (done.attempt.error.as_deref(), done.attempt.http_status, &done.verdict);
            if seen != (Some(why), status, &Verdict::Unavailable) {
                wrong.push(format!("{n} {why}: {done:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn what_the_reply_does_not_mention_is_tried_again() {
    let short = against(|| results(2, |_| None), 4).await;
    let verdicts: Vec<_> = short.iter().map(|d| d.verdict.clone()).collect();
    assert_eq!(verdicts, [Verdict::Accepted, Verdict::Accepted, RETRY, RETRY]);
    for empty in ["{}", "", "{\"Entries\":[]}", "{\"Entries\":[{},{}]}", "{\"Entries\":null}"] {
        let done = against(|| reply(200, empty), 2).await;
        assert!(done.iter().all(|d| d.verdict == RETRY), "{empty}: {done:?}");
    }
    let long = against(|| results(9, |_| None), 2).await;
    assert!(long.iter().all(|d| d.verdict == Verdict::Accepted));
}

#[tokio::test]
async fn a_call_refused_for_its_content_is_taken_apart_to_find_the_bad_entry() {
    let receiver = Receiver::start(|_, seen| {
        let sent = entries(seen);
        if sent.iter().any(|entry| entry["Detail"].as_str().unwrap().contains("\"n\":2}")) {
            return reply(400, r#"{"__type":"ValidationException","message":"no"}"#);
        }
        results(sent.len(), |_| None)
    })
    .await;
    let done = courier(&receiver).await.attempt(&parcels(3), NOW).await;
    let verdicts: Vec<_> = done.iter().map(|d| d.verdict.clone()).collect();
    assert_eq!(verdicts, [Verdict::Accepted, Verdict::Refused, Verdict::Accepted]);
    assert_eq!(done[1].attempt.error.as_deref(), Some("ValidationException"));
}

#[tokio::test]
async fn batches_are_cut_by_size_and_an_entry_too_large_alone_is_refused() {
    const LIMIT: usize = 256 * 1024;
    // Time, source and detail type count too.
    const AROUND: usize = 14 + "payment-sim-api".len() + "Payment Status Updated".len();
    let sized = |n, bytes: usize| Parcel { body: vec![b'x'; bytes].into(), ..parcel(n, None) };
    let batch = [
        sized(1, LIMIT / 2 - AROUND),
        sized(2, LIMIT / 2 - AROUND),
        sized(3, LIMIT - AROUND),
        sized(4, LIMIT - AROUND + 1),
        sized(5, 1),
        sized(6, LIMIT - 2 * AROUND),
    ];
    let mut receiver = Receiver::start(|_, seen| results(entries(seen).len(), |_| None)).await;
    let done = courier(&receiver).await.attempt(&batch, NOW).await;
    for (n, done) in done.iter().enumerate() {
        let verdict = if n == 3 { Verdict::Refused } else { Verdict::Accepted };
        assert_eq!(done.verdict, verdict, "entry {n}");
    }
    assert_eq!(done[3].attempt.error.as_deref(), Some("ENTRY_TOO_LARGE"));
    let mut calls = Vec::new();
    for _ in 0..4 {
        calls.push(entries(&receiver.next().await).len());
    }
    assert_eq!(calls, [2, 1, 1, 1]);
    assert!(receiver.seen.try_recv().is_err());
}

#[tokio::test]
async fn more_than_ten_go_in_several_calls() {
    let mut receiver = Receiver::start(|_, seen| results(entries(seen).len(), |_| None)).await;
    let done = courier(&receiver).await.attempt(&parcels(23), NOW).await;
    assert_eq!(done.len(), 23);
    for expected in [10, 10, 3] {
        assert_eq!(entries(&receiver.next().await).len(), expected);
    }
}

#[tokio::test]
async fn the_sdk_does_not_try_again_by_itself() {
    let mut receiver = Receiver::start(|_, _| reply(500, "{}")).await;
    courier(&receiver).await.attempt(&parcels(1), NOW).await;
    receiver.next().await;
    assert!(receiver.seen.try_recv().is_err());
}

#[tokio::test]
async fn a_silent_bus_is_a_timeout() {
    let receiver = Receiver::start(|_, _| Answer::Hang).await;
    let timeouts = aws_config::timeout::TimeoutConfig::builder()
        .operation_timeout(Duration::from_millis(100))
        .build();
    let config = aws_config(receiver.addr).await;
    let config = config.into_builder().timeout_config(timeouts).build();
    let courier = EventBridgeCourier::new(&config, "b".into(), "s".into());
    let done = tokio::time::timeout(DEADLINE, courier.attempt(&parcels(2), NOW)).await.unwrap();
    assert!(done.iter().all(
        |d| d.attempt.error.as_deref() == Some("TIMEOUT") && d.verdict == Verdict::Unavailable
    ));
}

#[tokio::test]
async fn nobody_there_and_no_credentials_are_the_trouble_of_the_whole_sink() {
    let (_socket, addr) = deaf_port();
    let config = aws_config(addr).await;
    let courier = EventBridgeCourier::new(&config, "b".into(), "s".into());
    let done = courier.attempt(&parcels(1), NOW).await;
    assert_eq!(
        (done[0].attempt.error.as_deref(), &done[0].verdict),
        (Some("CONNECTION"), &Verdict::Unavailable)
    );

    let mut anonymous = config.into_builder();
    anonymous.set_credentials_provider(None);
    let courier = EventBridgeCourier::new(&anonymous.build(), "b".into(), "s".into());
    let done = courier.attempt(&parcels(1), NOW).await;
    assert_eq!(
        (done[0].attempt.error.as_deref(), &done[0].verdict),
        (Some("NOT_SENT"), &Verdict::Unavailable)
    );
}

/// Each entry of a batch its own fate: verdicts keep to the batch's order over several calls.
#[tokio::test]
async fn verdicts_keep_the_order_of_the_batch() {
    let calls = Mutex::new(0);
    let receiver = Receiver::start(move |_, seen| {
        let count = entries(seen).len();
        let mut calls = calls.lock().unwrap();
        *calls += 1;
        let call = *calls;
        results(count, move |n| (call == 2 && n == 1).then_some("InternalFailure"))
    })
    .await;
    let done = courier(&receiver).await.attempt(&parcels(13), NOW).await;
    let again: Vec<_> = (0..13).filter(|n| done[*n].verdict == RETRY).collect();
    assert_eq!(again, [11]);
}

#[tokio::test]
async fn a_profile_that_is_not_there_is_not_found() {
    assert!(!aws::has_profile("payment-sim-has-no-such-profile").await);
}
