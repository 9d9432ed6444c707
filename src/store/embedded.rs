//! The embedded store: tables, the book of due times, and one writer in front of both.

use std::{
    ops::{Bound, ControlFlow},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use async_trait::async_trait;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};

use super::{
    Answers, Backlog, Commit, DeliveryPage, DeliveryQuery, Health, Lease, ListQuery, OnCommit,
    OpenError, Page, Remembered, Store, StoreError, Versioned, Work,
    book::{Book, Releases},
    draws::{Counters, Draw},
    gather::{self, Gatherer},
    horizon::Horizon,
    janitor::Janitor,
    known::KnownKeys,
    lists,
    marks::{Marks, meta},
    open::OpenPayments,
    record,
    shared::{Retention, Shared},
    tables::{Batch, Span, Table, Tables, TablesError},
    tail::Tail,
    writer::{Job, Writer},
};
use crate::{
    clock::Clock,
    domain::{
        ids::{KeyHash, PaymentId, StoreSecret},
        time::Timestamp,
    },
};

/// Jobs that wait for the writer: more than every request in flight can hand in, so that only a
/// stalled disk fills it.
const JOBS_MAX: usize = 32_768;
/// Open payments in memory, about 300 bytes each; beyond it creates are refused.
const OPEN_MAX: usize = 1_000_000;

/// Lists read at a time; the rest wait their turn until their deadline. Each may hold a page of the
/// largest payments, 6 MiB, and the disk gives no more when more of them ask.
const LISTS_MAX: usize = 8;

pub struct Options {
    pub retention: Retention,
    pub clock: Arc<dyn Clock>,
    pub on_commit: OnCommit,
    /// Called with how many payments the cap made go before their time.
    pub on_dropped_early: Arc<dyn Fn(u64) + Send + Sync>,
}

