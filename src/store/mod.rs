//! Where payments live. The trait is shaped by use: one commit makes a transition and everything it
//! owes durable together, and is answered only when it is.

mod book;
mod disk;
mod draws;
mod embedded;
#[cfg(feature = "faults")]
mod faults;
mod gather;
mod horizon;
mod janitor;
mod judge;
mod known;
mod lists;
mod marks;
mod memory;
mod open;
mod priority;
mod record;
mod shared;
mod stage;
mod tables;
mod tail;
mod writeback;
mod writer;

#[cfg(test)]
mod conformance;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;

pub use self::{
    book::{Lease, Releases},
    draws::Draw,
    embedded::{Embedded, Options},
    gather::Gatherer,
    lists::{DeliveryPage, DeliveryQuery, Direction, Found, ListQuery, Page, Reached},
    shared::Retention,
};
use crate::domain::{
    ids::{Idempotency, KeyHash, PaymentId, RequestHash, StoreSecret},
    payment::{Payment, Terms},
    time::Timestamp,
};

/// Raised by every write of a payment's record; 0 is the record as it was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub u64);

/// A payment with the revision that a commit on it must name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    pub payment: Payment,
    pub revision: Revision,
}

/// What is stored as one: all of it or nothing.
#[derive(Debug)]
pub struct Commit {
    pub change: Option<Change>,
    /// The reply to a request with a key, given back to every repeat of it.
    pub reply: Option<Reply>,
}

#[derive(Debug)]
pub enum Change {
    /// A payment on these terms; `draw` is the reservation's number that its plan was drawn with.
    Create { terms: Arc<Terms>, draw: Option<Draw> },
    /// Boxed: commits are moved from hand to hand, and most of them create.
    Update(Box<Update>),
}

/// Refused unless the stored revision is still `before`'s.
#[derive(Debug)]
pub struct Update {
    pub before: Arc<Versioned>,
    pub after: Payment,
}

impl Change {
    pub fn update(before: Arc<Versioned>, after: Payment) -> Self {
        Self::Update(Box::new(Update { before, after }))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub idempotency: Idempotency,
    pub bytes: Vec<u8>,
    pub at: Timestamp,
}

/// What is known under an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remembered {
    /// The create of this payment: its reply is made again from what never changes.
    Created {
        request: RequestHash,
        id: PaymentId,
    },
    Replied {
        request: RequestHash,
        bytes: Vec<u8>,
    },
}

impl Remembered {
    pub const fn request(&self) -> RequestHash {
        match self {
            Self::Created { request, .. } | Self::Replied { request, .. } => *request,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Committed {
    Done(Revision),
    /// The key is known, with the same request: nothing was stored.
    Replayed(Remembered),
}

/// One a commit, in their order.
pub type Answers = Vec<Result<Committed, StoreError>>;

/// Kinds of work that a payment can wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    /// The payment changes by itself.
    Wake,
    Event,
    Webhook,
    DeadLetter,
}

impl Work {
    pub const ALL: [Self; 4] = [Self::Wake, Self::Event, Self::Webhook, Self::DeadLetter];
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("the payment has changed meanwhile")]
    Conflict,
    #[error("the idempotency key was used with a different request")]
    KeyConflict,
    #[error("the store's disk is nearly full")]
    Full,
    #[error("more is waiting than the store takes")]
    Overloaded,
    #[error("the store takes no more commits")]
    Unavailable,
    #[error("the store returned what it should not hold: {0}")]
    Corrupt(String),
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{}: is in use by another process", path.display())]
    Locked { path: PathBuf },
    #[error("{}: has format {found}; this version reads up to {known}: use the version that wrote it, or newer", path.display())]
    NewerFormat { path: PathBuf, found: u32, known: u32 },
    #[error("{}: is damaged: {why}", path.display())]
    Corrupt { path: PathBuf, why: String },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Good,
    /// Reads go on, writes are refused.
    Full,
    /// A commit failed: the process is about to end.
    Failed,
}

/// What is owed on a channel, attempts under way included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    pub pending: usize,
    /// The oldest due time, where anything is owed.
    pub oldest: Option<Timestamp>,
}

