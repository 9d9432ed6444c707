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
            tables.write(half).expect("the faults are tried on disks that work");
            rest.0.append(&mut batch.0);
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
    let staged = |table, key: &Vec<u8>| {
        let mut entries = batch.0.iter().rev();
        entries.find(|(t, k, _)| *t == table && k == key).and_then(|(.., value)| value.clone())
    };
    let (mut half, mut takes_back) = (Batch::default(), Batch::default());
    for (table, key, value) in &batch.0 {
        half.0.push((*table, key.clone(), value.clone()));
        if value.is_none() || !matches!(table, Table::Payment | Table::State) {
            continue;
        }
        let stored = || tables.get(Table::Payment, key).expect("a disk that works");
        let terms = staged(Table::Payment, key).or_else(stored).expect("state without a payment");
        let state = staged(Table::State, key);
        if state.is_none() {
            takes_back.delete(Table::State, key.as_slice());
        }
        let mut known = record::payment(&terms, state.as_deref()).expect("we have just written it");
        known.payment.progress.notifications.clear();
        let revision = Revision(known.revision.0 | HALF);
        let state = record::progress(revision, &known.payment.progress);
        half.put(Table::State, key.as_slice(), state);
    }
    (half, takes_back)
}
