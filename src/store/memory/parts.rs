//! Maps in parts, by the first bits of keys: one that grows moves all that it holds, and everybody waits meanwhile.

use std::ops::Bound;

use super::Key;

pub struct Parts<T>(Box<[T]>);

const PARTS: usize = 1_024;
const REST_BITS: u32 = u64::BITS - PARTS.ilog2();

impl<T: Default> Default for Parts<T> {
    fn default() -> Self {
        Self(std::iter::repeat_with(T::default).take(PARTS).collect())
    }
}

impl<T> Parts<T> {
    pub fn of(&self, key: &Key) -> &T {
        &self.0[place(key)]
    }

    pub fn of_mut(&mut self, key: &Key) -> &mut T {
        &mut self.0[place(key)]
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }

    /// The part in which a walk goes on, and where the next one begins, if there is one.
    pub fn next(&mut self, from: Bound<Key>) -> (&mut T, Option<Bound<Key>>) {
        let at = match from {
            Bound::Included(key) | Bound::Excluded(key) => place(&key),
            Bound::Unbounded => 0,
        };
        let first = |place| Bound::Included(Key::beginning_with((place as u64) << REST_BITS));
        (&mut self.0[at], (at + 1 < PARTS).then(|| first(at + 1)))
    }
}

fn place(key: &Key) -> usize {
    usize::try_from(key.words[0] >> REST_BITS).expect("fewer than there are parts")
}