pub struct Embedded {
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    newest: Option<PaymentId>,
    lists: Arc<Semaphore>,
    jobs: mpsc::Sender<Job>,
    janitor: Janitor,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Embedded {
    pub(super) fn start(
        tables: Arc<dyn Tables>,
        horizon: Arc<Horizon>,
        path: &Path,
        options: Options,
    ) -> Result<Arc<Self>, OpenError> {
        let Options { retention, clock, on_commit, on_dropped_early } = options;
        let now = Timestamp::from_ms(clock.now_ms());
        let mut opened = recover(&*tables, &horizon, now)
            .map_err(|why| OpenError::Corrupt { path: path.to_owned(), why })?;
        let shared = Arc::new(Shared {
            book: Arc::new(Book::new(opened.marks.due)),
            open: OpenPayments::default(),
            tail: Tail::default(),
            known: KnownKeys::default(),
            horizon,
            secret: opened.secret,
            retention,
            on_commit,
            sequence: AtomicU64::new(opened.sequence),
            payments: AtomicU64::new(opened.payments),
            full: AtomicBool::new(false),
            dropping_behind: AtomicBool::new(false),
            open_max: OPEN_MAX,
            failed: watch::Sender::new(false),
            tables,
        });
        let corrupt = |error: StoreError| OpenError::Corrupt {
            path: path.to_owned(),
            why: match error {
                StoreError::Corrupt(why) => why,
                // Why is in the log, with the table.
                _ => "some of what is stored cannot be read".to_owned(),
            },
        };
        let marks = &mut opened.marks;
        if marks.derived.is_none() {
            marks.derived = Some(shared.upgrade(marks.payment, marks.newest).map_err(corrupt)?);
        }
        shared.refill_tail(opened.marks.derived).map_err(corrupt)?;
        shared.rebuild(opened.marks.payment).map_err(corrupt)?;
        if let Some((from, to)) = shared.book.unread(now) {
            shared.load(from, to).map_err(corrupt)?;
        }
        let (jobs, waiting) = mpsc::channel(JOBS_MAX);
        let writer = Writer::new(Arc::clone(&shared), waiting, opened.marks);
        let spawned = std::thread::Builder::new().name("store-writer".to_owned());
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let writer = spawned.spawn(|| writer.run()).map_err(io)?;
        let janitor = Janitor::start(Arc::clone(&shared), jobs.clone(), clock, on_dropped_early);
        Ok(Arc::new(Self {
            shared,
            counters: Arc::default(),
            newest: opened.marks.newest,
            lists: Arc::new(Semaphore::new(LISTS_MAX)),
            jobs,
            janitor: janitor.map_err(io)?,
            writer: Mutex::new(Some(writer)),
        }))
    }

    /// How many payments are stored.
    pub fn payments(&self) -> u64 {
        self.shared.payments.load(Ordering::Relaxed)
    }

    /// For threads that serve requests.
    pub fn gatherer(&self) -> Gatherer {
        Gatherer::new(self.jobs.clone())
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Brings into their tables what is derived from the newest payments, as happens every few seconds.
    #[cfg(test)]
    pub(super) fn bring_in(&self) {
        self.janitor.bring_in();
    }

    /// One round of upkeep (retention, free space, high-water mark), as it runs every second.
    pub fn upkeep(&self) {
        self.janitor.round();
    }
}

struct Opened {
    secret: StoreSecret,
    sequence: u64,
    payments: u64,
    marks: Marks,
}

/// Reads what the store says of itself, and refuses one that has lost what it acknowledged.
fn recover(tables: &dyn Tables, horizon: &Horizon, now: Timestamp) -> Result<Opened, String> {
    let text = |error: TablesError| error.to_string();
    let read = |key: &[u8]| tables.get(Table::Meta, key).map_err(text);
    let number = |key: &[u8]| {
        read(key)?.map(|bytes| record::number(&bytes).map_err(|e| e.to_string())).transpose()
    };
    let sequence = number(meta::SEQUENCE)?.unwrap_or(0);
    let noted = tables.high_water().map_err(text)?;
    if sequence < noted {
        return Err(format!(
            "its last commit is {sequence}, yet commit {noted} was on the disk: acknowledged \
             payments are missing; restore the folder from a copy, or move it away to begin anew"
        ));
    }
    let secret = match read(meta::SECRET)? {
        Some(bytes) => {
            let bytes = bytes.try_into().map_err(|_| "its secret has not 32 bytes".to_owned())?;
            match read(meta::HASHES)?.as_deref() {
                Some(meta::SIPHASH_2_4_128) => StoreSecret::new(bytes),
                Some(_) => return Err("it hashes in an unknown way".to_owned()),
                None => StoreSecret::of_an_older_store(bytes),
            }
        }
        None if sequence == 0 => make_secret(tables)?,
        None => return Err("its secret is missing".to_owned()),
    };
    let id = |key: &[u8]| {
        read(key)?.map(|bytes| record::id(&bytes).map_err(|e| e.to_string())).transpose()
    };
    let kept = kept(tables)?;
    horizon.moved(id(meta::HORIZON)?, &kept, &[]);
    let (payments, newest) = count(tables)?;
    let due = number(meta::DUE_FLOOR)?.map_or(now, |ms| Timestamp::from_ms(ms.cast_signed()));
    let marks = Marks { payment: id(meta::FLOOR)?, due, newest, derived: id(meta::DERIVED)? };
    Ok(Opened { secret, sequence, payments, marks })
}

fn make_secret(tables: &dyn Tables) -> Result<StoreSecret, String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| format!("no randomness: {error}"))?;
    let mut batch = Batch::default();
    batch.put(Table::Meta, meta::SECRET, bytes);
    batch.put(Table::Meta, meta::HASHES, meta::SIPHASH_2_4_128);
    tables.write(&batch).map_err(|error| error.to_string())?;
    Ok(StoreSecret::new(bytes))
}

/// Payments below the horizon that stay.
fn kept(tables: &dyn Tables) -> Result<Vec<PaymentId>, String> {
    let mut kept = Vec::new();
    let all = Span::forwards(Bound::Unbounded, Bound::Unbounded);
    let scanned = tables.scan(Table::Kept, all, &mut |key, _| {
        kept.push(record::id(key));
        ControlFlow::Continue(())
    });
    scanned.map_err(|error| error.to_string())?;
    kept.into_iter().collect::<Result<_, _>>().map_err(|error| error.to_string())
}

/// The number of payments as last noted, and those that are newer than that note.
fn count(tables: &dyn Tables) -> Result<(u64, Option<PaymentId>), String> {
    let text = |error: TablesError| error.to_string();
    let (from, mut payments, mut newest) =
        match tables.get(Table::Meta, meta::COUNTED).map_err(text)? {
            Some(bytes) if bytes.len() == 24 => {
                let (id, number) = bytes.split_at(16);
                let payments = record::number(number).map_err(|e| e.to_string())?;
                (Bound::Excluded(id.to_vec()), payments, record::id(id).ok())
            }
            Some(_) => return Err("its count of payments has not 24 bytes".to_owned()),
            None => (Bound::Unbounded, 0, None),
        };
    let span = Span::forwards(from, Bound::Unbounded);
    tables
        .scan(Table::Payment, span, &mut |key, _| {
            payments += 1;
            newest = record::id(key).ok().max(newest);
            ControlFlow::Continue(())
        })
        .map_err(text)?;
    Ok((payments, newest))
}

