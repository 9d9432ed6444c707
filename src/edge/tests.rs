use http_body_util::{BodyExt, Full};
use prost::Message;
use tonic_types::StatusExt;

use super::testbed::{SOON, edge, order};
use super::*;

const CREATE: &str = "/payment.v1.PaymentService/CreatePaymentIntent";

/// One gRPC message: a flag, a length, the bytes.
fn framed(flag: u8, length: usize, bytes: &[u8]) -> Bytes {
    let mut frame = vec![flag];
    frame.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
    frame.extend_from_slice(bytes);
    frame.into()
}

fn call(path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(path)
        .header("content-type", "application/grpc")
        .body(Full::new(body.into()))
        .unwrap()
}

fn create(user_id: &str) -> Request<Full<Bytes>> {
    let message = order(user_id).encode_to_vec();
    call(CREATE, framed(0, message.len(), &message))
}

fn with(
    mut request: Request<Full<Bytes>>,
    name: &'static str,
    value: &str,
) -> Request<Full<Bytes>> {
    request.headers_mut().insert(name, value.parse().unwrap());
    request
}

async fn send(
    edge: &Edge<testbed::Stub>,
    request: Request<Full<Bytes>>,
) -> (Response<()>, Status, Bytes) {
    let service = edge.connection(CancellationToken::new());
    let response = timeout(SOON, service.call(request)).await.unwrap().unwrap();
    let (head, body) = response.into_parts();
    let body = timeout(SOON, body.collect()).await.unwrap().unwrap();
    let trailers = body.trailers().cloned().unwrap_or_default();
    let status = Status::from_header_map(&head.headers)
        .or_else(|| Status::from_header_map(&trailers))
        .expect("every reply has a grpc-status");
    (Response::from_parts(head, ()), status, body.to_bytes())
}

/// Code and reason of a refusal.
async fn refused(edge: &Edge<testbed::Stub>, request: Request<Full<Bytes>>) -> (Code, String) {
    let (_, status, _) = send(edge, request).await;
    let reason = status.get_details_error_info().map(|info| info.reason);
    (status.code(), reason.unwrap_or_default())
}

#[tokio::test]
async fn a_good_call_passes_with_its_trace() {
    let (edge, ears) = edge(EdgeLimits::default());
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let (_, status, body) = send(&edge, with(create("ok"), TRACEPARENT.as_str(), parent)).await;
    assert_eq!(status.code(), Code::Ok);
    let text = String::from_utf8_lossy(&body);
    assert!(text.contains("0af7651916cd43dd8448eb211c80319c"), "{text}");
    assert_eq!(ears.handled(), [("CreatePaymentIntent", Code::Ok)]);
    assert_eq!(edge.in_flight(), 0);
}

#[tokio::test]
async fn what_is_no_whole_message_is_malformed() {
    let (edge, _) = edge(EdgeLimits::default());
    let malformed = (Code::InvalidArgument, "MALFORMED".to_owned());
    let message = order("ok").encode_to_vec();
    let two = [framed(0, message.len(), &message), framed(0, 0, b"")].concat();
    for (what, body) in [
        ("undecodable", framed(0, 3, &[0x0a, 0x7f, 0x61])),
        ("wrong wire type", framed(0, 2, &[0x08, 0x01])),
        ("no message", Bytes::new()),
        ("half a header", Bytes::from_static(&[0, 0])),
        ("half a message", framed(0, 100, b"abc")),
        ("compressed without saying how", framed(1, message.len(), &message)),
        ("an unknown flag", framed(2, message.len(), &message)),
    ] {
        assert_eq!(refused(&edge, call(CREATE, body)).await, malformed, "{what}");
    }
    // One message is what a unary call has: the first is read, as other servers do it.
    assert_ne!(refused(&edge, call(CREATE, two)).await.0, Code::Internal);
}

#[tokio::test]
async fn a_request_over_the_limit_is_too_large() {
    let (edge, _) = edge(EdgeLimits::default());
    let too_large = (Code::ResourceExhausted, "MESSAGE_TOO_LARGE".to_owned());
    for length in [api::MAX_REQUEST_BYTES + 1, u32::MAX as usize] {
        let request = call(CREATE, framed(0, length, &[0; 16]));
        assert_eq!(refused(&edge, request).await, too_large, "{length}");
    }
    let whole = vec![0; api::MAX_REQUEST_BYTES + 1];
    let request = call(CREATE, framed(0, whole.len(), &whole));
    assert_eq!(refused(&edge, request).await, too_large);
}

