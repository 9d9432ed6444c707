//! The simulation API: what is owed and what has died is listed, and sent again on order.

use payment_sim::config::{Switch, Token};
use tonic::{Code, Request, Response, Status as GrpcStatus};
use tonic_types::StatusExt;

use crate::support::{
    Answer, CancelPaymentRequest, CreatePaymentIntentRequest, DeliveryFilter,
    ListDeliveriesRequest, ListDeliveriesResponse, ListPaymentsRequest,
    PaymentScenario as Scenario, RedeliverRequest, RedeliverResponse, Refused, TestApp,
    WebhookSink, create, eventually, redeliver_request::Which, refused, with_header,
};

fn state(state: &str) -> DeliveryFilter {
    DeliveryFilter { state: state.to_owned(), ..Default::default() }
}

async fn list(app: &TestApp, filter: DeliveryFilter) -> Vec<String> {
    let request =
        ListDeliveriesRequest { filter: Some(filter), page_size: 100, ..Default::default() };
    let reply = app.simulation.clone().list_deliveries(request).await.unwrap().into_inner();
    assert_eq!(reply.next_cursor, "");
    ids(&reply)
}

fn ids(reply: &ListDeliveriesResponse) -> Vec<String> {
    reply.deliveries.iter().map(|one| one.delivery.clone().unwrap().delivery_id).collect()
}

async fn redeliver(app: &TestApp, which: Which) -> Result<Response<RedeliverResponse>, GrpcStatus> {
    let request = RedeliverRequest { which: Some(which), ..Default::default() };
    app.simulation.clone().redeliver(request).await
}

