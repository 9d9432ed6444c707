//! What the worker's tests share: a queue in memory that behaves as SQS does, a reservation API that
//! does as it is told, and a worker between the two.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use serde_json::json;
use tokio::{sync::Notify, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    calls::{Order, Reservations, Told},
    decision::Action,
    metrics::{Outcome, WorkerMetrics},
    queue::{BATCH_MAX, Message, Queue, QueueError, Refused},
    state::{Broken, State},
    worker::{Limits, Parts, Worker},
};
use crate::clock::{Clock, Stopwatch};

/// Nothing here waits longer than this for something that must come.
pub const DEADLINE: Duration = Duration::from_secs(120);
pub const VISIBILITY: Duration = Duration::from_secs(30);
/// Receipts of a message before it goes to the dead-letter queue.
const RECEIVES_MAX: usize = 5;

pub fn body(event_id: &str, payment: &str, status: &str, version: u64) -> String {
    let is_refund = status == "REFUND_UPDATED";
    let (topic, event_type) = match is_refund {
        true => ("Payment Refund Updated", "payment.refund_updated"),
        false => ("Payment Status Updated", "payment.status_updated"),
    };
    let status = if is_refund { "COMPLETED" } else { status };
    json!({
        "source": "payment-sim-api", "detail-type": topic,
        "detail": {
            "event_id": event_id, "event_type": event_type, "version": version,
            "payment_id": format!("pay_{payment}"), "reservation_id": format!("res_{payment}"),
            "status": format!("PAYMENT_STATUS_{status}"),
        },
    })
    .to_string()
}

struct Entry {
    body: String,
    receives: usize,
}

#[derive(Default)]
struct Shelves {
    visible: VecDeque<Entry>,
    /// By receipt, with the moment at which it is shown again.
    hidden: BTreeMap<String, (i64, Entry)>,
    by_time: BTreeSet<(i64, String)>,
    dead: Vec<String>,
    received: usize,
    deletes: Vec<usize>,
    hides: Vec<(Vec<String>, Duration)>,
}

impl Shelves {
    fn show_what_is_due(&mut self, now_ms: i64) {
        while let Some((at_ms, receipt)) = self.by_time.first().cloned()
            && at_ms <= now_ms
        {
            self.by_time.pop_first();
            let (_, entry) = self.hidden.remove(&receipt).expect("both know it");
            self.visible.push_back(entry);
        }
    }

    fn take(&mut self) -> Option<Entry> {
        while let Some(mut entry) = self.visible.pop_front() {
            if entry.receives < RECEIVES_MAX {
                entry.receives += 1;
                return Some(entry);
            }
            self.dead.push(entry.body);
        }
        None
    }

    fn put_away(&mut self, receipt: &str) -> Option<Entry> {
        let (at_ms, entry) = self.hidden.remove(receipt)?;
        self.by_time.remove(&(at_ms, receipt.to_owned()));
        Some(entry)
    }
}

pub struct MemoryQueue {
    clock: Arc<dyn Clock>,
    shelves: Mutex<Shelves>,
    came: Notify,
    failing_receives: AtomicUsize,
    failing_deletes: AtomicUsize,
}

