use std::future::{pending, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use h2::client;
use http::HeaderMap;
use hyper::service::service_fn;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::edge::testbed::SOON;
use crate::server::tests::{EMPTY_SETTINGS, PING, PREFACE, frame};

const FRAMES: usize = 8;
const FRAME_BYTES: usize = 40_000;
/// Of a stream and a connection, where nobody says otherwise (RFC 9113, 6.9.2).
const WINDOW_BYTES: usize = 65_535;

/// Several frames, and trailers.
struct Long {
    left: usize,
    asked: Arc<AtomicUsize>,
    /// Closed with it.
    _alive: oneshot::Sender<()>,
}

impl Body for Long {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let frame = match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Frame::data(Bytes::from(vec![0; FRAME_BYTES]))
            }
            None => Frame::trailers(HeaderMap::new()),
        };
        Poll::Ready(Some(Ok(frame)))
    }
}

async fn client<S, B>(service: S) -> client::SendRequest<Bytes>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Send + 'static,
    S::Future: Send + Unpin + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
{
    connect(service, Limits::default()).await.0
}

/// Serves one connection, and connects to it.
#[allow(clippy::disallowed_methods, reason = "it ends with the test's client")]
async fn served<S, B>(service: S, limits: Limits) -> (TcpStream, JoinHandle<()>)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Send + 'static,
    S::Future: Send + Unpin + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (served, _) = listener.accept().await.unwrap();
    let (ending, tasks) = (CancellationToken::new(), TaskTracker::new());
    (tcp, tokio::spawn(converse(served, service, limits, ending, tasks)))
}

/// The client's side ends with the connection.
#[allow(clippy::disallowed_methods, reason = "it ends with the test's client")]
async fn connect<S, B>(
    service: S,
    limits: Limits,
) -> (client::SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Send + 'static,
    S::Future: Send + Unpin + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
{
    let (tcp, _serving) = served(service, limits).await;
    let (client, connection) = client::handshake(tcp).await.unwrap();
    let connection = tokio::spawn(connection);
    (client.ready().await.unwrap(), connection)
}

fn get() -> Request<()> {
    Request::get("http://service/").body(()).unwrap()
}

/// A service that answers one request with a long body, what that was asked for, and its end.
fn long() -> (
    impl Service<
        Request<Incoming>,
        Response = Response<Long>,
        Error = Infallible,
        Future: Send + Unpin + 'static,
    > + Send,
    Arc<AtomicUsize>,
    oneshot::Receiver<()>,
) {
    let (alive, ended) = oneshot::channel();
    let asked = Arc::new(AtomicUsize::new(0));
    let alive = std::sync::Mutex::new(Some(alive));
    let counted = Arc::clone(&asked);
    let service = service_fn(move |_| {
        let alive = alive.lock().unwrap().take().unwrap();
        let body = Long { left: FRAMES, asked: Arc::clone(&counted), _alive: alive };
        ready(Ok(Response::new(body)))
    });
    (service, asked, ended)
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(SOON, what).await.unwrap()
}

/// Takes of a body what fits into the window, and says so to nobody.
async fn fill_window(body: &mut RecvStream) {
    let mut taken = 0;
    while taken < WINDOW_BYTES {
        taken += soon(body.data()).await.unwrap().unwrap().len();
    }
}

#[tokio::test]
async fn a_body_is_asked_for_no_more_than_its_client_takes_and_comes_whole() {
    let (service, asked, _ended) = long();
    let (response, _) = client(service).await.send_request(get(), true).unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    fill_window(&mut body).await;
    // The second began to fit, and the third waits.
    assert_eq!(asked.load(Ordering::SeqCst), 3);
    let mut taken = WINDOW_BYTES;
    body.flow_control().release_capacity(taken).unwrap();
    while let Some(data) = soon(body.data()).await {
        let length = data.unwrap().len();
        body.flow_control().release_capacity(length).unwrap();
        taken += length;
    }
    assert_eq!(taken, FRAMES * FRAME_BYTES);
    assert!(soon(body.trailers()).await.unwrap().is_some());
}

#[tokio::test]
async fn a_reply_ends_when_its_client_has_enough_of_it() {
    let (service, _, ended) = long();
    let (response, mut request) = client(service).await.send_request(get(), false).unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    fill_window(&mut body).await;
    request.send_reset(Reason::CANCEL);
    assert!(soon(ended).await.is_err(), "it was dropped");
}

/// Fails after its first frame.
struct Broken(bool);

impl Body for Broken {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        let has_begun = std::mem::replace(&mut self.0, true);
        Poll::Ready(Some(match has_begun {
            true => Err("broken"),
            false => Ok(Frame::data(Bytes::from_static(b"half"))),
        }))
    }
}

