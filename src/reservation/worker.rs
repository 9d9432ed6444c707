//! The loop: receive, do, remember, delete. Whatever is not deleted comes back.

use std::{convert::Infallible, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;

use super::{
    calls::{Order, Reservations, Told},
    decision::{Action, Decision, Why, decide},
    envelope::Event,
    in_hand::{Held, InHand},
    lanes::Lanes,
    metrics::{Outcome, QueueCall, WorkerMetrics},
    queue::{BATCH_MAX, Message, Queue, QueueError, Refused},
    state::{Applied, Broken, State, id},
};
use crate::{
    clock::{Clock, Stopwatch},
    domain::{delivery::RetryPolicy, time::Timestamp},
    log_budget::LogBudget,
};

/// Receive calls under way at a time: one alone brings ten messages a round trip.
const POLLS_MAX: usize = 4;
/// Delete calls under way at a time, each for up to ten messages.
const DELETES_MAX: usize = 4;
/// A message in hand gets its time again at each such part of it: one call may fail without loss.
const HEARTBEATS_PER_VISIBILITY: u32 = 3;
/// What is in hand when the worker is stopped may take so long, and then its deletes. Calls have their
/// own bound, and no further one is begun.
const DRAIN_MAX: Duration = Duration::from_secs(20);
const DELETES_DRAIN_MAX: Duration = Duration::from_secs(5);
/// Lines about messages that are left to the queue.
const LINES_PER_SECOND: u32 = 10;

/// A fifth of a second first, never longer than 20 s: an API that is back is soon told.
const CALL_POLICY: RetryPolicy = RetryPolicy {
    max_attempts: None,
    dead_letters: false,
    backoff_base: Duration::from_millis(200),
    backoff_max: Duration::from_secs(20),
};
/// After a receive call that failed.
const POLL_POLICY: RetryPolicy = RetryPolicy {
    max_attempts: None,
    dead_letters: false,
    backoff_base: Duration::from_secs(1),
    backoff_max: Duration::from_secs(30),
};

/// Where in 0 … 1 a wait is drawn.
pub type Jitter = Arc<dyn Fn() -> f64 + Send + Sync>;

/// What a worker works with.
pub struct Parts {
    pub queue: Arc<dyn Queue>,
    pub reservations: Arc<dyn Reservations>,
    pub state: State,
    pub clock: Arc<dyn Clock>,
    pub chance: Jitter,
    pub metrics: Arc<WorkerMetrics>,
}

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Messages in hand at a time.
    pub concurrency: usize,
    /// How long a message is hidden from others at a time.
    pub visibility: Duration,
    /// How long a call that fails is made again.
    pub retry_for: Duration,
}

pub struct Worker {
    parts: Parts,
    limits: Limits,
    in_hand: Arc<InHand>,
    lanes: Lanes,
    lines: LogBudget,
    stop: CancellationToken,
}

impl Worker {
    pub fn new(parts: Parts, limits: Limits, stop: CancellationToken) -> Arc<Self> {
        let in_hand = InHand::new(Arc::clone(&parts.metrics));
        let lanes = Lanes::default();
        let lines = LogBudget::new(LINES_PER_SECOND);
        Arc::new(Self { parts, limits, in_hand, lanes, lines, stop })
    }

    /// Works until it is stopped, and then ends what is in hand.
    ///
    /// # Errors
    /// When the state cannot be read or written any more: nothing further may be done then.
    pub async fn run(self: Arc<Self>) -> Result<(), Broken> {
        let (deletes, to_delete) = mpsc::channel(self.limits.concurrency);
        let mut deleter = JoinSet::new();
        deleter.spawn(Arc::clone(&self).delete_all(to_delete));
        let result = tokio::select! {
            // First, because with its end the deleter's comes too.
            biased;
            result = self.receive_and_do(deletes) => result,
            never = self.keep_hidden() => match never {},
            ended = deleter.join_next() => panic!("the deleter ended by itself: {ended:?}"),
        };
        // The last sender of deletes is gone, so the deleter ends with what it has.
        let ending = async { while deleter.join_next().await.is_some() {} };
        if tokio::time::timeout(DELETES_DRAIN_MAX, ending).await.is_err() {
            tracing::warn!("deletes under way were abandoned; those messages come again");
        }
        result
    }

