//! The ops port: read-only HTTP for probes, scrapers and people with `curl`.
//!
//! `/livez` says that the process turns, `/readyz` that requests should be sent here, `/health` whether it
//! does its work; `/metrics` is Prometheus' text.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::response::IntoResponse;
use axum::routing::get;
use http::{StatusCode, header};
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::process::Tasks;
use crate::server::{Limits, Server};

const TEXT: [(header::HeaderName, &str); 1] = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
const JSON: [(header::HeaderName, &str); 1] = [(header::CONTENT_TYPE, "application/json")];
const PROMETHEUS: [(header::HeaderName, &str); 1] =
    [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];

/// Where the process stands between start and stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Starting,
    Serving,
    Draining,
}

impl Phase {
    const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Draining => "draining",
        }
    }
}

/// What the store can do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreCondition {
    /// Not open yet.
    Opening,
    Open,
    /// Too little free space: writes are refused, reads go on.
    Full,
    /// Nothing is read or written.
    Unavailable,
}

impl StoreCondition {
    const fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Open => "ok",
            Self::Full => "full",
            Self::Unavailable => "unavailable",
        }
    }
}

/// What the ops port asks the process.
pub trait Report: Send + Sync + 'static {
    /// Who answers.
    fn service(&self) -> &'static str;
    fn phase(&self) -> Phase;
    fn store(&self) -> StoreCondition;
    fn uptime(&self) -> Duration;
    /// Prometheus' text format.
    fn metrics(&self) -> String;
}

/// The service to give to [`crate::server::Server::serve_http`].
pub fn service(report: Arc<dyn Report>) -> TowerToHyperService<Router> {
    TowerToHyperService::new(router(report))
}

/// Serves `report` on `listener` until `end`, as the task "ops".
pub fn start(
    tasks: &mut Tasks,
    listener: TcpListener,
    report: Arc<dyn Report>,
    end: &CancellationToken,
) {
    let server = Server::new(Limits::ops());
    let (service, end) = (service(report), end.clone());
    tasks.start("ops", async move {
        if let Err(error) = server.serve_http(listener, service, end).await {
            tracing::error!(%error, "the ops port cannot be served");
        }
    });
}

fn router(report: Arc<dyn Report>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(report)
}

/// Whether payments can be taken now: not with a full store, though reads go on.
async fn health(State(report): State<Arc<dyn Report>>) -> impl IntoResponse {
    let (phase, store) = (report.phase(), report.store());
    let status = verdict(phase, store);
    let body = json!({
        "status": status,
        "service": report.service(),
        "version": env!("CARGO_PKG_VERSION"),
        "phase": phase.name(),
        "store": store.name(),
        "uptime_seconds": report.uptime().as_secs(),
    });
    let code = if status == "ok" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, JSON, format!("{body}\n"))
}

fn verdict(phase: Phase, store: StoreCondition) -> &'static str {
    match (phase, store) {
        (Phase::Serving, StoreCondition::Open) => "ok",
        (Phase::Serving, StoreCondition::Full) => "degraded",
        (Phase::Starting, _) | (_, StoreCondition::Opening) => "starting",
        (_, StoreCondition::Unavailable) => "unavailable",
        (Phase::Draining, StoreCondition::Open | StoreCondition::Full) => "draining",
    }
}

/// Depends on nothing: a restart mends no disk and no neighbour.
async fn livez() -> impl IntoResponse {
    (TEXT, "ok\n")
}

/// Also ready with a full store: it still answers reads, and replays of what it knows.
async fn readyz(State(report): State<Arc<dyn Report>>) -> impl IntoResponse {
    let ready = match (report.phase(), report.store()) {
        (Phase::Serving, StoreCondition::Open | StoreCondition::Full) => Ok("ready\n"),
        (Phase::Serving, StoreCondition::Opening) => Err("store is opening\n"),
        (Phase::Serving, StoreCondition::Unavailable) => Err("store is unavailable\n"),
        (Phase::Starting, _) => Err("starting\n"),
        (Phase::Draining, _) => Err("draining\n"),
    };
    match ready {
        Ok(text) => (StatusCode::OK, TEXT, text),
        Err(text) => (StatusCode::SERVICE_UNAVAILABLE, TEXT, text),
    }
}

