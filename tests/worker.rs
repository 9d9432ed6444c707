//! reservation-worker as a process of its own, between a queue that misbehaves on order and a reservation
//! API of ours.

#[path = "support/fake_aws/mod.rs"]
mod fake_aws;
mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use aws_sdk_sqs::{
    Client,
    config::{Credentials, SharedCredentialsProvider},
    types::SendMessageBatchRequestEntry,
};
use bytes::Bytes;
use fake_aws::{FakeAws, Fault, Options};
use http::Request;
use payment_sim::{
    clock::SystemClock,
    courier::aws::{self, AwsSettings},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use support::{free_ports, process, receiver::Receiver, until};
use tokio::sync::watch;

const QUEUE: &str = "payment-webhooks";
const DEAD: &str = "payment-webhooks-dlq";
const SOON: Duration = Duration::from_secs(60);

/// Takes every call, and answers while it is open.
struct Api {
    receiver: Receiver,
    /// Path and idempotency key of each call.
    calls: Arc<Mutex<Vec<(String, String)>>>,
    open: watch::Sender<bool>,
}

impl Api {
    async fn start() -> Self {
        let calls: Arc<Mutex<Vec<(String, String)>>> = Arc::default();
        let open = watch::Sender::new(true);
        let (kept, gate) = (Arc::clone(&calls), open.clone());
        let receiver = Receiver::start(Arc::new(move |request: Request<Bytes>| {
            let key = request.headers()["idempotency-key"].to_str().unwrap().to_owned();
            kept.lock().unwrap().push((request.uri().path().to_owned(), key));
            let mut gate = gate.subscribe();
            Box::pin(async move { gate.wait_for(|open| *open).await.is_ok().then_some(204) })
        }))
        .await;
        Self { receiver, calls, open }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.receiver.port)
    }

    fn calls(&self) -> Vec<(String, String)> {
        self.calls.lock().unwrap().clone()
    }
}

struct Worker {
    child: Child,
    port: u16,
}

impl Worker {
    async fn start(folder: &Path, aws: &FakeAws, queue_url: &str, api: &Api) -> Self {
        let [port] = free_ports();
        let log = File::create(folder.join("worker.log")).expect("a log");
        // Nothing of this process's environment reaches it, and no `.env` file.
        let child = Command::new(env!("CARGO_BIN_EXE_reservation-worker"))
            .env_clear()
            .envs([("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")])
            .envs([("AWS_ENDPOINT_URL", aws.url.as_str()), ("HOME", folder.to_str().unwrap())])
            .envs([("PAYMENT_WEBHOOK_QUEUE_URL", queue_url), ("WORKER_VISIBILITY", "2s")])
            .env("RESERVATION_API_URL", api.url())
            .env("WORKER_PORT", port.to_string())
            .current_dir(folder)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the worker starts");
        let worker = Self { child, port };
        let is_ready = || async { worker.get("/readyz").await.contains(" 200 ") };
        assert!(until(SOON, is_ready).await, "the worker is not ready");
        worker
    }

    async fn get(&self, path: &str) -> String {
        process::get(self.port, path).await.unwrap_or_default()
    }

    fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("it is our child");
    }

    async fn exits(&mut self) -> Option<ExitStatus> {
        let (mut status, child) = (None, &mut self.child);
        until(SOON, || {
            status = child.try_wait().expect("it is our child");
            std::future::ready(status.is_some())
        })
        .await;
        status
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended already.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// A queue with a dead-letter queue behind it.
async fn queue() -> (FakeAws, String) {
    let aws = FakeAws::start(Options::new(SystemClock)).await;
    aws.queue(DEAD, 30, None);
    let url = aws.queue(QUEUE, 30, Some((DEAD, 5)));
    (aws, url)
}

fn body(n: usize) -> String {
    json!({
        "source": "payment-sim-api", "detail-type": "Payment Status Updated",
        "detail": {
            "event_id": format!("evt_{n}_1"), "event_type": "payment.status_updated", "version": 2,
            "payment_id": format!("pay_{n}"), "reservation_id": format!("res_{n}"),
            "status": "PAYMENT_STATUS_COMPLETED",
        },
    })
    .to_string()
}

async fn send(fake: &FakeAws, queue_url: &str, numbers: std::ops::Range<usize>) {
    let settings = AwsSettings {
        region: Some(fake_aws::REGION.into()),
        endpoint_url: Some(fake.url.clone()),
        ..AwsSettings::default()
    };
    let dummy =
        SharedCredentialsProvider::new(Credentials::new("test", "test", None, None, "test"));
    let config = aws::sdk_config(&settings).await.into_builder().credentials_provider(dummy);
    let client = Client::new(&config.build());
    let numbers: Vec<usize> = numbers.collect();
    for ten in numbers.chunks(10) {
        let mut call = client.send_message_batch().queue_url(queue_url);
        for n in ten {
            let entry = SendMessageBatchRequestEntry::builder().id(n.to_string());
            call = call.entries(entry.message_body(body(*n)).build().unwrap());
        }
        assert!(call.send().await.unwrap().failed().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_ends_what_is_in_hand_and_deletes_it() {
    const IN_HAND: usize = 30;
    let (folder, api) = (tempfile::tempdir().unwrap(), Api::start().await);
    let (aws, queue_url) = queue().await;
    api.open.send_replace(false);
    let mut worker = Worker::start(folder.path(), &aws, &queue_url, &api).await;
    send(&aws, &queue_url, 0..IN_HAND).await;
    assert!(until(SOON, || async { api.calls().len() == IN_HAND }).await, "{:?}", api.calls());

    worker.terminate();
    assert!(until(SOON, || async { worker.get("/readyz").await.contains(" 503 ") }).await);
    send(&aws, &queue_url, IN_HAND..IN_HAND + 1).await;
    assert!(worker.child.try_wait().unwrap().is_none(), "it left what it had in hand");
    api.open.send_replace(true);
    let status = worker.exits().await.expect("it ends by itself");
    assert!(status.success(), "{status}");

    // The late one may have been on its way at the signal; then it was in hand too, and is done whole.
    let left = aws.bodies(QUEUE);
    assert!(left.is_empty() || left == [body(IN_HAND)], "{left:?}");
    let done = IN_HAND + 1 - left.len();
    let keys: BTreeSet<String> = api.calls().into_iter().map(|(_, key)| key).collect();
    assert_eq!((keys.len(), api.calls().len()), (done, done), "each told once");
    let deletes = aws.calls("DeleteMessageBatch");
    assert_eq!(deletes.iter().map(|call| call.entries.len()).sum::<usize>(), done);
    assert!(deletes.len() < IN_HAND, "in batches");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_in_trouble_loses_nothing_and_nothing_is_told_twice() {
    const MESSAGES: usize = 500;
    let (folder, api) = (tempfile::tempdir().unwrap(), Api::start().await);
    let (aws, queue_url) = queue().await;
    aws.delivers_twice_one_in(QUEUE, 10);
    aws.order(
        "ReceiveMessage",
        [
            Fault::throttle(),
            Fault::CutBefore,
            Fault::CutAfter,
            Fault::garble(200, "no JSON"),
            Fault::refuse(500, "InternalError"),
            Fault::AnswerTwice,
        ],
    );
    aws.order(
        "DeleteMessageBatch",
        [
            Fault::entry(0, "InternalError"),
            Fault::throttle(),
            Fault::CutBefore,
            Fault::CutAfter,
            Fault::garble(200, ""),
        ],
    );
    aws.order("ChangeMessageVisibilityBatch", [Fault::throttle(), Fault::CutBefore]);
    send(&aws, &queue_url, 0..MESSAGES).await;
    let mut worker = Worker::start(folder.path(), &aws, &queue_url, &api).await;
    assert!(until(SOON, || async { aws.bodies(QUEUE).is_empty() }).await, "{:?}", aws.depth(QUEUE));
    worker.terminate();
    assert!(worker.exits().await.expect("it ends by itself").success());

    let mut told: BTreeMap<String, usize> = BTreeMap::new();
    for (path, key) in api.calls() {
        let n =
            path.strip_prefix("/v1/reservations/res_").unwrap().strip_suffix("/confirm").unwrap();
        assert_eq!(key, format!("evt_{n}_1"));
        *told.entry(key).or_default() += 1;
    }
    assert_eq!(told.len(), MESSAGES, "none missed");
    assert!(told.values().all(|calls| *calls == 1), "each told once");
    assert!(aws.bodies(DEAD).is_empty());
}
