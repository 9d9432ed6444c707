//! What the embedded store asks of an engine: sorted tables, and batches that are atomic and synced.

use std::ops::{Bound, ControlFlow};

use super::horizon::Horizon;

/// Each table is sorted by its keys' bytes; multi-byte numbers in keys are big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// Payment id → terms and plan. Written once.
    Payment,
    /// Payment id → what changed since.
    State,
    /// Idempotency key of a create → request hash, payment id. Derived from `Payment`.
    Key,
    /// Hash of user or reservation, inverted payment id → nothing: newest first. Derived from `Payment`.
    Index,
    /// Idempotency key of any other call → its reply.
    Reply,
    /// When a reply lapses, its key → nothing.
    Lapse,
    /// Due time, payment id → what it waits for, for payments that wait longer than the scan window.
    Due,
    /// Payment id → nothing, for payments with a dead delivery.
    Dead,
    /// Hash of a reservation → how many draws it had; goes with the reservation's last payment.
    Counter,
    /// Secret, sequence, marks.
    Meta,
    /// Payment id → nothing, for payments below the horizon that stay.
    Kept,
}

impl Table {
    pub const ALL: [Self; 11] = [
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
        Self::Kept,
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
            Self::Kept => "kept",
        }
    }
}

/// Tables of which nothing is in a commit on disk: what they hold follows from `Payment`, and is brought in.
pub const DERIVED: [Table; 2] = [Table::Key, Table::Index];

/// Tables of which an engine drops what belongs to payments below the horizon.
pub const DROPPED: [Table; 4] = [Table::Payment, Table::State, Table::Key, Table::Index];

/// Why an engine could not do as asked. The text is for logs, never for callers.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TablesError(pub String);

/// What is written as one. All keys and values lie in one buffer, each behind the one before: a batch has
/// thousands of them.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    table: Table,
    key_end: usize,
    value_end: usize,
    is_delete: bool,
}

impl Batch {
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.entries.clear();
    }

    pub fn put(&mut self, table: Table, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        self.put_with(table, key, |bytes| bytes.extend_from_slice(value.as_ref()));
    }

    /// Where `value` appends the value's bytes.
    pub fn put_with(
        &mut self,
        table: Table,
        key: impl AsRef<[u8]>,
        value: impl FnOnce(&mut Vec<u8>),
    ) {
        self.bytes.extend_from_slice(key.as_ref());
        let key_end = self.bytes.len();
        value(&mut self.bytes);
        let value_end = self.bytes.len();
        self.entries.push(Entry { table, key_end, value_end, is_delete: false });
    }

    pub fn delete(&mut self, table: Table, key: impl AsRef<[u8]>) {
        self.bytes.extend_from_slice(key.as_ref());
        let end = self.bytes.len();
        self.entries.push(Entry { table, key_end: end, value_end: end, is_delete: true });
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Table, key, and the value that is put there; `None`: whatever is there is deleted. Of two that
    /// name the same key the later holds.
    pub fn entries(&self) -> impl DoubleEndedIterator<Item = (Table, &[u8], Option<&[u8]>)> {
        (0..self.entries.len()).map(|i| {
            let Entry { table, key_end, value_end, is_delete } = self.entries[i];
            let begin = i.checked_sub(1).map_or(0, |before| self.entries[before].value_end);
            let value = (!is_delete).then(|| &self.bytes[key_end..value_end]);
            (table, &self.bytes[begin..key_end], value)
        })
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

/// Keys and values, by rising key, no key twice.
pub type Rows<'a> = &'a mut dyn Iterator<Item = (&'a [u8], &'a [u8])>;

pub trait Tables: Send + Sync + 'static {
    /// Where they are, syncs are better few, and rows that no commit needs are brought in later, many at a
    /// time.
    fn are_on_disk(&self) -> bool;

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError>;

    fn scan(&self, table: Table, span: Span, visit: Visit<'_>) -> Result<(), TablesError>;

    /// Atomic, and on the disk when it returns. After an error nothing may be written any more.
    fn write(&self, batch: &Batch) -> Result<(), TablesError>;

    /// Brings rows in beside the commits: on the disk when it returns. After an error none of them is
    /// there, and the tables are as good as before.
    fn ingest(&self, table: Table, rows: Rows<'_>) -> Result<(), TablesError>;

    /// What payments below the horizon have left in the tables of [`DROPPED`] is never asked for again:
    /// gives back its space, where that is cheap by now.
    fn reclaim(&self, horizon: &Horizon) -> Result<(), TablesError>;

    /// Bytes left on the disk; `None` where there is no disk.
    fn free_space(&self) -> Option<u64>;

    /// Notes durably that all commits up to `sequence` are on the disk, apart from the tables
    /// themselves, so that their loss can be noticed.
    fn note_high_water(&self, sequence: u64) -> Result<(), TablesError>;

    /// The last such note.
    fn high_water(&self) -> Result<u64, TablesError>;
}
