//! How webhooks connect: name look-up, the check of every address, TCP, TLS, within one bound.

use std::{
    convert::Infallible,
    error::Error,
    future::{Future, ready},
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::connect::{HttpConnector, dns::Name},
    rt::TokioIo,
};
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tower::{Service, ServiceExt};

use super::connection::{Disposable, Life};
use crate::egress::Policy;

/// From the look-up to the end of the TLS handshake. A receiver that takes longer is down or far too busy.
pub const CONNECT_MAX: Duration = Duration::from_secs(3);
const AGE_MAX: Duration = Duration::from_secs(60);

pub type BoxError = Box<dyn Error + Send + Sync>;
type Connecting<T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send>>;

/// http, and https with HTTP/2 where the receiver agrees to it; to admitted addresses only.
pub type Connector<N = Machine> = Bounded<HttpsConnector<Guarded<N>>>;

pub struct ConnectSettings {
    pub tls: ClientConfig,
    pub policy: Policy,
    pub connect_max: Duration,
    /// How long an attempt may take once it is connected.
    pub attempt_max: Duration,
}

pub fn connector(settings: ConnectSettings) -> Connector {
    over(Machine { dial_max: settings.connect_max }, settings)
}

/// The same over another network than the machine's.
pub fn over<N: Network>(network: N, settings: ConnectSettings) -> Connector<N> {
    let ConnectSettings { tls, policy, connect_max, attempt_max } = settings;
    let https = HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_all_versions()
        .wrap_connector(Guarded { network, policy: Arc::new(policy) });
    Bounded { inner: https, connect_max, attempt_max }
}

#[derive(Debug, thiserror::Error)]
#[error("no connection within {0:?}")]
pub struct ConnectTimeout(Duration);

/// A connector that gives up after a while, whatever it is at, and whose connections can be given up.
#[derive(Clone)]
pub struct Bounded<C> {
    inner: C,
    connect_max: Duration,
    attempt_max: Duration,
}

impl<C> Service<Uri> for Bounded<C>
where
    C: Service<Uri, Error = BoxError>,
    C::Future: Send + 'static,
{
    type Response = Disposable<C::Response>;
    type Error = BoxError;
    type Future = Connecting<Self::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let connecting = self.inner.call(to);
        let connect_max = self.connect_max;
        let life = Life { age_max: AGE_MAX, grace: self.attempt_max };
        Box::pin(async move {
            let in_time = tokio::time::timeout(connect_max, connecting).await;
            let stream = in_time.map_err(|_elapsed| ConnectTimeout(connect_max))??;
            Ok(Disposable::new(stream, life))
        })
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the name does not resolve")]
pub struct LookupFailed(#[source] io::Error);

#[derive(Debug, thiserror::Error)]
#[error("{0} is not an address that webhooks may connect to")]
pub struct AddressRefused(IpAddr);

/// TCP connections to none but admitted addresses.
///
/// A name is looked up once, and what it led to then is what is checked and connected to: an answer that
/// changes in between changes nothing. One refused address refuses the name, because which of several is
/// taken depends on their order and on who answers first. A pooled connection needs no further check: it
/// leads where it led when it was made, and serves no other host than the one that it was made for.
#[derive(Clone)]
pub struct Guarded<N> {
    network: N,
    policy: Arc<Policy>,
}

impl<N: Network> Guarded<N> {
    async fn connect(self, to: Uri) -> Result<TokioIo<TcpStream>, BoxError> {
        let host = to.host().unwrap_or_default();
        let https = to.scheme() == Some(&http::uri::Scheme::HTTPS);
        let port = to.port_u16().unwrap_or(if https { 443 } else { 80 });
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let addresses = match bare.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, port)],
            Err(_) => self.network.look_up(bare, port).await.map_err(LookupFailed)?,
        };
        for address in &addresses {
            self.check(host, address.ip())?;
        }
        let stream = self.network.dial(addresses).await?;
        // Once more, what it did connect to: the promise is about this, not about what was asked for.
        self.check(host, stream.peer_addr()?.ip())?;
        Ok(TokioIo::new(stream))
    }

    fn check(&self, host: &str, address: IpAddr) -> Result<(), AddressRefused> {
        if self.policy.admits(host, address) { Ok(()) } else { Err(AddressRefused(address)) }
    }
}

impl<N: Network> Service<Uri> for Guarded<N> {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = Connecting<Self::Response>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        Box::pin(self.clone().connect(to))
    }
}

/// What a connection takes of the network; tests put their own in its place.
#[async_trait]
pub trait Network: Clone + Send + Sync + 'static {
    async fn look_up(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>>;
    /// To one of these, which have one port, and to nothing else.
    async fn dial(&self, addresses: Vec<SocketAddr>) -> Result<TcpStream, BoxError>;
}

/// The machine's resolver and its sockets. No proxy, whatever the environment says.
#[derive(Clone)]
pub struct Machine {
    dial_max: Duration,
}

#[async_trait]
impl Network for Machine {
    async fn look_up(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        Ok(tokio::net::lookup_host((host, port)).await?.collect())
    }

    /// By hyper's connector, for the sake of its way with several addresses (RFC 8305).
    async fn dial(&self, addresses: Vec<SocketAddr>) -> Result<TcpStream, BoxError> {
        // A name that is no address, so that it takes those from where it is told to.
        let port = addresses.first().map_or(0, SocketAddr::port);
        let to = Uri::try_from(format!("http://checked:{port}"))?;
        let known = tower::service_fn(move |_: Name| {
            ready(Ok::<_, Infallible>(addresses.clone().into_iter()))
        });
        let mut tcp = HttpConnector::new_with_resolver(known);
        tcp.set_nodelay(true);
        // Shared out over the addresses, so that one that swallows packets leaves time for the next.
        tcp.set_connect_timeout(Some(self.dial_max));
        Ok(tcp.oneshot(to).await?.into_inner())
    }
}
