//! The one thread that writes: it takes all commits that arrived meanwhile, checks each against what
//! is stored and staged, makes them durable with one sync, and answers.

use std::{
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
/// Entries that a create makes: payment, key, and its place in two lists.
const ENTRIES: usize = 4;
/// Entries of `Meta` in a batch at most.
const MARKS: usize = 4;
/// Marks are written along with a batch, at most this often.
const MARKS_EVERY: Duration = Duration::from_secs(1);

pub type Answers = Vec<Result<Committed, StoreError>>;

pub enum Job {
    Commit {
        commits: Vec<Commit>,
        answer: oneshot::Sender<Answers>,
    },
    /// Payments to drop, each with the revision that it was judged at; answered with how many went.
    Drop {
        payments: Vec<super::Versioned>,
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
            Self::Drop { payments, .. } => payments.len(),
            Self::Lapse { keys, .. } => keys.len(),
            Self::Load { .. } | Self::Marks | Self::Close { .. } => 0,
        }
    }
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
    revisions: FxHashMap<PaymentId, Option<Revision>>,
    keys: FxHashMap<KeyHash, Remembered>,
    dues: Vec<(PaymentId, Timestamp, Dues)>,
    oldest: Option<PaymentId>,
    nearest_entry: Option<Timestamp>,
    newest: Option<PaymentId>,
    payments: i64,
    commits: usize,
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
}

type Waiting = Vec<(oneshot::Sender<Answers>, Answers)>;

impl Writer {
    pub fn new(shared: Arc<Shared>, jobs: mpsc::Receiver<Job>, marks: Marks) -> Self {
        let revisions = FxHashMap::default();
        Self { shared, jobs, marks, marked: Stopwatch::start(), revisions }
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
        let mut stage = Stage::with_room_for(&jobs);
        let mut waiting: Waiting = Vec::new();
        let mut counts = Vec::new();
        let mut close = None;
        let mut marks = false;
        for job in jobs {
            match job {
                Job::Commit { commits, answer } => {
                    let answers = commits.into_iter().map(|c| self.stage(&mut stage, c)).collect();
                    waiting.push((answer, answers));
                }
                Job::Drop { payments, answer } => {
                    counts.push((answer, self.stage_drops(&mut stage, payments)));
                }
                Job::Lapse { keys, answer } => {
                    counts.push((answer, self.stage_lapses(&mut stage, keys)));
                }
                Job::Load { from, to, answer } => {
                    let _ = answer.send(self.shared.load(from, to));
                }
                Job::Marks => marks = true,
                Job::Close { answer } => close = Some(answer),
            }
        }
        #[cfg(feature = "faults")]
        super::faults::before_commit(&*self.shared.tables, &mut stage.batch, || {
            answer(std::mem::take(&mut waiting));
        });
        if (marks || !stage.batch.is_empty() || close.is_some()) && !self.write(stage) {
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

    /// Makes the stage durable, then visible to the drivers. False: it failed, and nobody is answered.
    fn write(&mut self, mut stage: Stage) -> bool {
        let shared = Arc::clone(&self.shared);
        let sequence = shared.sequence.load(Ordering::Relaxed) + 1;
        stage.batch.put(Table::Meta, *meta::SEQUENCE, sequence.to_be_bytes());
        let payments =
            shared.payments.load(Ordering::Relaxed).saturating_add_signed(stage.payments);
        let due_now = self.marked.elapsed() >= MARKS_EVERY;
        if self.marks.note(&stage) || due_now {
            self.marked = Stopwatch::start();
            self.marks.stage(&mut stage, shared.book.floors(), payments);
        }
        let took = Stopwatch::start();
        if let Err(error) = shared.tables.write(std::mem::take(&mut stage.batch)) {
            shared.fail(&error);
            return false;
        }
        shared.sequence.store(sequence, Ordering::Release);
        shared.payments.store(payments, Ordering::Relaxed);
        self.note_revisions(&stage);
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
                Some(Some(revision)) if waits => self.revisions.insert(*id, *revision),
                Some(_) | None => self.revisions.remove(id),
            };
        }
    }

