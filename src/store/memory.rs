//! Tables in memory, for tests and for runs that need not survive.

use std::{
    collections::BTreeMap,
    ops::{Bound, ControlFlow},
    sync::{PoisonError, RwLock},
};

use super::tables::{Batch, Span, Table, Tables, TablesError, Visit};

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Default)]
pub struct Memory(RwLock<[Rows; Table::ALL.len()]>);

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

    fn write(&self, batch: Batch) -> Result<(), TablesError> {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for (table, key, value) in batch.0 {
            let rows = &mut all[table as usize];
            match value {
                Some(value) => drop(rows.insert(key, value)),
                None => drop(rows.remove(&key)),
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
