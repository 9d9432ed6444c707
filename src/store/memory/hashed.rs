//! Rows that are only looked up, found at once wherever they are.

use std::ops::{Bound, RangeBounds};

use rustc_hash::FxHashMap;

use super::{IsGone, Key, Kind, Visit, parts::Parts, visit_all};

/// Keys are hashes made with our secret: nobody outside can choose some that collide.
#[derive(Default)]
pub struct Hashed(Parts<FxHashMap<Key, Box<[u8]>>>);

impl Kind for Hashed {
    fn get(&self, key: &Key) -> Option<&[u8]> {
        self.0.of(key).get(key).map(AsRef::as_ref)
    }

    fn put(&mut self, key: Key, value: &[u8]) {
        self.0.of_mut(&key).insert(key, value.into());
    }

    fn remove(&mut self, key: &Key) {
        self.0.of_mut(key).remove(key);
    }

    /// Dear, and for tests.
    fn scan(&self, keys: (Bound<Key>, Bound<Key>), backwards: bool, visit: Visit<'_>) {
        let rows = self.0.iter().flatten().map(|(key, value)| (*key, &**value));
        let mut found: Vec<_> = rows.filter(|(key, _)| keys.contains(key)).collect();
        found.sort_unstable_by_key(|(key, _)| *key);
        let _ = visit_all(found.into_iter(), backwards, visit);
    }

    fn drop_some(&mut self, from: Bound<Key>, is_gone: IsGone<'_>) -> Option<Bound<Key>> {
        let (part, next) = self.0.next(from);
        part.retain(|key, value| !key.with_bytes(|key| is_gone(key, value)));
        if part.capacity() > 4 * part.len() {
            part.shrink_to(2 * part.len());
        }
        next
    }
}