impl Embedded {
    /// Hands a job to the writer in one step, so that it runs to its end whatever the caller does.
    pub(super) fn send(&self, job: Job) -> Result<(), StoreError> {
        gather::send(&self.jobs, job)
    }

    /// A page reads up to 10,000 payments: not on a thread that serves requests.
    async fn read_page<P: Send + 'static>(
        &self,
        read: impl FnOnce(&Shared) -> Result<P, StoreError> + Send + 'static,
    ) -> Result<P, StoreError> {
        let shared = Arc::clone(&self.shared);
        // Held by the thread: it goes on reading when nobody waits for it any more.
        let turn = Arc::clone(&self.lists).acquire_owned().await;
        let turn = turn.map_err(|_closed| StoreError::Unavailable)?;
        tokio::task::spawn_blocking(move || (read(&shared), turn))
            .await
            .map(|(page, _turn)| page)
            .unwrap_or(Err(StoreError::Unavailable))
    }
}

#[async_trait]
impl Store for Embedded {
    fn secret(&self) -> &StoreSecret {
        &self.shared.secret
    }

    async fn commit(&self, commits: Vec<Commit>) -> Answers {
        let count = commits.len();
        let (answer, answered) = oneshot::channel::<Answers>();
        let all = |error: StoreError| vec![Err(error); count];
        if let Err(error) = gather::hand_in(&self.jobs, commits, answer) {
            return all(error);
        }
        answered.await.unwrap_or_else(|_| all(StoreError::Unavailable))
    }

    async fn remembered(
        &self,
        key: KeyHash,
        now: Timestamp,
    ) -> Result<Option<Remembered>, StoreError> {
        self.shared.remembered(key, now)
    }

    async fn get(&self, id: PaymentId) -> Result<Option<Arc<Versioned>>, StoreError> {
        self.shared.get(id)
    }

    fn newest(&self) -> Option<PaymentId> {
        self.newest
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        self.read_page(move |shared| lists::list(shared, &query)).await
    }

    async fn deliveries(&self, query: DeliveryQuery) -> Result<DeliveryPage, StoreError> {
        self.read_page(move |shared| lists::deliveries(shared, &query)).await
    }

    async fn draw_number(&self, reservation: &str) -> Result<Draw, StoreError> {
        let key = self.shared.draws_name(reservation);
        self.counters.draw(key, || {
            let stored = self.shared.read(Table::Counter, &key)?;
            stored.map_or(Ok(0), |bytes| record::number(&bytes))
        })
    }

    async fn due(
        &self,
        work: Work,
        until: Timestamp,
        max: usize,
    ) -> Result<Vec<Lease>, StoreError> {
        if self.shared.health() != Health::Good {
            // What came of the work could not be stored.
            return Ok(Vec::new());
        }
        if let Some((from, to)) = self.shared.book.unread(until) {
            let (answer, answered) = oneshot::channel();
            self.send(Job::Load { from, to, answer })?;
            answered.await.map_err(|_| StoreError::Unavailable)??;
        }
        let leased = self.shared.book.lease(work, until, max);
        let from = || Arc::clone(&self.shared.book) as Arc<dyn Releases>;
        Ok(leased.into_iter().map(|id| Lease::new(id, work, from())).collect())
    }

    fn next_due(&self, work: Work) -> Option<Timestamp> {
        self.shared.book.next_due(work)
    }

    fn changed(&self, work: Work) -> Arc<Notify> {
        self.shared.book.changed(work)
    }

    fn backlog(&self, work: Work) -> Backlog {
        self.shared.book.backlog(work)
    }

    fn health(&self) -> Health {
        self.shared.health()
    }

    async fn failed(&self) {
        let mut failed = self.shared.failed.subscribe();
        // Ends only with the sender, which lives as long as `self`.
        let _ = failed.wait_for(|failed| *failed).await;
    }

    async fn close(&self) {
        self.janitor.stop();
        let (answer, answered) = oneshot::channel();
        if self.jobs.send(Job::Close { answer }).await.is_ok() {
            let _ = answered.await;
        }
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            let _ = tokio::task::spawn_blocking(move || writer.join()).await;
        }
    }
}
