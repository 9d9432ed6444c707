//! SQS.

use std::collections::{BTreeMap, BTreeSet};

use aws_sdk_sqs::types::{
    ChangeMessageVisibilityBatchRequestEntry as ChangeEntry,
    DeleteMessageBatchRequestEntry as DeleteEntry, Message, MessageAttributeValue,
    MessageSystemAttributeName as SystemAttribute, QueueAttributeName as Attribute,
    SendMessageBatchRequestEntry as SendEntry,
};

use crate::{Bed, refused};

const MIB: usize = 1024 * 1024;
/// Of a poll that is to find something: the longest that SQS allows.
const LONG_S: i32 = 20;

pub struct Queue {
    pub url: String,
    pub arn: String,
}

impl Queue {
    pub async fn make(bed: &Bed, name: &str) -> Self {
        Self::with(bed, name, [] as [(Attribute, String); 0]).await
    }

    async fn with<const N: usize>(
        bed: &Bed,
        name: &str,
        attributes: [(Attribute, String); N],
    ) -> Self {
        let mut make = bed.sqs.create_queue().queue_name(name);
        for (name, value) in attributes {
            make = make.attributes(name, value);
        }
        let url = make.send().await.unwrap().queue_url().unwrap().to_owned();
        let arn = attribute(bed, &url, Attribute::QueueArn).await.unwrap();
        Self { url, arn }
    }

    pub async fn bodies(&self, bed: &Bed, at_least: usize) -> Vec<String> {
        let mut bodies = Vec::new();
        loop {
            // One more look after the last that is expected: what should not be there, would be.
            let wait_s = if bodies.len() < at_least { LONG_S } else { 0 };
            let messages = self.receive(bed, 10, 60, wait_s).await;
            if messages.is_empty() {
                return bodies;
            }
            bodies.extend(messages.into_iter().map(|message| message.body.unwrap()));
        }
    }

    async fn receive(&self, bed: &Bed, max: i32, visibility_s: i32, wait_s: i32) -> Vec<Message> {
        let receive = bed.sqs.receive_message().queue_url(&self.url);
        let receive = receive
            .max_number_of_messages(max)
            .visibility_timeout(visibility_s)
            .wait_time_seconds(wait_s)
            .message_attribute_names("All")
            .message_system_attribute_names(SystemAttribute::All);
        receive.send().await.unwrap().messages.unwrap_or_default()
    }

    /// A message that is there, or will be.
    async fn one(&self, bed: &Bed, visibility_s: i32) -> Message {
        let mut messages = self.receive(bed, 1, visibility_s, LONG_S).await;
        assert_eq!(messages.len(), 1);
        messages.remove(0)
    }

    async fn is_empty(&self, bed: &Bed) -> bool {
        self.receive(bed, 1, 60, 0).await.is_empty()
    }

    async fn send(&self, bed: &Bed, body: &str) -> String {
        let sent = bed.sqs.send_message().queue_url(&self.url).message_body(body).send().await;
        sent.unwrap().message_id.unwrap()
    }

    async fn delete(&self, bed: &Bed, message: &Message) {
        let handle = message.receipt_handle().unwrap();
        let delete = bed.sqs.delete_message().queue_url(&self.url).receipt_handle(handle);
        delete.send().await.unwrap();
    }

    async fn change(&self, bed: &Bed, message: &Message, seconds: i32) {
        let handle = message.receipt_handle().unwrap();
        let change = bed.sqs.change_message_visibility().queue_url(&self.url);
        change.receipt_handle(handle).visibility_timeout(seconds).send().await.unwrap();
    }

    /// Waiting and in flight.
    async fn depth(&self, bed: &Bed) -> (usize, usize) {
        let count = async |name| attribute(bed, &self.url, name).await.unwrap().parse().unwrap();
        let visible = count(Attribute::ApproximateNumberOfMessages).await;
        (visible, count(Attribute::ApproximateNumberOfMessagesNotVisible).await)
    }
}

async fn attribute(bed: &Bed, url: &str, name: Attribute) -> Option<String> {
    let found = bed.sqs.get_queue_attributes().queue_url(url).attribute_names(name.clone());
    found.send().await.unwrap().attributes()?.get(&name).cloned()
}

/// The next message, with everything that is known of it.
pub async fn received(bed: &Bed, queue: &Queue) -> Message {
    queue.one(bed, 60).await
}

fn send_entry(id: &str, body: &str) -> SendEntry {
    SendEntry::builder().id(id).message_body(body).build().unwrap()
}

fn text(value: &str) -> MessageAttributeValue {
    MessageAttributeValue::builder().data_type("String").string_value(value).build().unwrap()
}

fn receives(message: &Message) -> &str {
    &message.attributes().unwrap()[&SystemAttribute::ApproximateReceiveCount]
}

