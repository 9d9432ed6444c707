//! The one thread that writes: it takes all commits that arrived meanwhile, checks each against what
//! is stored and staged, makes them durable with one sync, and answers.

use std::{
    collections::BTreeSet,
    ops::ControlFlow,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustc_hash::FxHashSet;
use tokio::sync::{mpsc, oneshot};

use super::{
    Answers, Change, Commit, Committed, Health, Remembered, Reply, Revision, StoreError, Update,
    Versioned,
    marks::{Marks, meta},
    record,
    shared::Shared,
    stage::Stage,
    tables::Table,
};
use crate::{
    clock::Stopwatch,
    domain::{
        Text,
        ids::{Idempotency, KeyHash, PaymentId},
        payment::{Payment, Terms},
        time::Timestamp,
    },
    pace::{self, Pace},
};

/// The most jobs taken in one go: batches size themselves, this only bounds their memory.
const JOBS_MAX: usize = 1_024;
/// Commits that one sync makes durable: enough that its cost is nothing to each, and little enough that
/// none waits long for the others. A batch without bounds takes seconds once the writer has fallen
/// behind, and all who arrive meanwhile make the next one larger.
const COMMITS_MAX: usize = 2_000;
/// Payments whose keys and lists are in memory alone, at some 250 bytes each: half a minute's at full speed.
/// Where bringing them into their tables falls so far behind, creates are refused.
const TAIL_MAX: usize = 1_000_000;
/// A sync costs some 0.2 ms of CPU, for one commit as for a hundred. Fewer commits than are load come from callers
/// that wait for one answer before they ask again: they get it at once.
const SYNCS: pace::Rules =
    pace::Rules { every: Duration::from_millis(2), busy: 8, company: 150, is_awaited: true };
/// How often it looks for company while it waits.
const LOOK_EVERY: Duration = Duration::from_micros(500);
/// Marks are written along with a batch, at most this often.
const MARKS_EVERY: Duration = Duration::from_secs(1);

pub enum Job {
    Commit {
        round: Round,
        asker: Asker,
    },
    /// Retention is about to look at payments: from here on it is noted which ones change.
    Watch {
        answer: oneshot::Sender<usize>,
    },
    /// What retention has found; answered with how many payments went.
    Pass {
        judged: Judged,
        answer: oneshot::Sender<usize>,
    },
    /// Replies that lapsed, as the `Lapse` table calls them.
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

/// Commits on their way here, and answers on their way back, one each.
#[derive(Debug, Default)]
pub struct Round {
    pub commits: Vec<Commit>,
    pub answers: Answers,
}

impl Round {
    pub fn of(commits: Vec<Commit>) -> Self {
        Self { commits, answers: Answers::new() }
    }
}

/// Who is told what came of a round.
pub enum Asker {
    Caller(oneshot::Sender<Answers>),
    /// One that makes rounds all the time, and takes the room of this one for another: what is allocated on one thread
    /// and freed on another is fetched from the system anew each time.
    Thread(oneshot::Sender<Round>),
}

impl Asker {
    pub fn answer(self, round: Round) {
        // Nobody may be waiting any more; what was committed stays so.
        match self {
            Self::Caller(to) => drop(to.send(round.answers)),
            Self::Thread(to) => drop(to.send(round)),
        }
    }
}

impl Job {
    fn commits(&self) -> usize {
        match self {
            Self::Commit { round, .. } => round.commits.len(),
            Self::Pass { judged, .. } => judged.kept.len(),
            Self::Lapse { keys, .. } => keys.len(),
            Self::Watch { .. } | Self::Load { .. } | Self::Marks | Self::Close { .. } => 0,
        }
    }
}

/// Payments that retention has judged: all from the horizon's mark up to `to`, and some that it kept
/// before. What has changed since the watch began stays all the same.
pub struct Judged {
    pub to: PaymentId,
    pub gone: Vec<PaymentId>,
    /// Those below `to` that stay.
    pub kept: Vec<PaymentId>,
    /// Of those that go, the ones with a dead delivery.
    pub dead: Vec<PaymentId>,
    /// Reservations of those that go, where their draws were counted.
    pub drew: BTreeSet<Text>,
}

fn commits(jobs: &[Job]) -> usize {
    jobs.iter().map(Job::commits).sum()
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

pub struct Writer {
    shared: Arc<Shared>,
    jobs: mpsc::Receiver<Job>,
    marks: Marks,
    marked: Stopwatch,
    stage: Stage,
    /// Payments written since retention began to look, while it does.
    watched: Option<FxHashSet<PaymentId>>,
}

type Waiting = Vec<(Asker, Round)>;

impl Writer {
    pub fn new(shared: Arc<Shared>, jobs: mpsc::Receiver<Job>, marks: Marks) -> Self {
        let (marked, stage) = (Stopwatch::start(), Stage::default());
        Self { shared, jobs, marks, marked, stage, watched: None }
    }

    /// Runs until closed, until every handle to the store is gone, or until a commit fails.
    pub fn run(mut self) {
        // A panic here would leave callers without an answer and the store half known: end at once.
        let _abort = AbortOnPanic;
        let mut jobs = Vec::with_capacity(JOBS_MAX);
        let are_synced = self.shared.tables.are_on_disk();
        let mut pace = Pace::new(SYNCS);
        while self.jobs.blocking_recv_many(&mut jobs, JOBS_MAX) > 0 {
            if are_synced {
                self.wait_for_company(&pace, &mut jobs);
            }
            pace.begin(commits(&jobs));
            while !jobs.is_empty() {
                let now = fitting(&jobs);
                if !self.batch(jobs.drain(..now).collect()) {
                    // What came after is answered by being dropped: nothing more is taken.
                    return;
                }
            }
        }
    }

    fn wait_for_company(&mut self, pace: &Pace, jobs: &mut Vec<Job>) {
        while jobs.len() < JOBS_MAX
            && let Some(wait) = pace.wait(commits(jobs))
        {
            std::thread::sleep(wait.min(LOOK_EVERY));
            while jobs.len() < JOBS_MAX
                && let Ok(job) = self.jobs.try_recv()
            {
                jobs.push(job);
            }
        }
    }

    /// False: no more batches.
    fn batch(&mut self, jobs: Vec<Job>) -> bool {
        let mut stage = std::mem::take(&mut self.stage);
        stage.clear();
        stage.room = self.room();
        let mut waiting: Waiting = Vec::new();
        let mut counts = Vec::new();
        let mut passes = Vec::new();
        let mut close = None;
        for job in jobs {
            match job {
                Job::Commit { mut round, asker } => {
                    let Round { commits, answers } = &mut round;
                    answers.extend(commits.drain(..).map(|c| self.stage(&mut stage, c)));
                    waiting.push((asker, round));
                }
                Job::Watch { answer } => {
                    self.watched = Some(FxHashSet::default());
                    // Answered when what came before it can be read.
                    counts.push((answer, 0));
                }
                Job::Pass { judged, answer } => passes.push((answer, judged)),
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
        for (answer, judged) in passes {
            counts.push((answer, self.stage_pass(&mut stage, judged)));
        }
        #[cfg(feature = "faults")]
        super::faults::before_commit(&*self.shared.tables, &mut stage.batch, || {
            answer(std::mem::take(&mut waiting));
        });
        let is_empty = stage.batch.is_empty() && !stage.marks && close.is_none();
        if !is_empty && !self.write(&mut stage) {
            return false;
        }
        self.stage = stage;
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
    fn write(&mut self, stage: &mut Stage) -> bool {
        let shared = Arc::clone(&self.shared);
        let sequence = shared.sequence.load(Ordering::Relaxed) + 1;
        stage.batch.put(Table::Meta, meta::SEQUENCE, sequence.to_be_bytes());
        let payments =
            shared.payments.load(Ordering::Relaxed).saturating_add_signed(stage.payments);
        let due_now = stage.marks || self.marked.elapsed() >= MARKS_EVERY;
        if self.marks.note(stage) || due_now {
            self.marked = Stopwatch::start();
            self.marks.stage(stage, shared.book.floors(), shared.tail.oldest(), payments);
        }
        if !stage.kept.is_empty() {
            // Known before their rows can be seen, lest those be dropped.
            shared.horizon.moved(None, &stage.kept, &[]);
        }
        let took = Stopwatch::start();
        if let Err(error) = shared.tables.write(&stage.batch) {
            shared.fail(&error);
            return false;
        }
        shared.sequence.store(sequence, Ordering::Release);
        shared.payments.store(payments, Ordering::Relaxed);
        shared.open.note(stage.waiting.drain(..), stage.done.drain(..));
        shared.tail.add(stage.derived.drain(..));
        if stage.horizon.is_some() {
            shared.horizon.moved(stage.horizon, &[], &stage.gone);
        }
        shared.book.note(stage.dues.drain(..));
        if stage.commits > 0 {
            (shared.on_commit)(stage.commits, took.elapsed());
        }
        true
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
            Some(Change::Create { terms, draw }) => {
                self.stage_create(stage, terms)?;
                if let Some(draw) = draw {
                    stage.batch.put(Table::Counter, draw.reservation, draw.next().to_be_bytes());
                    stage.draws.push(draw);
                }
                Revision(0)
            }
            Some(Change::Update(update)) => {
                let Update { before, after } = *update;
                self.stage_update(stage, &before, after)?
            }
        };
        if let Some(reply) = reply {
            self.stage_reply(stage, reply);
        }
        stage.commits += 1;
        Ok(Committed::Done(revision))
    }

    fn stage_create(&mut self, stage: &mut Stage, terms: Arc<Terms>) -> Result<(), StoreError> {
        let shared = &self.shared;
        if stage.room == 0 || shared.dropping_behind.load(Ordering::Relaxed) {
            return Err(StoreError::Overloaded);
        }
        stage.room -= 1;
        stage.batch.put_with(Table::Payment, terms.id.bytes(), |b| record::terms(&terms, b));
        let derived = shared.derived(&terms);
        if shared.tables.are_on_disk() {
            stage.derived.push(derived);
        } else {
            stage.put_derived(&derived);
        }
        if let Some(Idempotency { key, request }) = terms.idempotency {
            stage.keys.insert(key, Remembered::Created { request, id: terms.id });
        }
        if !shared.horizon.has(terms.id) {
            // An id may be older than its commit, and the horizon have passed it since.
            stage.keep(terms.id);
        }
        if let Some(watched) = &mut self.watched {
            watched.insert(terms.id);
        }
        stage.payments += 1;
        stage.newest = stage.newest.max(Some(terms.id));
        if terms.are_settled_at_once() {
            stage.note_settled(terms.id, Revision(0));
        } else {
            let payment = Payment::create(terms);
            stage.note(Versioned { payment, revision: Revision(0) }, None);
        }
        Ok(())
    }

    fn stage_update(
        &mut self,
        stage: &mut Stage,
        before: &Versioned,
        after: Payment,
    ) -> Result<Revision, StoreError> {
        let id = after.terms.id;
        let stored = match stage.revisions.get(&id) {
            Some(staged) => Some(*staged),
            None => self.stored_revision(id)?,
        };
        #[cfg(feature = "faults")]
        let stored = crate::faults::stored_revision(id, stored, before.revision);
        if stored != Some(before.revision) {
            return Err(StoreError::Conflict);
        }
        let revision = Revision(before.revision.0 + 1);
        let progress = |b: &mut Vec<u8>| record::progress(revision, &after.progress, b);
        stage.batch.put_with(Table::State, id.bytes(), progress);
        if let Some(watched) = &mut self.watched {
            watched.insert(id);
        }
        stage.note_dead(&before.payment, &after);
        stage.note(Versioned { payment: after, revision }, Some(&before.payment));
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
        if let Some(revision) = self.shared.open.revision(id) {
            return Ok(Some(revision));
        }
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
    fn stage_pass(&mut self, stage: &mut Stage, judged: Judged) -> usize {
        let Judged { to, gone, kept, dead, drew } = judged;
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
        let mut left = !shared.tail.ids(name, stays).is_empty();
        let span = record::index_span(name, shared.horizon.floor());
        let read = shared.scan(Table::Index, span, &mut |key, _| {
            left |= record::read_index_id(key).map_or(true, stays);
            if left { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        if read.is_ok() && !left {
            stage.batch.delete(Table::Counter, counter);
        }
    }
}

fn key_of(change: Option<&Change>, reply: Option<&Reply>) -> Option<(Idempotency, Timestamp)> {
    match (change, reply) {
        (_, Some(reply)) => Some((reply.idempotency, reply.at)),
        (Some(Change::Create { terms, .. }), None) => {
            terms.idempotency.map(|key| (key, terms.created_at))
        }
        (Some(Change::Update(_)) | None, None) => None,
    }
}

fn answer(waiting: Waiting) {
    for (asker, round) in waiting {
        asker.answer(round);
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
