//! Tables in memory, for tests and for runs that need not survive.

mod grouped;
mod hashed;
mod key;
mod sorted;

use std::{
    ops::{Bound, ControlFlow},
    sync::{PoisonError, RwLock},
};

use self::{grouped::Grouped, hashed::Hashed, key::Key, sorted::Sorted};
use super::{
    horizon::Horizon,
    record,
    tables::{self, Batch, DROPPED, Span, Table, Tables, TablesError, Visit},
};

/// A table, kept in the way in which it is used.
trait Rows: Send + Sync {
    fn get(&self, key: &Key) -> Option<&[u8]>;

    fn put(&mut self, key: Key, value: &[u8]);

    fn remove(&mut self, key: &Key);

    /// `keys` is not upside down.
    fn scan(&self, keys: (Bound<Key>, Bound<Key>), backwards: bool, visit: Visit<'_>);

    /// Drops what is gone of some rows, without letting others in between; where to go on, unless these were the last.
    fn drop_some(&mut self, from: Bound<Key>, is_gone: IsGone<'_>) -> Option<Bound<Key>>;
}

/// Of a row with this key and value.
type IsGone<'a> = &'a dyn Fn(&[u8], &[u8]) -> bool;

fn rows(table: Table) -> Box<dyn Rows> {
    match table {
        Table::Key | Table::Reply => Box::<Hashed>::default(),
        Table::Index => Box::<Grouped>::default(),
        Table::Payment
        | Table::State
        | Table::Lapse
        | Table::Due
        | Table::Dead
        | Table::Counter
        | Table::Meta
        | Table::Kept => Box::<Sorted>::default(),
    }
}

pub struct Memory(RwLock<[Box<dyn Rows>; Table::ALL.len()]>);

impl Default for Memory {
    fn default() -> Self {
        Self(RwLock::new(Table::ALL.map(rows)))
    }
}

impl Tables for Memory {
    fn are_on_disk(&self) -> bool {
        false
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Ok(all[table as usize].get(&Key::new(key)).map(<[u8]>::to_vec))
    }

    fn scan(&self, table: Table, span: Span, visit: Visit<'_>) -> Result<(), TablesError> {
        if is_empty(&span) {
            return Ok(());
        }
        let key = |bound: Bound<Vec<u8>>| bound.map(|key| Key::new(&key));
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        all[table as usize].scan((key(span.from), key(span.to)), span.backwards, visit);
        Ok(())
    }

    fn write(&self, batch: &Batch) -> Result<(), TablesError> {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for (table, key, value) in batch.entries() {
            let (rows, key) = (&mut all[table as usize], Key::new(key));
            match value {
                Some(value) => rows.put(key, value),
                None => rows.remove(&key),
            }
        }
        Ok(())
    }

    fn ingest(&self, table: Table, rows: tables::Rows<'_>) -> Result<(), TablesError> {
        // Hardly any: what disks bring in later is written at once here.
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for (key, value) in rows {
            all[table as usize].put(Key::new(key), value);
        }
        Ok(())
    }

    fn reclaim(&self, horizon: &Horizon) -> Result<(), TablesError> {
        for table in DROPPED {
            let is_gone = |key: &[u8], value: &[u8]| {
                record::payment_of(table, key, value).is_some_and(|id| !horizon.has(id))
            };
            let drop_some = |from| {
                let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
                all[table as usize].drop_some(from, &is_gone)
            };
            let mut next = Some(Bound::Unbounded);
            while let Some(from) = next {
                next = drop_some(from);
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

/// A range that is upside down: maps panic over it, and an engine returns nothing.
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

/// Shows rows that are in order, from whichever end.
fn visit_all<'a>(
    mut rows: impl DoubleEndedIterator<Item = (Key, &'a [u8])>,
    backwards: bool,
    visit: Visit<'_>,
) -> ControlFlow<()> {
    let mut see = |(key, value): (Key, &[u8])| key.with_bytes(|key| visit(key, value));
    match backwards {
        true => rows.rev().try_for_each(&mut see),
        false => rows.try_for_each(&mut see),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids as they come, newest first in the tables, out of order, and of names that share their first bits.
    const KEYS: [[u8; 24]; 6] = {
        let mut keys = [[7; 24]; 6];
        keys[0][23] = 3;
        keys[1][23] = 2;
        keys[2][23] = 4;
        keys[3][7] = 8;
        keys[4][0] = 200;
        keys[5][0] = 1;
        keys
    };

    fn kinds() -> [Box<dyn Rows>; 3] {
        [Box::<Sorted>::default(), Box::<Hashed>::default(), Box::<Grouped>::default()]
    }

    fn keys_in(
        rows: &dyn Rows,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        backwards: bool,
    ) -> Vec<[u8; 24]> {
        let mut seen = Vec::new();
        rows.scan((from.map(Key::new), to.map(Key::new)), backwards, &mut |key, _| {
            seen.push(key.try_into().unwrap());
            ControlFlow::Continue(())
        });
        seen
    }

    #[test]
    fn whatever_the_kind_rows_are_sorted_found_and_removed_alike() {
        let mut sorted = KEYS;
        sorted.sort_unstable();
        for mut rows in kinds() {
            for key in KEYS.iter().chain(&KEYS[..2]) {
                rows.put(Key::new(key), &[]);
            }
            let all = |rows: &dyn Rows| keys_in(rows, Bound::Unbounded, Bound::Unbounded, false);
            assert_eq!(all(&*rows), sorted);
            let within = |from, to| keys_in(&*rows, from, to, true);
            for n in 0..sorted.len() {
                for m in n..sorted.len() {
                    let mut expected = sorted[n..=m].to_vec();
                    expected.reverse();
                    let bounds = (Bound::Included(&sorted[n][..]), Bound::Included(&sorted[m][..]));
                    assert_eq!(within(bounds.0, bounds.1), expected);
                    if n < m {
                        let without = Bound::Excluded(&sorted[n][..]);
                        assert_eq!(within(without, bounds.1), expected[..expected.len() - 1]);
                        let without = Bound::Excluded(&sorted[m][..]);
                        assert_eq!(within(bounds.0, without), expected[1..]);
                    }
                }
            }
            assert_eq!(rows.get(&Key::new(&KEYS[2])), Some(&[][..]));
            rows.remove(&Key::new(&KEYS[2]));
            assert_eq!(rows.get(&Key::new(&KEYS[2])), None);
            assert_eq!(all(&*rows).len(), 5);
        }
    }

    #[test]
    fn whatever_the_kind_what_is_gone_is_dropped_and_the_rest_stays() {
        for mut rows in kinds() {
            for key in KEYS {
                rows.put(Key::new(&key), &[]);
            }
            let mut next = Some(Bound::Unbounded);
            while let Some(from) = next {
                next = rows.drop_some(from, &|key, _| key[23] != 2 && key[0] != 1);
            }
            let left = keys_in(&*rows, Bound::Unbounded, Bound::Unbounded, false);
            assert_eq!(left, [KEYS[5], KEYS[1]]);
        }
    }
}
