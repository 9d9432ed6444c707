//! SimulateWebhook: one webhook on order, beside the payment's own.

use tonic::{Code, Response, Status as GrpcStatus};

use crate::support::{
    Answer, PaymentScenario as Scenario, PaymentStatus as Status, Refused, SimulateWebhookRequest,
    SimulateWebhookResponse, TestApp, WebhookSink, refused,
};

fn order(id: &str) -> SimulateWebhookRequest {
    SimulateWebhookRequest { payment_intent_id: id.to_owned(), ..Default::default() }
}

async fn simulate(
    app: &TestApp,
    request: SimulateWebhookRequest,
) -> Result<Response<SimulateWebhookResponse>, GrpcStatus> {
    app.client.clone().simulate_webhook(request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn it_sends_now_and_changes_nothing() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    let target = SimulateWebhookRequest { target_status: Status::Failed.into(), ..order(&id) };
    let reply = simulate(&app, target).await.unwrap().into_inner();
    assert!(reply.webhook_sent);
    let hook = sink.only().await;
    assert_eq!((hook.id(), hook.status()), (reply.webhook_id.as_str(), "FAILED"));
    assert_eq!(hook.body["event_type"], "payment.status_updated");
    assert_eq!(hook.body["timestamp"], reply.scheduled_at.unwrap().seconds);
    let payment = app.payment(&id).await;
    assert_eq!((payment.status(), payment.version), (Status::Pending, 1));
    assert!(payment.timeline.iter().any(|e| e.cause.to_lowercase().contains("simulate")));
    app.process(&id).await.unwrap();
    assert_eq!(app.events(1).await.len(), 1, "no event but the payment's own");
    assert_ne!(sink.first(2).await[1].id(), reply.webhook_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_sends_the_current_status_when_none_is_named() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Approve, &sink.url).await;
    simulate(&app, order(&id)).await.unwrap();
    assert_eq!(sink.only().await.status(), "COMPLETED");
    app.advance_ms(2_000);
    sink.first(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delayed_one_is_fixed_at_the_call_and_sent_at_its_time() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    let ordered_s = app.now_ms() / 1_000;
    let later = SimulateWebhookRequest { delay_seconds: 10, ..order(&id) };
    let reply = simulate(&app, later).await.unwrap().into_inner();
    assert_eq!(reply.scheduled_at.unwrap().seconds, ordered_s + 10);
    app.process(&id).await.unwrap();
    assert_eq!(sink.only().await.status(), "COMPLETED");
    app.advance_ms(9_999);
    assert_eq!(app.deliveries(&id, "webhook").await[0].state, "OWED");
    app.advance_ms(1);
    let hook = sink.first(2).await.remove(1);
    assert_eq!((hook.id(), hook.status()), (reply.webhook_id.as_str(), "PENDING"));
    assert_eq!(hook.body["timestamp"], ordered_s + 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn force_trigger_sends_now_whatever_the_delay() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    let forced = SimulateWebhookRequest { delay_seconds: 600, force_trigger: true, ..order(&id) };
    simulate(&app, forced).await.unwrap();
    sink.only().await;
    app.process(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_retried_like_any_other_and_holds_up_none() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    sink.answers([Answer::Status(500)]);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    let reply = simulate(&app, order(&id)).await.unwrap().into_inner();
    app.webhook_attempted(&id, 1).await;
    app.process(&id).await.unwrap();
    let own = sink.first(2).await.remove(1);
    assert_ne!(own.id(), reply.webhook_id);
    app.advance_ms(1_000);
    assert_eq!(sink.first(3).await[2].id(), reply.webhook_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_url_there_is_nowhere_to_send_it() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Approve, "").await;
    let error = refused(simulate(&app, order(&id)).await);
    assert_eq!(error, (Code::FailedPrecondition, "NO_WEBHOOK_URL".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payment_owes_at_most_a_hundred() {
    let (mut app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    let later = || SimulateWebhookRequest { delay_seconds: 86_400, ..order(&id) };
    for _ in 0..100 {
        simulate(&app, later()).await.unwrap();
    }
    let error = refused(simulate(&app, later()).await);
    assert_eq!(error, (Code::FailedPrecondition, "INVALID_STATE".to_owned()));
    app.leave_undelivered();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delay_has_bounds() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Approve, "").await;
    for delay_seconds in [-1, 86_401, i32::MAX, i32::MIN] {
        let bad = SimulateWebhookRequest { delay_seconds, ..order(&id) };
        let error = Refused::of(&simulate(&app, bad).await.unwrap_err());
        assert_eq!(error.fields, ["delay_seconds"], "{delay_seconds}");
    }
    let bad = SimulateWebhookRequest { target_status: 99, ..order(&id) };
    assert_eq!(Refused::of(&simulate(&app, bad).await.unwrap_err()).fields, ["target_status"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_later_it_still_comes() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Approve, &sink.url).await;
    app.advance_ms(2_000);
    sink.only().await;
    app.webhook_becomes(&id, "DELIVERED").await;
    let later = SimulateWebhookRequest { delay_seconds: 86_400, ..order(&id) };
    let reply = simulate(&app, later).await.unwrap().into_inner();
    app.advance_ms(86_400_000);
    assert_eq!(sink.first(2).await[1].id(), reply.webhook_id);
}
