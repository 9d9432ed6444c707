//! What the writer, the janitor and the readers share: the tables, the book, and how to read records.

use std::{
    ops::{Bound, ControlFlow},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use super::{
    Health, OnCommit, Remembered, StoreError, Versioned,
    book::{Book, Dues},
    horizon::Horizon,
    known::KnownKeys,
    marks::meta,
    open::OpenPayments,
    record,
    tables::{Batch, Span, Table, Tables, TablesError, Visit},
    tail::{Derived, Names, Tail},
};
use crate::domain::{
    ids::{KeyHash, PaymentId, StoreSecret},
    payment::{Payment, Terms},
    time::Timestamp,
};

/// How long things are kept.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// A settled payment, after its last change.
    pub payments: Duration,
    pub idempotency: Duration,
    /// `None`: no cap.
    pub payments_max: Option<u64>,
}

impl Retention {
    /// A payment outlives its key.
    pub fn keep(&self) -> Duration {
        self.payments.max(self.idempotency)
    }
}

pub struct Shared {
    pub tables: Arc<dyn Tables>,
    pub book: Arc<Book>,
    pub open: OpenPayments,
    pub tail: Tail,
    pub known: KnownKeys,
    pub horizon: Arc<Horizon>,
    pub secret: StoreSecret,
    pub retention: Retention,
    pub on_commit: OnCommit,
    /// The last commit that is on the disk.
    pub sequence: AtomicU64,
    pub payments: AtomicU64,
    pub full: AtomicBool,
    /// More payments than the cap and its slack allow, and the janitor cannot keep up.
    pub dropping_behind: AtomicBool,
    pub open_max: usize,
    pub failed: watch::Sender<bool>,
}

impl Shared {
    pub fn health(&self) -> Health {
        if *self.failed.borrow() {
            Health::Failed
        } else if self.full.load(Ordering::Relaxed) {
            Health::Full
        } else {
            Health::Good
        }
    }

    /// After this nothing is acknowledged any more.
    pub fn fail(&self, error: &TablesError) {
        tracing::error!(%error, "a commit failed; nothing more is acknowledged");
        self.failed.send_replace(true);
    }

    pub fn read(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.tables.get(table, key).map_err(|error| {
            tracing::error!(%error, table = table.name(), "a read failed");
            StoreError::Unavailable
        })
    }

    pub fn scan(&self, table: Table, span: Span, visit: Visit<'_>) -> Result<(), StoreError> {
        self.tables.scan(table, span, visit).map_err(|error| {
            tracing::error!(%error, table = table.name(), "a scan failed");
            StoreError::Unavailable
        })
    }

    pub fn get(&self, id: PaymentId) -> Result<Option<Arc<Versioned>>, StoreError> {
        if let Some(open) = self.open.get(id) {
            return Ok(Some(open));
        }
        // State first: where the payment goes in between, there is nothing, not half of it.
        let state = self.read(Table::State, id.bytes())?;
        let Some(terms) = self.read(Table::Payment, id.bytes())? else { return Ok(None) };
        if !self.horizon.has(id) {
            return Ok(None);
        }
        record::payment(&terms, state.as_deref()).map(|stored| Some(Arc::new(stored)))
    }

    pub fn remembered(
        &self,
        key: KeyHash,
        now: Timestamp,
    ) -> Result<Option<Remembered>, StoreError> {
        match self.created(key, now)? {
            Some(created) => Ok(Some(created)),
            None => self.replied(key, now),
        }
    }

    /// What is known under the key of a create.
    pub fn created(&self, key: KeyHash, now: Timestamp) -> Result<Option<Remembered>, StoreError> {
        let known = match self.tail.key(key) {
            // In this order: what leaves the tail is known before.
            None if !self.known.may_have(key) => None,
            None => self.read(Table::Key, &key.0)?.map(|bytes| record::read_created(&bytes)),
            known => known.map(Ok),
        };
        let Some((request, id)) = known.transpose()? else { return Ok(None) };
        let holds = self.lives(id.made_at(), now) && self.horizon.has(id);
        Ok(holds.then_some(Remembered::Created { request, id }))
    }

    /// What is known under the key of any other call.
    pub fn replied(&self, key: KeyHash, now: Timestamp) -> Result<Option<Remembered>, StoreError> {
        let Some(bytes) = self.read(Table::Reply, &key.0)? else { return Ok(None) };
        let (request, at, bytes) = record::read_reply(&bytes)?;
        Ok(self.lives(at, now).then_some(Remembered::Replied { request, bytes }))
    }

    fn lives(&self, since: Timestamp, now: Timestamp) -> bool {
        now.since(since) < self.retention.idempotency
    }

    /// When the reply under a key was stored.
    pub fn replied_at(&self, key: KeyHash) -> Option<Timestamp> {
        let bytes = self.read(Table::Reply, &key.0).ok().flatten()?;
        record::read_reply(&bytes).ok().map(|(_, at, _)| at)
    }

    /// What a payment has in the derived tables.
    pub fn derived(&self, terms: &Terms) -> Derived {
        let (id, idempotency) = (terms.id, terms.idempotency);
        Derived { id, idempotency, names: self.index_names(terms) }
    }

    fn index_names(&self, terms: &Terms) -> Names {
        [self.user_name(&terms.user_id), self.reservation_name(&terms.reservation_id)]
    }

