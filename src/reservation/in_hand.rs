//! The messages in hand, whose time the worker keeps extending.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

#[derive(Default)]
pub struct InHand {
    next: AtomicU64,
    receipts: Mutex<BTreeMap<u64, String>>,
}

/// A message in hand, until it is dropped.
pub struct Held {
    in_hand: Arc<InHand>,
    number: u64,
    receipt: String,
}

impl InHand {
    pub fn hold(self: &Arc<Self>, receipt: String) -> Held {
        // By number: a queue may give one receipt twice.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.all().insert(number, receipt.clone());
        Held { in_hand: Arc::clone(self), number, receipt }
    }

    pub fn receipts(&self) -> Vec<String> {
        self.all().values().cloned().collect()
    }

    pub fn len(&self) -> usize {
        self.all().len()
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<u64, String>> {
        // Each entry is put in and taken out in one step: right whatever a panicking holder did.
        self.receipts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    pub fn receipt(&self) -> &str {
        &self.receipt
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.in_hand.all().remove(&self.number);
    }
}
