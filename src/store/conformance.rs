//! What every engine under the store must do, run against each of them.

use std::{
    ops::{Bound, ControlFlow},
    sync::Arc,
    time::Duration,
};

use super::{
    tables::{Batch, Table},
    *,
};
use crate::{
    clock::ManualClock,
    domain::{
        deliveries::{DeliveryFilter, Standing},
        delivery::{Attempt, Attempted, Channel, RetryPolicy, Verdict},
        event,
        money::{Currency, Money},
        origin::origin,
        payment::{Cancel, Command, Method, Terms, Trace},
        scenario::{DrawKey, Plan, Scenario, Settings},
        status::Status,
    },
};

const START: i64 = 1_767_225_600_000;

struct Bed {
    clock: ManualClock,
    store: Option<Arc<Embedded>>,
    folder: Option<tempfile::TempDir>,
    retention: Retention,
}

const DAY: Duration = Duration::from_secs(86_400);
const KEEP: Retention = Retention { payments: DAY, idempotency: DAY, payments_max: None };

impl Bed {
    fn memory() -> Self {
        Self::new(None, KEEP)
    }

    fn disk() -> Self {
        Self::new(Some(tempfile::tempdir().unwrap()), KEEP)
    }

    fn new(folder: Option<tempfile::TempDir>, retention: Retention) -> Self {
        let clock = ManualClock::at_ms(START);
        let mut bed = Self { clock, store: None, folder, retention };
        bed.store = Some(bed.open().unwrap());
        bed
    }

    fn location(&self) -> Location {
        match &self.folder {
            Some(folder) => Location::Folder(folder.path().join("data")),
            None => Location::Memory,
        }
    }

    fn open(&self) -> Result<Arc<Embedded>, OpenError> {
        open(
            &self.location(),
            Options {
                retention: self.retention,
                clock: Arc::new(self.clock.clone()),
                on_commit: Arc::new(|_, _| {}),
                on_dropped_early: Arc::new(|_| {}),
            },
        )
    }

    fn store(&self) -> &Arc<Embedded> {
        self.store.as_ref().unwrap()
    }

    async fn close(&mut self) {
        let store = self.store.take().unwrap();
        store.close().await;
        drop(store);
    }

    async fn reopen(&mut self) {
        self.close().await;
        self.store = Some(self.open().unwrap());
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_ms(crate::clock::Clock::now_ms(&self.clock))
    }

    fn payment(&self, n: u128, scenario: Scenario, key: Option<(u8, u8)>) -> Payment {
        let settings = Settings {
            default_scenario: Scenario::Approve,
            default_delay: Duration::from_secs(2),
            timeout_settle: Duration::from_secs(30),
            manual_ttl: Duration::from_secs(300),
            random_approval_rate: 0.8,
            seed: 0,
        };
        let now = self.now();
        Payment::create(Arc::new(Terms {
            id: PaymentId::from_parts(now, n),
            reservation_id: format!("res-{}", n % 3).into(),
            user_id: format!("user-{}", n % 2).into(),
            amount: Money { amount: 1_000, currency: Currency::parse("KRW").unwrap() },
            vat: None,
            method: Method::CreditCard,
            plan: Plan::draw(scenario, &settings, &DrawKey::Idempotency("k"), now),
            provider: "sim".into(),
            webhook_url: Some("http://127.0.0.1:9/".into()),
            events: false,
            metadata: None,
            echo: None,
            card: None,
            created_at: now,
            trace: Trace::default(),
            idempotency: key.map(|(key, request)| Idempotency {
                key: KeyHash([key; 16]),
                request: RequestHash([request; 16]),
            }),
            renderer: event::RENDERER,
        }))
    }

    async fn create(&self, payment: &Payment) -> Result<Committed, StoreError> {
        let change = Change::Create { terms: Arc::clone(&payment.terms), draw: None };
        commit_one(&**self.store(), Commit { change: Some(change), reply: None }).await
    }

    async fn update(
        &self,
        before: Arc<Versioned>,
        after: Payment,
    ) -> Result<Committed, StoreError> {
        let change = Change::update(before, after);
        commit_one(&**self.store(), Commit { change: Some(change), reply: None }).await
    }

    async fn get(&self, payment: &Payment) -> Option<Arc<Versioned>> {
        self.store().get(payment.terms.id).await.unwrap()
    }

    /// Marks the payment's webhook delivered.
    async fn deliver(&self, payment: &Payment) {
        self.attempted(payment, Verdict::Accepted).await;
    }

    /// Marks the payment's webhook dead.
    async fn give_up(&self, payment: &Payment) {
        self.attempted(payment, Verdict::Refused).await;
    }

    async fn order_again(&self, payment: &Payment) {
        let before = self.get(payment).await.unwrap();
        let order = Command::Redeliver((1, Channel::Webhook));
        let after = before.payment.transition(order, self.now()).changed.unwrap();
        self.update(before, after).await.unwrap();
    }

