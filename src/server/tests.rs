use std::io::Read;
use std::net::SocketAddr;
use std::sync::mpsc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::http2::{MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_BYTES, STREAM_WINDOW_BYTES};
use super::*;
use crate::api::pb::payment::v1::payment_service_client::PaymentServiceClient;
use crate::edge::EdgeLimits;
use crate::edge::testbed::{SOON, edge, order};

const SHORT: Duration = Duration::from_millis(50);
/// What every HTTP/2 client sends first (RFC 9113, 3.4).
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub(super) const EMPTY_SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
const GOAWAY: u8 = 7;

struct Bed {
    address: SocketAddr,
    server: Server,
    drain: CancellationToken,
    serving: JoinHandle<io::Result<()>>,
}

#[allow(clippy::disallowed_methods, reason = "each test that needs the end joins its server")]
fn start(limits: Limits) -> Bed {
    let listener = bind(any_port(), 1).unwrap().remove(0);
    let address = listener.local_addr().unwrap();
    let (server, drain) = (Server::new(limits), CancellationToken::new());
    let (edge, _) = edge(EdgeLimits::default());
    let (served, stop) = (server.clone(), drain.clone());
    let serving = tokio::spawn(async move {
        served.serve_grpc(listener, |ending| edge.connection(ending), stop).await
    });
    Bed { address, server, drain, serving }
}

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

async fn channel(address: SocketAddr) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    timeout(SOON, endpoint.connect()).await.unwrap().unwrap()
}

impl Bed {
    async fn client(&self) -> PaymentServiceClient<Channel> {
        PaymentServiceClient::new(channel(self.address).await)
    }

    async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// A client that speaks HTTP/2 as far as it must and then falls silent.
    async fn prefaced(&self) -> TcpStream {
        let mut tcp = self.tcp().await;
        tcp.write_all(PREFACE).await.unwrap();
        tcp.write_all(&EMPTY_SETTINGS).await.unwrap();
        tcp
    }

