//! What the newest payments have in `Key` and `Index`, before it is in those tables. It is in no commit:
//! sorted and brought in many at a time it costs a fraction. After a crash it is derived again, from the
//! payments past a stored mark.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use rustc_hash::{FxBuildHasher, FxHashMap};

use super::record;
use crate::domain::ids::{Idempotency, KeyHash, PaymentId, RequestHash};

/// The names under which a payment is listed, hashed.
pub type Names = [[u8; 8]; 2];

/// What a payment has in the derived tables.
#[derive(Clone, Debug)]
pub struct Derived {
    pub id: PaymentId,
    pub idempotency: Option<Idempotency>,
    pub names: Names,
}

#[derive(Default)]
pub struct Tail(RwLock<Layers>);

#[derive(Default)]
struct Layers {
    fresh: Layer,
    /// What is being brought into the tables.
    leaving: Option<Arc<Layer>>,
}

/// In parts, by the first bits of what is looked up: a map that grows moves all that it holds, and whoever
/// commits meanwhile would wait for tens of milliseconds. And sorted parts make a sorted whole.
pub struct Layer {
    parts: Vec<Part>,
    oldest: Option<PaymentId>,
    payments: usize,
}

/// By the first byte.
const PARTS: usize = 256;

/// Hashed with our secret, all of it: nobody outside can choose entries that collide.
#[derive(Default)]
struct Part {
    keys: FxHashMap<KeyHash, (RequestHash, PaymentId)>,
    /// Names, and whose they are. A list reads all of its part: to have each name found at once, every payment would
    /// pay.
    places: Vec<([u8; 8], PaymentId)>,
}

struct Sizes {
    keys: usize,
    places: usize,
}

impl Default for Layer {
    fn default() -> Self {
        let parts = std::iter::repeat_with(Part::default).take(PARTS).collect();
        Self { parts, oldest: None, payments: 0 }
    }
}

/// Rises with the bytes.
fn part(bytes: &[u8]) -> usize {
    usize::from(bytes[0])
}

impl Tail {
    fn layers(&self) -> RwLockReadGuard<'_, Layers> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, derived: impl IntoIterator<Item = Derived>) {
        let mut layers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for derived in derived {
            layers.fresh.add(&derived);
        }
    }

    /// What stands under a create's key. To be asked before the table: what leaves here is there already.
    pub fn key(&self, key: KeyHash) -> Option<(RequestHash, PaymentId)> {
        let layers = self.layers();
        let leaving = layers.leaving.as_ref();
        layers.fresh.key(key).or_else(|| leaving?.key(key))
    }

    /// The payments of a name that are wanted, in no order. To be asked before the table, as above.
    pub fn ids(&self, name: [u8; 8], is_wanted: impl Fn(PaymentId) -> bool) -> Vec<PaymentId> {
        let layers = self.layers();
        let all = std::iter::once(&layers.fresh).chain(layers.leaving.as_deref());
        all.flat_map(|layer| layer.ids(name)).filter(|id| is_wanted(*id)).collect()
    }

    /// The oldest payment that may be missing in the tables.
    pub fn oldest(&self) -> Option<PaymentId> {
        let layers = self.layers();
        let leaving = layers.leaving.as_ref().and_then(|layer| layer.oldest);
        layers.fresh.oldest.into_iter().chain(leaving).min()
    }

    /// Payments whose entries are still to leave.
    pub fn waiting(&self) -> usize {
        self.layers().fresh.payments
    }

    pub fn payments(&self) -> usize {
        let layers = self.layers();
        layers.fresh.payments + layers.leaving.as_ref().map_or(0, |layer| layer.payments)
    }

    /// What is to be brought into the tables: what was begun and not finished first.
    pub fn leave(&self) -> Arc<Layer> {
        let sizes = {
            let layers = self.layers();
            if let Some(leaving) = &layers.leaving {
                return Arc::clone(leaving);
            }
            layers.fresh.sizes()
        };
        // Made without the lock, which those who commit wait for.
        let next = Layer::with_room(sizes);
        let mut layers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Layers { fresh, leaving } = &mut *layers;
        Arc::clone(leaving.get_or_insert_with(|| Arc::new(std::mem::replace(fresh, next))))
    }

    /// It is in the tables.
    pub fn has_left(&self) {
        let left = self.0.write().unwrap_or_else(PoisonError::into_inner).leaving.take();
        // Freed without the lock.
        drop(left);
    }
}

impl Layer {
    fn sizes(&self) -> Vec<Sizes> {
        let sizes = |part: &Part| Sizes { keys: part.keys.len(), places: part.places.len() };
        self.parts.iter().map(sizes).collect()
    }

