//! ListPayments: filters, pages, cursors.

use crate::support::{
    CreatePaymentIntentRequest, ListPaymentsRequest, ListPaymentsResponse, Pagination,
    PaymentScenario as Scenario, PaymentStatus as Status, Refused, TestApp, create,
};
use prost_types::Timestamp;

async fn list(app: &TestApp, request: ListPaymentsRequest) -> ListPaymentsResponse {
    app.client.clone().list_payments(request).await.unwrap().into_inner()
}

fn page(size: i32, cursor: &str) -> ListPaymentsRequest {
    let pagination = Pagination { page_size: size, cursor: cursor.to_owned(), page: 0 };
    ListPaymentsRequest { pagination: Some(pagination), ..Default::default() }
}

fn ids(reply: &ListPaymentsResponse) -> Vec<String> {
    reply.payments.iter().map(|payment| payment.payment_intent_id.clone()).collect()
}

/// So many payments, one a second, newest first.
async fn some(app: &TestApp, n: usize) -> Vec<String> {
    let mut made = Vec::new();
    for n in 0..n {
        made.push(app.create(create(&format!("reservation-{n}"))).await);
        app.advance_ms(1_000);
    }
    made.reverse();
    made
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_follow_the_cursor_forwards_and_back() {
    let app = TestApp::quiet().await;
    let all = some(&app, 7).await;
    let first = list(&app, page(3, "")).await;
    let info = first.page_info.clone().unwrap();
    assert_eq!(ids(&first), all[..3]);
    assert!(info.has_next_page && !info.has_previous_page && info.previous_cursor.is_empty());
    assert_eq!(info.total_count, 7);
    let second = list(&app, page(3, &info.next_cursor)).await;
    assert_eq!(ids(&second), all[3..6]);
    let info = second.page_info.unwrap();
    assert_eq!(info.total_count, 7, "as counted at the first page");
    let third = list(&app, page(3, &info.next_cursor)).await;
    assert_eq!(ids(&third), all[6..]);
    assert!(!third.page_info.as_ref().unwrap().has_next_page);
    let back = list(&app, page(3, &info.previous_cursor)).await;
    assert_eq!(ids(&back), all[..3]);
    let back = list(&app, page(3, &third.page_info.unwrap().previous_cursor)).await;
    assert_eq!(ids(&back), all[3..6]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_meanwhile_shifts_no_page() {
    let app = TestApp::quiet().await;
    let all = some(&app, 4).await;
    let first = list(&app, page(2, "")).await;
    some(&app, 3).await;
    let second = list(&app, page(2, &first.page_info.unwrap().next_cursor)).await;
    assert_eq!(ids(&second), all[2..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn numbered_pages_work_too() {
    let app = TestApp::quiet().await;
    let all = some(&app, 5).await;
    let numbered = |page| ListPaymentsRequest {
        pagination: Some(Pagination { page, page_size: 2, cursor: String::new() }),
        ..Default::default()
    };
    assert_eq!(ids(&list(&app, numbered(1)).await), all[..2]);
    assert_eq!(ids(&list(&app, numbered(2)).await), all[2..4]);
    assert_eq!(ids(&list(&app, numbered(3)).await), all[4..]);
    assert!(ids(&list(&app, numbered(4)).await).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_filter_filters() {
    let app = TestApp::quiet().await;
    let from = app.now_ms() / 1_000;
    let mine = app.create(create("r-1")).await;
    app.advance_ms(10_000);
    let failing = CreatePaymentIntentRequest { scenario: Scenario::Fail.into(), ..create("r-2") };
    let failed = app.create(failing).await;
    let theirs = CreatePaymentIntentRequest { user_id: "user-2".to_owned(), ..create("r-1") };
    let theirs = app.create(theirs).await;
    let second = |seconds| Some(Timestamp { seconds, nanos: 0 });
    let all = ListPaymentsRequest::default();
    let cases = [
        (ListPaymentsRequest { user_id: "user-2".into(), ..all.clone() }, vec![&theirs]),
        (ListPaymentsRequest { reservation_id: "r-1".into(), ..all.clone() }, vec![&theirs, &mine]),
        (ListPaymentsRequest { status: Status::Failed.into(), ..all.clone() }, vec![&failed]),
        (
            ListPaymentsRequest { created_from: second(from + 1), ..all.clone() },
            vec![&theirs, &failed],
        ),
        (ListPaymentsRequest { created_to: second(from + 1), ..all.clone() }, vec![&mine]),
        (
            ListPaymentsRequest {
                user_id: "user-1".into(),
                reservation_id: "r-1".into(),
                ..all.clone()
            },
            vec![&mine],
        ),
        (ListPaymentsRequest { user_id: "nobody".into(), ..all }, vec![]),
    ];
    for (request, expected) in cases {
        let reply = list(&app, request.clone()).await;
        assert_eq!(ids(&reply).iter().collect::<Vec<_>>(), expected, "{request:?}");
        assert_eq!(reply.page_info.unwrap().total_count as usize, expected.len(), "{request:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_belongs_to_its_filters() {
    let app = TestApp::quiet().await;
    some(&app, 3).await;
    let cursor = list(&app, page(1, "")).await.page_info.unwrap().next_cursor;
    for wrong in [
        ListPaymentsRequest { user_id: "user-1".to_owned(), ..page(1, &cursor) },
        ListPaymentsRequest { status: Status::Completed.into(), ..page(1, &cursor) },
        page(1, "made-up"),
        page(1, &cursor[1..]),
    ] {
        let error = Refused::of(&app.client.clone().list_payments(wrong).await.unwrap_err());
        assert_eq!(
            (error.reason.as_str(), error.fields),
            ("VALIDATION_FAILED", vec!["pagination.cursor".to_owned()])
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_have_limits() {
    let app = TestApp::quiet().await;
    some(&app, 25).await;
    assert_eq!(list(&app, ListPaymentsRequest::default()).await.payments.len(), 20);
    assert_eq!(list(&app, page(100, "")).await.payments.len(), 25);
    let numbered = |page, page_size| ListPaymentsRequest {
        pagination: Some(Pagination { page, page_size, cursor: String::new() }),
        ..Default::default()
    };
    for (bad, field) in [
        (numbered(1, 101), "pagination.page_size"),
        (numbered(1, -1), "pagination.page_size"),
        (numbered(-1, 1), "pagination.page"),
        (numbered(101, 100), "pagination.page"),
    ] {
        let error = Refused::of(&app.client.clone().list_payments(bad).await.unwrap_err());
        assert_eq!(error.fields, [field]);
    }
    assert!(list(&app, numbered(100, 100)).await.payments.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_carries_the_payment_without_its_timeline() {
    let app = TestApp::quiet().await;
    let id = app.pay(Scenario::Approve, "").await;
    let listed = list(&app, ListPaymentsRequest::default()).await.payments.remove(0);
    let mut whole = app.payment(&id).await;
    assert!(!whole.timeline.is_empty());
    whole.timeline.clear();
    assert_eq!(listed, whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_total_stops_at_a_thousand() {
    let app = TestApp::quiet().await;
    let mut creating = tokio::task::JoinSet::new();
    for worker in 0..7 {
        let mut client = app.client.clone();
        creating.spawn(async move {
            for n in 0..150 {
                client.create_payment_intent(create(&format!("r-{worker}-{n}"))).await.unwrap();
            }
        });
    }
    creating.join_all().await;
    let info = list(&app, page(1, "")).await.page_info.unwrap();
    assert_eq!(info.total_count, 1_000);
    assert!(info.has_next_page);
}

/// A page ends before its reply is too large, and says where to go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_large_payments_is_short_and_none_is_lost() {
    use prost::Message;
    let app = TestApp::quiet().await;
    let tag = |n: usize| (format!("{n:064}"), "x".repeat(512));
    for n in 0..40 {
        let mut large = create(&format!("r-{n}"));
        let tags = (0..50).map(tag).collect();
        large.metadata = Some(crate::support::PaymentMetadata { tags, ..Default::default() });
        app.create(large).await;
    }
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let reply = list(&app, page(100, &cursor)).await;
        assert!(reply.encoded_len() <= 513 << 10, "{} bytes", reply.encoded_len());
        seen.extend(ids(&reply));
        cursor = reply.page_info.unwrap().next_cursor;
        if cursor.is_empty() {
            break;
        }
    }
    assert_eq!(seen.len(), 40);
    seen.dedup();
    assert_eq!(seen.len(), 40);
}
