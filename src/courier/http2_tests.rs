//! HTTP/2: agreed on in TLS, and receivers that abuse it frame by frame.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
};
use tokio::{net::TcpStream, sync::mpsc, task::JoinSet};

use super::{
    Courier,
    connection::{Disposable, Life},
    receiver::{DEADLINE, NOW, parcel},
    tls,
    webhook::WebhookCourier,
    webhook_tests::{Counted, SECRET, attempt, connecting, settings},
};
use crate::domain::{
    delivery::{Attempted, Verdict},
    signature::Signer,
};

const RETRY: Verdict = Verdict::Retry { not_before: None };
/// Long enough for an attempt that is answered, on a machine that is busy.
const PATIENT: Duration = DEADLINE;
const IMPATIENT: Duration = Duration::from_millis(300);

// ---- Frames (RFC 9113) ----

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// `:status` in HPACK's static table.
const STATUS_200: &[u8] = &[0x88];
const STATUS_204: &[u8] = &[0x89];
const PREFACE_BYTES: usize = 24;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn no_content(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, STATUS_204)
}

fn goaway(last_stream: u32, code: u32) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[last_stream.to_be_bytes(), code.to_be_bytes()].concat())
}

/// A header of HPACK that takes `bytes` and is stored in no table.
fn header(bytes: usize) -> Vec<u8> {
    // 127 - 7 bits of the length in the first byte, the rest in groups of seven.
    let mut encoded = vec![0x00, 0x01, b'x', 0x7f];
    let mut rest = bytes - 127;
    while rest >= 128 {
        encoded.push(0x80 | u8::try_from(rest % 128).unwrap());
        rest /= 128;
    }
    encoded.push(u8::try_from(rest).unwrap());
    encoded.extend(vec![b'y'; bytes]);
    encoded
}

// ---- Receivers ----

/// What comes after a request.
enum Answer {
    Frames(Vec<u8>),
    /// The first once, then the second as fast as it goes, until the other side is gone.
    Flood(Vec<u8>, Vec<u8>),
    Close,
}

#[derive(Debug, PartialEq)]
enum Seen {
    Request { connection: usize, stream: u32 },
    Closed { connection: usize },
}

struct Http2 {
    addr: SocketAddr,
    seen: mpsc::UnboundedReceiver<Seen>,
}

type Script = Arc<dyn Fn(u32) -> Answer + Send + Sync>;

impl Http2 {
    /// `settings` are the receiver's own; the script is given the stream to answer.
    fn start(
        server: Option<Arc<ServerConfig>>,
        settings: &'static [u8],
        script: impl Fn(u32) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (sender, seen) = mpsc::unbounded_channel();
        let script: Script = Arc::new(script);
        // Ends with the test's process; each connection's thread with its connection.
        thread::spawn(move || {
            for connection in 0.. {
                let (stream, _) = listener.accept().unwrap();
                let (sender, script, server) =
                    (sender.clone(), Arc::clone(&script), server.clone());
                thread::spawn(move || {
                    // However it ends, that is what is told.
                    let _ = match server {
                        Some(config) => {
                            let tls = rustls::ServerConnection::new(config).unwrap();
                            let tls = rustls::StreamOwned::new(tls, stream);
                            serve(tls, settings, connection, &script, &sender)
                        }
                        None => serve(stream, settings, connection, &script, &sender),
                    };
                    sender.send(Seen::Closed { connection }).unwrap_or_default();
                });
            }
        });
        Self { addr, seen }
    }

    async fn next(&mut self) -> Seen {
        tokio::time::timeout(DEADLINE, self.seen.recv()).await.unwrap().unwrap()
    }

    /// HTTP/2 is spoken over TLS alone, or what passes for it here: see [`courier_to`].
    fn url(&self) -> String {
        format!("https://{}/hook", self.addr)
    }
}

fn serve(
    mut stream: impl Read + Write,
    settings: &[u8],
    connection: usize,
    script: &Script,
    seen: &mpsc::UnboundedSender<Seen>,
) -> io::Result<()> {
    stream.read_exact(&mut [0; PREFACE_BYTES])?;
    stream.write_all(&frame(SETTINGS, 0, 0, settings))?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        stream.read_exact(&mut payload)?;
        let (kind, flags) = (head[3], head[4]);
        let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        if kind == SETTINGS && flags == 0 {
            stream.write_all(&frame(SETTINGS, 1, 0, &[]))?;
        }
        if kind != DATA || flags & END_STREAM == 0 {
            continue;
        }
        seen.send(Seen::Request { connection, stream: id }).unwrap_or_default();
        match script(id) {
            Answer::Frames(bytes) => stream.write_all(&bytes)?,
            Answer::Flood(first, again) => {
                stream.write_all(&first)?;
                loop {
                    stream.write_all(&again)?;
                }
            }
            Answer::Close => return Ok(()),
        }
    }
}

