//! An AWS for tests, in this process: EventBridge and SQS over HTTP/1.1 on a port of loopback, as their
//! SDKs speak to them. It does what no emulator does: it fails as it is told, and it is fast.
//!
//! A target that needs it says `#[path = "support/fake_aws/mod.rs"] mod fake_aws;`; it needs nothing
//! beside this folder. What it must do as AWS does is the list in `tests/aws_conformance.rs`. It knows
//! less than AWS: a request with a field that it does not know is refused, never half understood.
//! Message digests (MD5) are left out: the Rust SDK does not ask for them.

#![allow(dead_code, reason = "each test takes what it needs")]

mod events;
mod faults;
mod pattern;
mod queue;
mod sqs;
mod wire;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use payment_sim::clock::Clock;
use tokio::{
    net::TcpListener,
    sync::{Notify, watch},
    task::JoinSet,
};

pub use self::faults::Fault;
use self::{events::Events, faults::Faults, sqs::Queues};

pub const ACCOUNT: &str = "000000000000";
pub const REGION: &str = "ap-northeast-2";

/// A condition that a test waits for is looked at this often.
const POLL: Duration = Duration::from_millis(2);

/// What of the fake differs from test to test.
pub struct Options {
    /// What visibility, delays and long polls go by.
    pub clock: Arc<dyn Clock>,
    /// Of the entries of one `PutEvents`. AWS takes 1 MiB since January 2026, not yet everywhere.
    pub put_events_max_bytes: usize,
    /// Whether calls are kept to be looked at; a long run under load has no memory for them.
    pub keeps_calls: bool,
    /// Told of each call as it takes effect, in this order, and before its reply goes.
    pub on_call: Option<Box<OnCall>>,
}

pub type OnCall = dyn Fn(&Call) + Send + Sync;

impl Options {
    pub fn new(clock: impl Clock) -> Self {
        Self {
            clock: Arc::new(clock),
            put_events_max_bytes: 256 * 1024,
            keeps_calls: true,
            on_call: None,
        }
    }
}

/// A call as it arrived, and what became of it. Calls are kept in the order in which they took effect.
#[derive(Clone, Debug)]
pub struct Call {
    /// `PutEvents`, `ReceiveMessage` …
    pub operation: String,
    pub body: Bytes,
    /// Of the calls that have entries, in the order of the request.
    pub entries: Vec<Entry>,
    /// What was done to it on order.
    pub fault: Option<Fault>,
}

/// One entry of a batch.
#[derive(Clone, Debug)]
pub struct Entry {
    /// As it stood in the request, byte for byte.
    pub raw: String,
    pub fate: Fate,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// With the id that AWS gives it. The caller need not have learned of it.
    Taken(String),
    /// With its error code.
    Failed(String),
    /// The call failed as a whole.
    Untouched,
}

impl Entry {
    pub const fn is_taken(&self) -> bool {
        matches!(self.fate, Fate::Taken(_))
    }
}

struct State {
    events: Events,
    queues: Queues,
    faults: Faults,
    calls: Vec<Call>,
}