#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Keys every hash that is stored.
    fn secret(&self) -> &StoreSecret;

    /// Each commit by itself, all made durable together. Runs to its end also
    /// when nobody waits for it.
    async fn commit(&self, commits: Vec<Commit>) -> Answers;

    /// What is known under a key that has not lapsed at `now`.
    async fn remembered(
        &self,
        key: KeyHash,
        now: Timestamp,
    ) -> Result<Option<Remembered>, StoreError>;

    /// Shared: whoever wakes a payment, or attempts its deliveries, finds the same one.
    async fn get(&self, id: PaymentId) -> Result<Option<Arc<Versioned>>, StoreError>;

    /// The newest payment when the store was opened.
    fn newest(&self) -> Option<PaymentId>;

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError>;

    async fn deliveries(&self, query: DeliveryQuery) -> Result<DeliveryPage, StoreError>;

    /// The next number of a reservation's draws, each given once.
    async fn draw_number(&self, reservation: &str) -> Result<Draw, StoreError>;

    /// Payments whose work is due, at most `max`, each leased until its lease is dropped.
    async fn due(&self, work: Work, until: Timestamp, max: usize)
    -> Result<Vec<Lease>, StoreError>;

    /// When to ask again, as far as is known: a hint, never the truth.
    fn next_due(&self, work: Work) -> Option<Timestamp>;

    /// Wakes when `next_due` may have come closer.
    fn changed(&self, work: Work) -> Arc<tokio::sync::Notify>;

    fn backlog(&self, work: Work) -> Backlog;

    fn health(&self) -> Health;

    /// Resolves when a commit has failed and nothing more will be acknowledged.
    async fn failed(&self);

    /// Lets what was handed in run to its end, then closes.
    async fn close(&self);
}

/// Convenience for the many callers with a single commit.
pub async fn commit_one(store: &dyn Store, commit: Commit) -> Result<Committed, StoreError> {
    store.commit(vec![commit]).await.pop().expect("one answer a commit")
}

/// What cannot be read is tried again after this: it may be the disk's mood, and it may be damage.
pub const UNREADABLE_MS: u64 = 60_000;

impl Lease {
    /// The payment that is leased, where there still is one. A record that cannot be read is put off by
    /// itself, so that it does not hold up what is due beside it.
    pub async fn read(
        self,
        store: &dyn Store,
        now: Timestamp,
    ) -> Result<Option<(Arc<Versioned>, Self)>, StoreError> {
        match store.get(self.id).await {
            Ok(Some(stored)) => Ok(Some((stored, self))),
            Ok(None) => Ok(None),
            Err(StoreError::Corrupt(why)) => {
                let id = self.id.intent();
                tracing::error!(payment = id, why, "a due payment cannot be read; put off");
                self.put_off(now.plus_ms(UNREADABLE_MS));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Called with the size of each batch and how long it took.
pub type OnCommit = Arc<dyn Fn(usize, std::time::Duration) + Send + Sync>;

/// Where a store lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In this folder, which is made where it is missing.
    Folder(PathBuf),
    /// Nowhere: gone with the process.
    Memory,
}

pub fn open(location: &Location, options: Options) -> Result<Arc<Embedded>, OpenError> {
    let horizon = Arc::new(horizon::Horizon::default());
    let (tables, path): (Arc<dyn tables::Tables>, _) = match location {
        Location::Folder(path) => (Arc::new(disk::Disk::open(path, &horizon)?), path.as_path()),
        Location::Memory => (Arc::new(memory::Memory::default()), Path::new("memory:")),
    };
    Embedded::start(tables, horizon, path, options)
}