impl MemoryQueue {
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self {
            clock,
            shelves: Mutex::default(),
            came: Notify::new(),
            failing_receives: AtomicUsize::new(0),
            failing_deletes: AtomicUsize::new(0),
        })
    }

    pub fn send(&self, bodies: impl IntoIterator<Item = String>) {
        let entries = bodies.into_iter().map(|body| Entry { body, receives: 0 });
        self.shelves.lock().unwrap().visible.extend(entries);
        self.came.notify_waiters();
    }

    pub fn fail_receives(&self, calls: usize) {
        self.failing_receives.store(calls, Ordering::SeqCst);
    }

    pub fn fail_deletes(&self, calls: usize) {
        self.failing_deletes.store(calls, Ordering::SeqCst);
    }

    /// Neither visible nor hidden: deleted, or dead.
    pub fn is_empty(&self) -> bool {
        let shelves = self.shelves.lock().unwrap();
        shelves.visible.is_empty() && shelves.hidden.is_empty()
    }

    pub fn visible(&self) -> usize {
        self.shelves.lock().unwrap().visible.len()
    }

    pub fn dead(&self) -> Vec<String> {
        self.shelves.lock().unwrap().dead.clone()
    }

    pub fn received(&self) -> usize {
        self.shelves.lock().unwrap().received
    }

    /// The size of each delete call.
    pub fn deletes(&self) -> Vec<usize> {
        self.shelves.lock().unwrap().deletes.clone()
    }

    pub fn hides(&self) -> Vec<(Vec<String>, Duration)> {
        self.shelves.lock().unwrap().hides.clone()
    }

    fn try_receive(&self, max: usize, visibility: Duration) -> Vec<Message> {
        let now_ms = self.clock.now_ms();
        let shelves = &mut *self.shelves.lock().unwrap();
        shelves.show_what_is_due(now_ms);
        let mut messages = Vec::new();
        while messages.len() < max.min(BATCH_MAX)
            && let Some(entry) = shelves.take()
        {
            shelves.received += 1;
            let receipt = format!("receipt-{:08}", shelves.received);
            let at_ms = now_ms + visibility.as_millis() as i64;
            let body = entry.body.clone();
            shelves.by_time.insert((at_ms, receipt.clone()));
            shelves.hidden.insert(receipt.clone(), (at_ms, entry));
            messages.push(Message { receipt, body, traceparent: None });
        }
        messages
    }
}

fn as_ordered(failures: &AtomicUsize) -> Result<(), QueueError> {
    let less = |n: usize| n.checked_sub(1);
    match failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less) {
        Ok(_) => Err(QueueError("as ordered".into())),
        Err(_) => Ok(()),
    }
}

#[async_trait]
impl Queue for MemoryQueue {
    async fn receive(&self, max: usize, visibility: Duration) -> Result<Vec<Message>, QueueError> {
        as_ordered(&self.failing_receives)?;
        loop {
            let came = self.came.notified();
            let messages = self.try_receive(max, visibility);
            if !messages.is_empty() {
                return Ok(messages);
            }
            let next = self.shelves.lock().unwrap().by_time.first().map(|(at_ms, _)| *at_ms);
            tokio::select! {
                () = came => {}
                () = self.clock.sleep_until_ms(next.unwrap_or(i64::MAX)) => {}
            }
        }
    }

    async fn delete(&self, receipts: &[String]) -> Result<Vec<Refused>, QueueError> {
        as_ordered(&self.failing_deletes)?;
        assert!((1..=BATCH_MAX).contains(&receipts.len()));
        let shelves = &mut *self.shelves.lock().unwrap();
        shelves.deletes.push(receipts.len());
        // SQS calls it a success, too, when there is nothing left to delete.
        receipts.iter().for_each(|receipt| drop(shelves.put_away(receipt)));
        Ok(Vec::new())
    }

    async fn hide(
        &self,
        receipts: &[String],
        visibility: Duration,
    ) -> Result<Vec<Refused>, QueueError> {
        assert!((1..=BATCH_MAX).contains(&receipts.len()));
        let at_ms = self.clock.now_ms() + visibility.as_millis() as i64;
        let shelves = &mut *self.shelves.lock().unwrap();
        shelves.hides.push((receipts.to_vec(), visibility));
        let mut refused = Vec::new();
        for receipt in receipts {
            match shelves.put_away(receipt) {
                Some(entry) => {
                    shelves.by_time.insert((at_ms, receipt.clone()));
                    shelves.hidden.insert(receipt.clone(), (at_ms, entry));
                }
                None => {
                    let code = "MessageNotInflight".to_owned();
                    refused.push(Refused { receipt: receipt.clone(), code });
                }
            }
        }
        self.came.notify_waiters();
        Ok(refused)
    }
}

