//! Batches: how many calls are under way, what goes into each, and what a sink that is down is spared.
//! Webhooks: what one step takes.

use std::{
    cell::Cell,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use payment_sim::{
    app::{App, Caller, NewPayment},
    clock::ManualClock,
    courier::{Courier, Parcel},
    domain::{
        delivery::{Attempt, Attempted, Channel, Verdict},
        ids::PaymentId,
        payment::{Cancel, Command},
        status::Status,
        time::Timestamp,
    },
    driver::Step,
    outbox::{
        Batches, Done, Finisher, Jitter, Mail, Policies, RETRIES, Shared, WebhookLimits, Webhooks,
    },
    store::Work,
};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};

use crate::support::{
    bare::{new_payment, outbox},
    eventually,
};

const START_MS: i64 = 1_767_225_600_000;

/// Two parcels a call and three calls at a time; each call lasts until the test ends it.
struct Held {
    calls: Mutex<Vec<Vec<(PaymentId, u32)>>>,
    ends: Semaphore,
    verdict: Mutex<Verdict>,
}

impl Held {
    fn with(verdict: Verdict) -> Arc<Self> {
        let (calls, ends) = (Mutex::default(), Semaphore::new(0));
        Arc::new(Self { calls, ends, verdict: Mutex::new(verdict) })
    }
}

#[async_trait]
impl Courier for Held {
    fn batch_max(&self) -> usize {
        2
    }

    fn calls_max(&self) -> usize {
        3
    }

    async fn attempt(&self, batch: &[Parcel], now: Timestamp) -> Vec<Attempted> {
        let names = batch.iter().map(|parcel| (parcel.payment, parcel.n)).collect();
        self.calls.lock().unwrap().push(names);
        self.ends.acquire().await.unwrap().forget();
        let verdict = self.verdict.lock().unwrap().clone();
        let error = (verdict != Verdict::Accepted).then(|| "ThrottlingException".to_owned());
        let attempt = Attempt { at: now, http_status: Some(200), latency_ms: 1, error };
        vec![Attempted { attempt, verdict }; batch.len()]
    }
}

fn jitter() -> Jitter {
    Arc::new(|| 1.0)
}

/// A finisher at work, and where results are sent to it.
fn finishing(shared: &Shared) -> (JoinSet<()>, mpsc::Sender<Done>) {
    let policies = Policies { batched: RETRIES, webhook: RETRIES };
    let (finisher, done) = Finisher::new(shared.clone(), policies, jitter());
    let mut finishing = JoinSet::new();
    finishing.spawn(finisher.run());
    (finishing, done)
}

struct Bed {
    clock: ManualClock,
    shared: Shared,
    app: App,
    courier: Arc<Held>,
    events: Batches,
    finishing: JoinSet<()>,
}

impl Bed {
    fn new() -> Self {
        let clock = ManualClock::at_ms(START_MS);
        let (shared, app) = outbox(&clock);
        let courier = Held::with(Verdict::Accepted);
        let (finishing, done) = finishing(&shared);
        let mail = Mail::Events("eventbridge");
        let events = Batches::new(shared.clone(), courier.clone(), mail, jitter(), done);
        Self { clock, shared, app, courier, events, finishing }
    }

    async fn pay(&self) -> PaymentId {
        self.app.create(new_payment("r"), None, self.app.now()).await.unwrap().terms.id
    }

    async fn calls(&self, n: usize) -> Vec<Vec<(PaymentId, u32)>> {
        let calls = async || {
            let calls = self.courier.calls.lock().unwrap();
            (calls.len() >= n).then(|| calls.clone())
        };
        eventually("the calls are under way", calls).await
    }

    /// Ends calls, and waits until what came of them is written down.
    async fn end(&self, calls: usize, left: usize) {
        self.courier.ends.add_permits(calls);
        let written = async || (self.pending() == left).then_some(());
        eventually("what came of it is written down", written).await;
    }

