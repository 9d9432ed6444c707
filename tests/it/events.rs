//! Events as they appear in the log, which is what `EVENT_SINK=log` publishes to.

use crate::support::{PaymentScenario as Scenario, TestApp, WebhookSink};

#[tokio::test(flavor = "multi_thread")]
async fn an_event_carries_the_webhooks_body_in_eventbridges_envelope() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Approve, &sink.url).await;
    app.advance_ms(2_000);
    let (event, hook) = (app.events(1).await.remove(0), sink.only().await);
    assert_eq!(event["detail"], hook.body);
    assert_eq!(event["id"], hook.id());
    assert_eq!(event["source"], "payment-sim-api");
    assert_eq!(event["detail-type"], "Payment Status Updated");
    assert_eq!(app.deliveries(&id, "event").await.len(), 1);
    let line = String::from_utf8(app.events.bytes()).unwrap();
    assert!(line.contains(std::str::from_utf8(&hook.raw).unwrap()), "the same bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_needs_no_webhook_url() {
    let app = TestApp::start().await;
    let id = app.pay(Scenario::Fail, "").await;
    app.advance_ms(2_000);
    assert_eq!(app.events(1).await[0]["detail"]["payment_intent_id"], id.as_str());
    assert!(app.deliveries(&id, "webhook").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_sink_the_webhook_still_comes() {
    let (app, sink) = (TestApp::quiet().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Approve, &sink.url).await;
    app.advance_ms(2_000);
    sink.only().await;
    assert!(app.deliveries(&id, "event").await.is_empty() && app.events.bytes().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn event_and_webhook_do_not_wait_for_each_other() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    app.events.breaks(true);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&id).await.unwrap();
    sink.only().await;
    app.webhook_becomes(&id, "DELIVERED").await;
    app.events.breaks(false);
    app.advance_ms(60_000);
    app.events(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_could_not_be_written_is_owed_and_written_later() {
    let app = TestApp::start().await;
    app.events.breaks(true);
    let id = app.pay(Scenario::Manual, "").await;
    app.process(&id).await.unwrap();
    crate::support::eventually("an attempt fails", || async {
        let owed = app.deliveries(&id, "event").await.remove(0);
        (owed.attempts_made == 1).then_some(()).filter(|()| owed.state == "OWED")
    })
    .await;
    app.events.breaks(false);
    app.advance_ms(60_000);
    assert_eq!(app.events(1).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_events_of_a_payment_come_in_order() {
    let app = TestApp::start().await;
    let mut expected = Vec::new();
    for _ in 0..20 {
        let id = app.pay(Scenario::Manual, "").await;
        app.process(&id).await.unwrap();
        let refund = crate::support::CancelPaymentRequest {
            payment_intent_id: id.clone(),
            ..Default::default()
        };
        app.client.clone().cancel_payment(refund).await.unwrap();
        expected.push(id);
    }
    let events = app.events(40).await;
    for id in expected {
        let own = events.iter().filter(|event| event["detail"]["payment_intent_id"] == id.as_str());
        let versions: Vec<_> = own.map(|event| event["detail"]["version"].clone()).collect();
        assert_eq!(versions, [2, 3], "{id}");
    }
}
