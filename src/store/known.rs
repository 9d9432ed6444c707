//! Which keys `Key` may have: most creates bring a fresh one, and to look it up asks the filter of every file that it
//! might be in. Filters in memory say no at a tenth of the price.
//!
//! They are made again at every start, by a walk through the table. Until that is over, and where one of them says
//! yes, the table itself is asked.

use std::{
    ops::{Bound, ControlFlow},
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
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
/// So that what retention drops leaves memory by parts.
const KEYS_MAX: usize = 1 << 22;
/// With these a full filter says yes to one fresh key in two hundred.
const BITS_PER_KEY: usize = 12;
const HASHES: u32 = 5;

pub struct KnownKeys {
    filters: RwLock<Vec<Filter>>,
    /// The walk has come to the end: what the filters do not have is not in the table.
    are_whole: AtomicBool,
    /// Where the walk goes on.
    ahead: Mutex<Bound<Vec<u8>>>,
}

impl Default for KnownKeys {
    fn default() -> Self {
        let ahead = Mutex::new(Bound::Unbounded);
        Self { filters: RwLock::default(), are_whole: AtomicBool::new(false), ahead }
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

    /// Whether the table need be asked.
    pub fn may_have(&self, key: KeyHash) -> bool {
        let hash = hash(key);
        !self.are_whole() || self.filters().iter().any(|filter| filter.bits.contains_hash(hash))
    }

    fn are_whole(&self) -> bool {
        self.are_whole.load(Ordering::Acquire)
    }

    /// Reads some more of the table. False: that was not all.
    pub fn learn(
        &self,
        tables: &dyn Tables,
        horizon: &Horizon,
        rows_max: usize,
    ) -> Result<bool, TablesError> {
        if self.are_whole() {
            return Ok(true);
        }
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut rows, mut last, mut keys) = (0, Vec::new(), Vec::new());
        tables.scan(
            Table::Key,
            Span::forwards(ahead.clone(), Bound::Unbounded),
            &mut |key, row| {
                // Where the row cannot be read, its key is never free.
                let id = record::read_created(row).map_or(PaymentId::MAX, |(_, id)| id);
                keys.extend(
                    key.try_into().ok().filter(|_| horizon.has(id)).map(|key| (KeyHash(key), id)),
                );
                last.clear();
                last.extend_from_slice(key);
                rows += 1;
                if rows == rows_max { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        )?;
        self.add(keys.into_iter());
        if rows == rows_max {
            *ahead = Bound::Excluded(last);
        } else {
            self.are_whole.store(true, Ordering::Release);
        }
        Ok(self.are_whole())
    }

    /// Keys of the table, and whose they are. To be called before anybody relies on the table for them, by one
    /// thread at a time.
    pub fn add(&self, keys: impl Iterator<Item = (KeyHash, PaymentId)>) {
        let mut keys = keys.peekable();
        while keys.peek().is_some() {
            let (bits, room) = self.room();
            let (mut count, mut oldest, mut newest) = (0, PaymentId::MAX, PaymentId::default());
            for (key, id) in keys.by_ref().take(room) {
                bits.insert_hash(hash(key));
                count += 1;
                (oldest, newest) = (oldest.min(id), newest.max(id));
            }
            let mut filters = self.filters.write().unwrap_or_else(PoisonError::into_inner);
            let last = filters.last_mut().expect("there is the one with room");
            last.keys += count;
            (last.oldest, last.newest) = (last.oldest.min(oldest), last.newest.max(newest));
        }
    }

    /// The filter that is filled just now, and how many keys it has room for.
    fn room(&self) -> (Arc<AtomicBloomFilter>, usize) {
        let all: usize = {
            let filters = self.filters();
            if let Some(last) = filters.last().filter(|last| last.keys < last.room) {
                return (Arc::clone(&last.bits), last.room - last.keys);
            }
            filters.iter().map(|filter| filter.keys).sum()
        };
        // Made without the lock, which those who commit wait for.
        let next = Filter::with_room(all.clamp(KEYS_MIN, KEYS_MAX));
        let room = (Arc::clone(&next.bits), next.room);
        self.filters.write().unwrap_or_else(PoisonError::into_inner).push(next);
        room
    }

    /// Drops the filters whose payments are all gone: their keys are free.
    pub fn forget(&self, horizon: &Horizon) {
        let is_gone = |filter: &Filter| horizon.is_gone(filter.oldest, filter.newest);
        if self.filters().iter().any(is_gone) {
            let mut filters = self.filters.write().unwrap_or_else(PoisonError::into_inner);
            filters.retain(|filter| !is_gone(filter));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::{ids::RequestHash, time::Timestamp},
        store::{memory::Memory, tables::Batch},
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