/// One call as the API got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub action: Action,
    pub reservation_id: String,
    pub event_id: String,
}

type Script = Box<dyn Fn(&Call, usize) -> Told + Send + Sync>;

/// Answers as its script says, which gets the call and how many there were before.
pub struct Api {
    script: Script,
    calls: Mutex<Vec<Call>>,
    /// What had an effect, in order; a repeated idempotency key has none.
    effects: Mutex<(HashSet<String>, Vec<Call>)>,
    open: tokio::sync::watch::Sender<bool>,
}

impl Api {
    pub fn new(script: impl Fn(&Call, usize) -> Told + Send + Sync + 'static) -> Arc<Self> {
        let (calls, effects) = (Mutex::default(), Mutex::default());
        let open = tokio::sync::watch::Sender::new(true);
        Arc::new(Self { script: Box::new(script), calls, effects, open })
    }

    pub fn obliging() -> Arc<Self> {
        Self::new(|_, _| Told::Done)
    }

    /// Closed, it takes calls and does not answer.
    pub fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }

    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    pub fn effects(&self) -> Vec<Call> {
        self.effects.lock().unwrap().1.clone()
    }
}

#[async_trait]
impl Reservations for Api {
    async fn tell(&self, order: Order<'_>) -> Told {
        let call = Call {
            action: order.action,
            reservation_id: order.reservation_id.to_owned(),
            event_id: order.event_id.to_owned(),
        };
        let before = {
            let mut calls = self.calls.lock().unwrap();
            calls.push(call.clone());
            calls.len() - 1
        };
        let mut open = self.open.subscribe();
        // The sender is `self`.
        drop(open.wait_for(|open| *open).await);
        let told = (self.script)(&call, before);
        // An answer that is lost may come after the effect: whatever is not refused has had it.
        if !matches!(told, Told::Refused(_)) {
            let (keys, effects) = &mut *self.effects.lock().unwrap();
            if keys.insert(call.event_id.clone()) {
                effects.push(call);
            }
        }
        told
    }
}

/// A worker at work.
pub struct Bed {
    pub queue: Arc<MemoryQueue>,
    pub api: Arc<Api>,
    pub metrics: Arc<WorkerMetrics>,
    stop: CancellationToken,
    running: JoinSet<Result<(), Broken>>,
}

impl Bed {
    pub fn start(
        clock: Arc<dyn Clock>,
        queue: Arc<MemoryQueue>,
        api: Arc<Api>,
        state: State,
    ) -> Self {
        let (metrics, stop) = (Arc::new(WorkerMetrics::new()), CancellationToken::new());
        let parts = Parts {
            queue: Arc::clone(&queue) as _,
            reservations: Arc::clone(&api) as _,
            state,
            clock,
            // The longest wait each time.
            chance: Arc::new(|| 1.0),
            metrics: Arc::clone(&metrics),
        };
        let limits =
            Limits { concurrency: 64, visibility: VISIBILITY, retry_for: Duration::from_secs(60) };
        let mut running = JoinSet::new();
        running.spawn(Worker::new(parts, limits, stop.clone()).run());
        Self { queue, api, metrics, stop, running }
    }

    pub fn order_stop(&self) {
        self.stop.cancel();
    }

    pub async fn stop(mut self) -> Result<(), Broken> {
        self.order_stop();
        let ended = tokio::time::timeout(DEADLINE, self.running.join_next()).await;
        ended.expect("the worker drains").expect("it was running").expect("it did not panic")
    }

    pub fn count(&self, outcome: Outcome) -> u64 {
        self.metrics.messages(outcome)
    }
}

/// Asks until it is so.
#[track_caller]
pub fn until(mut is_so: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    let watch = Stopwatch::start();
    async move {
        while !is_so() {
            assert!(watch.elapsed() < DEADLINE, "it never came, {caller}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
