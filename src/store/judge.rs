//! Which payments retention lets go: a walk from the horizon on, oldest first, and a second look at those
//! that it has passed and kept.

use std::{
    collections::BTreeSet,
    ops::{Bound, ControlFlow},
    sync::Arc,
    time::Duration,
};

use super::{
    StoreError, Versioned,
    record::{self, Standing},
    shared::Shared,
    tables::{Span, Table},
    writer::Judged,
};
use crate::domain::{Text, ids::PaymentId, payment::Payment, time::Timestamp};

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

/// What a payment is judged by.
struct Case {
    id: PaymentId,
    standing: Standing,
    /// The reservation that its draw was counted for.
    drew: Option<Text>,
}

/// Of those that are damaged, why they cannot be judged.
type Cases = Vec<(PaymentId, Result<Case, StoreError>)>;

impl Case {
    /// As it lies in the tables, but for its state. Most drew nothing: of their terms no more is read than says so, and
    /// where the rest is damaged they go all the same.
    fn of(terms: &[u8]) -> Result<Self, StoreError> {
        let head = record::terms_head(terms)?;
        match head.draws() {
            true => record::payment(terms, None).map(Self::from),
            false => Ok(Self { id: head.id, standing: head.standing(), drew: None }),
        }
    }
}

impl From<Versioned> for Case {
    fn from(stored: Versioned) -> Self {
        let Payment { terms, progress } = stored.payment;
        let standing = Standing::from(&progress);
        let has_counted = terms.idempotency.is_none() && terms.plan.scenario.draws();
        let drew = has_counted.then(|| terms.reservation_id.clone());
        Self { id: terms.id, standing, drew }
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
        for (id, case) in self.cases()? {
            match case {
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
        if !case.standing.is_settled {
            Fate::Stays
        } else if self.is_expired(case.standing.updated_at) {
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
        let Case { id, standing, drew } = case;
        self.surplus = self.surplus.saturating_sub(1);
        self.early += u64::from(early);
        self.judged.gone.push(id);
        if standing.has_dead {
            self.judged.dead.push(id);
        }
        self.judged.drew.extend(drew);
    }

    /// The next payments, each with its state: two walks side by side, since each look-up by itself would
    /// cost as much as all the rest.
    fn cases(&mut self) -> Result<Cases, StoreError> {
        let mut cases = Cases::new();
        let shared = self.shared;
        shared.scan(Table::Payment, self.ahead(), &mut |key, terms| {
            let Ok(id) = record::id(key) else { return ControlFlow::Continue(()) };
            let too_young = !self.is_expired(id.made_at()) && cases.len() as u64 >= self.surplus;
            if too_young || cases.len() == LOOK_AHEAD {
                (self.has_ended, self.is_done) = (false, too_young);
                return ControlFlow::Break(());
            }
            cases.push((id, Case::of(terms)));
            ControlFlow::Continue(())
        })?;
        let (Some((first, _)), Some((last, _))) = (cases.first(), cases.last()) else {
            return Ok(cases);
        };
        let [from, to] = [first, last].map(|id| Bound::Included(id.bytes().to_vec()));
        let mut at = 0;
        shared.scan(Table::State, Span::forwards(from, to), &mut |key, state| {
            while cases.get(at).is_some_and(|(id, _)| id.bytes().as_slice() < key) {
                at += 1;
            }
            if let Some((id, case)) = cases.get_mut(at)
                && id.bytes().as_slice() == key
                && let Ok(known) = case
            {
                match record::standing(state) {
                    Ok(standing) => known.standing = standing,
                    Err(error) => *case = Err(error),
                }
            }
            ControlFlow::Continue(())
        })?;
        Ok(cases)
    }
}