pub async fn a_queue_is_found_by_its_name(bed: Bed) {
    let queue = Queue::make(&bed, "named").await;
    assert!(queue.arn.ends_with(":named"), "{}", queue.arn);
    let found = bed.sqs.get_queue_url().queue_name("named").send().await.unwrap();
    assert_eq!(found.queue_url(), Some(queue.url.as_str()));
    let unknown = bed.sqs.get_queue_url().queue_name("nobody").send().await.unwrap_err();
    assert!(unknown.into_service_error().is_queue_does_not_exist());
    let url = queue.url.replace("named", "nobody");
    let send = bed.sqs.send_message().queue_url(&url).message_body("x").send().await.unwrap_err();
    assert!(send.into_service_error().is_queue_does_not_exist());
    let receive = bed.sqs.receive_message().queue_url(&url).send().await.unwrap_err();
    assert!(receive.into_service_error().is_queue_does_not_exist());
}

pub async fn a_queue_is_made_once(bed: Bed) {
    let make = |visibility: &str| {
        let make = bed.sqs.create_queue().queue_name("made");
        make.attributes(Attribute::VisibilityTimeout, visibility)
    };
    let first = make("7").send().await.unwrap();
    assert_eq!(make("7").send().await.unwrap().queue_url(), first.queue_url());
    let other = make("8").send().await.unwrap_err();
    assert!(other.into_service_error().is_queue_name_exists());
    let url = first.queue_url().unwrap();
    let visibility = attribute(&bed, url, Attribute::VisibilityTimeout).await;
    assert_eq!(visibility.as_deref(), Some("7"));
}

pub async fn a_message_is_received_as_it_was_sent_and_deleted_once(bed: Bed) {
    let queue = Queue::make(&bed, "plain").await;
    let body = "{\"a\": \"원 \\\" \\\\\"}\n\t<&>";
    let send = bed.sqs.send_message().queue_url(&queue.url).message_body(body);
    let send = send.message_attributes("reason", text("HTTP 500"));
    let sent = send.send().await.unwrap();
    assert_eq!(queue.depth(&bed).await, (1, 0));

    let message = received(&bed, &queue).await;
    assert_eq!(message.body(), Some(body));
    assert_eq!(message.message_id(), sent.message_id());
    let attributes = message.message_attributes().unwrap();
    assert_eq!(attributes["reason"].string_value(), Some("HTTP 500"));
    assert_eq!(receives(&message), "1");
    let sent_ms = &message.attributes().unwrap()[&SystemAttribute::SentTimestamp];
    assert!(sent_ms.parse::<u64>().unwrap() > 1_700_000_000_000, "{sent_ms}");
    assert_eq!(queue.depth(&bed).await, (0, 1));
    assert!(queue.is_empty(&bed).await);

    queue.delete(&bed, &message).await;
    queue.delete(&bed, &message).await;
    assert_eq!(queue.depth(&bed).await, (0, 0));
}

pub async fn a_batch_is_taken_entry_by_entry(bed: Bed) {
    let queue = Queue::make(&bed, "batches").await;
    let batch =
        [send_entry("a", "A"), send_entry("bad", "not \u{b} allowed"), send_entry("c-1_C", "C")];
    let send = bed.sqs.send_message_batch().queue_url(&queue.url).set_entries(Some(batch.into()));
    let sent = send.send().await.unwrap();
    let ids: Vec<_> = sent.successful().iter().map(|entry| entry.id()).collect();
    let failed: Vec<_> = sent.failed().iter().map(|entry| (entry.id(), entry.code())).collect();
    if bed.is_moto() {
        // moto takes any characters.
        assert_eq!((&ids[..], failed.len()), (&["a", "bad", "c-1_C"][..], 0));
    } else {
        assert_eq!(ids, ["a", "c-1_C"]);
        assert_eq!(failed, [("bad", "InvalidMessageContents")]);
        assert!(sent.failed()[0].sender_fault());
    }

    let messages = queue.receive(&bed, 10, 60, 0).await;
    let bodies: BTreeSet<_> = messages.iter().map(|message| message.body().unwrap()).collect();
    assert!(bodies.is_superset(&BTreeSet::from(["A", "C"])), "{bodies:?}");
    assert_eq!(bodies.len(), ids.len());
    let mut delete = bed.sqs.delete_message_batch().queue_url(&queue.url);
    for (n, message) in messages.iter().enumerate() {
        let handle = message.receipt_handle().unwrap();
        let entry = DeleteEntry::builder().id(format!("{n}")).receipt_handle(handle);
        delete = delete.entries(entry.build().unwrap());
    }
    let deleted = delete.send().await.unwrap();
    assert_eq!((deleted.successful().len(), deleted.failed().len()), (ids.len(), 0));
    assert_eq!(queue.depth(&bed).await, (0, 0));
}

