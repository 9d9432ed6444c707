//! What has been applied: event ids, and the version of each payment. Written durably before a message
//! is deleted, so that a message that comes again saves its call, over restarts too.
//!
//! Rows are numbered in the order in which they are written. The oldest go, a few with each write, when
//! they are older than a day or there are too many: no start and no write ever walks through all of
//! them, and memory holds none but the engine's caches.

mod disk;
mod memory;

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};

use self::{disk::Disk, memory::Memory};
use super::decision::Known;
use crate::clock::Clock;

/// Queues keep a message for 4 days by default, but repeat it within minutes.
const KEPT_FOR: Duration = Duration::from_secs(24 * 60 * 60);
/// About a day at 115 events a second, and 1 GB of disk.
const DISK_MAX: u64 = 10_000_000;
/// 200 MB of memory.
const MEMORY_MAX: u64 = 1_000_000;
/// Rows made durable by one sync.
const BATCH_MAX: usize = 512;
/// The oldest rows that are looked at with each write, for each row written: more than one, so that a
/// lowered bound is reached.
const DROPPED_PER_ROW: usize = 2;

const MARKS: &[u8] = b"marks";

/// 128 bits of SHA-256: ids are the producer's own, and of any length.
pub type Id = [u8; 16];

pub fn id(text: &str) -> Id {
    let mut id = Id::default();
    id.copy_from_slice(&Sha256::digest(text)[..16]);
    id
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Event → nothing: it has been applied.
    Event,
    /// Payment → version, number of the row that says so.
    Payment,
    /// Number → moment, payment, event: the order in which they go.
    Order,
    /// The first and the next number.
    Marks,
}

impl Table {
    pub const ALL: [Self; 4] = [Self::Event, Self::Payment, Self::Order, Self::Marks];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Payment => "payment",
            Self::Order => "order",
            Self::Marks => "marks",
        }
    }
}

/// `None` as a value: the row goes.
pub type Write = (Table, Vec<u8>, Option<Vec<u8>>);

/// What the engine could not do. For logs.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub String);

/// What is asked of an engine.
pub trait Rows: Send + Sync + 'static {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, Broken>;

    /// Atomic, and durable when it returns. After an error nothing may be written any more.
    fn write(&self, writes: Vec<Write>) -> Result<(), Broken>;
}

/// One row to remember.
#[derive(Clone, Copy, Debug)]
pub struct Applied {
    pub payment: Id,
    pub version: u64,
    /// `None`: a call was made and its outcome is not known. Its event is not done, but nothing older
    /// of its payment may be applied any more.
    pub event: Option<Id>,
}

struct Job {
    applied: Applied,
    done: oneshot::Sender<Result<(), Broken>>,
}

pub struct State {
    rows: Arc<dyn Rows>,
    jobs: mpsc::Sender<Job>,
    remembered: Arc<AtomicU64>,
}

impl State {
    /// # Errors
    /// In words for the operator.
    pub fn in_folder(folder: &Path, clock: Arc<dyn Clock>) -> Result<Self, String> {
        let disk = Disk::open(folder)?;
        Self::open(Arc::new(disk), DISK_MAX, clock)
            .map_err(|error| format!("{}: {error}", folder.display()))
    }

    /// # Errors
    /// When the system gives no thread.
    pub fn in_memory(clock: Arc<dyn Clock>) -> Result<Self, String> {
        Self::open(Arc::new(Memory::default()), MEMORY_MAX, clock)
            .map_err(|error| error.to_string())
    }

    fn open(rows: Arc<dyn Rows>, max: u64, clock: Arc<dyn Clock>) -> io::Result<Self> {
        let marks = Marks::read(&*rows).map_err(io::Error::other)?;
        let remembered = Arc::new(AtomicU64::new(marks.next - marks.first));
        let (jobs, queue) = mpsc::channel(BATCH_MAX);
        let writer =
            Writer { rows: Arc::clone(&rows), marks, max, clock, remembered: remembered.clone() };
        thread::Builder::new().name("state-writer".to_owned()).spawn(move || writer.run(queue))?;
        Ok(Self { rows, jobs, remembered })
    }

