//! The accept loops: gRPC over HTTP/2, and plain HTTP/1.1 for what serves people.
//!
//! tonic's transport is not used: it does not pass on the limits below, accepts silent clients for ever,
//! spins at the descriptor limit and can hang when it drains. Whoever connects is answered within
//! [`Limits`] or let go; a drain ends whatever the clients do.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::log_budget::LogBudget;

mod http2;

pub use http2::Incoming;

/// TCP's own keepalive, for peers that vanish before HTTP/2 has begun.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);

/// Connections that may wait to be accepted: a restart makes all clients come back at once. The kernel
/// lowers it to net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// How often a free port is sought when the caller asked for any (port 0) and lost it again meanwhile.
const PORT_TRIES: usize = 8;

/// Request heads of HTTP/1.1: a person's browser needs a few kilobytes.
const HTTP1_BUFFER_BYTES: usize = 16 * 1024;

/// Warnings of an accept loop a second: at the descriptor limit every attempt would write one.
const WARNINGS_PER_SECOND: u32 = 1;

type BoxError = Box<dyn Error + Send + Sync>;

/// Bounds on connections. Tests shorten them; the defaults are what is shipped.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time, over all listeners: 4,096 × 256 KiB of window is what memory allows. More are
    /// closed at once, so that their clients go elsewhere.
    pub max_connections: usize,
    /// How long accepting rests after an error that is not one connection's (no descriptors, no memory):
    /// without it the loop spins, and within it something may be freed.
    pub accept_backoff: Duration,
    /// How long a client may take to say that it speaks HTTP/2 (for HTTP/1.1: to send a request's head).
    /// A fair one does at once; a silent one would hold its place for ever.
    pub preface: Duration,
    /// How often an HTTP/2 peer that asks for nothing is pinged, and how long it has to answer: a vanished one frees
    /// its place after 40 to 70 s, and NATs in between keep the connection.
    pub ping: Duration,
    pub pong: Duration,
    /// How long a connection may stay without a request in flight.
    pub idle: Duration,
    /// How long a connection is used before its client is sent away with GOAWAY, so that load spreads to
    /// new replicas. See [`Limits::drawn`].
    pub age: Duration,
    /// How long what is in flight may take after GOAWAY. Requests end within 10 s by themselves; past this
    /// the connection is dropped, because a graceful close waits for ever for who does not answer it.
    pub grace: Duration,
    /// A client that was sent away and has had nothing in flight for two of these is dropped: a silent one
    /// never answers, and a drain need not wait out the whole grace for it.
    pub quiet: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            accept_backoff: Duration::from_millis(100),
            preface: Duration::from_secs(5),
            ping: Duration::from_secs(30),
            pong: Duration::from_secs(10),
            idle: Duration::from_secs(600),
            age: Duration::from_secs(300),
            grace: Duration::from_secs(20),
            quiet: Duration::from_secs(2),
        }
    }
}

impl Limits {
    /// The defaults for the ops port: its callers are probes and a scraper or two.
    pub fn ops() -> Self {
        Self { max_connections: 256, ..Self::default() }
    }

    /// With an age drawn from ± 20 %, once a process, so that replicas started together do not send their
    /// clients away together. `chance` is uniform in 0..1.
    #[must_use]
    pub fn drawn(mut self, chance: f64) -> Self {
        const SPREAD: f64 = 0.2;
        self.age = self.age.mul_f64(1.0 - SPREAD + 2.0 * SPREAD * chance.clamp(0.0, 1.0));
        self
    }
}

/// `n` listeners on one address, one for each runtime: the kernel spreads the connections.
///
/// They share the port by SO_REUSEPORT, which would let a second instance join unnoticed; so one bind
/// without it goes first and fails loudly when anybody listens there. With port 0 all get the same free one.
///
/// # Errors
/// The address is in use, or may not be bound by this user.
pub fn bind(address: SocketAddr, n: usize) -> io::Result<Vec<std::net::TcpListener>> {
    for _ in 1..PORT_TRIES {
        match bind_once(address, n) {
            Err(e) if address.port() == 0 && e.kind() == io::ErrorKind::AddrInUse => {}
            result => return result,
        }
    }
    bind_once(address, n)
}

fn bind_once(address: SocketAddr, n: usize) -> io::Result<Vec<std::net::TcpListener>> {
    let alone = listen(address, false)?;
    let found = alone.local_addr()?;
    // Nothing was accepted, so closing it leaves no TIME_WAIT behind.
    drop(alone);
    (0..n).map(|_| listen(found, true)).collect()
}

