//! What only the fake does: it goes wrong on order, and it is fast.

use std::{io::Write, sync::Arc, time::Duration};

use aws_sdk_sqs::types::{
    DeleteMessageBatchRequestEntry as DeleteEntry, Message, MessageSystemAttributeName,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy, rt::TokioExecutor};
use payment_sim::clock::{Clock, ManualClock, Stopwatch, SystemClock};
use tokio::task::JoinSet;

use crate::{
    Bed, DEADLINE, Who,
    fake_aws::{FakeAws, Fate, Fault, Options},
    refused,
};

const PATTERN: &str = r#"{"source": ["s"]}"#;

async fn start(clock: impl Clock) -> (FakeAws, Bed) {
    let fake = FakeAws::start(Options::new(clock)).await;
    let bed = Bed::at(Who::Fake, fake.url.clone()).await;
    (fake, bed)
}

async fn receive(bed: &Bed, url: &str, max: i32, wait_s: i32) -> Vec<Message> {
    let receive = bed.sqs.receive_message().queue_url(url).max_number_of_messages(max);
    let count = MessageSystemAttributeName::ApproximateReceiveCount;
    let receive = receive.message_system_attribute_names(count).wait_time_seconds(wait_s);
    receive.send().await.unwrap().messages.unwrap_or_default()
}

