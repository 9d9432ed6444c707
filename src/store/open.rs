//! Payments that wait for something, as last stored: whatever wakes one, attempts its deliveries or writes
//! back what came of them would else read and decode it each time.

use std::sync::{PoisonError, RwLock};

use rustc_hash::FxHashMap;

use super::{Revision, Versioned};
use crate::domain::ids::PaymentId;

/// At about 1.2 KB each: three seconds' worth at full speed. Whoever is not here is read from the tables.
const PAYMENTS_MAX: usize = 100_000;

/// Keyed by ids, which are made here: nobody outside can choose some that collide.
#[derive(Default)]
pub struct OpenPayments(RwLock<FxHashMap<PaymentId, Versioned>>);

impl OpenPayments {
    pub fn get(&self, id: PaymentId) -> Option<Versioned> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    pub fn revision(&self, id: PaymentId) -> Option<Revision> {
        let open = self.0.read().unwrap_or_else(PoisonError::into_inner);
        open.get(&id).map(|stored| stored.revision)
    }

    /// Takes note of payments as they are now stored: those that wait, and those that do not any more.
    pub fn note(
        &self,
        waiting: impl IntoIterator<Item = Versioned>,
        done: impl IntoIterator<Item = PaymentId>,
    ) {
        let mut open = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for stored in waiting {
            let id = stored.payment.terms.id;
            if open.len() < PAYMENTS_MAX || open.contains_key(&id) {
                open.insert(id, stored);
            }
        }
        for id in done {
            open.remove(&id);
        }
    }

    #[cfg(test)]
    pub fn forget(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
