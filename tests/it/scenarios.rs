//! Each scenario's whole life: when it is decided, when and what is told, what callers see meanwhile.

use std::collections::BTreeMap;

use payment_sim::config::StoreUrl;
use tonic::Code;

use crate::support::{
    CreatePaymentIntentRequest, PaymentScenario as Scenario, PaymentStatus as Status,
    ProcessPaymentRequest, TestApp, WebhookSink, create, refused, with_header,
};

#[tokio::test(flavor = "multi_thread")]
async fn approve_is_decided_at_once_and_told_two_seconds_later() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Approve, &sink.url).await;
    let payment = app.payment(&id).await;
    assert_eq!((payment.status(), payment.version), (Status::Completed, 2));
    assert_eq!(payment.processed_at, payment.created_at, "decided in the create's own commit");
    let created_ms = app.now_ms();
    app.advance_ms(1_999);
    let owed = app.deliveries(&id, "webhook").await.remove(0);
    assert_eq!((owed.state.as_str(), owed.attempts_made), ("OWED", 0));
    app.advance_ms(1);
    let hook = sink.only().await;
    assert_eq!(hook.status(), "COMPLETED");
    assert_eq!(hook.body["timestamp"], created_ms / 1_000, "when the status changed");
    assert_eq!(hook.header("webhook-timestamp"), ((created_ms + 2_000) / 1_000).to_string());
    let told = app.webhook_becomes(&id, "DELIVERED").await;
    let at = told.attempts[0].at.unwrap();
    assert_eq!(at.seconds * 1_000 + i64::from(at.nanos) / 1_000_000, created_ms + 2_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn approve_shows_its_approval() {
    let app = TestApp::quiet().await;
    let payment = app.payment(&app.pay(Scenario::Approve, "").await).await;
    let bare = payment.payment_intent_id.strip_prefix("pi_").unwrap();
    assert_eq!(payment.payment_id, format!("pay_{bare}"));
    assert_eq!(payment.transaction_id, format!("txn_{bare}"));
    assert!(payment.approval_no.strip_prefix("AP").is_some_and(|digits| digits.len() == 10));
    let result = payment.result.unwrap();
    assert!(result.success && result.response_code == 0 && result.failure_reason.is_empty());
    let kinds: Vec<_> = payment.timeline.iter().map(|e| (e.status(), e.cause.as_str())).collect();
    assert_eq!(kinds.len(), 2, "{kinds:?}");
    assert_eq!((kinds[0].0, kinds[1].0), (Status::Pending, Status::Completed));
}

#[tokio::test(flavor = "multi_thread")]
async fn fail_is_decided_at_once_with_a_reason_that_everybody_hears() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Fail, &sink.url).await;
    let payment = app.payment(&id).await;
    assert_eq!((payment.status(), payment.version), (Status::Failed, 2));
    let result = payment.result.unwrap();
    assert!(!result.success && result.response_code != 0, "{result:?}");
    app.advance_ms(2_000);
    let hook = sink.only().await;
    assert_eq!(hook.status(), "FAILED");
    assert_eq!(hook.body["failure_reason"], result.failure_reason.as_str());
    assert!(hook.body["approval_no"].is_null());
    assert_eq!(app.events(1).await[0]["detail"], hook.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn delay_is_decided_after_the_delay_and_told_then() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Delay, &sink.url).await;
    app.advance_ms(1_999);
    assert_eq!(app.status(&id).await, Status::Pending);
    app.advance_ms(1);
    let payment = app.becomes(&id, Status::Completed).await;
    assert_eq!(payment.processed_at.unwrap().seconds, payment.created_at.unwrap().seconds + 2);
    assert_eq!(sink.only().await.body["version"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn timeout_holds_process_until_the_callers_deadline_and_completes_all_the_same() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Timeout, &sink.url).await;
    let process = ProcessPaymentRequest { payment_intent_id: id.clone(), ..Default::default() };
    let held =
        app.client.clone().process_payment(with_header(process, "grpc-timeout", "50m")).await;
    assert_eq!(refused(held), (Code::DeadlineExceeded, "DEADLINE".to_owned()));
    assert_eq!(app.status(&id).await, Status::Processing);
    app.advance_ms(30_000);
    app.becomes(&id, Status::Completed).await;
    assert_eq!(sink.only().await.status(), "COMPLETED");
    let retried = app.process(&id).await.unwrap().into_inner();
    assert_eq!(retried.status(), Status::Completed);
    assert!(retried.result.unwrap().success);
}