fn listen(address: SocketAddr, shared: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // A restart must not wait for the old connections' TIME_WAIT. Against a listener this proves nothing
    // at bind, but listen fails all the same.
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Serves connections within one set of limits. Clones share them: one for each listener.
#[derive(Clone, Debug)]
pub struct Server(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: Limits,
    places: Arc<Semaphore>,
    warnings: LogBudget,
}

impl Server {
    pub fn new(limits: Limits) -> Self {
        let places = Arc::new(Semaphore::new(limits.max_connections));
        Self(Arc::new(Shared { limits, places, warnings: LogBudget::new(WARNINGS_PER_SECOND) }))
    }

    /// Connections open now, over all listeners.
    pub fn connections(&self) -> usize {
        self.0.limits.max_connections.saturating_sub(self.0.places.available_permits())
    }

    /// Serves HTTP/2 on `listener` until `drain` is cancelled and every connection has ended, at most
    /// [`Limits::grace`] later. Runs on the current runtime, be it of one thread or of many.
    ///
    /// `service_for` makes a connection's service; the token it gets is cancelled when that connection
    /// should end, which is what endless streams have to heed.
    ///
    /// # Errors
    /// The listener cannot be used on this runtime. What happens to one connection is no error.
    pub async fn serve_grpc<S, B>(
        &self,
        listener: std::net::TcpListener,
        service_for: impl Fn(CancellationToken) -> S,
        drain: CancellationToken,
    ) -> io::Result<()>
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Send + 'static,
        S::Future: Send + Unpin + 'static,
        B: Body<Data = Bytes> + Send + Unpin + 'static,
    {
        self.accept(listener, &drain, |tcp, ending, tasks| {
            let service = service_for(ending.clone());
            http2::converse(tcp, service, self.0.limits.clone(), ending, tasks)
        })
        .await
    }

    /// Serves HTTP/1.1 on `listener`, else as [`Server::serve_grpc`].
    ///
    /// # Errors
    /// The listener cannot be used on this runtime.
    pub async fn serve_http<S, B>(
        &self,
        listener: std::net::TcpListener,
        service: S,
        drain: CancellationToken,
    ) -> io::Result<()>
    where
        S: Service<Request<body::Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<BoxError>,
    {
        self.accept(listener, &drain, |tcp, ending, _tasks| {
            converse_http1(tcp, service.clone(), self.0.limits.clone(), ending)
        })
        .await
    }

    async fn accept<F>(
        &self,
        listener: std::net::TcpListener,
        drain: &CancellationToken,
        converse: impl Fn(TcpStream, CancellationToken, TaskTracker) -> F,
    ) -> io::Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::from_std(listener)?;
        let (tasks, ending) = (TaskTracker::new(), CancellationToken::new());
        let start = |tcp: TcpStream| {
            let Ok(place) = Arc::clone(&self.0.places).try_acquire_owned() else {
                return self.warn("connection refused: all places are taken", None);
            };
            prepare(&tcp);
            let conversation = converse(tcp, ending.child_token(), tasks.clone());
            tasks.spawn(async move {
                conversation.await;
                drop(place);
            });
        };
        while let Some(accepted) = drain.run_until_cancelled(listener.accept()).await {
            match accepted {
                Ok((tcp, _peer)) => start(tcp),
                Err(e) if is_the_connections_own(&e) => {}
                Err(e) => {
                    self.warn("accepting rests", Some(&e));
                    drain.run_until_cancelled(sleep(self.0.limits.accept_backoff)).await;
                }
            }
        }
        // The door first, then the guests: whoever is sent away comes back at once, and must then be
        // refused by the kernel, not queued where nobody will look.
        close(listener)?.into_iter().for_each(start);
        ending.cancel();
        tasks.close();
        self.see_out(&tasks).await;
        Ok(())
    }

    /// Waits for connections and their requests. Each ends by itself within the grace; the limit here only
    /// keeps a fault in that from holding up the process.
    async fn see_out(&self, tasks: &TaskTracker) {
        let limit = self.0.limits.grace + self.0.limits.quiet;
        if timeout(limit, tasks.wait()).await.is_err() {
            tracing::warn!(left = tasks.len(), "drained in time, but not everything had ended");
        }
    }

    fn warn(&self, what: &str, error: Option<&io::Error>) {
        if let Some(withheld) = self.0.warnings.spend() {
            let open = self.connections();
            let error = error.map(tracing::field::display);
            tracing::warn!(open, withheld, error, "{what}");
        }
    }
}

/// Closes a listener. Who was queued for it comes out: closing would reset them, and requests that they
/// have sent already with them.
fn close(listener: TcpListener) -> io::Result<Vec<TcpStream>> {
    let listener = listener.into_std()?;
    let mut queued = Vec::new();
    // Bounded, lest those who keep coming keep it open.
    while queued.len() < BACKLOG as usize
        && let Ok((tcp, _peer)) = listener.accept()
    {
        tcp.set_nonblocking(true)?;
        queued.push(TcpStream::from_std(tcp)?);
    }
    Ok(queued)
}

/// An error of the one connection that was to be accepted: the next may be fine.
fn is_the_connections_own(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// Options of one connection. They fail only when the peer is already gone, which reading then tells.
fn prepare(tcp: &TcpStream) {
    // Replies are written whole: waiting for more would only delay them.
    let nodelay = tcp.set_nodelay(true);
    let keepalive =
        SockRef::from(tcp).set_tcp_keepalive(&TcpKeepalive::new().with_time(TCP_KEEPALIVE));
    if let Err(error) = nodelay.and(keepalive) {
        tracing::trace!(%error, "a connection was gone before it began");
    }
}

/// One HTTP/1.1 connection.
async fn converse_http1<S, B>(tcp: TcpStream, service: S, limits: Limits, ending: CancellationToken)
where
    S: Service<Request<body::Incoming>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    B: Body + 'static,
    B::Error: Into<BoxError>,
{
    let mut http1 = http1::Builder::new();
    http1
        .timer(TokioTimer::new())
        // Also closes a kept-alive connection on which no request follows.
        .header_read_timeout(limits.preface)
        .max_buf_size(HTTP1_BUFFER_BYTES);
    let mut connection = pin!(http1.serve_connection(TokioIo::new(tcp), service));
    tokio::select! {
        biased;
        _ = connection.as_mut() => return,
        () = ending.cancelled() => {}
        () = sleep(limits.age) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _late = timeout(limits.grace, connection).await;
}

#[cfg(test)]
mod tests;
