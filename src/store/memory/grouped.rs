//! Rows without values that are walked through within the first word of their keys, which is the hash of a name.

use std::{
    collections::{VecDeque, hash_map::Entry},
    ops::{Bound, ControlFlow, RangeBounds},
};

use rustc_hash::FxHashMap;

use super::{AT_A_TIME, IsGone, Key, Kind, Visit, parts::Parts, visit_all};

/// By the first word of keys what follows it, the last ones first: they mostly come in that order, and are then only
/// added. Names are hashed with our secret: nobody outside can choose some that collide.
#[derive(Default)]
pub struct Grouped(Parts<FxHashMap<u64, Group>>);

type Group = VecDeque<Rest>;

/// Of a key, without its first word.
type Rest = [u64; 2];

/// Of every key.
const KEY_BYTES: u8 = 24;

fn rest(key: &Key) -> Rest {
    assert_eq!(key.length, KEY_BYTES, "a name and an id");
    [key.words[1], key.words[2]]
}

const fn key(name: u64, rest: Rest) -> Key {
    Key { words: [name, rest[0], rest[1]], length: KEY_BYTES }
}

/// Where it is, or would be.
fn place(group: &Group, rest: Rest) -> Result<usize, usize> {
    match group.back() {
        Some(last) if *last > rest => Err(group.len()),
        _ => group.binary_search_by(|other| rest.cmp(other)),
    }
}

impl Kind for Grouped {
    fn get(&self, key: &Key) -> Option<&[u8]> {
        let group = self.0.of(key).get(&key.words[0])?;
        place(group, rest(key)).is_ok().then_some(&[])
    }

    fn put(&mut self, key: Key, value: &[u8]) {
        assert!(value.is_empty(), "rows of groups have no values");
        let group = match self.0.of_mut(&key).entry(key.words[0]) {
            Entry::Occupied(group) => group.into_mut(),
            // Most names have one row.
            Entry::Vacant(none) => none.insert(Group::with_capacity(1)),
        };
        if let Err(place) = place(group, rest(&key)) {
            group.insert(place, rest(&key));
        }
    }

    fn remove(&mut self, key: &Key) {
        let groups = self.0.of_mut(key);
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
                self.0.of(&first).get_key_value(&first.words[0]).into_iter().collect()
            }
            // Dear, and for tests.
            _ => self.0.iter().flatten().collect::<Vec<_>>(),
        };
        groups.sort_unstable_by_key(|(name, _)| **name);
        let see = |(name, group): (&u64, &Group)| {
            let is_past = |rest: &Rest| !(Bound::Unbounded, to).contains(&key(*name, *rest));
            let is_reached = |rest: &Rest| (from, Bound::Unbounded).contains(&key(*name, *rest));
            let within = group.partition_point(is_past)..group.partition_point(is_reached);
            let rows = group.range(within).rev().map(|rest| (key(*name, *rest), &[][..]));
            visit_all(rows, backwards, visit)
        };
        let _: ControlFlow<()> = match backwards {
            true => groups.into_iter().rev().try_for_each(see),
            false => groups.into_iter().try_for_each(see),
        };
    }

    /// Of a name what comes last goes first. Where a name has many rows the part is come back to, until among the next
    /// ones all stay.
    fn drop_some(&mut self, from: Bound<Key>, is_gone: IsGone<'_>) -> Option<Bound<Key>> {
        let (groups, next) = self.0.next(from);
        let mut is_done = true;
        groups.retain(|name, group| {
            let stays = |rest: &Rest| !key(*name, *rest).with_bytes(|key| is_gone(key, &[]));
            let looked = ..group.len().min(AT_A_TIME);
            if group.range(looked).all(stays) {
                return true;
            }
            let looked: Vec<_> = group.drain(looked).collect();
            is_done &= group.is_empty();
            looked.iter().rev().filter(|rest| stays(rest)).for_each(|rest| group.push_front(*rest));
            if group.capacity() > 4 * group.len() {
                group.shrink_to(2 * group.len());
            }
            !group.is_empty()
        });
        if is_done { next } else { Some(from) }
    }
}
