//! Places among the requests in flight, of which there are so many and no more.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// All places. A counter and no semaphore: nobody waits for one.
#[derive(Debug)]
pub struct Places {
    max: usize,
    taken: AtomicUsize,
}

impl Places {
    pub const fn new(max: usize) -> Self {
        Self { max, taken: AtomicUsize::new(0) }
    }

    /// Who is about to be refused is counted for a moment, but has none.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed).min(self.max)
    }
}

/// A request's place among those in flight. Its handler gets it too, so that a call that is held on purpose can
/// give it back.
#[derive(Clone, Debug)]
pub struct Slot(Arc<Place>);

#[derive(Debug)]
struct Place {
    places: Arc<Places>,
    taken: AtomicBool,
}

impl Slot {
    /// `None`: there is no place left.
    pub fn take(places: &Arc<Places>) -> Option<Self> {
        if places.taken.fetch_add(1, Ordering::Relaxed) >= places.max {
            places.taken.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Self(Arc::new(Place { places: Arc::clone(places), taken: AtomicBool::new(true) })))
    }

    /// Gives the place to another request. Once is enough; again does nothing.
    pub fn release(&self) {
        if self.0.taken.swap(false, Ordering::Relaxed) {
            self.0.places.taken.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// The edge's own handle: the place is free when the handler has ended, whoever else keeps a [`Slot`].
pub struct ReleaseAtEnd(pub Slot);

impl Drop for ReleaseAtEnd {
    fn drop(&mut self) {
        self.0.release();
    }
}
