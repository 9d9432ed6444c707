//! What the first implementation of this service did wrong, each as a test. (Its worker's two faults
//! come with our worker: it waited for APPROVED, and was deaf to SIGTERM.)

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use payment_sim::{
    clock::ManualClock,
    courier::{Courier, Parcel},
    domain::{
        delivery::{Attempt, Attempted, Channel, DeliveryState, Verdict},
        ids::PaymentId,
        time::Timestamp,
    },
    driver::Step,
    outbox::{Batches, Finisher, Jitter, Mail, Policies, RETRIES},
    store,
};
use std::time::Duration;
use tonic::Code;

use crate::support::{
    CreatePaymentIntentRequest, ListPaymentsRequest, PaymentScenario as Scenario, Refused, TestApp,
    WebhookSink,
    bare::{new_payment, outbox},
    create, eventually, http_get,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_notification_that_waits_is_not_lost_on_restart() {
    let (folder, sink) = (tempfile::tempdir().unwrap(), WebhookSink::start().await);
    let app = TestApp::stored_in(folder.path()).await;
    app.pay(Scenario::Approve, &sink.url).await;
    app.advance_ms(1_000);
    let app = app.restart(0).await;
    assert!(sink.received().is_empty(), "not due yet");
    app.advance_ms(1_000);
    assert_eq!(sink.only().await.status(), "COMPLETED");
    app.events(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_is_drawn_once_for_rpc_webhook_and_event() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let mut told = std::collections::BTreeMap::new();
    for _ in 0..40 {
        let id = app.pay(Scenario::Random, &sink.url).await;
        let status = app.status(&id).await.as_str_name().to_owned();
        assert_eq!(app.process(&id).await.unwrap().get_ref().status().as_str_name(), status);
        told.insert(id, status);
    }
    app.advance_ms(2_000);
    for hook in sink.first(40).await {
        assert_eq!(hook.body["status"], *told[hook.body["payment_intent_id"].as_str().unwrap()]);
    }
    for event in app.events(40).await {
        let detail = &event["detail"];
        assert_eq!(detail["status"], *told[detail["payment_intent_id"].as_str().unwrap()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_second_is_half_a_second() {
    let app = TestApp::with(|config| config.default_delay = Duration::from_millis(500)).await;
    let sink = WebhookSink::start().await;
    let at_ms = app.now_ms() + 500;
    let id = app.pay(Scenario::Approve, &sink.url).await;
    let ms = |at: prost_types::Timestamp| at.seconds * 1_000 + i64::from(at.nanos) / 1_000_000;
    assert_eq!(ms(app.deliveries(&id, "webhook").await[0].due_at.unwrap()), at_ms);
    app.advance_ms(499);
    assert_eq!(app.deliveries(&id, "webhook").await[0].attempts_made, 0);
    app.advance_ms(1);
    let told = app.webhook_becomes(&id, "DELIVERED").await;
    assert_eq!(ms(told.attempts[0].at.unwrap()), at_ms);
    let delayed = app.pay(Scenario::Delay, "").await;
    let created_ms = app.now_ms();
    app.advance_ms(500);
    let decided = app.becomes(&delayed, crate::support::PaymentStatus::Completed).await;
    assert_eq!(ms(decided.processed_at.unwrap()), created_ms + 500);
}

/// Takes a batch as EventBridge does: as a whole, with one entry failed the first time.
struct OneFails {
    fails: Mutex<Option<PaymentId>>,
    batches: Mutex<Vec<Vec<PaymentId>>>,
}

#[async_trait]
impl Courier for OneFails {
    fn batch_max(&self) -> usize {
        10
    }

    async fn attempt(&self, batch: &[Parcel], now: Timestamp) -> Vec<Attempted> {
        self.batches.lock().unwrap().push(batch.iter().map(|parcel| parcel.payment).collect());
        let failing = self.fails.lock().unwrap().take();
        let verdict = |parcel: &Parcel| match Some(parcel.payment) == failing {
            true => (Verdict::Retry { not_before: None }, Some("ThrottlingException".to_owned())),
            false => (Verdict::Accepted, None),
        };
        let attempted = |parcel| {
            let (verdict, error) = verdict(parcel);
            let attempt = Attempt { at: now, http_status: Some(200), latency_ms: 1, error };
            Attempted { attempt, verdict }
        };
        batch.iter().map(attempted).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_entry_is_no_success_it_stays_owed_and_it_alone_is_sent_again() {
    let clock = ManualClock::at_ms(1_767_225_600_000);
    let (shared, app) = outbox(&clock);
    let mut ids = Vec::new();
    for n in 0..3 {
        let created = app.create(new_payment(&format!("r-{n}")), None, app.now()).await.unwrap();
        ids.push(created.terms.id);
    }
    let courier = Arc::new(OneFails { fails: Mutex::new(Some(ids[1])), batches: Mutex::default() });
    let policies = Policies { batched: RETRIES, webhook: RETRIES };
    let jitter: Jitter = Arc::new(|| 1.0);
    let (finisher, done) = Finisher::new(shared.clone(), policies, Arc::clone(&jitter));
    let mut finishing = tokio::task::JoinSet::new();
    finishing.spawn(finisher.run());
    let mail = Mail::Events("eventbridge");
    let events = Batches::new(shared.clone(), courier.clone(), mail, jitter, done);
    assert_eq!(events.step().await, 3);
    let state = |id| {
        let store = Arc::clone(&shared.store);
        async move {
            let payment = store.get(id).await.unwrap().unwrap().payment.clone();
            let event = payment.progress.notifications[0].delivery(Channel::Event).unwrap();
            (event.attempts_made == 1).then(|| event.state.clone())
        }
    };
    let failed = eventually("its attempt is written down", || state(ids[1])).await;
    assert!(matches!(failed, DeliveryState::Owed { .. }), "{failed:?}");
    for id in [ids[0], ids[2]] {
        let sent = eventually("its attempt is written down", || state(id)).await;
        assert!(matches!(sent, DeliveryState::Delivered { .. }), "{sent:?}");
    }
    clock.advance(Duration::from_secs(60));
    let again = async || (events.step().await == 1).then_some(());
    eventually("it is sent again", again).await;
    let sent = async || (courier.batches.lock().unwrap().get(1)? == &[ids[1]]).then_some(());
    eventually("it and nothing else", sent).await;
    events.drain(Duration::from_secs(60)).await;
    drop(events);
    finishing.join_all().await;
    let metrics = shared.metrics.render();
    for line in [
        r#"events_published_total{result="published",sink="eventbridge"} 3"#,
        r#"events_published_total{result="retry",sink="eventbridge"} 1"#,
    ] {
        assert!(metrics.contains(line), "{line}");
    }
    assert_eq!(shared.store.backlog(store::Work::Event).pending, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn not_found_is_not_found_in_every_call() {
    use crate::support::{
        CancelPaymentRequest, GetPaymentIntentRequest, GetPaymentStatusRequest,
        ProcessPaymentRequest, SimulateWebhookRequest,
    };
    let app = TestApp::quiet().await;
    let (mut client, id) = (app.client.clone(), format!("pi_01{}", "0".repeat(24)));
    let payment_intent_id = || id.clone();
    let get =
        GetPaymentIntentRequest { payment_intent_id: payment_intent_id(), ..Default::default() };
    let status =
        GetPaymentStatusRequest { payment_intent_id: payment_intent_id(), ..Default::default() };
    let process =
        ProcessPaymentRequest { payment_intent_id: payment_intent_id(), ..Default::default() };
    let cancel =
        CancelPaymentRequest { payment_intent_id: payment_intent_id(), ..Default::default() };
    let webhook =
        SimulateWebhookRequest { payment_intent_id: payment_intent_id(), ..Default::default() };
    for error in [
        client.get_payment_intent(get).await.unwrap_err(),
        client.get_payment_status(status).await.unwrap_err(),
        client.process_payment(process).await.unwrap_err(),
        client.cancel_payment(cancel).await.unwrap_err(),
        client.simulate_webhook(webhook).await.unwrap_err(),
    ] {
        let error = Refused::of(&error);
        assert_eq!((error.code, error.reason.as_str()), (Code::NotFound, "PAYMENT_NOT_FOUND"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_url_without_an_amount_is_refused_and_nothing_ends() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let webhook_url = sink.url.clone();
    let bad = CreatePaymentIntentRequest { amount: None, webhook_url, ..create("r") };
    let error = Refused::of(&app.client.clone().create_payment_intent(bad).await.unwrap_err());
    assert_eq!((error.code, error.fields), (Code::InvalidArgument, vec!["amount".to_owned()]));
    app.pay(Scenario::Approve, &sink.url).await;
    app.advance_ms(2_000);
    sink.only().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_request_is_refused_with_all_that_it_lacks() {
    let app = TestApp::quiet().await;
    let empty = CreatePaymentIntentRequest::default();
    let error = Refused::of(&app.client.clone().create_payment_intent(empty).await.unwrap_err());
    assert_eq!((error.code, error.reason.as_str()), (Code::InvalidArgument, "VALIDATION_FAILED"));
    assert_eq!(error.fields, ["reservation_id", "user_id", "amount"]);
    let all = app.client.clone().list_payments(ListPaymentsRequest::default()).await.unwrap();
    assert!(all.into_inner().payments.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_gives_one_payment_and_one_notification() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let request = || CreatePaymentIntentRequest {
        idempotency_key: "k".to_owned(),
        webhook_url: sink.url.clone(),
        ..create("r")
    };
    assert_eq!(app.create(request()).await, app.create(request()).await);
    app.advance_ms(2_000);
    sink.only().await;
    assert_eq!(app.events(1).await.len(), 1);
}

/// Its page said "healthy" whatever happened; ours depends on what is asked (the states of the store
/// are tested beside the page itself).
#[tokio::test(flavor = "multi_thread")]
async fn the_health_page_is_not_always_healthy() {
    let mut app = TestApp::with(|config| config.drain_delay = Duration::from_secs(2)).await;
    assert_eq!(http_get(app.ops, "/health").await.unwrap().0, 200);
    let (running, ops) = (app.take_running(), app.ops);
    let looked = eventually("unhealthy", || async {
        http_get(ops, "/health").await.ok().filter(|(status, _)| *status == 503)
    });
    let ((), (_, body)) = tokio::join!(running.stop(), looked);
    assert!(body.contains("draining"), "{body}");
}
