//! Rows that are only looked up, found at once wherever they are.

use std::ops::{Bound, RangeBounds};

use rustc_hash::FxHashMap;

use super::{IsGone, Key, Rows, Visit, visit_all};

/// Keys are hashes made with our secret: nobody outside can choose some that collide.
#[derive(Default)]
pub struct Hashed(Parts<FxHashMap<Key, Box<[u8]>>>);

/// By the first bits of keys: a map that grows moves all that it holds, and everybody waits meanwhile.
pub struct Parts<T>(Box<[T]>);

const PARTS: usize = 1_024;
const REST_BITS: u32 = u64::BITS - PARTS.ilog2();

impl<T: Default> Default for Parts<T> {
    fn default() -> Self {
        Self(std::iter::repeat_with(T::default).take(PARTS).collect())
    }
}

impl<T> Parts<T> {
    pub fn of(&self, word: u64) -> &T {
        &self.0[Self::place(word)]
    }

    pub fn of_mut(&mut self, word: u64) -> &mut T {
        &mut self.0[Self::place(word)]
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }

    /// The part in which a walk begins, and where the next one does, if there is one.
    pub fn next(&mut self, from: Bound<Key>) -> (&mut T, Option<Bound<Key>>) {
        let place = match from {
            Bound::Included(key) | Bound::Excluded(key) => Self::place(key.words[0]),
            Bound::Unbounded => 0,
        };
        let first = |place| Bound::Included(Key::beginning_with((place as u64) << REST_BITS));
        (&mut self.0[place], (place + 1 < PARTS).then(|| first(place + 1)))
    }

    fn place(word: u64) -> usize {
        usize::try_from(word >> REST_BITS).expect("fewer than there are parts")
    }
}

impl Rows for Hashed {
    fn get(&self, key: &Key) -> Option<&[u8]> {
        self.0.of(key.words[0]).get(key).map(AsRef::as_ref)
    }

    fn put(&mut self, key: Key, value: &[u8]) {
        self.0.of_mut(key.words[0]).insert(key, value.into());
    }

    fn remove(&mut self, key: &Key) {
        self.0.of_mut(key.words[0]).remove(key);
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
        next
    }
}