    async fn receive_and_do(self: &Arc<Self>, deletes: mpsc::Sender<Held>) -> Result<(), Broken> {
        let (mut polls, mut working) = (JoinSet::new(), JoinSet::new());
        let (mut asked, mut failures) = (0, 0);
        while !self.stop.is_cancelled() {
            let free = self.limits.concurrency.saturating_sub(working.len() + asked);
            if polls.len() < POLLS_MAX && free > 0 {
                let max = free.min(BATCH_MAX);
                asked += max;
                polls.spawn(Arc::clone(self).poll(max, failures));
                continue;
            }
            tokio::select! {
                () = self.stop.cancelled() => {}
                Some(polled) = polls.join_next() => {
                    let (max, received) = polled.expect("a poll neither panics nor is aborted");
                    asked -= max;
                    failures = if received.is_err() { failures + 1 } else { 0 };
                    for message in self.received(received) {
                        let held = self.in_hand.hold(message.receipt.clone());
                        let handling = Arc::clone(self).handle(message, held, deletes.clone());
                        working.spawn(handling);
                    }
                }
                Some(done) = working.join_next() => ended(done)?,
            }
        }
        // What a poll has received and not yet brought here comes back by itself.
        drop((polls, deletes));
        drain(working).await
    }

    /// After failures with a pause in front, during which the worker may be stopped.
    async fn poll(
        self: Arc<Self>,
        max: usize,
        failures: u32,
    ) -> (usize, Result<Vec<Message>, QueueError>) {
        if failures > 0 {
            let wait = POLL_POLICY.wait(failures, (self.parts.chance)());
            self.parts.clock.sleep_until_ms(self.now().plus(wait).ms()).await;
        }
        (max, self.parts.queue.receive(max, self.limits.visibility).await)
    }

    fn received(&self, received: Result<Vec<Message>, QueueError>) -> Vec<Message> {
        received.unwrap_or_else(|error| {
            self.parts.metrics.queue_failed(QueueCall::Receive, 1);
            tracing::warn!(%error, "the queue cannot be read");
            Vec::new()
        })
    }

    async fn handle(
        self: Arc<Self>,
        message: Message,
        held: Held,
        deletes: mpsc::Sender<Held>,
    ) -> Result<(), Broken> {
        let outcome = match Event::parse(&message.body) {
            Ok(event) => {
                let traceparent = event.traceparent.clone().or(message.traceparent);
                self.apply(&Event { traceparent, ..event }).await?
            }
            Err(why) => {
                self.tell_of(|| tracing::warn!(%why, "a message that is no event of ours"));
                Outcome::Malformed
            }
        };
        self.parts.metrics.message(outcome);
        match outcome {
            Outcome::Confirmed
            | Outcome::Cancelled
            | Outcome::Duplicate
            | Outcome::Stale
            | Outcome::NoEffect => {
                // The deleter ends only when all senders are gone.
                let _ = deletes.send(held).await;
            }
            // The queue shows it again when its time is over, and counts.
            Outcome::Malformed | Outcome::Refused | Outcome::GaveUp => {}
            Outcome::Interrupted => {
                self.hide(&[held.receipt().to_owned()], Duration::ZERO).await;
            }
        }
        Ok(())
    }

    async fn apply(&self, event: &Event) -> Result<Outcome, Broken> {
        let (payment, this) = (id(&event.payment_id), id(&event.id));
        let _lane = self.lanes.enter(payment).await;
        match decide(event, self.parts.state.look_up(&this, &payment)?) {
            Decision::Drop(Why::Duplicate) => Ok(Outcome::Duplicate),
            Decision::Drop(Why::Stale) => Ok(Outcome::Stale),
            Decision::Drop(Why::NoEffect) => Ok(Outcome::NoEffect),
            Decision::Leave => {
                let (status, event_id) = (event.status.as_str(), &event.id);
                self.tell_of(|| tracing::warn!(event_id, status, "no event tells of this status"));
                Ok(Outcome::Malformed)
            }
            Decision::Apply(action) => {
                let (outcome, is_open) = self.tell(event, action).await;
                let applied = Applied { payment, version: event.version, event: Some(this) };
                match outcome {
                    Outcome::Confirmed | Outcome::Cancelled => self.remember(applied).await?,
                    // A call may have been heard: nothing older may come after it.
                    Outcome::Refused | Outcome::GaveUp | Outcome::Interrupted if is_open => {
                        self.remember(Applied { event: None, ..applied }).await?;
                    }
                    // Refused at once: nothing has happened.
                    Outcome::Refused
                    | Outcome::GaveUp
                    | Outcome::Interrupted
                    | Outcome::Duplicate
                    | Outcome::Stale
                    | Outcome::NoEffect
                    | Outcome::Malformed => {}
                }
                Ok(outcome)
            }
        }
    }

    async fn remember(&self, applied: Applied) -> Result<(), Broken> {
        self.parts.state.remember(applied).await?;
        self.parts.metrics.remembered(self.parts.state.remembered());
        Ok(())
    }

