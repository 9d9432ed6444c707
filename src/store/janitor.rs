//! Upkeep, once a second on a thread of its own: free space, the high-water mark, and retention.

use std::{
    ops::{Bound, ControlFlow},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc as sync_mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};

use super::{
    Health, StoreError, Versioned, record,
    shared::Shared,
    tables::{Span, Table},
    writer::{AbortOnPanic, Job},
};
use crate::{
    clock::{Clock, Stopwatch},
    domain::{ids::PaymentId, time::Timestamp},
};

const ROUND_EVERY: Duration = Duration::from_secs(1);
/// Below this no write is accepted: what is being compacted needs room too.
const RESERVE_BYTES: u64 = 256 << 20;
/// Above this writes are accepted again: apart from the reserve, so that it does not flutter.
const RELIEF_BYTES: u64 = 320 << 20;
/// Payments dropped in one commit: a larger one would hold up creates.
const CHUNK: usize = 500;
/// Payments looked at in one go, to bound memory. Their chunks wait for the writer together: under load it
/// takes long to answer each.
const LOOK_AHEAD: usize = 8_000;
/// Of one round; where there is more to drop, the next follows at once.
const DROPPING_MAX: Duration = Duration::from_millis(500);
/// The cap may be passed by this part of it; where dropping falls further behind, creates are refused.
const CAP_SLACK: u64 = 20;

struct Work {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
    clock: Arc<dyn Clock>,
    on_dropped_early: Arc<dyn Fn(u64) + Send + Sync>,
    noted: AtomicU64,
    marked: AtomicU64,
    /// Where the oldest surviving payment may be: below it there is nothing but tombstones.
    oldest: Mutex<Option<PaymentId>>,
    /// Replies that lapsed before this are gone: below it there is nothing but tombstones.
    lapsed_to: Mutex<Timestamp>,
}

pub struct Janitor {
    work: Arc<Work>,
    stop: sync_mpsc::Sender<()>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Janitor {
    pub fn start(
        shared: Arc<Shared>,
        jobs: mpsc::Sender<Job>,
        clock: Arc<dyn Clock>,
        on_dropped_early: Arc<dyn Fn(u64) + Send + Sync>,
    ) -> std::io::Result<Self> {
        let sequence = shared.sequence.load(Ordering::Acquire);
        let work = Arc::new(Work {
            shared,
            jobs,
            clock,
            on_dropped_early,
            noted: AtomicU64::new(sequence),
            marked: AtomicU64::new(sequence),
            oldest: Mutex::new(None),
            lapsed_to: Mutex::default(),
        });
        work.watch_space();
        let (stop, stopped) = sync_mpsc::channel();
        let rounds = Arc::clone(&work);
        let thread =
            std::thread::Builder::new().name("store-janitor".to_owned()).spawn(move || {
                // Without upkeep the disk fills unseen: end at once instead.
                let _abort = AbortOnPanic;
                let mut wait = ROUND_EVERY;
                while stopped.recv_timeout(wait) == Err(sync_mpsc::RecvTimeoutError::Timeout) {
                    let is_done = rounds.round();
                    wait = if is_done { ROUND_EVERY } else { Duration::ZERO };
                }
            })?;
        Ok(Self { work, stop, thread: Mutex::new(Some(thread)) })
    }

    pub fn round(&self) {
        self.work.round();
    }

    pub fn stop(&self) {
        // The thread may have ended already.
        let _ = self.stop.send(());
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
        self.work.note_high_water();
    }
}

impl Work {
    /// False: there is more to drop.
    fn round(&self) -> bool {
        self.watch_space();
        self.note_high_water();
        if self.shared.health() != Health::Good {
            return true;
        }
        let is_done = self.retain().unwrap_or_else(|error| {
            tracing::warn!(%error, "old payments could not be dropped");
            true
        });
        self.keep_marks();
        is_done
    }

    fn watch_space(&self) {
        let Some(free) = self.shared.tables.free_space() else { return };
        let was_full = self.shared.full.load(Ordering::Relaxed);
        let full = free < if was_full { RELIEF_BYTES } else { RESERVE_BYTES };
        if full != was_full {
            tracing::warn!(free_bytes = free, full, "free space on the store's disk");
            self.shared.full.store(full, Ordering::Relaxed);
        }
    }

    /// Names a commit that is on the disk already: never ahead of the store, never in a batch's way.
    fn note_high_water(&self) {
        let sequence = self.shared.sequence.load(Ordering::Acquire);
        if sequence == self.noted.load(Ordering::Relaxed) {
            return;
        }
        match self.shared.tables.note_high_water(sequence) {
            Ok(()) => self.noted.store(sequence, Ordering::Relaxed),
            Err(error) => tracing::warn!(%error, "the high-water mark could not be written"),
        }
    }

    /// After the last commits the marks lag behind; without this a quiet store would start slowly.
    fn keep_marks(&self) {
        let sequence = self.shared.sequence.load(Ordering::Acquire);
        if sequence > self.marked.load(Ordering::Relaxed) && self.jobs.try_send(Job::Marks).is_ok()
        {
            // The marks are a commit of their own.
            self.marked.store(sequence + 1, Ordering::Relaxed);
        }
    }

