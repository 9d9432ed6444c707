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

type Sorted = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Default)]
pub struct Memory(RwLock<[Sorted; Table::ALL.len()]>);

impl Memory {
    /// Looks at the next rows; the last one it has looked at.
    fn reclaim_some(
        &self,
        table: Table,
        from: Bound<Vec<u8>>,
        horizon: &Horizon,
    ) -> Option<Vec<u8>> {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let rows = &mut all[table as usize];
        let looked = || rows.range((from.clone(), Bound::Unbounded)).take(AT_A_TIME);
        let is_gone = |(key, value): &(&Vec<u8>, &Vec<u8>)| {
            record::payment_of(table, key, value).is_some_and(|id| !horizon.has(id))
        };
        let last = looked().last()?.0.clone();
        let gone: Vec<_> = looked().filter(is_gone).map(|(key, _)| key.clone()).collect();
        for key in gone {
            rows.remove(&key);
        }
        Some(last)
    }
}

impl Tables for Memory {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Ok(all[table as usize].get(key).cloned())
    }

    fn scan(&self, table: Table, span: Span, visit: Visit<'_>) -> Result<(), TablesError> {
        if is_empty(&span) {
            return Ok(());
        }
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut rows = all[table as usize].range((span.from, span.to));
        let mut see = |(key, value): (&Vec<u8>, &Vec<u8>)| visit(key, value);
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
                Some(value) => drop(rows.insert(key.to_vec(), value.to_vec())),
                None => drop(rows.remove(key)),
            }
        }
        Ok(())
    }

    fn ingest(&self, table: Table, rows: Rows<'_>) -> Result<(), TablesError> {
        let mut rows = rows.peekable();
        while rows.peek().is_some() {
            let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
            let some = rows.by_ref().take(AT_A_TIME);
            all[table as usize].extend(some.map(|(key, value)| (key.to_vec(), value.to_vec())));
        }
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
