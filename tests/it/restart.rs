//! What was acknowledged is kept: over a restart, and when nobody waits for the answer.

use std::pin::pin;

use prost_types::Timestamp;

use crate::support::{
    Answer, CreatePaymentIntentRequest, ListPaymentsRequest, PaymentScenario as Scenario,
    PaymentStatus as Status, SimulateWebhookRequest, TestApp, WebhookSink, create, eventually,
};

#[tokio::test(flavor = "multi_thread")]
async fn what_came_due_meanwhile_happens_after_it_at_its_own_time() {
    let (folder, sink) = (tempfile::tempdir().unwrap(), WebhookSink::start().await);
    let app = TestApp::stored_in(folder.path()).await;
    let created_s = app.now_ms() / 1_000;
    let mut ids = Vec::new();
    for scenario in [Scenario::Approve, Scenario::Delay, Scenario::Timeout, Scenario::Manual] {
        ids.push(app.pay(scenario, &sink.url).await);
    }
    let app = app.restart(120_000).await;
    sink.first(4).await;
    let ends = [
        (Status::Completed, 0),
        (Status::Completed, 2),
        (Status::Completed, 30),
        (Status::Expired, 20),
    ];
    for (id, (status, after_s)) in ids.iter().zip(ends) {
        let payment = app.becomes(id, status).await;
        let at = Timestamp { seconds: created_s + after_s, nanos: 0 };
        assert_eq!(payment.updated_at, Some(at), "{status:?}");
        app.webhook_becomes(id, "DELIVERED").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_later_waits_on() {
    let (folder, sink) = (tempfile::tempdir().unwrap(), WebhookSink::start().await);
    let app = TestApp::stored_in(folder.path()).await;
    let id = app.pay(Scenario::Timeout, &sink.url).await;
    let order = SimulateWebhookRequest {
        payment_intent_id: id.clone(),
        delay_seconds: 86_400,
        ..Default::default()
    };
    let ordered = app.client.clone().simulate_webhook(order).await.unwrap().into_inner();
    let app = app.restart(10_000).await;
    assert_eq!(app.status(&id).await, Status::Pending);
    app.advance_ms(20_000);
    assert_eq!(sink.only().await.status(), "COMPLETED");
    app.webhook_attempted(&id, 1).await;
    let app = app.restart(40_000_000).await;
    app.advance_ms(46_400_000);
    assert_eq!(sink.first(2).await[1].id(), ordered.webhook_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_goes_on_where_it_was() {
    let (folder, sink) = (tempfile::tempdir().unwrap(), WebhookSink::start().await);
    let app = TestApp::stored_in(folder.path()).await;
    sink.answers([Answer::Status(500)]);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&id).await.unwrap();
    let before = app.webhook_attempted(&id, 1).await;
    let app = app.restart(0).await;
    assert_eq!(app.deliveries(&id, "webhook").await, [before]);
    app.advance_ms(1_000);
    let hooks = sink.first(2).await;
    assert_eq!((hooks[0].id(), &hooks[0].raw), (hooks[1].id(), &hooks[1].raw));
    assert_eq!(app.webhook_becomes(&id, "DELIVERED").await.attempts_made, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn payments_are_listed_and_shown_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let app = TestApp::stored_in(folder.path()).await;
    for scenario in [Scenario::Approve, Scenario::Fail, Scenario::Random] {
        app.pay(scenario, "").await;
    }
    app.advance_ms(2_000);
    app.events(3).await;
    let all = || async {
        let user_id = "user-1".to_owned();
        let request = ListPaymentsRequest { user_id, ..Default::default() };
        app.client.clone().list_payments(request).await.unwrap().into_inner()
    };
    let before = all().await;
    assert_eq!(before.payments.len(), 3);
    let app = app.restart(0).await;
    let request = ListPaymentsRequest { user_id: "user-1".to_owned(), ..Default::default() };
    let after = app.client.clone().list_payments(request).await.unwrap().into_inner();
    assert_eq!(after, before);
}

/// The reservation's counter is stored: the same fates with a restart in the middle and without.
#[tokio::test(flavor = "multi_thread")]
async fn draws_go_on_where_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let one = TestApp::stored_in(folder.path()).await;
    let other = TestApp::quiet().await;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        with.push(one.status(&one.pay(Scenario::Random, "").await).await);
    }
    let one = one.restart(60_000).await;
    for _ in 0..10 {
        with.push(one.status(&one.pay(Scenario::Random, "").await).await);
    }
    for _ in 0..20 {
        without.push(other.status(&other.pay(Scenario::Random, "").await).await);
    }
    assert_eq!(with, without);
    one.advance_ms(2_000);
    one.events(20).await;
}

/// The server has the request and is at it (a call behind it on the same connection was answered)
/// when its caller goes away.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_runs_to_its_end_though_the_caller_hangs_up() {
    let folder = tempfile::tempdir().unwrap();
    let mut app = TestApp::stored_in(folder.path()).await;
    let warm = app.pay(Scenario::Approve, "").await;
    let mut hung_up = 0;
    for n in 0..200 {
        let user_id = format!("user-gone-{n}");
        let request = CreatePaymentIntentRequest { user_id: user_id.clone(), ..create("r") };
        let mut client = app.client.clone();
        {
            let mut call = pin!(client.create_payment_intent(request));
            tokio::select! {
                biased;
                // On a busy machine the answer may overtake us: such a round shows nothing.
                answer = &mut call => { answer.unwrap(); }
                () = std::future::ready(()) => hung_up += 1,
            }
            app.status(&warm).await;
        }
        eventually("the payment exists", || async {
            let request = ListPaymentsRequest { user_id: user_id.clone(), ..Default::default() };
            let list = app.client.clone().list_payments(request).await.unwrap().into_inner();
            (list.payments.len() == 1).then_some(())
        })
        .await;
        if hung_up == 20 {
            break;
        }
    }
    assert_eq!(hung_up, 20);
    app.leave_undelivered();
}