#[tokio::test(flavor = "multi_thread")]
async fn timeout_settles_though_nobody_called_process() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Timeout, &sink.url).await;
    app.advance_ms(29_999);
    assert_eq!(app.status(&id).await, Status::Pending);
    app.advance_ms(1);
    app.becomes(&id, Status::Completed).await;
    assert_eq!(sink.only().await.body["version"], 2, "PROCESSING was never entered");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_call_stays_held_over_the_settlement_and_ends_with_the_drain() {
    let (mut app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Timeout, &sink.url).await;
    let request = ProcessPaymentRequest { payment_intent_id: id.clone(), ..Default::default() };
    let mut client = app.client.clone();
    let mut held = std::pin::pin!(async move { client.process_payment(request).await });
    tokio::select! {
        answer = &mut held => panic!("answered: {answer:?}"),
        _ = app.becomes(&id, Status::Processing) => {}
    }
    app.advance_ms(30_000);
    tokio::select! {
        answer = &mut held => panic!("answered: {answer:?}"),
        _ = app.webhook_becomes(&id, "DELIVERED") => {}
    }
    let (answer, ()) = tokio::join!(held, app.stop());
    assert_eq!(refused(answer), (Code::Unavailable, "DRAINING".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn manual_waits_for_process_and_is_told_then() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.advance_ms(19_999);
    assert_eq!(app.status(&id).await, Status::Pending);
    assert_eq!(app.process(&id).await.unwrap().into_inner().status(), Status::Completed);
    assert_eq!(sink.only().await.status(), "COMPLETED");
    app.webhook_becomes(&id, "DELIVERED").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn manual_expires_by_itself() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    let ends = app.payment(&id).await.expires_at.unwrap();
    assert_eq!(ends.seconds, app.now_ms() / 1_000 + 20);
    app.advance_ms(20_000);
    let payment = app.becomes(&id, Status::Expired).await;
    assert!(payment.result.is_none() && payment.transaction_id.is_empty());
    assert_eq!(sink.only().await.status(), "EXPIRED");
    assert_eq!(refused(app.process(&id).await).1, "INVALID_STATE");
}

/// Reservation → what became of its payment. The same seed gives the same fates, another seed others.
async fn fates(seed: u64) -> BTreeMap<String, (i32, String)> {
    let app = TestApp::with(|config| {
        config.simulation_seed = seed;
        config.store = StoreUrl::Memory;
        config.events.sink = payment_sim::config::EventSink::None;
    })
    .await;
    let mut fates = BTreeMap::new();
    for n in 0..60 {
        let reservation = format!("reservation-{n}");
        let random = Scenario::Random.into();
        let request = CreatePaymentIntentRequest { scenario: random, ..create(&reservation) };
        let payment = app.payment(&app.create(request).await).await;
        let reason = payment.result.as_ref().unwrap().failure_reason.clone();
        fates.insert(reservation, (payment.status, reason));
    }
    fates
}

#[tokio::test(flavor = "multi_thread")]
async fn random_is_a_mix_that_its_seed_repeats() {
    let (first, again, other) = (fates(7).await, fates(7).await, fates(8).await);
    assert_eq!(first, again);
    assert_ne!(first, other);
    let completed = first.values().filter(|fate| fate.0 == Status::Completed as i32).count();
    assert!((36..=57).contains(&completed), "{completed} of 60 at a rate of 0.8");
    assert!(first.values().all(|fate| (fate.0 == Status::Failed as i32) != fate.1.is_empty()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_reservation_draws_anew() {
    let app = TestApp::quiet().await;
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..40 {
        seen.insert(app.status(&app.pay(Scenario::Random, "").await).await as i32);
    }
    assert_eq!(seen.len(), 2, "both outcomes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payment_that_names_no_scenario_gets_the_configured_one() {
    let app = TestApp::with(|config| {
        config.default_scenario = payment_sim::config::Scenario::Manual;
    })
    .await;
    let id = app.create(create("reservation-1")).await;
    assert_eq!(app.payment(&id).await.scenario(), Scenario::Manual);
    app.process(&id).await.unwrap();
    app.events(1).await;
}
