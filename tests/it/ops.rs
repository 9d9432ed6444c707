//! The ops port: health that is honest, metrics that move.

use crate::support::{
    Answer, CreatePaymentIntentRequest, GetPaymentIntentRequest, PaymentScenario as Scenario,
    TestApp, WebhookSink, create, eventually, http_get,
};

#[tokio::test(flavor = "multi_thread")]
async fn it_is_healthy_and_ready_while_it_serves() {
    let app = TestApp::quiet().await;
    for path in ["/health", "/readyz", "/livez"] {
        assert_eq!(http_get(app.ops, path).await.unwrap().0, 200, "{path}");
    }
    let health = http_get(app.ops, "/health").await.unwrap().1;
    assert!(health.contains(r#""status":"ok""#), "{health}");
}

/// A receiver that hangs keeps the drain going for as long as the test looks at it.
#[tokio::test(flavor = "multi_thread")]
async fn it_is_neither_healthy_nor_ready_while_it_drains() {
    let (mut app, sink) = (TestApp::start().await, WebhookSink::start().await);
    sink.answers([Answer::Hang]);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&id).await.unwrap();
    sink.first(1).await;
    let (running, ops) = (app.take_running(), app.ops);
    let looked = async {
        eventually("not ready", || async {
            http_get(ops, "/readyz").await.ok().filter(|(status, _)| *status == 503)
        })
        .await;
        let (status, body) = http_get(ops, "/health").await.unwrap();
        assert!(status == 503 && body.contains("draining"), "{body}");
        assert_eq!(
            http_get(ops, "/livez").await.unwrap().0,
            200,
            "a drain is no reason to kill it"
        );
        sink.let_go();
    };
    tokio::join!(running.stop(), looked);
    assert!(http_get(ops, "/readyz").await.is_err(), "closed at the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_a_payments_life() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    sink.answers([Answer::Status(500)]);
    let keyed = CreatePaymentIntentRequest {
        idempotency_key: "k".to_owned(),
        scenario: Scenario::Delay.into(),
        webhook_url: sink.url.clone(),
        ..create("reservation-1")
    };
    let id = app.create(keyed.clone()).await;
    app.create(keyed).await;
    assert_eq!(app.metric(r#"outbox_pending{channel="webhook"}"#).await, 0.0);
    app.advance_ms(2_000);
    app.webhook_attempted(&id, 1).await;
    assert_eq!(app.metric(r#"outbox_pending{channel="webhook"}"#).await, 1.0);
    app.advance_ms(1_000);
    app.webhook_becomes(&id, "DELIVERED").await;
    app.events(1).await;
    let unknown =
        GetPaymentIntentRequest { payment_intent_id: "pi_x".into(), ..Default::default() };
    app.client.clone().get_payment_intent(unknown).await.unwrap_err();
    for (name, at_least) in [
        (r#"payment_intents_created_total{scenario="delay"}"#, 1.0),
        (r#"payment_outcomes_total{provider="sim",reason="",status="COMPLETED"}"#, 1.0),
        (r#"webhook_deliveries_total{result="retry"}"#, 1.0),
        (r#"webhook_deliveries_total{result="delivered"}"#, 1.0),
        (r#"events_published_total{result="published",sink="log"}"#, 1.0),
        ("idempotency_hits_total", 1.0),
        ("payment_decision_lag_seconds_count", 1.0),
        ("store_commit_seconds_count", 3.0),
        ("store_batch_size_sum", 4.0),
        (
            r#"grpc_server_handled_total{grpc_code="OK",grpc_method="CreatePaymentIntent",grpc_service="payment.v1.PaymentService"}"#,
            2.0,
        ),
        (
            r#"grpc_server_handled_total{grpc_code="InvalidArgument",grpc_method="GetPaymentIntent",grpc_service="payment.v1.PaymentService"}"#,
            1.0,
        ),
    ] {
        let found = app.metric(name).await;
        assert!(found >= at_least, "{name} is {found}");
    }
    assert_eq!(app.metric(r#"payment_intents_created_total{scenario="delay"}"#).await, 1.0);
}