#[tokio::test]
async fn a_reply_that_breaks_is_reset() {
    let service = service_fn(|_| ready(Ok(Response::new(Broken(false)))));
    let (response, _) = client(service).await.send_request(get(), true).unwrap();
    let error = match soon(response).await {
        Err(error) => error,
        Ok(response) => {
            let mut body = response.into_body();
            loop {
                if let Err(error) = soon(body.data()).await.expect("it does not end well") {
                    break error;
                }
            }
        }
    };
    assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
}

/// Else each reply of 256 bytes and more is a write of its own.
#[tokio::test]
async fn h2_gathers_replies() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    assert!(tcp.is_write_vectored() && !Wire::new(tcp).is_write_vectored());
}

#[tokio::test]
async fn a_handler_ends_when_its_client_waits_no_longer() {
    let (begun, has_begun) = oneshot::channel();
    let (alive, ended) = oneshot::channel::<()>();
    let once = std::sync::Mutex::new(Some((begun, alive)));
    let service = service_fn(move |_| {
        let (begun, alive) = once.lock().unwrap().take().unwrap();
        begun.send(()).unwrap();
        Box::pin(async move {
            let _alive = alive;
            pending::<Result<Response<Long>, Infallible>>().await
        })
    });
    let (response, mut request) = client(service).await.send_request(get(), false).unwrap();
    soon(has_begun).await.unwrap();
    request.send_reset(Reason::CANCEL);
    assert!(soon(ended).await.is_err(), "it was dropped");
    assert!(soon(response).await.is_err());
}

/// A GET of "/" that is all of its stream, in the fewest bytes.
fn request(stream: u8) -> Vec<u8> {
    const HEADERS: u8 = 1;
    const END_OF_STREAM_AND_HEADERS: u8 = 5;
    // Rows of HPACK's static table (RFC 7541, A): GET, http, "/"; then an authority.
    let fields = [&[0x82, 0x86, 0x84, 0x41, 7][..], b"service"].concat();
    let length = u8::try_from(fields.len()).unwrap();
    [&[0, 0, length, HEADERS, END_OF_STREAM_AND_HEADERS, 0, 0, 0, stream], &fields[..]].concat()
}

fn greeting() -> Vec<u8> {
    [&PREFACE[..], &EMPTY_SETTINGS].concat()
}

#[tokio::test]
async fn who_still_sends_when_all_is_said_is_not_reset() {
    const ACKNOWLEDGED: u8 = 1;
    let limits = Limits { idle: Duration::from_millis(50), ..Limits::default() };
    let never = service_fn(|_| pending::<Result<Response<Long>, Infallible>>());
    let (mut tcp, serving) = served(never, limits).await;
    tcp.write_all(&greeting()).await.unwrap();
    let opaque = loop {
        let (kind, payload) = frame(&mut tcp).await;
        if kind == PING {
            break payload;
        }
    };
    let pong = [&[0, 0, 8, PING, ACKNOWLEDGED, 0, 0, 0, 0][..], &opaque].concat();
    tcp.write_all(&pong).await.unwrap();
    // To the end of what it is told.
    soon(tcp.read_to_end(&mut Vec::new())).await.unwrap();
    for _ in 0..100 {
        soon(tcp.write_all(&[0; 10_000])).await.unwrap();
    }
    soon(serving).await.unwrap();
}

/// It never answers one: it would be closed.
#[tokio::test]
async fn who_goes_on_asking_is_not_pinged() {
    const REQUESTS: u8 = 100;
    let limits = Limits {
        ping: Duration::from_secs(1),
        pong: Duration::from_millis(250),
        ..Limits::default()
    };
    let answered = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&answered);
    let service = service_fn(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        ready(Ok(Response::new(Broken(true))))
    });
    let (mut tcp, _serving) = served(service, limits).await;
    tcp.write_all(&greeting()).await.unwrap();
    // Longer together than a ping and the time to answer it.
    for n in 0..REQUESTS {
        tcp.write_all(&request(2 * n + 1)).await.unwrap();
        sleep(Duration::from_millis(15)).await;
    }
    assert_eq!(answered.load(Ordering::SeqCst), usize::from(REQUESTS));
}

#[tokio::test]
async fn a_request_in_flight_keeps_a_connection_from_being_idle() {
    let limits = Limits { idle: Duration::from_millis(50), ..Limits::default() };
    let never = || service_fn(|_| pending::<Result<Response<Long>, Infallible>>());
    let (mut busy, _connection) = connect(never(), limits.clone()).await;
    let _in_flight = busy.send_request(get(), true).unwrap();
    // Two after each other last longer than one that has had a request.
    for _ in 0..2 {
        let (_idle, sent_away) = connect(never(), limits.clone()).await;
        soon(sent_away).await.unwrap().unwrap();
    }
    let _still_there = busy.ready().await.unwrap().send_request(get(), true).unwrap();
}
