//! How webhooks connect: name look-up, TCP, TLS, within one bound.

use std::{
    error::Error,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::{
    HttpConnector,
    dns::{GaiAddrs, GaiResolver, Name},
};
use rustls::ClientConfig;
use tower::Service;

/// From the look-up to the end of the TLS handshake. A receiver that takes longer is down or far too busy.
pub const CONNECT_MAX: Duration = Duration::from_secs(3);

type BoxError = Box<dyn Error + Send + Sync>;
type Connecting<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

/// http and https, each address that a name resolves to.
pub type Connector = Bounded<HttpsConnector<HttpConnector<Resolver>>>;

pub fn connector(tls: ClientConfig, max: Duration) -> Connector {
    let mut tcp = HttpConnector::new_with_resolver(Resolver(GaiResolver::new()));
    tcp.set_nodelay(true);
    // https goes through it too.
    tcp.enforce_http(false);
    // Shared out over a name's addresses, so that one that swallows packets leaves time for the next.
    tcp.set_connect_timeout(Some(max));
    let https = HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_http1()
        .wrap_connector(tcp);
    Bounded { inner: https, max }
}

#[derive(Debug, thiserror::Error)]
#[error("no connection within {0:?}")]
pub struct ConnectTimeout(Duration);

/// A connector that gives up after a while, whatever it is at.
#[derive(Clone)]
pub struct Bounded<C> {
    inner: C,
    max: Duration,
}

impl<C> Service<Uri> for Bounded<C>
where
    C: Service<Uri, Error = BoxError>,
    C::Future: Send + 'static,
{
    type Response = C::Response;
    type Error = BoxError;
    type Future = Connecting<C::Response, BoxError>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let (connecting, max) = (self.inner.call(to), self.max);
        Box::pin(async move {
            let in_time = tokio::time::timeout(max, connecting).await;
            in_time.unwrap_or_else(|_elapsed| Err(ConnectTimeout(max).into()))
        })
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the name does not resolve")]
pub struct LookupFailed(#[source] std::io::Error);

/// The machine's resolver. It only gives a failure a type: hyper's own names it in a text.
#[derive(Clone)]
pub struct Resolver(GaiResolver);

impl Service<Name> for Resolver {
    type Response = GaiAddrs;
    type Error = LookupFailed;
    type Future = Connecting<GaiAddrs, LookupFailed>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LookupFailed>> {
        self.0.poll_ready(cx).map_err(LookupFailed)
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let looking_up = self.0.call(name);
        Box::pin(async move { looking_up.await.map_err(LookupFailed) })
    }
}