/// Over plain TCP, as if TLS had agreed on HTTP/2; with what is read from the socket counted.
fn courier_to(addr: SocketAddr, timeout: Duration) -> (impl Courier + use<>, Arc<AtomicUsize>) {
    let read = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&read);
    let life = Life { age_max: DEADLINE, grace: timeout };
    let connect = tower::service_fn(move |_: http::Uri| {
        let read = Arc::clone(&counter);
        Box::pin(async move {
            let stream = TcpStream::connect(addr).await?;
            let counted = Counted { stream, read, is_http2: true };
            io::Result::Ok(Disposable::new(TokioIo::new(counted), life))
        })
    });
    (WebhookCourier::with_connector(connect, settings(timeout)), read)
}

/// What becomes of one attempt that is answered so.
async fn attempted(
    timeout: Duration,
    script: impl Fn(u32) -> Answer + Send + Sync + 'static,
) -> (Attempted, Http2, usize) {
    let receiver = Http2::start(None, &[], script);
    let (courier, read) = courier_to(receiver.addr, timeout);
    let done = attempt(&courier, parcel(1, Some(&receiver.url()))).await;
    drop(courier);
    (done, receiver, read.load(Ordering::SeqCst))
}

/// A server's identity, which speaks these protocols.
fn identity(protocols: &[&[u8]]) -> (CertificateDer<'static>, Arc<ServerConfig>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = made.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key.into())
        .unwrap();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    (certificate, Arc::new(config))
}

fn trusting(certificate: CertificateDer<'static>) -> impl Courier {
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let connector = connecting(tls::with_roots(roots), DEADLINE);
    WebhookCourier::with_connector(connector, settings(PATIENT))
}

// ---- What is agreed on ----

#[tokio::test]
async fn http2_is_spoken_where_the_receiver_agrees_and_its_connection_is_kept() {
    let (certificate, server) = identity(&[b"h2", b"http/1.1"]);
    let mut receiver = Http2::start(Some(server), &[], |id| Answer::Frames(no_content(id)));
    let courier = trusting(certificate);
    let url = format!("https://localhost:{}/hook", receiver.addr.port());
    for stream in [1, 3, 5] {
        let done = attempt(&courier, parcel(stream, Some(&url))).await;
        assert_eq!((done.attempt.http_status, done.verdict), (Some(204), Verdict::Accepted));
        assert_eq!(receiver.next().await, Seen::Request { connection: 0, stream });
    }
}

/// Each begins to connect before any knows that the receiver agrees to HTTP/2.
#[tokio::test]
async fn many_first_attempts_at_once_all_arrive() {
    const ATTEMPTS: u32 = 32;
    let (certificate, server) = identity(&[b"h2"]);
    let receiver = Http2::start(Some(server), &[], |id| Answer::Frames(no_content(id)));
    let courier = Arc::new(trusting(certificate));
    let url = format!("https://localhost:{}/hook", receiver.addr.port());
    let mut attempts = JoinSet::new();
    for n in 1..=ATTEMPTS {
        let (courier, parcel) = (Arc::clone(&courier), parcel(n, Some(&url)));
        attempts.spawn(async move { attempt(&*courier, parcel).await });
    }
    for done in attempts.join_all().await {
        assert_eq!(done.verdict, Verdict::Accepted, "{done:?}");
    }
}

#[tokio::test]
async fn http1_is_spoken_where_the_receiver_knows_nothing_else() {
    let (certificate, server) = identity(&[b"http/1.1"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://localhost:{}/hook", listener.local_addr().unwrap().port());
    let serving = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let tls = rustls::ServerConnection::new(server).unwrap();
        let mut stream = rustls::StreamOwned::new(tls, stream);
        let mut head = [0; 4096];
        let bytes = stream.read(&mut head).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
        String::from_utf8_lossy(&head[..bytes]).into_owned()
    });
    let done = attempt(&trusting(certificate), parcel(1, Some(&url))).await;
    assert_eq!(done.verdict, Verdict::Accepted, "{done:?}");
    let head = serving.join().unwrap();
    assert!(head.starts_with("POST /hook HTTP/1.1\r\n"), "{head}");
}

