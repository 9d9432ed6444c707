use serde_json::{Value, json};

use super::{
    Courier, DeadLetterCourier, Death, NoDeadLetterQueue, Parcel, SqsCourier,
    receiver::{Answer, DEADLINE, NOW, Receiver, Seen, aws_config, aws_reply, deaf_port, parcel},
};
use crate::domain::delivery::{Attempted, Topic, Verdict};

const RETRY: Verdict = Verdict::Retry { not_before: None };
const LIMIT: usize = 256 * 1024;

async fn courier_of(receiver: &Receiver, queue: &str) -> SqsCourier {
    let url = format!("http://{}/123456789012/{queue}", receiver.addr);
    SqsCourier::new(&aws_config(receiver.addr).await, url, "payment-sim-api".into())
}

async fn courier(receiver: &Receiver) -> SqsCourier {
    courier_of(receiver, "events").await
}

async fn dead_letter_courier(receiver: &Receiver) -> DeadLetterCourier {
    let url = format!("http://{}/123456789012/dead", receiver.addr);
    DeadLetterCourier::new(&aws_config(receiver.addr).await, url)
}

fn parcels(count: u32) -> Vec<Parcel> {
    (1..=count).map(|n| parcel(n, None)).collect()
}

fn dead(n: u32) -> Parcel {
    let death = Death { at: NOW, why: "HTTP 500".into(), attempts_made: 10 };
    Parcel { death: Some(death), ..parcel(n, Some("http://receiver.test/hook")) }
}

fn entries(seen: &Seen) -> Vec<Value> {
    let body: Value = serde_json::from_slice(&seen.body).unwrap();
    body["Entries"].as_array().unwrap().clone()
}

fn body(entry: &Value) -> &str {
    entry["MessageBody"].as_str().unwrap()
}