    /// Empty, with room in its parts: maps that grow move all that they hold, again and again.
    fn with_room(sizes: Vec<Sizes>) -> Self {
        let part = |Sizes { keys, places }| Part {
            keys: FxHashMap::with_capacity_and_hasher(keys, FxBuildHasher),
            places: Vec::with_capacity(places),
        };
        Self { parts: sizes.into_iter().map(part).collect(), oldest: None, payments: 0 }
    }

    fn add(&mut self, derived: &Derived) {
        let id = derived.id;
        if let Some(Idempotency { key, request }) = derived.idempotency {
            self.parts[part(&key.0)].keys.insert(key, (request, id));
        }
        for name in derived.names {
            self.parts[part(&name)].places.push((name, id));
        }
        self.oldest = Some(self.oldest.map_or(id, |oldest| oldest.min(id)));
        self.payments += 1;
    }

    fn key(&self, key: KeyHash) -> Option<(RequestHash, PaymentId)> {
        self.parts[part(&key.0)].keys.get(&key).copied()
    }

    fn ids(&self, name: [u8; 8]) -> impl Iterator<Item = PaymentId> {
        let places = self.parts[part(&name)].places.iter();
        places.filter(move |(other, _)| *other == name).map(|(_, id)| *id)
    }

    /// All keys, and whose they are.
    pub fn keys(&self) -> impl Iterator<Item = (KeyHash, PaymentId)> {
        let all = self.parts.iter().flat_map(|part| &part.keys);
        all.map(|(key, (_, id))| (*key, *id))
    }

    /// Rows of `Key`, as they are to be brought in.
    pub fn key_rows(&self) -> Vec<([u8; 16], [u8; 32])> {
        let mut rows = Vec::with_capacity(self.payments);
        for part in &self.parts {
            let begin = rows.len();
            let row = |(key, (request, id)): (&KeyHash, &(RequestHash, PaymentId))| {
                (key.0, record::created(*request, *id))
            };
            rows.extend(part.keys.iter().map(row));
            rows[begin..].sort_unstable();
        }
        rows
    }

    /// Keys of `Index`, as they are to be brought in.
    pub fn index_rows(&self) -> Vec<[u8; 24]> {
        let mut rows = Vec::with_capacity(self.payments * 2);
        for part in &self.parts {
            let begin = rows.len();
            rows.extend(part.places.iter().map(|(name, id)| record::index_key(*name, *id)));
            rows[begin..].sort_unstable();
        }
        rows.dedup();
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::Timestamp;

    fn derived(n: u8, key: u8) -> Derived {
        let id = PaymentId::from_parts(Timestamp::from_ms(1_000), n.into());
        let idempotency = Idempotency { key: KeyHash([key; 16]), request: RequestHash([n; 16]) };
        Derived { id, idempotency: Some(idempotency), names: [[1; 8], [n; 8]] }
    }

    #[test]
    fn what_leaves_is_found_until_it_has_left() {
        let tail = Tail::default();
        tail.add([derived(3, 7), derived(2, 8)]);
        let leaving = tail.leave();
        tail.add([derived(4, 7)]);
        let id = |n| derived(n, 0).id;
        assert_eq!(tail.key(KeyHash([7; 16])).unwrap().1, id(4), "the newer one holds");
        assert_eq!(tail.key(KeyHash([8; 16])).unwrap().1, id(2));
        assert_eq!(tail.ids([1; 8], |_| true).len(), 3);
        assert_eq!((tail.oldest(), tail.waiting(), tail.payments()), (Some(id(2)), 1, 3));
        assert!(Arc::ptr_eq(&leaving, &tail.leave()), "as long as it has not left");
        tail.has_left();
        assert_eq!(tail.key(KeyHash([8; 16])), None);
        assert_eq!((tail.oldest(), tail.ids([1; 8], |_| true)), (Some(id(4)), vec![id(4)]));
    }

    #[test]
    fn rows_rise_and_no_key_comes_twice() {
        let tail = Tail::default();
        tail.add([
            derived(3, 7),
            derived(200, 255),
            derived(3, 7),
            derived(2, 5),
            derived(90, 100),
        ]);
        let layer = tail.leave();
        let keys: Vec<_> = layer.key_rows().iter().map(|(key, _)| key[0]).collect();
        assert_eq!(keys, [5, 7, 100, 255]);
        let rows = layer.index_rows();
        assert_eq!(rows.len(), 8);
        assert!(rows.is_sorted_by(|a, b| a < b));
    }
}