    async fn attempted(&self, payment: &Payment, verdict: Verdict) {
        let before = self.get(payment).await.unwrap();
        let attempt =
            Attempt { at: self.now(), http_status: Some(200), latency_ms: 1, error: None };
        let done = Attempted { attempt, verdict };
        let policy = RetryPolicy {
            max_attempts: None,
            backoff_base: DAY,
            backoff_max: DAY,
            dead_letters: false,
        };
        let after = before
            .payment
            .after_attempt((1, Channel::Webhook), done, self.now(), &policy, 0.0)
            .unwrap();
        self.update(before, after).await.unwrap();
    }

    async fn due(&self, work: Work) -> Vec<Lease> {
        self.store().due(work, self.now(), 100).await.unwrap()
    }

    async fn upkeep(&self) {
        let store = Arc::clone(self.store());
        tokio::task::spawn_blocking(move || store.upkeep()).await.unwrap();
    }

    async fn bring_in(&self) {
        let store = Arc::clone(self.store());
        tokio::task::spawn_blocking(move || store.bring_in()).await.unwrap();
    }

    async fn page(&self, query: ListQuery) -> Page {
        self.store().list(query).await.unwrap()
    }

    /// The payments of the deliveries that a filter finds.
    async fn found(&self, filter: DeliveryFilter) -> Vec<PaymentId> {
        let query = DeliveryQuery { filter, beyond: None, limit: 100 };
        let page = self.store().deliveries(query).await.unwrap();
        page.found.iter().map(|found| found.payment.terms.id).collect()
    }
}

fn any_delivery() -> DeliveryFilter {
    DeliveryFilter::default()
}

fn any() -> ListQuery {
    ListQuery {
        user: None,
        reservation: None,
        status: None,
        created_from: None,
        created_to: None,
        beyond: None,
        direction: Direction::Older,
        skip: 0,
        limit: 100,
    }
}

fn cancelled(before: &Versioned, now: Timestamp) -> Payment {
    let step = before.payment.transition(Command::Cancel(Cancel::default()), now);
    step.changed.expect("it was pending")
}