async fn send(bed: &Bed, url: &str, body: &str) -> Result<(), String> {
    let sent = bed.sqs.send_message().queue_url(url).message_body(body).send().await;
    // What was no reply has no code.
    sent.map(drop).map_err(|error| error.into_service_error().to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_meet_what_is_ordered_and_then_what_stands() {
    let (fake, bed) = start(SystemClock).await;
    let url = fake.queue("q", 30, None);
    fake.order("SendMessage", [Fault::refuse(403, "RequestThrottled"), Fault::CutBefore]);
    fake.order("SendMessage", [Fault::CutAfter, Fault::garble(200, "no JSON")]);
    fake.always("SendMessage", |_| Some(Fault::refuse(500, "InternalError")));
    for n in 0..4 {
        send(&bed, &url, &n.to_string()).await.unwrap_err();
    }
    let throttled = bed.sqs.send_message().queue_url(&url).message_body("4").send().await;
    assert_eq!(refused(throttled), "InternalError");
    fake.behaves();
    send(&bed, &url, "5").await.unwrap();
    assert_eq!(fake.bodies("q"), ["2", "3", "5"], "what was done although nobody was told");
    let noted = fake.calls("SendMessage");
    assert_eq!(noted.iter().filter(|call| call.fault.is_some()).count(), 5);
    assert_eq!(noted.len(), 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_fails_and_the_others_do_not() {
    let (fake, bed) = start(SystemClock).await;
    let url = fake.queue("q", 30, None);
    for n in 0..3 {
        send(&bed, &url, &n.to_string()).await.unwrap();
    }
    let messages = receive(&bed, &url, 10, 0).await;
    fake.order("DeleteMessageBatch", [Fault::entry(1, "InternalError")]);
    let mut delete = bed.sqs.delete_message_batch().queue_url(&url);
    for message in &messages {
        let entry = DeleteEntry::builder().id(format!("d{}", message.body().unwrap()));
        let entry = entry.receipt_handle(message.receipt_handle().unwrap()).build().unwrap();
        delete = delete.entries(entry);
    }
    let deleted = delete.send().await.unwrap();
    let [failed] = deleted.failed() else { panic!("{deleted:?}") };
    let said = (failed.id(), failed.code(), failed.sender_fault());
    assert_eq!(said, ("d1", "InternalError", false));
    assert_eq!(fake.bodies("q"), ["1"]);
    let fates: Vec<_> = fake.entries("DeleteMessageBatch").into_iter().map(|e| e.fate).collect();
    let taken = |id: &str| Fate::Taken(id.to_owned());
    assert_eq!(fates, [taken("d0"), Fate::Failed("InternalError".to_owned()), taken("d2")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_come_twice_on_order() {
    let (fake, bed) = start(SystemClock).await;
    let url = fake.queue("q", 30, None);
    fake.delivers_twice_one_in("q", 10);
    for n in 0..100 {
        send(&bed, &url, &n.to_string()).await.unwrap();
    }
    let mut bodies = Vec::new();
    loop {
        let messages = receive(&bed, &url, 10, 0).await;
        if messages.is_empty() {
            break;
        }
        for message in messages {
            let delete = bed.sqs.delete_message().queue_url(&url);
            delete.receipt_handle(message.receipt_handle().unwrap()).send().await.unwrap();
            bodies.push(message.body.unwrap());
        }
    }
    assert_eq!(bodies.len(), 110);
    bodies.sort();
    bodies.dedup();
    assert_eq!(bodies.len(), 100);
    assert_eq!(fake.depth("q"), (0, 0));
}

/// Visibility and long polls go by the clock that the fake is given.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_is_the_tests() {
    let clock = ManualClock::at_ms(1_000_000);
    let (fake, bed) = start(clock.clone()).await;
    fake.queue("dead", 30, None);
    let url = fake.queue("q", 30, Some(("dead", 2)));
    send(&bed, &url, "x").await.unwrap();
    for count in ["1", "2"] {
        let message = receive(&bed, &url, 1, 0).await.remove(0);
        let attributes = message.attributes().unwrap();
        assert_eq!(attributes[&MessageSystemAttributeName::ApproximateReceiveCount], count);
        clock.advance(Duration::from_millis(29_999));
        assert_eq!(fake.depth("q"), (0, 1));
        clock.advance(Duration::from_millis(1));
        assert_eq!(fake.depth("q"), (1, 0));
    }
    let poll = receive(&bed, &url, 1, 20);
    let moved = async {
        while clock.sleepers() == 0 {
            tokio::task::yield_now().await;
        }
        clock.advance(Duration::from_secs(20));
    };
    let (messages, ()) = tokio::join!(poll, moved);
    assert!(messages.is_empty());
    assert_eq!(fake.bodies("dead"), ["x"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_gets_through_while_it_is_out_of_reach() {
    let (fake, bed) = start(SystemClock).await;
    let url = fake.queue("q", 30, None);
    send(&bed, &url, "before").await.unwrap();
    let polled = async {
        let empty = fake.queue("empty", 30, None);
        bed.sqs.receive_message().queue_url(empty).wait_time_seconds(20).send().await
    };
    let cut = async {
        tokio::task::yield_now().await;
        fake.set_reachable(false);
    };
    let (polled, ()) = tokio::join!(polled, cut);
    polled.unwrap_err();
    send(&bed, &url, "meanwhile").await.unwrap_err();
    fake.set_reachable(true);
    send(&bed, &url, "after").await.unwrap();
    assert_eq!(fake.bodies("q"), ["before", "after"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_goes_when_it_is_let_go() {
    let (fake, bed) = start(SystemClock).await;
    let url = fake.queue("q", 30, None);
    fake.order("SendMessage", [Fault::Hold, Fault::AnswerTwice]);
    let let_go = async {
        fake.holds(1).await;
        assert_eq!(fake.bodies("q"), ["held"]);
        fake.release();
    };
    let (sent, ()) = tokio::join!(send(&bed, &url, "held"), let_go);
    sent.unwrap();
    send(&bed, &url, "twice").await.unwrap();
    send(&bed, &url, "on another connection").await.unwrap();
    fake.holds(0).await;
}

/// `cargo test --test aws_conformance -- --ignored --nocapture how_fast`: full calls through a rule into
/// a queue, from plain HTTP clients, which cost less than an SDK.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it prints a rate and judges none"]
async fn how_fast_it_is() {
    const CALLS: usize = 20_000;
    const CLIENTS: usize = 8;
    let fake = FakeAws::start(Options { keeps_calls: false, ..Options::new(SystemClock) }).await;
    fake.route("b", "r", PATTERN, "q");
    let detail = serde_json::json!({"event_id": "e", "filling": "x".repeat(500)}).to_string();
    let entry = serde_json::json!({"EventBusName": "b", "Source": "s", "DetailType": "t",
        "Detail": detail, "Time": 1_767_225_600.25});
    let body = Bytes::from(serde_json::json!({"Entries": vec![entry; 10]}).to_string());
    let http = Arc::new(legacy::Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>());
    let watch = Stopwatch::start();
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (http, url, body) = (Arc::clone(&http), fake.url.clone(), body.clone());
        clients.spawn(async move {
            for _ in 0..CALLS / CLIENTS {
                let request = http::Request::post(&url)
                    .header("x-amz-target", "AWSEvents.PutEvents")
                    .header("authorization", "/events/aws4_request")
                    .body(Full::new(body.clone()))
                    .unwrap();
                let reply = http.request(request).await.unwrap();
                assert_eq!(reply.status(), 200);
                reply.into_body().collect().await.unwrap();
            }
        });
    }
    tokio::time::timeout(DEADLINE, clients.join_all()).await.unwrap();
    let rate = CALLS as f64 / watch.elapsed().as_secs_f64();
    assert_eq!(fake.depth("q"), (CALLS * 10, 0));
    let events = rate * 10.0;
    writeln!(std::io::stderr(), "{rate:.0} calls/s, {events:.0} events/s into a queue").unwrap();
}
