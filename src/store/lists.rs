//! Pages of payments: ids are time-ordered, so newest first is a walk backwards; users and
//! reservations have an index, everything else is a filter while reading. And pages of deliveries, in
//! the order of their payments; payments with dead ones have a table.

use std::{
    ops::{Bound, ControlFlow, RangeBounds},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    StoreError, Versioned, record,
    shared::Shared,
    tables::{Span, Table},
};
use crate::domain::{
    deliveries::{DeliveryFilter, DeliveryNo, Standing},
    ids::PaymentId,
    payment::Payment,
    status::Status,
    time::Timestamp,
};

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
    pub payments: Vec<Arc<Versioned>>,
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
    let oldest = above_horizon(shared, oldest);
    let older = query.direction == Direction::Older;
    let name = match (&query.reservation, &query.user) {
        (Some(reservation), _) => Some(shared.reservation_name(reservation)),
        (None, Some(user)) => Some(shared.user_name(user)),
        (None, None) => None,
    };
    match name {
        // Keys of the index run from the newest to the oldest.
        Some(name) => {
            let key = |bound: Bound<PaymentId>, end: u8| match bound {
                Bound::Unbounded => Bound::Included([name.as_slice(), &[end; 16]].concat()),
                bound => bound.map(|id| record::index_key(name, id).to_vec()),
            };
            let span = Span { from: key(newest, 0), to: key(oldest, 0xff), backwards: !older };
            let range = (oldest, newest);
            let is_there = |id: PaymentId| range.contains(&id) && shared.horizon.has(id);
            let mut fresh = shared.tail.ids(name, is_there);
            let (mut ids, ended) = ids_in(shared, Table::Index, span, record::read_index_id)?;
            ids.append(&mut fresh);
            ids.sort_unstable();
            if older {
                ids.reverse();
            }
            // What was just brought in was seen in both places.
            ids.dedup();
            let ended = ended && ids.len() < CHUNK;
            ids.truncate(CHUNK);
            Ok((ids, ended))
        }
        None => {
            let key = |bound: Bound<PaymentId>| bound.map(|id| id.bytes().to_vec());
            let span = Span { from: key(oldest), to: key(newest), backwards: older };
            ids_in(shared, Table::Payment, span, record::id)
        }
    }
}

/// Below it there may be much that is gone and still to be dropped.
fn above_horizon(shared: &Shared, oldest: Bound<PaymentId>) -> Bound<PaymentId> {
    let floor = shared.horizon.floor();
    match oldest {
        Bound::Included(id) | Bound::Excluded(id) if id >= floor => oldest,
        Bound::Included(_) | Bound::Excluded(_) | Bound::Unbounded => Bound::Included(floor),
    }
}

/// The first ids of a span, and whether there are no others.
fn ids_in(
    shared: &Shared,
    table: Table,
    span: Span,
    read: fn(&[u8]) -> Result<PaymentId, StoreError>,
) -> Result<(Vec<PaymentId>, bool), StoreError> {
    let mut ids = Vec::new();
    let mut problem = None;
    shared.scan(table, span, &mut |key, _| {
        match read(key) {
            Ok(id) if !shared.horizon.has(id) => {}
            Ok(id) => ids.push(id),
            Err(error) => problem = Some(error),
        }
        if ids.len() == CHUNK || problem.is_some() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    match problem {
        Some(error) => Err(error),
        None => {
            let ended = ids.len() < CHUNK;
            Ok((ids, ended))
        }
    }
}

#[derive(Clone, Debug)]
pub struct DeliveryQuery {
    pub filter: DeliveryFilter,
    /// From the newest payment when absent.
    pub beyond: Option<Reached>,
    pub limit: usize,
}

/// How far a walk over deliveries has come: newest payment first, and of each its oldest notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    pub payment: PaymentId,
    /// The last that was seen of the payment's; `None`: all of them were.
    pub delivery: Option<DeliveryNo>,
}

/// One delivery that a query asked for.
#[derive(Clone, Debug)]
pub struct Found {
    pub payment: Arc<Payment>,
    pub no: DeliveryNo,
}

#[derive(Debug, Default)]
pub struct DeliveryPage {
    pub found: Vec<Found>,
    /// There may be more, beyond this.
    pub more_beyond: Option<Reached>,
}

pub fn deliveries(shared: &Shared, query: &DeliveryQuery) -> Result<DeliveryPage, StoreError> {
    let mut page = DeliveryPage::default();
    let mut reached = query.beyond;
    let mut examined = 0;
    loop {
        let (ids, ended) = next_owing(shared, query, reached)?;
        for id in ids {
            if examined == EXAMINED_MAX {
                page.more_beyond = reached;
                return Ok(page);
            }
            examined += 1;
            if let Some(stored) = shared.get(id)? {
                let payment = Arc::new(Arc::unwrap_or_clone(stored).payment);
                page.more_beyond = page.take(query, &payment);
                if page.more_beyond.is_some() {
                    return Ok(page);
                }
            }
            reached = Some(Reached { payment: id, delivery: None });
        }
        if ended {
            return Ok(page);
        }
    }
}

/// The next payments of the walk, and whether it ends with them.
fn next_owing(
    shared: &Shared,
    query: &DeliveryQuery,
    reached: Option<Reached>,
) -> Result<(Vec<PaymentId>, bool), StoreError> {
    let one = query.filter.payment.map_or(Bound::Unbounded, Bound::Included);
    let newest = match reached {
        None => one,
        // Some of its deliveries are still to come.
        Some(Reached { payment, delivery: Some(_) }) => Bound::Included(payment),
        Some(Reached { payment, delivery: None }) => Bound::Excluded(payment),
    };
    let table = match query.filter {
        DeliveryFilter { payment: None, standing: Some(Standing::Dead), .. } => Table::Dead,
        DeliveryFilter { .. } => Table::Payment,
    };
    let key = |bound: Bound<PaymentId>| bound.map(|id| id.bytes().to_vec());
    let one = above_horizon(shared, one);
    let span = Span { from: key(one), to: key(newest), backwards: true };
    ids_in(shared, table, span, record::id)
}

impl DeliveryPage {
    /// Takes what is asked for of a payment; where that does not fit, says from where on.
    fn take(&mut self, query: &DeliveryQuery, payment: &Arc<Payment>) -> Option<Reached> {
        let seen = query.beyond.filter(|reached| reached.payment == payment.terms.id);
        let seen = seen.and_then(|reached| reached.delivery);
        for listed in query.filter.pick(payment).filter(|listed| Some(listed.no()) > seen) {
            if self.found.len() == query.limit {
                let last = self.found.last()?;
                return Some(Reached { payment: last.payment.terms.id, delivery: Some(last.no) });
            }
            self.found.push(Found { payment: Arc::clone(payment), no: listed.no() });
        }
        None
    }
}
