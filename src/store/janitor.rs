//! Upkeep, once a second on a thread of its own: free space, the high-water mark, what is derived, retention, and
//! which keys are known.

use std::{
    ops::{Bound, ControlFlow},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc as sync_mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};

use super::{
    Health, StoreError,
    judge::Judge,
    priority::{Background, step_back},
    record,
    shared::Shared,
    tables::{Span, Table, TablesError},
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
/// The tail is brought into its tables when it has so many payments, or has waited so long: the more at
/// once the cheaper, and the longer the more is derived again after a crash.
const TAIL_LEAVES_AT: usize = 150_000;
const TAIL_LEAVES_AFTER: Duration = Duration::from_secs(5);
/// Keys from before the start that are learned in one go, to bound memory.
const LEARNED_AT_ONCE: usize = 20_000;
/// Replies forgotten in one commit: more would hold up creates.
const CHUNK: usize = 500;
/// Payments kept below the horizon that are looked at again in one go.
const LOOK_AGAIN: usize = 1_000;
/// Space is given back by whole files, which take some time to fill.
const RECLAIM_EVERY: Duration = Duration::from_secs(10);
/// Of one round; where there is more to drop, the next follows at once.
const DROPPING_MAX: Duration = Duration::from_millis(500);
/// Of one round: a twentieth of a core, for a minute where there are 5 M keys.
const LEARNING_MAX: Duration = Duration::from_millis(50);
/// The cap may be passed by this part of it; where dropping falls further behind, creates are refused.
const CAP_SLACK: u64 = 20;

struct Work {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
    clock: Arc<dyn Clock>,
    on_dropped_early: Arc<dyn Fn(u64) + Send + Sync>,
    noted: AtomicU64,
    marked: AtomicU64,
    /// One round at a time, whoever asks for it: two would let the same payments go twice.
    turn: Mutex<()>,
    brought_in: Mutex<Stopwatch>,
    /// Which of the payments that were kept was looked at last: each has its turn.
    looked_again: Mutex<Option<PaymentId>>,
    /// When space was last given back, and what the horizon's mark was.
    reclaimed: Mutex<(Stopwatch, PaymentId)>,
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
            turn: Mutex::default(),
            brought_in: Mutex::new(Stopwatch::start()),
            looked_again: Mutex::default(),
            reclaimed: Mutex::new((Stopwatch::start(), PaymentId::default())),
            lapsed_to: Mutex::default(),
        });
        work.watch_space();
        let (stop, stopped) = sync_mpsc::channel();
        let rounds = Arc::clone(&work);
        let thread =
            std::thread::Builder::new().name("store-janitor".to_owned()).spawn(move || {
                // Without upkeep the disk fills unseen: end at once instead.
                let _abort = AbortOnPanic;
                step_back(Background::Upkeep);
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

    #[cfg(test)]
    pub fn bring_in(&self) {
        let _turn = locked(&self.work.turn);
        self.work.bring_in().expect("tables that take rows");
    }

    pub fn stop(&self) {
        // The thread may have ended already.
        let _ = self.stop.send(());
        let thread = locked(&self.thread).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
        self.work.note_high_water();
    }
}

impl Work {
    /// False: there is more to drop.
    fn round(&self) -> bool {
        let _turn = locked(&self.turn);
        self.watch_space();
        self.note_high_water();
        if self.shared.health() == Health::Failed {
            return true;
        }
        if self.shared.health() == Health::Good
            && self.is_time_to_bring_in()
            && let Err(error) = self.bring_in()
        {
            tracing::warn!(%error, "keys and lists could not be brought into their tables");
        }
        let is_done = self.retain().unwrap_or_else(|error| {
            tracing::warn!(%error, "old payments could not be dropped");
            self.shared.dropping_behind.store(false, Ordering::Relaxed);
            true
        });
        self.learn_keys();
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

    fn is_time_to_bring_in(&self) -> bool {
        let tail = &self.shared.tail;
        let waited = locked(&self.brought_in).elapsed() >= TAIL_LEAVES_AFTER;
        let is_half_way = tail.payments() > tail.waiting();
        is_half_way || tail.waiting() >= TAIL_LEAVES_AT || waited && tail.waiting() > 0
    }

    fn bring_in(&self) -> Result<(), TablesError> {
        let layer = self.shared.tail.leave();
        let keys = layer.key_rows();
        let mut rows = keys.iter().map(|(key, value)| (&key[..], &value[..]));
        self.shared.tables.ingest(Table::Key, &mut rows)?;
        let places = layer.index_rows();
        let mut rows = places.iter().map(|key| (&key[..], &[][..]));
        self.shared.tables.ingest(Table::Index, &mut rows)?;
        self.shared.known.add(layer.keys());
        // All of it is on the disk: only now may the mark move past these payments.
        self.shared.tail.has_left();
        self.marked.store(0, Ordering::Relaxed);
        *locked(&self.brought_in) = Stopwatch::start();
        Ok(())
    }

    /// Learns which keys there are from before the start, some in each round: nobody waits for them.
    fn learn_keys(&self) {
        let Shared { tables, known, horizon, .. } = &*self.shared;
        // In memory a look-up costs no more than to ask first.
        let mut is_done = !tables.are_on_disk();
        let took = Stopwatch::start();
        while !is_done && took.elapsed() < LEARNING_MAX {
            is_done = known.learn(&**tables, horizon, LEARNED_AT_ONCE).unwrap_or_else(|error| {
                tracing::warn!(%error, "keys cannot be read ahead; until the next start they are looked up one by one");
                true
            });
        }
    }

    /// False: it stopped before its end.
    fn retain(&self) -> Result<bool, StoreError> {
        let now = Timestamp::from_ms(self.clock.now_ms());
        self.lapse(now)?;
        let took = Stopwatch::start();
        let mut is_done = false;
        while !is_done && took.elapsed() < DROPPING_MAX {
            is_done = self.pass(now)?;
        }
        let slack = self.shared.retention.payments_max.unwrap_or(u64::MAX) / CAP_SLACK;
        let is_behind = !is_done && self.surplus() > slack;
        if self.shared.dropping_behind.swap(is_behind, Ordering::Relaxed) != is_behind {
            tracing::warn!(
                is_behind,
                "dropping payments over the cap; creates are refused while behind"
            );
        }
        self.reclaim()?;
        Ok(is_done)
    }

    fn reclaim(&self) -> Result<(), StoreError> {
        let mut reclaimed = locked(&self.reclaimed);
        let mark = self.shared.horizon.mark();
        if reclaimed.1 == mark || reclaimed.0.elapsed() < RECLAIM_EVERY {
            return Ok(());
        }
        *reclaimed = (Stopwatch::start(), mark);
        self.shared.known.forget(&self.shared.horizon);
        self.shared.tables.reclaim(&self.shared.horizon).map_err(|error| {
            tracing::warn!(%error, "the space of old payments could not be given back");
            StoreError::Unavailable
        })
    }

    /// How many payments there are too many.
    fn surplus(&self) -> u64 {
        let payments = self.shared.payments.load(Ordering::Relaxed);
        self.shared.retention.payments_max.map_or(0, |max| payments.saturating_sub(max))
    }

    /// Moves the horizon a stretch; true: nothing more can go for now.
    fn pass(&self, now: Timestamp) -> Result<bool, StoreError> {
        let mut judge = Judge::new(&self.shared, now, self.surplus());
        let again = self.kept_in_turn();
        if again.is_empty() && !judge.has_work()? {
            return Ok(true);
        }
        // Whatever changes while it is judged stays.
        self.run(|answer| Job::Watch { answer })?;
        for id in &again {
            judge.look_again(*id)?;
        }
        // As long as many of them go, the next ones have their turn at once.
        let many_went = judge.judged.gone.len() > LOOK_AGAIN / 8;
        judge.look_ahead()?;
        let Judge { judged, early, is_done, .. } = judge;
        let due = u64::try_from(judged.gone.len()).unwrap_or(u64::MAX);
        let went = self.run(|answer| Job::Pass { judged, answer })? as u64;
        if early > 0 {
            (self.on_dropped_early)(early.saturating_sub(due - went));
        }
        Ok(is_done && !many_went)
    }

    /// The next of those that were kept, from the first one again after the last.
    fn kept_in_turn(&self) -> Vec<PaymentId> {
        let mut looked_again = locked(&self.looked_again);
        let kept = |beyond| self.shared.horizon.kept_beyond(beyond, LOOK_AGAIN);
        let mut next = kept(*looked_again);
        if next.is_empty() {
            next = kept(None);
        }
        *looked_again = next.last().copied();
        next
    }

    fn lapse(&self, now: Timestamp) -> Result<(), StoreError> {
        let key = |at| record::timed_key(at, &[0; 16]).to_vec();
        let from = *locked(&self.lapsed_to);
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
        *locked(&self.lapsed_to) = now;
        Ok(())
    }

    fn run(&self, job: impl FnOnce(oneshot::Sender<usize>) -> Job) -> Result<usize, StoreError> {
        let (answer, answered) = oneshot::channel();
        // Not a runtime's thread; the janitor may wait.
        self.jobs.blocking_send(job(answer)).map_err(|_| StoreError::Unavailable)?;
        answered.blocking_recv().map_err(|_| StoreError::Unavailable)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