    async fn connections_become(&self, n: usize) {
        let reached = async {
            while self.server.connections() != n {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(SOON, reached).await.unwrap();
    }

    async fn drained(self) {
        self.drain.cancel();
        timeout(SOON, self.serving).await.unwrap().unwrap().unwrap();
    }
}

/// Kind and payload of the next frame.
pub(super) async fn frame(tcp: &mut TcpStream) -> (u8, Vec<u8>) {
    let mut head = [0; 9];
    timeout(SOON, tcp.read_exact(&mut head)).await.unwrap().unwrap();
    let length = usize::from(head[1]) << 8 | usize::from(head[2]);
    let mut payload = vec![0; length];
    timeout(SOON, tcp.read_exact(&mut payload)).await.unwrap().unwrap();
    (head[3], payload)
}

/// Waits until the server has closed, cleanly or not.
async fn closed(tcp: &mut TcpStream) {
    let mut rest = Vec::new();
    let _either_way = timeout(SOON, tcp.read_to_end(&mut rest)).await.unwrap();
}

#[tokio::test]
async fn settings_carry_our_limits() {
    let bed = start(Limits::default());
    let (kind, payload) = frame(&mut bed.prefaced().await).await;
    assert_eq!(kind, SETTINGS);
    let settings: Vec<_> = payload
        .chunks_exact(6)
        .map(|s| (s[1], u32::from_be_bytes([s[2], s[3], s[4], s[5]])))
        .collect();
    assert!(settings.contains(&(3, MAX_CONCURRENT_STREAMS)), "{settings:?}");
    assert!(settings.contains(&(6, MAX_HEADER_LIST_BYTES)), "{settings:?}");
    // 65,535 is HTTP/2's own default, so our window has to be told.
    assert!(settings.contains(&(4, STREAM_WINDOW_BYTES)), "{settings:?}");
}

#[tokio::test]
async fn who_does_not_say_that_it_speaks_http2_is_closed() {
    let bed = start(Limits { preface: SHORT, ..Limits::default() });
    let mut silent = bed.tcp().await;
    let mut half = bed.tcp().await;
    half.write_all(&PREFACE[..12]).await.unwrap();
    closed(&mut silent).await;
    closed(&mut half).await;
    bed.connections_become(0).await;
}

#[tokio::test]
async fn another_protocol_is_closed_without_waiting() {
    let bed = start(Limits { preface: Duration::from_secs(3600), ..Limits::default() });
    let mut browser = bed.tcp().await;
    browser.write_all(b"GET /").await.unwrap();
    closed(&mut browser).await;
}

#[tokio::test]
async fn a_preface_in_pieces_is_fine() {
    let bed = start(Limits::default());
    let mut tcp = bed.tcp().await;
    for piece in PREFACE.chunks(5) {
        tcp.write_all(piece).await.unwrap();
        sleep(Duration::from_millis(2)).await;
    }
    tcp.write_all(&EMPTY_SETTINGS).await.unwrap();
    assert_eq!(frame(&mut tcp).await.0, SETTINGS);
}

#[tokio::test]
async fn calls_are_served_and_a_panic_leaves_the_connection_up() {
    let bed = start(Limits::default());
    let mut client = bed.client().await;
    client.create_payment_intent(order("ok")).await.unwrap();
    let panic = client.create_payment_intent(order("panic")).await.unwrap_err();
    assert_eq!(panic.code(), Code::Internal);
    client.create_payment_intent(order("ok")).await.unwrap();
    assert_eq!(bed.server.connections(), 1);
    bed.drained().await;
}

#[tokio::test]
async fn over_the_connection_limit_is_closed_at_once() {
    let bed = start(Limits { max_connections: 1, ..Limits::default() });
    let first = bed.prefaced().await;
    bed.connections_become(1).await;
    closed(&mut bed.tcp().await).await;
    drop(first);
    bed.connections_become(0).await;
    bed.client().await.create_payment_intent(order("ok")).await.unwrap();
}

#[tokio::test]
async fn age_sends_a_connection_away_without_losing_what_is_in_flight() {
    let bed = start(Limits { age: SHORT, ..Limits::default() });
    let mut raw = bed.prefaced().await;
    let mut client = bed.client().await;
    // Longer than the age: the reply comes all the same, and the next call on a new connection.
    client.create_payment_intent(order("slow")).await.unwrap();
    client.create_payment_intent(order("ok")).await.unwrap();
    while frame(&mut raw).await.0 != GOAWAY {}
}

#[tokio::test]
async fn an_idle_connection_is_sent_away_and_a_busy_one_is_not() {
    let limits = Limits { idle: SHORT, quiet: SHORT, ..Limits::default() };
    let bed = start(limits);
    let mut idle = bed.prefaced().await;
    let mut busy = bed.client().await;
    busy.create_payment_intent(order("slow")).await.unwrap();
    while frame(&mut idle).await.0 != GOAWAY {}
    closed(&mut idle).await;
}

#[tokio::test]
async fn who_does_not_answer_a_ping_is_closed_and_who_does_is_not() {
    let bed = start(Limits { ping: SHORT, pong: 10 * SHORT, ..Limits::default() });
    let mut answers = bed.client().await;
    let mut vanished = bed.prefaced().await;
    while frame(&mut vanished).await.0 != PING {}
    closed(&mut vanished).await;
    bed.connections_become(1).await;
    // Several pings long.
    answers.create_payment_intent(order("slow")).await.unwrap();
    assert_eq!(bed.server.connections(), 1);
}

#[tokio::test]
async fn a_drain_ends_whatever_the_clients_do() {
    let bed = start(Limits { quiet: SHORT, ..Limits::default() });
    let _unprefaced = bed.tcp().await;
    let _silent = bed.prefaced().await;
    let mut client = bed.client().await;
    client.create_payment_intent(order("ok")).await.unwrap();
    bed.connections_become(3).await;
    let address = bed.address;
    bed.drained().await;
    TcpStream::connect(address).await.unwrap_err();
}

#[tokio::test]
async fn a_drain_serves_who_was_already_queued() {
    let listener = bind(any_port(), 1).unwrap().remove(0);
    let mut client = PaymentServiceClient::new(channel(listener.local_addr().unwrap()).await);
    let call = client.create_payment_intent(order("ok"));
    let (server, drain) = (Server::new(Limits::default()), CancellationToken::new());
    let (edge, _) = edge(EdgeLimits::default());
    let (reply, served) = tokio::join!(call, async {
        // By now the request is in the socket, and nobody has accepted it.
        sleep(SHORT).await;
        drain.cancel();
        server.serve_grpc(listener, |ending| edge.connection(ending), drain).await
    });
    reply.unwrap();
    served.unwrap();
}

#[tokio::test]
async fn a_drain_lets_what_is_in_flight_finish_and_ends_streams() {
    let bed = start(Limits::default());
    let mut client = bed.client().await;
    let mut health = HealthClient::new(channel(bed.address).await);
    let watch = health.watch(HealthCheckRequest::default()).await.unwrap();
    let mut watch = watch.into_inner();
    watch.message().await.unwrap().unwrap();

    let drain = bed.drain.clone();
    let (reply, ()) = tokio::join!(client.create_payment_intent(order("slow")), async {
        sleep(SHORT).await;
        drain.cancel();
    });
    reply.unwrap();
    let end = timeout(SOON, watch.message()).await.unwrap().unwrap_err();
    assert_eq!(end.code(), Code::Unavailable);
    bed.drained().await;
}

#[tokio::test]
async fn a_drain_has_a_hard_end() {
    let bed = start(Limits { grace: SHORT, ..Limits::default() });
    let mut client = bed.client().await;
    let hanging = client.create_payment_intent(order("hang"));
    let (reply, ()) = tokio::join!(hanging, async {
        sleep(SHORT).await;
        bed.drained().await;
    });
    assert!(reply.is_err());
}

#[test]
fn one_runtime_a_listener_on_one_port() {
    const RUNTIMES: usize = 2;
    let (edge, _) = edge(EdgeLimits::default());
    let limits = Limits { quiet: SHORT, ..Limits::default() };
    let (server, drain) = (Server::new(limits), CancellationToken::new());
    let listeners = bind(any_port(), RUNTIMES).unwrap();
    let address = listeners[0].local_addr().unwrap();
    assert!(listeners.iter().all(|l| l.local_addr().unwrap() == address));
    let (ended, all_ended) = mpsc::channel();
    for listener in listeners {
        let (edge, server, drain) = (edge.clone(), server.clone(), drain.clone());
        let ended = ended.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let service = |ending| edge.connection(ending);
            let end = runtime.unwrap().block_on(server.serve_grpc(listener, service, drain));
            ended.send(end.is_ok()).unwrap();
        });
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for _ in 0..20 {
            let mut client = PaymentServiceClient::new(channel(address).await);
            client.create_payment_intent(order("ok")).await.unwrap();
        }
    });
    drain.cancel();
    for _ in 0..RUNTIMES {
        assert!(all_ended.recv_timeout(SOON).unwrap());
    }
}

#[test]
fn a_second_instance_fails_to_bind() {
    let first = bind(any_port(), 2).unwrap();
    let address = first[0].local_addr().unwrap();
    assert_eq!(bind(address, 2).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    drop(first);
    bind(address, 2).unwrap();
}

#[test]
fn a_port_can_be_bound_again_right_after_its_connections_closed() {
    let first = bind(any_port(), 1).unwrap();
    let address = first[0].local_addr().unwrap();
    let mut client = std::net::TcpStream::connect(address).unwrap();
    first[0].set_nonblocking(false).unwrap();
    // The side that closes first, ours, is left in TIME_WAIT.
    drop(first[0].accept().unwrap());
    drop(first);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    drop(client);
    bind(address, 1).unwrap();
}

#[test]
fn the_age_is_drawn_within_a_fifth() {
    let age = |chance| Limits::default().drawn(chance).age.as_secs_f64().round();
    assert_eq!((age(0.0), age(0.5), age(1.0)), (240.0, 300.0, 360.0));
}
