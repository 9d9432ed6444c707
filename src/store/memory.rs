//! Tables in memory, for tests and for runs that need not survive.

mod grouped;
mod hashed;
mod key;
mod parts;
mod sorted;

use std::{
    ops::{Bound, ControlFlow},
    sync::{PoisonError, RwLock},
};

use self::{grouped::Grouped, hashed::Hashed, key::Key, sorted::Sorted};
use super::{
    horizon::Horizon,
    record,
    tables::{Batch, DROPPED, Rows, Span, Table, Tables, TablesError, Visit},
};

/// Rows that are worked on without letting others in between.
const AT_A_TIME: usize = 1_000;

pub struct Memory(RwLock<[Box<dyn Kind>; Table::ALL.len()]>);

impl Default for Memory {
    fn default() -> Self {
        Self(RwLock::new(Table::ALL.map(of_its_kind)))
    }
}

/// A table, of the kind that it is used by.
trait Kind: Send + Sync {
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

fn of_its_kind(table: Table) -> Box<dyn Kind> {
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

    fn ingest(&self, table: Table, rows: Rows<'_>) -> Result<(), TablesError> {
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
    use std::collections::BTreeMap;

    use super::*;

    /// As lists have them: three names, two of which share their first bits, and ids as they come, not quite in order.
    fn keys(ids: &[u16]) -> Vec<[u8; 24]> {
        let names = [[7, 0, 0, 0, 0, 0, 0, 1], [7, 0, 0, 0, 0, 0, 0, 2], [200; 8]];
        let key = |name: [u8; 8], id: u16| {
            let mut key = [9; 24];
            key[..8].copy_from_slice(&name);
            key[22..].copy_from_slice(&id.to_be_bytes());
            key
        };
        ids.iter().flat_map(|id| names.map(|name| key(name, *id))).collect()
    }

    fn id(key: &[u8]) -> u16 {
        u16::from_be_bytes(key[22..].try_into().unwrap())
    }

    fn kinds() -> [Box<dyn Kind>; 3] {
        [Box::<Sorted>::default(), Box::<Hashed>::default(), Box::<Grouped>::default()]
    }

    /// The first keys of a range, from whichever end.
    fn seen(
        rows: &dyn Kind,
        (from, to): (Bound<&[u8]>, Bound<&[u8]>),
        backwards: bool,
        at_most: usize,
    ) -> Vec<Vec<u8>> {
        let mut seen = Vec::new();
        rows.scan((from.map(Key::new), to.map(Key::new)), backwards, &mut |key, _| {
            seen.push(key.to_vec());
            if seen.len() == at_most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        seen
    }

    fn drop_all(rows: &mut dyn Kind, is_gone: impl Fn(&[u8]) -> bool) -> usize {
        let (mut next, mut calls) = (Some(Bound::Unbounded), 0);
        while let Some(from) = next {
            next = rows.drop_some(from, &|key, _| is_gone(key));
            calls += 1;
        }
        calls
    }

    #[test]
    fn whatever_the_kind_a_range_is_what_a_sorted_map_says_it_is() {
        let stored = keys(&[8, 6, 7, 4, 2, 4]);
        let model: BTreeMap<_, _> = stored.iter().map(|key| (key.to_vec(), ())).collect();
        // Some are there, some are not, some are shorter.
        let ends = keys(&[2, 3, 7, 9]).into_iter().map(|key| key.to_vec());
        let ends: Vec<_> = ends.chain([vec![7], vec![200; 8], vec![255; 24]]).collect();
        let of_ends = ends.iter().map(Vec::as_slice);
        let included = of_ends.clone().map(Bound::Included);
        let bounds: Vec<_> =
            included.chain(of_ends.map(Bound::Excluded)).chain([Bound::Unbounded]).collect();
        for mut rows in kinds() {
            stored.iter().for_each(|key| rows.put(Key::new(key), &[]));
            for from in &bounds {
                for to in &bounds {
                    let owned = |bound: Bound<&[u8]>| bound.map(<[u8]>::to_vec);
                    if is_empty(&Span::forwards(owned(*from), owned(*to))) {
                        continue;
                    }
                    for (backwards, at_most) in [(false, 100), (true, 100), (false, 4), (true, 4)] {
                        let range =
                            model.range::<[u8], _>((*from, *to)).map(|(key, ())| key.clone());
                        let expected: Vec<_> = match backwards {
                            true => range.rev().take(at_most).collect(),
                            false => range.take(at_most).collect(),
                        };
                        assert_eq!(seen(&*rows, (*from, *to), backwards, at_most), expected);
                    }
                }
            }
        }
    }

    #[test]
    fn whatever_the_kind_a_row_is_found_until_it_is_removed() {
        for mut rows in kinds() {
            let stored = keys(&[5, 6]);
            stored.iter().for_each(|key| rows.put(Key::new(key), &[]));
            assert_eq!(rows.get(&Key::new(&stored[4])), Some(&[][..]));
            rows.remove(&Key::new(&stored[4]));
            rows.remove(&Key::new(&keys(&[7])[0]));
            assert_eq!(rows.get(&Key::new(&stored[4])), None);
            assert_eq!(rows.get(&Key::new(&stored[1])), Some(&[][..]));
        }
        for mut rows in kinds().into_iter().take(2) {
            rows.put(Key::new(b"key"), b"before");
            rows.put(Key::new(b"key"), b"after");
            assert_eq!(rows.get(&Key::new(b"key")), Some(&b"after"[..]));
        }
    }

    #[test]
    fn whatever_the_kind_all_that_is_gone_is_dropped_and_the_rest_stays() {
        let ids: Vec<u16> = (0..3_000).rev().collect();
        // One of those that go stays, as a payment does that still owes something.
        let is_gone = |key: &[u8]| id(key) >= 500 && id(key) != 2_800;
        for (mut rows, calls_at_least) in kinds().into_iter().zip([9, 1, 3]) {
            keys(&ids).iter().for_each(|key| rows.put(Key::new(key), &[]));
            let calls = drop_all(&mut *rows, is_gone);
            assert!(calls >= calls_at_least, "others have their turn in between");
            let left = seen(&*rows, (Bound::Unbounded, Bound::Unbounded), false, usize::MAX);
            let mut expected = keys(&ids);
            expected.retain(|key| !is_gone(key));
            expected.sort_unstable();
            assert_eq!(left, expected);
        }
    }
}