    /// Calls until it is done, refused for good, or enough; and whether what came of one of the calls
    /// is not known.
    async fn tell(&self, event: &Event, action: Action) -> (Outcome, bool) {
        let event_id = event.id.as_str();
        let order = Order {
            action,
            event_id,
            reservation_id: &event.reservation_id,
            payment_id: &event.payment_id,
            traceparent: event.traceparent.as_deref(),
        };
        let (began, mut attempt) = (self.now(), 0);
        loop {
            attempt += 1;
            let why = match self.call(order).await {
                Told::Done => return (done(action), false),
                Told::Refused(why) => {
                    self.tell_of(|| tracing::warn!(event_id, why, "a reservation was refused"));
                    return (Outcome::Refused, attempt > 1);
                }
                Told::Retry(why) => why,
            };
            let (now, wait) = (self.now(), CALL_POLICY.wait(attempt, (self.parts.chance)()));
            if now.plus(wait).since(began) > self.limits.retry_for {
                self.tell_of(|| {
                    tracing::warn!(event_id, why, attempt, "a reservation was given up")
                });
                return (Outcome::GaveUp, true);
            }
            tracing::debug!(event_id, why, attempt, "a reservation is told again");
            tokio::select! {
                () = self.stop.cancelled() => return (Outcome::Interrupted, true),
                () = self.parts.clock.sleep_until_ms(now.plus(wait).ms()) => {}
            }
        }
    }

    async fn call(&self, order: Order<'_>) -> Told {
        let watch = Stopwatch::start();
        let told = self.parts.reservations.tell(order).await;
        let result = match told {
            Told::Done => "done",
            Told::Retry(_) => "retry",
            Told::Refused(_) => "refused",
        };
        self.parts.metrics.called(result, watch.elapsed());
        told
    }

    /// The heartbeat: what is in hand stays hidden, however long it takes.
    async fn keep_hidden(&self) -> Infallible {
        let every = self.limits.visibility / HEARTBEATS_PER_VISIBILITY;
        loop {
            self.parts.clock.sleep_until_ms(self.now().plus(every).ms()).await;
            for batch in self.in_hand.receipts().chunks(BATCH_MAX) {
                self.hide(batch, self.limits.visibility).await;
            }
        }
    }

    async fn hide(&self, receipts: &[String], visibility: Duration) {
        let hidden = self.parts.queue.hide(receipts, visibility).await;
        self.note_failures(QueueCall::Hide, receipts.len(), hidden);
    }

    /// Batches fill by themselves while calls are under way.
    async fn delete_all(self: Arc<Self>, mut queue: mpsc::Receiver<Held>) {
        let (mut batch, mut calls) = (Vec::new(), JoinSet::new());
        while queue.recv_many(&mut batch, BATCH_MAX).await > 0 {
            if calls.len() == DELETES_MAX {
                calls.join_next().await;
            }
            calls.spawn(Arc::clone(&self).delete(std::mem::take(&mut batch)));
        }
        calls.join_all().await;
    }

    /// A message that could not be deleted comes again, is found to be applied, and is deleted then.
    async fn delete(self: Arc<Self>, batch: Vec<Held>) {
        let receipts: Vec<String> = batch.iter().map(|held| held.receipt().to_owned()).collect();
        let deleted = self.parts.queue.delete(&receipts).await;
        self.note_failures(QueueCall::Delete, receipts.len(), deleted);
    }

    fn note_failures(
        &self,
        call: QueueCall,
        entries: usize,
        done: Result<Vec<Refused>, QueueError>,
    ) {
        match done {
            Ok(refused) => {
                self.parts.metrics.queue_failed(call, refused.len());
                for Refused { code, .. } in refused {
                    self.tell_of(|| tracing::warn!(?call, code, "the queue refused an entry"));
                }
            }
            Err(error) => {
                self.parts.metrics.queue_failed(call, entries);
                self.tell_of(|| tracing::warn!(?call, %error, "a call of the queue failed"));
            }
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_ms(self.parts.clock.now_ms())
    }

    /// Writes a line while there is room for it: one bad deployment beside us fails every message.
    fn tell_of(&self, line: impl FnOnce()) {
        if let Some(withheld) = self.lines.spend() {
            if withheld > 0 {
                tracing::warn!(withheld, "lines about messages were not written");
            }
            line();
        }
    }
}

const fn done(action: Action) -> Outcome {
    match action {
        Action::Confirm => Outcome::Confirmed,
        Action::Cancel => Outcome::Cancelled,
    }
}

type Done = Result<Result<(), Broken>, JoinError>;

/// A message whose handling panicked is left to the queue.
fn ended(done: Done) -> Result<(), Broken> {
    done.unwrap_or_else(|error| {
        tracing::error!(%error, "the handling of a message panicked");
        Ok(())
    })
}

async fn drain(mut working: JoinSet<Result<(), Broken>>) -> Result<(), Broken> {
    let all = async {
        while let Some(done) = working.join_next().await {
            ended(done)?;
        }
        Ok(())
    };
    match tokio::time::timeout(DRAIN_MAX, all).await {
        Ok(result) => result,
        Err(_elapsed) => {
            tracing::warn!(messages = working.len(), "calls under way were abandoned");
            working.shutdown().await;
            Ok(())
        }
    }
}
