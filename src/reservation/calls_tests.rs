use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, task::JoinSet};
use url::Url;

use super::{
    calls::{HttpReservations, Order, Reservations, Told},
    decision::Action,
};
use crate::config::{ApiStyle, ReservationApiConfig};

const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[derive(Debug)]
struct Seen {
    line: String,
    headers: HeaderMap,
    body: String,
}

/// Answers with a status (0: never) and keeps what it got.
struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    _task: JoinSet<()>,
}

impl Server {
    async fn start(status: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let kept = Arc::clone(&seen);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let kept = Arc::clone(&kept);
                let service = service_fn(move |request| answer(status, Arc::clone(&kept), request));
                connections.spawn(async move {
                    // A connection that the caller breaks off is part of the play.
                    let _ =
                        http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { address, seen, _task: task }
    }

    fn reservations(&self, path: &str, style: ApiStyle) -> HttpReservations {
        let url = Url::parse(&format!("http://{}{path}", self.address)).unwrap();
        HttpReservations::new(&ReservationApiConfig { url, style, timeout: SOON }, 4)
    }
}

const SOON: Duration = Duration::from_secs(20);

async fn answer(
    status: u16,
    kept: Arc<Mutex<Vec<Seen>>>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let line = format!("{} {}", request.method(), request.uri());
    let headers = request.headers().clone();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let body = String::from_utf8(body.to_vec()).unwrap();
    kept.lock().unwrap().push(Seen { line, headers, body });
    if status == 0 {
        std::future::pending::<()>().await;
    }
    let mut response = Response::new(Full::from("{\"status\":\"whatever\"}"));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response.headers_mut().insert("location", "/elsewhere".parse().unwrap());
    Ok(response)
}

fn order(action: Action) -> Order<'static> {
    Order {
        action,
        reservation_id: "res_1",
        payment_id: "pay_1",
        event_id: "evt_1_2",
        traceparent: Some(TRACE),
    }
}

async fn sent(path: &str, style: ApiStyle, order: Order<'_>) -> Seen {
    let server = Server::start(200).await;
    assert_eq!(server.reservations(path, style).tell(order).await, Told::Done);
    server.seen.lock().unwrap().pop().unwrap()
}

#[tokio::test]
async fn each_style_is_as_its_api_wants_it() {
    for (style, action, line, body) in [
        (
            ApiStyle::Post,
            Action::Confirm,
            "POST /v1/reservations/res_1/confirm",
            r#"{"payment_id":"pay_1"}"#,
        ),
        (
            ApiStyle::Post,
            Action::Cancel,
            "POST /v1/reservations/res_1/cancel",
            r#"{"payment_id":"pay_1"}"#,
        ),
        (
            ApiStyle::Patch,
            Action::Confirm,
            "PATCH /internal/reservations/res_1",
            r#"{"status":"CONFIRMED"}"#,
        ),
        (
            ApiStyle::Patch,
            Action::Cancel,
            "PATCH /internal/reservations/res_1",
            r#"{"status":"CANCELLED"}"#,
        ),
    ] {
        let seen = sent("", style, order(action)).await;
        assert_eq!((seen.line.as_str(), seen.body.as_str()), (line, body));
        assert_eq!(seen.headers["idempotency-key"], "evt_1_2");
        assert_eq!(seen.headers["content-type"], "application/json");
        assert_eq!(seen.headers["traceparent"], TRACE);
        assert!(seen.headers["user-agent"].to_str().unwrap().starts_with("reservation-worker/"));
    }
    let bare = Order { traceparent: None, ..order(Action::Confirm) };
    assert!(!sent("", ApiStyle::Post, bare).await.headers.contains_key("traceparent"));
}

#[tokio::test]
async fn an_id_stays_one_segment_below_the_apis_own_path() {
    for (base, id, line) in [
        ("/api", "r", "POST /api/v1/reservations/r/confirm"),
        ("/api/", "r", "POST /api/v1/reservations/r/confirm"),
        ("", "a b/../c?d#e%2F", "POST /v1/reservations/a%20b%2F..%2Fc%3Fd%23e%252F/confirm"),
        ("", "예약", "POST /v1/reservations/%EC%98%88%EC%95%BD/confirm"),
        ("", "...", "POST /v1/reservations/.../confirm"),
    ] {
        let order = Order { reservation_id: id, ..order(Action::Confirm) };
        assert_eq!(sent(base, ApiStyle::Post, order).await.line, line);
    }
}

#[tokio::test]
async fn a_status_says_whether_to_call_again() {
    for status in [200, 201, 202, 204, 299] {
        assert_eq!(told(status).await, Told::Done, "{status}");
    }
    for status in [408, 429, 500, 501, 502, 503, 504] {
        assert_eq!(told(status).await, Told::Retry(format!("HTTP {status}")));
    }
    for status in [301, 304, 307, 400, 401, 403, 404, 409, 410, 422] {
        assert_eq!(told(status).await, Told::Refused(format!("HTTP {status}")));
    }
}

async fn told(status: u16) -> Told {
    let server = Server::start(status).await;
    let told = server.reservations("", ApiStyle::Post).tell(order(Action::Confirm)).await;
    assert_eq!(server.seen.lock().unwrap().len(), 1, "one call, and no redirect is followed");
    told
}

#[tokio::test]
async fn nobody_there_and_no_answer_are_worth_another_call() {
    let server = Server::start(0).await;
    let url = Url::parse(&format!("http://{}", server.address)).unwrap();
    let timeout = Duration::from_millis(100);
    let config = ReservationApiConfig { url, style: ApiStyle::Post, timeout };
    let reservations = HttpReservations::new(&config, 4);
    let silent = reservations.tell(order(Action::Confirm)).await;
    assert_eq!(silent, Told::Retry("no answer in time".into()));

    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let url = Url::parse(&format!("http://{gone}")).unwrap();
    let config = ReservationApiConfig { url, style: ApiStyle::Post, timeout: SOON };
    let refused = HttpReservations::new(&config, 4).tell(order(Action::Confirm)).await;
    assert!(matches!(refused, Told::Retry(_)), "{refused:?}");
}
