//! Which keys `Key` may have: most creates bring a fresh one, and to look it up asks the filter of every file that it
//! might be in. Filters in memory say no at a tenth of the price.
//!
//! They are made again at every start, by a walk through the table. Until that is over, and where one of them says
//! yes, the table itself is asked; so it is for good where the walk meets rows that it cannot read.

use std::{
    ops::{Bound, ControlFlow},
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU8, Ordering},
    },
};

use fastbloom::AtomicBloomFilter;

use super::{
    horizon::Horizon,
    record,
    tables::{Span, Table, Tables, TablesError},
};
use crate::domain::ids::{KeyHash, PaymentId};

/// Of the first filter; each further one has room for as many as all before it.
const KEYS_MIN: usize = 1 << 18;
/// So that what retention drops leaves memory by parts. What was learned at the start does so with the last payment from
/// before.
const KEYS_MAX: usize = 1 << 22;
/// With these a full filter says yes to one fresh key in two hundred.
const BITS_PER_KEY: usize = 12;
const HASHES: u32 = 5;

pub struct KnownKeys {
    filters: RwLock<Vec<Filter>>,
    /// A [`Knowledge`].
    knowledge: AtomicU8,
    /// Where the walk goes on.
    ahead: Mutex<Bound<Vec<u8>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Knowledge {
    Growing,
    /// What the filters do not have is not in the table.
    Whole,
    /// It cannot become whole: the table has rows that cannot be read.
    Unreadable,
}

impl Default for KnownKeys {
    fn default() -> Self {
        Self {
            filters: RwLock::default(),
            knowledge: AtomicU8::new(Knowledge::Growing as u8),
            ahead: Mutex::new(Bound::Unbounded),
        }
    }
}

struct Filter {
    bits: Arc<AtomicBloomFilter>,
    keys: usize,
    room: usize,
    oldest: PaymentId,
    newest: PaymentId,
}

impl Filter {
    fn with_room(room: usize) -> Self {
        let bits = AtomicBloomFilter::with_num_bits(room * BITS_PER_KEY).hashes(HASHES);
        Self {
            bits: Arc::new(bits),
            keys: 0,
            room,
            oldest: PaymentId::MAX,
            newest: PaymentId::default(),
        }
    }
}

/// Hashed with our secret: any part of it is as good as a hash.
fn hash(key: KeyHash) -> u64 {
    let (head, _) = key.0.split_at(8);
    u64::from_be_bytes(head.try_into().expect("8 of 16 bytes"))
}

impl KnownKeys {
    fn filters(&self) -> RwLockReadGuard<'_, Vec<Filter>> {
        self.filters.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn filters_mut(&self) -> RwLockWriteGuard<'_, Vec<Filter>> {
        self.filters.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn is(&self, knowledge: Knowledge) -> bool {
        self.knowledge.load(Ordering::Acquire) == knowledge as u8
    }

    fn set(&self, knowledge: Knowledge) {
        self.knowledge.store(knowledge as u8, Ordering::Release);
    }

    /// Whether the table need be asked.
    pub fn may_have(&self, key: KeyHash) -> bool {
        let hash = hash(key);
        !self.is(Knowledge::Whole)
            || self.filters().iter().any(|filter| filter.bits.contains_hash(hash))
    }

    /// Reads some more of the table. False: that was not all. After an error there is no use in more.
    pub fn learn(
        &self,
        tables: &dyn Tables,
        horizon: &Horizon,
        rows_max: usize,
    ) -> Result<bool, TablesError> {
        if !self.is(Knowledge::Growing) {
            return Ok(true);
        }
        let is_over = self.walk(tables, horizon, rows_max).inspect_err(|_| {
            self.set(Knowledge::Unreadable);
            self.filters_mut().clear();
        })?;
        if is_over {
            self.set(Knowledge::Whole);
        }
        Ok(is_over)
    }