    pub fn user_name(&self, user: &str) -> [u8; 8] {
        self.name(b"user", user)
    }

    pub fn reservation_name(&self, reservation: &str) -> [u8; 8] {
        self.name(b"reservation", reservation)
    }

    /// The name under which a reservation's draws are counted.
    pub fn draws_name(&self, reservation: &str) -> [u8; 16] {
        self.secret.hash(b"draws", &[reservation.as_bytes()])
    }

    fn name(&self, kind: &[u8], name: &str) -> [u8; 8] {
        let hash = self.secret.hash(kind, &[name.as_bytes()]);
        hash[..8].try_into().expect("8 of 16 bytes")
    }

    /// Derives again what was not in the tables yet.
    pub fn refill_tail(&self, from: Option<PaymentId>) -> Result<(), StoreError> {
        let from = from.map_or(Bound::Unbounded, |id| Bound::Included(id.bytes().to_vec()));
        let mut problem = None;
        self.scan(Table::Payment, Span::forwards(from, Bound::Unbounded), &mut |_, terms| {
            match record::payment(terms, None) {
                Ok(Versioned { payment, .. }) => self.tail.add([self.derived(&payment.terms)]),
                Err(error) => problem = Some(error),
            }
            if problem.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        problem.map_or(Ok(()), Err)
    }

    /// Fills the book from a scan of the payments that may be open.
    pub fn rebuild(&self, floor: Option<PaymentId>) -> Result<(), StoreError> {
        self.open_since(floor, &mut |payment| {
            let dues = Dues::of(payment);
            let entry = dues.entry(payment.terms.created_at);
            self.book.note([(payment.terms.id, dues, entry)]);
        })
    }

    /// What the first format lacks, in one batch: entries in `Due` of payments that wait longer than the
    /// scan window, which was a minute then; and that of all payments so far what is derived is there,
    /// because it was in the commits.
    pub fn upgrade(
        &self,
        floor: Option<PaymentId>,
        newest: Option<PaymentId>,
    ) -> Result<PaymentId, StoreError> {
        let mut batch = Batch::default();
        self.open_since(floor, &mut |payment| {
            let dues = Dues::of(payment);
            if let Some(at) = dues.entry(payment.terms.created_at) {
                let key = record::timed_key(at, payment.terms.id.bytes());
                batch.put_with(Table::Due, key, |bytes| record::dues(&dues, bytes));
            }
        })?;
        let derived = newest.unwrap_or_default();
        batch.put(Table::Meta, meta::DERIVED, derived.bytes());
        self.tables.write(&batch).map_err(|error| {
            tracing::error!(%error, "the store could not be brought to this format");
            StoreError::Unavailable
        })?;
        Ok(derived)
    }

    /// Sees every payment from the floor on that waits for something.
    fn open_since(
        &self,
        floor: Option<PaymentId>,
        see: &mut dyn FnMut(&Payment),
    ) -> Result<(), StoreError> {
        let from = floor.map_or(Bound::Unbounded, |id| Bound::Included(id.bytes().to_vec()));
        let mut problem = None;
        let span = Span::forwards(from, Bound::Unbounded);
        self.scan(Table::Payment, span, &mut |key, terms| {
            if !record::id(key).is_ok_and(|id| self.horizon.has(id)) {
                return ControlFlow::Continue(());
            }
            let state = self.read(Table::State, key);
            match state.and_then(|state| record::payment(terms, state.as_deref())) {
                Ok(Versioned { payment, .. }) => {
                    if Dues::of(&payment).earliest().is_some() {
                        see(&payment);
                    }
                    ControlFlow::Continue(())
                }
                Err(error) => {
                    problem = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        problem.map_or(Ok(()), Err)
    }

    /// Brings payments whose entry in `Due` lies in the range into the book.
    pub fn load(&self, from: Timestamp, to: Timestamp) -> Result<(), StoreError> {
        let key = |at| record::timed_key(at, &[0; 16]).to_vec();
        let span = Span::forwards(Bound::Included(key(from)), Bound::Excluded(key(to.plus_ms(1))));
        let mut entries = Vec::new();
        self.scan(Table::Due, span, &mut |key, dues| {
            entries.push((record::read_timed_key(key), dues.to_vec()));
            ControlFlow::Continue(())
        })?;
        // All of it is read before the book hears of any: after an error it is asked for again.
        let mut found = Vec::with_capacity(entries.len());
        for (key, dues) in entries {
            match key.and_then(|(at, id)| self.due(at, PaymentId::from_bytes(id), &dues)) {
                Ok(due) => found.extend(due),
                Err(StoreError::Corrupt(why)) => {
                    // It must not hold up what waits beside it.
                    tracing::error!(
                        why,
                        "an entry of what is due cannot be read; it is passed over"
                    );
                }
                Err(error) => return Err(error),
            }
        }
        self.book.has_read(to);
        self.book.note(found);
        Ok(())
    }

    /// What an entry in `Due` stands for.
    fn due(
        &self,
        at: Timestamp,
        id: PaymentId,
        record: &[u8],
    ) -> Result<Option<(PaymentId, Dues, Option<Timestamp>)>, StoreError> {
        let dues = match record {
            // Of the first format: what it waits for is in the payment alone.
            [] => self.get(id)?.map(|stored| Dues::of(&stored.payment)),
            record => Some(record::read_dues(record)?),
        };
        Ok(dues.map(|dues| (id, dues, Some(at))))
    }
}