#[tokio::test]
async fn the_request_is_the_same_over_http2() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        let (parts, mut body) = request.into_parts();
        let mut bytes = Vec::new();
        // The connection moves only while it is polled.
        let mut rest = JoinSet::new();
        rest.spawn(async move { while connection.accept().await.is_some() {} });
        while let Some(data) = body.data().await {
            bytes.extend(data.unwrap());
        }
        respond.send_response(http::Response::new(()), true).unwrap();
        (parts, bytes, rest)
    });
    let (courier, _) = courier_to(addr, PATIENT);
    let sent = parcel(1, Some(&format!("http://{addr}/hook?a=b")));
    assert_eq!(attempt(&courier, sent.clone()).await.verdict, Verdict::Accepted);
    let (parts, body, _serving) = serving.join_next().await.unwrap().unwrap();
    assert_eq!(
        (parts.method.as_str(), parts.uri.path_and_query().unwrap().as_str()),
        ("POST", "/hook?a=b")
    );
    assert_eq!(parts.uri.authority().unwrap().as_str(), addr.to_string());
    assert_eq!(body, &sent.body[..]);
    let signer = Signer::new(&[SECRET]).unwrap();
    let seconds = NOW.seconds();
    for (name, value) in [
        ("content-type", "application/json".to_owned()),
        ("content-length", sent.body.len().to_string()),
        ("webhook-id", sent.event_id.clone()),
        ("webhook-timestamp", seconds.to_string()),
        ("webhook-signature", signer.standard(&sent.event_id, seconds, &sent.body)),
        ("x-webhook-signature", signer.legacy(&sent.body)),
    ] {
        assert_eq!(parts.headers[name], value, "{name}");
    }
    assert!(parts.headers["traceparent"].to_str().unwrap().contains(&"ab".repeat(16)));
}

// ---- Receivers that break off ----

#[tokio::test]
async fn a_receiver_that_breaks_off_is_a_reset() {
    const REFUSED_STREAM: u32 = 7;
    const ENHANCE_YOUR_CALM: u32 = 11;
    let reset = |code: u32| move |id| Answer::Frames(frame(RST_STREAM, 0, id, &code.to_be_bytes()));
    let away = |code| move |_| Answer::Frames(goaway(0, code));
    for (what, done) in [
        ("refused stream", attempted(PATIENT, reset(REFUSED_STREAM)).await),
        ("cancelled", attempted(PATIENT, reset(8)).await),
        ("internal error", attempted(PATIENT, reset(2)).await),
        ("going away", attempted(PATIENT, away(0)).await),
        ("be calm", attempted(PATIENT, away(ENHANCE_YOUR_CALM)).await),
        ("closed", attempted(PATIENT, |_| Answer::Close).await),
    ] {
        let (done, mut receiver, _) = done;
        assert_eq!(done.attempt.error.as_deref(), Some("RESET"), "{what}");
        assert_eq!((done.attempt.http_status, done.verdict), (None, RETRY), "{what}");
        assert!(matches!(receiver.next().await, Seen::Request { connection: 0, .. }));
        assert_eq!(receiver.next().await, Seen::Closed { connection: 0 }, "{what}: sent again");
    }
}

#[tokio::test]
async fn after_a_goaway_the_next_attempt_takes_a_new_connection() {
    let answer = |id| Answer::Frames([no_content(id), goaway(id, 0)].concat());
    let mut receiver = Http2::start(None, &[], answer);
    let (courier, _) = courier_to(receiver.addr, PATIENT);
    for connection in 0..3 {
        let done = attempt(&courier, parcel(1, Some(&receiver.url()))).await;
        assert_eq!(done.verdict, Verdict::Accepted, "{done:?}");
        assert_eq!(receiver.next().await, Seen::Request { connection, stream: 1 });
        assert_eq!(receiver.next().await, Seen::Closed { connection });
    }
}

// ---- Receivers that break the rules ----

/// What it is, and the bytes that answer a stream.
type Case = (&'static str, fn(u32) -> Vec<u8>);

#[tokio::test]
async fn what_breaks_the_protocol_is_malformed() {
    let answers: [Case; 9] = [
        ("no HTTP/2", |_| b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_vec()),
        ("a frame too long", |id| frame(DATA, 0, id, &[0; 17 * 1024])),
        ("a body before its head", |id| frame(DATA, 0, id, b"x")),
        ("a stream that nobody opened", |id| frame(HEADERS, END_HEADERS, id + 2, STATUS_200)),
        ("no status", |id| frame(HEADERS, END_HEADERS, id, &[])),
        ("no HPACK", |id| frame(HEADERS, END_HEADERS, id, &[0xff; 16])),
        ("a push", |id| frame(PUSH_PROMISE, END_HEADERS, id, &[0, 0, 0, 2, 0x88])),
        ("a continuation of nothing", |id| frame(CONTINUATION, END_HEADERS, id, STATUS_200)),
        ("a window beyond its end", |_| frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff])),
    ];
    for (what, bytes) in answers {
        let (done, ..) = attempted(PATIENT, move |id| Answer::Frames(bytes(id))).await;
        let seen = (done.attempt.error.as_deref(), done.verdict);
        assert_eq!(seen, (Some("MALFORMED_REPLY"), RETRY), "{what}");
    }
}