pub async fn a_batch_that_breaks_a_rule_is_refused_whole(bed: Bed) {
    let queue = Queue::make(&bed, "refused-batches").await;
    let half = "x".repeat(MIB / 2 + 1);
    let long_id = "i".repeat(81);
    let cases: [(&str, Vec<SendEntry>); 6] = [
        ("EmptyBatchRequest", Vec::new()),
        (
            "TooManyEntriesInBatchRequest",
            (0..11).map(|n| send_entry(&n.to_string(), "x")).collect(),
        ),
        ("BatchEntryIdsNotDistinct", vec![send_entry("a", "x"), send_entry("a", "y")]),
        ("InvalidBatchEntryId", vec![send_entry("a.b", "x")]),
        ("InvalidBatchEntryId", vec![send_entry(&long_id, "x")]),
        ("BatchRequestTooLong", vec![send_entry("a", &half), send_entry("b", &half)]),
    ];
    for (code, entries) in cases {
        let send = bed.sqs.send_message_batch().queue_url(&queue.url);
        let code = format!("AWS.SimpleQueueService.{code}");
        assert_eq!(refused(send.set_entries(Some(entries)).send().await), code);
    }
    assert!(queue.is_empty(&bed).await, "nothing of them was taken");
}

pub async fn at_most_ten_messages_a_receive(bed: Bed) {
    let queue = Queue::make(&bed, "ten").await;
    for n in 0..12 {
        queue.send(&bed, &n.to_string()).await;
    }
    let first = queue.receive(&bed, 10, 60, LONG_S).await;
    assert!((1..=10).contains(&first.len()));
    let rest = queue.bodies(&bed, 12 - first.len()).await;
    assert_eq!(first.len() + rest.len(), 12);
    let ids: BTreeSet<_> = first.iter().map(|message| message.receipt_handle()).collect();
    assert_eq!(ids.len(), first.len(), "a handle each");
}

pub async fn numbers_out_of_range_are_refused(bed: Bed) {
    let queue = Queue::make(&bed, "ranges").await;
    let receive = || bed.sqs.receive_message().queue_url(&queue.url);
    for receive in [
        receive().max_number_of_messages(0),
        receive().max_number_of_messages(11),
        receive().wait_time_seconds(-1),
        receive().wait_time_seconds(21),
    ] {
        assert_eq!(refused(receive.send().await), "InvalidParameterValue");
    }
    queue.send(&bed, "x").await;
    let message = received(&bed, &queue).await;
    let change = bed.sqs.change_message_visibility().queue_url(&queue.url);
    let change = change.receipt_handle(message.receipt_handle().unwrap());
    let refused = refused(change.visibility_timeout(43_201).send().await);
    assert_eq!(refused, "InvalidParameterValue");
}

pub async fn messages_out_of_bounds_are_refused(bed: Bed) {
    let queue = Queue::make(&bed, "bounds").await;
    let send = |body: &str| bed.sqs.send_message().queue_url(&queue.url).message_body(body);
    send(&"x".repeat(MIB)).send().await.unwrap();
    assert_eq!(refused(send(&"x".repeat(MIB + 1)).send().await), "InvalidParameterValue");
    let delayed = send("x").delay_seconds(901).send().await;
    assert_eq!(refused(delayed), "InvalidParameterValue");

    let with_attribute = send(&"x".repeat(MIB - 4)).message_attributes("name", text("value"));
    let with_many =
        (0..11).fold(send("x"), |send, n| send.message_attributes(format!("n{n}"), text("value")));
    for (bad, code) in [
        (send(""), "MissingParameter"),
        (with_attribute, "InvalidParameterValue"),
        (with_many, "InvalidParameterValue"),
        (send("\u{1}"), "InvalidMessageContents"),
    ] {
        let sent = bad.send().await;
        if bed.is_moto() {
            // moto asks no more of a body than that it is not too long.
            sent.unwrap();
        } else {
            assert_eq!(refused(sent), code);
        }
    }
}

pub async fn a_message_comes_again_when_its_visibility_ends(bed: Bed) {
    let visibility = [(Attribute::VisibilityTimeout, "1".to_owned())];
    let queue = Queue::with(&bed, "again", visibility).await;
    let id = queue.send(&bed, "x").await;
    let receive = bed.sqs.receive_message().queue_url(&queue.url).send().await.unwrap();
    let first = receive.messages()[0].clone();
    assert!(first.attributes().is_none(), "none were asked for");
    let second = queue.one(&bed, 60).await;
    assert_eq!(second.message_id(), Some(id.as_str()));
    assert_eq!(receives(&second), "2");
    // The handle of an earlier receive is no error; it need not delete anything either.
    queue.delete(&bed, &first).await;
    queue.delete(&bed, &second).await;
    assert_eq!(queue.depth(&bed).await, (0, 0));
}

