//! What the embedded store asks of an engine: sorted tables, and batches that are atomic and synced.

use std::ops::{Bound, ControlFlow};

/// Each table is sorted by its keys' bytes; multi-byte numbers in keys are big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// Payment id → terms and plan. Written once.
    Payment,
    /// Payment id → what changed since.
    State,
    /// Idempotency key of a create → request hash, payment id.
    Key,
    /// Hash of user or reservation, inverted payment id → nothing: newest first.
    Index,
    /// Idempotency key of any other call → its reply.
    Reply,
    /// When a reply lapses, its key → nothing.
    Lapse,
    /// Due time, payment id → nothing, for payments that wait longer than the scan window.
    Due,
    /// Payment id → nothing, for payments with a dead delivery.
    Dead,
    /// Hash of a reservation → how many draws it had; goes with the reservation's last payment.
    Counter,
    /// Secret, sequence, marks.
    Meta,
}

impl Table {
    pub const ALL: [Self; 10] = [
        Self::Payment,
        Self::State,
        Self::Key,
        Self::Index,
        Self::Reply,
        Self::Lapse,
        Self::Due,
        Self::Dead,
        Self::Counter,
        Self::Meta,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Payment => "payment",
            Self::State => "state",
            Self::Key => "key",
            Self::Index => "index",
            Self::Reply => "reply",
            Self::Lapse => "lapse",
            Self::Due => "due",
            Self::Dead => "dead",
            Self::Counter => "counter",
            Self::Meta => "meta",
        }
    }
}

/// Why an engine could not do as asked. The text is for logs, never for callers.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TablesError(pub String);

#[derive(Debug, Default)]
pub struct Batch(pub Vec<(Table, Vec<u8>, Option<Vec<u8>>)>);

impl Batch {
    pub fn with_capacity(entries: usize) -> Self {
        Self(Vec::with_capacity(entries))
    }

    pub fn put(&mut self, table: Table, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.0.push((table, key.into(), Some(value.into())));
    }

    pub fn delete(&mut self, table: Table, key: impl Into<Vec<u8>>) {
        self.0.push((table, key.into(), None));
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A range of keys, from whichever end.
#[derive(Clone, Debug)]
pub struct Span {
    pub from: Bound<Vec<u8>>,
    pub to: Bound<Vec<u8>>,
    pub backwards: bool,
}

impl Span {
    pub const fn forwards(from: Bound<Vec<u8>>, to: Bound<Vec<u8>>) -> Self {
        Self { from, to, backwards: false }
    }
}

/// Sees each key and value in turn, until it breaks.
pub type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>;

pub trait Tables: Send + Sync + 'static {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError>;

    fn scan(&self, table: Table, span: Span, visit: Visit<'_>) -> Result<(), TablesError>;

    /// Atomic, and on the disk when it returns. After an error nothing may be written any more.
    fn write(&self, batch: Batch) -> Result<(), TablesError>;

    /// Bytes left on the disk; `None` where there is no disk.
    fn free_space(&self) -> Option<u64>;

    /// Notes durably that all commits up to `sequence` are on the disk, apart from the tables
    /// themselves, so that their loss can be noticed.
    fn note_high_water(&self, sequence: u64) -> Result<(), TablesError>;

    /// The last such note.
    fn high_water(&self) -> Result<u64, TablesError>;
}
