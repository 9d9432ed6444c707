//! Answers that are found once and given again: what thousands of payments a second ask about the same few
//! URLs.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// Questions remembered; beyond it all are forgotten, and asked anew.
const MAX: usize = 1_024;

/// By text that callers choose: hashed so that nobody can choose some that collide.
pub struct Recent<V>(Mutex<HashMap<String, V>>);

impl<V> Default for Recent<V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<V: Clone> Recent<V> {
    pub fn get(&self, text: &str, find: impl FnOnce(&str) -> V) -> V {
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known().get(text) {
            return found.clone();
        }
        let found = find(text);
        let mut known = known();
        if known.len() >= MAX {
            known.clear();
        }
        known.insert(text.to_owned(), found.clone());
        found
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_was_found_is_not_looked_for_again_and_memory_is_bounded() {
        let (recent, looked) = (Recent::default(), Cell::new(0));
        let length = |text: &str| {
            recent.get(text, |text| {
                looked.set(looked.get() + 1);
                text.len()
            })
        };
        assert_eq!((length("abc"), length("de"), length("abc")), (3, 2, 3));
        assert_eq!(looked.get(), 2);
        for n in 0..3 * MAX {
            length(&n.to_string());
            assert!(recent.0.lock().unwrap().len() <= MAX);
        }
        assert_eq!(length("abc"), 3);
    }
}
