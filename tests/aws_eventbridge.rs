//! EventBridge in trouble: the whole service against the fake AWS, on a clock that stands still until a
//! test moves it. Whatever the bus says of whichever entry: nothing is lost, nothing but what failed is
//! sent again, and a repeat is the same bytes.

#[path = "support/fake_aws/mod.rs"]
mod fake_aws;
#[path = "it/support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "each test takes what it needs")]
mod support;

use std::collections::{BTreeMap, BTreeSet};

use fake_aws::{Call, FakeAws, Fault, Options};
use payment_sim::{clock::SystemClock, config::EventSink};
use serde_json::Value;
use support::{CancelPaymentRequest, Delivery, PaymentScenario, TestApp, eventually};

/// As many as one call takes.
const BATCH: usize = 10;
const BUS: &str = "the-bus";
const QUEUE: &str = "the-queue";
/// As long as a sink is ever left alone, and a failed entry too.
const BACK_OFF_MAX_MS: u64 = 60_000;
const TOLD_AFTER_MS: u64 = 2_000;

/// Of an entry, as EventBridge documents them: worth another try.
const TRIED_AGAIN: [&str; 7] = [
    "InternalFailure",
    "InternalException",
    "ThrottlingException",
    "ServiceUnavailable",
    "RequestTimeout",
    // A bus can be made later.
    "ResourceNotFoundException",
    "NeverHeardOf",
];
/// Of an entry: another try would end the same way.
const FINAL: [&str; 8] = [
    "AccessDeniedException",
    "InvalidAccountIdException",
    "InvalidArgument",
    "MalformedDetail",
    "RedactionFailure",
    "NotAuthorizedForSourceException",
    "NotAuthorizedForDetailTypeException",
    "ValidationException",
];
/// Of a call: something in it is wrong, and nobody says in which entry.
const OF_THE_CONTENT: [(u16, &str); 5] = [
    (400, "ValidationException"),
    (400, "InvalidArgument"),
    (400, "MalformedDetail"),
    (400, "SerializationException"),
    (413, "RequestEntityTooLarge"),
];

struct Bed {
    fake: FakeAws,
    app: TestApp,
}

/// What became of one payment's event.
#[derive(Debug, PartialEq, Eq)]
struct Fate {
    /// How often it was sent, how often the bus took it, and what the service says of it.
    sent: usize,
    taken: usize,
    state: String,
}

fn fate(sent: usize, taken: usize, state: &str) -> Fate {
    Fate { sent, taken, state: state.to_owned() }
}

impl Bed {
    async fn start() -> Self {
        credentials();
        let fake = FakeAws::start(Options::new(SystemClock)).await;
        let pattern = r#"{"source": ["payment-sim-api"]}"#;
        fake.route(BUS, "everything-of-ours", pattern, QUEUE);
        let app = TestApp::with(|config| {
            config.events.sink = EventSink::EventBridge;
            config.events.bus_name = BUS.to_owned();
            config.events.aws_endpoint_url = Some(fake.url.parse().unwrap());
        })
        .await;
        Self { fake, app }
    }

    /// Ten payments whose events are due in the same moment, and so go in one call; told when that
    /// moment has come.
    async fn ten(&self) -> Vec<String> {
        self.fake.forget();
        let mut ids = Vec::new();
        for _ in 0..BATCH {
            ids.push(self.app.pay(PaymentScenario::Approve, "").await);
        }
        self.app.advance_ms(TOLD_AFTER_MS);
        ids
    }

    /// Waits until nothing is owed any more, and moves the clock on for what is to be tried again.
    async fn settled(&self, ids: &[String]) {
        for attempts in 1.. {
            let what = format!("attempt {attempts} of all that is owed");
            let owed = eventually(&what, || async {
                let mut owed = 0;
                for id in ids {
                    let deliveries = self.app.deliveries(id, "event").await;
                    // What comes after the first that is owed is held until then.
                    let mut left = deliveries.iter().filter(|delivery| is_owed(delivery));
                    let Some(first) = left.next() else { continue };
                    if first.attempts_made < attempts {
                        return None;
                    }
                    owed += 1;
                }
                Some(owed)
            });
            if owed.await == 0 {
                return;
            }
            self.app.advance_ms(BACK_OFF_MAX_MS);
        }
    }

