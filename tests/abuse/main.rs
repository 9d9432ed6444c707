//! Hostile clients: each does its worst for at most two seconds, while others keep calling on connections
//! of their own. Not one of those calls may fail, and afterwards the process is whole and small.

mod frames;
#[path = "../support/mod.rs"]
mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, HEADERS, INITIAL_WINDOW_SIZE,
    NEWEST, PING, PREFACE, PRIORITY, Peer, SETTINGS, Seen, block, call, frame, indexed, message,
    reset, settings,
};
use payment_sim::api::pb::{
    common::v1::{Money, Pagination},
    payment::v1::{CreatePaymentIntentRequest, GetPaymentIntentRequest, ListPaymentsRequest},
};
use support::{
    Client,
    chance::Chance,
    client,
    process::{Launch, Service, get},
    until,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

const ABUSE: Duration = Duration::from_secs(2);
/// Everything here is bounded, on a slow machine too.
const SOON: Duration = Duration::from_secs(30);
/// Resident at most, ever: a debug build, the store's caches included.
const RESIDENT_MAX_KIB: u64 = 256 << 10;
const CALLERS: usize = 2;
/// Calls of the healthy that must succeed after the abuse.
const CALLS_AFTER: u64 = 20;

/// The service, and its well-behaved clients, who note each call that fails.
struct Bed {
    launch: Launch,
    service: Service,
    calls: Arc<AtomicU64>,
    stop: CancellationToken,
    /// The healthy pause.
    rest: Arc<AtomicBool>,
    callers: JoinSet<Result<(), Status>>,
    _folder: tempfile::TempDir,
}

impl Bed {
    async fn start() -> Self {
        Self::start_under(&[]).await
    }

    async fn start_under(wrapper: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let launch = Launch::new(folder.path()).with("EVENT_SINK", "none").under(wrapper);
        let mut service = launch.start();
        service.ready(SOON).await.expect("a service");
        let (calls, stop) = (Arc::<AtomicU64>::default(), CancellationToken::new());
        let (mut callers, rest) = (JoinSet::new(), Arc::<AtomicBool>::default());
        for n in 0..CALLERS {
            let client = client(launch.grpc_port);
            let calls = Arc::clone(&calls);
            callers.spawn(call_on(client, n, calls, stop.clone(), Arc::clone(&rest)));
        }
        let mut bed = Self { launch, service, calls, stop, rest, callers, _folder: folder };
        bed.more_calls().await;
        bed
    }

    fn port(&self) -> u16 {
        self.launch.grpc_port
    }

    /// Some more calls of the healthy, all well.
    async fn more_calls(&mut self) {
        let enough = self.calls.load(Ordering::Relaxed) + CALLS_AFTER;
        let went_on =
            until(SOON, || std::future::ready(self.calls.load(Ordering::Relaxed) >= enough)).await;
        if let Some(ended) = self.callers.try_join_next() {
            panic!("a healthy call failed: {ended:?}");
        }
        assert!(went_on, "the healthy are not answered any more");
    }

    /// The service and its healthy clients are as before.
    async fn unharmed(mut self) {
        self.more_calls().await;
        self.stop.cancel();
        for ended in self.callers.join_all().await {
            ended.expect("all calls of the healthy succeed");
        }
        assert_eq!(self.service.exited(), None, "the service lives");
        let metrics = get(self.launch.ops_port, "/metrics").await.expect("metrics");
        let panics: Vec<_> = metrics.lines().filter(|l| l.contains("panics_total ")).collect();
        assert!(panics.iter().any(|line| line.ends_with("panics_total 0")), "{panics:?}");
        let resident = process_kib(&self.service, "VmHWM:");
        println!("resident at most {} MiB", resident >> 10);
        assert!(resident < RESIDENT_MAX_KIB, "{} MiB", resident >> 10);
    }
}

/// Creates a payment and reads it, over and over.
async fn call_on(
    mut client: Client,
    caller: usize,
    calls: Arc<AtomicU64>,
    stop: CancellationToken,
    rest: Arc<AtomicBool>,
) -> Result<(), Status> {
    let mut n = 0;
    while !stop.is_cancelled() {
        if rest.load(Ordering::Relaxed) {
            sleep(Duration::from_millis(5)).await;
            continue;
        }
        let id = create(&mut client, &format!("healthy-{caller}-{n}"), 0).await?;
        let request = GetPaymentIntentRequest { payment_intent_id: id, ..Default::default() };
        client.get_payment_intent(request).await?;
        calls.fetch_add(1, Ordering::Relaxed);
        n += 1;
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

async fn create(client: &mut Client, reservation: &str, echo: usize) -> Result<String, Status> {
    let text = prost_types::value::Kind::StringValue("e".repeat(echo));
    let echo = (echo > 0).then(|| prost_types::Struct {
        fields: [("echo".to_owned(), prost_types::Value { kind: Some(text) })].into(),
    });
    let request = CreatePaymentIntentRequest {
        reservation_id: reservation.to_owned(),
        user_id: "abuse".to_owned(),
        amount: Some(Money { amount: 1_000, currency: "KRW".to_owned() }),
        echo,
        ..Default::default()
    };
    Ok(client.create_payment_intent(request).await?.into_inner().payment_intent_id)
}

fn process_kib(service: &Service, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", service.id())).expect("/proc");
    let line = status.lines().find(|line| line.starts_with(name)).expect("its line");
    line.split_ascii_whitespace().nth(1).expect("a number").parse().expect("a number")
}

/// Processor time that the process has used.
fn processor_time(service: &Service) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", service.id())).expect("/proc");
    let after_name = stat.rsplit_once(") ").expect("a name").1;
    let field =
        |n| -> u64 { after_name.split(' ').nth(n).expect("a field").parse().expect("a number") };
    // utime and stime, the 14th and 15th; Linux counts in hundredths for user space, whatever its HZ.
    Duration::from_millis((field(11) + field(12)) * 10)
}

fn calmed(seen: &Seen, why: &str) {
    println!("{seen:?}");
    assert!(seen.closed, "the connection is still open: {seen:?}");
    // With what is unread in its socket the server's close is a reset, which may overtake its GOAWAY.
    if let Some((code, text)) = &seen.goaway {
        assert_eq!((*code, text.as_str()), (ENHANCE_YOUR_CALM, why));
    }
}

fn odd(n: u32) -> u32 {
    2 * n + 1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rapid_reset() {
    let bed = Bed::start().await;
    let mut peer = Peer::open(bed.port(), &[]).await;
    let request = call("GetPaymentIntent", &[]);
    let flood: Vec<u8> = (0..3_000)
        .map(odd)
        .flat_map(|id| [frame(HEADERS, END_HEADERS, id, &request), reset(id)].concat())
        .collect();
    peer.send(&flood).await;
    calmed(&peer.ended(SOON).await, "too_many_resets");
    bed.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_streams_that_the_server_has_to_reset() {
    let bed = Bed::start().await;
    let mut peer = Peer::open(bed.port(), &[]).await;
    let request = call("GetPaymentIntent", &[("content-length", "5")]);
    let mut sent = 0;
    while sent < 3_000
        && peer.send(&frame(HEADERS, END_HEADERS | END_STREAM, odd(sent), &request)).await
    {
        sent += 1;
    }
    calmed(&peer.ended(SOON).await, "too_many_internal_resets");
    bed.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn continuation_without_end() {
    let bed = Bed::start().await;
    let mut peer = Peer::open(bed.port(), &[]).await;
    peer.send(&frame(HEADERS, 0, 1, &call("GetPaymentIntent", &[]))).await;
    let more = frame(CONTINUATION, 0, 1, &block(&[("x-more", &"m".repeat(1_000))]));
    peer.flood(&more, 100_000, ABUSE).await;
    let seen = peer.ended(SOON).await;
    println!("{seen:?}");
    assert!(seen.closed, "{seen:?}");
    bed.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_data() {
    let bed = Bed::start().await;
    let mut peer = Peer::open(bed.port(), &[]).await;
    peer.send(&frame(HEADERS, END_HEADERS, 1, &call("GetPaymentIntent", &[]))).await;
    peer.flood(&frame(DATA, 0, 1, &[]), 60_000, ABUSE).await;
    let seen = peer.ended(SOON).await;
    println!("{seen:?}");
    assert!(seen.closed, "{seen:?}");
    bed.unharmed().await;
}

/// Lists of the most payments, from many connections that take no byte of a reply, or one.
async fn replies_that_nobody_takes(window: u32) {
    const CONNECTIONS: usize = 20;
    const STREAMS: u32 = 128;
    let mut bed = Bed::start().await;
    let mut filler = client(bed.port());
    for n in 0..100 {
        create(&mut filler, &format!("filler-{n}"), 3_000).await.expect("a create");
    }
    let request = ListPaymentsRequest {
        pagination: Some(Pagination { page_size: 100, ..Default::default() }),
        ..Default::default()
    };
    let list = call("ListPayments", &[]);
    let before = process_kib(&bed.service, "VmRSS:");
    let mut peers = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut peer = Peer::open(bed.port(), &[(INITIAL_WINDOW_SIZE, window)]).await;
        for id in (0..STREAMS).map(odd) {
            peer.send(&frame(HEADERS, END_HEADERS, id, &list)).await;
            peer.send(&frame(DATA, END_STREAM, id, &message(&request))).await;
        }
        peers.push(peer);
    }
    sleep(ABUSE).await;
    bed.more_calls().await;
    println!("{before} -> {} KiB, {:?}", process_kib(&bed.service, "VmRSS:"), peers[0].seen());
    bed.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_window() {
    replies_that_nobody_takes(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_window_of_one_byte() {
    replies_that_nobody_takes(1).await;
}

/// Frames that the server answers, to a client that does not read the answers.
async fn answers_that_nobody_reads(question: &[u8]) {
    let bed = Bed::start().await;
    let mut peer = Peer::deaf(bed.port(), &[]).await;
    let many = question.repeat(1_000);
    let sent = peer.flood(&many, 10_000, ABUSE).await;
    println!("{sent} thousand frames");
    bed.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ping_flood() {
    answers_that_nobody_reads(&frame(PING, 0, 0, &[7; 8])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_flood() {
    answers_that_nobody_reads(&settings(&[(INITIAL_WINDOW_SIZE, 1)])).await;
}

/// As above from a client that reads, so that nothing but the server's own speed holds it back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ping_and_settings_flood_with_open_ears() {
    let bed = Bed::start().await;
    let mut peer = Peer::open(bed.port(), &[]).await;
    let both = [frame(PING, 0, 0, &[7; 8]), frame(SETTINGS, 0, 0, &[])].concat();
    let sent = peer.flood(&both.repeat(500), 10_000, ABUSE).await;
    println!("{sent} thousand frames, {:?}", peer.seen());
    bed.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn header_bombs() {
    let bed = Bed::start().await;
    let mut plain = Peer::open(bed.port(), &[]).await;
    let big = "b".repeat(14_000);
    for id in (0..200).map(odd) {
        let fields = call("GetPaymentIntent", &[("x-big", &big)]);
        plain.send(&frame(HEADERS, END_HEADERS | END_STREAM, id, &fields)).await;
    }
    // One byte a field of four kilobytes: 16 KiB of frame become 64 MiB of headers.
    let mut packed = Peer::open(bed.port(), &[]).await;
    let entry = indexed("x-packed", &"p".repeat(4_000));
    let fields = [call("GetPaymentIntent", &[]), entry, vec![NEWEST; 10_000]].concat();
    for id in (0..200).map(odd) {
        packed.send(&frame(HEADERS, END_HEADERS | END_STREAM, id, &fields)).await;
    }
    sleep(ABUSE).await;
    let (plain, packed) = (plain.seen(), packed.seen());
    println!("plain {plain:?}\npacked {packed:?}");
    // 431 for the one, and the end for the other.
    assert!(packed.closed);
    bed.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn priority_churn() {
    let bed = Bed::start().await;
    let mut peer = Peer::open(bed.port(), &[]).await;
    let mut chance = Chance::seeded(5);
    let churn: Vec<u8> = (0..1_000)
        .flat_map(|_| {
            let mut id = || odd(u32::try_from(chance.below(1 << 30)).expect("31 bits"));
            let (stream, parent) = (id(), id());
            frame(PRIORITY, 0, stream, &[&parent.to_be_bytes()[..], &[255]].concat())
        })
        .collect();
    let sent = peer.flood(&churn, 10_000, ABUSE).await;
    println!("{sent} thousand frames, {:?}", peer.seen());
    bed.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_preface_and_none() {
    let bed = Bed::start().await;
    let mut half = Peer::silent(bed.port()).await;
    half.send(&PREFACE[..12]).await;
    let mut none = Peer::silent(bed.port()).await;
    assert!(half.ended(SOON).await.closed, "half a preface");
    assert!(none.ended(SOON).await.closed, "none");
    bed.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http1_on_the_grpc_port() {
    let bed = Bed::start().await;
    let mut tcp = TcpStream::connect(("127.0.0.1", bed.port())).await.expect("a connection");
    tcp.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.expect("a request");
    let mut rest = Vec::new();
    let _end_or_reset = timeout(SOON, tcp.read_to_end(&mut rest)).await.expect("it is closed");
    bed.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_in_drips_ends_at_its_deadline() {
    let bed = Bed::start().await;
    let tcp = TcpStream::connect(("127.0.0.1", bed.port())).await.expect("a connection");
    let (mut requests, connection) = h2::client::handshake(tcp).await.expect("HTTP/2");
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        // Ends with the test.
        let _ = connection.await;
    });
    let request =
        http::Request::post("http://localhost/payment.v1.PaymentService/GetPaymentIntent")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-timeout", "3S")
            .body(())
            .expect("a request");
    let (reply, mut body) = requests.send_request(request, false).expect("a stream");
    tasks.spawn(async move {
        // It announces 100 bytes; the stream is reset under it when the time is up.
        let text = [&[0, 0, 0, 0, 100][..], &[b'd'; 100]].concat();
        for byte in text {
            if body.send_data(Bytes::copy_from_slice(&[byte]), false).is_err() {
                return;
            }
            sleep(Duration::from_secs(1)).await;
        }
    });
    let reply = timeout(SOON, reply).await.expect("a reply").expect("no reset");
    assert_eq!(reply.headers()["grpc-status"], "4");
    bed.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn six_hundred_idle_connections() {
    let bed = Bed::start().await;
    let mut peers = Vec::new();
    for n in 0..600 {
        peers.push(match n % 2 {
            0 => Peer::deaf(bed.port(), &[]).await,
            _ => Peer::silent(bed.port()).await,
        });
    }
    sleep(ABUSE).await;
    bed.unharmed().await;
}

/// Without descriptors accepting rests instead of spinning, and goes on when some are free again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_descriptors_left() {
    let mut bed = Bed::start_under(&["sh", "-c", "ulimit -n 64; exec \"$0\""]).await;
    let mut peers = Vec::new();
    for _ in 0..150 {
        peers.push(Peer::silent(bed.port()).await);
    }
    sleep(Duration::from_millis(500)).await;
    bed.more_calls().await;
    // A spin takes a whole processor; resting, with nobody calling, next to nothing.
    bed.rest.store(true, Ordering::Relaxed);
    sleep(Duration::from_millis(200)).await;
    let before = processor_time(&bed.service);
    sleep(ABUSE).await;
    let used = processor_time(&bed.service) - before;
    println!("{used:?} of {ABUSE:?}");
    assert!(used < ABUSE / 4, "{used:?}");
    let log = std::fs::read_to_string(bed.launch.log()).expect("a log");
    assert!(log.contains("accepting rests"), "it ran out of descriptors: {log}");
    bed.rest.store(false, Ordering::Relaxed);
    bed.more_calls().await;
    drop(peers);
    let mut newcomer = client(bed.port());
    create(&mut newcomer, "newcomer", 0).await.expect("places are free again");
    bed.unharmed().await;
}
