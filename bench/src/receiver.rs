//! Receivers of webhooks on loopback: one that answers at once, and three that hurt whoever calls them.

use std::{
    convert::Infallible,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use payment_sim::clock::Stopwatch;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// Too long, at a byte a second, for any attempt to see its end.
const DRIPPED: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

/// A server with a port of its own; it ends, with its connections, when this value is dropped.
pub struct Receiver {
    port: u16,
    connections: Arc<AtomicU64>,
    _accepting: JoinSet<()>,
}

impl Receiver {
    /// Answers 200 at once, and notes what arrives. The path of a webhook's URL is its number.
    ///
    /// # Errors
    /// Where the system has no port.
    pub async fn healthy(arrivals: Arc<Arrivals>) -> Result<Self, String> {
        Self::start(move |stream| accept_webhooks(stream, Arc::clone(&arrivals))).await
    }

    /// Accepts, and never answers.
    ///
    /// # Errors
    /// Where the system has no port.
    pub async fn silent() -> Result<Self, String> {
        Self::start(|mut stream| async move {
            let mut read = [0; 4_096];
            while stream.read(&mut read).await.is_ok_and(|bytes| bytes > 0) {}
        })
        .await
    }

    /// Answers a byte a second.
    ///
    /// # Errors
    /// Where the system has no port.
    pub async fn dripping() -> Result<Self, String> {
        Self::start(|mut stream| async move {
            if stream.read(&mut [0; 4_096]).await.is_err() {
                return;
            }
            for byte in DRIPPED {
                if stream.write_all(&[*byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        })
        .await
    }

    /// Resets each connection once a request has come.
    ///
    /// # Errors
    /// Where the system has no port.
    pub async fn resetting() -> Result<Self, String> {
        Self::start(|mut stream| async move {
            // The caller gave up first: then there is nothing to reset.
            let _ = stream.read(&mut [0; 4_096]).await;
            let _ = stream.set_zero_linger();
        })
        .await
    }

    async fn start<S, F>(serve: S) -> Result<Self, String>
    where
        S: Fn(TcpStream) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = bound.map_err(|error| error.to_string())?;
        let port = listener.local_addr().map_err(|error| error.to_string())?.port();
        let connections = Arc::new(AtomicU64::new(0));
        let accepted = Arc::clone(&connections);
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut serving = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                accepted.fetch_add(1, Ordering::Relaxed);
                serving.spawn(serve(stream));
                while serving.try_join_next().is_some() {}
            }
        });
        Ok(Self { port, connections, _accepting: accepting })
    }

    /// The URL of webhook `n`.
    pub fn url(&self, n: usize) -> String {
        format!("http://{}:{}/{n}", Ipv4Addr::LOCALHOST, self.port)
    }

    /// How many it has accepted.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }
}

/// When each webhook came first, by its number, on one stopwatch.
pub struct Arrivals {
    clock: Stopwatch,
    at: Mutex<Vec<Option<Duration>>>,
}

impl Arrivals {
    pub fn of(count: usize, clock: Stopwatch) -> Self {
        Self { clock, at: Mutex::new(vec![None; count]) }
    }

    fn note(&self, n: usize) {
        let now = self.clock.elapsed();
        if let Some(at) = self.lock().get_mut(n) {
            at.get_or_insert(now);
        }
    }

    pub fn missing(&self) -> usize {
        self.lock().iter().filter(|at| at.is_none()).count()
    }

    /// Those that came, each with its number.
    pub fn all(&self) -> Vec<(usize, Duration)> {
        self.lock().iter().enumerate().filter_map(|(n, at)| Some((n, (*at)?))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Duration>>> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn accept_webhooks(stream: TcpStream, arrivals: Arc<Arrivals>) {
    // Else the kernel holds answers back, and so the next attempt on this connection.
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request: Request<Incoming>| {
        if let Ok(n) = request.uri().path().trim_start_matches('/').parse() {
            arrivals.note(n);
        }
        async {
            // Read to its end, so that the connection can be used again.
            let _ = request.into_body().collect().await;
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }
    });
    // One that breaks off is missed where it matters: among the arrivals.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}