macro_rules! on_every_engine {
    ($($name:ident),* $(,)?) => {
        mod memory { $( #[tokio::test] async fn $name() { super::$name(super::Bed::memory()).await; } )* }
        mod disk { $( #[tokio::test] async fn $name() { super::$name(super::Bed::disk()).await; } )* }
    };
}

on_every_engine![
    a_payment_comes_back_as_it_was_stored,
    an_update_on_an_old_revision_is_refused,
    a_key_is_answered_once_and_for_all_until_it_lapses,
    replies_are_given_back_and_lapse,
    due_work_is_handed_out_once,
    a_record_that_cannot_be_read_is_put_off_by_itself,
    what_waits_long_is_read_back_in_time,
    lists_neither_skip_nor_repeat,
    draws_count_from_zero_without_gaps,
    a_counter_goes_with_the_last_payment_of_its_reservation,
    settled_payments_go_after_their_time,
    what_is_derived_is_found_before_and_after_it_is_in_its_tables,
    what_is_gone_is_gone_everywhere_and_stays_so,
    what_changes_while_it_is_judged_stays,
    retention_passes_a_record_that_cannot_be_read,
    dead_deliveries_are_found_without_reading_the_rest,
    deliveries_are_listed_page_by_page,
];

async fn a_payment_comes_back_as_it_was_stored(bed: Bed) {
    for (n, scenario) in (0_u128..).zip(Scenario::ALL) {
        let payment = bed.payment(n, scenario, None);
        assert_eq!(bed.create(&payment).await, Ok(Committed::Done(Revision(0))));
        let stored = bed.get(&payment).await.unwrap();
        assert_eq!(*stored, Versioned { payment, revision: Revision(0) });
    }
    let unknown = bed.payment(99, Scenario::Approve, None);
    assert_eq!(bed.get(&unknown).await, None);
    assert_eq!(bed.store().payments(), 6);
}

async fn an_update_on_an_old_revision_is_refused(bed: Bed) {
    let payment = bed.payment(1, Scenario::Manual, None);
    bed.create(&payment).await.unwrap();
    let before = bed.get(&payment).await.unwrap();
    let after = cancelled(&before, bed.now());
    let twice =
        || Commit { change: Some(Change::update(before.clone(), after.clone())), reply: None };
    let answers = bed.store().commit(vec![twice(), twice()]).await;
    assert_eq!(answers, [Ok(Committed::Done(Revision(1))), Err(StoreError::Conflict)]);
    assert_eq!(bed.update(before, after.clone()).await, Err(StoreError::Conflict));
    assert_eq!(bed.get(&payment).await.unwrap().payment, after);
    let ghost = bed.payment(2, Scenario::Manual, None);
    let before = Versioned { payment: ghost.clone(), revision: Revision(0) };
    assert_eq!(
        bed.update(Arc::new(before), ghost).await,
        Err(StoreError::Conflict),
        "never created"
    );
}

async fn a_key_is_answered_once_and_for_all_until_it_lapses(bed: Bed) {
    let first = bed.payment(1, Scenario::Approve, Some((7, 1)));
    bed.create(&first).await.unwrap();
    let again = bed.payment(2, Scenario::Approve, Some((7, 1)));
    let known = Remembered::Created { request: RequestHash([1; 16]), id: first.terms.id };
    assert_eq!(bed.create(&again).await, Ok(Committed::Replayed(known.clone())));
    assert_eq!(bed.get(&again).await, None, "nothing was stored");
    let other = bed.payment(3, Scenario::Approve, Some((7, 2)));
    assert_eq!(bed.create(&other).await, Err(StoreError::KeyConflict));
    let remembered = bed.store().remembered(KeyHash([7; 16]), bed.now()).await;
    assert_eq!(remembered, Ok(Some(known)));
    bed.clock.advance(DAY);
    let later = bed.payment(4, Scenario::Approve, Some((7, 2)));
    assert_eq!(bed.create(&later).await, Ok(Committed::Done(Revision(0))), "it had lapsed");
}

async fn replies_are_given_back_and_lapse(bed: Bed) {
    let reply = |request, bytes: &[u8]| Commit {
        change: None,
        reply: Some(Reply {
            idempotency: Idempotency { key: KeyHash([9; 16]), request: RequestHash([request; 16]) },
            bytes: bytes.to_vec(),
            at: bed.now(),
        }),
    };
    let store = bed.store();
    assert!(matches!(commit_one(&**store, reply(1, b"one")).await, Ok(Committed::Done(_))));
    let replayed = commit_one(&**store, reply(1, b"two")).await;
    let known = Remembered::Replied { request: RequestHash([1; 16]), bytes: b"one".to_vec() };
    assert_eq!(replayed, Ok(Committed::Replayed(known)));
    assert_eq!(commit_one(&**store, reply(2, b"two")).await, Err(StoreError::KeyConflict));
    bed.clock.advance(DAY + Duration::from_millis(1));
    assert_eq!(store.remembered(KeyHash([9; 16]), bed.now()).await, Ok(None));
    assert!(matches!(commit_one(&**store, reply(2, b"two")).await, Ok(Committed::Done(_))));
    bed.upkeep().await;
    let known = Remembered::Replied { request: RequestHash([2; 16]), bytes: b"two".to_vec() };
    let kept = store.remembered(KeyHash([9; 16]), bed.now()).await;
    assert_eq!(kept, Ok(Some(known)), "the sweep of the old reply spares the new one");
}

async fn due_work_is_handed_out_once(bed: Bed) {
    let payment = bed.payment(1, Scenario::Approve, None);
    bed.create(&payment).await.unwrap();
    assert!(bed.due(Work::Webhook).await.is_empty(), "two seconds too early");
    bed.clock.advance(Duration::from_secs(2));
    let leased = bed.due(Work::Webhook).await;
    assert_eq!(leased.iter().map(|l| l.id).collect::<Vec<_>>(), [payment.terms.id]);
    assert!(bed.due(Work::Webhook).await.is_empty(), "leased");
    drop(leased);
    let leased = bed.due(Work::Webhook).await;
    assert_eq!(leased.len(), 1, "given back");
    bed.deliver(&payment).await;
    drop(leased);
    assert!(bed.due(Work::Webhook).await.is_empty(), "delivered");
}

async fn a_record_that_cannot_be_read_is_put_off_by_itself(bed: Bed) {
    let [damaged, sound] = [1, 2].map(|n| bed.payment(n, Scenario::Approve, None));
    for payment in [&damaged, &sound] {
        bed.create(payment).await.unwrap();
    }
    let mut batch = Batch::default();
    batch.put(Table::State, *damaged.terms.id.bytes(), *b"\x01no record");
    bed.store().shared().tables.write(&batch).unwrap();
    bed.store().shared().open.forget();
    bed.clock.advance(Duration::from_secs(2));
    let mut read = Vec::new();
    for lease in bed.due(Work::Webhook).await {
        let found = lease.read(&**bed.store(), bed.now()).await.unwrap();
        read.extend(found.map(|(stored, _lease)| stored.payment.terms.id));
    }
    assert_eq!(read, [sound.terms.id]);
    let due = async || bed.due(Work::Webhook).await.iter().map(|l| l.id).collect::<Vec<_>>();
    assert_eq!(due().await, [sound.terms.id]);
    bed.clock.advance(Duration::from_secs(60));
    assert_eq!(due().await, [sound.terms.id, damaged.terms.id]);
}

async fn what_waits_long_is_read_back_in_time(mut bed: Bed) {
    // Its 300 s lie beyond the scan window.
    let payment = bed.payment(1, Scenario::Manual, None);
    bed.create(&payment).await.unwrap();
    if bed.folder.is_some() {
        bed.reopen().await;
    }
    assert!(bed.due(Work::Wake).await.is_empty());
    bed.clock.advance(Duration::from_secs(299));
    assert!(bed.due(Work::Wake).await.is_empty());
    bed.clock.advance(Duration::from_secs(1));
    assert_eq!(bed.due(Work::Wake).await.len(), 1);
    let before = bed.get(&payment).await.unwrap();
    let after = before.payment.transition(Command::Wake, bed.now()).changed.unwrap();
    assert_eq!(after.status(), Status::Expired);
    bed.update(before, after).await.unwrap();
    assert!(bed.due(Work::Wake).await.is_empty());
    assert_eq!(bed.due(Work::Webhook).await.len(), 1);
}

async fn lists_neither_skip_nor_repeat(bed: Bed) {
    let mut all = Vec::new();
    for n in 0..60 {
        let payment = bed.payment(n, Scenario::Approve, None);
        bed.create(&payment).await.unwrap();
        all.insert(0, payment);
        bed.clock.advance(Duration::from_millis(10));
    }
    let ids = |page: &Page| page.payments.iter().map(|v| v.payment.terms.id).collect::<Vec<_>>();
    let wanted = |keep: &dyn Fn(&Payment) -> bool| -> Vec<PaymentId> {
        all.iter().filter(|p| keep(p)).map(|p| p.terms.id).collect()
    };
    assert_eq!(ids(&bed.page(any()).await), wanted(&|_| true));
    let user = ListQuery { user: Some("user-1".into()), limit: 7, ..any() };
    let mut seen = Vec::new();
    let mut beyond = None;
    loop {
        let page = bed.page(ListQuery { beyond, ..user.clone() }).await;
        seen.extend(ids(&page));
        // One that arrives meanwhile is newer than the first page and moves nothing.
        let fresh = bed.payment(1_000 + seen.len() as u128, Scenario::Approve, None);
        bed.create(&fresh).await.unwrap();
        match page.more_beyond {
            Some(at) => beyond = Some(at),
            None => break,
        }
    }
    assert_eq!(seen, wanted(&|p| p.terms.user_id == "user-1"));
    let both = ListQuery {
        user: Some("user-0".into()),
        reservation: Some("res-2".into()),
        created_to: Some(Timestamp::from_ms(START + 600)),
        created_from: Some(Timestamp::from_ms(START + 100)),
        ..any()
    };
    let in_range = |p: &Payment| (100..600).contains(&(p.terms.created_at.ms() - START));
    let theirs = wanted(&|p| {
        p.terms.user_id == "user-0" && p.terms.reservation_id == "res-2" && in_range(p)
    });
    assert_eq!(ids(&bed.page(both.clone()).await), theirs);
    let back = ListQuery { direction: Direction::Newer, beyond: Some(theirs[4]), limit: 2, ..both };
    assert_eq!(ids(&bed.page(back).await), theirs[2..4]);
    let none = ListQuery { status: Some(Status::Failed), ..any() };
    assert_eq!(bed.page(none).await.counted, 0);
}

async fn draws_count_from_zero_without_gaps(mut bed: Bed) {
    for n in 0..3 {
        let draw = bed.store().draw_number("res").await.unwrap();
        assert_eq!(draw.n, n);
        let payment = bed.payment(u128::from(n), Scenario::Random, None);
        let change = Change::Create { terms: payment.terms, draw: Some(draw) };
        let commit = Commit { change: Some(change), reply: None };
        commit_one(&**bed.store(), commit).await.unwrap();
    }
    if bed.folder.is_some() {
        bed.reopen().await;
    }
    assert_eq!(bed.store().draw_number("res").await.unwrap().n, 3);
    assert_eq!(bed.store().draw_number("other").await.unwrap().n, 0);
}

async fn a_counter_goes_with_the_last_payment_of_its_reservation(mut bed: Bed) {
    let counter = |bed: &Bed| {
        let shared = bed.store().shared();
        shared.read(Table::Counter, &shared.draws_name("res-1")).unwrap()
    };
    for n in [1, 4] {
        let draw = bed.store().draw_number("res-1").await.unwrap();
        let payment = bed.payment(n, Scenario::Random, None);
        let change = Change::Create { terms: Arc::clone(&payment.terms), draw: Some(draw) };
        let commit = Commit { change: Some(change), reply: None };
        commit_one(&**bed.store(), commit).await.unwrap();
        bed.clock.advance(Duration::from_secs(2));
        bed.deliver(&payment).await;
        bed.clock.advance(DAY / 2);
    }
    bed.clock.advance(Duration::from_secs(1));
    bed.upkeep().await;
    assert_eq!(bed.store().payments(), 1);
    assert!(counter(&bed).is_some(), "one of its payments is left");
    bed.clock.advance(DAY);
    bed.upkeep().await;
    assert_eq!(bed.store().payments(), 0);
    assert!(counter(&bed).is_none());
    if bed.folder.is_some() {
        bed.reopen().await;
        assert_eq!(bed.store().draw_number("res-1").await.unwrap().n, 0);
    }
}

async fn settled_payments_go_after_their_time(bed: Bed) {
    let done = bed.payment(1, Scenario::Approve, Some((1, 1)));
    let owed = bed.payment(2, Scenario::Approve, None);
    let mut untold = (*bed.payment(5, Scenario::Approve, None).terms).clone();
    untold.webhook_url = None;
    let untold = Payment::create(Arc::new(untold));
    for payment in [&done, &owed, &untold] {
        bed.create(payment).await.unwrap();
    }
    bed.clock.advance(Duration::from_secs(2));
    bed.deliver(&done).await;
    bed.clock.advance(DAY - Duration::from_secs(3));
    bed.upkeep().await;
    assert!(bed.get(&done).await.is_some(), "a second too early");
    assert!(bed.get(&untold).await.is_some(), "it has no state of its own");
    bed.clock.advance(Duration::from_secs(2));
    bed.upkeep().await;
    assert!(bed.get(&done).await.is_none() && bed.get(&untold).await.is_none());
    assert!(bed.get(&owed).await.is_some(), "it still owes something");
    assert_eq!(bed.page(any()).await.payments.len(), 1);
    let by_user = ListQuery { user: Some("user-1".into()), ..any() };
    assert!(bed.page(by_user).await.payments.is_empty());
    assert_eq!(bed.store().payments(), 1);
}

async fn what_is_derived_is_found_before_and_after_it_is_in_its_tables(mut bed: Bed) {
    let all: Vec<_> =
        (1..=6).map(|n| bed.payment(n, Scenario::Approve, Some((n as u8, 1)))).collect();
    let check = async |bed: &Bed, created: &[Payment]| {
        for payment in created {
            let again = bed.payment(99, Scenario::Approve, None);
            let mut terms = (*again.terms).clone();
            terms.idempotency = payment.terms.idempotency;
            let replayed = bed.create(&Payment::create(Arc::new(terms))).await.unwrap();
            let Committed::Replayed(Remembered::Created { id, .. }) = replayed else {
                panic!("its key is not known");
            };
            assert_eq!(id, payment.terms.id);
        }
        for user in ["user-0", "user-1"] {
            let mut wanted: Vec<_> =
                created.iter().filter(|p| p.terms.user_id == user).map(|p| p.terms.id).collect();
            wanted.reverse();
            for direction in [Direction::Older, Direction::Newer] {
                let page =
                    bed.page(ListQuery { user: Some(user.into()), direction, ..any() }).await;
                let listed: Vec<_> = page.payments.iter().map(|p| p.payment.terms.id).collect();
                assert_eq!(listed, wanted, "{user} {direction:?}");
            }
        }
    };
    for (n, payment) in all.iter().enumerate() {
        bed.create(payment).await.unwrap();
        check(&bed, &all[..=n]).await;
        match n {
            // Half in the tables, half not.
            1 | 3 => bed.bring_in().await,
            // And none of it where it was.
            2 | 4 if bed.folder.is_some() => bed.reopen().await,
            _ => {}
        }
        check(&bed, &all[..=n]).await;
        // From here on fresh keys are told without the tables.
        bed.upkeep().await;
        check(&bed, &all[..=n]).await;
    }
    bed.bring_in().await;
    let in_tables = |table| {
        let (mut rows, all) = (0, tables::Span::forwards(Bound::Unbounded, Bound::Unbounded));
        let mut count = |_: &[u8], _: &[u8]| {
            rows += 1;
            ControlFlow::Continue(())
        };
        bed.store().shared().tables.scan(table, all, &mut count).unwrap();
        rows
    };
    assert_eq!((in_tables(Table::Key), in_tables(Table::Index)), (6, 12));
    check(&bed, &all).await;
}

async fn what_is_gone_is_gone_everywhere_and_stays_so(mut bed: Bed) {
    let gone = bed.payment(1, Scenario::Approve, Some((1, 1)));
    let kept = bed.payment(3, Scenario::Approve, Some((3, 1)));
    bed.create(&gone).await.unwrap();
    bed.create(&kept).await.unwrap();
    bed.bring_in().await;
    bed.clock.advance(Duration::from_secs(2));
    bed.deliver(&gone).await;
    bed.clock.advance(DAY);
    bed.upkeep().await;
    let shared = bed.store().shared();
    shared.tables.reclaim(&shared.horizon).unwrap();
    for _ in 0..2 {
        assert!(bed.get(&gone).await.is_none());
        assert_eq!(bed.get(&kept).await.unwrap().payment, kept);
        let page = bed.page(ListQuery { user: Some("user-1".into()), ..any() }).await;
        assert_eq!(page.payments.len(), 1);
        assert_eq!(bed.store().payments(), 1);
        if bed.folder.is_some() {
            bed.reopen().await;
        }
    }
    let mut again = (*bed.payment(5, Scenario::Approve, Some((1, 2))).terms).clone();
    again.reservation_id = "another".into();
    let again = Payment::create(Arc::new(again));
    assert!(matches!(bed.create(&again).await, Ok(Committed::Done(_))), "its key is free");
    bed.deliver(&kept).await;
    bed.upkeep().await;
    assert!(bed.get(&kept).await.is_none(), "it owes nothing any more");
    assert_eq!(bed.store().payments(), 1);
}

async fn what_changes_while_it_is_judged_stays(bed: Bed) {
    let [changed, late, gone] = [1, 2, 3].map(|n| bed.payment(n, Scenario::Approve, None));
    bed.create(&changed).await.unwrap();
    bed.create(&gone).await.unwrap();
    bed.clock.advance(Duration::from_secs(2));
    bed.deliver(&gone).await;
    let store = Arc::clone(bed.store());
    let job = |job: writer::Job| store.send(job).unwrap();
    let (answer, answered) = tokio::sync::oneshot::channel();
    job(writer::Job::Watch { answer });
    answered.await.unwrap();
    bed.deliver(&changed).await;
    bed.create(&late).await.unwrap();
    let ids = [changed.terms.id, gone.terms.id];
    let (answer, answered) = tokio::sync::oneshot::channel();
    let judged = writer::Judged {
        to: gone.terms.id.next(),
        gone: ids.to_vec(),
        kept: Vec::new(),
        dead: Vec::new(),
        drew: Default::default(),
    };
    job(writer::Job::Pass { judged, answer });
    assert_eq!(answered.await.unwrap(), 1);
    assert!(bed.get(&changed).await.is_some());
    assert!(bed.get(&late).await.is_some(), "it came meanwhile, with an older id");
    assert!(bed.get(&gone).await.is_none());
    let before = Versioned { payment: gone.clone(), revision: Revision(1) };
    assert_eq!(
        bed.update(Arc::new(before), gone).await,
        Err(StoreError::Conflict),
        "it does not come back"
    );
    let later = Payment::create(Arc::new(Terms { id: ids[0].next(), ..(*late.terms).clone() }));
    bed.create(&later).await.unwrap();
    assert!(bed.get(&later).await.is_some(), "its id is older than the horizon");
}

/// The payments in the `Dead` table, which nothing outside the store sees.
fn rows_of_dead(bed: &Bed) -> Vec<PaymentId> {
    let mut ids = Vec::new();
    let all = tables::Span::forwards(Bound::Unbounded, Bound::Unbounded);
    let store = bed.store();
    let scanned = store.shared().tables.scan(tables::Table::Dead, all, &mut |key, _| {
        ids.push(record::id(key).unwrap());
        ControlFlow::Continue(())
    });
    scanned.unwrap();
    ids
}

async fn dead_deliveries_are_found_without_reading_the_rest(mut bed: Bed) {
    let mut all = Vec::new();
    for n in 0..4 {
        all.push(bed.payment(n, Scenario::Approve, None));
        bed.create(&all[all.len() - 1]).await.unwrap();
        bed.clock.advance(Duration::from_millis(1));
    }
    bed.clock.advance(Duration::from_secs(2));
    bed.deliver(&all[0]).await;
    for payment in &all[1..3] {
        bed.give_up(payment).await;
    }
    let dead =
        |id| DeliveryFilter { standing: Some(Standing::Dead), payment: id, ..any_delivery() };
    assert_eq!(bed.found(dead(None)).await, [all[2].terms.id, all[1].terms.id]);
    assert_eq!(rows_of_dead(&bed), [all[1].terms.id, all[2].terms.id]);
    if bed.folder.is_some() {
        bed.reopen().await;
    }
    bed.order_again(&all[2]).await;
    assert_eq!(bed.found(dead(None)).await, [all[1].terms.id]);
    assert_eq!(bed.found(dead(Some(all[1].terms.id))).await, [all[1].terms.id]);
    assert_eq!(bed.found(dead(Some(all[2].terms.id))).await, []);
    bed.give_up(&all[2]).await;
    assert_eq!(rows_of_dead(&bed), [all[1].terms.id, all[2].terms.id]);
    bed.order_again(&all[1]).await;
    bed.clock.advance(DAY);
    let store = Arc::clone(bed.store());
    tokio::task::spawn_blocking(move || store.upkeep()).await.unwrap();
    assert!(bed.get(&all[1]).await.is_some(), "it owes something again");
    assert!(bed.get(&all[2]).await.is_none());
    assert_eq!(rows_of_dead(&bed), [], "they go with their payments");
}

async fn deliveries_are_listed_page_by_page(bed: Bed) {
    let mut wanted = Vec::new();
    for n in 0..5 {
        let payment = bed.payment(n, Scenario::Approve, None);
        bed.create(&payment).await.unwrap();
        for _ in 0..n {
            let before = bed.get(&payment).await.unwrap();
            let order = Command::SimulateWebhook { target: None, at: bed.now() };
            let after = before.payment.transition(order, bed.now()).changed.unwrap();
            bed.update(before, after).await.unwrap();
        }
        let webhooks = (1..=u32::try_from(n).unwrap() + 1).map(|n| (n, Channel::Webhook));
        wanted.splice(0..0, webhooks.map(|no| (payment.terms.id, no)));
        bed.clock.advance(Duration::from_millis(1));
    }
    for limit in [1, 2, 3, 7, 15, 100] {
        let (mut seen, mut beyond) = (Vec::new(), None);
        loop {
            let query = DeliveryQuery { filter: any_delivery(), beyond, limit };
            let page = bed.store().deliveries(query).await.unwrap();
            assert!(page.found.len() <= limit);
            seen.extend(page.found.iter().map(|found| (found.payment.terms.id, found.no)));
            match page.more_beyond {
                Some(at) => beyond = Some(at),
                None => break,
            }
        }
        assert_eq!(seen, wanted, "{limit} at a time");
    }
    let one = wanted[0].0;
    let beyond = Some(Reached { payment: one, delivery: None });
    let filter = DeliveryFilter { payment: Some(one), ..any_delivery() };
    let page = bed.store().deliveries(DeliveryQuery { filter, beyond, limit: 9 }).await.unwrap();
    assert!(page.found.is_empty() && page.more_beyond.is_none());
    let there = origin("http://127.0.0.1:9");
    let to = |origin| DeliveryFilter { origin, ..any_delivery() };
    assert_eq!(bed.found(to(there)).await.len(), wanted.len());
    assert!(bed.found(to(origin("http://127.0.0.1"))).await.is_empty());
}

async fn retention_passes_a_record_that_cannot_be_read(bed: Bed) {
    let [damaged, sound] = [1, 2].map(|n| bed.payment(n, Scenario::Approve, None));
    for payment in [&damaged, &sound] {
        bed.create(payment).await.unwrap();
    }
    bed.clock.advance(Duration::from_secs(2));
    bed.deliver(&sound).await;
    let mut batch = Batch::default();
    batch.put(Table::State, *damaged.terms.id.bytes(), *b"\x01no record");
    bed.store().shared().tables.write(&batch).unwrap();
    bed.store().shared().open.forget();
    bed.clock.advance(DAY);
    bed.upkeep().await;
    assert!(bed.get(&sound).await.is_none());
    assert_eq!(bed.store().payments(), 1);
}

#[tokio::test]
async fn over_the_cap_the_oldest_settled_payments_go_early() {
    let capped = Retention { payments_max: Some(10), ..KEEP };
    let bed = Bed::new(None, capped);
    let mut all = Vec::new();
    for n in 0..15 {
        let payment = bed.payment(n, Scenario::Approve, None);
        bed.create(&payment).await.unwrap();
        all.push(payment);
        bed.clock.advance(Duration::from_millis(1));
    }
    for payment in &all[1..] {
        bed.deliver(payment).await;
    }
    bed.upkeep().await;
    let left: Vec<_> = bed.page(any()).await.payments;
    assert_eq!(left.len(), 10);
    assert!(bed.get(&all[0]).await.is_some(), "it still owes something");
    assert!(bed.get(&all[1]).await.is_none());
    assert!(bed.get(&all[14]).await.is_some());
}

#[tokio::test]
async fn what_was_kept_over_the_cap_goes_once_it_is_settled() {
    let bed = Bed::new(None, Retention { payments_max: Some(10), ..KEEP });
    let all: Vec<_> = (0..3_000).map(|n| bed.payment(n, Scenario::Approve, None)).collect();
    let created = all.iter().map(|payment| {
        let change = Change::Create { terms: Arc::clone(&payment.terms), draw: None };
        Commit { change: Some(change), reply: None }
    });
    bed.store().commit(created.collect()).await;
    bed.upkeep().await;
    assert_eq!(bed.store().payments(), 3_000, "all of them owe something");
    bed.clock.advance(Duration::from_secs(2));
    for payment in &all {
        bed.deliver(payment).await;
    }
    bed.upkeep().await;
    assert_eq!(bed.store().payments(), 10);
}

#[tokio::test]
async fn creates_are_refused_while_dropping_is_behind_and_no_longer() {
    let bed = Bed::new(None, Retention { payments_max: Some(10), ..KEEP });
    let behind = &bed.store().shared().dropping_behind;
    behind.store(true, std::sync::atomic::Ordering::Relaxed);
    let payment = bed.payment(1, Scenario::Approve, None);
    assert_eq!(bed.create(&payment).await, Err(StoreError::Overloaded));
    bed.upkeep().await;
    assert!(bed.create(&payment).await.is_ok(), "there is nothing to drop");
}

#[tokio::test]
async fn everything_survives_a_restart() {
    let mut bed = Bed::disk();
    let secret = *bed.store().secret().bytes();
    let payment = bed.payment(1, Scenario::Approve, Some((1, 1)));
    bed.create(&payment).await.unwrap();
    let delayed = bed.payment(2, Scenario::Delay, None);
    bed.create(&delayed).await.unwrap();
    bed.reopen().await;
    assert_eq!(*bed.store().secret().bytes(), secret);
    assert_eq!(bed.get(&payment).await.unwrap().payment, payment);
    assert_eq!(bed.store().payments(), 2);
    bed.clock.advance(Duration::from_secs(2));
    assert_eq!(bed.due(Work::Wake).await.len(), 1);
    assert_eq!(bed.due(Work::Webhook).await.len(), 1);
    let again = bed.payment(3, Scenario::Approve, Some((1, 1)));
    assert!(matches!(bed.create(&again).await, Ok(Committed::Replayed(_))));
}

#[tokio::test]
async fn a_store_that_is_in_use_newer_or_damaged_is_refused() {
    let mut bed = Bed::disk();
    assert!(matches!(bed.open(), Err(OpenError::Locked { .. })), "in use");
    bed.create(&bed.payment(1, Scenario::Approve, None)).await.unwrap();
    bed.close().await;
    let folder = bed.folder.as_ref().unwrap().path().join("data");
    let format = folder.join("FORMAT");
    std::fs::write(&format, "5\n").unwrap();
    assert!(matches!(bed.open(), Err(OpenError::NewerFormat { found: 5, .. })));
    std::fs::write(&format, "one").unwrap();
    assert!(matches!(bed.open(), Err(OpenError::Corrupt { .. })));
    std::fs::remove_file(&format).unwrap();
    assert!(matches!(bed.open(), Err(OpenError::Corrupt { .. })));
    std::fs::write(&format, "4\n").unwrap();
    let (derived, aside) = (folder.join("derived"), folder.join("aside"));
    std::fs::rename(&derived, &aside).unwrap();
    assert!(matches!(bed.open(), Err(OpenError::Corrupt { .. })));
    std::fs::create_dir(&derived).unwrap();
    assert!(matches!(bed.open(), Err(OpenError::Corrupt { .. })), "an empty one is none");
    std::fs::remove_dir(&derived).unwrap();
    std::fs::rename(&aside, &derived).unwrap();
    std::fs::write(folder.join("commit.mark"), "9999\n").unwrap();
    let refused = bed.open().err().unwrap().to_string();
    assert!(refused.contains("acknowledged payments are missing"), "{refused}");
    std::fs::write(folder.join("commit.mark"), "1\n").unwrap();
    assert!(bed.open().is_ok(), "nothing was touched");
}

#[tokio::test]
async fn a_store_that_hashes_in_an_unknown_way_is_refused() {
    let mut bed = Bed::disk();
    let mut batch = Batch::default();
    batch.put(Table::Meta, marks::meta::HASHES, [9]);
    bed.store().shared().tables.write(&batch).unwrap();
    bed.close().await;
    let refused = bed.open().err().unwrap().to_string();
    assert!(refused.contains("unknown way"), "{refused}");
}

/// The first has no mark of what is derived, and the second has it where the commits are. None of them has quick
/// hashes.
#[tokio::test]
async fn a_store_of_an_older_format_is_read_and_becomes_one_of_this() {
    for older in [1, 2, 3] {
        let mut bed = Bed::disk();
        let mut batch = Batch::default();
        batch.delete(Table::Meta, marks::meta::HASHES);
        bed.store().shared().tables.write(&batch).unwrap();
        bed.reopen().await;
        let payment = bed.payment(1, Scenario::Approve, Some((1, 1)));
        bed.create(&payment).await.unwrap();
        bed.store().bring_in();
        if older == 1 {
            let mut batch = Batch::default();
            batch.delete(Table::Meta, marks::meta::DERIVED);
            bed.store().shared().tables.write(&batch).unwrap();
        }
        bed.close().await;
        let folder = bed.folder.as_ref().unwrap().path().join("data");
        super::disk::tests::become_older(&folder, older);
        if older < 3 {
            // As a crash leaves it in the middle of its making.
            std::fs::create_dir(folder.join("derived")).unwrap();
            std::fs::write(folder.join("derived/0.jnl"), "").unwrap();
        }
        for _ in 0..2 {
            bed.store = Some(bed.open().unwrap());
            bed.upkeep().await;
            assert_eq!(std::fs::read_to_string(folder.join("FORMAT")).unwrap(), "4\n");
            let again = bed.payment(9, Scenario::Approve, Some((1, 1)));
            assert!(matches!(bed.create(&again).await, Ok(Committed::Replayed(_))));
            let secret = bed.store().secret();
            assert_eq!(
                secret.hash(b"p", &[]),
                secret.tag(b"p", &[]),
                "by which its rows are found"
            );
            let by_user = ListQuery { user: Some("user-1".into()), ..any() };
            assert_eq!(bed.page(by_user).await.payments.len(), 1);
            bed.close().await;
        }
    }
}

#[test]
fn what_a_batch_says_last_of_a_key_holds() {
    use super::{disk::Disk, horizon::Horizon, memory::Memory, tables::Tables};
    let folder = tempfile::tempdir().unwrap();
    let write = |tables: &dyn Tables| {
        let mut batch = Batch::default();
        batch.delete(Table::Counter, *b"kept");
        batch.put(Table::Counter, *b"kept", *b"1");
        batch.put(Table::Counter, *b"gone", *b"1");
        batch.delete(Table::Counter, *b"gone");
        tables.write(&batch).unwrap();
    };
    let check = |tables: &dyn Tables| {
        assert_eq!(tables.get(Table::Counter, b"kept").unwrap().as_deref(), Some(&b"1"[..]));
        assert_eq!(tables.get(Table::Counter, b"gone").unwrap(), None);
    };
    let memory = Memory::default();
    write(&memory);
    check(&memory);
    let disk = Disk::open(folder.path(), &Arc::new(Horizon::default())).unwrap();
    write(&disk);
    check(&disk);
    drop(disk);
    check(&Disk::open(folder.path(), &Arc::new(Horizon::default())).unwrap());
}