    /// What became of each, in the order of the first call, once nothing is owed. Every event was sent,
    /// and every repeat was the same bytes.
    async fn fates(&self, ids: &[String]) -> Vec<Fate> {
        self.settled(ids).await;
        let calls = self.fake.calls("PutEvents");
        let mut sent: BTreeMap<String, Vec<(&str, bool)>> = BTreeMap::new();
        for entry in calls.iter().flat_map(|call| &call.entries) {
            let all = sent.entry(payment_of(&entry.raw)).or_default();
            all.push((&entry.raw, entry.is_taken()));
        }
        let known: BTreeSet<_> = ids.iter().cloned().collect();
        assert_eq!(sent.keys().cloned().collect::<BTreeSet<_>>(), known);
        let mut fates = Vec::new();
        for id in payments_of(&calls[0]) {
            let all = &sent[&id];
            assert!(all.iter().all(|(raw, _)| *raw == all[0].0), "not the same bytes: {all:#?}");
            let deliveries = self.app.deliveries(&id, "event").await;
            let [delivery] = &deliveries[..] else { panic!("{deliveries:?}") };
            let taken = all.iter().filter(|(_, taken)| *taken).count();
            fates.push(fate(all.len(), taken, &delivery.state));
        }
        assert_eq!(fates.len(), BATCH, "all went in the first call");
        fates
    }

    /// Ten payments of which the first call meets this fault: what becomes of each.
    async fn after(&self, fault: Fault) -> Vec<Fate> {
        self.fake.order("PutEvents", [fault]);
        let ids = self.ten().await;
        self.fates(&ids).await
    }
}

fn is_owed(delivery: &Delivery) -> bool {
    matches!(delivery.state.as_str(), "OWED" | "HELD")
}

/// What a place in the batch was, and what all others were.
fn all_but(place: usize, that: impl Fn() -> Fate, others: impl Fn() -> Fate) -> Vec<Fate> {
    (0..BATCH).map(|n| if n == place { that() } else { others() }).collect()
}

fn payment_of(raw: &str) -> String {
    detail_of(raw)["payment_intent_id"].as_str().unwrap().to_owned()
}

fn detail_of(raw: &str) -> Value {
    let entry: Value = serde_json::from_str(raw).unwrap();
    serde_json::from_str(entry["Detail"].as_str().unwrap()).unwrap()
}

fn payments_of(call: &Call) -> Vec<String> {
    call.entries.iter().map(|entry| payment_of(&entry.raw)).collect()
}

/// Where every AWS SDK looks first. Nothing of this process but the SDK reads these.
fn credentials() {
    let lines =
        "AWS_ACCESS_KEY_ID=test\nAWS_SECRET_ACCESS_KEY=test\nAWS_EC2_METADATA_DISABLED=true";
    dotenvy::from_read(lines.as_bytes()).unwrap();
}

// ---- Entries fail ----

