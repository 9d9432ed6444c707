//! Payments that wait for something, as last stored: whatever wakes one, attempts its deliveries or writes
//! back what came of them would else read and decode it each time.

use std::sync::{Arc, PoisonError, RwLock};

use rustc_hash::FxHashMap;

use super::{Revision, Versioned};
use crate::domain::ids::PaymentId;

/// At about 1.2 KB each: three seconds' worth at full speed. Whoever is not here is read from the tables.
const PAYMENTS_MAX: usize = 100_000;

const PARTS: usize = 64;

/// In parts: a map that grows moves all that it holds, and commits would wait for it. Keyed by ids, which
/// are made here: nobody outside can choose some that collide.
pub struct OpenPayments([RwLock<FxHashMap<PaymentId, Arc<Versioned>>>; PARTS]);

impl Default for OpenPayments {
    fn default() -> Self {
        Self(std::array::from_fn(|_| RwLock::default()))
    }
}

impl OpenPayments {
    fn part(&self, id: PaymentId) -> &RwLock<FxHashMap<PaymentId, Arc<Versioned>>> {
        &self.0[usize::from(id.bytes()[15]) % PARTS]
    }

    pub fn get(&self, id: PaymentId) -> Option<Arc<Versioned>> {
        self.part(id).read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    pub fn revision(&self, id: PaymentId) -> Option<Revision> {
        let open = self.part(id).read().unwrap_or_else(PoisonError::into_inner);
        open.get(&id).map(|stored| stored.revision)
    }

    /// Takes note of payments as they are now stored: those that wait, and those that do not any more.
    pub fn note(
        &self,
        waiting: impl IntoIterator<Item = Arc<Versioned>>,
        done: impl IntoIterator<Item = PaymentId>,
    ) {
        for stored in waiting {
            let id = stored.payment.terms.id;
            let mut open = self.part(id).write().unwrap_or_else(PoisonError::into_inner);
            if open.len() < PAYMENTS_MAX / PARTS || open.contains_key(&id) {
                open.insert(id, stored);
            }
        }
        for id in done {
            self.part(id).write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        }
    }

    #[cfg(test)]
    pub fn forget(&self) {
        for part in &self.0 {
            part.write().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }
}
