use std::{
    io::{self, Read, Write},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use rustls::{
    ClientConfig, ServerConfig,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{
    Courier, Parcel,
    connect::{ConnectSettings, Connector, connector},
    connection::{Disposable, Life},
    receiver::{Answer, DEADLINE, NOW, Receiver, Seen, deaf_port, parcel},
    tls,
    webhook::{Origin, WebhookCourier, WebhookSettings, origin},
};
use crate::{
    clock::{Clock, SystemClock},
    domain::{
        delivery::{Attempted, Verdict},
        signature::Signer,
        time::Timestamp,
    },
    egress::{AllowedNetworks, Policy},
};

pub const SECRET: &str = "a test's secret, 24 bytes at least";
const EMPTY_OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
const RETRY: Verdict = Verdict::Retry { not_before: None };

pub fn settings(timeout: Duration) -> WebhookSettings {
    WebhookSettings { signer: Signer::new(&[SECRET]).unwrap(), timeout, idle_per_origin: 64 }
}

/// As in development.
pub fn policy() -> Policy {
    Policy { networks: AllowedNetworks::parse("127.0.0.0/8,::1").unwrap(), ..Default::default() }
}

fn courier() -> WebhookCourier {
    WebhookCourier::new(policy(), settings(DEADLINE))
}

pub fn connecting(tls: ClientConfig, connect_max: Duration) -> Connector {
    connector(ConnectSettings { tls, policy: policy(), connect_max, attempt_max: DEADLINE })
}

pub async fn attempt(courier: &impl Courier, parcel: Parcel) -> Attempted {
    let done = tokio::time::timeout(2 * DEADLINE, courier.attempt(&[parcel], NOW)).await.unwrap();
    assert_eq!(done.len(), 1);
    done.into_iter().next().unwrap()
}

async fn post(url: &str) -> Attempted {
    attempt(&courier(), parcel(1, Some(url))).await
}

/// What an attempt makes of a reply: status, error, verdict.
async fn judged(answer: fn() -> Answer) -> (Option<u16>, Option<String>, Verdict) {
    let receiver = Receiver::start(move |_, _| answer()).await;
    let done = post(&receiver.url()).await;
    (done.attempt.http_status, done.attempt.error, done.verdict)
}

async fn judged_text(reply: String) -> (Option<u16>, Option<String>, Verdict) {
    let receiver = Receiver::always(&reply).await;
    let done = post(&receiver.url()).await;
    (done.attempt.http_status, done.attempt.error, done.verdict)
}

fn failed(status: Option<u16>, error: &str) -> (Option<u16>, Option<String>, Verdict) {
    (status, Some(error.to_owned()), RETRY)
}

#[tokio::test]
async fn the_request_carries_what_the_contract_says_and_verifies_off_the_shelf() {
    let mut receiver = Receiver::always(EMPTY_OK).await;
    let sent = parcel(1, Some(&receiver.url()));
    let now = Timestamp::from_ms(SystemClock.now_ms());
    let done = courier().attempt(std::slice::from_ref(&sent), now).await;
    assert_eq!(done[0].verdict, Verdict::Accepted);
    assert_eq!((done[0].attempt.at, done[0].attempt.http_status), (now, Some(200)));

    let Seen { path, headers, body, .. } = receiver.next().await;
    assert_eq!((path.as_str(), &body[..]), ("/hook", &sent.body[..]));
    assert_eq!(headers["content-type"], "application/json");
    assert_eq!(headers["user-agent"], format!("payment-sim/{}", env!("CARGO_PKG_VERSION")));
    assert_eq!(headers["webhook-id"], sent.event_id);
    assert_eq!(headers["webhook-timestamp"], now.seconds().to_string());
    assert_eq!(headers["host"], receiver.addr.to_string());
    let legacy = Signer::new(&[SECRET]).unwrap().legacy(&body);
    assert_eq!(headers["x-webhook-signature"], legacy);

    let verifier = standardwebhooks::Webhook::new(&STANDARD.encode(SECRET)).unwrap();
    verifier.verify(&body, &headers).unwrap();
    let mut changed = body.clone();
    changed[3] ^= 1;
    assert!(verifier.verify(&changed, &headers).is_err(), "a changed byte was accepted");
}

#[tokio::test]
async fn a_repeat_has_the_same_id_and_body_and_a_fresh_timestamp_and_signature() {
    let mut receiver = Receiver::always("HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n").await;
    let sent = [parcel(1, Some(&receiver.url()))];
    let courier = courier();
    courier.attempt(&sent, NOW).await;
    courier.attempt(&sent, NOW.plus_ms(3_000)).await;
    let (first, second) = (receiver.next().await, receiver.next().await);
    assert_eq!(first.body, second.body);
    for same in ["webhook-id", "x-webhook-signature", "content-type", "user-agent"] {
        assert_eq!(first.headers[same], second.headers[same], "{same}");
    }
    assert_eq!(second.headers["webhook-timestamp"], (NOW.seconds() + 3).to_string());
    for fresh in ["webhook-timestamp", "webhook-signature", "traceparent"] {
        assert_ne!(first.headers[fresh], second.headers[fresh], "{fresh}");
    }
    let trace = first.headers["traceparent"].to_str().unwrap();
    assert!(trace.starts_with(&format!("00-{}-", "ab".repeat(16))) && trace.ends_with("-01"));
    assert!(!trace.contains(&"cd".repeat(8)), "the span is the attempt's own: {trace}");
}

#[tokio::test]
async fn without_a_trace_no_header_is_made_up() {
    let mut receiver = Receiver::always(EMPTY_OK).await;
    let bare = Parcel { trace: Default::default(), ..parcel(1, Some(&receiver.url())) };
    attempt(&courier(), bare).await;
    assert!(!receiver.next().await.headers.contains_key("traceparent"));
}

#[tokio::test]
async fn connections_are_used_again() {
    let mut receiver = Receiver::always("HTTP/1.1 202 Ok\r\ncontent-length: 3\r\n\r\nyes").await;
    let courier = courier();
    for n in 1..=5 {
        attempt(&courier, parcel(n, Some(&receiver.url()))).await;
        assert_eq!(receiver.next().await.connection, 0, "request {n}");
    }
}

#[tokio::test]
async fn any_2xx_is_accepted() {
    for status in [200, 201, 202, 299] {
        let reply = format!("HTTP/1.1 {status} Fine\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(judged_text(reply).await, (Some(status), None, Verdict::Accepted));
    }
    let reply = "HTTP/1.1 204 No Content\r\n\r\n".to_owned();
    assert_eq!(judged_text(reply).await, (Some(204), None, Verdict::Accepted));
}

#[tokio::test]
async fn any_other_status_is_tried_again() {
    for status in [301, 302, 307, 308, 400, 401, 404, 409, 422, 429, 500, 502, 503] {
        // Back to where it came from: had it been followed, a second request would be seen.
        let reply =
            format!("HTTP/1.1 {status} No\r\nlocation: /other\r\ncontent-length: 6\r\n\r\nsecret");
        let mut receiver = Receiver::always(&reply).await;
        let done = post(&receiver.url()).await;
        let seen = (done.attempt.http_status, done.attempt.error, done.verdict);
        assert_eq!(seen, failed(Some(status), &format!("HTTP {status}")));
        assert_eq!(receiver.next().await.path, "/hook");
        assert!(receiver.seen.try_recv().is_err(), "{status} was followed");
    }
}

#[tokio::test]
async fn gone_ends_this_delivery() {
    let reply = "HTTP/1.1 410 Gone\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n".to_owned();
    assert_eq!(judged_text(reply).await, (Some(410), Some("GONE".into()), Verdict::Refused));
}

#[tokio::test]
async fn retry_after_is_read_as_seconds_or_date_on_any_failure() {
    for (status, value) in [(429, "7"), (503, " 7 "), (302, "7")] {
        let reply =
            format!("HTTP/1.1 {status} No\r\nretry-after: {value}\r\ncontent-length: 0\r\n\r\n");
        let receiver = Receiver::always(&reply).await;
        let done = post(&receiver.url()).await;
        let replied = NOW.plus_ms(done.attempt.latency_ms.into());
        let Verdict::Retry { not_before: Some(at) } = done.verdict else { panic!("{done:?}") };
        // The latency is kept in whole milliseconds, and may be cut by one here.
        assert!(
            (replied.plus_ms(7_000)..=replied.plus_ms(7_001)).contains(&at),
            "{status}: {at:?}"
        );
    }
    let cases = [
        ("Thu, 01 Jan 2026 00:10:00 GMT", Some(Timestamp::from_ms(1_767_226_200_000))),
        ("99999999999999999999999999", Some(Timestamp::from_ms(i64::MAX))),
        ("-3", None),
        ("soon", None),
        ("", None),
        ("1.5", None),
    ];
    for (value, not_before) in cases {
        let reply = format!("HTTP/1.1 429 No\r\nretry-after: {value}\r\ncontent-length: 0\r\n\r\n");
        let (_, _, verdict) = judged_text(reply).await;
        assert_eq!(verdict, Verdict::Retry { not_before }, "{value}");
    }
}

#[tokio::test]
async fn a_reply_that_breaks_off_is_a_reset() {
    for answer in [
        || Answer::Reset(b"HTTP/1.1 200 OK\r\ncont".to_vec()),
        || Answer::Reset(Vec::new()),
        || Answer::Close(b"HTTP/1.1 200 OK\r\ncont".to_vec()),
        || Answer::Close(Vec::new()),
    ] {
        assert_eq!(judged(answer).await, failed(None, "RESET"));
    }
}

#[tokio::test]
async fn garbage_is_malformed() {
    for answer in [
        || Answer::Keep(b"\x00\x01\x02 what?\r\n\r\n".to_vec()),
        || Answer::Keep(b"HTTP/1.1 20000 OK\r\n\r\n".to_vec()),
        || Answer::Keep(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
        || Answer::Keep([b"HTTP/1.1 200 OK\r\nx: ".to_vec(), vec![b'y'; 200 * 1024]].concat()),
    ] {
        assert_eq!(judged(answer).await, failed(None, "MALFORMED_REPLY"));
    }
}

#[tokio::test]
async fn the_status_is_the_answer_whatever_comes_of_the_body() {
    const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nxxx";
    assert_eq!(judged(|| Answer::Reset(HEAD.into())).await, (Some(200), None, Verdict::Accepted));
    assert_eq!(judged(|| Answer::Close(HEAD.into())).await, (Some(200), None, Verdict::Accepted));

    let endless = || Answer::Drip(b"HTTP/1.1 503 No\r\nretry-after: soon\r\n\r\n".to_vec());
    let mut receiver = Receiver::start(move |_, _| endless()).await;
    let done = post(&receiver.url()).await;
    assert_eq!(done.attempt.error.as_deref(), Some("HTTP 503"));
    tokio::time::timeout(DEADLINE, receiver.cut.recv()).await.unwrap().unwrap();
}

#[tokio::test]
async fn no_answer_in_time_is_a_timeout_and_the_connection_is_given_up() {
    let impatient = WebhookCourier::new(policy(), settings(Duration::from_millis(300)));
    let mut receiver = Receiver::start(|n, _| match n {
        0 => Answer::Hang,
        1 => Answer::Drip(b"HTTP/1.1 200 OK\r\nx: ".to_vec()),
        _ => Answer::Keep(EMPTY_OK.into()),
    })
    .await;
    for connection in 0..2 {
        let done = attempt(&impatient, parcel(1, Some(&receiver.url()))).await;
        let seen = (done.attempt.http_status, done.attempt.error, done.verdict);
        assert_eq!(seen, failed(None, "TIMEOUT"));
        assert!(done.attempt.latency_ms >= 300);
        assert_eq!(receiver.next().await.connection, connection);
    }
    tokio::time::timeout(DEADLINE, receiver.cut.recv()).await.unwrap().unwrap();
    attempt(&courier(), parcel(1, Some(&receiver.url()))).await;
    assert_eq!(receiver.next().await.connection, 2);
}

#[tokio::test]
async fn a_connection_that_is_old_is_given_up_by_one_attempt_in_sixteen() {
    let mut receiver = Receiver::always(EMPTY_OK).await;
    let addr = receiver.addr;
    // Old as soon as it is there.
    let life = Life { age_max: Duration::ZERO, grace: DEADLINE };
    let connect = tower::service_fn(move |_: http::Uri| {
        Box::pin(async move {
            let stream = TcpStream::connect(addr).await?;
            io::Result::Ok(Disposable::new(TokioIo::new(stream), life))
        })
    });
    let courier = WebhookCourier::with_connector(connect, settings(DEADLINE));
    let mut expected = 0;
    for n in 1..=100 {
        attempt(&courier, parcel(n, Some(&receiver.url()))).await;
        let seen = receiver.next().await;
        assert_eq!(seen.connection, expected, "request {n}");
        if seen.headers["x-webhook-signature"].as_bytes().ends_with(b"0") {
            expected += 1;
        }
    }
    assert!((1..50).contains(&expected), "{expected} of 100");
}

/// Counts what is read from the socket.
pub struct Counted {
    pub stream: TcpStream,
    pub read: Arc<AtomicUsize>,
    /// As if the receiver had agreed to HTTP/2 in TLS.
    pub is_http2: bool,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let done = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.read.fetch_add(buf.filled().len() - before, Ordering::SeqCst);
        done
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connection for Counted {
    fn connected(&self) -> Connected {
        let connected = Connected::new();
        if self.is_http2 { connected.negotiated_h2() } else { connected }
    }
}

/// The body's bound, the piece that passes it, those read ahead, and the head.
const READ_MAX_BYTES: usize = (64 + 4 * 16) * 1024;

#[tokio::test]
async fn a_long_body_is_not_read() {
    const MIB: usize = 1 << 20;
    let announced = format!("HTTP/1.1 200 OK\r\ncontent-length: {MIB}\r\n\r\n");
    let answers = [
        Answer::Keep([announced.into_bytes(), vec![b'x'; MIB]].concat()),
        Answer::Flood(b"HTTP/1.1 200 OK\r\n\r\n".to_vec()),
        Answer::Flood(
            b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n7fffffff\r\n".to_vec(),
        ),
    ];
    for answer in answers {
        let answer = std::sync::Mutex::new(Some(answer));
        let flooded = !matches!(*answer.lock().unwrap(), Some(Answer::Keep(_)));
        let mut receiver =
            Receiver::start(move |_, _| answer.lock().unwrap().take().unwrap()).await;
        let read = Arc::new(AtomicUsize::new(0));
        let (counter, to) = (Arc::clone(&read), receiver.addr);
        let connect = tower::service_fn(move |_: http::Uri| {
            let read = Arc::clone(&counter);
            Box::pin(async move {
                let stream = TcpStream::connect(to).await?;
                io::Result::Ok(TokioIo::new(Counted { stream, read, is_http2: false }))
            })
        });
        let courier = WebhookCourier::with_connector(connect, settings(DEADLINE));
        let done = attempt(&courier, parcel(1, Some(&receiver.url()))).await;
        assert!(done.attempt.http_status.is_some(), "{done:?}");
        if flooded {
            tokio::time::timeout(DEADLINE, receiver.cut.recv()).await.unwrap().unwrap();
        }
        drop(courier);
        let read = read.load(Ordering::SeqCst);
        assert!(read <= READ_MAX_BYTES, "{read} bytes read");
    }
}

#[tokio::test]
async fn failures_to_connect_have_names() {
    let (_socket, addr) = deaf_port();
    let done = post(&format!("http://{addr}/")).await;
    assert_eq!(done.attempt.error.as_deref(), Some("CONNECT_REFUSED"));
    assert_eq!(done.verdict, RETRY);

    // A label of more than 63 characters is refused by the resolver without asking anyone.
    let done = post(&format!("http://{}.test/", "a".repeat(64))).await;
    assert_eq!(done.attempt.error.as_deref(), Some("DNS"));

    // Takes the connection and says nothing in TLS.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let https = format!("https://{}/", listener.local_addr().unwrap());
    let hasty = connecting(tls::with_native_roots(), Duration::from_millis(50));
    let courier = WebhookCourier::with_connector(hasty, settings(DEADLINE));
    let done = attempt(&courier, parcel(1, Some(&https))).await;
    assert_eq!(done.attempt.error.as_deref(), Some("CONNECT_TIMEOUT"));
}

#[tokio::test]
async fn what_is_not_tls_is_named_so() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let https = format!("https://{}/", listener.local_addr().unwrap());
    let plain = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut hello = [0; 1024];
        tokio::io::AsyncReadExt::read(&mut stream, &mut hello).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, EMPTY_OK.as_bytes()).await.unwrap();
        stream
    };
    let (done, _stream) = tokio::join!(post(&https), plain);
    assert_eq!(done.attempt.error.as_deref(), Some("TLS"));
    assert_eq!(done.verdict, RETRY);
}

/// Serves one https request on a thread of its own; the certificate is its own authority's.
fn https_receiver() -> (CertificateDer<'static>, String, thread::JoinHandle<io::Result<usize>>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let config =
        ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key.into())
            .unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://localhost:{}/hook", listener.local_addr().unwrap().port());
    let serving = thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let connection =
            rustls::ServerConnection::new(Arc::new(config)).map_err(io::Error::other)?;
        let mut tls = rustls::StreamOwned::new(connection, stream);
        let bytes = tls.read(&mut [0; 4096])?;
        tls.write_all(EMPTY_OK.as_bytes())?;
        Ok(bytes)
    });
    (certificate, url, serving)
}

