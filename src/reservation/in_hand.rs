//! The messages in hand, whose time the worker keeps extending.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::metrics::WorkerMetrics;

pub struct InHand {
    metrics: Arc<WorkerMetrics>,
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
    pub fn new(metrics: Arc<WorkerMetrics>) -> Arc<Self> {
        Arc::new(Self { metrics, next: AtomicU64::new(0), receipts: Mutex::default() })
    }

    pub fn hold(self: &Arc<Self>, receipt: String) -> Held {
        // By number: a queue may give one receipt twice.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut all = self.all();
        all.insert(number, receipt.clone());
        self.metrics.in_flight(all.len());
        drop(all);
        Held { in_hand: Arc::clone(self), number, receipt }
    }

    pub fn receipts(&self) -> Vec<String> {
        self.all().values().cloned().collect()
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
        let mut all = self.in_hand.all();
        all.remove(&self.number);
        self.in_hand.metrics.in_flight(all.len());
    }
}