/// What the queue says when `fails` gives an entry's code and whose fault it is. Entries come in reverse:
/// only their ids say which they are.
fn results(seen: &Seen, fails: impl Fn(usize) -> Option<(&'static str, bool)>) -> Answer {
    let (mut successful, mut failed) = (Vec::new(), Vec::new());
    for (n, entry) in entries(seen).iter().enumerate().rev() {
        match fails(n) {
            Some((code, fault)) => failed.push(
                json!({"Id": entry["Id"], "Code": code, "SenderFault": fault, "Message": "no"}),
            ),
            None => successful
                .push(json!({"Id": entry["Id"], "MessageId": "m", "MD5OfMessageBody": "x"})),
        }
    }
    aws_reply(200, &json!({"Successful": successful, "Failed": failed}).to_string())
}

fn takes_all() -> impl Fn(usize, &Seen) -> Answer {
    |_, seen| results(seen, |_| None)
}

fn verdicts(done: &[Attempted]) -> Vec<Verdict> {
    done.iter().map(|d| d.verdict.clone()).collect()
}

#[tokio::test]
async fn the_envelope_is_eventbridges() {
    let mut receiver = Receiver::start(takes_all()).await;
    let mut batch = parcels(10);
    batch[1].topic = Topic::RefundUpdated;
    let courier = courier(&receiver).await;
    assert_eq!(courier.batch_max(), batch.len());
    let done = courier.attempt(&batch, NOW).await;
    assert!(done.iter().all(|d| d.verdict == Verdict::Accepted), "{done:?}");
    assert!(done.iter().all(|d| d.attempt.http_status == Some(200) && d.attempt.at == NOW));

    let seen = receiver.next().await;
    assert_eq!(seen.headers["x-amz-target"], "AmazonSQS.SendMessageBatch");
    let call: Value = serde_json::from_slice(&seen.body).unwrap();
    assert_eq!(call["QueueUrl"], format!("http://{}/123456789012/events", receiver.addr));
    let sent = entries(&seen);
    let event_id = &batch[0].event_id;
    assert_eq!(
        body(&sent[0]),
        format!(
            "{{\"version\":\"0\",\"id\":\"b057ec46-69a9-4cdf-be36-ff0c2a167a50\",\
             \"detail-type\":\"Payment Status Updated\",\"source\":\"payment-sim-api\",\
             \"account\":\"123456789012\",\"time\":\"2026-01-01T00:00:00Z\",\
             \"region\":\"ap-northeast-2\",\"resources\":[],\
             \"detail\":{{\"event_id\":\"{event_id}\",\"n\":1}}}}"
        )
    );
    let refund: Value = serde_json::from_str(body(&sent[1])).unwrap();
    assert_eq!(refund["detail-type"], "Payment Refund Updated");
    for (entry, parcel) in sent.iter().zip(&batch) {
        assert_eq!(entry["Id"], parcel.event_id);
        assert!(entry.get("MessageAttributes").is_none());
        assert!(entry.get("MessageGroupId").is_none(), "not a FIFO queue");
    }
    assert!(receiver.seen.try_recv().is_err(), "one call");
}

#[tokio::test]
async fn a_fifo_queue_keeps_a_payments_order_and_drops_repeats() {
    let mut receiver = Receiver::start(takes_all()).await;
    let batch = parcels(1);
    courier_of(&receiver, "events.fifo").await.attempt(&batch, NOW).await;
    let sent = entries(&receiver.next().await);
    assert_eq!(sent[0]["MessageGroupId"], batch[0].payment.intent());
    assert_eq!(sent[0]["MessageDeduplicationId"], batch[0].event_id);
}

#[tokio::test]
async fn a_repeat_sends_the_same_bytes() {
    let mut receiver = Receiver::start(takes_all()).await;
    for later_ms in [0, 60_000] {
        courier(&receiver).await.attempt(&parcels(3), NOW.plus_ms(later_ms)).await;
    }
    assert_eq!(receiver.next().await.body, receiver.next().await.body);
}

#[tokio::test]
async fn a_queue_url_without_an_account_has_the_account_zero() {
    let mut receiver = Receiver::start(takes_all()).await;
    let url = format!("http://{}/queue/events", receiver.addr);
    let courier = SqsCourier::new(&aws_config(receiver.addr).await, url, "s".into());
    courier.attempt(&parcels(1), NOW).await;
    let sent = entries(&receiver.next().await);
    let envelope: Value = serde_json::from_str(body(&sent[0])).unwrap();
    assert_eq!(envelope["account"], "000000000000");
}

#[tokio::test]
async fn only_the_failed_entry_is_tried_again_or_given_up_at_every_position() {
    let codes = [
        (("InternalError", false), RETRY),
        (("NeverHeardOf", true), RETRY),
        (("InvalidMessageContents", false), RETRY),
        (("KMS.AccessDeniedException", true), RETRY),
        (("AccessDenied", true), RETRY),
        (("RequestThrottled", true), Verdict::Unavailable),
        (("ThrottlingException", false), Verdict::Unavailable),
        (("KMS.ThrottlingException", true), Verdict::Unavailable),
        (("ServiceUnavailable", false), Verdict::Unavailable),
        (("InvalidMessageContents", true), Verdict::Refused),
        (("InvalidParameterValue", true), Verdict::Refused),
        (("AWS.SimpleQueueService.InvalidBatchEntryId", true), Verdict::Refused),
    ];
    let failures = codes.clone().map(|(failure, _)| failure);
    let receiver = Receiver::start(move |n, seen| {
        results(seen, |entry| (entry == n % 10).then_some(failures[n / 10]))
    })
    .await;
    let courier = courier(&receiver).await;
    let batch = parcels(10);
    for (failure, verdict) in &codes {
        for place in 0..10 {
            let done = courier.attempt(&batch, NOW).await;
            for (n, done) in done.iter().enumerate() {
                let (error, verdict) = match n == place {
                    true => (Some(failure.0), verdict),
                    false => (None, &Verdict::Accepted),
                };
                let seen = (done.attempt.error.as_deref(), &done.verdict);
                assert_eq!(seen, (error, verdict), "{failure:?} at {place}");
            }
        }
    }
}

#[tokio::test]
async fn a_call_that_fails_is_the_trouble_of_the_whole_queue() {
    fn error(status: u16, code: &str) -> Answer {
        aws_reply(status, &json!({"__type": code, "message": "secret words"}).to_string())
    }
    type Case = (fn() -> Answer, &'static str, Option<u16>);
    let cases: [Case; 8] = [
        (|| error(500, "InternalError"), "InternalError", Some(500)),
        (|| error(403, "RequestThrottled"), "RequestThrottled", Some(403)),
        (|| error(400, "com.amazonaws.sqs#QueueDoesNotExist"), "QueueDoesNotExist", Some(400)),
        (|| error(400, "AccessDeniedException"), "AccessDeniedException", Some(400)),
        (|| error(403, "InvalidClientTokenId"), "InvalidClientTokenId", Some(403)),
        (|| aws_reply(503, ""), "HTTP 503", Some(503)),
        (|| aws_reply(200, "<html>not JSON</html>"), "MALFORMED_REPLY", Some(200)),
        (|| Answer::Reset(Vec::new()), "CONNECTION", None),
    ];
    for (answer, why, status) in cases {
        let receiver = Receiver::start(move |_, _| answer()).await;
        let courier = courier(&receiver).await;
        let batch = parcels(3);
        let done = tokio::time::timeout(DEADLINE, courier.attempt(&batch, NOW)).await.unwrap();
        assert_eq!(done.len(), 3);
        for done in done {
            let seen = (done.attempt.error.as_deref(), done.attempt.http_status, &done.verdict);
            assert_eq!(seen, (Some(why), status, &Verdict::Unavailable));
        }
    }
    let (_socket, addr) = deaf_port();
    let courier = SqsCourier::new(&aws_config(addr).await, format!("http://{addr}/q"), "s".into());
    let done = courier.attempt(&parcels(1), NOW).await;
    assert_eq!(done[0].attempt.error.as_deref(), Some("CONNECTION"));
    assert_eq!(done[0].verdict, Verdict::Unavailable);
}

#[tokio::test]
async fn what_the_reply_does_not_mention_is_tried_again() {
    for empty in ["{}", "", r#"{"Successful":[],"Failed":[]}"#, r#"{"Successful":[{}]}"#] {
        let receiver = Receiver::start(move |_, _| aws_reply(200, empty)).await;
        let done = courier(&receiver).await.attempt(&parcels(2), NOW).await;
        assert_eq!(verdicts(&done), [RETRY, RETRY], "{empty}");
    }
}

#[tokio::test]
async fn a_call_refused_for_its_content_is_taken_apart_to_find_the_bad_entry() {
    let receiver = Receiver::start(|_, seen| {
        if entries(seen).iter().any(|entry| body(entry).contains("\"n\":2}")) {
            let code = "com.amazonaws.sqs#BatchRequestTooLong";
            return aws_reply(400, &json!({"__type": code, "message": "no"}).to_string());
        }
        results(seen, |_| None)
    })
    .await;
    let done = courier(&receiver).await.attempt(&parcels(3), NOW).await;
    let expected = [Verdict::Accepted, Verdict::Refused, Verdict::Accepted];
    assert_eq!(verdicts(&done), expected);
}

#[tokio::test]
async fn batches_are_cut_by_size_and_what_is_no_json_or_too_large_is_refused_alone() {
    let mut receiver = Receiver::start(takes_all()).await;
    let courier = courier(&receiver).await;
    courier.attempt(&[Parcel { body: "\"\"".into(), ..parcel(1, None) }], NOW).await;
    let around = body(&entries(&receiver.next().await)[0]).len() - 2;
    let sized = |n, bytes: usize| {
        let text = "x".repeat(bytes - around - 2);
        Parcel { body: format!("\"{text}\"").into(), ..parcel(n, None) }
    };
    let batch = [
        sized(1, LIMIT / 2),
        sized(2, LIMIT / 2),
        Parcel { body: "{".into(), ..parcel(3, None) },
        sized(4, LIMIT),
        sized(5, LIMIT + 1),
        sized(6, LIMIT / 2),
        sized(7, LIMIT / 2 + 1),
    ];
    let done = courier.attempt(&batch, NOW).await;
    let errors: Vec<_> = done.iter().map(|d| d.attempt.error.as_deref()).collect();
    let (bad, large) = (Some("MALFORMED_DETAIL"), Some("ENTRY_TOO_LARGE"));
    assert_eq!(errors, [None, None, bad, None, large, None, None]);
    for (n, done) in done.iter().enumerate() {
        let verdict = if [2, 4].contains(&n) { Verdict::Refused } else { Verdict::Accepted };
        assert_eq!(done.verdict, verdict, "message {n}");
    }
    let mut calls = Vec::new();
    for _ in 0..4 {
        calls.push(entries(&receiver.next().await).len());
    }
    assert_eq!(calls, [2, 1, 1, 1]);
    assert!(receiver.seen.try_recv().is_err());
}

#[tokio::test]
async fn a_letter_is_the_body_unchanged_with_its_story_beside_it() {
    let mut receiver = Receiver::start(takes_all()).await;
    let mut letter = dead(1);
    letter.body = "{\"a\": \"\u{1F980}\tx\"}".into();
    let done = dead_letter_courier(&receiver).await.attempt(&[letter.clone()], NOW).await;
    assert_eq!(verdicts(&done), [Verdict::Accepted]);

    let sent = entries(&receiver.next().await);
    assert_eq!(body(&sent[0]).as_bytes(), &letter.body[..]);
    let attribute = |data_type, value: &str| json!({"DataType": data_type, "StringValue": value});
    assert_eq!(
        sent[0]["MessageAttributes"],
        json!({
            "reason": attribute("String", "HTTP 500"),
            "attempts": attribute("Number", "10"),
            "died_at": attribute("String", "2026-01-01T00:00:00.25Z"),
            "webhook_url": attribute("String", "http://receiver.test/hook"),
            "event_id": attribute("String", &letter.event_id),
            "event_type": attribute("String", "payment.status_updated"),
        })
    );
}

#[tokio::test]
async fn characters_that_no_queue_takes_are_written_as_json_writes_them() {
    let mut receiver = Receiver::start(takes_all()).await;
    let mut odd = dead(1);
    odd.body = "{\"a\":\"\u{ffff}x\u{fffe}\u{fffd}\"}".into();
    odd.death.as_mut().unwrap().why = "a\0b".into();
    courier(&receiver).await.attempt(&[odd.clone()], NOW).await;
    dead_letter_courier(&receiver).await.attempt(&[odd.clone()], NOW).await;

    let event = entries(&receiver.next().await);
    assert!(body(&event[0]).contains("\\uffffx\\ufffe\u{fffd}"), "{event:?}");
    let letter = entries(&receiver.next().await);
    assert_eq!(body(&letter[0]), "{\"a\":\"\\uffffx\\ufffe\u{fffd}\"}");
    let (sent, meant): (Value, Value) = (
        serde_json::from_str(body(&letter[0])).unwrap(),
        serde_json::from_slice(&odd.body).unwrap(),
    );
    assert_eq!(sent, meant);
    assert_eq!(letter[0]["MessageAttributes"]["reason"]["StringValue"], "a\\u0000b");
}

#[tokio::test]
async fn a_letter_that_no_queue_takes_whole_is_cut_and_says_so() {
    let mut receiver = Receiver::start(takes_all()).await;
    let mut long = dead(1);
    long.body = "é".repeat(LIMIT / 2).into();
    let done = dead_letter_courier(&receiver).await.attempt(&[long], NOW).await;
    assert_eq!(verdicts(&done), [Verdict::Accepted]);

    let sent = entries(&receiver.next().await);
    let attributes = sent[0]["MessageAttributes"].as_object().unwrap();
    assert_eq!(attributes["cut_from_bytes"]["StringValue"], LIMIT.to_string());
    let text = |value: &Value, key: &str| value[key].as_str().unwrap().len();
    let around: usize = attributes
        .iter()
        .map(|(name, v)| name.len() + text(v, "DataType") + text(v, "StringValue"))
        .sum();
    let total = body(&sent[0]).len() + around;
    assert!((LIMIT - 1..=LIMIT).contains(&total), "{total}");
    assert!(body(&sent[0]).chars().all(|c| c == 'é'));
}

/// A webhook that is sent again and dies once more tells so to a FIFO queue too.
#[tokio::test]
async fn a_second_death_is_another_letter() {
    let mut receiver = Receiver::start(takes_all()).await;
    let url = format!("http://{}/123456789012/dead.fifo", receiver.addr);
    let courier = DeadLetterCourier::new(&aws_config(receiver.addr).await, url);
    let mut again = dead(1);
    again.death.as_mut().unwrap().attempts_made = 20;
    let mut ids = Vec::new();
    for letter in [dead(1), dead(1), again] {
        courier.attempt(&[letter], NOW).await;
        ids.push(entries(&receiver.next().await)[0]["MessageDeduplicationId"].clone());
    }
    assert_eq!(ids[0], ids[1]);
    assert_ne!(ids[0], ids[2]);
}

#[tokio::test]
async fn letters_wait_for_their_queue_and_only_a_final_code_ends_them() {
    let receiver = Receiver::start(|n, seen| match n {
        0 => aws_reply(503, ""),
        _ => results(seen, |_| Some(("InvalidMessageContents", true))),
    })
    .await;
    let courier = dead_letter_courier(&receiver).await;
    let batch = [dead(1)];
    assert_eq!(verdicts(&courier.attempt(&batch, NOW).await), [Verdict::Unavailable]);
    assert_eq!(verdicts(&courier.attempt(&batch, NOW).await), [Verdict::Refused]);
}

#[tokio::test]
async fn without_a_queue_letters_are_refused() {
    let done = NoDeadLetterQueue.attempt(&[dead(1), dead(2)], NOW).await;
    assert_eq!(verdicts(&done), [Verdict::Refused, Verdict::Refused]);
    assert_eq!(done[0].attempt.error.as_deref(), Some("NO_QUEUE"));
}