#[tokio::test]
async fn https_is_spoken_with_whom_the_roots_vouch_for_and_nobody_else() {
    let (certificate, url, serving) = https_receiver();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).unwrap();
    let trusting = connecting(tls::with_roots(roots.clone()), DEADLINE);
    let courier = WebhookCourier::with_connector(trusting, settings(DEADLINE));
    let done = attempt(&courier, parcel(1, Some(&url))).await;
    assert_eq!(done.verdict, Verdict::Accepted, "{done:?}");
    assert!(serving.join().unwrap().unwrap() > 0);

    let (_other, url, serving) = https_receiver();
    let done = attempt(&courier, parcel(1, Some(&url))).await;
    assert_eq!((done.attempt.error.as_deref(), done.verdict), (Some("TLS"), RETRY));
    assert!(serving.join().unwrap().is_err(), "something was sent to a stranger");
}

#[tokio::test]
async fn without_root_certificates_http_works() {
    let receiver = Receiver::always(EMPTY_OK).await;
    let rootless = connecting(tls::with_roots(rustls::RootCertStore::empty()), DEADLINE);
    let courier = WebhookCourier::with_connector(rootless, settings(DEADLINE));
    let done = attempt(&courier, parcel(1, Some(&receiver.url()))).await;
    assert_eq!(done.verdict, Verdict::Accepted);
}