    fn stage(&self, stage: &mut Stage, commit: Commit) -> Result<Committed, StoreError> {
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

    fn stage_create(&self, stage: &mut Stage, payment: &Payment) -> Result<(), StoreError> {
        let terms = &payment.terms;
        let has_room = self.shared.book.open() < self.shared.open_max;
        if !has_room || self.shared.dropping_behind.load(Ordering::Relaxed) {
            return Err(StoreError::Overloaded);
        }
        stage.batch.put(Table::Payment, *terms.id.bytes(), record::terms(terms));
        for name in self.shared.index_names(terms) {
            stage.batch.put(Table::Index, record::index_key(name, terms.id), []);
        }
        if let Some(Idempotency { key, request }) = terms.idempotency {
            stage.batch.put(Table::Key, key.0, record::created(request, terms.id));
            stage.keys.insert(key, Remembered::Created { request, id: terms.id });
        }
        stage.payments += 1;
        stage.newest = stage.newest.max(Some(terms.id));
        stage.revisions.insert(terms.id, Some(Revision(0)));
        stage.note(payment, None);
        Ok(())
    }

    fn stage_update(
        &self,
        stage: &mut Stage,
        before: &super::Versioned,
        after: &Payment,
    ) -> Result<Revision, StoreError> {
        let id = after.terms.id;
        let stored = match (stage.revisions.get(&id), self.revisions.get(&id)) {
            (Some(staged), _) => *staged,
            (None, Some(written)) => Some(*written),
            (None, None) => self.stored_revision(id)?,
        };
        #[cfg(feature = "faults")]
        let stored = crate::faults::stored_revision(id, stored, before.revision);
        if stored != Some(before.revision) {
            return Err(StoreError::Conflict);
        }
        let revision = Revision(before.revision.0 + 1);
        stage.batch.put(Table::State, *id.bytes(), record::progress(revision, &after.progress));
        stage.revisions.insert(id, Some(revision));
        stage.note(after, Dues::of(&before.payment).entry(after.terms.created_at));
        stage.note_dead(&before.payment, after);
        Ok(revision)
    }

    fn stage_reply(&self, stage: &mut Stage, reply: Reply) {
        let Reply { idempotency: Idempotency { key, request }, bytes, at } = reply;
        stage.batch.put(Table::Reply, key.0, record::reply(request, at, &bytes));
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

    /// Drops what has not changed since it was judged: its record, its place in lists, its create's key
    /// unless a newer payment has taken that, and with a reservation's last payment its counter.
    fn stage_drops(&self, stage: &mut Stage, payments: Vec<super::Versioned>) -> usize {
        let mut dropped = 0;
        let mut drew = FxHashSet::default();
        for super::Versioned { payment, revision } in payments {
            let terms = &payment.terms;
            let staged = stage.revisions.contains_key(&terms.id);
            if staged || self.stored_revision(terms.id).ok().flatten() != Some(revision) {
                continue;
            }
            stage.batch.delete(Table::Payment, *terms.id.bytes());
            if revision > Revision(0) {
                stage.batch.delete(Table::State, *terms.id.bytes());
            }
            for name in self.shared.index_names(terms) {
                stage.batch.delete(Table::Index, record::index_key(name, terms.id));
            }
            if payment.has_dead() {
                stage.batch.delete(Table::Dead, *terms.id.bytes());
            }
            if let Some(Idempotency { key, .. }) = terms.idempotency
                && !stage.keys.contains_key(&key)
                && self.shared.owner_of(key) == Some(terms.id)
            {
                stage.batch.delete(Table::Key, key.0);
            }
            if terms.idempotency.is_none() && terms.plan.scenario.draws() {
                drew.insert(terms.reservation_id.clone());
            }
            stage.revisions.insert(terms.id, None);
            stage.payments -= 1;
            dropped += 1;
        }
        for reservation in drew {
            self.stage_counter_drop(stage, &reservation);
        }
        dropped
    }

    /// Forgets how often a reservation drew when none of its payments is left.
    fn stage_counter_drop(&self, stage: &mut Stage, reservation: &str) {
        let counter = self.shared.draws_name(reservation);
        if stage.draws.iter().any(|draw| draw.reservation == counter) {
            return;
        }
        let name = self.shared.reservation_name(reservation);
        let mut left = false;
        let read = self.shared.scan(Table::Index, record::index_span(name), &mut |key, _| {
            let gone = |id| matches!(stage.revisions.get(&id), Some(None));
            left = !record::read_index_id(key).is_ok_and(gone);
            if left { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        if read.is_ok() && !left {
            stage.batch.delete(Table::Counter, counter);
        }
    }
}

impl Stage {
    /// Thousands of entries a batch: grown step by step they would be moved as often.
    fn with_room_for(jobs: &[Job]) -> Self {
        let commits = jobs.iter().map(Job::commits).sum();
        let batch = Batch::with_capacity(commits * ENTRIES + MARKS);
        let mut stage = Self { batch, ..Self::default() };
        stage.revisions.reserve(commits);
        stage.keys.reserve(commits);
        stage.dues.reserve(commits);
        stage
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
        before_payment || stage.nearest_entry.is_some_and(|at| at < self.due)
    }

    fn stage(&mut self, stage: &mut Stage, floors: Floors, payments: u64) {
        let open = [floors.payment, stage.oldest].into_iter().flatten().min();
        // Where nothing is open, everything up to the newest payment is settled.
        self.payment = open.or(self.newest);
        self.due = stage.nearest_entry.map_or(floors.due, |at| at.min(floors.due));
        if let Some(floor) = self.payment {
            stage.batch.put(Table::Meta, *meta::FLOOR, *floor.bytes());
        }
        stage.batch.put(Table::Meta, *meta::DUE_FLOOR, self.due.ms().max(0).to_be_bytes());
        if let Some(newest) = self.newest {
            let counted = [newest.bytes().as_slice(), &payments.to_be_bytes()].concat();
            stage.batch.put(Table::Meta, *meta::COUNTED, counted);
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
