//! The store's part of the faults on order; see `crate::faults`.

use super::{
    Revision, record,
    tables::{Batch, Table, Tables},
};
use crate::faults::{Fault, WINDOW, chosen};

/// Marks a record that is only half there, so that no commit made against it passes once it is whole.
const HALF: u64 = 1 << 62;

/// Runs before a batch is written by the code that is right. `answer` answers those who wait for it.
pub fn before_commit(tables: &dyn Tables, batch: &mut Batch, answer: impl FnOnce()) {
    if batch.is_empty() {
        return;
    }
    match chosen() {
        Some(Fault::AckBeforeCommit) => answer(),
        Some(Fault::OutboxAfterCommit) => {
            let (half, mut rest) = halves(tables, batch);
            tables.write(&half).expect("the faults are tried on disks that work");
            copy(batch, &mut rest);
            *batch = rest;
            answer();
        }
        Some(Fault::DoubleTick | Fault::EventDoneBeforeSent | Fault::LetterForgotten) | None => {
            return;
        }
    }
    std::thread::sleep(WINDOW);
}

/// The batch with payments that owe nothing; and what takes back the entries that this makes up, to
/// be put before the batch itself.
fn halves(tables: &dyn Tables, batch: &Batch) -> (Batch, Batch) {
    let staged = |table, key: &[u8]| {
        let mut entries = batch.entries().rev();
        entries.find(|(t, k, _)| *t == table && *k == key).and_then(|(.., value)| value)
    };
    let (mut half, mut takes_back) = (Batch::default(), Batch::default());
    copy(batch, &mut half);
    for (table, key, value) in batch.entries() {
        if value.is_none() || !matches!(table, Table::Payment | Table::State) {
            continue;
        }
        let stored = || tables.get(Table::Payment, key).expect("a disk that works");
        let terms = staged(Table::Payment, key).map(<[u8]>::to_vec).or_else(stored);
        let state = staged(Table::State, key);
        if state.is_none() {
            takes_back.delete(Table::State, key);
        }
        let terms = terms.expect("state without a payment");
        let mut known = record::payment(&terms, state).expect("we have just written it");
        known.payment.progress.notifications.clear();
        let revision = Revision(known.revision.0 | HALF);
        let progress = known.payment.progress;
        half.put_with(Table::State, key, |bytes| record::progress(revision, &progress, bytes));
    }
    (half, takes_back)
}

fn copy(from: &Batch, to: &mut Batch) {
    for (table, key, value) in from.entries() {
        match value {
            Some(value) => to.put(table, key, value),
            None => to.delete(table, key),
        }
    }
}