    fn pending(&self) -> usize {
        self.shared.store.backlog(Work::Event).pending
    }

    /// Steps until one finds something to do.
    async fn step(&self) -> usize {
        let step = async || Some(self.events.step().await).filter(|n| *n > 0);
        eventually("a step that does something", step).await
    }

    async fn drain(mut self) {
        self.courier.ends.add_permits(100);
        self.events.drain(Duration::from_secs(60)).await;
        drop(self.events);
        self.finishing.join_next().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn full_calls_go_side_by_side_up_to_their_limit() {
    let bed = Bed::new();
    for _ in 0..7 {
        bed.pay().await;
    }
    for expected in [2, 2, 2, 0, 0] {
        assert_eq!(bed.events.step().await, expected);
    }
    let calls = bed.calls(3).await;
    let mut ids: Vec<_> = calls.into_iter().flatten().collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 6, "each in one call");
    bed.end(3, 1).await;
    assert_eq!(bed.step().await, 1);
    bed.end(1, 0).await;
    bed.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_in_during_a_call_goes_along_in_the_next() {
    let bed = Bed::new();
    bed.pay().await;
    assert_eq!(bed.events.step().await, 1, "nothing is under way: it goes at once");
    bed.pay().await;
    assert_eq!(bed.events.step().await, 0, "it waits for company");
    bed.pay().await;
    assert_eq!(bed.events.step().await, 2, "a full call need not wait");
    bed.pay().await;
    assert_eq!(bed.events.step().await, 0);
    bed.end(2, 1).await;
    assert_eq!(bed.step().await, 1, "nothing is under way any more");
    bed.end(1, 0).await;
    bed.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_entries_of_one_payment_are_never_under_way() {
    let bed = Bed::new();
    let id = bed.pay().await;
    let caller = Caller { key: None, render: &|_, _| Vec::new(), hold: &|| true };
    bed.app.execute(id, Command::Cancel(Cancel::default()), caller).await.unwrap();
    let other = bed.pay().await;
    assert_eq!(bed.events.step().await, 2);
    assert_eq!(bed.calls(1).await, [[(id, 1), (other, 1)]]);
    let more = [bed.pay().await, bed.pay().await];
    assert_eq!(bed.events.step().await, 2);
    assert_eq!(bed.calls(2).await[1], more.map(|id| (id, 1)));
    bed.end(2, 1).await;
    assert_eq!(bed.step().await, 1);
    assert_eq!(bed.calls(3).await[2], [(id, 2)]);
    bed.end(1, 0).await;
    bed.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_is_down_is_left_alone_and_then_probed_by_one_call() {
    let bed = Bed::new();
    *bed.courier.verdict.lock().unwrap() = Verdict::Unavailable;
    for _ in 0..6 {
        bed.pay().await;
    }
    for _ in 0..3 {
        assert_eq!(bed.events.step().await, 2);
    }
    bed.calls(3).await;
    bed.courier.ends.add_permits(3);
    let paused = async || bed.events.resumes_at().filter(|at| at.ms() > START_MS);
    let resumes_at = eventually("the sink is paused", paused).await;
    assert_eq!(resumes_at.ms(), START_MS + 500, "three calls that fail together are one failure");
    let failed = r#"events_published_total{result="retry",sink="eventbridge"} 6"#;
    let all = async || bed.shared.metrics.render().contains(failed).then_some(());
    eventually("all three have failed", all).await;
    assert_eq!(bed.events.step().await, 0);

    *bed.courier.verdict.lock().unwrap() = Verdict::Accepted;
    bed.clock.set_ms(resumes_at.ms());
    assert_eq!(bed.step().await, 2, "due again as soon as the sink is back");
    let probe = async || (bed.events.step().await == 0).then_some(());
    eventually("one call at a time", probe).await;
    assert_eq!(bed.calls(4).await.len(), 4);
    bed.end(1, 4).await;
    assert_eq!(bed.step().await + bed.step().await, 4);
    bed.end(2, 0).await;
    bed.drain().await;
}

/// Both were claimed before the payment changed, and one of them before the other was written down.
#[tokio::test(flavor = "multi_thread")]
async fn what_came_of_attempts_is_all_kept_and_undoes_no_change() {
    let clock = ManualClock::at_ms(START_MS);
    let (shared, app) = outbox(&clock);
    let courier = Held::with(Verdict::Accepted);
    let (mut finishing, done) = finishing(&shared);
    let mail = Mail::Events("eventbridge");
    let events = Batches::new(shared.clone(), courier.clone(), mail, jitter(), done.clone());
    let limits = WebhookLimits { concurrency: 100, origin_concurrency: 10, origin_max_rps: None };
    let webhooks = Webhooks::new(shared.clone(), courier.clone(), limits, done);
    let webhook_url = Some("http://shop.example/hook".into());
    let new = NewPayment { webhook_url, ..new_payment("r") };
    let id = app.create(new, None, app.now()).await.unwrap().terms.id;
    events.step().await;
    webhooks.step().await;
    let both = async || (courier.calls.lock().unwrap().len() == 2).then_some(());
    eventually("both are under way", both).await;
    let caller = Caller { key: None, render: &|_, _| Vec::new(), hold: &|| true };
    app.execute(id, Command::Cancel(Cancel::default()), caller).await.unwrap();
    for written in 1..=2 {
        courier.ends.add_permits(1);
        let kept = async || {
            let payment = app.get(id, None).await.unwrap();
            let first = payment.notification(1).unwrap();
            let done = |channel| first.delivery(channel).unwrap().due().is_none();
            let count = [Channel::Event, Channel::Webhook].into_iter().filter(|c| done(*c)).count();
            (count == written).then_some(payment)
        };
        let payment = eventually("what came of it is written down", kept).await;
        assert_eq!(payment.status(), Status::Refunded, "the change stays");
        assert!(payment.notification(2).unwrap().is_owed(), "and what it owes");
    }
    events.drain(Duration::ZERO).await;
    webhooks.drain(Duration::ZERO).await;
    drop((events, webhooks));
    finishing.join_next().await;
}

/// Whoever falls due meanwhile does not wait until the backlog of an origin that went down is counted off.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_takes_so_many_of_a_backlog_and_no_more() {
    const BACKLOG: usize = 1_500;
    let clock = ManualClock::at_ms(START_MS);
    let (shared, app) = outbox(&clock);
    let courier = Held::with(Verdict::Retry { not_before: None });
    let (mut finishing, done) = finishing(&shared);
    let limits = WebhookLimits { concurrency: 100, origin_concurrency: 10, origin_max_rps: None };
    let webhooks = Webhooks::new(shared.clone(), courier.clone(), limits, done);
    for _ in 0..BACKLOG {
        let webhook_url = Some("http://down.example/hook".into());
        app.create(NewPayment { webhook_url, ..new_payment("r") }, None, app.now()).await.unwrap();
    }
    // All of it is taken in, and ten are under way.
    while webhooks.step().await > 0 {}
    let under_way = async || (courier.calls.lock().unwrap().len() == 10).then_some(());
    eventually("ten are under way", under_way).await;
    // They fail, and with them the origin.
    courier.ends.add_permits(10);
    let most = Cell::new(0);
    let withheld = async || {
        most.set(most.get().max(webhooks.step().await));
        let left = BACKLOG - courier.calls.lock().unwrap().len();
        let withheld = format!("webhook_deliveries_total{{result=\"withheld\"}} {left}\n");
        shared.metrics.render().contains(&withheld).then_some(())
    };
    eventually("the backlog is counted off", withheld).await;
    assert!((1..=256).contains(&most.get()), "{} in one step", most.get());
    // The probe goes on until it is abandoned.
    webhooks.drain(Duration::ZERO).await;
    drop(webhooks);
    finishing.join_next().await;
}