/// Payments whose only webhook is dead, oldest first.
async fn dead(app: &TestApp, sink: &WebhookSink, n: usize) -> Vec<String> {
    sink.answers(vec![Answer::Status(410); n]);
    let mut ids = Vec::new();
    for _ in 0..n {
        ids.push(app.pay(Scenario::Approve, &sink.url).await);
        app.advance_ms(1);
    }
    app.advance_ms(2_000);
    for id in &ids {
        app.webhook_becomes(id, "DEAD").await;
    }
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_webhook_is_found_and_sent_again_as_it_was() {
    let (app, sink) = (TestApp::quiet().await, WebhookSink::start().await);
    let id = dead(&app, &sink, 1).await.remove(0);
    let request = ListDeliveriesRequest { filter: Some(state("DEAD")), ..Default::default() };
    let listed = app.simulation.clone().list_deliveries(request).await.unwrap().into_inner();
    let found = listed.deliveries[0].clone();
    assert_eq!((listed.deliveries.len(), &found.payment_intent_id), (1, &id));
    let delivery = found.delivery.unwrap();
    assert_eq!(delivery, app.deliveries(&id, "webhook").await[0], "as Get shows it");
    let before = app.payment(&id).await;
    for round in 1..=2 {
        app.advance_ms(60_000);
        let which = Which::DeliveryId(delivery.delivery_id.clone());
        assert_eq!(redeliver(&app, which).await.unwrap().into_inner().ordered, 1);
        let sent = sink.first(1 + round).await;
        let (first, again) = (&sent[0], &sent[round]);
        assert_eq!((first.id(), &first.raw), (again.id(), &again.raw));
        assert_ne!(first.header("webhook-signature"), again.header("webhook-signature"));
        let attempts = i32::try_from(1 + round).unwrap();
        assert_eq!(app.webhook_attempted(&id, attempts).await.state, "DELIVERED");
        assert!(list(&app, state("DEAD")).await.is_empty());
    }
    let after = app.payment(&id).await;
    assert_eq!((after.version, after.updated_at), (before.version, before.updated_at));
    let ordered = &after.timeline[before.timeline.len()];
    assert_eq!(
        (ordered.kind.as_str(), ordered.cause.as_str()),
        ("redelivery_ordered", "Redeliver")
    );
    assert_eq!(ordered.detail["delivery_id"], delivery.delivery_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_sent_again_as_it_was() {
    let app = TestApp::start().await;
    let id = app.pay(Scenario::Approve, "").await;
    app.advance_ms(2_000);
    let first = app.events(1).await.remove(0);
    let events = || DeliveryFilter { channel: "event".to_owned(), ..state("DELIVERED") };
    let delivery =
        eventually("the event is written down", || async { list(&app, events()).await.pop() })
            .await;
    assert_eq!(delivery, app.deliveries(&id, "event").await[0].delivery_id);
    redeliver(&app, Which::DeliveryId(delivery)).await.unwrap();
    assert_eq!(app.events(2).await[1], first);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_owed_or_unknown_cannot_be_ordered() {
    let (app, sink) = (TestApp::quiet().await, WebhookSink::start().await);
    let id = app.pay(Scenario::Approve, &sink.url).await;
    let owed = app.deliveries(&id, "webhook").await[0].delivery_id.clone();
    let error = refused(redeliver(&app, Which::DeliveryId(owed.clone())).await);
    assert_eq!(error, (Code::FailedPrecondition, "INVALID_STATE".to_owned()));
    let stranger = "dlv_00000000000000000000000000_1_webhook".to_owned();
    let error = refused(redeliver(&app, Which::DeliveryId(stranger)).await);
    assert_eq!(error, (Code::NotFound, "PAYMENT_NOT_FOUND".to_owned()));
    let bad = |which, cursor: &str| RedeliverRequest { which, cursor: cursor.to_owned() };
    let filter = |filter| Some(Which::Filter(filter));
    let origin = |text: &str| DeliveryFilter { origin: text.to_owned(), ..Default::default() };
    for (request, field) in [
        (bad(Some(Which::DeliveryId(owed.replace("_1_", "_2_"))), ""), "delivery_id"),
        (bad(Some(Which::DeliveryId("dlv_".to_owned())), ""), "delivery_id"),
        (bad(None, ""), "delivery_id"),
        (bad(Some(Which::DeliveryId(owed)), "AAAA"), "cursor"),
        (bad(filter(state("DELIVERED")), ""), "filter.state"),
        (bad(filter(origin("http://h/path")), ""), "filter.origin"),
        (bad(filter(state("DEAD")), "AAAA"), "cursor"),
    ] {
        let error = app.simulation.clone().redeliver(request).await.unwrap_err();
        assert_eq!(Refused::of(&error).fields, [field]);
    }
    app.advance_ms(2_000);
    sink.only().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_filter_filters() {
    let (app, one) = (TestApp::start().await, WebhookSink::start().await);
    let two = WebhookSink::start().await;
    let dead = dead(&app, &one, 1).await.remove(0);
    let told = app.pay(Scenario::Approve, &two.url).await;
    let owed = app.pay(Scenario::Approve, &two.url).await;
    let refund = CancelPaymentRequest { payment_intent_id: owed.clone(), ..Default::default() };
    app.client.clone().cancel_payment(refund).await.unwrap();
    let dlv = |id: &str, n: u8, channel: &str| format!("dlv_{}_{n}_{channel}", &id[3..]);
    let webhooks = |state: &str| DeliveryFilter {
        state: state.to_owned(),
        channel: "webhook".to_owned(),
        ..Default::default()
    };
    assert_eq!(list(&app, webhooks("HELD")).await, [dlv(&owed, 2, "webhook")]);
    let waiting = [dlv(&owed, 1, "webhook"), dlv(&told, 1, "webhook")];
    assert_eq!(list(&app, webhooks("OWED")).await, waiting);
    assert_eq!(list(&app, state("DEAD")).await, [dlv(&dead, 1, "webhook")]);
    let of = |payment: &str| DeliveryFilter {
        payment_intent_id: payment.to_owned(),
        ..Default::default()
    };
    let both = [dlv(&told, 1, "event"), dlv(&told, 1, "webhook")];
    assert_eq!(list(&app, of(&told)).await, both);
    assert_eq!(list(&app, of(&told.replace("pi_", "pay_"))).await, both);
    assert!(list(&app, of("pi_00000000000000000000000000")).await.is_empty());
    let to = |origin: &str| DeliveryFilter { origin: origin.to_owned(), ..Default::default() };
    let origin = one.url.strip_suffix("/hook").unwrap();
    assert_eq!(list(&app, to(origin)).await, [dlv(&dead, 1, "webhook")]);
    assert_eq!(list(&app, to(&origin.replace("http", "HTTP"))).await.len(), 1);
    assert!(list(&app, to("http://127.0.0.1")).await.is_empty());
    app.advance_ms(2_000);
    two.first(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_follow_the_cursor_and_belong_to_their_filter() {
    let (app, sink) = (TestApp::quiet().await, WebhookSink::start().await);
    let all = dead(&app, &sink, 5).await;
    let page = |filter, page_size, cursor: &str| ListDeliveriesRequest {
        filter: Some(filter),
        page_size,
        cursor: cursor.to_owned(),
    };
    let call = |request| {
        let mut simulation = app.simulation.clone();
        async move { simulation.list_deliveries(request).await }
    };
    for filter in [state("DEAD"), DeliveryFilter::default()] {
        let (mut seen, mut cursor) = (Vec::new(), String::new());
        loop {
            let reply = call(page(filter.clone(), 2, &cursor)).await.unwrap().into_inner();
            seen.extend(reply.deliveries.into_iter().map(|one| one.payment_intent_id));
            cursor = reply.next_cursor;
            if cursor.is_empty() {
                break;
            }
        }
        seen.reverse();
        assert_eq!(seen, all);
    }
    let cursor = call(page(state("DEAD"), 2, "")).await.unwrap().into_inner().next_cursor;
    for (request, field) in [
        (page(DeliveryFilter::default(), 2, &cursor), "cursor"),
        (page(state("DEAD"), 2, &cursor[1..]), "cursor"),
        (page(state("DEAD"), 101, ""), "page_size"),
        (page(state("DEAD"), -1, ""), "page_size"),
        (page(state("dead"), 0, ""), "filter.state"),
    ] {
        let error = Refused::of(&call(request).await.unwrap_err());
        assert_eq!(
            (error.reason.as_str(), error.fields),
            ("VALIDATION_FAILED", vec![field.to_owned()])
        );
    }
    let which = Some(Which::Filter(state("DEAD")));
    let error = app.simulation.clone().redeliver(RedeliverRequest { which, cursor }).await;
    assert_eq!(Refused::of(&error.unwrap_err()).fields, ["cursor"], "of another call");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_dead_of_an_origin_are_sent_again() {
    let (app, one) = (TestApp::quiet().await, WebhookSink::start().await);
    let two = WebhookSink::start().await;
    dead(&app, &one, 3).await;
    let others = dead(&app, &two, 2).await;
    let origin = one.url.strip_suffix("/hook").unwrap().to_owned();
    let filter = DeliveryFilter { origin, ..Default::default() };
    let reply = redeliver(&app, Which::Filter(filter.clone())).await.unwrap().into_inner();
    assert_eq!((reply.ordered, reply.next_cursor.as_str()), (3, ""));
    one.first(6).await;
    assert_eq!(list(&app, state("DEAD")).await.len(), others.len());
    let reply = redeliver(&app, Which::Filter(filter)).await.unwrap().into_inner();
    assert_eq!(reply.ordered, 0, "none is left");
    assert_eq!(two.received().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_orders_a_thousand_and_says_where_to_go_on() {
    const ALL: usize = 1_010;
    let (app, sink) = (TestApp::quiet().await, WebhookSink::start().await);
    sink.answers(vec![Answer::Status(410); ALL]);
    let mut creating = tokio::task::JoinSet::new();
    for worker in 0..10 {
        let (mut client, webhook_url) = (app.client.clone(), sink.url.clone());
        creating.spawn(async move {
            for n in 0..ALL / 10 {
                let request = create(&format!("r-{worker}-{n}"));
                let webhook_url = webhook_url.clone();
                let request = CreatePaymentIntentRequest { webhook_url, ..request };
                client.create_payment_intent(request).await.unwrap();
            }
        });
    }
    creating.join_all().await;
    app.advance_ms(2_000);
    attempted(&app, "dead", ALL).await;
    let (mut ordered, mut cursor, mut calls) = (0, String::new(), 0);
    loop {
        let request = RedeliverRequest { which: Some(Which::Filter(state("DEAD"))), cursor };
        let reply = app.simulation.clone().redeliver(request).await.unwrap().into_inner();
        assert!(reply.ordered <= 1_000);
        (ordered, calls) = (ordered + reply.ordered, calls + 1);
        cursor = reply.next_cursor;
        if cursor.is_empty() {
            break;
        }
    }
    assert_eq!((usize::try_from(ordered).unwrap(), calls), (ALL, 2));
    attempted(&app, "delivered", ALL).await;
}

/// Waits until so many webhooks have ended like this, and that is written down. What finds its origin busy
/// comes back a moment later.
async fn attempted(app: &TestApp, result: &str, all: usize) {
    let name = format!("webhook_deliveries_total{{result={result:?}}}");
    eventually(&format!("all are {result}"), || async {
        app.advance_ms(200);
        let ended = app.metric(&name).await as usize == all;
        let owed = app.metric("outbox_pending{channel=\"webhook\"}").await;
        (ended && owed == 0.0).then_some(())
    })
    .await;
}

/// Codes of both calls, with the `authorization` header where there is one.
async fn codes(app: &TestApp, authorization: Option<&str>) -> [Code; 2] {
    fn request<T>(message: T, authorization: Option<&str>) -> Request<T> {
        match authorization {
            Some(value) => with_header(message, "authorization", value),
            None => Request::new(message),
        }
    }
    let code = |status: &GrpcStatus| {
        let reason = status.get_details_error_info().map(|info| info.reason);
        let wanted = (status.code() == Code::Unauthenticated).then(|| "TOKEN_REQUIRED".to_owned());
        assert_eq!(reason, wanted);
        status.code()
    };
    let list = request(ListDeliveriesRequest::default(), authorization);
    let list = app.simulation.clone().list_deliveries(list).await;
    let which = Some(Which::Filter(DeliveryFilter::default()));
    let order = request(RedeliverRequest { which, ..Default::default() }, authorization);
    let order = app.simulation.clone().redeliver(order).await;
    let codes = [list.map(|_| Code::Ok), order.map(|_| Code::Ok)];
    codes.map(|code_or| code_or.unwrap_or_else(|status| code(&status)))
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_call_what() {
    let token = |app: &mut payment_sim::config::Config| {
        app.simulation_token = Token::parse("t0ken");
    };
    let off = |app: &mut payment_sim::config::Config| app.simulation_api = Switch::Off;
    let (open, guarded, off) =
        (TestApp::quiet().await, TestApp::with(token).await, TestApp::with(off).await);
    for (header, with_token) in [
        (None, Code::Unauthenticated),
        (Some("Bearer wrong"), Code::Unauthenticated),
        (Some("Bearer t0ken2"), Code::Unauthenticated),
        (Some("Basic t0ken"), Code::Unauthenticated),
        (Some("Bearer t0ken"), Code::Ok),
        (Some("bearer t0ken"), Code::Ok),
    ] {
        assert_eq!(codes(&open, header).await, [Code::Ok; 2], "{header:?}");
        assert_eq!(codes(&guarded, header).await, [with_token; 2], "{header:?}");
        assert_eq!(codes(&off, header).await, [Code::Unimplemented; 2], "{header:?}");
    }
    // Payments need no token.
    guarded.client.clone().list_payments(ListPaymentsRequest::default()).await.unwrap();
}