struct Shared {
    state: Mutex<State>,
    options: Options,
    /// A message may have become visible.
    arrived: Notify,
    /// How often held replies were let go, and how many are held now.
    releases: watch::Sender<u64>,
    held: watch::Sender<usize>,
    is_reachable: watch::Sender<bool>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panics while it looks at the calls must not hide its own message behind another.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves as long as it is kept, on the runtime that it was started on.
pub struct FakeAws {
    /// For `AWS_ENDPOINT_URL`.
    pub url: String,
    shared: Arc<Shared>,
    _serving: JoinSet<()>,
}

impl FakeAws {
    pub async fn start(options: Options) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port of loopback");
        let url = format!("http://{}", listener.local_addr().expect("a bound address"));
        let state = State {
            events: Events::new(options.put_events_max_bytes),
            queues: Queues::new(url.clone()),
            faults: Faults::default(),
            calls: Vec::new(),
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            options,
            arrived: Notify::new(),
            releases: watch::Sender::default(),
            held: watch::Sender::default(),
            is_reachable: watch::Sender::new(true),
        });
        let mut serving = JoinSet::new();
        serving.spawn(wire::serve(listener, Arc::clone(&shared)));
        Self { url, shared, _serving: serving }
    }

    // ---- What there is, without a client ----

    /// A bus with a rule, and a queue that it sends to; returns the queue's URL.
    ///
    /// # Panics
    /// On a pattern that is none.
    pub fn route(&self, bus: &str, rule: &str, pattern: &str, queue: &str) -> String {
        let mut state = self.shared.lock();
        let url = state.queues.make(queue, sqs::Attributes::default()).expect("a queue");
        state.events.make_bus(bus);
        state.events.make_rule(bus, rule, pattern, true).expect("a pattern");
        state.events.add_target(bus, rule, "queue", &sqs::arn(queue)).expect("a target");
        url
    }

    pub fn bus(&self, name: &str) {
        self.shared.lock().events.make_bus(name);
    }

    /// A queue with its visibility timeout, and where its messages go after so many receives.
    ///
    /// # Panics
    /// When the dead-letter queue is not there yet.
    pub fn queue(&self, name: &str, visibility_s: u32, redrive: Option<(&str, u32)>) -> String {
        let redrive =
            redrive.map(|(queue, max_receives)| sqs::Redrive::to(&sqs::arn(queue), max_receives));
        let attributes = sqs::Attributes { visibility_s: Some(visibility_s), redrive };
        self.shared.lock().queues.make(name, attributes).expect("a queue")
    }

    /// From now on every `n`th message received from this queue comes once more: the same message,
    /// which its deletion did not reach.
    ///
    /// # Panics
    /// Without such a queue.
    pub fn delivers_twice_one_in(&self, queue: &str, n: u64) {
        self.shared.lock().queues.named(queue).expect("a queue").twice_one_in = Some(n);
    }

    /// How many messages wait in a queue, and how many are out with a receiver.
    ///
    /// # Panics
    /// Without such a queue.
    pub fn depth(&self, queue: &str) -> (usize, usize) {
        let now_ms = self.shared.options.clock.now_ms();
        let depth = self.shared.lock().queues.named(queue).expect("a queue").depth(now_ms);
        (depth.visible, depth.in_flight)
    }

    /// The bodies of all messages in a queue, whoever has them just now; oldest first.
    ///
    /// # Panics
    /// Without such a queue.
    pub fn bodies(&self, queue: &str) -> Vec<String> {
        self.shared.lock().queues.named(queue).expect("a queue").bodies()
    }

    // ---- Faults ----

    /// What becomes of the next calls of this operation, one each.
    pub fn order(&self, operation: &str, faults: impl IntoIterator<Item = Fault>) {
        self.shared.lock().faults.order(operation, faults);
    }

    /// What becomes of each further call of this operation for which nothing is ordered: `decide` gets
    /// its entries as they stand in the request.
    pub fn always(
        &self,
        operation: &str,
        decide: impl FnMut(&[&str]) -> Option<Fault> + Send + 'static,
    ) {
        self.shared.lock().faults.always(operation, Box::new(decide));
    }

    /// No faults any more, neither ordered nor standing.
    pub fn behaves(&self) {
        self.shared.lock().faults = Faults::default();
    }

    /// Whether anyone gets through: while not, connections are cut and new ones too. What is in the
    /// queues stays.
    pub fn set_reachable(&self, reachable: bool) {
        self.shared.is_reachable.send_replace(reachable);
    }

    /// Lets the replies go that [`Fault::Hold`] holds now.
    pub fn release(&self) {
        self.shared.releases.send_modify(|n| *n += 1);
    }

    /// Waits until so many replies are held.
    pub async fn holds(&self, count: usize) {
        // `self` has the sender.
        let _ = self.shared.held.subscribe().wait_for(|held| *held == count).await;
    }

    // ---- What was seen ----

    /// Looks at all calls so far.
    pub fn look<T>(&self, look: impl FnOnce(&[Call]) -> T) -> T {
        look(&self.shared.lock().calls)
    }

    /// The calls of one operation so far.
    pub fn calls(&self, operation: &str) -> Vec<Call> {
        self.look(|calls| calls.iter().filter(|c| c.operation == operation).cloned().collect())
    }

    /// The entries of all calls of one operation so far.
    pub fn entries(&self, operation: &str) -> Vec<Entry> {
        self.calls(operation).into_iter().flat_map(|call| call.entries).collect()
    }

    /// Waits until `look` finds what it looks for among all calls. It has no deadline: its caller does.
    pub async fn sees<T>(&self, mut look: impl FnMut(&[Call]) -> Option<T>) -> T {
        loop {
            if let Some(found) = self.look(&mut look) {
                return found;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Forgets the calls so far.
    pub fn forget(&self) {
        self.shared.lock().calls.clear();
    }
}