    fn walk(
        &self,
        tables: &dyn Tables,
        horizon: &Horizon,
        rows_max: usize,
    ) -> Result<bool, TablesError> {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut rows, mut last, mut keys) = (0, Vec::new(), Vec::new());
        tables.scan(
            Table::Key,
            Span::forwards(ahead.clone(), Bound::Unbounded),
            &mut |key, row| {
                // Where the row cannot be read, its key is never free.
                let id = record::read_created(row).map_or(PaymentId::MAX, |(_, id)| id);
                let known = key.try_into().ok().filter(|_| horizon.has(id));
                keys.extend(known.map(|key| (KeyHash(key), id)));
                last.clear();
                last.extend_from_slice(key);
                rows += 1;
                if rows == rows_max { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        )?;
        self.add(keys);
        *ahead = Bound::Excluded(last);
        Ok(rows < rows_max)
    }

    /// Keys of the table, and whose they are. To be called before anybody relies on the table for them, and beside
    /// nothing else that changes filters.
    pub fn add(&self, keys: impl IntoIterator<Item = (KeyHash, PaymentId)>) {
        if self.is(Knowledge::Unreadable) {
            return;
        }
        let mut keys = keys.into_iter().peekable();
        while keys.peek().is_some() {
            let (bits, room) = self.filling();
            let (mut count, mut oldest, mut newest) = (0, PaymentId::MAX, PaymentId::default());
            for (key, id) in keys.by_ref().take(room) {
                bits.insert_hash(hash(key));
                count += 1;
                (oldest, newest) = (oldest.min(id), newest.max(id));
            }
            let mut filters = self.filters_mut();
            let last = filters.last_mut().expect("there is the one with room");
            last.keys += count;
            (last.oldest, last.newest) = (last.oldest.min(oldest), last.newest.max(newest));
        }
    }

    /// The filter that is filled just now, and how many keys it has room for.
    fn filling(&self) -> (Arc<AtomicBloomFilter>, usize) {
        let all: usize = {
            let filters = self.filters();
            if let Some(last) = filters.last().filter(|last| last.keys < last.room) {
                return (Arc::clone(&last.bits), last.room - last.keys);
            }
            filters.iter().map(|filter| filter.keys).sum()
        };
        // Made without the lock, which those who commit wait for.
        let next = Filter::with_room(all.clamp(KEYS_MIN, KEYS_MAX));
        let filling = (Arc::clone(&next.bits), next.room);
        self.filters_mut().push(next);
        filling
    }

    /// Drops the filters whose payments are all gone: their keys are free.
    pub fn forget(&self, horizon: &Horizon) {
        let is_gone =
            |filter: &mut Filter| filter.keys > 0 && horizon.is_gone(filter.oldest, filter.newest);
        let gone: Vec<_> = self.filters_mut().extract_if(.., is_gone).collect();
        // Freed without the lock.
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::{ids::RequestHash, time::Timestamp},
        store::{
            memory::Memory,
            tables::{Batch, Rows, Visit},
        },
    };

    fn id(n: u128) -> PaymentId {
        PaymentId::from_parts(Timestamp::from_ms(1_000), n)
    }

    /// As if hashed.
    fn key(n: u128) -> KeyHash {
        KeyHash(n.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835).to_be_bytes())
    }

    fn add(known: &KnownKeys, ns: std::ops::Range<u32>) {
        known.add(ns.map(|n| (key(n.into()), id(n.into()))));
    }

    fn known_of(known: &KnownKeys, ns: std::ops::Range<u32>) -> usize {
        ns.filter(|n| known.may_have(key((*n).into()))).count()
    }

    fn whole() -> KnownKeys {
        let (known, tables) = (KnownKeys::default(), Memory::default());
        assert!(known.learn(&tables, &Horizon::default(), 1).unwrap());
        known
    }

    #[test]
    fn what_was_added_is_known_and_most_else_is_not() {
        let known = whole();
        assert_eq!(known_of(&known, 0..1_000), 0);
        let full = u32::try_from(KEYS_MIN).unwrap();
        add(&known, 0..full - 1);
        add(&known, full - 1..full + 10);
        assert_eq!(known.filters().len(), 2, "what has no room in one is in the next");
        assert_eq!(known_of(&known, 0..full + 10), KEYS_MIN + 10);
        let guessed = known_of(&known, 2 * full..3 * full);
        assert!(guessed < KEYS_MIN / 150, "{guessed} of {KEYS_MIN}");
    }