#[tokio::test(flavor = "multi_thread")]
async fn at_every_place_what_failed_is_sent_again_and_nothing_else() {
    let bed = Bed::start().await;
    for code in TRIED_AGAIN {
        for place in 0..BATCH {
            let fates = bed.after(Fault::entry(place, code)).await;
            let once = || fate(1, 1, "DELIVERED");
            assert_eq!(
                fates,
                all_but(place, || fate(2, 1, "DELIVERED"), once),
                "{code} at {place}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn at_every_place_what_is_final_is_dead_and_listed() {
    let bed = Bed::start().await;
    for code in FINAL {
        for place in 0..BATCH {
            let fates = bed.after(Fault::entry(place, code)).await;
            let once = || fate(1, 1, "DELIVERED");
            assert_eq!(fates, all_but(place, || fate(1, 0, "DEAD"), once), "{code} at {place}");
            let dead = payments_of(&bed.fake.calls("PutEvents")[0])[place].clone();
            let dead = bed.app.deliveries(&dead, "event").await.remove(0);
            assert_eq!(dead.attempts.last().unwrap().error, code);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_entry_a_fate_of_its_own() {
    let bed = Bed::start().await;
    for turn in 0..BATCH {
        let codes = |n: usize| match (n + turn) % 3 {
            0 => Some(TRIED_AGAIN[n % TRIED_AGAIN.len()]),
            1 => Some(FINAL[n % FINAL.len()]),
            _ => None,
        };
        let failing = (0..BATCH).filter_map(|n| Some((n, codes(n)?.to_owned())));
        // What is tried again fails as a whole the next time, with what was final on its way out.
        bed.fake.order("PutEvents", [Fault::Entries(failing.collect()), Fault::throttle()]);
        let ids = bed.ten().await;
        let fates = bed.fates(&ids).await;
        let expected = (0..BATCH).map(|n| match (n + turn) % 3 {
            0 => fate(3, 1, "DELIVERED"),
            1 => fate(1, 0, "DEAD"),
            _ => fate(1, 1, "DELIVERED"),
        });
        assert_eq!(fates, expected.collect::<Vec<_>>(), "turn {turn}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payments_second_event_waits_for_its_first() {
    let bed = Bed::start().await;
    for place in 0..BATCH {
        bed.fake.forget();
        bed.fake.order("PutEvents", [Fault::entry(place, "InternalFailure")]);
        let mut ids = Vec::new();
        for _ in 0..BATCH {
            let id = bed.app.pay(PaymentScenario::Approve, "").await;
            let refund =
                CancelPaymentRequest { payment_intent_id: id.clone(), ..Default::default() };
            bed.app.client.clone().cancel_payment(refund).await.unwrap();
            ids.push(id);
        }
        bed.app.advance_ms(TOLD_AFTER_MS);
        bed.settled(&ids).await;
        let mut versions: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for call in bed.fake.calls("PutEvents") {
            let payments: BTreeSet<_> = payments_of(&call).into_iter().collect();
            assert_eq!(payments.len(), call.entries.len(), "one entry a payment in a call");
            for entry in call.entries.iter().filter(|entry| entry.is_taken()) {
                let version = detail_of(&entry.raw)["version"].as_i64().unwrap();
                versions.entry(payment_of(&entry.raw)).or_default().push(version);
            }
        }
        assert_eq!(versions.len(), BATCH);
        assert!(versions.values().all(|versions| *versions == [2, 3]), "{place}: {versions:?}");
    }
}

// ---- Calls fail ----

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_did_nothing_is_made_again() {
    let bed = Bed::start().await;
    for fault in [
        Fault::throttle(),
        Fault::refuse(500, "InternalException"),
        Fault::refuse(500, "InternalFailure"),
        Fault::refuse(503, "ServiceUnavailable"),
        Fault::refuse(400, "RequestTimeout"),
        Fault::refuse(400, "ResourceNotFoundException"),
        // About who we are: an operator mends it, and the events are as good as before.
        Fault::refuse(400, "AccessDeniedException"),
        Fault::refuse(400, "ExpiredTokenException"),
        Fault::refuse(403, "UnrecognizedClientException"),
        Fault::CutBefore,
    ] {
        let what = format!("{fault:?}");
        let fates = bed.after(fault).await;
        assert!(fates.iter().all(|f| *f == fate(2, 1, "DELIVERED")), "{what}: {fates:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_reply_is_lost_is_made_again() {
    let bed = Bed::start().await;
    for fault in [
        Fault::CutAfter,
        Fault::garble(200, ""),
        Fault::garble(200, "{}"),
        Fault::garble(200, "<html>not JSON</html>"),
        Fault::garble(200, r#"{"FailedEntryCount": 0, "Entries": "#),
        Fault::garble(200, r#"{"FailedEntryCount": 0, "Entries": [{}, {}]}"#),
        Fault::garble(500, "no JSON"),
        Fault::garble(502, ""),
    ] {
        let what = format!("{fault:?}");
        let fates = bed.after(fault).await;
        assert!(fates.iter().all(|f| *f == fate(2, 2, "DELIVERED")), "{what}: {fates:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_short_reply_leaves_out_is_sent_again() {
    let bed = Bed::start().await;
    for told in 0..BATCH {
        let entries = vec![serde_json::json!({"EventId": "an-id"}); told];
        let body = serde_json::json!({"FailedEntryCount": 0, "Entries": entries}).to_string();
        let fates = bed.after(Fault::Garble { status: 200, body: body.into() }).await;
        for (place, found) in fates.iter().enumerate() {
            let times = if place < told { 1 } else { 2 };
            assert_eq!(*found, fate(times, times, "DELIVERED"), "{place} of {told}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_comes_twice_counts_once() {
    let bed = Bed::start().await;
    for _ in 0..3 {
        let fates = bed.after(Fault::AnswerTwice).await;
        assert!(fates.iter().all(|f| *f == fate(1, 1, "DELIVERED")), "{fates:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_refused_for_one_entry_costs_that_entry_alone_at_every_place() {
    let bed = Bed::start().await;
    for (status, code) in OF_THE_CONTENT {
        for place in 0..BATCH {
            let mut bad = None;
            bed.fake.always("PutEvents", move |entries| {
                let bad = bad.get_or_insert_with(|| entries[place].to_owned());
                entries.contains(&bad.as_str()).then(|| Fault::refuse(status, code))
            });
            let ids = bed.ten().await;
            let fates = bed.fates(&ids).await;
            // Once with the others, once alone.
            let alone = || fate(2, 1, "DELIVERED");
            assert_eq!(fates, all_but(place, || fate(2, 0, "DEAD"), alone), "{code} at {place}");
            bed.fake.behaves();
        }
    }
}

// ---- Answers come late ----

#[tokio::test(flavor = "multi_thread")]
async fn a_late_answer_is_waited_for() {
    let bed = Bed::start().await;
    bed.fake.order("PutEvents", [Fault::Hold]);
    let ids = bed.ten().await;
    bed.fake.holds(1).await;
    bed.app.advance_ms(BACK_OFF_MAX_MS);
    assert_eq!(bed.fake.entries("PutEvents").len(), BATCH, "none is sent while it is in flight");
    bed.fake.release();
    let fates = bed.fates(&ids).await;
    assert!(fates.iter().all(|f| *f == fate(1, 1, "DELIVERED")), "{fates:#?}");
}

/// Takes as long as a request may (5 s).
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_too_late_was_none() {
    let bed = Bed::start().await;
    bed.fake.order("PutEvents", [Fault::Hold]);
    let ids = bed.ten().await;
    let fates = bed.fates(&ids).await;
    assert!(fates.iter().all(|f| *f == fate(2, 2, "DELIVERED")), "{fates:#?}");
}

// ---- Long trouble ----

/// Nobody there, then throttled, then half of everything fails: what comes meanwhile waits, and in the
/// end all is in the queue.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_in_a_long_outage() {
    let bed = Bed::start().await;
    let mut ids = Vec::new();
    bed.fake.set_reachable(false);
    for _ in 0..3 {
        ids.extend(bed.ten().await);
        bed.app.advance_ms(BACK_OFF_MAX_MS);
    }
    bed.fake.always("PutEvents", |_| Some(Fault::throttle()));
    bed.fake.set_reachable(true);
    for _ in 0..3 {
        ids.extend(bed.ten().await);
        bed.app.advance_ms(BACK_OFF_MAX_MS);
    }
    let mut calls = 0;
    bed.fake.always("PutEvents", move |entries| {
        calls += 1;
        let fails = |n: &usize| (n + calls).is_multiple_of(2) && calls < 50;
        let failing = (0..entries.len()).filter(fails);
        Some(Fault::Entries(failing.map(|n| (n, "InternalFailure".to_owned())).collect()))
    });
    let delivered = eventually("everything is delivered", || async {
        bed.app.advance_ms(BACK_OFF_MAX_MS);
        let mut owed = 0;
        for id in &ids {
            let deliveries = bed.app.deliveries(id, "event").await;
            owed += deliveries.iter().filter(|delivery| delivery.state != "DELIVERED").count();
        }
        (owed == 0).then_some(())
    });
    delivered.await;
    let mut queued = BTreeMap::new();
    for body in bed.fake.bodies(QUEUE) {
        let event: Value = serde_json::from_str(&body).unwrap();
        let id = event["detail"]["payment_intent_id"].as_str().unwrap().to_owned();
        *queued.entry(id).or_insert(0) += 1;
    }
    let expected: BTreeMap<_, _> = ids.into_iter().map(|id| (id, 1)).collect();
    assert_eq!(queued, expected, "each once: no reply was lost");
}