    pub fn look_up(&self, event: &Id, payment: &Id) -> Result<Known, Broken> {
        let is_applied = self.rows.get(Table::Event, event)?.is_some();
        let version = self.rows.get(Table::Payment, payment)?.map(|row| number(&row, 0));
        Ok(Known { is_applied, version: version.transpose()? })
    }

    /// Durable when it returns. Rows that arrive together share one sync.
    pub async fn remember(&self, applied: Applied) -> Result<(), Broken> {
        let (done, wait) = oneshot::channel();
        let gone = |_| Broken("the state's writer has ended".to_owned());
        self.jobs.send(Job { applied, done }).await.map_err(|_| gone(()))?;
        wait.await.map_err(|_| gone(()))?
    }

    /// How many rows there are.
    pub fn remembered(&self) -> u64 {
        self.remembered.load(Ordering::Relaxed)
    }
}

/// The numbers of the rows that there are: from `first` to before `next`.
#[derive(Clone, Copy, Debug)]
struct Marks {
    first: u64,
    next: u64,
}

impl Marks {
    fn read(rows: &dyn Rows) -> Result<Self, Broken> {
        let Some(row) = rows.get(Table::Marks, MARKS)? else {
            return Ok(Self { first: 0, next: 0 });
        };
        let marks = Self { first: number(&row, 0)?, next: number(&row, 1)? };
        if marks.first > marks.next {
            return Err(Broken("it ends before it begins".to_owned()));
        }
        Ok(marks)
    }
}

/// The one thread that writes. It ends when the state is dropped, or with the first write that fails.
struct Writer {
    rows: Arc<dyn Rows>,
    marks: Marks,
    max: u64,
    clock: Arc<dyn Clock>,
    remembered: Arc<AtomicU64>,
}

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(first) = queue.blocking_recv() {
            let mut jobs = vec![first];
            while jobs.len() < BATCH_MAX
                && let Ok(job) = queue.try_recv()
            {
                jobs.push(job);
            }
            let result = self.write(&jobs);
            let failed = result.is_err();
            for job in jobs {
                // Whoever no longer waits was stopped meanwhile.
                let _ = job.done.send(result.clone());
            }
            if failed {
                return;
            }
        }
    }

    fn write(&mut self, jobs: &[Job]) -> Result<(), Broken> {
        let mut batch = Batch {
            marks: self.marks,
            now_ms: self.clock.now_ms(),
            staged: HashMap::new(),
            writes: Vec::new(),
        };
        for job in jobs {
            batch.remember(&*self.rows, job.applied)?;
        }
        batch.drop_oldest(&*self.rows, self.max, jobs.len() * DROPPED_PER_ROW)?;
        self.marks = batch.commit(&*self.rows)?;
        self.remembered.store(self.marks.next - self.marks.first, Ordering::Relaxed);
        Ok(())
    }
}

/// What one sync makes durable.
struct Batch {
    marks: Marks,
    now_ms: i64,
    /// Payments that this batch has written already: version, number.
    staged: HashMap<Id, (u64, u64)>,
    writes: Vec<Write>,
}

impl Batch {
    fn remember(&mut self, rows: &dyn Rows, applied: Applied) -> Result<(), Broken> {
        let n = self.marks.next;
        self.marks.next += 1;
        let known = self.payment(rows, &applied.payment)?;
        // A version never goes back.
        let version = known.map_or(applied.version, |(version, _)| version.max(applied.version));
        self.staged.insert(applied.payment, (version, n));
        let row = [version.to_be_bytes(), n.to_be_bytes()].concat();
        self.writes.push((Table::Payment, applied.payment.to_vec(), Some(row)));
        let mut row = self.now_ms.to_be_bytes().to_vec();
        row.extend(applied.payment);
        if let Some(event) = applied.event {
            row.extend(event);
            self.writes.push((Table::Event, event.to_vec(), Some(Vec::new())));
        }
        self.writes.push((Table::Order, n.to_be_bytes().to_vec(), Some(row)));
        Ok(())
    }

