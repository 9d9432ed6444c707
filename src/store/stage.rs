//! What one batch of the writer is about to make true.

use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};

use super::{
    Draw, Remembered, Revision, Versioned,
    book::Dues,
    record,
    tables::{Batch, Table},
    tail::Derived,
};
use crate::domain::{
    ids::{Idempotency, KeyHash, PaymentId},
    payment::Payment,
    time::Timestamp,
};

/// Its maps are keyed by what is made here or hashed with our secret: nobody outside can choose entries
/// that collide.
#[derive(Default)]
pub struct Stage {
    pub batch: Batch,
    pub revisions: FxHashMap<PaymentId, Revision>,
    pub keys: FxHashMap<KeyHash, Remembered>,
    pub dues: Vec<(PaymentId, Dues, Option<Timestamp>)>,
    /// Payments that wait for something, as they will be stored, and those that do not any more.
    pub waiting: Vec<Arc<Versioned>>,
    pub done: Vec<PaymentId>,
    pub oldest: Option<PaymentId>,
    pub nearest_entry: Option<Timestamp>,
    pub newest: Option<PaymentId>,
    pub payments: i64,
    /// Creates that there is still room for.
    pub room: usize,
    pub commits: usize,
    /// The marks are written along.
    pub marks: bool,
    pub derived: Vec<Derived>,
    /// Where the horizon moves to, who stays below it, and who goes.
    pub horizon: Option<PaymentId>,
    pub kept: FxHashSet<PaymentId>,
    pub gone: FxHashSet<PaymentId>,
    /// Held until their counters are on the disk: a counter must not be forgotten before.
    pub draws: Vec<Draw>,
}

impl Stage {
    /// Ready for the next batch. What has grown keeps its room: made anew each time, it would be returned to
    /// the system and fetched again, page by page.
    pub fn clear(&mut self) {
        let Self {
            batch, revisions, keys, dues, waiting, done, derived, kept, gone, draws, ..
        } = self;
        batch.clear();
        revisions.clear();
        keys.clear();
        dues.clear();
        waiting.clear();
        done.clear();
        derived.clear();
        kept.clear();
        gone.clear();
        draws.clear();
        (self.oldest, self.nearest_entry, self.newest, self.horizon) = (None, None, None, None);
        (self.payments, self.room, self.commits, self.marks) = (0, 0, 0, false);
    }

    /// Below the horizon, and there all the same.
    pub fn keep(&mut self, id: PaymentId) {
        if self.kept.insert(id) {
            self.batch.put(Table::Kept, id.bytes(), []);
        }
    }

    /// A payment as it is to be stored: keeps the `Due` table in step, and remembers what the drivers must
    /// know after.
    pub fn note(&mut self, stored: Versioned, before: Option<&Payment>) {
        let (id, created_at) = (stored.payment.terms.id, stored.payment.terms.created_at);
        let dues = Dues::of(&stored.payment);
        let dues_before = before.map(Dues::of).unwrap_or_default();
        let (entry, entry_before) = (dues.entry(created_at), dues_before.entry(created_at));
        if let Some(at) = entry_before.filter(|_| entry != entry_before) {
            self.batch.delete(Table::Due, record::timed_key(at, id.bytes()));
        }
        if let Some(at) = entry.filter(|_| dues != dues_before) {
            let key = record::timed_key(at, id.bytes());
            self.batch.put_with(Table::Due, key, |bytes| record::dues(&dues, bytes));
        }
        let waits_in_memory = entry.is_none() && dues.earliest().is_some();
        match entry {
            Some(at) => self.nearest_entry = Some(self.nearest_entry.map_or(at, |n| n.min(at))),
            None if waits_in_memory => self.oldest = Some(self.oldest.map_or(id, |o| o.min(id))),
            None => {}
        }
        self.dues.push((id, dues, entry));
        self.revisions.insert(id, stored.revision);
        if waits_in_memory {
            self.waiting.push(Arc::new(stored));
        } else {
            self.done.push(id);
        }
    }

    /// What would be brought in later, at once.
    pub fn put_derived(&mut self, derived: &Derived) {
        let id = derived.id;
        if let Some(Idempotency { key, request }) = derived.idempotency {
            self.batch.put(Table::Key, key.0, record::created(request, id));
        }
        for name in derived.names {
            self.batch.put(Table::Index, record::index_key(name, id), []);
        }
    }

    /// A new payment that waits for nothing: no driver need hear of it.
    pub fn note_settled(&mut self, id: PaymentId, revision: Revision) {
        self.revisions.insert(id, revision);
    }

    /// Keeps the `Dead` table in step with a record: a pure function of what it was and what it becomes.
    pub fn note_dead(&mut self, before: &Payment, after: &Payment) {
        let key = *after.terms.id.bytes();
        match (before.progress.has_dead(), after.progress.has_dead()) {
            (false, true) => self.batch.put(Table::Dead, key, []),
            (true, false) => self.batch.delete(Table::Dead, key),
            (false, false) | (true, true) => {}
        }
    }
}
