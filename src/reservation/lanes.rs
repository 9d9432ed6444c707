//! One event of a payment at a time: whoever comes second sees what the first has made of it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::OwnedMutexGuard;

use super::state::Id;

type Waiting = Arc<tokio::sync::Mutex<()>>;

/// Holds an entry for each payment that is worked on, and no more.
#[derive(Default)]
pub struct Lanes(Mutex<HashMap<Id, Waiting>>);

/// Leaves its lane when dropped.
pub struct Lane<'a> {
    lanes: &'a Lanes,
    payment: Id,
    place: Option<OwnedMutexGuard<()>>,
}

impl Lanes {
    /// In the order in which they come.
    pub async fn enter(&self, payment: Id) -> Lane<'_> {
        let lane = Arc::clone(self.all().entry(payment).or_default());
        let place = lane.lock_owned().await;
        Lane { lanes: self, payment, place: Some(place) }
    }

    fn all(&self) -> std::sync::MutexGuard<'_, HashMap<Id, Waiting>> {
        // Entries are put in and taken out in one step each: right whatever a panicking holder did.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        drop(self.place.take());
        let mut all = self.lanes.all();
        // The map's own is the last one when nobody waits; who comes now must take the map's lock first.
        if all.get(&self.payment).is_some_and(|lane| Arc::strong_count(lane) == 1) {
            all.remove(&self.payment);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::task::JoinSet;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_at_a_time_and_nothing_is_left_over() {
        let lanes = Arc::new(Lanes::default());
        let inside: Arc<[AtomicUsize; 5]> = Arc::default();
        let mut tasks = JoinSet::new();
        for n in 0..500 {
            let (lanes, inside) = (Arc::clone(&lanes), Arc::clone(&inside));
            tasks.spawn(async move {
                let payment = n % inside.len();
                let _lane = lanes.enter([payment as u8; 16]).await;
                assert_eq!(inside[payment].fetch_add(1, Ordering::SeqCst), 0);
                tokio::task::yield_now().await;
                inside[payment].fetch_sub(1, Ordering::SeqCst);
            });
        }
        tasks.join_all().await;
        assert!(lanes.all().is_empty());
    }
}
