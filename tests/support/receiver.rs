//! An HTTP receiver for webhooks, which can go away and come back.

use std::{future::Future, io, pin::Pin, sync::Arc};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

/// The status to answer with; `None` hangs up without an answer.
pub type Answer = Pin<Box<dyn Future<Output = Option<u16>> + Send>>;
pub type Answers = Arc<dyn Fn(Request<Bytes>) -> Answer + Send + Sync>;

pub struct Receiver {
    pub port: u16,
    open: watch::Sender<bool>,
    is_open: watch::Receiver<bool>,
    _serving: JoinSet<()>,
}

impl Receiver {
    pub async fn start(answers: Answers) -> Self {
        let [port] = super::free_ports();
        let (open, wanted) = watch::channel(true);
        let (report, is_open) = watch::channel(false);
        let mut serving = JoinSet::new();
        serving.spawn(serve(port, answers, wanted, report));
        let receiver = Self { port, open, is_open, _serving: serving };
        receiver.set_open(true).await;
        receiver
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/webhooks", self.port)
    }

    /// Closed: no listener, and all connections cut. Returns when it is so.
    pub async fn set_open(&self, open: bool) {
        self.open.send_replace(open);
        let _ = self.is_open.clone().wait_for(|is| *is == open).await;
    }
}

async fn serve(
    port: u16,
    answers: Answers,
    mut wanted: watch::Receiver<bool>,
    report: watch::Sender<bool>,
) {
    loop {
        if wanted.wait_for(|open| *open).await.is_err() {
            return;
        }
        let listener =
            TcpListener::bind(("127.0.0.1", port)).await.expect("our port is still free");
        report.send_replace(true);
        // Dropping the set cuts every connection.
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                Ok((stream, _)) = listener.accept() => {
                    let answers = Arc::clone(&answers);
                    let service = service_fn(move |request| answer(Arc::clone(&answers), request));
                    connections.spawn(async move {
                        // A connection that breaks is the sender's to notice.
                        let _ = http1::Builder::new()
                            .serve_connection(TokioIo::new(stream), service)
                            .await;
                    });
                }
                Some(_) = connections.join_next() => {}
                closed = wanted.wait_for(|open| !open) => {
                    if closed.is_err() {
                        return;
                    }
                    break;
                }
            }
        }
        connections.shutdown().await;
        drop(listener);
        report.send_replace(false);
    }
}

async fn answer(
    answers: Answers,
    request: Request<Incoming>,
) -> Result<Response<Empty<Bytes>>, io::Error> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    match answers(Request::from_parts(parts, body)).await {
        Some(status) => {
            Ok(Response::builder().status(status).body(Empty::new()).expect("a status"))
        }
        None => Err(io::Error::other("hangs up, as it was told to")),
    }
}