    #[test]
    fn what_is_in_the_table_is_learned_step_by_step() {
        let tables = Memory::default();
        let mut batch = Batch::default();
        for n in 0..10 {
            let row = record::created(RequestHash([1; 16]), id(n));
            batch.put(Table::Key, key(n).0, row);
        }
        batch.put(Table::Key, key(10).0, b"no row of ours");
        tables.write(&batch).unwrap();
        let horizon = Horizon::default();
        horizon.moved(Some(id(5)), &[id(3)], &[]);
        let known = KnownKeys::default();
        for step in [false, false, false, true] {
            assert_eq!(known_of(&known, 0..20), 20, "until it is over all may be there");
            assert_eq!(known.learn(&tables, &horizon, 3).unwrap(), step);
        }
        let there: Vec<_> = (0..20).filter(|n| known.may_have(key(*n))).collect();
        assert_eq!(there, [3, 5, 6, 7, 8, 9, 10], "what is gone is as good as not there");
        known.forget(&horizon);
        assert!(known.may_have(key(10)));
    }

    /// Gives so many rows out, and no more.
    struct Damaged(Memory, usize);

    impl Tables for Damaged {
        fn are_on_disk(&self) -> bool {
            true
        }

        fn scan(&self, table: Table, span: Span, visit: Visit<'_>) -> Result<(), TablesError> {
            let mut left = self.1;
            self.0.scan(table, span, &mut |key, row| {
                if left == 0 {
                    return ControlFlow::Break(());
                }
                left -= 1;
                visit(key, row)
            })?;
            if left == 0 { Err(TablesError("a damaged block".to_owned())) } else { Ok(()) }
        }

        fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
            self.0.get(table, key)
        }

        fn write(&self, batch: &Batch) -> Result<(), TablesError> {
            self.0.write(batch)
        }

        fn ingest(&self, table: Table, rows: Rows<'_>) -> Result<(), TablesError> {
            self.0.ingest(table, rows)
        }

        fn reclaim(&self, horizon: &Horizon) -> Result<(), TablesError> {
            self.0.reclaim(horizon)
        }

        fn free_space(&self) -> Option<u64> {
            self.0.free_space()
        }

        fn note_high_water(&self, sequence: u64) -> Result<(), TablesError> {
            self.0.note_high_water(sequence)
        }

        fn high_water(&self) -> Result<u64, TablesError> {
            self.0.high_water()
        }
    }

    #[test]
    fn where_rows_cannot_be_read_all_may_be_there() {
        let memory = Memory::default();
        let mut batch = Batch::default();
        for n in 0..10 {
            batch.put(Table::Key, key(n).0, record::created(RequestHash([1; 16]), id(n)));
        }
        memory.write(&batch).unwrap();
        let (tables, known) = (Damaged(memory, 5), KnownKeys::default());
        let horizon = Horizon::default();
        assert!(known.learn(&tables, &horizon, 100).is_err());
        assert!(known.learn(&tables, &horizon, 100).unwrap(), "no use in more");
        add(&known, 20..30);
        assert!(known.filters().is_empty());
        assert_eq!(known_of(&known, 0..100), 100);
    }

    #[test]
    fn a_filter_goes_with_the_last_of_its_payments() {
        let known = whole();
        add(&known, 10..20);
        let horizon = Horizon::default();
        horizon.moved(Some(id(20)), &[id(15)], &[]);
        known.forget(&horizon);
        assert_eq!(known_of(&known, 10..20), 10, "one is kept");
        horizon.moved(None, &[], &[id(15)]);
        known.forget(&horizon);
        assert_eq!(known_of(&known, 10..20), 0);
        add(&known, 20..30);
        assert_eq!(known_of(&known, 20..30), 10);
    }
}