/// A head's bound, the frames read ahead, and what the socket's buffers hold beside them.
const HEAD_READ_MAX_BYTES: usize = 256 * 1024;

#[tokio::test]
async fn a_head_without_end_is_given_up() {
    let long = |id| {
        let first = frame(HEADERS, 0, id, &[STATUS_200, &header(4_000)].concat());
        Answer::Flood(first, frame(CONTINUATION, 0, id, &header(4_000)))
    };
    let empty =
        |id| Answer::Flood(frame(HEADERS, 0, id, STATUS_200), frame(CONTINUATION, 0, id, &[]));
    for (what, done) in
        [("long", attempted(PATIENT, long).await), ("empty", attempted(PATIENT, empty).await)]
    {
        let (done, _, read) = done;
        let seen = (done.attempt.error.as_deref(), done.verdict);
        assert_eq!(seen, (Some("MALFORMED_REPLY"), RETRY), "{what}");
        assert!(read <= HEAD_READ_MAX_BYTES, "{what}: {read} bytes read");
    }
}

/// The connection's window, the frames read ahead, and the head.
const BODY_READ_MAX_BYTES: usize = (256 + 64) * 1024;

#[tokio::test]
async fn a_long_body_is_not_read() {
    let (done, mut receiver, read) = attempted(PATIENT, |id| {
        let body: Vec<u8> = (0..64).flat_map(|_| frame(DATA, 0, id, &[b'x'; 16 * 1024])).collect();
        Answer::Frames([frame(HEADERS, END_HEADERS, id, STATUS_200), body].concat())
    })
    .await;
    assert_eq!((done.attempt.http_status, done.verdict), (Some(200), Verdict::Accepted));
    assert!(read <= BODY_READ_MAX_BYTES, "{read} bytes read");
    assert!(matches!(receiver.next().await, Seen::Request { .. }));
    assert_eq!(receiver.next().await, Seen::Closed { connection: 0 });
}

#[tokio::test]
async fn chatter_instead_of_an_answer_ends_with_the_attempt() {
    let answers: [Case; 5] = [
        ("pings", |_| frame(PING, 0, 0, &[0; 8])),
        ("settings", |_| frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100])),
        ("windows", |_| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])),
        ("frames of no known kind", |_| frame(0xee, 0, 0, &[0; 512])),
        ("interim answers", |id| frame(HEADERS, END_HEADERS, id, &[0x08, 3, b'1', b'0', b'3'])),
    ];
    for (what, again) in answers {
        let (done, mut receiver, _) =
            attempted(IMPATIENT, move |id| Answer::Flood(Vec::new(), again(id))).await;
        assert_eq!(done.verdict, RETRY, "{what}");
        assert_eq!(done.attempt.http_status, None, "{what}");
        assert!(matches!(receiver.next().await, Seen::Request { .. }));
        assert_eq!(receiver.next().await, Seen::Closed { connection: 0 }, "{what}");
    }
}

// ---- Receivers that do not answer ----

#[tokio::test]
async fn a_connection_without_an_answer_in_time_is_left_and_ends() {
    let mut receiver = Http2::start(None, &[], |_| Answer::Frames(Vec::new()));
    let (courier, _) = courier_to(receiver.addr, IMPATIENT);
    for connection in 0..2 {
        let done = attempt(&courier, parcel(1, Some(&receiver.url()))).await;
        assert_eq!((done.attempt.error.as_deref(), done.verdict), (Some("TIMEOUT"), RETRY));
        // The one before is left at once; that it ends may be seen before or after.
        while receiver.next().await != (Seen::Request { connection, stream: 1 }) {}
    }
    while receiver.next().await != (Seen::Closed { connection: 1 }) {}
}

#[tokio::test]
async fn a_receiver_that_permits_no_stream_holds_no_connection() {
    const NO_STREAMS: &[u8] = &[0, 3, 0, 0, 0, 0];
    let mut receiver = Http2::start(None, NO_STREAMS, |id| Answer::Frames(no_content(id)));
    let (courier, _) = courier_to(receiver.addr, IMPATIENT);
    let (mut timed_out, mut closed) = (0, 0);
    // The first on a connection may be sent before the settings have come.
    while timed_out < 3 {
        let done = attempt(&courier, parcel(1, Some(&receiver.url()))).await;
        timed_out += usize::from(done.attempt.error.as_deref() == Some("TIMEOUT"));
    }
    while closed < timed_out {
        closed += usize::from(matches!(receiver.next().await, Seen::Closed { .. }));
    }
}
