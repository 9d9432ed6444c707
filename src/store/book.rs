//! Due times in memory: what every open payment waits for, and who works on it just now.
//!
//! Nothing here is the truth: it is rebuilt from what is stored at every start.

use std::{
    collections::{
        BTreeMap, BTreeSet,
        btree_map::{Entry, OccupiedEntry},
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::{Backlog, Work};
use crate::domain::{delivery::Channel, ids::PaymentId, payment::Payment, time::Timestamp};

/// A payment that waits longer than this after its creation has an entry in the `Due` table and is
/// not looked for by the scan at start. The usual ones are over by then; of the others memory holds no
/// more than what falls due next.
pub const SCAN_WINDOW_MS: u64 = 5_000;
/// Entries of `Due` are read so long before the first of them is due.
const READ_AHEAD_MS: u64 = 1_000;

/// When each kind of work of a payment is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dues([Option<Timestamp>; Work::ALL.len()]);

impl Dues {
    pub fn of(payment: &Payment) -> Self {
        Self([
            payment.progress.state.wakes_at(),
            payment.delivery_due(Channel::Event),
            payment.delivery_due(Channel::Webhook),
            payment.delivery_due(Channel::DeadLetter),
        ])
    }

    pub fn earliest(&self) -> Option<Timestamp> {
        self.0.iter().flatten().min().copied()
    }

    /// The time under which the payment stands in the `Due` table, if it does: a pure function of the
    /// record, so that a commit knows which entry the record before it had.
    pub fn entry(&self, created_at: Timestamp) -> Option<Timestamp> {
        self.earliest().filter(|due| *due > created_at.plus_ms(SCAN_WINDOW_MS))
    }
}

const WORKS: usize = Work::ALL.len();

/// A moment, or none: in half the room of an `Option`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moment(i64);

impl Moment {
    const NONE: Self = Self(i64::MIN);

    fn of(at: Option<Timestamp>) -> Self {
        at.map_or(Self::NONE, |at| Self(at.ms()))
    }

    fn get(self) -> Option<Timestamp> {
        (self != Self::NONE).then(|| Timestamp::from_ms(self.0))
    }
}

/// Small, because there are tens of thousands, and tens of thousands come and go in a second.
#[derive(Debug)]
struct Open {
    /// When each kind of work is due.
    due: [Moment; WORKS],
    /// Where each stands in its queue; or stood, while somebody works on it.
    place: [Moment; WORKS],
    is_leased: [bool; WORKS],
    entry: Moment,
}

impl Open {
    const NEW: Self = Self {
        due: [Moment::NONE; WORKS],
        place: [Moment::NONE; WORKS],
        is_leased: [false; WORKS],
        entry: Moment::NONE,
    };

    fn is_leased(&self) -> bool {
        self.is_leased.contains(&true)
    }

    fn waits(&self) -> bool {
        self.due.iter().any(|due| *due != Moment::NONE)
    }

    /// The scan at start must reach it.
    fn is_unlisted(&self) -> bool {
        self.entry == Moment::NONE && self.waits()
    }

    /// Whether it waits for something that `Due` will not give back.
    fn waits_here(&self, read_until: Timestamp) -> bool {
        self.waits() && self.entry.get().is_none_or(|at| at <= read_until)
    }
}

type Queue = BTreeSet<(Timestamp, PaymentId)>;

#[derive(Debug)]
struct Pages {
    open: BTreeMap<PaymentId, Open>,
    queues: [Queue; WORKS],
    /// What left its queue for a lease: still owed.
    leased: [Queue; WORKS],
    /// No payment below it has to be reached by the scan at start.
    floor: PaymentId,
    /// Entries in `Due` of payments in memory.
    listed: Queue,
    /// Entries of `Due` up to here are in memory.
    read_until: Timestamp,
}

#[derive(Debug)]
pub struct Book {
    pages: Mutex<Pages>,
    changed: [Arc<Notify>; WORKS],
}

/// Where the scan at start has to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Floors {
    /// The oldest payment in memory that has no entry in `Due`.
    pub payment: Option<PaymentId>,
    /// All entries of `Due` before this are gone.
    pub due: Timestamp,
}

impl Book {
    pub fn new(read_until: Timestamp) -> Self {
        let pages = Pages {
            open: BTreeMap::new(),
            queues: Default::default(),
            leased: Default::default(),
            floor: PaymentId::MAX,
            listed: Queue::new(),
            read_until,
        };
        Self { pages: Mutex::new(pages), changed: Default::default() }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn changed(&self, work: Work) -> Arc<Notify> {
        Arc::clone(&self.changed[work as usize])
    }

    pub fn open(&self) -> usize {
        self.pages().open.len()
    }

    /// Takes note of payments as they are now stored: what each waits for, and the time under which it
    /// stands in `Due`, if it does.
    pub fn note(&self, payments: impl IntoIterator<Item = (PaymentId, Dues, Option<Timestamp>)>) {
        let mut pages = self.pages();
        let mut nearer = [false; WORKS];
        for (id, dues, entry) in payments {
            pages.note(id, &dues, entry, &mut nearer);
        }
        drop(pages);
        for (notify, nearer) in self.changed.iter().zip(nearer) {
            if nearer {
                notify.notify_one();
            }
        }
    }

    pub fn lease(&self, work: Work, until: Timestamp, max: usize) -> Vec<PaymentId> {
        let mut pages = self.pages();
        let mut leased = Vec::new();
        while leased.len() < max {
            let Some(&(due, id)) = pages.queues[work as usize].first() else { break };
            if due > until {
                break;
            }
            pages.queues[work as usize].pop_first();
            let open = pages.open.get_mut(&id).expect("whoever is queued is open");
            open.is_leased[work as usize] = true;
            pages.leased[work as usize].insert((due, id));
            leased.push(id);
        }
        leased
    }

    /// The range of `Due` to read before leasing up to `until`, when there is one.
    pub fn unread(&self, until: Timestamp) -> Option<(Timestamp, Timestamp)> {
        let pages = self.pages();
        (until >= pages.read_until).then(|| (pages.read_until, until.plus_ms(READ_AHEAD_MS)))
    }

    pub fn has_read(&self, until: Timestamp) {
        let mut pages = self.pages();
        pages.read_until = pages.read_until.max(until);
    }

    pub fn next_due(&self, work: Work) -> Option<Timestamp> {
        let pages = self.pages();
        let queued = pages.queues[work as usize].first().map(|(due, _)| *due);
        Some(queued.map_or(pages.read_until, |due| due.min(pages.read_until)))
    }

    pub fn backlog(&self, work: Work) -> Backlog {
        let pages = self.pages();
        let (queue, leased) = (&pages.queues[work as usize], &pages.leased[work as usize]);
        let oldest = queue.first().into_iter().chain(leased.first()).min();
        Backlog { pending: queue.len() + leased.len(), oldest: oldest.map(|(due, _)| *due) }
    }

    pub fn floors(&self) -> Floors {
        let mut pages = self.pages();
        let from = pages.floor;
        let unlisted = pages.open.range(from..).find(|(_, open)| open.is_unlisted());
        let payment = unlisted.map(|(id, _)| *id);
        pages.floor = payment.unwrap_or(PaymentId::MAX);
        let listed = pages.listed.first().map(|(due, _)| *due);
        Floors { payment, due: listed.map_or(pages.read_until, |due| due.min(pages.read_until)) }
    }

    fn release(&self, work: Work, id: PaymentId, not_before: Option<Timestamp>) {
        // What is finished wakes nobody: there are tens of thousands a second.
        if self.pages().release(work, id, not_before) {
            self.changed[work as usize].notify_one();
        }
    }
}

impl Pages {
    fn note(
        &mut self,
        id: PaymentId,
        dues: &Dues,
        entry: Option<Timestamp>,
        nearer: &mut [bool; WORKS],
    ) {
        let mut at = match self.open.entry(id) {
            Entry::Occupied(at) => at,
            Entry::Vacant(_) if dues.earliest().is_none() => return,
            Entry::Vacant(at) => at.insert_entry(Open::NEW),
        };
        let open = at.get_mut();
        let entry = Moment::of(entry);
        if open.entry != entry {
            self.listed.extend(entry.get().map(|at| (at, id)));
            if let Some(old) = std::mem::replace(&mut open.entry, entry).get() {
                self.listed.remove(&(old, id));
            }
        }
        open.due = dues.0.map(Moment::of);
        if !open.is_leased() && !open.waits_here(self.read_until) {
            forget(at, &mut self.queues, &mut self.listed);
            return;
        }
        if open.is_unlisted() {
            self.floor = self.floor.min(id);
        }
        for i in (0..WORKS).filter(|i| !open.is_leased[*i]) {
            let (place, due) = (&mut open.place[i], open.due[i]);
            if *place == due {
                continue;
            }
            if let Some(old) = std::mem::replace(place, due).get() {
                self.queues[i].remove(&(old, id));
            }
            if let Some(at) = due.get() {
                nearer[i] |= self.queues[i].first().is_none_or(|(first, _)| at < *first);
                self.queues[i].insert((at, id));
            }
        }
    }

    /// True: the work is still owed.
    fn release(&mut self, work: Work, id: PaymentId, not_before: Option<Timestamp>) -> bool {
        let i = work as usize;
        let Entry::Occupied(mut at) = self.open.entry(id) else { return false };
        let open = at.get_mut();
        if std::mem::take(&mut open.is_leased[i])
            && let Some(stood) = std::mem::replace(&mut open.place[i], Moment::NONE).get()
        {
            self.leased[i].remove(&(stood, id));
        }
        if !open.is_leased() && !open.waits_here(self.read_until) {
            forget(at, &mut self.queues, &mut self.listed);
            return false;
        }
        let Some(due) = open.due[i].get() else { return false };
        let due = not_before.map_or(due, |at| due.max(at));
        if let Some(old) = std::mem::replace(&mut open.place[i], Moment::of(Some(due))).get() {
            self.queues[i].remove(&(old, id));
        }
        self.queues[i].insert((due, id));
        true
    }
}

/// A payment leaves memory when it waits for nothing, or for something that `Due` will give back.
fn forget(
    open: OccupiedEntry<'_, PaymentId, Open>,
    queues: &mut [Queue; WORKS],
    listed: &mut Queue,
) {
    let (id, open) = open.remove_entry();
    for (queue, place) in queues.iter_mut().zip(open.place) {
        if let Some(at) = place.get() {
            queue.remove(&(at, id));
        }
    }
    if let Some(at) = open.entry.get() {
        listed.remove(&(at, id));
    }
}

/// Takes leases back.
pub trait Releases: Send + Sync {
    fn release(&self, work: Work, id: PaymentId, not_before: Option<Timestamp>);
}

impl Releases for Book {
    fn release(&self, work: Work, id: PaymentId, not_before: Option<Timestamp>) {
        Book::release(self, work, id, not_before);
    }
}

/// The sole right to work on what a payment waits for, until dropped. It saves work; what keeps a
/// payment from being decided twice is the revision.
pub struct Lease {
    pub id: PaymentId,
    work: Work,
    not_before: Option<Timestamp>,
    from: Arc<dyn Releases>,
}

impl Lease {
    pub fn new(id: PaymentId, work: Work, from: Arc<dyn Releases>) -> Self {
        Self { id, work, not_before: None, from }
    }

    /// Gives the work back, to be leased again at `at` at the earliest.
    pub fn put_off(mut self, at: Timestamp) {
        self.not_before = Some(at);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.from.release(self.work, self.id, self.not_before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u128) -> PaymentId {
        PaymentId::from_parts(Timestamp::from_ms(1_000), n)
    }

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_ms(ms)
    }

    /// Of a payment that was created at 1,000.
    fn wake(n: u128, ms: i64) -> (PaymentId, Dues, Option<Timestamp>) {
        let dues = Dues([Some(at(ms)), None, None, None]);
        (id(n), dues, dues.entry(at(1_000)))
    }

    #[test]
    fn due_work_is_leased_once_and_comes_back_when_released() {
        let book = Arc::new(Book::new(at(100_000)));
        book.note([wake(1, 2_000), wake(2, 1_500)]);
        assert_eq!(book.lease(Work::Wake, at(1_999), 10), [id(2)]);
        assert!(book.lease(Work::Wake, at(1_999), 10).is_empty());
        let owed = Backlog { pending: 2, oldest: Some(at(1_500)) };
        assert_eq!(book.backlog(Work::Wake), owed, "what is worked on is owed");
        drop(Lease::new(id(2), Work::Wake, Arc::clone(&book) as Arc<dyn Releases>));
        assert_eq!(book.lease(Work::Wake, at(5_000), 10), [id(2), id(1)]);
    }

    #[test]
    fn a_change_during_a_lease_counts_after_it() {
        let book = Arc::new(Book::new(at(100_000)));
        book.note([wake(1, 2_000)]);
        book.lease(Work::Wake, at(2_000), 1);
        book.note([wake(1, 3_000)]);
        assert!(book.lease(Work::Wake, at(9_000), 1).is_empty(), "still leased");
        Releases::release(&*book, Work::Wake, id(1), None);
        assert_eq!(book.next_due(Work::Wake), Some(at(3_000)));
        book.note([(id(1), Dues::default(), None)]);
        assert_eq!((book.open(), book.backlog(Work::Wake).pending), (0, 0));
    }

    #[test]
    fn what_waits_long_leaves_memory_and_moves_no_floor() {
        let book = Book::new(at(100_000));
        book.note([wake(1, 500_000), wake(2, 2_000)]);
        assert_eq!(book.open(), 1);
        assert_eq!(book.floors(), Floors { payment: Some(id(2)), due: at(100_000) });
        assert_eq!(book.unread(at(99_999)), None);
        assert_eq!(book.unread(at(500_000)), Some((at(100_000), at(501_000))));
        book.has_read(at(501_000));
        book.note([wake(1, 500_000)]);
        assert_eq!(book.floors(), Floors { payment: Some(id(2)), due: at(500_000) });
        assert_eq!(book.lease(Work::Wake, at(500_000), 9), [id(2), id(1)]);
    }

    #[test]
    fn what_waits_for_nothing_leaves_memory_whatever_its_entry() {
        let book = Book::new(at(100_000));
        book.note([(id(1), Dues::default(), Some(at(50_000)))]);
        assert_eq!(book.open(), 0);
        book.note([wake(1, 50_000)]);
        book.note([(id(1), Dues::default(), Some(at(50_000)))]);
        assert_eq!((book.open(), book.backlog(Work::Wake).pending), (0, 0));
        assert_eq!(book.floors(), Floors { payment: None, due: at(100_000) });
    }

    #[test]
    fn the_floor_follows_the_oldest_and_goes_back_for_an_older_one() {
        let book = Book::new(at(100_000));
        let floor = |book: &Book| book.floors().payment;
        book.note([wake(3, 2_000), wake(5, 2_000)]);
        assert_eq!(floor(&book), Some(id(3)));
        book.note([(id(3), Dues::default(), None)]);
        assert_eq!(floor(&book), Some(id(5)));
        book.note([wake(4, 2_000)]);
        assert_eq!(floor(&book), Some(id(4)), "an id may be older than its commit");
        book.note([(id(4), Dues::default(), None), (id(5), Dues::default(), None)]);
        assert_eq!(floor(&book), None);
        book.note([wake(1, 2_000)]);
        assert_eq!(floor(&book), Some(id(1)));
    }

    #[test]
    fn work_put_off_is_not_leased_before() {
        let book = Arc::new(Book::new(at(100_000)));
        book.note([wake(1, 2_000)]);
        book.lease(Work::Wake, at(2_000), 1);
        Lease::new(id(1), Work::Wake, Arc::clone(&book) as Arc<dyn Releases>).put_off(at(4_000));
        assert!(book.lease(Work::Wake, at(3_999), 1).is_empty());
        assert_eq!(book.lease(Work::Wake, at(4_000), 1), [id(1)]);
    }

    #[test]
    fn what_is_given_back_wakes_only_where_it_is_still_owed() {
        let book = Book::new(at(100_000));
        let changed = book.changed(Work::Wake);
        let is_woken = || {
            let mut woken = std::pin::pin!(changed.notified());
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            woken.as_mut().poll(&mut context).is_ready()
        };
        book.note([wake(1, 2_000), wake(2, 2_000)]);
        assert!(is_woken());
        book.lease(Work::Wake, at(2_000), 2);
        book.note([(id(1), Dues::default(), None)]);
        book.release(Work::Wake, id(1), None);
        assert!(!is_woken(), "nothing is left to do of it");
        book.release(Work::Wake, id(2), None);
        assert!(is_woken());
    }
}
