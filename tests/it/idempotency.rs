//! One key, one effect, one reply.

use jiff::{Timestamp, tz::TimeZone};
use prost::Message;
use tonic::{Code, Response};

use crate::support::{
    CancelPaymentRequest, CreatePaymentIntentRequest, CreatePaymentIntentResponse,
    CreditCardDetails, ListPaymentsRequest, PaymentDetails, PaymentScenario as Scenario,
    PaymentStatus as Status, ProcessPaymentRequest, Refused, TestApp, create, krw, refused,
    with_header,
};

fn keyed(key: &str, scenario: Scenario) -> CreatePaymentIntentRequest {
    CreatePaymentIntentRequest {
        idempotency_key: key.to_owned(),
        scenario: scenario.into(),
        ..create("reservation-1")
    }
}

fn replayed<T>(reply: &Response<T>) -> bool {
    reply.metadata().get("idempotent-replayed").is_some_and(|value| value == "true")
}

async fn sent(
    app: &TestApp,
    request: CreatePaymentIntentRequest,
) -> Response<CreatePaymentIntentResponse> {
    app.client.clone().create_payment_intent(request).await.unwrap()
}

async fn payments(app: &TestApp) -> usize {
    let all = app.client.clone().list_payments(ListPaymentsRequest::default()).await.unwrap();
    all.into_inner().payments.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_create_gets_the_first_reply_byte_for_byte() {
    let app = TestApp::quiet().await;
    let first = sent(&app, keyed("k", Scenario::Approve)).await;
    assert!(!replayed(&first));
    app.advance_ms(5_000);
    let again = sent(&app, keyed("k", Scenario::Approve)).await;
    assert!(replayed(&again));
    assert_eq!(again.into_inner().encode_to_vec(), first.into_inner().encode_to_vec());
    assert_eq!(payments(&app).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_process_gets_the_first_reply_whatever_happened_since() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Manual, "").await;
    let request = ProcessPaymentRequest {
        payment_intent_id: id.clone(),
        idempotency_key: "k".to_owned(),
        ..Default::default()
    };
    let first = app.client.clone().process_payment(request.clone()).await.unwrap();
    let refund = CancelPaymentRequest { payment_intent_id: id.clone(), ..Default::default() };
    app.client.clone().cancel_payment(refund).await.unwrap();
    let again = app.client.clone().process_payment(request).await.unwrap();
    assert!(!replayed(&first) && replayed(&again));
    assert_eq!(again.into_inner().encode_to_vec(), first.into_inner().encode_to_vec());
    assert_eq!(app.status(&id).await, Status::Refunded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_cancel_refunds_once() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Approve, "").await;
    let request = CancelPaymentRequest {
        payment_intent_id: id.clone(),
        refund_amount: Some(krw(10)),
        idempotency_key: "k".to_owned(),
        ..Default::default()
    };
    let first = app.client.clone().cancel_payment(request.clone()).await.unwrap();
    let again = app.client.clone().cancel_payment(request.clone()).await.unwrap();
    assert!(!replayed(&first) && replayed(&again));
    assert_eq!(again.into_inner().encode_to_vec(), first.into_inner().encode_to_vec());
    let other = CancelPaymentRequest { refund_amount: Some(krw(11)), ..request };
    assert_eq!(refused(app.client.clone().cancel_payment(other).await).1, "IDEMPOTENCY_CONFLICT");
    assert_eq!(app.payment(&id).await.refunded_amount, Some(krw(10)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_with_another_request_is_a_conflict() {
    let app = TestApp::quiet().await;
    sent(&app, keyed("k", Scenario::Approve)).await;
    let other = app.client.clone().create_payment_intent(keyed("k", Scenario::Fail)).await;
    assert_eq!(refused(other), (Code::AlreadyExists, "IDEMPOTENCY_CONFLICT".to_owned()));
    let bad = CreatePaymentIntentRequest { amount: None, ..keyed("k", Scenario::Approve) };
    let bad = app.client.clone().create_payment_intent(bad).await;
    assert_eq!(refused(bad), (Code::AlreadyExists, "IDEMPOTENCY_CONFLICT".to_owned()));
    assert_eq!(payments(&app).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_is_answered_though_its_card_has_expired_since() {
    const HOUR_MS: i64 = 3_600_000;
    let app = TestApp::quiet().await;
    let tomorrow = Timestamp::from_millisecond(app.now_ms() + 24 * HOUR_MS).unwrap();
    let last_month = tomorrow.to_zoned(TimeZone::UTC).date();
    let over = last_month.last_of_month().tomorrow().unwrap().to_zoned(TimeZone::UTC).unwrap();
    let left_ms = over.timestamp().as_millisecond() - app.now_ms();
    let card = CreditCardDetails {
        card_number: "4242424242424242".to_owned(),
        expiry_month: last_month.month().to_string(),
        expiry_year: last_month.year().to_string(),
        ..Default::default()
    };
    let details = PaymentDetails { credit_card: Some(card), ..Default::default() };
    let request = |key| CreatePaymentIntentRequest {
        payment_details: Some(details.clone()),
        ..keyed(key, Scenario::Approve)
    };
    app.advance_ms((left_ms - HOUR_MS).cast_unsigned());
    let first = sent(&app, request("k")).await;
    app.advance_ms((2 * HOUR_MS).cast_unsigned());
    let expired = app.client.clone().create_payment_intent(request("new")).await;
    assert_eq!(refused(expired), (Code::InvalidArgument, "VALIDATION_FAILED".to_owned()));
    let again = sent(&app, request("k")).await;
    assert!(replayed(&again));
    assert_eq!(again.into_inner(), first.into_inner());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_header_is_the_field() {
    let app = TestApp::quiet().await;
    let mut client = app.client.clone();
    let bare = || keyed("", Scenario::Approve);
    client.create_payment_intent(with_header(bare(), "idempotency-key", "k")).await.unwrap();
    assert!(replayed(&sent(&app, keyed("k", Scenario::Approve)).await));
    let both = with_header(keyed("k", Scenario::Approve), "idempotency-key", "k");
    assert!(replayed(&client.create_payment_intent(both).await.unwrap()));
    let two = with_header(keyed("k", Scenario::Approve), "idempotency-key", "other");
    let error = Refused::of(&client.create_payment_intent(two).await.unwrap_err());
    assert_eq!(
        (error.reason.as_str(), error.fields),
        ("VALIDATION_FAILED", vec!["idempotency_key".to_owned()])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_has_keys_of_its_own() {
    let app = TestApp::quiet().await;
    sent(&app, keyed("k", Scenario::Approve)).await;
    let other = with_header(keyed("k", Scenario::Approve), "x-simulation-session", "s");
    let other = app.client.clone().create_payment_intent(other).await.unwrap();
    assert!(!replayed(&other));
    assert_eq!(payments(&app).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_at_the_same_time_makes_one_payment() {
    let app = TestApp::quiet().await;
    let calls = (0..24).map(|_| {
        let mut client = app.client.clone();
        async move { client.create_payment_intent(keyed("k", Scenario::Random)).await.unwrap() }
    });
    let mut running = tokio::task::JoinSet::new();
    calls.for_each(|call| drop(running.spawn(call)));
    let replies = running.join_all().await;
    assert_eq!(replies.iter().filter(|reply| !replayed(reply)).count(), 1);
    let first = replies[0].get_ref().encode_to_vec();
    assert!(replies.iter().all(|reply| reply.get_ref().encode_to_vec() == first));
    assert_eq!(payments(&app).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_known_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let app = TestApp::stored_in(folder.path()).await;
    let created = sent(&app, keyed("k", Scenario::Delay)).await.into_inner();
    let process = ProcessPaymentRequest {
        payment_intent_id: created.payment_intent_id.clone(),
        idempotency_key: "k".to_owned(),
        ..Default::default()
    };
    let processed = app.client.clone().process_payment(process.clone()).await.unwrap().into_inner();
    app.events(1).await;
    let app = app.restart(1_000).await;
    let again = sent(&app, keyed("k", Scenario::Delay)).await;
    assert!(replayed(&again));
    assert_eq!(again.into_inner().encode_to_vec(), created.encode_to_vec());
    let again = app.client.clone().process_payment(process).await.unwrap();
    assert!(replayed(&again));
    assert_eq!(again.into_inner().encode_to_vec(), processed.encode_to_vec());
    let other = app.client.clone().create_payment_intent(keyed("k", Scenario::Fail)).await;
    assert_eq!(refused(other).1, "IDEMPOTENCY_CONFLICT");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_on_two_rpcs_is_two_keys() {
    let app = TestApp::quiet().await;
    let created = sent(&app, keyed("k", Scenario::Approve)).await.into_inner();
    let process = ProcessPaymentRequest {
        payment_intent_id: created.payment_intent_id.clone(),
        idempotency_key: "k".to_owned(),
        ..Default::default()
    };
    assert!(!replayed(&app.client.clone().process_payment(process).await.unwrap()));
    let cancel = CancelPaymentRequest {
        payment_intent_id: created.payment_intent_id,
        idempotency_key: "k".to_owned(),
        ..Default::default()
    };
    assert!(!replayed(&app.client.clone().cancel_payment(cancel).await.unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_lapses_after_its_time_to_live() {
    let app = TestApp::quiet().await;
    let first = sent(&app, keyed("k", Scenario::Approve)).await.into_inner();
    app.advance_ms(24 * 3_600_000 - 1);
    assert!(replayed(&sent(&app, keyed("k", Scenario::Approve)).await));
    app.advance_ms(1);
    let second = sent(&app, keyed("k", Scenario::Fail)).await;
    assert!(!replayed(&second), "counted from the first reply, not from the last");
    assert_ne!(second.into_inner().payment_intent_id, first.payment_intent_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_process_lapses_too() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Approve, "").await;
    let process = ProcessPaymentRequest {
        payment_intent_id: id,
        idempotency_key: "k".to_owned(),
        ..Default::default()
    };
    app.client.clone().process_payment(process.clone()).await.unwrap();
    app.advance_ms(24 * 3_600_000);
    assert!(!replayed(&app.client.clone().process_payment(process).await.unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_stores_nothing_under_its_key() {
    let app = TestApp::quiet().await;
    let bad = CreatePaymentIntentRequest { amount: None, ..keyed("k", Scenario::Approve) };
    app.client.clone().create_payment_intent(bad).await.unwrap_err();
    assert!(!replayed(&sent(&app, keyed("k", Scenario::Approve)).await));
    let id = app.pay(Scenario::Approve, "").await;
    let too_much = |amount| CancelPaymentRequest {
        payment_intent_id: id.clone(),
        refund_amount: Some(krw(amount)),
        idempotency_key: "c".to_owned(),
        ..Default::default()
    };
    app.client.clone().cancel_payment(too_much(100_001)).await.unwrap_err();
    assert!(!replayed(&app.client.clone().cancel_payment(too_much(5)).await.unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_call_stores_no_reply() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Timeout, "").await;
    let process = ProcessPaymentRequest {
        payment_intent_id: id.clone(),
        idempotency_key: "k".to_owned(),
        ..Default::default()
    };
    let held = with_header(process.clone(), "grpc-timeout", "50m");
    assert_eq!(refused(app.client.clone().process_payment(held).await).1, "DEADLINE");
    app.advance_ms(30_000);
    let settled = app.client.clone().process_payment(process.clone()).await.unwrap();
    assert!(!replayed(&settled));
    assert_eq!(settled.into_inner().status(), Status::Completed);
    assert!(replayed(&app.client.clone().process_payment(process).await.unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_none_is_refused() {
    let app = TestApp::quiet().await;
    for key in ["ä", "a\tb", &"k".repeat(256)] {
        let error = app.client.clone().create_payment_intent(keyed(key, Scenario::Approve)).await;
        let error = Refused::of(&error.unwrap_err());
        assert_eq!(error.fields, ["idempotency_key"], "{key:?}");
    }
    sent(&app, keyed(&"k".repeat(255), Scenario::Approve)).await;
}
