//! ProcessPayment and CancelPayment on every status, look-ups, and refusals.

use prost_types::{Struct, Value, value::Kind};
use tonic::Code;

use crate::support::{
    CancelPaymentRequest, CancelPaymentResponse, GetPaymentIntentRequest, GetPaymentStatusRequest,
    Money, PaymentScenario as Scenario, PaymentStatus as Status, Refused, TestApp, WebhookSink,
    create, krw, refused,
};
use tonic::{Response, Status as GrpcStatus};

fn refused_as(code: Code, reason: &str) -> (Code, String) {
    (code, reason.to_owned())
}

fn cancel_of(id: &str, amount: Option<Money>) -> CancelPaymentRequest {
    let id = id.to_owned();
    CancelPaymentRequest {
        payment_intent_id: id,
        reason: "changed my mind".to_owned(),
        refund_amount: amount,
        ..Default::default()
    }
}

async fn cancel(
    app: &TestApp,
    id: &str,
    amount: Option<Money>,
) -> Result<Response<CancelPaymentResponse>, GrpcStatus> {
    app.client.clone().cancel_payment(cancel_of(id, amount)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn process_decides_what_is_delayed_now_and_it_stays_so() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Delay, &sink.url).await;
    app.advance_ms(500);
    let first = app.process(&id).await.unwrap().into_inner();
    assert_eq!(first.status(), Status::Completed);
    sink.only().await;
    app.webhook_becomes(&id, "DELIVERED").await;
    app.advance_ms(60_000);
    assert_eq!(app.process(&id).await.unwrap().into_inner(), first, "idempotent once decided");
    assert_eq!(app.payment(&id).await.version, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn process_answers_a_decline_without_an_error() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Fail, "").await;
    let reply = app.process(&id).await.unwrap().into_inner();
    assert_eq!(reply.status(), Status::Failed);
    assert!(!reply.result.unwrap().success);
    assert!(reply.transaction_id.starts_with("txn_"));
}

#[tokio::test(flavor = "multi_thread")]
async fn process_answers_a_refunded_payment_with_its_first_result() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Approve, "").await;
    cancel(&app, &id, None).await.unwrap();
    let reply = app.process(&id).await.unwrap().into_inner();
    assert_eq!(reply.status(), Status::Refunded);
    assert!(reply.result.unwrap().success);
}

#[tokio::test(flavor = "multi_thread")]
async fn process_refuses_what_was_cancelled_or_expired() {
    let app = TestApp::quiet().await;
    let cancelled = app.pay(Scenario::Manual, "").await;
    cancel(&app, &cancelled, None).await.unwrap();
    let expired = app.pay(Scenario::Manual, "").await;
    app.advance_ms(20_000);
    for id in [cancelled, expired] {
        let error = app.process(&id).await;
        assert_eq!(refused(error), refused_as(Code::FailedPrecondition, "INVALID_STATE"), "{id}");
    }
}