#[tokio::test]
async fn a_url_that_cannot_be_called_is_refused_without_a_call() {
    for url in
        ["", "no url", "ftp://host/", "file:///etc/passwd", "http://", "http://[::1", "mailto:a@b"]
    {
        let done = post(url).await;
        assert_eq!(
            (done.attempt.error.as_deref(), done.verdict),
            (Some("BAD_URL"), Verdict::Refused),
            "{url}"
        );
    }
    let done = attempt(&courier(), parcel(1, None)).await;
    assert_eq!(done.attempt.error.as_deref(), Some("NO_WEBHOOK_URL"));
}

#[tokio::test]
async fn odd_but_valid_urls_are_called() {
    let mut receiver = Receiver::always(EMPTY_OK).await;
    for path in ["/a b|c\"{}^`<>", "/한글?q=값&r=[1]", "?x", "/%2e%2e/%00"] {
        let done = post(&format!("http://{}{path}", receiver.addr)).await;
        assert_eq!(done.verdict, Verdict::Accepted, "{path}");
        receiver.next().await;
    }
}

#[test]
fn origins_are_spelled_in_one_way() {
    let of = |scheme: &str, host: &str, port| {
        Some(Origin { scheme: scheme.into(), host: host.into(), port })
    };
    assert_eq!(origin("HTTP://Example.COM/a?b"), of("http", "example.com", 80));
    assert_eq!(origin("http://example.com:80/"), of("http", "example.com", 80));
    assert_eq!(origin("https://example.com"), of("https", "example.com", 443));
    assert_eq!(origin("http://0x7f.1:8080/"), of("http", "127.0.0.1", 8080));
    assert_eq!(origin("http://[::1]:9/"), of("http", "[::1]", 9));
    assert_eq!(origin("mailto:a@b"), None);
    assert_eq!(origin("nonsense"), None);
}
