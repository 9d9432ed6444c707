use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    sync::Arc,
    time::Duration,
};

use super::{
    calls::Told,
    decision::Action,
    metrics::Outcome,
    state::State,
    testbed::{Api, Bed, Call, DEADLINE, MemoryQueue, VISIBILITY, body, until},
};
use crate::clock::{Clock, ManualClock, Stopwatch, SystemClock};

const START_MS: i64 = 1_767_225_600_000;

struct Manual {
    clock: ManualClock,
    bed: Bed,
}

/// With a clock that stands still, and a state that is forgotten.
fn manual(api: Arc<Api>) -> Manual {
    let clock = ManualClock::at_ms(START_MS);
    let shared: Arc<dyn Clock> = Arc::new(clock.clone());
    let queue = MemoryQueue::new(Arc::clone(&shared));
    let state = State::in_memory(Arc::clone(&shared)).unwrap();
    Manual { bed: Bed::start(shared, queue, api, state), clock }
}

impl Manual {
    /// Moves the clock on until it is so: whatever waits for its time gets it.
    async fn advance_until(&self, step: Duration, mut is_so: impl FnMut(&Bed) -> bool) {
        let watch = Stopwatch::start();
        while !is_so(&self.bed) {
            assert!(watch.elapsed() < DEADLINE, "it never came");
            self.clock.advance(step);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn actions(calls: &[Call]) -> Vec<(Action, &str)> {
    calls.iter().map(|call| (call.action, call.event_id.as_str())).collect()
}

#[tokio::test]
async fn each_event_is_told_once_and_deleted() {
    let m = manual(Api::obliging());
    for (n, status) in
        ["COMPLETED", "FAILED", "CANCELLED", "EXPIRED", "REFUNDED"].iter().enumerate()
    {
        m.bed.queue.send([body(&format!("e{n}"), &n.to_string(), status, 2)]);
        until(|| m.bed.queue.is_empty()).await;
    }
    let expected = [
        (Action::Confirm, "e0"),
        (Action::Cancel, "e1"),
        (Action::Cancel, "e2"),
        (Action::Cancel, "e3"),
        (Action::Cancel, "e4"),
    ];
    let calls = m.bed.api.calls();
    assert_eq!(actions(&calls), expected);
    assert_eq!(calls[0].reservation_id, "res_0");
    assert_eq!((m.bed.count(Outcome::Confirmed), m.bed.count(Outcome::Cancelled)), (1, 4));
    m.bed.stop().await.unwrap();
}

#[tokio::test]
async fn duplicates_older_versions_and_part_refunds_are_deleted_without_effect() {
    let m = manual(Api::obliging());
    m.bed.queue.send([body("e3", "p", "REFUNDED", 3)]);
    until(|| m.bed.queue.is_empty()).await;
    m.bed.queue.send([
        body("e3", "p", "REFUNDED", 3),
        body("e2", "p", "COMPLETED", 2),
        body("r1", "q", "REFUND_UPDATED", 9),
    ]);
    until(|| m.bed.queue.is_empty()).await;
    // What has no effect makes nothing stale.
    m.bed.queue.send([body("c2", "q", "COMPLETED", 2)]);
    until(|| m.bed.queue.is_empty()).await;
    assert_eq!(actions(&m.bed.api.calls()), [(Action::Cancel, "e3"), (Action::Confirm, "c2")]);
    for outcome in [Outcome::Duplicate, Outcome::Stale, Outcome::NoEffect] {
        assert_eq!(m.bed.count(outcome), 1, "{outcome:?}");
    }
    m.bed.stop().await.unwrap();
}

#[tokio::test]
async fn two_of_one_payment_in_hand_take_turns() {
    let api = Api::obliging();
    api.set_open(false);
    let m = manual(api);
    m.bed.queue.send([body("e3", "p", "REFUNDED", 3), body("other", "q", "COMPLETED", 2)]);
    until(|| m.bed.api.calls().len() == 2).await;
    m.bed.queue.send([body("e2", "p", "COMPLETED", 2), body("e3", "p", "REFUNDED", 3)]);
    until(|| m.bed.queue.received() == 4).await;
    tokio::task::yield_now().await;
    assert_eq!(m.bed.api.calls().len(), 2, "the first of the payment is not done");
    m.bed.api.set_open(true);
    until(|| m.bed.queue.is_empty()).await;
    let told: HashSet<_> = m.bed.api.calls().into_iter().map(|call| call.event_id).collect();
    assert_eq!(told, HashSet::from(["e3".to_owned(), "other".to_owned()]));
    assert_eq!((m.bed.count(Outcome::Stale), m.bed.count(Outcome::Duplicate)), (1, 1));
    m.bed.stop().await.unwrap();
}

#[tokio::test]
async fn what_is_in_hand_stays_hidden_however_long_it_takes() {
    let api = Api::obliging();
    api.set_open(false);
    let m = manual(api);
    m.bed.queue.send((0..12).map(|n| body(&format!("e{n}"), &n.to_string(), "COMPLETED", 2)));
    until(|| m.bed.api.calls().len() == 12).await;
    for beat in 1..=9 {
        // The receivers sleep too, until the first message would be shown again.
        until(|| m.clock.sleepers() > 0).await;
        m.clock.advance(VISIBILITY / 3);
        until(|| m.bed.queue.hides().len() == 2 * beat).await;
    }
    let hides = m.bed.queue.hides();
    assert!(hides.iter().all(|(_, visibility)| *visibility == VISIBILITY));
    assert_eq!(hides[0].0.len() + hides[1].0.len(), 12, "in batches of ten at most");
    assert_eq!(m.bed.queue.received(), 12, "three times its visibility later nothing came back");
    m.bed.api.set_open(true);
    until(|| m.bed.queue.is_empty()).await;
    m.clock.advance(VISIBILITY);
    until(|| m.clock.sleepers() > 0).await;
    assert_eq!(m.bed.queue.hides().len(), hides.len(), "what is deleted is not extended");
    m.bed.stop().await.unwrap();
}

#[tokio::test]
async fn poison_is_left_to_the_redrive_policy() {
    let m = manual(Api::obliging());
    let pending = body("e1", "p", "PENDING", 1);
    let poison = ["no JSON".to_owned(), "{}".to_owned(), pending, "x".repeat(300 * 1024)];
    m.bed.queue.send(poison.clone());
    m.advance_until(VISIBILITY / 2, |bed| bed.queue.dead().len() == poison.len()).await;
    // Five receipts each; the last may have come just now.
    until(|| m.bed.count(Outcome::Malformed) == 5 * 4).await;
    // A heartbeat may meet one in hand; none is deleted or shown earlier than it would be.
    assert!(m.bed.queue.deletes().is_empty());
    assert!(m.bed.queue.hides().iter().all(|(_, visibility)| *visibility == VISIBILITY));
    assert!(m.bed.api.calls().is_empty());
    m.bed.stop().await.unwrap();
}

#[tokio::test]
async fn a_final_refusal_is_left_to_the_redrive_policy_and_is_no_effect() {
    let api = Api::new(|call, _| match call.event_id.as_str() {
        "e3" => Told::Refused("HTTP 404".into()),
        _ => Told::Done,
    });
    let m = manual(api);
    m.bed.queue.send([body("e3", "p", "REFUNDED", 3)]);
    m.advance_until(VISIBILITY / 2, |bed| !bed.queue.dead().is_empty()).await;
    until(|| m.bed.count(Outcome::Refused) == 5).await;
    assert_eq!(m.bed.api.calls().len(), 5, "one call a receipt");
    // Nothing has happened: what is older still counts.
    m.bed.queue.send([body("e2", "p", "COMPLETED", 2)]);
    until(|| m.bed.queue.is_empty()).await;
    assert_eq!(actions(&m.bed.api.effects()), [(Action::Confirm, "e2")]);
    m.bed.stop().await.unwrap();
}

#[tokio::test]
async fn a_refusal_after_a_call_that_may_have_been_heard_lets_nothing_older_through() {
    let api = Api::new(|call, before| match (call.event_id.as_str(), before) {
        ("e3", 0) => Told::Retry("no answer in time".into()),
        ("e3", _) => Told::Refused("HTTP 409".into()),
        _ => Told::Done,
    });
    let m = manual(api);
    m.bed.queue.send([body("e3", "p", "REFUNDED", 3)]);
    m.advance_until(Duration::from_millis(50), |bed| bed.count(Outcome::Refused) == 1).await;
    m.bed.queue.send([body("e2", "p", "COMPLETED", 2)]);
    until(|| m.bed.count(Outcome::Stale) + m.bed.count(Outcome::Confirmed) == 1).await;
    assert_eq!(m.bed.count(Outcome::Confirmed), 0, "a confirm came after the cancel");
    m.bed.stop().await.unwrap();
}

#[tokio::test]
async fn a_failure_is_tried_again_while_the_message_stays_in_hand() {
    let api = Api::new(|_, before| match before {
        0..4 => Told::Retry("HTTP 503".into()),
        _ => Told::Done,
    });
    let m = manual(api);
    m.bed.queue.send([body("e", "p", "COMPLETED", 2)]);
    let began = m.clock.now_ms();
    m.advance_until(Duration::from_millis(50), |bed| bed.queue.is_empty()).await;
    assert_eq!((m.bed.queue.received(), m.bed.api.calls().len()), (1, 5));
    // 0.2 + 0.4 + 0.8 + 1.6 s, as the chance here is always the longest.
    assert!(m.clock.now_ms() - began >= 3_000);
    m.bed.stop().await.unwrap();
}

#[tokio::test]
async fn an_outage_that_lasts_gives_the_message_back_and_lets_nothing_older_through() {
    let api = Api::new(|call, before| match call.event_id.as_str() {
        "e3" if before < 12 => Told::Retry("connection refused".into()),
        _ => Told::Done,
    });
    let m = manual(api);
    m.bed.queue.send([body("e3", "p", "REFUNDED", 3)]);
    m.advance_until(Duration::from_millis(500), |bed| bed.count(Outcome::GaveUp) == 1).await;
    assert!(m.bed.queue.deletes().is_empty());
    // The cancel may have been heard: a confirm must not come after it.
    m.bed.queue.send([body("e2", "p", "COMPLETED", 2)]);
    until(|| m.bed.count(Outcome::Stale) == 1).await;
    m.advance_until(Duration::from_millis(500), |bed| bed.queue.is_empty()).await;
    assert_eq!(m.bed.count(Outcome::Cancelled), 1);
    assert!(m.bed.api.calls().iter().all(|call| call.action == Action::Cancel));
    m.bed.stop().await.unwrap();
}

#[tokio::test]
async fn a_queue_that_fails_is_asked_again() {
    let m = manual(Api::obliging());
    m.bed.queue.fail_receives(20);
    m.bed.queue.send((0..30).map(|n| body(&format!("e{n}"), &n.to_string(), "COMPLETED", 2)));
    m.advance_until(Duration::from_secs(1), |bed| bed.queue.is_empty()).await;
    assert_eq!(m.bed.count(Outcome::Confirmed), 30);
    assert_eq!(m.bed.api.effects().len(), 30);
    m.bed.stop().await.unwrap();
}

#[tokio::test]
async fn a_delete_that_fails_costs_no_second_call() {
    let api = Api::obliging();
    api.set_open(false);
    let m = manual(api);
    m.bed.queue.send([body("e", "p", "COMPLETED", 2)]);
    until(|| m.bed.api.calls().len() == 1).await;
    m.bed.queue.fail_deletes(1);
    m.bed.api.set_open(true);
    m.advance_until(VISIBILITY / 2, |bed| bed.queue.is_empty()).await;
    assert_eq!((m.bed.api.calls().len(), m.bed.count(Outcome::Duplicate)), (1, 1));
    m.bed.stop().await.unwrap();
}

#[tokio::test]
async fn a_stop_ends_what_is_in_hand_and_gives_the_rest_back() {
    let api = Api::new(|call, _| match call.event_id.as_str() {
        "failing" => Told::Retry("HTTP 500".into()),
        _ => Told::Done,
    });
    api.set_open(false);
    let m = manual(api);
    m.bed.queue.send([body("e", "p", "COMPLETED", 2), body("failing", "q", "COMPLETED", 2)]);
    until(|| m.bed.api.calls().len() == 2).await;
    let (queue, api, metrics) =
        (Arc::clone(&m.bed.queue), Arc::clone(&m.bed.api), Arc::clone(&m.bed.metrics));
    m.bed.order_stop();
    queue.send([body("late", "r", "COMPLETED", 2)]);
    api.set_open(true);
    m.bed.stop().await.unwrap();
    assert_eq!(api.calls().len(), 2, "nothing was received after the stop");
    assert_eq!(metrics.messages(Outcome::Confirmed), 1);
    assert_eq!(metrics.messages(Outcome::Interrupted), 1);
    assert_eq!(queue.deletes(), [1]);
    let (receipts, visibility) = queue.hides().pop().expect("the failing one is shown at once");
    assert_eq!((receipts.len(), visibility), (1, Duration::ZERO));
    assert_eq!(queue.visible(), 1, "and the late one is still there");
}

/// `WORKER_TEST_MESSAGES` asks for other than the default.
#[expect(clippy::disallowed_methods, reason = "an order to this test, no setting")]
fn messages() -> usize {
    std::env::var("WORKER_TEST_MESSAGES").map_or(100_000, |n| n.parse().expect("a number"))
}

/// Payments' lives: events with their versions, in the order in which they may be sent.
fn lives(messages: usize) -> Vec<Vec<(String, &'static str, u64)>> {
    let kinds: [&[(&str, u64)]; 6] = [
        &[("COMPLETED", 2)],
        &[("FAILED", 2)],
        &[("COMPLETED", 2), ("REFUNDED", 3)],
        &[("EXPIRED", 2)],
        &[("COMPLETED", 2), ("REFUND_UPDATED", 3), ("REFUNDED", 4)],
        &[("CANCELLED", 2)],
    ];
    let mut lives = Vec::new();
    let mut count = 0;
    while count < messages {
        let n = lives.len();
        let life = kinds[n % kinds.len()];
        count += life.len();
        lives.push(life.iter().map(|(s, v)| (format!("evt_{n}_{v}"), *s, *v)).collect());
    }
    lives
}

/// The events of all lives with a tenth sent twice, and out of order as far as a queue may go: most
/// within a short distance, some far.
fn as_sent(lives: &[Vec<(String, &'static str, u64)>]) -> Vec<String> {
    let mut chance = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: u64| {
        chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (chance >> 33) % below
    };
    let mut sent = Vec::new();
    let mut place = 0_u64;
    for (n, life) in lives.iter().enumerate() {
        for (event_id, status, version) in life {
            place += 1;
            let text = body(event_id, &n.to_string(), status, *version);
            if random(10) == 0 {
                sent.push((place + random(20_000), text.clone()));
            }
            sent.push((place + random(30), text));
        }
    }
    sent.sort_by_key(|(place, _)| *place);
    sent.into_iter().map(|(_, text)| text).collect()
}

fn start_on(folder: &Path, queue: &Arc<MemoryQueue>, api: &Arc<Api>) -> Bed {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let watch = Stopwatch::start();
    // The state before it lets go of the folder when its thread has ended.
    let state = loop {
        match State::in_folder(folder, Arc::clone(&clock)) {
            Ok(state) => break state,
            Err(why) => assert!(watch.elapsed() < DEADLINE, "{why}"),
        }
    };
    Bed::start(clock, Arc::clone(queue), Arc::clone(api), state)
}

/// 100,000 messages, a tenth of them sent twice, out of order, through a worker on disk that is started
/// again in the middle, beside an API whose answers get lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_reservation_is_confirmed_twice_and_none_missed() {
    let lives = lives(messages());
    let mut sent = as_sent(&lives);
    let second_half = sent.split_off(sent.len() / 2);
    let api = Api::new(|_, before| match before % 1_000 {
        999 => Told::Retry("the answer was lost".into()),
        _ => Told::Done,
    });
    let folder = tempfile::tempdir().unwrap();
    let queue = MemoryQueue::new(Arc::new(SystemClock));
    let (mut duplicates, mut stale) = (0, 0);
    for half in [sent, second_half] {
        let bed = start_on(folder.path(), &queue, &api);
        queue.send(half);
        until(|| queue.is_empty()).await;
        duplicates += bed.count(Outcome::Duplicate);
        stale += bed.count(Outcome::Stale);
        bed.stop().await.unwrap();
    }
    assert!(queue.dead().is_empty());
    assert!(stale > 0, "nothing came out of order");
    let deletes = queue.deletes();
    assert!(deletes.iter().any(|size| *size > 1), "never a batch");
    judge(&lives, &api);
    // Every repeat was known from memory, those from before the restart too: one call an event.
    let calls: Vec<String> = api.calls().into_iter().map(|call| call.event_id).collect();
    let distinct: HashSet<&String> = calls.iter().collect();
    assert!(calls.len() - distinct.len() <= calls.len() / 1_000 + 1, "only lost answers repeat");
    assert!(duplicates as usize >= messages() / 20, "{duplicates}");
}

fn judge(lives: &[Vec<(String, &'static str, u64)>], api: &Api) {
    let mut effects: BTreeMap<String, Vec<Call>> = BTreeMap::new();
    for call in api.effects() {
        effects.entry(call.reservation_id.clone()).or_default().push(call);
    }
    assert_eq!(effects.len(), lives.len(), "none missed");
    for (n, life) in lives.iter().enumerate() {
        let effects = &effects[&format!("res_{n}")];
        let versions: Vec<u64> = effects
            .iter()
            .map(|call| call.event_id.rsplit('_').next().unwrap().parse().unwrap())
            .collect();
        assert!(versions.is_sorted_by(|a, b| a < b), "{n}: {versions:?} went back");
        let confirms = effects.iter().filter(|call| call.action == Action::Confirm).count();
        let (_, last_status, last_version) = life.last().unwrap();
        assert_eq!(versions.last(), Some(last_version), "{n}: the last word counts");
        let last = effects.last().unwrap().action;
        if *last_status == "COMPLETED" {
            assert_eq!((last, confirms), (Action::Confirm, 1), "{n}");
        } else {
            assert_eq!(last, Action::Cancel, "{n}");
            assert!(confirms <= 1, "{n}");
        }
    }
}
