//! Places among the requests in flight, of which there are so many and no more.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::Semaphore;

/// A request's place among those in flight. Its handler gets it too, so that a call that is held on purpose can
/// give it back.
#[derive(Clone, Debug)]
pub struct Slot(Arc<Place>);

#[derive(Debug)]
struct Place {
    slots: Arc<Semaphore>,
    taken: AtomicBool,
}

impl Slot {
    pub fn take(slots: &Arc<Semaphore>) -> Option<Self> {
        slots.try_acquire().ok()?.forget();
        Some(Self(Arc::new(Place { slots: Arc::clone(slots), taken: AtomicBool::new(true) })))
    }

    /// Gives the place to another request. Once is enough; again does nothing.
    pub fn release(&self) {
        if self.0.taken.swap(false, Ordering::Relaxed) {
            self.0.slots.add_permits(1);
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