    fn payment(&self, rows: &dyn Rows, payment: &Id) -> Result<Option<(u64, u64)>, Broken> {
        if let Some(staged) = self.staged.get(payment) {
            return Ok(Some(*staged));
        }
        let row = rows.get(Table::Payment, payment)?;
        row.map(|row| Ok((number(&row, 0)?, number(&row, 1)?))).transpose()
    }

    fn drop_oldest(&mut self, rows: &dyn Rows, max: u64, at_most: usize) -> Result<(), Broken> {
        let oldest_ms = self.now_ms.saturating_sub_unsigned(KEPT_FOR.as_millis() as u64);
        for _ in 0..at_most {
            let n = self.marks.first;
            // What this very batch adds is not in the table yet; it is not old either.
            let Some(row) = rows.get(Table::Order, &n.to_be_bytes())? else { break };
            let is_over = self.marks.next - n > max;
            if !is_over && number(&row, 0)?.cast_signed() >= oldest_ms {
                break;
            }
            let (payment, event) = ids(&row)?;
            self.marks.first += 1;
            self.writes.push((Table::Order, n.to_be_bytes().to_vec(), None));
            if let Some(event) = event {
                self.writes.push((Table::Event, event.to_vec(), None));
            }
            // A newer row may speak of the same payment.
            if self.payment(rows, &payment)?.is_some_and(|(_, last)| last == n) {
                self.writes.push((Table::Payment, payment.to_vec(), None));
            }
        }
        Ok(())
    }

    fn commit(mut self, rows: &dyn Rows) -> Result<Marks, Broken> {
        let marks = [self.marks.first.to_be_bytes(), self.marks.next.to_be_bytes()].concat();
        self.writes.push((Table::Marks, MARKS.to_vec(), Some(marks)));
        rows.write(self.writes)?;
        Ok(self.marks)
    }
}

/// The number at a place of a row, counted in eights of bytes.
fn number(row: &[u8], place: usize) -> Result<u64, Broken> {
    let bytes = row.get(place * 8..place * 8 + 8).and_then(|bytes| bytes.try_into().ok());
    bytes.map(u64::from_be_bytes).ok_or_else(short)
}

fn ids(row: &[u8]) -> Result<(Id, Option<Id>), Broken> {
    let id = |from| row.get(from..from + 16).and_then(|bytes| Id::try_from(bytes).ok());
    Ok((id(8).ok_or_else(short)?, id(24)))
}

