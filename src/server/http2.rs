//! One HTTP/2 connection from its preface to its end, straight on h2.
//!
//! hyper's server does the same for whatever body there is: it asks for room, for a reset and for the time around
//! each frame, eight locks to a small call in place of three. What it takes over besides is here: pings, the
//! bodies of requests, the frames of replies.

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Builder, Connection, SendResponse};
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::{Request, Response};
use http_body::{Body, Frame};
use hyper::service::Service;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::unconstrained;
use tokio::time::{Sleep, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Limits;

/// Streams a connection may have open. What is above waits in the client, which knows the number from
/// our SETTINGS; tonic's default is none at all.
pub const MAX_CONCURRENT_STREAMS: u32 = 128;

/// Stream errors that a peer may cause on one connection before it is closed with GOAWAY: the guard of
/// RUSTSEC-2024-0003, which tonic switches off. A well-behaved client causes none.
const MAX_LOCAL_ERROR_RESETS: usize = 256;

/// Header bytes of one request. Ours are a few hundred; this stops header bombs early.
pub const MAX_HEADER_LIST_BYTES: u32 = 8 * 1024;

/// Receive windows in bytes. A request is at most 64 KiB, so a stream needs no more; connections × window
/// is what hostile clients can make us hold, 1 GiB at worst with every connection taken.
pub const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 256 * 1024;

/// Idleness is looked at this many times in its span, so that a connection closes at most a quarter late
/// and no request pays for a timer.
const IDLE_CHECKS: u32 = 4;
/// Of [`Limits::quiet`], for who was sent away.
const QUIET_CHECKS: u32 = 2;
/// How long a client may go on sending after the last that it is told, until it has read that.
const LINGER: Duration = Duration::from_secs(1);
const DROPPED_AT_ONCE_BYTES: usize = 4 * 1024;

/// Serves a connection until it has ended, however its client behaves. Handlers run as `tasks`, and `ending` is
/// cancelled when the client is sent away.
pub async fn converse<S, B>(
    tcp: TcpStream,
    service: S,
    limits: Limits,
    ending: CancellationToken,
    tasks: TaskTracker,
) where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    S::Future: Send + Unpin + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
{
    let greeting = timeout(limits.preface, settings().handshake(Wire::new(tcp)));
    // A client that came just before the end may have sent requests: it is let in, to be sent away in
    // order. A silent one holds up the end no longer than other silent ones do.
    let too_late = async {
        ending.cancelled().await;
        sleep(limits.quiet).await;
    };
    let greeted = tokio::select! {
        biased;
        greeted = greeting => greeted,
        () = too_late => return,
    };
    let Ok(Ok(connection)) = greeted else { return };
    let begun = AtomicU64::new(0);
    let mut conversation = Conversation { connection, service, tasks, begun: &begun };
    if conversation.lasts(&limits, &ending).await {
        ending.cancel();
        conversation.say_goodbye(&limits).await;
    }
}

fn settings() -> Builder {
    let mut settings = Builder::new();
    settings
        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
        .max_local_error_reset_streams(Some(MAX_LOCAL_ERROR_RESETS))
        .max_header_list_size(MAX_HEADER_LIST_BYTES)
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    settings
}

struct Conversation<'a, S> {
    connection: Connection<Wire, Bytes>,
    service: S,
    tasks: TaskTracker,
    /// Requests there have been.
    begun: &'a AtomicU64,
}

impl<S, B> Conversation<'_, S>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    S::Future: Send + Unpin + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
{
    /// Serves until the connection has been used, or been idle, for long enough, or the service ends. False: the client
    /// has gone before, or is silent.
    async fn lasts(&mut self, limits: &Limits, ending: &CancellationToken) -> bool {
        let pings = self.connection.ping_pong().expect("they are taken once");
        let mut over = pin!(async {
            tokio::select! {
                () = ending.cancelled() => true,
                () = sleep(limits.age) => true,
                () = silence(pings, self.begun, limits) => false,
            }
        });
        let mut quiet_checks = 0;
        while quiet_checks < IDLE_CHECKS {
            let begun = self.begun.load(Ordering::Relaxed);
            match self.serve(timeout(limits.idle / IDLE_CHECKS, over.as_mut())).await {
                None => return false,
                Some(Ok(is_there)) => return is_there,
                Some(Err(_elapsed)) => {
                    let is_quiet = self.begun.load(Ordering::Relaxed) == begun
                        && !self.connection.has_streams();
                    quiet_checks = if is_quiet { quiet_checks + 1 } else { 0 };
                }
            }
        }
        true
    }

    /// Sends the client away, and serves until it has gone, has nothing more in flight and still does not close, or its
    /// grace is over.
    async fn say_goodbye(mut self, limits: &Limits) {
        self.connection.graceful_shutdown();
        let mut late = pin!(sleep(limits.grace));
        let mut quiet_checks = 0;
        while quiet_checks < QUIET_CHECKS {
            match self.serve(timeout(limits.quiet, late.as_mut())).await {
                Some(Err(_elapsed)) => {
                    let is_quiet = !self.connection.has_streams();
                    quiet_checks = if is_quiet { quiet_checks + 1 } else { 0 };
                }
                None | Some(Ok(())) => return,
            }
        }
    }

    /// Serves until `end`. `None`: the connection has ended before.
    async fn serve<E>(&mut self, end: impl Future<Output = E>) -> Option<E> {
        // A client that never lets its socket run dry takes all that a task may do at a time, and the timers would
        // not be looked at.
        let mut end = pin!(unconstrained(end));
        loop {
            let accepted = tokio::select! {
                biased;
                accepted = self.connection.accept() => accepted,
                ended = end.as_mut() => return Some(ended),
            };
            let (request, respond) = accepted?.ok()?;
            self.begun.fetch_add(1, Ordering::Relaxed);
            let step = Step::Answering(self.service.call(request.map(Incoming)));
            self.tasks.spawn(Exchange { respond, step });
        }
    }
}