/// The command finds EXPIRED whether the timer has run or not.
#[tokio::test(flavor = "multi_thread")]
async fn process_at_the_very_moment_of_expiry_is_too_late() {
    let app = TestApp::quiet().await;
    for _ in 0..20 {
        let id = app.pay(Scenario::Manual, "").await;
        app.advance_ms(20_000);
        assert_eq!(refused(app.process(&id).await).1, "INVALID_STATE");
        assert_eq!(app.status(&id).await, Status::Expired);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_before_the_outcome_cancels_and_is_told_at_once() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Delay, &sink.url).await;
    let reply = cancel(&app, &id, None).await.unwrap().into_inner();
    assert_eq!(reply.status(), Status::Cancelled);
    assert!(reply.refund_id.is_empty() && reply.refunded_amount.is_none());
    assert_eq!(sink.only().await.status(), "CANCELLED");
    app.advance_ms(60_000);
    assert_eq!(app.status(&id).await, Status::Cancelled, "never decided after that");
    app.webhook_becomes(&id, "DELIVERED").await;
    assert_eq!(sink.received().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_before_the_outcome_is_refused() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Manual, "").await;
    let error = refused(cancel(&app, &id, Some(krw(1))).await);
    assert_eq!(error, refused_as(Code::FailedPrecondition, "INVALID_STATE"));
    assert_eq!(app.status(&id).await, Status::Pending);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_before_the_notification_is_told_right_after_completed() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Approve, &sink.url).await;
    cancel(&app, &id, None).await.unwrap();
    let states: Vec<_> =
        app.deliveries(&id, "webhook").await.into_iter().map(|d| d.state).collect();
    assert_eq!(states, ["OWED", "HELD"]);
    app.advance_ms(2_000);
    let hooks = sink.first(2).await;
    assert_eq!(sink.statuses(), ["COMPLETED", "REFUNDED"]);
    assert_eq!((&hooks[0].body["version"], &hooks[1].body["version"]), (&2.into(), &3.into()));
    let events = app.events(2).await;
    assert_eq!(events[0]["detail"]["status"], "PAYMENT_STATUS_COMPLETED");
    assert_eq!(events[1]["detail"]["status"], "PAYMENT_STATUS_REFUNDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn partial_refunds_add_up_and_the_last_one_refunds() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Approve, &sink.url).await;
    app.advance_ms(2_000);
    let part = cancel(&app, &id, Some(krw(30_000))).await.unwrap().into_inner();
    assert_eq!((part.status(), part.refunded_amount), (Status::Completed, Some(krw(30_000))));
    let rest = cancel(&app, &id, None).await.unwrap().into_inner();
    assert_eq!((rest.status(), rest.refunded_amount), (Status::Refunded, Some(krw(70_000))));
    assert_ne!(part.refund_id, rest.refund_id);
    let hooks = sink.first(3).await;
    let told = |n: usize, key: &str| hooks[n].body[key].clone();
    assert_eq!(told(1, "event_type"), "payment.refund_updated");
    assert_eq!(
        (told(1, "refund_amount"), told(1, "refunded_amount")),
        (30_000.into(), 30_000.into())
    );
    assert_eq!(told(1, "refund_id"), part.refund_id.as_str());
    assert_eq!(told(2, "event_type"), "payment.status_updated");
    assert_eq!(
        (told(2, "refund_amount"), told(2, "refunded_amount")),
        (70_000.into(), 100_000.into())
    );
    let details: Vec<_> = app.events(3).await.iter().map(|e| e["detail-type"].clone()).collect();
    assert_eq!(
        details,
        ["Payment Status Updated", "Payment Refund Updated", "Payment Status Updated"]
    );
    let payment = app.payment(&id).await;
    assert_eq!((payment.refunds.len(), payment.refunded_amount), (2, Some(krw(100_000))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_beyond_what_is_left_is_refused_and_changes_nothing() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Approve, "").await;
    cancel(&app, &id, Some(krw(60_000))).await.unwrap();
    let error = refused(cancel(&app, &id, Some(krw(40_001))).await);
    assert_eq!(error, refused_as(Code::FailedPrecondition, "REFUND_EXCEEDS_REMAINING"));
    assert_eq!(app.payment(&id).await.refunded_amount, Some(krw(60_000)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_of_nothing_of_less_or_in_another_currency_names_its_field() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Approve, "").await;
    let usd = Money { amount: 1, currency: "USD".to_owned() };
    for (amount, field) in [
        (krw(0), "refund_amount.amount"),
        (krw(-5), "refund_amount.amount"),
        (usd, "refund_amount.currency"),
    ] {
        let error = Refused::of(&cancel(&app, &id, Some(amount.clone())).await.unwrap_err());
        assert_eq!(error.code, Code::InvalidArgument, "{amount:?}");
        assert_eq!(
            (error.reason.as_str(), error.fields),
            ("VALIDATION_FAILED", vec![field.to_owned()])
        );
    }
    assert_eq!(app.payment(&id).await.version, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_refuses_every_other_end() {
    let app = TestApp::quiet().await;
    let (failed, expired) =
        (app.pay(Scenario::Fail, "").await, app.pay(Scenario::Manual, "").await);
    let (refunded, cancelled) =
        (app.pay(Scenario::Approve, "").await, app.pay(Scenario::Manual, "").await);
    cancel(&app, &refunded, None).await.unwrap();
    cancel(&app, &cancelled, None).await.unwrap();
    app.advance_ms(20_000);
    for id in [failed, expired, refunded, cancelled] {
        let error = refused(cancel(&app, &id, None).await);
        assert_eq!(error, refused_as(Code::FailedPrecondition, "INVALID_STATE"), "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_refuses_what_is_in_process() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Timeout, "").await;
    let mut client = app.client.clone();
    let process = crate::support::ProcessPaymentRequest {
        payment_intent_id: id.clone(),
        ..Default::default()
    };
    tokio::select! {
        answer = client.process_payment(process) => panic!("answered: {answer:?}"),
        _ = app.becomes(&id, Status::Processing) => {}
    }
    assert_eq!(refused(cancel(&app, &id, None).await).1, "INVALID_STATE");
    app.advance_ms(30_000);
    app.becomes(&id, Status::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hundred_and_first_refund_is_refused() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Approve, "").await;
    for _ in 0..100 {
        cancel(&app, &id, Some(krw(1))).await.unwrap();
    }
    assert_eq!(refused(cancel(&app, &id, Some(krw(1))).await).1, "INVALID_STATE");
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ids_name_the_payment_in_every_call() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Approve, "").await;
    let other = id.replace("pi_", "pay_");
    assert_eq!(app.payment(&id).await, app.payment(&other).await);
    app.process(&other).await.unwrap();
    cancel(&app, &other, None).await.unwrap();
    let request = GetPaymentStatusRequest { payment_intent_id: other, ..Default::default() };
    let status = app.client.clone().get_payment_status(request).await.unwrap().into_inner();
    assert_eq!(status.payment.unwrap(), app.payment(&id).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_users_payment_is_not_shown() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Approve, "").await;
    let (mut client, user_id) = (app.client.clone(), "user-2".to_owned());
    let intent =
        GetPaymentIntentRequest { payment_intent_id: id.clone(), user_id: user_id.clone() };
    let error = refused(client.get_payment_intent(intent).await);
    assert_eq!(error, refused_as(Code::PermissionDenied, "NOT_YOURS"));
    let status = GetPaymentStatusRequest { payment_intent_id: id.clone(), user_id };
    assert_eq!(refused(client.get_payment_status(status).await).1, "NOT_YOURS");
    let mine = GetPaymentIntentRequest { payment_intent_id: id, user_id: "user-1".to_owned() };
    client.get_payment_intent(mine).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_names_every_bad_field_at_once() {
    let app = TestApp::quiet().await;
    let mut bad = create("");
    bad.amount = Some(Money { amount: 0, currency: "XXXX".to_owned() });
    bad.webhook_url = "ftp://example.com".to_owned();
    bad.scenario = 77;
    let error = Refused::of(&app.client.clone().create_payment_intent(bad).await.unwrap_err());
    assert_eq!((error.code, error.reason.as_str()), (Code::InvalidArgument, "VALIDATION_FAILED"));
    let fields = ["reservation_id", "amount.amount", "amount.currency", "scenario", "webhook_url"];
    for field in fields {
        assert!(error.fields.iter().any(|f| f == field), "{field} in {:?}", error.fields);
    }
    assert_eq!(error.fields.len(), fields.len(), "{:?}", error.fields);
}

#[tokio::test(flavor = "multi_thread")]
async fn echo_and_metadata_come_back_in_payment_and_webhook() {
    let (app, sink) = (TestApp::start().await, WebhookSink::start().await);
    let number = Value { kind: Some(Kind::NumberValue(42.0)) };
    let text = Value { kind: Some(Kind::StringValue("b".to_owned())) };
    let echo = Struct { fields: [("z".to_owned(), number), ("a".to_owned(), text)].into() };
    let mut request = create("reservation-1");
    request.webhook_url = sink.url.clone();
    request.echo = Some(echo.clone());
    request.metadata = Some(crate::support::PaymentMetadata {
        source: "web".to_owned(),
        tags: [("seat".to_owned(), "A1".to_owned())].into(),
        ..Default::default()
    });
    let id = app.create(request).await;
    app.advance_ms(2_000);
    let hook = sink.only().await;
    assert!(String::from_utf8_lossy(&hook.raw).contains(r#""echo":{"a":"b","z":42}"#));
    assert_eq!(hook.body["metadata"]["tags"]["seat"], "A1");
    assert_eq!(app.payment(&id).await.echo, Some(echo));
}
