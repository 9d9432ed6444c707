//! Webhooks as a receiver sees them.

use std::time::Duration;

use crate::support::{
    Answer, CreatePaymentIntentRequest, PaymentScenario as Scenario, TestApp, WebhookSink, create,
};

#[tokio::test(flavor = "multi_thread")]
async fn it_is_signed_both_ways_and_a_changed_byte_is_not_genuine() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&id).await.unwrap();
    let hook = sink.only().await;
    assert!(hook.is_genuine("payment-sim-dev-secret"));
    assert!(!hook.is_genuine("another secret, long enough"));
    for at in [0, hook.raw.len() / 2, hook.raw.len() - 1] {
        let mut forged = hook.clone();
        let mut raw = forged.raw.to_vec();
        raw[at] ^= 1;
        forged.raw = raw.into();
        assert!(!forged.is_genuine("payment-sim-dev-secret"), "byte {at}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_what_the_contract_says() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Approve, &sink.url).await;
    app.advance_ms(2_000);
    let hook = sink.only().await;
    let payment = app.payment(&id).await;
    assert_eq!(hook.header("content-type"), "application/json");
    assert_eq!(hook.header("user-agent"), concat!("payment-sim/", env!("CARGO_PKG_VERSION")));
    let bare = id.strip_prefix("pi_").unwrap();
    assert_eq!(hook.id(), format!("evt_{bare}_1"));
    let expected = serde_json::json!({
        "event_id": hook.id(), "event_type": "payment.status_updated", "version": 2,
        "payment_id": payment.payment_id, "payment_intent_id": id,
        "reservation_id": "reservation-1", "user_id": "user-1",
        "status": "PAYMENT_STATUS_COMPLETED", "amount": 100_000, "currency": "KRW",
        "timestamp": payment.created_at.unwrap().seconds,
        "transaction_id": payment.transaction_id, "approval_no": payment.approval_no,
        "failure_reason": null, "provider": "sim",
        "refund_id": null, "refund_amount": null, "refunded_amount": null,
        "echo": null, "metadata": null,
    });
    assert_eq!(hook.body, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_carries_the_same_id_and_body_signed_afresh() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    sink.answers([Answer::Status(500), Answer::Status(503)]);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&id).await.unwrap();
    let owed = app.webhook_attempted(&id, 1).await;
    assert_eq!((owed.state.as_str(), owed.attempts[0].http_status), ("OWED", 500));
    app.advance_ms(1_000);
    app.webhook_attempted(&id, 2).await;
    app.advance_ms(2_000);
    let hooks = sink.first(3).await;
    app.webhook_becomes(&id, "DELIVERED").await;
    assert!(hooks.iter().all(|hook| hook.id() == hooks[0].id() && hook.raw == hooks[0].raw));
    let fresh = |header: &str| {
        let values: Vec<_> = hooks.iter().map(|hook| hook.header(header).to_owned()).collect();
        values[0] != values[1] && values[1] != values[2]
    };
    assert!(fresh("webhook-timestamp") && fresh("webhook-signature"));
    assert!(!fresh("x-webhook-signature"), "signs the body alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_sets_the_least_wait() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    sink.answers([Answer::With(503, "retry-after", "60".to_owned())]);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&id).await.unwrap();
    let asked_s = app.now_ms() / 1_000;
    let due = app.webhook_attempted(&id, 1).await.due_at.unwrap();
    // The wait counts from the reply, which took a moment of the machine's time.
    assert!((60..80).contains(&(due.seconds - asked_s)), "{}", due.seconds - asked_s);
    app.advance_ms(59_000);
    assert_eq!(app.webhook_attempted(&id, 1).await.state, "OWED");
    app.advance_ms(21_000);
    app.webhook_becomes(&id, "DELIVERED").await;
    sink.first(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gone_ends_this_delivery_and_no_other() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    sink.answers([Answer::Status(410)]);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&id).await.unwrap();
    let dead = app.webhook_becomes(&id, "DEAD").await;
    assert_eq!((dead.attempts_made, dead.attempts[0].http_status), (1, 410));
    let refund = crate::support::CancelPaymentRequest {
        payment_intent_id: id.clone(),
        ..Default::default()
    };
    app.client.clone().cancel_payment(refund).await.unwrap();
    sink.first(2).await;
    assert_eq!(sink.statuses(), ["COMPLETED", "REFUNDED"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_not_followed() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let elsewhere = WebhookSink::start().await;
    sink.answers([Answer::With(302, "location", elsewhere.url.clone())]);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&id).await.unwrap();
    let owed = app.webhook_attempted(&id, 1).await;
    assert_eq!((owed.state.as_str(), owed.attempts[0].http_status), ("OWED", 302));
    app.advance_ms(1_000);
    app.webhook_becomes(&id, "DELIVERED").await;
    assert!(elsewhere.received().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_attempt_leaves_it_dead_and_listed() {
    let (app, sink) =
        (TestApp::with(|c| c.webhook.max_attempts = 3).await, WebhookSink::start().await);
    sink.answers(std::iter::repeat_n(Answer::Status(500), 3));
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&id).await.unwrap();
    for attempt in 1..3 {
        app.webhook_attempted(&id, attempt).await;
        app.advance_ms(1_000 << (attempt - 1));
    }
    let dead = app.webhook_becomes(&id, "DEAD").await;
    assert_eq!((dead.attempts_made, dead.attempts.len()), (3, 3));
    assert!(dead.attempts.iter().all(|attempt| attempt.http_status == 500));
    assert_eq!(dead.url, sink.url);
    app.advance_ms(3_600_000);
    assert_eq!(sink.received().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_never_answers_is_given_its_time_and_no_more() {
    let (app, sink) = (
        TestApp::with(|c| c.webhook.timeout = Duration::from_millis(50)).await,
        WebhookSink::start().await,
    );
    sink.answers([Answer::Hang]);
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&id).await.unwrap();
    let owed = app.webhook_attempted(&id, 1).await;
    assert_eq!(owed.attempts[0].error, "TIMEOUT");
    app.advance_ms(1_000);
    app.webhook_becomes(&id, "DELIVERED").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_not_there_is_tried_again() {
    let app = TestApp::start().await;
    let sink = WebhookSink::start().await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let id = app.pay(Scenario::Manual, &format!("http://{nobody}/hook")).await;
    app.process(&id).await.unwrap();
    let owed = app.webhook_attempted(&id, 1).await;
    assert_eq!((owed.state.as_str(), owed.attempts[0].error.as_str()), ("OWED", "CONNECT_REFUSED"));
    let mut app = app;
    app.leave_undelivered();
    drop(sink);
}

/// With two places an origin and one receiver that hangs, the other is served without the clock moving.
#[tokio::test(flavor = "multi_thread")]
async fn a_hung_receiver_holds_up_no_other() {
    let app = TestApp::with(|config| config.webhook.origin_concurrency = 2).await;
    let (hung, good) = (WebhookSink::start().await, WebhookSink::start().await);
    hung.answers(std::iter::repeat_n(Answer::Hang, 5));
    for _ in 0..5 {
        app.process(&app.pay(Scenario::Manual, &hung.url).await).await.unwrap();
    }
    hung.first(2).await;
    for _ in 0..5 {
        app.process(&app.pay(Scenario::Manual, &good.url).await).await.unwrap();
    }
    good.first(5).await;
    assert_eq!(hung.received().len(), 2, "as many as its origin has places");
    hung.let_go();
    hung.first(5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_is_down_is_probed_and_what_goes_there_counts_as_failed() {
    let app = TestApp::with(|config| config.webhook.max_attempts = 20).await;
    let sink = WebhookSink::start().await;
    sink.answers(std::iter::repeat_n(Answer::Status(500), 10).chain([Answer::Hang]));
    let first = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&first).await.unwrap();
    for attempt in 1..=10 {
        app.webhook_attempted(&first, attempt).await;
        app.advance_ms(3_600_000);
    }
    sink.first(11).await;
    let second = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&second).await.unwrap();
    let withheld = app.webhook_attempted(&second, 1).await;
    assert_eq!(
        (withheld.state.as_str(), withheld.attempts[0].error.as_str()),
        ("OWED", "ORIGIN_DOWN")
    );
    assert_eq!(sink.received().len(), 11, "the probe is under way");
    assert_eq!(app.metric(r#"webhook_deliveries_total{result="withheld"}"#).await, 1.0);
    sink.let_go();
    app.webhook_becomes(&first, "DELIVERED").await;
    app.advance_ms(1_000);
    app.webhook_becomes(&second, "DELIVERED").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_limit_is_kept_for_each_origin() {
    let app = TestApp::with(|config| config.webhook.max_rps = Some(10)).await;
    let (limited, other) = (WebhookSink::start().await, WebhookSink::start().await);
    for _ in 0..3 {
        app.process(&app.pay(Scenario::Manual, &limited.url).await).await.unwrap();
    }
    for n in 1..=3 {
        limited.first(n).await;
        app.process(&app.pay(Scenario::Manual, &other.url).await).await.unwrap();
        other.first(n).await;
        assert_eq!(limited.received().len(), n, "one each tenth of a second");
        app.advance_ms(100);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_secrets_sign_side_by_side() {
    let app = TestApp::with(|config| {
        config.webhook.secrets =
            payment_sim::config::Secrets::parse("payment-sim-dev-secret, older").unwrap();
    })
    .await;
    let sink = WebhookSink::start().await;
    let id = app.pay(Scenario::Manual, &sink.url).await;
    app.process(&id).await.unwrap();
    let hook = sink.only().await;
    assert_eq!(hook.header("webhook-signature").split(' ').count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_payment_tells_its_own_url() {
    let app = TestApp::start().await;
    let (first, second) = (WebhookSink::start().await, WebhookSink::start().await);
    for (n, sink) in [(1, &first), (2, &second), (3, &first)] {
        let webhook_url = sink.url.clone();
        app.create(CreatePaymentIntentRequest { webhook_url, ..create(&format!("r-{n}")) }).await;
    }
    app.advance_ms(2_000);
    let told = |hook: &crate::support::Received| hook.body["reservation_id"].clone();
    assert_eq!(first.first(2).await.iter().map(told).collect::<Vec<_>>().len(), 2);
    assert_eq!(told(&second.only().await), "r-2");
}
