//! Rows that are walked through from any key on.

use std::{collections::BTreeMap, ops::Bound};

use super::{AT_A_TIME, IsGone, Key, Kind, Visit, visit_all};

#[derive(Default)]
pub struct Sorted(BTreeMap<Key, Box<[u8]>>);

impl Kind for Sorted {
    fn get(&self, key: &Key) -> Option<&[u8]> {
        self.0.get(key).map(AsRef::as_ref)
    }

    fn put(&mut self, key: Key, value: &[u8]) {
        self.0.insert(key, value.into());
    }

    fn remove(&mut self, key: &Key) {
        self.0.remove(key);
    }

    fn scan(&self, keys: (Bound<Key>, Bound<Key>), backwards: bool, visit: Visit<'_>) {
        let rows = self.0.range(keys).map(|(key, value)| (*key, &**value));
        let _ = visit_all(rows, backwards, visit);
    }

    fn drop_some(&mut self, from: Bound<Key>, is_gone: IsGone<'_>) -> Option<Bound<Key>> {
        let looked = || self.0.range((from, Bound::Unbounded)).take(AT_A_TIME);
        let last = *looked().last()?.0;
        let gone: Vec<_> = looked()
            .filter(|(key, value)| key.with_bytes(|key| is_gone(key, value)))
            .map(|(key, _)| *key)
            .collect();
        for key in gone {
            self.0.remove(&key);
        }
        Some(Bound::Excluded(last))
    }
}