#[tokio::test]
async fn unknown_methods_and_services_are_unimplemented_and_share_a_label() {
    let (edge, ears) = edge(EdgeLimits::default());
    for path in ["/payment.v1.PaymentService/Nope", "/payment.v1.PaymentService/", "/a.B/C", "/"] {
        assert_eq!(refused(&edge, call(path, "")).await.0, Code::Unimplemented, "{path}");
    }
    assert!(ears.handled().iter().all(|h| *h == (UNKNOWN_METHOD.1, Code::Unimplemented)));
}

#[tokio::test]
async fn what_is_no_grpc_is_told_so() {
    let (edge, _) = edge(EdgeLimits::default());
    for other in ["text/html", "application/json", "application/grpc-web", "application/grpc+json"]
    {
        let (head, status, _) = send(&edge, with(create("ok"), "content-type", other)).await;
        assert_eq!(head.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE, "{other}");
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    for ours in ["application/grpc", "application/grpc+proto", "application/grpc; x=y"] {
        let (_, status, _) = send(&edge, with(create("ok"), "content-type", ours)).await;
        assert_eq!(status.code(), Code::Ok, "{ours}");
    }
    let mut get = create("ok");
    *get.method_mut() = Method::GET;
    let (head, _, _) = send(&edge, get).await;
    assert_eq!(head.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(head.headers()["allow"], "POST");
}

#[tokio::test]
async fn the_shorter_deadline_holds() {
    let late = (Code::DeadlineExceeded, "DEADLINE".to_owned());
    let (patient, ears) = edge(EdgeLimits::default());
    let request = with(create("hang"), GRPC_TIMEOUT.as_str(), "20m");
    assert_eq!(refused(&patient, request).await, late);
    assert_eq!(ears.handled(), [("CreatePaymentIntent", Code::DeadlineExceeded)]);
    assert_eq!(patient.in_flight(), 0);

    let (hasty, _) = edge(EdgeLimits { deadline: Duration::from_millis(20), ..Default::default() });
    assert_eq!(refused(&hasty, with(create("hang"), GRPC_TIMEOUT.as_str(), "1H")).await, late);
    assert_eq!(refused(&hasty, create("hang")).await, late);
}

#[tokio::test]
async fn a_bad_deadline_names_the_header() {
    let (edge, _) = edge(EdgeLimits::default());
    for bad in ["", "5", "S", "123456789S", "-1S", "1s", "1.5S", "1 S", "5X"] {
        let (_, status, _) = send(&edge, with(create("ok"), GRPC_TIMEOUT.as_str(), bad)).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{bad}");
        let named = status.get_details_bad_request().unwrap();
        assert_eq!(named.field_violations[0].field, GRPC_TIMEOUT.as_str());
    }
}

#[test]
fn deadlines_have_six_units() {
    let parsed = |text: &str| parse_timeout(text.as_bytes());
    assert_eq!(parsed("2H"), Some(Duration::from_secs(7200)));
    assert_eq!(parsed("3M"), Some(Duration::from_secs(180)));
    assert_eq!(parsed("4S"), Some(Duration::from_secs(4)));
    assert_eq!(parsed("5m"), Some(Duration::from_millis(5)));
    assert_eq!(parsed("6u"), Some(Duration::from_micros(6)));
    assert_eq!(parsed("7n"), Some(Duration::from_nanos(7)));
    assert_eq!(parsed("0S"), Some(Duration::ZERO));
    assert_eq!(parsed("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
}

#[tokio::test]
async fn over_capacity_is_refused_at_once_and_health_still_answers() {
    let (edge, _) = edge(EdgeLimits { max_in_flight: 1, ..Default::default() });
    let service = edge.connection(CancellationToken::new());
    let mut first = Box::pin(service.call(create("hang")));
    assert!(timeout(Duration::from_millis(20), &mut first).await.is_err());
    assert_eq!(edge.in_flight(), 1);

    let (_, status, _) = send(&edge, create("ok")).await;
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(status.get_details_error_info().unwrap().reason, "OVERLOADED");
    assert!(status.get_details_retry_info().unwrap().retry_delay.is_some());
    let (_, health, _) = send(&edge, call("/grpc.health.v1.Health/Check", framed(0, 0, b""))).await;
    assert_eq!(health.code(), Code::Ok);

    // The first caller hangs up.
    drop(first);
    assert_eq!(edge.in_flight(), 0);
    assert_eq!(send(&edge, create("ok")).await.1.code(), Code::Ok);
}

#[tokio::test]
async fn a_held_call_gives_its_place_back_once() {
    let (edge, ears) = edge(EdgeLimits { max_in_flight: 1, ..Default::default() });
    let service = edge.connection(CancellationToken::new());
    let mut held = Box::pin(service.call(create("hold")));
    assert!(timeout(Duration::from_millis(20), &mut held).await.is_err());
    assert_eq!(edge.in_flight(), 0);
    assert_eq!(send(&edge, create("ok")).await.1.code(), Code::Ok);
    drop(held);
    assert_eq!(edge.in_flight(), 0);
    assert_eq!(ears.handled().last(), Some(&("CreatePaymentIntent", Code::Cancelled)));
}

#[tokio::test]
async fn a_panic_is_internal_and_counted_and_tells_nothing() {
    let (edge, ears) = edge(EdgeLimits::default());
    for (order, panics) in [("panic", 1), ("bug", 1)] {
        let (_, status, _) = send(&edge, create(order)).await;
        assert_eq!(status.code(), Code::Internal);
        assert_eq!(status.message(), "internal error");
        assert_eq!(status.get_details_error_info().unwrap().reason, "INTERNAL");
        assert_eq!(ears.panics(), panics);
    }
    assert_eq!(edge.in_flight(), 0);
    assert_eq!(send(&edge, create("ok")).await.1.code(), Code::Ok);
}

#[tokio::test]
async fn our_own_refusals_pass_unchanged() {
    let (edge, _) = edge(EdgeLimits::default());
    let (_, status, _) = send(&edge, create("invalid")).await;
    assert_eq!(status.get_details_error_info().unwrap().reason, "VALIDATION_FAILED");
    let named = status.get_details_bad_request().unwrap();
    assert_eq!(named.field_violations[0].field, "amount.currency");
}

#[tokio::test]
async fn a_stream_ends_with_its_connection() {
    let (edge, ears) = edge(EdgeLimits { deadline: Duration::ZERO, ..Default::default() });
    let ending = CancellationToken::new();
    let watch = call("/grpc.health.v1.Health/Watch", framed(0, 0, b""));
    let response = edge.connection(ending.clone()).call(watch).await.unwrap();
    let mut body = response.into_body();
    let first = timeout(SOON, body.frame()).await.unwrap().unwrap().unwrap();
    assert!(first.is_data());
    ending.cancel();
    let last = timeout(SOON, body.frame()).await.unwrap().unwrap().unwrap();
    let status = Status::from_header_map(last.trailers_ref().unwrap()).unwrap();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.get_details_error_info().unwrap().reason, "DRAINING");
    assert!(timeout(SOON, body.frame()).await.unwrap().is_none());
    assert_eq!(ears.handled(), [("Watch", Code::Ok)]);
}

#[tokio::test]
async fn a_stream_that_is_asked_for_badly_is_malformed() {
    let (edge, _) = edge(EdgeLimits::default());
    for body in [Bytes::new(), Bytes::from_static(&[0, 0, 0]), framed(1, 0, b"")] {
        let (code, reason) = refused(&edge, call("/grpc.health.v1.Health/Watch", body)).await;
        assert_eq!((code, reason.as_str()), (Code::InvalidArgument, "MALFORMED"));
    }
}

#[test]
fn a_trace_is_the_callers_or_new() {
    let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let trace = Trace::parse(good.as_bytes()).unwrap();
    assert_eq!(hex::encode(trace.trace_id), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(hex::encode(trace.parent_span), "b7ad6b7169203331");
    assert!(trace.sampled);
    assert!(!Trace::parse(good.replace("-01", "-02").as_bytes()).unwrap().sampled);
    assert!(Trace::parse(good.replacen("00", "01", 1).as_bytes()).is_some());
    assert!(Trace::parse(format!("{}-more", good.replacen("00", "01", 1)).as_bytes()).is_some());
    for bad in [
        String::new(),
        "00".to_owned(),
        good.to_uppercase(),
        format!("{good}-more"),
        good.replacen("00", "ff", 1),
        good.replacen('-', "_", 1),
        good.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
        good.replace("b7ad6b7169203331", &"0".repeat(16)),
        good.replace("0af7", "xyz7"),
        format!("{}é", &good[..54]),
    ] {
        assert_eq!(Trace::parse(bad.as_bytes()), None, "{bad}");
    }
    let (one, other) = (Trace::of(&HeaderMap::new()), Trace::of(&HeaderMap::new()));
    assert_ne!(one.trace_id, other.trace_id);
    assert!(!one.sampled);
}
