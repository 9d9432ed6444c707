//! How far retention has got. Nothing is deleted payment by payment: what lies below the horizon reads as
//! absent, and the engine drops it by whole files, or when it merges them anyway.

use std::{
    collections::BTreeSet,
    ops::Bound,
    sync::{
        PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::domain::ids::PaymentId;

/// The mark moves when that is on the disk. Who is kept may be known here before: a failed commit ends the
/// process.
#[derive(Default)]
pub struct Horizon {
    /// The first half of the mark: most ids are told from it without the lock.
    head: AtomicU64,
    line: RwLock<Line>,
}

#[derive(Default)]
struct Line {
    /// Payments with smaller ids are gone.
    mark: PaymentId,
    /// Save these.
    kept: BTreeSet<PaymentId>,
}

/// The first half of an id: its moment, and two bytes more.
fn head(id: PaymentId) -> u64 {
    (u128::from_be_bytes(*id.bytes()) >> 64) as u64
}

impl Horizon {
    fn line(&self) -> RwLockReadGuard<'_, Line> {
        self.line.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn mark(&self) -> PaymentId {
        self.line().mark
    }

    /// Whether a payment with this id may be there.
    pub fn has(&self, id: PaymentId) -> bool {
        if head(id) > self.head.load(Ordering::Acquire) {
            return true;
        }
        let line = self.line();
        id >= line.mark || line.kept.contains(&id)
    }

    pub fn is_kept(&self, id: PaymentId) -> bool {
        self.line().kept.contains(&id)
    }

    /// The smallest id that may be there.
    pub fn floor(&self) -> PaymentId {
        let line = self.line();
        line.kept.first().map_or(line.mark, |first| line.mark.min(*first))
    }

    /// Of those that were kept, the next ones.
    pub fn kept_beyond(&self, at: Option<PaymentId>, max: usize) -> Vec<PaymentId> {
        let from = at.map_or(Bound::Unbounded, Bound::Excluded);
        self.line().kept.range((from, Bound::Unbounded)).take(max).copied().collect()
    }

    /// Whether there is nothing from the one id to the other.
    pub fn is_gone(&self, oldest: PaymentId, newest: PaymentId) -> bool {
        let line = self.line();
        newest < line.mark && line.kept.range(oldest..=newest).next().is_none()
    }

    pub fn moved<'a>(
        &self,
        to: Option<PaymentId>,
        kept: impl IntoIterator<Item = &'a PaymentId>,
        gone: impl IntoIterator<Item = &'a PaymentId>,
    ) {
        let mut line = self.line.write().unwrap_or_else(PoisonError::into_inner);
        line.kept.extend(kept);
        for id in gone {
            line.kept.remove(id);
        }
        line.mark = to.map_or(line.mark, |to| line.mark.max(to));
        self.head.store(head(line.mark), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::Timestamp;

    fn id(ms: i64, n: u128) -> PaymentId {
        PaymentId::from_parts(Timestamp::from_ms(ms), n)
    }

    #[test]
    fn what_is_below_is_gone_save_what_is_kept() {
        let horizon = Horizon::default();
        assert!(horizon.has(id(1, 1)));
        horizon.moved(Some(id(10, 5)), &[id(3, 0), id(10, 4)], &[]);
        let there = |ids: &[PaymentId]| ids.iter().map(|id| horizon.has(*id)).collect::<Vec<_>>();
        let asked = [id(1, 1), id(3, 0), id(10, 3), id(10, 4), id(10, 5), id(11, 0)];
        assert_eq!(there(&asked), [false, true, false, true, true, true]);
        assert_eq!(horizon.floor(), id(3, 0));
        assert!(horizon.is_gone(id(3, 1), id(10, 3)));
        assert!(!horizon.is_gone(id(3, 0), id(10, 3)), "one is kept");
        assert!(!horizon.is_gone(id(10, 4), id(10, 5)), "one is above");
        horizon.moved(None, &[], &[id(3, 0)]);
        assert_eq!((horizon.mark(), horizon.floor()), (id(10, 5), id(10, 4)));
        assert!(!horizon.has(id(3, 0)));
    }
}
