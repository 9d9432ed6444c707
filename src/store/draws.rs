//! The numbers of a reservation's draws: given out in memory, each once, and stored with the create
//! that used them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Counters kept in memory; the rest is read back from the store.
const COUNTERS_KEPT: usize = 100_000;

#[derive(Clone, Copy, Default)]
struct Counter {
    next: u64,
    /// Numbers given out whose creates have not ended: the counter must not be forgotten before.
    open: u32,
}

#[derive(Default)]
pub struct Counters(Mutex<HashMap<[u8; 16], Counter>>);

/// A number of a reservation, held until the create that uses it is over.
pub struct Draw {
    pub n: u64,
    pub(super) reservation: [u8; 16],
    counters: Arc<Counters>,
}

impl std::fmt::Debug for Draw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Draw({})", self.n)
    }
}

impl Counters {
    /// `stored` reads how many draws the reservation had, when memory does not know.
    pub fn draw<E>(
        self: &Arc<Self>,
        reservation: [u8; 16],
        stored: impl FnOnce() -> Result<u64, E>,
    ) -> Result<Draw, E> {
        // The lock is held over the read, so that two first draws do not both count from the store.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= COUNTERS_KEPT && !all.contains_key(&reservation) {
            all.retain(|_, counter| counter.open > 0);
        }
        let counter = match all.entry(reservation) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(slot) => {
                slot.insert(Counter { next: stored()?, open: 0 })
            }
        };
        let n = counter.next;
        counter.next += 1;
        counter.open += 1;
        drop(all);
        Ok(Draw { n, reservation, counters: Arc::clone(self) })
    }
}

impl Draw {
    /// What to store with the create: more than every number given out so far.
    pub(super) fn next(&self) -> u64 {
        let all = self.counters.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&self.reservation).map_or(self.n + 1, |counter| counter.next)
    }
}

impl Drop for Draw {
    fn drop(&mut self) {
        let mut all = self.counters.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(counter) = all.get_mut(&self.reservation) {
            counter.open = counter.open.saturating_sub(1);
        }
    }
}
