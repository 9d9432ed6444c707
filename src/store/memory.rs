//! Tables in memory, for tests and for runs that need not survive.

use std::{
    collections::BTreeMap,
    ops::{Bound, ControlFlow},
    sync::{PoisonError, RwLock},
};

use super::{
    horizon::Horizon,
    record,
    tables::{Batch, DROPPED, Rows, Span, Table, Tables, TablesError, Visit},
};

/// Rows that are worked on without letting others in between.
const AT_A_TIME: usize = 1_000;

type Sorted = BTreeMap<Key, Value>;
type Value = Box<[u8]>;

/// Keys are short, and lie where the map looks for them, instead of behind a pointer each.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// What is missing is zero: so they are sorted as the keys are, and of two that differ in nothing else
    /// the shorter one comes first.
    bytes: [u8; KEY_BYTES],
    length: u8,
}

/// The longest key of a table: a moment or a name, and an id.
const KEY_BYTES: usize = 24;

impl Key {
    fn new(key: &[u8]) -> Self {
        let mut bytes = [0; KEY_BYTES];
        bytes[..key.len()].copy_from_slice(key);
        Self { bytes, length: u8::try_from(key.len()).expect("it fits into the bytes") }
    }
}

impl AsRef<[u8]> for Key {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

#[derive(Default)]
pub struct Memory(RwLock<[Sorted; Table::ALL.len()]>);

impl Memory {
    /// Looks at the next rows; the last one it has looked at.
    fn reclaim_some(&self, table: Table, from: Bound<Key>, horizon: &Horizon) -> Option<Key> {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let rows = &mut all[table as usize];
        let looked = || rows.range((from, Bound::Unbounded)).take(AT_A_TIME);
        let is_gone = |(key, value): &(&Key, &Value)| {
            record::payment_of(table, key.as_ref(), value).is_some_and(|id| !horizon.has(id))
        };
        let last = *looked().last()?.0;
        let gone: Vec<_> = looked().filter(is_gone).map(|(key, _)| *key).collect();
        for key in gone {
            rows.remove(&key);
        }
        Some(last)
    }
}

impl Tables for Memory {
    fn are_on_disk(&self) -> bool {
        false
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Ok(all[table as usize].get(&Key::new(key)).map(|value| value.to_vec()))
    }

    fn scan(&self, table: Table, span: Span, visit: Visit<'_>) -> Result<(), TablesError> {
        if is_empty(&span) {
            return Ok(());
        }
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let bound = |bound: Bound<Vec<u8>>| bound.map(|key| Key::new(&key));
        let mut rows = all[table as usize].range((bound(span.from), bound(span.to)));
        let mut see = |(key, value): (&Key, &Value)| visit(key.as_ref(), value);
        let _: ControlFlow<()> = match span.backwards {
            true => rows.rev().try_for_each(&mut see),
            false => rows.try_for_each(&mut see),
        };
        Ok(())
    }

    fn write(&self, batch: &Batch) -> Result<(), TablesError> {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for (table, key, value) in batch.entries() {
            let rows = &mut all[table as usize];
            match value {
                Some(value) => drop(rows.insert(Key::new(key), value.into())),
                None => drop(rows.remove(&Key::new(key))),
            }
        }
        Ok(())
    }

    fn ingest(&self, table: Table, rows: Rows<'_>) -> Result<(), TablesError> {
        // Hardly any: what disks bring in later is written at once here.
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all[table as usize].extend(rows.map(|(key, value)| (Key::new(key), value.into())));
        Ok(())
    }

    fn reclaim(&self, horizon: &Horizon) -> Result<(), TablesError> {
        for table in DROPPED {
            let mut from = Bound::Unbounded;
            while let Some(last) = self.reclaim_some(table, from, horizon) {
                from = Bound::Excluded(last);
            }
        }
        Ok(())
    }

    fn free_space(&self) -> Option<u64> {
        None
    }

    fn note_high_water(&self, _: u64) -> Result<(), TablesError> {
        Ok(())
    }

    fn high_water(&self) -> Result<u64, TablesError> {
        Ok(0)
    }
}

/// `BTreeMap::range` panics on a range that is upside down; an engine returns nothing.
fn is_empty(span: &Span) -> bool {
    match (&span.from, &span.to) {
        (Bound::Included(from), Bound::Included(to)) => from > to,
        (
            Bound::Included(from) | Bound::Excluded(from),
            Bound::Included(to) | Bound::Excluded(to),
        ) => from >= to,
        (Bound::Unbounded, _) | (_, Bound::Unbounded) => false,
    }
}