fn short() -> Broken {
    Broken("a row is too short".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    fn applied(payment: &str, version: u64, event: &str) -> Applied {
        Applied { payment: id(payment), version, event: Some(id(event)) }
    }

    fn known(state: &State, event: &str, payment: &str) -> Known {
        state.look_up(&id(event), &id(payment)).unwrap()
    }

    fn each_engine(max: u64, clock: &ManualClock, test: impl AsyncFn(State)) {
        let folder = tempfile::tempdir().unwrap();
        let engines: [Arc<dyn Rows>; 2] =
            [Arc::new(Memory::default()), Arc::new(Disk::open(folder.path()).unwrap())];
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for rows in engines {
            let state = State::open(rows, max, Arc::new(clock.clone())).unwrap();
            runtime.block_on(test(state));
        }
    }

    #[test]
    fn what_is_remembered_is_known() {
        each_engine(100, &ManualClock::at_ms(0), async |state| {
            assert_eq!(known(&state, "e1", "p"), Known::default());
            state.remember(applied("p", 2, "e1")).await.unwrap();
            assert_eq!(known(&state, "e1", "p"), Known { is_applied: true, version: Some(2) });
            assert_eq!(known(&state, "e2", "p"), Known { is_applied: false, version: Some(2) });
            assert_eq!(known(&state, "e1", "q"), Known { is_applied: true, version: None });
            // An outcome that is not known raises the version and applies no event.
            let open = Applied { event: None, ..applied("p", 3, "e2") };
            state.remember(open).await.unwrap();
            assert_eq!(known(&state, "e2", "p"), Known { is_applied: false, version: Some(3) });
            // A version never goes back.
            state.remember(applied("p", 1, "e0")).await.unwrap();
            assert_eq!(known(&state, "e0", "p"), Known { is_applied: true, version: Some(3) });
            assert_eq!(state.remembered(), 3);
        });
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many() {
        each_engine(10, &ManualClock::at_ms(0), async |state| {
            state.remember(applied("kept", 7, "first")).await.unwrap();
            for n in 0..50 {
                state.remember(applied(&format!("p{n}"), 1, &format!("e{n}"))).await.unwrap();
                if n % 5 == 0 {
                    state.remember(applied("kept", 7 + n, &format!("k{n}"))).await.unwrap();
                }
            }
            assert_eq!(state.remembered(), 10);
            assert_eq!(known(&state, "first", "p0"), Known::default());
            assert_eq!(known(&state, "e49", "p49"), Known { is_applied: true, version: Some(1) });
            assert_eq!(known(&state, "e0", "kept").version, Some(52), "a newer row speaks of it");
        });
    }

    #[test]
    fn the_oldest_go_after_a_day() {
        let clock = ManualClock::at_ms(0);
        each_engine(1_000, &clock, async |state| {
            let start = clock.now_ms();
            for n in 0..6 {
                state.remember(applied(&format!("p{n}"), 1, &format!("e{n}"))).await.unwrap();
            }
            clock.set_ms(start + KEPT_FOR.as_millis() as i64);
            state.remember(applied("q", 1, "f")).await.unwrap();
            assert_eq!(state.remembered(), 7, "a day is not over yet");
            clock.advance(Duration::from_millis(1));
            for n in 0..3 {
                state.remember(applied(&format!("r{n}"), 1, &format!("g{n}"))).await.unwrap();
            }
            assert_eq!(known(&state, "e5", "p5"), Known::default());
            assert_eq!(known(&state, "f", "q"), Known { is_applied: true, version: Some(1) });
            assert_eq!(state.remembered(), 4);
        });
    }

    #[tokio::test]
    async fn a_restart_forgets_nothing_and_a_second_process_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let clock: Arc<dyn Clock> = Arc::new(ManualClock::at_ms(0));
        let state = State::in_folder(folder.path(), Arc::clone(&clock)).unwrap();
        for n in 0..100 {
            state.remember(applied(&format!("p{n}"), n + 1, &format!("e{n}"))).await.unwrap();
        }
        let Err(refused) = State::in_folder(folder.path(), Arc::clone(&clock)) else {
            panic!("two workers on one folder")
        };
        assert!(refused.contains("in use by another process"), "{refused}");
        drop(state);
        let state = again(folder.path(), &clock).await;
        assert_eq!(state.remembered(), 100);
        for n in 0..100 {
            let known = known(&state, &format!("e{n}"), &format!("p{n}"));
            assert_eq!(known, Known { is_applied: true, version: Some(n + 1) });
        }
    }

    /// The writer's thread lets go of the folder a moment after the state is dropped.
    async fn again(folder: &Path, clock: &Arc<dyn Clock>) -> State {
        let watch = crate::clock::Stopwatch::start();
        loop {
            match State::in_folder(folder, Arc::clone(clock)) {
                Ok(state) => return state,
                Err(why) => assert!(watch.elapsed() < Duration::from_secs(20), "{why}"),
            }
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn after_a_write_that_fails_nothing_is_remembered_any_more() {
        struct Failing;
        impl Rows for Failing {
            fn get(&self, _: Table, _: &[u8]) -> Result<Option<Vec<u8>>, Broken> {
                Ok(None)
            }
            fn write(&self, _: Vec<Write>) -> Result<(), Broken> {
                Err(Broken("no space".into()))
            }
        }
        let clock = Arc::new(ManualClock::at_ms(0));
        let state = State::open(Arc::new(Failing), 10, clock).unwrap();
        for _ in 0..2 {
            state.remember(applied("p", 1, "e")).await.unwrap_err();
        }
    }

    #[test]
    fn a_folder_of_something_else_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("FORMAT"), "99\n").unwrap();
        let Err(why) = Disk::open(folder.path()) else { panic!("opened") };
        assert!(why.contains("99"), "{why}");
    }
}
