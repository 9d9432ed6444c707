//! Dead webhooks on their way to the dead-letter queue, with the binary as a process: none is forgotten,
//! whatever becomes of the queue or of the service meanwhile.

#[path = "support/fake_aws/mod.rs"]
mod fake_aws;
mod support;

use std::{path::Path, sync::Arc, time::Duration};

use fake_aws::{FakeAws, Fault, Options};
use payment_sim::{
    api::pb::{
        common::v1::Money,
        payment::v1::{CreatePaymentIntentRequest, Delivery, GetPaymentIntentRequest},
        simulation::v1::{RedeliverRequest, redeliver_request::Which},
    },
    clock::SystemClock,
};
use serde_json::Value;
use support::{client, process::Launch, receiver::Receiver, simulation, until};
use tokio::sync::watch;

const SOON: Duration = Duration::from_secs(30);
const DEAD_WEBHOOKS: &str = "dead-webhooks";

struct Bed {
    fake: FakeAws,
    receiver: Receiver,
    received: watch::Receiver<Vec<Vec<u8>>>,
    folder: tempfile::TempDir,
    queue_url: String,
}

impl Bed {
    /// A receiver that is gone for good, and a queue for what was meant for it.
    async fn start() -> Self {
        let fake = FakeAws::start(Options::new(SystemClock)).await;
        let queue_url = fake.queue(DEAD_WEBHOOKS, 30, None);
        let (bodies, received) = watch::channel(Vec::new());
        let receiver = Receiver::start(Arc::new(move |request| {
            bodies.send_modify(|all| all.push(request.into_body().to_vec()));
            Box::pin(async { Some(410) })
        }))
        .await;
        Self { fake, receiver, received, folder: tempfile::tempdir().unwrap(), queue_url }
    }

    fn launch(&self, folder: &Path) -> Launch {
        Launch::new(folder)
            .with("EVENT_SINK", "none")
            .with("EVENT_STARTUP_CHECK", "off")
            .with("AWS_ENDPOINT_URL", &self.fake.url)
            .with("AWS_ACCESS_KEY_ID", "test")
            .with("AWS_SECRET_ACCESS_KEY", "test")
            .with("DEFAULT_DELAY_MS", 0)
    }

    async fn pay(&self, port: u16) -> String {
        let request = CreatePaymentIntentRequest {
            reservation_id: "reservation".into(),
            user_id: "user".into(),
            amount: Some(Money { amount: 1_000, currency: "KRW".into() }),
            webhook_url: self.receiver.url(),
            ..Default::default()
        };
        let reply = client(port).create_payment_intent(request).await.unwrap();
        reply.into_inner().payment_intent_id
    }

    async fn letters(&self, n: usize) -> Vec<String> {
        let there = || async { self.fake.bodies(DEAD_WEBHOOKS).len() >= n };
        assert!(until(SOON, there).await, "{:?}", self.fake.bodies(DEAD_WEBHOOKS));
        self.fake.bodies(DEAD_WEBHOOKS)
    }
}

async fn delivery(port: u16, id: &str, channel: &str) -> Option<Delivery> {
    let request =
        GetPaymentIntentRequest { payment_intent_id: id.to_owned(), ..Default::default() };
    let reply = client(port).get_payment_intent(request).await.unwrap().into_inner();
    reply.deliveries.into_iter().find(|delivery| delivery.channel == channel)
}

async fn becomes(port: u16, id: &str, channel: &str, state: &str) -> Delivery {
    let so = || async { delivery(port, id, channel).await.is_some_and(|d| d.state == state) };
    assert!(until(SOON, so).await, "{:?}", delivery(port, id, channel).await);
    delivery(port, id, channel).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_webhook_leaves_a_letter_through_throttling_and_a_queue_that_is_away() {
    let bed = Bed::start().await;
    bed.fake.order("SendMessageBatch", [Fault::throttle(), Fault::CutAfter]);
    let launch = bed.launch(bed.folder.path()).with("PAYMENT_WEBHOOK_DLQ_URL", &bed.queue_url);
    let mut service = launch.start();
    service.ready(SOON).await.unwrap();
    let port = launch.grpc_port;
    let id = bed.pay(port).await;
    becomes(port, &id, "webhook", "DEAD").await;
    let letter = becomes(port, &id, "dead_letter", "DELIVERED").await;
    assert_eq!(
        letter.attempts_made, 3,
        "one throttled, one whose reply was lost, one that came through"
    );
    let bodies = bed.letters(2).await;
    let sent = String::from_utf8(bed.received.borrow()[0].clone()).unwrap();
    assert_eq!(bodies, [sent.clone(), sent], "the webhook's own bytes, on every repeat");
    let attributes =
        |raw: &str| serde_json::from_str::<Value>(raw).unwrap()["MessageAttributes"].clone();
    let last = attributes(&bed.fake.entries("SendMessageBatch").last().unwrap().raw);
    assert_eq!(last["reason"]["StringValue"], "GONE");
    assert_eq!(last["attempts"]["StringValue"], "1");
    assert_eq!(last["webhook_url"]["StringValue"], bed.receiver.url());

    let again = || RedeliverRequest {
        which: Some(Which::DeliveryId(letter.delivery_id.replace("dead_letter", "webhook"))),
        ..Default::default()
    };
    simulation(port).redeliver(again()).await.unwrap();
    assert_eq!(bed.letters(3).await.len(), 3, "it died again, and says so again");
    assert_eq!(bed.received.borrow().len(), 2);
    service.terminate();
    assert!(service.exits(SOON).await.is_some_and(|status| status.success()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_is_owed_survives_a_kill_and_ends_where_there_is_no_queue_any_more() {
    let bed = Bed::start().await;
    bed.fake.set_reachable(false);
    let with = bed.launch(bed.folder.path()).with("PAYMENT_WEBHOOK_DLQ_URL", &bed.queue_url);
    let mut service = with.start();
    service.ready(SOON).await.unwrap();
    let kept = bed.pay(with.grpc_port).await;
    becomes(with.grpc_port, &kept, "dead_letter", "OWED").await;
    service.kill();

    bed.fake.set_reachable(true);
    let mut service = with.start();
    service.ready(SOON).await.unwrap();
    becomes(with.grpc_port, &kept, "dead_letter", "DELIVERED").await;
    bed.letters(1).await;
    bed.fake.set_reachable(false);
    let left = bed.pay(with.grpc_port).await;
    becomes(with.grpc_port, &left, "dead_letter", "OWED").await;
    service.kill();

    let without = bed.launch(bed.folder.path());
    let mut service = without.start();
    service.ready(SOON).await.unwrap();
    let letter = becomes(without.grpc_port, &left, "dead_letter", "DEAD").await;
    assert_eq!(letter.attempts.last().unwrap().error, "NO_QUEUE");
    becomes(without.grpc_port, &left, "webhook", "DEAD").await;
    service.terminate();
    assert!(service.exits(SOON).await.is_some_and(|status| status.success()));
}
