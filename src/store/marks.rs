//! What is stored of the store itself: where a start has to begin to look.

use super::{book::Floors, stage::Stage, tables::Table};
use crate::domain::{ids::PaymentId, time::Timestamp};

/// Where the scan at start begins, and what it need not count: as last stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Marks {
    /// Every older payment is settled, or has an entry in `Due`.
    pub payment: Option<PaymentId>,
    /// `Due` has no entry before this.
    pub due: Timestamp,
    /// The newest payment ever stored.
    pub newest: Option<PaymentId>,
    /// Of every older payment, what is derived from it is in its tables.
    pub derived: Option<PaymentId>,
}

impl Marks {
    /// Whether what is about to be stored lies before a mark, so that the mark must move back in the
    /// same commit: an id may be older than its commit.
    pub fn note(&mut self, stage: &Stage) -> bool {
        self.newest = self.newest.max(stage.newest);
        let before_payment = match (stage.oldest, self.payment) {
            (Some(oldest), Some(mark)) => oldest < mark,
            (Some(_), None) | (None, _) => false,
        };
        let before_derived =
            stage.derived.iter().any(|new| self.derived.is_some_and(|mark| new.id < mark));
        before_payment || before_derived || stage.nearest_entry.is_some_and(|at| at < self.due)
    }

    pub fn stage(
        &mut self,
        stage: &mut Stage,
        floors: Floors,
        tail: Option<PaymentId>,
        payments: u64,
    ) {
        let open = [floors.payment, stage.oldest].into_iter().flatten().min();
        // Where nothing is open, everything up to the newest payment is settled.
        self.payment = open.or(self.newest);
        self.due = stage.nearest_entry.map_or(floors.due, |at| at.min(floors.due));
        if let Some(floor) = self.payment {
            stage.batch.put(Table::Meta, meta::FLOOR, floor.bytes());
        }
        let staged = stage.derived.iter().map(|new| new.id);
        self.derived = staged.chain(tail).min().or(self.newest);
        if let Some(derived) = self.derived {
            stage.batch.put(Table::Meta, meta::DERIVED, derived.bytes());
        }
        stage.batch.put(Table::Meta, meta::DUE_FLOOR, self.due.ms().max(0).to_be_bytes());
        if let Some(newest) = self.newest {
            let counted = [newest.bytes().as_slice(), &payments.to_be_bytes()].concat();
            stage.batch.put(Table::Meta, meta::COUNTED, counted);
        }
    }
}

/// Keys of the `Meta` table.
pub mod meta {
    pub const SECRET: &[u8; 6] = b"secret";
    /// How it hashes what it looks up; there is no such row where the store was made before format 4.
    pub const HASHES: &[u8; 6] = b"hashes";
    pub const SIPHASH_2_4_128: &[u8] = &[1];
    pub const SEQUENCE: &[u8; 8] = b"sequence";
    pub const FLOOR: &[u8; 5] = b"floor";
    pub const DUE_FLOOR: &[u8; 9] = b"due_floor";
    pub const COUNTED: &[u8; 7] = b"counted";
    pub const DERIVED: &[u8; 7] = b"derived";
    pub const HORIZON: &[u8; 7] = b"horizon";
}