    /// False: it stopped before its end.
    fn retain(&self) -> Result<bool, StoreError> {
        let now = Timestamp::from_ms(self.clock.now_ms());
        self.lapse(now)?;
        let took = Stopwatch::start();
        let mut at = *self.oldest.lock().unwrap_or_else(PoisonError::into_inner);
        let mut survivor = None;
        let mut is_done = false;
        while !is_done && took.elapsed() < DROPPING_MAX {
            let surplus = self.surplus();
            let look = self.look(at, now, surplus)?;
            let stayed = [self.drop_all(look.old, false)?, self.drop_all(look.surplus, true)?];
            let stayed = stayed.into_iter().flatten().chain(look.survivor).min();
            survivor = survivor.or(stayed);
            at = look.reached;
            is_done = look.ended;
        }
        *self.oldest.lock().unwrap_or_else(PoisonError::into_inner) = survivor.or(at);
        let slack = self.shared.retention.payments_max.unwrap_or(u64::MAX) / CAP_SLACK;
        let is_behind = !is_done && self.surplus() > slack;
        if self.shared.dropping_behind.swap(is_behind, Ordering::Relaxed) != is_behind {
            tracing::warn!(
                is_behind,
                "dropping payments over the cap; creates are refused while behind"
            );
        }
        Ok(is_done)
    }

    /// How many payments there are too many.
    fn surplus(&self) -> u64 {
        let payments = self.shared.payments.load(Ordering::Relaxed);
        self.shared.retention.payments_max.map_or(0, |max| payments.saturating_sub(max))
    }

    /// Looks at the oldest payments from `from` on, until they are too young to go.
    fn look(
        &self,
        from: Option<PaymentId>,
        now: Timestamp,
        mut surplus: u64,
    ) -> Result<Look, StoreError> {
        let keep = self.shared.retention.keep();
        let expired = |at: Timestamp| now.since(at) >= keep;
        let mut ids = Vec::new();
        let start = from.map_or(Bound::Unbounded, |id| Bound::Included(id.bytes().to_vec()));
        let span = Span::forwards(start, Bound::Unbounded);
        let mut look = Look { ended: true, reached: from, ..Look::default() };
        let mut enough = false;
        self.shared.scan(Table::Payment, span, &mut |key, terms| {
            let Ok(id) = record::id(key) else { return ControlFlow::Continue(()) };
            look.reached = Some(id);
            if !expired(id.made_at()) && ids.len() as u64 >= surplus {
                enough = true;
                return ControlFlow::Break(());
            }
            if ids.len() == LOOK_AHEAD {
                look.ended = false;
                return ControlFlow::Break(());
            }
            ids.push((id, terms.to_vec()));
            ControlFlow::Continue(())
        })?;
        for (id, terms) in ids {
            let state = self.shared.read(Table::State, id.bytes())?;
            let stored = match record::payment(&terms, state.as_deref()) {
                Ok(stored) => stored,
                Err(StoreError::Corrupt(why)) => {
                    // It stays, and what is behind it goes all the same.
                    tracing::debug!(payment = id.intent(), why, "a payment cannot be read");
                    look.survivor = look.survivor.or(Some(id));
                    continue;
                }
                Err(error) => return Err(error),
            };
            if stored.payment.is_settled() && expired(stored.payment.progress.updated_at) {
                look.old.push(stored);
                surplus = surplus.saturating_sub(1);
            } else if stored.payment.is_settled() && surplus > 0 {
                look.surplus.push(stored);
                surplus -= 1;
            } else {
                look.survivor = look.survivor.or(Some(id));
            }
        }
        // Some of those that were enough may have to stay: then younger ones go.
        look.ended &= !enough || surplus == 0;
        Ok(look)
    }

    /// Where some had changed since they were looked at, and so stayed, they are looked at again from
    /// the payment that this gives back.
    fn drop_all(
        &self,
        payments: Vec<Versioned>,
        early: bool,
    ) -> Result<Option<PaymentId>, StoreError> {
        let mut stayed = None;
        let mut sent = Vec::new();
        let mut rest = payments.into_iter().peekable();
        while let Some(first) = rest.peek().map(|stored| stored.payment.terms.id) {
            let payments: Vec<_> = rest.by_ref().take(CHUNK).collect();
            let count = payments.len();
            sent.push((first, count, self.send(|answer| Job::Drop { payments, answer })?));
        }
        for (first, sent, dropped) in sent {
            let dropped = dropped.blocking_recv().map_err(|_| StoreError::Unavailable)?;
            if dropped < sent {
                stayed = stayed.or(Some(first));
            }
            if early {
                (self.on_dropped_early)(dropped as u64);
            }
        }
        Ok(stayed)
    }

    fn lapse(&self, now: Timestamp) -> Result<(), StoreError> {
        let key = |at| record::timed_key(at, &[0; 16]);
        let from = *self.lapsed_to.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut keys = Vec::new();
            let span = Span::forwards(Bound::Included(key(from)), Bound::Excluded(key(now)));
            self.shared.scan(Table::Lapse, span, &mut |key, _| {
                keys.push(key.to_vec());
                if keys.len() == CHUNK { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
            if keys.is_empty() {
                break;
            }
            self.run(|answer| Job::Lapse { keys, answer })?;
        }
        *self.lapsed_to.lock().unwrap_or_else(PoisonError::into_inner) = now;
        Ok(())
    }

    fn run(&self, job: impl FnOnce(oneshot::Sender<usize>) -> Job) -> Result<usize, StoreError> {
        // Not a runtime's thread; the janitor may wait.
        self.send(job)?.blocking_recv().map_err(|_| StoreError::Unavailable)
    }

    fn send(
        &self,
        job: impl FnOnce(oneshot::Sender<usize>) -> Job,
    ) -> Result<oneshot::Receiver<usize>, StoreError> {
        let (answer, answered) = oneshot::channel();
        self.jobs.blocking_send(job(answer)).map_err(|_| StoreError::Unavailable)?;
        Ok(answered)
    }
}

#[derive(Default)]
struct Look {
    /// Past their retention.
    old: Vec<Versioned>,
    /// Over the cap.
    surplus: Vec<Versioned>,
    /// The oldest that stays.
    survivor: Option<PaymentId>,
    reached: Option<PaymentId>,
    /// Nothing further on can go.
    ended: bool,
}
