//! Which payments retention lets go: a walk from the horizon on, oldest first, and a second look at those
//! that it has passed and kept.

use std::{
    collections::BTreeSet,
    ops::{Bound, ControlFlow},
    sync::Arc,
    time::Duration,
};

use super::{
    StoreError, Versioned, record,
    shared::Shared,
    tables::{Span, Table},
    writer::Judged,
};
use crate::domain::{
    Text,
    ids::PaymentId,
    payment::{Payment, Progress},
    time::Timestamp,
};

/// Payments judged in one go, to bound memory.
const LOOK_AHEAD: usize = 8_000;
/// Reservations whose draws may be forgotten with it: the writer looks for what is left of each.
const DREW_MAX: usize = 500;
/// A settled payment that has changed of late stays for a while yet. The horizon waits so long for such
/// ones before it passes them.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Judge<'a> {
    shared: &'a Shared,
    now: Timestamp,
    /// How many must go before their time.
    surplus: u64,
    pub judged: Judged,
    /// How many of those that go do so before their time.
    pub early: u64,
    /// There is nothing more to judge for now.
    pub is_done: bool,
    /// There is no payment beyond those that were looked at.
    has_ended: bool,
}

enum Fate {
    Goes {
        early: bool,
    },
    Stays,
    /// It may go soon: neither it nor what is younger is passed.
    NotYet,
}

/// A payment as it lies in the tables, newest bytes.
struct Row {
    id: PaymentId,
    terms: Vec<u8>,
    state: Option<Vec<u8>>,
}

/// What a payment is judged by.
struct Case {
    id: PaymentId,
    progress: Progress,
    /// The reservation that its draw was counted for.
    drew: Option<Text>,
}

impl Case {
    /// Most have a state and drew nothing: of their terms no more is read than says so, and where the rest is damaged
    /// they go all the same.
    fn of(row: &Row) -> Result<Self, StoreError> {
        let Row { id, terms, state } = row;
        match state {
            Some(state) if !record::scenario(terms)?.draws() => {
                let (_, progress) = record::read_progress(state)?;
                Ok(Self { id: *id, progress, drew: None })
            }
            state => record::payment(terms, state.as_deref()).map(Self::from),
        }
    }
}

impl From<Versioned> for Case {
    fn from(stored: Versioned) -> Self {
        let Payment { terms, progress } = stored.payment;
        let has_counted = terms.idempotency.is_none() && terms.plan.scenario.draws();
        let drew = has_counted.then(|| terms.reservation_id.clone());
        Self { id: terms.id, progress, drew }
    }
}

impl<'a> Judge<'a> {
    pub fn new(shared: &'a Shared, now: Timestamp, surplus: u64) -> Self {
        let to = shared.horizon.mark();
        let judged = Judged {
            to,
            gone: Vec::new(),
            kept: Vec::new(),
            dead: Vec::new(),
            drew: BTreeSet::new(),
        };
        Self { shared, now, surplus, judged, early: 0, is_done: true, has_ended: true }
    }

    /// Whether the oldest payment above the horizon may go.
    pub fn has_work(&self) -> Result<bool, StoreError> {
        let mut oldest = None;
        self.shared.scan(Table::Payment, self.ahead(), &mut |key, _| {
            oldest = Some(record::id(key));
            ControlFlow::Break(())
        })?;
        let oldest = oldest.transpose()?;
        Ok(oldest.is_some_and(|id| self.surplus > 0 || self.is_expired(id.made_at())))
    }

    fn ahead(&self) -> Span {
        let mark = self.shared.horizon.mark();
        Span::forwards(Bound::Included(mark.bytes().to_vec()), Bound::Unbounded)
    }

    fn is_expired(&self, at: Timestamp) -> bool {
        self.now.since(at) >= self.shared.retention.keep()
    }

    /// At a payment that was kept.
    pub fn look_again(&mut self, id: PaymentId) -> Result<(), StoreError> {
        match self.shared.get(id) {
            Ok(Some(stored)) => {
                let case = Case::from(Arc::unwrap_or_clone(stored));
                match self.fate(&case) {
                    Fate::Goes { early } => self.goes(case, early),
                    Fate::Stays | Fate::NotYet => {}
                }
            }
            Ok(None) | Err(StoreError::Corrupt(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// At the next payments above the horizon.
    pub fn look_ahead(&mut self) -> Result<(), StoreError> {
        for row in self.rows()? {
            let id = row.id;
            match Case::of(&row) {
                Ok(case) => match self.fate(&case) {
                    Fate::Goes { early } => self.goes(case, early),
                    Fate::Stays => self.judged.kept.push(id),
                    Fate::NotYet => {
                        self.is_done = true;
                        return Ok(());
                    }
                },
                Err(StoreError::Corrupt(why)) => {
                    // It stays, and what is behind it goes all the same.
                    tracing::debug!(payment = id.intent(), why, "a payment cannot be read");
                    self.judged.kept.push(id);
                }
                Err(error) => return Err(error),
            }
            self.judged.to = id.next();
            if self.judged.drew.len() >= DREW_MAX {
                self.is_done = false;
                return Ok(());
            }
        }
        // Some of those that were enough may have to stay: then younger ones go.
        self.is_done = self.has_ended || self.surplus == 0 && self.is_done;
        Ok(())
    }

    fn fate(&self, case: &Case) -> Fate {
        if !case.progress.is_settled() {
            Fate::Stays
        } else if self.is_expired(case.progress.updated_at) {
            Fate::Goes { early: false }
        } else if self.surplus > 0 {
            Fate::Goes { early: true }
        } else if self.is_expired(case.id.made_at().plus(PATIENCE)) {
            Fate::Stays
        } else {
            Fate::NotYet
        }
    }

    fn goes(&mut self, case: Case, early: bool) {
        let Case { id, progress, drew } = case;
        self.surplus = self.surplus.saturating_sub(1);
        self.early += u64::from(early);
        self.judged.gone.push(id);
        if progress.has_dead() {
            self.judged.dead.push(id);
        }
        self.judged.drew.extend(drew);
    }

    /// The next payments, each with its state: two walks side by side, since each look-up by itself would
    /// cost as much as all the rest.
    fn rows(&mut self) -> Result<Vec<Row>, StoreError> {
        let mut rows: Vec<Row> = Vec::new();
        let shared = self.shared;
        shared.scan(Table::Payment, self.ahead(), &mut |key, terms| {
            let Ok(id) = record::id(key) else { return ControlFlow::Continue(()) };
            let too_young = !self.is_expired(id.made_at()) && rows.len() as u64 >= self.surplus;
            if too_young || rows.len() == LOOK_AHEAD {
                (self.has_ended, self.is_done) = (false, too_young);
                return ControlFlow::Break(());
            }
            rows.push(Row { id, terms: terms.to_vec(), state: None });
            ControlFlow::Continue(())
        })?;
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return Ok(rows) };
        let [from, to] = [first, last].map(|row| Bound::Included(row.id.bytes().to_vec()));
        let mut at = 0;
        shared.scan(Table::State, Span::forwards(from, to), &mut |key, state| {
            while rows.get(at).is_some_and(|row| row.id.bytes().as_slice() < key) {
                at += 1;
            }
            if let Some(row) = rows.get_mut(at).filter(|row| row.id.bytes().as_slice() == key) {
                row.state = Some(state.to_vec());
            }
            ControlFlow::Continue(())
        })?;
        Ok(rows)
    }
}