/// Ends when a ping is not answered in time. Who goes on asking is there: his answer to a ping may be long under way,
/// behind the replies that he takes.
async fn silence(mut pings: PingPong, begun: &AtomicU64, limits: &Limits) {
    loop {
        let before = begun.load(Ordering::Relaxed);
        sleep(limits.ping).await;
        if begun.load(Ordering::Relaxed) != before {
            continue;
        }
        match timeout(limits.pong, pings.ping(Ping::opaque())).await {
            Ok(Ok(_pong)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

/// One request: its handler, and then its reply's way to h2. Who resets the stream ends both.
///
/// Not async functions, which would keep what they are given twice: there is one of these for each request in flight.
struct Exchange<F, B> {
    respond: SendResponse<Bytes>,
    step: Step<F, B>,
}

enum Step<F, B> {
    Answering(F),
    Sending(Sending<B>),
}

struct Sending<B> {
    body: B,
    stream: SendStream<Bytes>,
    /// Waits for room.
    in_hand: Option<Bytes>,
    has_begun: bool,
}

impl<F, B> Future for Exchange<F, B>
where
    F: Future<Output = Result<Response<B>, Infallible>> + Unpin,
    B: Body<Data = Bytes> + Unpin,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { respond, step } = &mut *self;
        loop {
            match step {
                Step::Answering(handler) => match Pin::new(handler).poll(cx) {
                    Poll::Ready(Ok(response)) => match begin(respond, response) {
                        Some(sending) => *step = Step::Sending(sending),
                        None => return Poll::Ready(()),
                    },
                    Poll::Pending => return respond.poll_reset(cx).map(drop),
                },
                // What an error says is that the stream was reset.
                Step::Sending(sending) => return sending.poll(cx).map(drop),
            }
        }
    }
}

/// Sends a reply's head; what is left is its body, where it has one.
fn begin<B: Body>(respond: &mut SendResponse<Bytes>, reply: Response<B>) -> Option<Sending<B>> {
    let (head, body) = reply.into_parts();
    let is_all = body.is_end_stream();
    match respond.send_response(Response::from_parts(head, ()), is_all) {
        Ok(stream) => {
            (!is_all).then_some(Sending { body, stream, in_hand: None, has_begun: false })
        }
        Err(_) => {
            respond.send_reset(Reason::INTERNAL_ERROR);
            None
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Sending<B> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        loop {
            // The first data goes to h2 at once, which keeps it until there is room; further ones wait here.
            if self.in_hand.is_some() && self.has_begun {
                ready!(self.poll_room(cx))?;
            }
            if let Some(data) = self.in_hand.take() {
                self.has_begun = true;
                let is_last = self.body.is_end_stream();
                self.stream.send_data(data, is_last)?;
                if is_last {
                    return Poll::Ready(Ok(()));
                }
            }
            let frame = match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(Some(Err(_))) => {
                    self.stream.send_reset(Reason::INTERNAL_ERROR);
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(None) => {
                    return Poll::Ready(self.stream.send_data(Bytes::new(), true));
                }
                Poll::Pending => return self.stream.poll_reset(cx).map_ok(drop),
            };
            match frame.into_data() {
                Ok(data) => self.in_hand = Some(data),
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        return Poll::Ready(self.stream.send_trailers(trailers));
                    }
                }
            }
        }
    }

    /// Waits until the client takes more. One byte is asked for: what is asked for is kept from the connection's other
    /// streams, and h2 asks for the rest once it has it.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        self.stream.reserve_capacity(1);
        while self.stream.capacity() == 0 {
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => return Poll::Ready(Err(Reason::CANCEL.into())),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// A connection's socket.
///
/// It does not say that it writes from several places at once. h2 then gathers replies of less than 1,024
/// bytes, and writes them together; else of less than 256, and each larger one is a write of its own. A payment has
/// some 500. The price: a frame that is larger still, as those of lists, is two writes in place of one.
struct Wire {
    tcp: TcpStream,
    /// Begins when all is said.
    lingering: Option<Pin<Box<Sleep>>>,
}

impl Wire {
    const fn new(tcp: TcpStream) -> Self {
        Self { tcp, lingering: None }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    /// Then drops what still comes. Whoever writes to a socket that is closed is reset, and may give up what it has in
    /// flight before it reads the GOAWAY that lies there, which says what it may send again.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { tcp, lingering } = &mut *self;
        let lingering = match lingering {
            Some(lingering) => lingering,
            None => {
                ready!(Pin::new(&mut *tcp).poll_shutdown(cx))?;
                lingering.insert(Box::pin(sleep(LINGER)))
            }
        };
        while lingering.as_mut().poll(cx).is_pending() {
            let mut dropped = [0; DROPPED_AT_ONCE_BYTES];
            let mut dropped = ReadBuf::new(&mut dropped);
            let is_read = ready!(Pin::new(&mut *tcp).poll_read(cx, &mut dropped)).is_ok();
            if !is_read || dropped.filled().is_empty() {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// The body of a request.
#[derive(Debug)]
pub struct Incoming(RecvStream);

impl Body for Incoming {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let Self(stream) = &mut *self;
        Poll::Ready(match ready!(stream.poll_data(cx)) {
            Some(Ok(data)) => {
                let released = stream.flow_control().release_capacity(data.len());
                Some(released.map(|()| Frame::data(data)))
            }
            Some(Err(error)) => Some(Err(error)),
            None => {
                ready!(stream.poll_trailers(cx)).transpose().map(|all| all.map(Frame::trailers))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}

#[cfg(test)]
mod tests;