async fn metrics(State(report): State<Arc<dyn Report>>) -> impl IntoResponse {
    (PROMETHEUS, report.metrics())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::bind;
    use std::net::SocketAddr;
    use std::sync::Mutex;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::time::timeout;

    /// Longest wait for what must happen.
    const SOON: Duration = Duration::from_secs(10);

    struct Fixed(Mutex<(Phase, StoreCondition)>);

    impl Report for Fixed {
        fn service(&self) -> &'static str {
            "fixed"
        }
        fn phase(&self) -> Phase {
            self.0.lock().unwrap().0
        }
        fn store(&self) -> StoreCondition {
            self.0.lock().unwrap().1
        }
        fn uptime(&self) -> Duration {
            Duration::from_secs(7)
        }
        fn metrics(&self) -> String {
            "up 1\n".to_owned()
        }
    }

    struct Bed {
        address: SocketAddr,
        report: Arc<Fixed>,
        drain: CancellationToken,
        serving: tokio::task::JoinHandle<std::io::Result<()>>,
    }

    #[allow(clippy::disallowed_methods, reason = "each test joins its server")]
    fn start(limits: Limits) -> Bed {
        let report = Arc::new(Fixed(Mutex::new((Phase::Serving, StoreCondition::Open))));
        let listener = bind("127.0.0.1:0".parse().unwrap(), 1).unwrap().remove(0);
        let address = listener.local_addr().unwrap();
        let drain = CancellationToken::new();
        let (service, stop) = (service(report.clone()), drain.clone());
        let server = Server::new(limits);
        let serving = tokio::spawn(async move { server.serve_http(listener, service, stop).await });
        Bed { address, report, drain, serving }
    }

    impl Bed {
        fn set(&self, phase: Phase, store: StoreCondition) {
            *self.report.0.lock().unwrap() = (phase, store);
        }

        async fn ask(&self, method: &str, path: &str) -> String {
            let mut tcp = TcpStream::connect(self.address).await.unwrap();
            let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            tcp.write_all(head.as_bytes()).await.unwrap();
            let mut reply = String::new();
            timeout(SOON, tcp.read_to_string(&mut reply)).await.unwrap().unwrap();
            reply
        }

        async fn code(&self, path: &str) -> String {
            self.ask("GET", path).await[9..12].to_owned()
        }
    }

    #[tokio::test]
    async fn health_is_honest_about_phase_and_store() {
        use Phase::{Draining, Serving, Starting};
        use StoreCondition::{Full, Open, Opening, Unavailable};
        let bed = start(Limits::ops());
        for (phase, store, health, status, ready) in [
            (Starting, Opening, "503", "starting", "503"),
            (Serving, Open, "200", "ok", "200"),
            (Serving, Full, "503", "degraded", "200"),
            (Serving, Unavailable, "503", "unavailable", "503"),
            (Draining, Open, "503", "draining", "503"),
        ] {
            bed.set(phase, store);
            let reply = bed.ask("GET", "/health").await;
            assert_eq!(&reply[9..12], health, "{reply}");
            assert!(reply.contains(&format!("\"status\":\"{status}\"")), "{reply}");
            assert!(reply.contains(env!("CARGO_PKG_VERSION")), "{reply}");
            assert_eq!(bed.code("/readyz").await, ready, "{phase:?} {store:?}");
            assert_eq!(bed.code("/livez").await, "200");
        }
    }

    #[tokio::test]
    async fn it_is_read_only_and_knows_head() {
        let bed = start(Limits::ops());
        assert!(bed.ask("GET", "/metrics").await.ends_with("\r\n\r\nup 1\n"));
        let head = bed.ask("HEAD", "/metrics").await;
        assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
        for method in ["POST", "PUT", "DELETE", "PATCH"] {
            assert!(bed.ask(method, "/health").await.starts_with("HTTP/1.1 405"), "{method}");
        }
        assert_eq!(bed.code("/nothing").await, "404");
    }

    #[tokio::test]
    async fn a_client_that_sends_no_request_is_closed() {
        let bed = start(Limits { preface: Duration::from_millis(50), ..Limits::ops() });
        let mut silent = TcpStream::connect(bed.address).await.unwrap();
        let mut half = TcpStream::connect(bed.address).await.unwrap();
        half.write_all(b"GET /health HT").await.unwrap();
        for tcp in [&mut silent, &mut half] {
            let mut rest = Vec::new();
            timeout(SOON, tcp.read_to_end(&mut rest)).await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_drain_ends_with_clients_connected() {
        let bed = start(Limits::ops());
        assert_eq!(bed.code("/livez").await, "200");
        let _idle = TcpStream::connect(bed.address).await.unwrap();
        bed.drain.cancel();
        timeout(SOON, bed.serving).await.unwrap().unwrap().unwrap();
        TcpStream::connect(bed.address).await.unwrap_err();
    }
}
