//! Faults on order: five well-known ways to get durability and delivery wrong, for the crash test to catch.
//!
//! Only with the feature `faults`, which no release build has. `PAYMENT_SIM_FAULT` chooses one at run
//! time; without it the build behaves like any other. The store's part is in `store/faults.rs`.

use std::{
    collections::BTreeSet,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio_util::task::TaskTracker;

use crate::{
    courier::{Courier, Parcel},
    domain::{
        delivery::{Attempt, Attempted, Verdict},
        ids::PaymentId,
        payment::{Command, Next, Payment, PaymentState},
        scenario::{FailureReason, Outcome},
        time::Timestamp,
    },
    store::{Change, Commit, Revision, Store, Versioned},
};

/// How long a fault holds its own window open, so that a kill falls into it often enough.
pub const WINDOW: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Callers are answered, then the commit is written.
    AckBeforeCommit,
    /// A payment is saved first, and what it owes to others after.
    OutboxAfterCommit,
    /// Each woken payment is woken once more, from what it was before, and decided anew.
    DoubleTick,
    /// Events count as delivered, then they are sent, once.
    EventDoneBeforeSent,
    /// A webhook that is given up leaves no letter.
    LetterForgotten,
}

/// The fault that this process has.
///
/// # Panics
/// When the name is unknown: a control that runs without its fault proves nothing.
pub fn chosen() -> Option<Fault> {
    static CHOSEN: LazyLock<Option<Fault>> = LazyLock::new(|| {
        let name = name();
        match name.as_deref() {
            None | Some("") => None,
            Some("ack_before_commit") => Some(Fault::AckBeforeCommit),
            Some("outbox_after_commit") => Some(Fault::OutboxAfterCommit),
            Some("double_tick") => Some(Fault::DoubleTick),
            Some("event_done_before_sent") => Some(Fault::EventDoneBeforeSent),
            Some("letter_forgotten") => Some(Fault::LetterForgotten),
            Some(other) => panic!("PAYMENT_SIM_FAULT: there is no fault {other:?}"),
        }
    });
    *CHOSEN
}

#[expect(
    clippy::disallowed_methods,
    reason = "no setting: it exists in no build that an operator has, and must not appear in --help"
)]
fn name() -> Option<String> {
    std::env::var("PAYMENT_SIM_FAULT").ok()
}

/// The payments that are about to be woken, as they were before.
pub fn wakes_again(commits: &[Commit]) -> Vec<Arc<Versioned>> {
    if chosen() != Some(Fault::DoubleTick) {
        return Vec::new();
    }
    let before = commits.iter().filter_map(|commit| match &commit.change {
        Some(Change::Update(update)) => Some(update.before.clone()),
        Some(Change::Create { .. }) | None => None,
    });
    before.collect()
}

/// Wakes them a second time, some time after the first.
pub async fn wake_again(store: &dyn Store, stale: Vec<Arc<Versioned>>) {
    if stale.is_empty() {
        return;
    }
    tokio::time::sleep(WINDOW).await;
    let commits = stale.into_iter().filter_map(|before| {
        let after = decided_anew(&before.payment)?;
        unchecked().insert((after.terms.id, before.revision));
        Some(Commit { change: Some(Change::update(before, after)), reply: None })
    });
    store.commit(commits.collect()).await;
}

/// What a commit's expectation is compared with: for one of the faulty wake, with itself.
pub fn stored_revision(
    id: PaymentId,
    stored: Option<Revision>,
    expected: Revision,
) -> Option<Revision> {
    if chosen() == Some(Fault::DoubleTick) && unchecked().remove(&(id, expected)) {
        return Some(expected);
    }
    stored
}

/// Commits of the faulty wake that are on their way to the writer.
fn unchecked() -> std::sync::MutexGuard<'static, BTreeSet<(PaymentId, Revision)>> {
    static UNCHECKED: LazyLock<Mutex<BTreeSet<(PaymentId, Revision)>>> =
        LazyLock::new(Mutex::default);
    UNCHECKED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A fresh draw: always the outcome that the plan did not have.
fn decided_anew(before: &Payment) -> Option<Payment> {
    let at = before.progress.state.wakes_at()?;
    let outcome = match before.progress.state {
        PaymentState::Pending {
            next: Next::Decide { outcome: Outcome::Failed(_), .. } | Next::Expire { .. },
        } => Outcome::Completed,
        _ => Outcome::Failed(FailureReason::SystemError),
    };
    let mut payment = before.clone();
    payment.progress.state = PaymentState::Pending { next: Next::Decide { at, outcome } };
    payment.transition(Command::Wake, at).changed
}

/// Between the outbox and the sink of events.
pub fn events_courier(courier: Arc<dyn Courier>) -> Arc<dyn Courier> {
    match chosen() {
        Some(Fault::EventDoneBeforeSent) => {
            Arc::new(Hasty { courier, sending: TaskTracker::new() })
        }
        _ => courier,
    }
}

/// Says that it has brought what it is about to bring.
struct Hasty {
    courier: Arc<dyn Courier>,
    sending: TaskTracker,
}

#[async_trait]
impl Courier for Hasty {
    fn batch_max(&self) -> usize {
        self.courier.batch_max()
    }

    fn calls_max(&self) -> usize {
        self.courier.calls_max()
    }

    async fn attempt(&self, batch: &[Parcel], now: Timestamp) -> Vec<Attempted> {
        let (courier, parcels) = (Arc::clone(&self.courier), batch.to_vec());
        self.sending.spawn(async move {
            tokio::time::sleep(WINDOW).await;
            courier.attempt(&parcels, now).await;
        });
        let attempt = Attempt { at: now, http_status: None, latency_ms: 0, error: None };
        vec![Attempted { attempt, verdict: Verdict::Accepted }; batch.len()]
    }
}
