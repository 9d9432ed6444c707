//! Pages of payments: ids are time-ordered, so newest first is a walk backwards; users and
//! reservations have an index, everything else is a filter while reading.

use std::ops::{Bound, ControlFlow};

use super::{
    StoreError, Versioned, record,
    shared::Shared,
    tables::{Span, Table},
};
use crate::domain::{ids::PaymentId, payment::Payment, status::Status, time::Timestamp};

/// Every page looks at so many payments at the most, whatever the filter.
pub const EXAMINED_MAX: usize = 10_000;
/// Matches are counted up to here.
pub const COUNTED_MAX: u32 = 1_000;
/// Ids collected in one scan.
const CHUNK: usize = 500;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the newest towards the oldest.
    Older,
    Newer,
}

#[derive(Clone, Debug)]
pub struct ListQuery {
    pub user: Option<String>,
    pub reservation: Option<String>,
    pub status: Option<Status>,
    pub created_from: Option<Timestamp>,
    /// Exclusive.
    pub created_to: Option<Timestamp>,
    /// Exclusive; from the end of the list when absent.
    pub beyond: Option<PaymentId>,
    pub direction: Direction,
    /// Matches to pass over.
    pub skip: usize,
    pub limit: usize,
}

#[derive(Debug, Default)]
pub struct Page {
    /// Newest first, whatever the direction.
    pub payments: Vec<Versioned>,
    /// There may be more in the direction of the walk, beyond this id.
    pub more_beyond: Option<PaymentId>,
    /// Matches among those examined, up to 1,000.
    pub counted: u32,
}

pub fn list(shared: &Shared, query: &ListQuery) -> Result<Page, StoreError> {
    let mut page = Page::default();
    let mut at = query.beyond;
    let mut examined = 0;
    let mut matches = 0;
    let mut full = false;
    loop {
        let (ids, ended) = next_ids(shared, query, at)?;
        for id in &ids {
            if examined == EXAMINED_MAX {
                finish(&mut page, query, at);
                return Ok(page);
            }
            examined += 1;
            if let Some(stored) = shared.get(*id)?
                && query.matches(&stored.payment)
            {
                matches += 1;
                page.counted = page.counted.max(matches.min(COUNTED_MAX));
                if !full && matches as usize > query.skip {
                    if page.payments.len() == query.limit {
                        // The first match that no longer fits: there is more.
                        full = true;
                        page.more_beyond = page.payments.last().map(|last| last.payment.terms.id);
                    } else {
                        page.payments.push(stored);
                    }
                }
                if full && matches >= COUNTED_MAX {
                    finish(&mut page, query, None);
                    return Ok(page);
                }
            }
            at = Some(*id);
        }
        if ended {
            finish(&mut page, query, None);
            return Ok(page);
        }
    }
}

fn finish(page: &mut Page, query: &ListQuery, examined_to: Option<PaymentId>) {
    page.more_beyond = page.more_beyond.or(examined_to);
    if query.direction == Direction::Newer {
        page.payments.reverse();
    }
}

impl ListQuery {
    fn matches(&self, payment: &Payment) -> bool {
        let terms = &payment.terms;
        self.user.as_ref().is_none_or(|user| *user == terms.user_id)
            && self.reservation.as_ref().is_none_or(|name| *name == terms.reservation_id)
            && self.status.is_none_or(|status| status == payment.status())
            && self.created_from.is_none_or(|from| terms.created_at >= from)
            && self.created_to.is_none_or(|to| terms.created_at < to)
    }

    /// Ids between which every match lies: [oldest, newest].
    fn bounds(&self, at: Option<PaymentId>) -> (Bound<PaymentId>, Bound<PaymentId>) {
        let oldest =
            self.created_from.map_or(Bound::Unbounded, |t| Bound::Included(PaymentId::floor(t)));
        let newest =
            self.created_to.map_or(Bound::Unbounded, |t| Bound::Excluded(PaymentId::floor(t)));
        match (self.direction, at) {
            (_, None) => (oldest, newest),
            (Direction::Older, Some(at)) => (oldest, nearer(newest, at, |a, b| a.min(b))),
            (Direction::Newer, Some(at)) => (nearer(oldest, at, |a, b| a.max(b)), newest),
        }
    }
}

/// The tighter of a bound and "beyond `at`".
fn nearer(
    bound: Bound<PaymentId>,
    at: PaymentId,
    tighter: impl Fn(PaymentId, PaymentId) -> PaymentId,
) -> Bound<PaymentId> {
    match bound {
        Bound::Unbounded => Bound::Excluded(at),
        Bound::Included(id) if tighter(id, at) == id && id != at => Bound::Included(id),
        Bound::Excluded(id) if tighter(id, at) == id => Bound::Excluded(id),
        Bound::Included(_) | Bound::Excluded(_) => Bound::Excluded(at),
    }
}

/// The next ids of the walk, and whether it ends with them.
fn next_ids(
    shared: &Shared,
    query: &ListQuery,
    at: Option<PaymentId>,
) -> Result<(Vec<PaymentId>, bool), StoreError> {
    let (oldest, newest) = query.bounds(at);
    let older = query.direction == Direction::Older;
    let name = match (&query.reservation, &query.user) {
        (Some(reservation), _) => Some(shared.reservation_name(reservation)),
        (None, Some(user)) => Some(shared.user_name(user)),
        (None, None) => None,
    };
    let mut ids = Vec::new();
    let mut problem = None;
    let mut collect = |id: Result<PaymentId, StoreError>| {
        match id {
            Ok(id) => ids.push(id),
            Err(error) => problem = Some(error),
        }
        if ids.len() == CHUNK || problem.is_some() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    match name {
        // Keys of the index run from the newest to the oldest.
        Some(name) => {
            let key = |bound: Bound<PaymentId>, end: u8| match bound {
                Bound::Unbounded => Bound::Included([name.as_slice(), &[end; 16]].concat()),
                bound => bound.map(|id| record::index_key(name, id)),
            };
            let span = Span { from: key(newest, 0), to: key(oldest, 0xff), backwards: !older };
            shared.scan(Table::Index, span, &mut |key, _| collect(record::read_index_id(key)))?;
        }
        None => {
            let key = |bound: Bound<PaymentId>| bound.map(|id| id.bytes().to_vec());
            let span = Span { from: key(oldest), to: key(newest), backwards: older };
            shared.scan(Table::Payment, span, &mut |key, _| collect(record::id(key)))?;
        }
    }
    match problem {
        Some(error) => Err(error),
        None => {
            let ended = ids.len() < CHUNK;
            Ok((ids, ended))
        }
    }
}
