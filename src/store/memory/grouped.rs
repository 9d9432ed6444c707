//! Rows without values that are walked through within the first word of their keys, which is the hash of a name.

use std::ops::{Bound, ControlFlow, RangeBounds};

use rustc_hash::FxHashMap;

use super::{IsGone, Key, Rows, Visit, hashed::Parts, visit_all};

/// By the first word of keys what follows it, the last ones first: they mostly come in that order, and are then only
/// added.
#[derive(Default)]
pub struct Grouped(Parts<FxHashMap<u64, Vec<Rest>>>);

/// Of a key, without its first word.
type Rest = [u64; 2];

/// Of every key.
const KEY_BYTES: u8 = 24;

fn rest(key: &Key) -> Rest {
    debug_assert_eq!(key.length, KEY_BYTES);
    [key.words[1], key.words[2]]
}

const fn key(name: u64, rest: Rest) -> Key {
    Key { words: [name, rest[0], rest[1]], length: KEY_BYTES }
}

/// Where it is, or would be.
fn place(group: &[Rest], rest: Rest) -> Result<usize, usize> {
    match group.last() {
        Some(last) if *last > rest => Err(group.len()),
        _ => group.binary_search_by(|other| rest.cmp(other)),
    }
}

impl Rows for Grouped {
    fn get(&self, key: &Key) -> Option<&[u8]> {
        let group = self.0.of(key.words[0]).get(&key.words[0])?;
        place(group, rest(key)).is_ok().then_some(&[])
    }

    fn put(&mut self, key: Key, value: &[u8]) {
        debug_assert!(value.is_empty());
        let group = self.0.of_mut(key.words[0]).entry(key.words[0]).or_default();
        if let Err(place) = place(group, rest(&key)) {
            group.insert(place, rest(&key));
        }
    }

    fn remove(&mut self, key: &Key) {
        let groups = self.0.of_mut(key.words[0]);
        let Some(group) = groups.get_mut(&key.words[0]) else { return };
        if let Ok(place) = place(group, rest(key)) {
            group.remove(place);
        }
        if group.is_empty() {
            groups.remove(&key.words[0]);
        }
    }

    fn scan(&self, keys: (Bound<Key>, Bound<Key>), backwards: bool, visit: Visit<'_>) {
        let (from, to) = keys;
        let mut groups = match (from, to) {
            (
                Bound::Included(first) | Bound::Excluded(first),
                Bound::Included(last) | Bound::Excluded(last),
            ) if first.words[0] == last.words[0] => {
                let groups = self.0.of(first.words[0]);
                groups.get_key_value(&first.words[0]).into_iter().collect()
            }
            // Dear, and for tests.
            _ => self.0.iter().flatten().collect::<Vec<_>>(),
        };
        groups.sort_unstable_by_key(|(name, _)| **name);
        let see = |(name, group): (&u64, &Vec<Rest>)| {
            let is_past = |rest: &Rest| !(Bound::Unbounded, to).contains(&key(*name, *rest));
            let is_reached = |rest: &Rest| (from, Bound::Unbounded).contains(&key(*name, *rest));
            let within = group.partition_point(is_past)..group.partition_point(is_reached);
            let rows = group[within].iter().rev().map(|rest| (key(*name, *rest), &[][..]));
            visit_all(rows, backwards, visit)
        };
        let _: ControlFlow<()> = match backwards {
            true => groups.into_iter().rev().try_for_each(see),
            false => groups.into_iter().try_for_each(see),
        };
    }

    fn drop_some(&mut self, from: Bound<Key>, is_gone: IsGone<'_>) -> Option<Bound<Key>> {
        let (groups, next) = self.0.next(from);
        groups.retain(|name, group| {
            group.retain(|rest| !key(*name, *rest).with_bytes(|key| is_gone(key, &[])));
            !group.is_empty()
        });
        next
    }
}
