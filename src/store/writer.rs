//! The one thread that writes: it takes all commits that arrived meanwhile, checks each against what
//! is stored and staged, makes them durable with one sync, and answers.

use std::{
    collections::BTreeSet,
    ops::ControlFlow,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustc_hash::{FxHashMap, FxHashSet};
use tokio::sync::{mpsc, oneshot};

use super::{
    Change, Commit, Committed, Health, Remembered, Reply, Revision, StoreError,
    book::{Dues, Floors},
    record,
    shared::Shared,
    tables::{Batch, Table},
    tail::Derived,
};
use crate::{
    clock::Stopwatch,
    domain::{
        ids::{Idempotency, KeyHash, PaymentId},
        payment::Payment,
        time::Timestamp,
    },
};

/// The most jobs taken in one go: batches size themselves, this only bounds their memory.
const JOBS_MAX: usize = 1_024;
/// Commits that one sync makes durable: enough that its cost is nothing to each, and little enough that
/// none waits long for the others. A batch without bounds takes seconds once the writer has fallen
/// behind, and all who arrive meanwhile make the next one larger.
const COMMITS_MAX: usize = 2_000;
/// Entries of `Meta` in a batch at most.
const MARKS: usize = 6;
/// Of nearly every entry, key and value.
const ENTRY_BYTES: usize = 512;
/// Payments whose keys and lists are in memory alone, at some 250 bytes each: half a minute's at full speed.
/// Where bringing them into their tables falls so far behind, creates are refused.
const TAIL_MAX: usize = 1_000_000;
/// Marks are written along with a batch, at most this often.
const MARKS_EVERY: Duration = Duration::from_secs(1);

pub type Answers = Vec<Result<Committed, StoreError>>;

pub enum Job {
    Commit {
        commits: Vec<Commit>,
        answer: oneshot::Sender<Answers>,
    },
    /// Retention is about to look at payments: from here on it is noted which ones change.
    Watch {
        answer: oneshot::Sender<usize>,
    },
    /// What retention has found; answered with how many payments went.
    Pass {
        passed: Passed,
        answer: oneshot::Sender<usize>,
    },
    /// Replies that lapsed by `at`, and what the `Lapse` table calls them.
    Lapse {
        keys: Vec<Vec<u8>>,
        answer: oneshot::Sender<usize>,
    },
    /// Brings payments whose entry in `Due` lies in the range into the book. Done here, between two
    /// commits, so that nothing older overwrites what a commit has noted.
    Load {
        from: Timestamp,
        to: Timestamp,
        answer: oneshot::Sender<Result<(), StoreError>>,
    },
    /// Writes the marks though nothing else is to be written.
    Marks,
    /// Answered when all before it is durable; the thread then ends.
    Close {
        answer: oneshot::Sender<()>,
    },
}

impl Job {
    fn commits(&self) -> usize {
        match self {
            Self::Commit { commits, .. } => commits.len(),
            Self::Pass { passed, .. } => passed.kept.len(),
            Self::Lapse { keys, .. } => keys.len(),
            Self::Watch { .. } | Self::Load { .. } | Self::Marks | Self::Close { .. } => 0,
        }
    }
}

/// Payments that retention has judged: all from the horizon's mark up to `to`, and some that it kept
/// before. What has changed since the watch began stays all the same.
pub struct Passed {
    pub to: PaymentId,
    pub gone: Vec<PaymentId>,
    /// Those below `to` that stay.
    pub kept: Vec<PaymentId>,
    /// Of those that go, the ones with a dead delivery.
    pub dead: Vec<PaymentId>,
    /// Reservations of those that go, where their draws were counted.
    pub drew: BTreeSet<String>,
}

/// How many of the jobs go into the next sync: one at least.
fn fitting(jobs: &[Job]) -> usize {
    let mut commits = 0;
    let fits = |job: &&Job| {
        commits += job.commits();
        commits <= COMMITS_MAX
    };
    jobs.iter().take_while(fits).count().max(1)
}

/// What one sync is about to make true. Its maps are keyed by what is made here or hashed with our
/// secret: nobody outside can choose entries that collide.
#[derive(Default)]
struct Stage {
    batch: Batch,
    revisions: FxHashMap<PaymentId, Revision>,
    keys: FxHashMap<KeyHash, Remembered>,
    dues: Vec<(PaymentId, Timestamp, Dues)>,
    oldest: Option<PaymentId>,
    nearest_entry: Option<Timestamp>,
    newest: Option<PaymentId>,
    payments: i64,
    /// Creates that there is still room for.
    room: usize,
    commits: usize,
    /// The marks are written along.
    marks: bool,
    derived: Vec<Derived>,
    /// Where the horizon moves to, who stays below it, and who goes.
    horizon: Option<PaymentId>,
    kept: FxHashSet<PaymentId>,
    gone: FxHashSet<PaymentId>,
    /// Held until their counters are on the disk: a counter must not be forgotten before.
    draws: Vec<super::Draw>,
}

pub struct Writer {
    shared: Arc<Shared>,
    jobs: mpsc::Receiver<Job>,
    marks: Marks,
    marked: Stopwatch,
    /// As last written, of payments whose due time is in memory and nowhere else: nearly every
    /// update is of one of them, and need not read the record only to compare a number. Whoever is
    /// missing here is read.
    revisions: FxHashMap<PaymentId, Revision>,
    /// Payments written since retention began to look, while it does.
    watched: Option<FxHashSet<PaymentId>>,
}

type Waiting = Vec<(oneshot::Sender<Answers>, Answers)>;

impl Writer {
    pub fn new(shared: Arc<Shared>, jobs: mpsc::Receiver<Job>, marks: Marks) -> Self {
        let revisions = FxHashMap::default();
        Self { shared, jobs, marks, marked: Stopwatch::start(), revisions, watched: None }
    }

    /// Runs until closed, until every handle to the store is gone, or until a commit fails.
    pub fn run(mut self) {
        // A panic here would leave callers without an answer and the store half known: end at once.
        let _abort = AbortOnPanic;
        let mut jobs = Vec::with_capacity(JOBS_MAX);
        while self.jobs.blocking_recv_many(&mut jobs, JOBS_MAX) > 0 {
            while !jobs.is_empty() {
                let now = fitting(&jobs);
                if !self.batch(jobs.drain(..now).collect()) {
                    // What came after is answered by being dropped: nothing more is taken.
                    return;
                }
            }
        }
    }

    /// False: no more batches.
    fn batch(&mut self, jobs: Vec<Job>) -> bool {
        let mut stage = Stage::of_size(jobs.iter().map(Job::commits).sum());
        stage.room = self.room();
        let mut waiting: Waiting = Vec::new();
        let mut counts = Vec::new();
        let mut passes = Vec::new();
        let mut close = None;
        for job in jobs {
            match job {
                Job::Commit { commits, answer } => {
                    let answers = commits.into_iter().map(|c| self.stage(&mut stage, c)).collect();
                    waiting.push((answer, answers));
                }
                Job::Watch { answer } => {
                    self.watched = Some(FxHashSet::default());
                    // Answered when what came before it can be read.
                    counts.push((answer, 0));
                }
                Job::Pass { passed, answer } => passes.push((answer, passed)),
                Job::Lapse { keys, answer } => {
                    counts.push((answer, self.stage_lapses(&mut stage, keys)));
                }
                Job::Load { from, to, answer } => {
                    let _ = answer.send(self.shared.load(from, to));
                }
                Job::Marks => stage.marks = true,
                Job::Close { answer } => close = Some(answer),
            }
        }
        // Last: what else is in this batch counts as a change since the watch began.
        for (answer, passed) in passes {
            counts.push((answer, self.stage_pass(&mut stage, passed)));
        }
        #[cfg(feature = "faults")]
        super::faults::before_commit(&*self.shared.tables, &mut stage.batch, || {
            answer(std::mem::take(&mut waiting));
        });
        if (stage.marks || !stage.batch.is_empty() || close.is_some()) && !self.write(stage) {
            return false;
        }
        answer(waiting);
        for (answer, count) in counts {
            let _ = answer.send(count);
        }
        let Some(closed) = close else { return true };
        let _ = closed.send(());
        false
    }

    /// How many payments more may be in memory.
    fn room(&self) -> usize {
        let open = self.shared.open_max.saturating_sub(self.shared.book.open());
        open.min(TAIL_MAX.saturating_sub(self.shared.tail.payments()))
    }

    /// Makes the stage durable, then visible to the drivers. False: it failed, and nobody is answered.
    fn write(&mut self, mut stage: Stage) -> bool {
        let shared = Arc::clone(&self.shared);
        let sequence = shared.sequence.load(Ordering::Relaxed) + 1;
        stage.batch.put(Table::Meta, meta::SEQUENCE, sequence.to_be_bytes());
        let payments =
            shared.payments.load(Ordering::Relaxed).saturating_add_signed(stage.payments);
        let due_now = stage.marks || self.marked.elapsed() >= MARKS_EVERY;
        if self.marks.note(&stage) || due_now {
            self.marked = Stopwatch::start();
            self.marks.stage(&mut stage, shared.book.floors(), shared.tail.oldest(), payments);
        }
        let took = Stopwatch::start();
        if let Err(error) = shared.tables.write(std::mem::take(&mut stage.batch)) {
            shared.fail(&error);
            return false;
        }
        shared.sequence.store(sequence, Ordering::Release);
        shared.payments.store(payments, Ordering::Relaxed);
        self.note_revisions(&stage);
        shared.tail.add(stage.derived);
        if stage.horizon.is_some() || !stage.kept.is_empty() {
            shared.horizon.moved(stage.horizon, &stage.kept, &stage.gone);
        }
        shared.book.note(stage.dues);
        if stage.commits > 0 {
            (shared.on_commit)(stage.commits, took.elapsed());
        }
        true
    }

    fn note_revisions(&mut self, stage: &Stage) {
        for (id, created_at, dues) in &stage.dues {
            let waits = dues.earliest().is_some() && dues.entry(*created_at).is_none();
            match stage.revisions.get(id) {
                Some(revision) if waits => self.revisions.insert(*id, *revision),
                Some(_) | None => self.revisions.remove(id),
            };
        }
    }

    fn stage(&mut self, stage: &mut Stage, commit: Commit) -> Result<Committed, StoreError> {
        let Commit { change, reply } = commit;
        // A known key is answered before anything else is looked at.
        if let Some((key, at)) = key_of(change.as_ref(), reply.as_ref())
            && let Some(known) = self.known(stage, key.key, reply.is_some(), at)?
        {
            return if known.request() == key.request {
                Ok(Committed::Replayed(known))
            } else {
                Err(StoreError::KeyConflict)
            };
        }
        if self.shared.health() != Health::Good {
            return Err(StoreError::Full);
        }
        let revision = match change {
            None => Revision(0),
            Some(Change::Create { payment, draw }) => {
                self.stage_create(stage, &payment)?;
                if let Some(draw) = draw {
                    stage.batch.put(Table::Counter, draw.reservation, draw.next().to_be_bytes());
                    stage.draws.push(draw);
                }
                Revision(0)
            }
            Some(Change::Update { before, after }) => self.stage_update(stage, &before, &after)?,
        };
        if let Some(reply) = reply {
            self.stage_reply(stage, reply);
        }
        stage.commits += 1;
        Ok(Committed::Done(revision))
    }

    fn stage_create(&mut self, stage: &mut Stage, payment: &Payment) -> Result<(), StoreError> {
        let terms = &payment.terms;
        let shared = &self.shared;
        if stage.room == 0 || shared.dropping_behind.load(Ordering::Relaxed) {
            return Err(StoreError::Overloaded);
        }
        stage.room -= 1;
        stage.batch.put_with(Table::Payment, terms.id.bytes(), |b| record::terms(terms, b));
        stage.derived.push(shared.derived(terms));
        if let Some(Idempotency { key, request }) = terms.idempotency {
            stage.keys.insert(key, Remembered::Created { request, id: terms.id });
        }
        if terms.id < shared.horizon.mark() {
            // An id may be older than its commit, and the horizon have passed it since.
            stage.keep(terms.id);
        }
        if let Some(watched) = &mut self.watched {
            watched.insert(terms.id);
        }
        stage.payments += 1;
        stage.newest = stage.newest.max(Some(terms.id));
        stage.revisions.insert(terms.id, Revision(0));
        stage.note(payment, None);
        Ok(())
    }

    fn stage_update(
        &mut self,
        stage: &mut Stage,
        before: &super::Versioned,
        after: &Payment,
    ) -> Result<Revision, StoreError> {
        let id = after.terms.id;
        let stored = match (stage.revisions.get(&id), self.revisions.get(&id)) {
            (Some(staged), _) => Some(*staged),
            (None, Some(written)) => Some(*written),
            (None, None) => self.stored_revision(id)?,
        };
        #[cfg(feature = "faults")]
        let stored = crate::faults::stored_revision(id, stored, before.revision);
        if stored != Some(before.revision) {
            return Err(StoreError::Conflict);
        }
        let revision = Revision(before.revision.0 + 1);
        let progress = |b: &mut Vec<u8>| record::progress(revision, &after.progress, b);
        stage.batch.put_with(Table::State, id.bytes(), progress);
        stage.revisions.insert(id, revision);
        if let Some(watched) = &mut self.watched {
            watched.insert(id);
        }
        stage.note(after, Dues::of(&before.payment).entry(after.terms.created_at));
        stage.note_dead(&before.payment, after);
        Ok(revision)
    }

    fn stage_reply(&self, stage: &mut Stage, reply: Reply) {
        let Reply { idempotency: Idempotency { key, request }, bytes, at } = reply;
        stage.batch.put_with(Table::Reply, key.0, |b| record::reply(request, at, &bytes, b));
        let lapses = at.plus(self.shared.retention.idempotency);
        stage.batch.put(Table::Lapse, record::timed_key(lapses, &key.0), []);
        stage.keys.insert(key, Remembered::Replied { request, bytes });
    }

    /// A key's hash covers the call that it came with, so that a create's stands in one table only, and
    /// any other call's in the other.
    fn known(
        &self,
        stage: &Stage,
        key: KeyHash,
        with_reply: bool,
        now: Timestamp,
    ) -> Result<Option<Remembered>, StoreError> {
        match stage.keys.get(&key) {
            Some(known) => Ok(Some(known.clone())),
            None if with_reply => self.shared.replied(key, now),
            None => self.shared.created(key, now),
        }
    }

    /// `None`: there is no such payment.
    fn stored_revision(&self, id: PaymentId) -> Result<Option<Revision>, StoreError> {
        if !self.shared.horizon.has(id) {
            return Ok(None);
        }
        if let Some(state) = self.shared.read(Table::State, id.bytes())? {
            return record::revision(Some(&state)).map(Some);
        }
        Ok(self.shared.read(Table::Payment, id.bytes())?.map(|_| Revision(0)))
    }

    fn stage_lapses(&self, stage: &mut Stage, keys: Vec<Vec<u8>>) -> usize {
        let count = keys.len();
        for lapse in keys {
            // A key that has lapsed may have been used again before its old reply was swept away.
            if let Ok((at, key)) = record::read_timed_key(&lapse)
                && !stage.keys.contains_key(&KeyHash(key))
                && self.shared.replied_at(KeyHash(key)).is_some_and(|replied| replied < at)
            {
                stage.batch.delete(Table::Reply, key);
            }
            stage.batch.delete(Table::Lapse, lapse);
        }
        count
    }

    /// Moves the horizon. What goes takes nothing with it but its row in `Dead`, and with a reservation's
    /// last payment its counter.
    fn stage_pass(&mut self, stage: &mut Stage, passed: Passed) -> usize {
        let Passed { to, gone, kept, dead, drew } = passed;
        let watched = self.watched.take().unwrap_or_default();
        if gone.is_empty() && kept.is_empty() {
            return 0;
        }
        let from = self.shared.horizon.mark();
        let changed = watched.iter().filter(|id| (from..to).contains(*id));
        for id in kept.iter().chain(changed) {
            stage.keep(*id);
        }
        for id in dead.iter().filter(|id| !watched.contains(id)) {
            stage.batch.delete(Table::Dead, id.bytes());
        }
        stage.gone = gone.into_iter().filter(|id| !watched.contains(id)).collect();
        for id in stage.gone.iter().filter(|id| **id < from) {
            stage.batch.delete(Table::Kept, id.bytes());
        }
        stage.batch.put(Table::Meta, meta::HORIZON, to.bytes());
        stage.horizon = Some(to);
        // The count of payments is one of them.
        stage.marks = true;
        stage.payments -= i64::try_from(stage.gone.len()).expect("a chunk of payments");
        for reservation in drew {
            self.stage_counter_drop(stage, &reservation, to);
        }
        stage.gone.len()
    }

    /// Forgets how often a reservation drew when none of its payments is left.
    fn stage_counter_drop(&self, stage: &mut Stage, reservation: &str, horizon: PaymentId) {
        let shared = &self.shared;
        let counter = shared.draws_name(reservation);
        if stage.draws.iter().any(|draw| draw.reservation == counter) {
            return;
        }
        let stays = |id: PaymentId| {
            let was_kept = shared.horizon.is_kept(id) && !stage.gone.contains(&id);
            id >= horizon || stage.kept.contains(&id) || was_kept
        };
        let name = shared.reservation_name(reservation);
        let mut left = shared.tail.ids(name).into_iter().any(stays);
        let read = shared.scan(Table::Index, record::index_span(name), &mut |key, _| {
            left |= record::read_index_id(key).map_or(true, stays);
            if left { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        if read.is_ok() && !left {
            stage.batch.delete(Table::Counter, counter);
        }
    }
}

impl Stage {
    /// Thousands of entries a batch: grown step by step they would be moved as often.
    fn of_size(commits: usize) -> Self {
        let batch = Batch::with_capacity(commits + MARKS, commits * ENTRY_BYTES);
        let mut stage = Self { batch, ..Self::default() };
        stage.revisions.reserve(commits);
        stage.keys.reserve(commits);
        stage.dues.reserve(commits);
        stage.derived.reserve(commits);
        stage
    }

    /// Below the horizon, and there all the same.
    fn keep(&mut self, id: PaymentId) {
        if self.kept.insert(id) {
            self.batch.put(Table::Kept, id.bytes(), []);
        }
    }

    /// Keeps the `Due` table in step with a record, and remembers what the drivers must know after.
    fn note(&mut self, payment: &Payment, entry_before: Option<Timestamp>) {
        let terms = &payment.terms;
        let dues = Dues::of(payment);
        let entry = dues.entry(terms.created_at);
        if entry != entry_before {
            if let Some(at) = entry_before {
                self.batch.delete(Table::Due, record::timed_key(at, terms.id.bytes()));
            }
            if let Some(at) = entry {
                self.batch.put(Table::Due, record::timed_key(at, terms.id.bytes()), []);
            }
        }
        match entry {
            Some(at) => self.nearest_entry = Some(self.nearest_entry.map_or(at, |n| n.min(at))),
            None if dues.earliest().is_some() => {
                self.oldest = Some(self.oldest.map_or(terms.id, |o| o.min(terms.id)));
            }
            None => {}
        }
        self.dues.push((terms.id, terms.created_at, dues));
    }

    /// Keeps the `Dead` table in step with a record: a pure function of what it was and what it becomes.
    fn note_dead(&mut self, before: &Payment, after: &Payment) {
        let key = *after.terms.id.bytes();
        match (before.has_dead(), after.has_dead()) {
            (false, true) => self.batch.put(Table::Dead, key, []),
            (true, false) => self.batch.delete(Table::Dead, key),
            (false, false) | (true, true) => {}
        }
    }
}

fn key_of(change: Option<&Change>, reply: Option<&Reply>) -> Option<(Idempotency, Timestamp)> {
    match (change, reply) {
        (_, Some(reply)) => Some((reply.idempotency, reply.at)),
        (Some(Change::Create { payment, .. }), None) => {
            payment.terms.idempotency.map(|key| (key, payment.terms.created_at))
        }
        (Some(Change::Update { .. }) | None, None) => None,
    }
}

fn answer(waiting: Waiting) {
    for (to, answers) in waiting {
        // Nobody may be waiting any more; what was committed stays so.
        let _ = to.send(answers);
    }
}

/// Ends the process when its thread unwinds: the store does not go on with a part of itself gone.
pub struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

/// Where the scan at start begins, and what it need not count: as last stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Marks {
    /// Every older payment is settled, or has an entry in `Due`.
    pub payment: Option<PaymentId>,
    /// `Due` has no entry before this.
    pub due: Timestamp,
    /// The newest payment ever stored.
    pub newest: Option<PaymentId>,
    /// Of every older payment, what is derived from it is in its tables.
    pub derived: Option<PaymentId>,
}

impl Marks {
    /// Whether what is about to be stored lies before a mark, so that the mark must move back in the
    /// same commit: an id may be older than its commit.
    fn note(&mut self, stage: &Stage) -> bool {
        self.newest = self.newest.max(stage.newest);
        let before_payment = match (stage.oldest, self.payment) {
            (Some(oldest), Some(mark)) => oldest < mark,
            (Some(_), None) | (None, _) => false,
        };
        let before_derived =
            stage.derived.iter().any(|new| self.derived.is_some_and(|mark| new.id < mark));
        before_payment || before_derived || stage.nearest_entry.is_some_and(|at| at < self.due)
    }

    fn stage(&mut self, stage: &mut Stage, floors: Floors, tail: Option<PaymentId>, payments: u64) {
        let open = [floors.payment, stage.oldest].into_iter().flatten().min();
        // Where nothing is open, everything up to the newest payment is settled.
        self.payment = open.or(self.newest);
        self.due = stage.nearest_entry.map_or(floors.due, |at| at.min(floors.due));
        if let Some(floor) = self.payment {
            stage.batch.put(Table::Meta, meta::FLOOR, floor.bytes());
        }
        let staged = stage.derived.iter().map(|new| new.id);
        self.derived = staged.chain(tail).min().or(self.newest);
        if let Some(derived) = self.derived {
            stage.batch.put(Table::Meta, meta::DERIVED, derived.bytes());
        }
        stage.batch.put(Table::Meta, meta::DUE_FLOOR, self.due.ms().max(0).to_be_bytes());
        if let Some(newest) = self.newest {
            let counted = [newest.bytes().as_slice(), &payments.to_be_bytes()].concat();
            stage.batch.put(Table::Meta, meta::COUNTED, counted);
        }
    }
}

/// Keys of the `Meta` table.
pub mod meta {
    pub const SECRET: &[u8; 6] = b"secret";
    pub const SEQUENCE: &[u8; 8] = b"sequence";
    pub const FLOOR: &[u8; 5] = b"floor";
    pub const DUE_FLOOR: &[u8; 9] = b"due_floor";
    pub const COUNTED: &[u8; 7] = b"counted";
    pub const DERIVED: &[u8; 7] = b"derived";
    pub const HORIZON: &[u8; 7] = b"horizon";
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jobs(sizes: &[usize]) -> Vec<Job> {
        let job = |size: &usize| Job::Lapse {
            keys: vec![Vec::new(); *size],
            answer: oneshot::channel().0,
        };
        sizes.iter().map(job).collect()
    }

    #[test]
    fn a_sync_takes_what_fits_and_one_job_at_least() {
        assert_eq!(fitting(&jobs(&[COMMITS_MAX - 1, 1, 1])), 2);
        assert_eq!(fitting(&jobs(&[COMMITS_MAX + 1, 1])), 1);
        assert_eq!(fitting(&jobs(&[1, 1, 1])), 3);
    }
}