pub async fn visibility_can_be_extended_and_ended(bed: Bed) {
    let queue = Queue::make(&bed, "extending").await;
    queue.send(&bed, "x").await;
    let message = queue.one(&bed, 1).await;
    queue.change(&bed, &message, 60).await;
    assert!(queue.receive(&bed, 1, 60, 2).await.is_empty(), "extended");
    queue.change(&bed, &message, 0).await;
    let again = queue.one(&bed, 60).await;
    assert_eq!(receives(&again), "2");

    let entry = ChangeEntry::builder().id("a").visibility_timeout(0);
    let entry = entry.receipt_handle(again.receipt_handle().unwrap()).build().unwrap();
    let change = bed.sqs.change_message_visibility_batch().queue_url(&queue.url);
    let changed = change.entries(entry).send().await.unwrap();
    assert_eq!((changed.successful().len(), changed.failed().len()), (1, 0));
    assert_eq!(receives(&queue.one(&bed, 60).await), "3");
}

pub async fn handles_that_are_none_are_refused(bed: Bed) {
    let queue = Queue::make(&bed, "handles").await;
    queue.send(&bed, "x").await;
    let message = received(&bed, &queue).await;
    let invalid = "ReceiptHandleIsInvalid";
    let delete = bed.sqs.delete_message().queue_url(&queue.url).receipt_handle("what");
    assert_eq!(refused(delete.send().await), invalid);
    let change = || bed.sqs.change_message_visibility().queue_url(&queue.url).visibility_timeout(9);
    assert_eq!(refused(change().receipt_handle("what").send().await), invalid);

    let entry = |id: &str, handle: &str| {
        DeleteEntry::builder().id(id).receipt_handle(handle).build().unwrap()
    };
    let handle = message.receipt_handle().unwrap();
    let delete = bed.sqs.delete_message_batch().queue_url(&queue.url);
    let delete = delete.entries(entry("bad", "what")).entries(entry("good", handle));
    let deleted = delete.send().await.unwrap();
    let codes: BTreeMap<_, _> = deleted.failed().iter().map(|e| (e.id(), e.code())).collect();
    assert_eq!(codes, BTreeMap::from([("bad", invalid)]));
    assert_eq!(deleted.successful()[0].id(), "good");
}

pub async fn a_message_received_too_often_goes_to_the_dead_letter_queue(bed: Bed) {
    let dead = Queue::make(&bed, "dead").await;
    let policy = format!(r#"{{"deadLetterTargetArn":"{}","maxReceiveCount":"2"}}"#, dead.arn);
    let queue = Queue::with(&bed, "poisoned", [(Attribute::RedrivePolicy, policy)]).await;
    let policy = attribute(&bed, &queue.url, Attribute::RedrivePolicy).await.unwrap();
    let policy: serde_json::Value = serde_json::from_str(&policy).unwrap();
    assert_eq!(policy["deadLetterTargetArn"], dead.arn.as_str());
    assert!(policy["maxReceiveCount"] == 2 || policy["maxReceiveCount"] == "2", "{policy}");

    let send = bed.sqs.send_message().queue_url(&queue.url).message_body("poison");
    let send = send.message_attributes("reason", text("bad"));
    let id = send.send().await.unwrap().message_id.unwrap();
    for count in ["1", "2"] {
        let message = queue.one(&bed, 60).await;
        assert_eq!(receives(&message), count);
        queue.change(&bed, &message, 0).await;
    }
    assert!(queue.is_empty(&bed).await, "given up");
    assert_eq!(queue.depth(&bed).await, (0, 0));
    let message = dead.one(&bed, 60).await;
    assert_eq!(message.body(), Some("poison"));
    assert_eq!(message.message_id(), Some(id.as_str()));
    assert_eq!(message.message_attributes().unwrap()["reason"].string_value(), Some("bad"));
}

pub async fn a_long_poll_ends_when_a_message_comes(bed: Bed) {
    let queue = Queue::make(&bed, "polling").await;
    let (message, _) = tokio::join!(queue.one(&bed, 60), queue.send(&bed, "x"));
    assert_eq!(message.body(), Some("x"));
}

pub async fn a_delayed_message_comes_later(bed: Bed) {
    let queue = Queue::make(&bed, "delaying").await;
    let send = bed.sqs.send_message().queue_url(&queue.url).message_body("x");
    send.delay_seconds(1).send().await.unwrap();
    let delayed = attribute(&bed, &queue.url, Attribute::ApproximateNumberOfMessagesDelayed).await;
    assert_eq!(delayed.as_deref(), Some("1"));
    assert_eq!(queue.one(&bed, 60).await.body(), Some("x"));
}
