//! Nobody gets inside: hostile URLs, names and answers, and what was dialled.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
};

use super::{
    Courier, WebhookCourier,
    connect::{BoxError, ConnectSettings, Connector, Network, connector, over},
    receiver::{Answer, DEADLINE, NOW, Receiver, parcel},
    tls,
    webhook::WebhookSettings,
};
use crate::{
    domain::{
        delivery::{Attempted, Verdict},
        signature::Signer,
    },
    egress::{AllowedHosts, AllowedNetworks, Policy},
};

const EMPTY_OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
const PUBLIC: &str = "8.8.8.8";
/// Of these nothing must be connected to in production.
const INSIDE_V4: [[u8; 4]; 16] = [
    [127, 0, 0, 1],
    [127, 255, 255, 254],
    [10, 0, 0, 1],
    [172, 16, 5, 4],
    [192, 168, 1, 1],
    [100, 64, 0, 1],
    [100, 100, 100, 200],
    [169, 254, 169, 254],
    [169, 254, 170, 2],
    [168, 63, 129, 16],
    [0, 0, 0, 0],
    [0, 1, 2, 3],
    [192, 0, 0, 192],
    [198, 18, 0, 1],
    [224, 0, 0, 1],
    [240, 0, 0, 1],
];
const INSIDE_V6: [&str; 12] = [
    "::",
    "::1",
    "fe80::1",
    "fe80::a9fe:a9fe",
    "fc00::1",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd20:ce::254",
    "fec0::1",
    "ff02::1",
    "5f00::1",
    "2001:db8::1",
];

type Answers = Arc<dyn Fn(&str, usize) -> Vec<IpAddr> + Send + Sync>;

/// A network that answers as it is told and notes what is asked of it.
#[derive(Clone)]
struct Watched {
    /// To a name, the n-th time that any is asked for.
    answers: Answers,
    /// Where every dial ends up; `None`: nowhere, refused.
    leads_to: Option<SocketAddr>,
    look_ups: Arc<AtomicUsize>,
    dialled: Arc<Mutex<Vec<SocketAddr>>>,
}

impl Watched {
    fn new(answers: impl Fn(&str, usize) -> Vec<IpAddr> + Send + Sync + 'static) -> Self {
        Self {
            answers: Arc::new(answers),
            leads_to: None,
            look_ups: Arc::default(),
            dialled: Arc::default(),
        }
    }

    fn dialled(&self) -> Vec<String> {
        self.dialled.lock().unwrap().iter().map(|address| address.ip().to_string()).collect()
    }

    fn courier(&self, policy: Policy) -> WebhookCourier<Connector<Self>> {
        WebhookCourier::with_connector(over(self.clone(), connecting(policy)), settings())
    }
}

#[async_trait]
impl Network for Watched {
    async fn look_up(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let answers = (self.answers)(host, self.look_ups.fetch_add(1, Ordering::SeqCst));
        Ok(answers.into_iter().map(|ip| SocketAddr::new(ip, port)).collect())
    }

    async fn dial(&self, addresses: Vec<SocketAddr>) -> Result<TcpStream, BoxError> {
        self.dialled.lock().unwrap().extend(addresses);
        match self.leads_to {
            Some(address) => Ok(TcpStream::connect(address).await?),
            None => Err(io::Error::from(io::ErrorKind::ConnectionRefused).into()),
        }
    }
}

fn connecting(policy: Policy) -> ConnectSettings {
    ConnectSettings {
        tls: tls::with_roots(rustls::RootCertStore::empty()),
        policy,
        connect_max: DEADLINE,
        attempt_max: DEADLINE,
    }
}

fn settings() -> WebhookSettings {
    let signer = Signer::new(&["a test's secret"]).unwrap();
    WebhookSettings { signer, timeout: DEADLINE, idle_per_origin: 8 }
}

/// Nothing is allowed.
fn production() -> Policy {
    Policy::default()
}

fn allowing_loopback() -> Policy {
    Policy { networks: AllowedNetworks::parse("127.0.0.0/8").unwrap(), ..Policy::default() }
}

async fn post(courier: &impl Courier, url: &str) -> Attempted {
    let parcels = [parcel(1, Some(url))];
    let attempted = courier.attempt(&parcels, NOW);
    tokio::time::timeout(DEADLINE, attempted).await.unwrap().pop().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[track_caller]
fn assert_refused(done: &Attempted, what: &str) {
    let error = done.attempt.error.as_deref();
    assert_eq!((error, &done.verdict), (Some("ADDRESS_REFUSED"), &Verdict::Refused), "{what}");
}

// ---- The corpus ----

/// The spellings of one IPv4 address that some parser or other takes.
fn spellings([a, b, c, d]: [u8; 4]) -> Vec<String> {
    let whole = u32::from_be_bytes([a, b, c, d]);
    let low24 = u32::from_be_bytes([0, b, c, d]);
    let low16 = u16::from_be_bytes([c, d]);
    let dotted = format!("{a}.{b}.{c}.{d}");
    let digits = |base: char, zero: char| {
        let turn = |digit: char| match digit.to_digit(10) {
            Some(0) => zero,
            Some(n) => char::from_u32(base as u32 + n).unwrap(),
            None => digit,
        };
        dotted.chars().map(turn).collect::<String>()
    };
    vec![
        dotted.clone(),
        format!("{dotted}."),
        format!("{whole}"),
        format!("0x{whole:x}"),
        format!("0X{whole:08X}"),
        format!("0{whole:o}"),
        format!("{a}.{low24}"),
        format!("{a}.{b}.{low16}"),
        format!("0x{a:x}.{low24}"),
        format!("0{a:o}.0{b:o}.0{c:o}.0{d:o}"),
        format!("0x{a:x}.0x{b:x}.0x{c:x}.0x{d:x}"),
        format!("0x{a:02X}.0{b:o}.{c}.0x{d:x}"),
        format!("000{a:o}.000{b:o}.000{c:o}.000{d:o}"),
        digits('\u{ff10}', '\u{ff10}'),   // full width
        digits('\u{245f}', '\u{24ea}'),   // circled
        digits('\u{1d7ce}', '\u{1d7ce}'), // mathematical bold
        dotted.replace('.', "\u{3002}"),  // ideographic full stop
        dotted.replace('.', "\u{ff0e}"),  // full width full stop
        dotted.replace('.', "%2e"),
        dotted.bytes().map(|byte| format!("%{byte:02x}")).collect(),
        dotted.chars().flat_map(|c| [c, '\u{ad}']).collect(), // soft hyphens
    ]
}

fn wrappings([a, b, c, d]: [u8; 4]) -> Vec<String> {
    let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    let dotted = Ipv4Addr::new(a, b, c, d);
    let full = Ipv6Addr::from([0, 0, 0, 0, 0, 0xffff, high, low]).segments();
    let full = full.map(|segment| format!("{segment:04X}")).join(":");
    [
        format!("::ffff:{dotted}"),
        format!("::FFFF:{high:x}:{low:x}"),
        full,
        format!("::{dotted}"),
        format!("::ffff:0:{dotted}"),
        format!("64:ff9b::{dotted}"),
        format!("64:ff9b:1::{dotted}"),
        format!("64:ff9b:1:{high:x}:{c:x}:{:x}::", u16::from(d) << 8),
        format!("2002:{high:x}:{low:x}::1"),
        format!("2001:0:808:808::{:x}:{:x}", !high, !low),
        format!("2001:0:{high:x}:{low:x}::f7f7:f7f7"),
        format!("2606:1:2:3:0:5efe:{dotted}"),
    ]
    .map(|address| format!("[{address}]"))
    .to_vec()
}

/// Ways to dress up a URL for a host.
const DRESSES: [&str; 14] = [
    "http://HOST/",
    "https://HOST/hook",
    "HtTp://HOST:80/",
    "http://HOST:8443/a?b=http://example.com/",
    "http://HOST:0/",
    "http://HOST:65535/#@example.com",
    "http://HOST/@example.com",
    "http://HOST?@example.com/",
    "http:\\\\HOST\\",
    "http:/HOST",
    "http:////HOST/",
    "  http://HOST/\n",
    "ht\ttp://\tHOST/",
    "http://HOST/..%2f..//example.com",
];
/// With credentials, which are never sent: refused before anything is looked up.
const WITH_CREDENTIALS: [&str; 4] = [
    "http://example.com@HOST/",
    "http://example.com:80@HOST/",
    "https://example.com%2f@HOST/",
    "http://user:password@HOST:80/",
];

struct Hostile {
    url: String,
    has_credentials: bool,
}

/// Every host in two dresses that a seed picks, and once with credentials.
fn corpus() -> Vec<Hostile> {
    let mut hosts: Vec<String> =
        INSIDE_V4.iter().flat_map(|v4| [spellings(*v4), wrappings(*v4)].concat()).collect();
    hosts.extend(INSIDE_V6.iter().flat_map(|v6| {
        let full = v6.parse::<Ipv6Addr>().unwrap().segments().map(|s| format!("{s:04x}"));
        [format!("[{v6}]"), format!("[{}]", v6.to_uppercase()), format!("[{}]", full.join(":"))]
    }));
    // Names: whatever they are, they lead inside.
    for name in [
        "localhost",
        "LOCALHOST",
        "localhost.",
        "localhost.localdomain",
        "metadata.google.internal",
        "metadata",
        "kubernetes.default.svc",
        "127.0.0.1.wildcard.example",
        "example.com",
        "EXAMPLE.com.",
        "xn--e1afmkfd.example",
        "127.0.0.1x",
        "a..b",
        "-",
        "_",
    ] {
        hosts.push(name.to_owned());
    }
    let mut state = 0x5eed_u64;
    let mut pick = move |n: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % n
    };
    let mut urls = Vec::new();
    for host in hosts {
        let mut dress = |dresses: &[&str], has_credentials| {
            let url = dresses[pick(dresses.len())].replace("HOST", &host);
            urls.push(Hostile { url, has_credentials });
        };
        dress(&DRESSES[..1], false);
        dress(&DRESSES, false);
        dress(&WITH_CREDENTIALS, true);
    }
    urls
}

#[tokio::test]
async fn no_hostile_url_is_dialled() {
    let corpus = corpus();
    let distinct: BTreeSet<&str> = corpus.iter().map(|hostile| hostile.url.as_str()).collect();
    assert!(distinct.len() >= 1_000, "{}", distinct.len());
    // The worst of resolvers: every name is inside, beside an address that is not.
    let network = Watched::new(|_, n| {
        let inside = Ipv4Addr::from(INSIDE_V4[n % INSIDE_V4.len()]).into();
        match n % 3 {
            0 => vec![inside],
            1 => vec![ip(PUBLIC), inside],
            _ => vec![inside, ip(PUBLIC)],
        }
    });
    let courier = network.courier(production());
    let mut bad_urls = 0;
    for Hostile { url, has_credentials } in &corpus {
        let done = post(&courier, url).await;
        if done.attempt.error.as_deref() == Some("BAD_URL") {
            bad_urls += usize::from(!has_credentials);
            assert_eq!(done.verdict, Verdict::Refused);
        } else {
            assert_refused(&done, url);
            assert!(!has_credentials, "{url}");
        }
        assert_eq!(network.dialled(), [""; 0], "{url}");
    }
    // Few are so odd that the URL parser already refuses them; the rest reached the check.
    assert!(bad_urls * 20 < corpus.len(), "{bad_urls} of {}", corpus.len());
}

#[tokio::test]
async fn on_the_machines_own_network_no_spelling_of_loopback_arrives() {
    let v4 = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = v4.local_addr().unwrap().port();
    // Where the machine has no IPv6, one listener less.
    let v6 = TcpListener::bind(("::1", port)).await.ok();
    let strict = WebhookCourier::with_connector(connector(connecting(production())), settings());
    let loopback = [127, 0, 0, 1];
    let mut hosts = [spellings(loopback), wrappings(loopback)].concat();
    hosts.extend(["[::1]", "localhost", "LocalHost", "0", "[::]"].map(str::to_owned));
    for host in hosts {
        for scheme in ["http", "https"] {
            let done = post(&strict, &format!("{scheme}://{host}:{port}/")).await;
            assert_refused(&done, &host);
        }
    }
    for listener in [Some(&v4), v6.as_ref()].into_iter().flatten() {
        let accepted = tokio::time::timeout(std::time::Duration::ZERO, listener.accept()).await;
        assert!(accepted.is_err(), "somebody connected");
    }
    // The control: where it is allowed, the same spelling does arrive.
    let lenient =
        WebhookCourier::with_connector(connector(connecting(allowing_loopback())), settings());
    let url = format!("http://0x7f.1:{port}/");
    let answering = async { drop(v4.accept().await.unwrap()) };
    let (done, ()) = tokio::join!(post(&lenient, &url), answering);
    assert_eq!(done.attempt.error.as_deref(), Some("RESET"));
}

// ---- Names ----

#[tokio::test]
async fn a_name_is_looked_up_once_and_only_what_was_checked_is_dialled() {
    let network =
        Watched::new(|_, n| if n == 0 { vec![ip(PUBLIC)] } else { vec![ip("127.0.0.1")] });
    let courier = network.courier(production());
    let first = post(&courier, "http://rebind.example/").await;
    assert_eq!(first.attempt.error.as_deref(), Some("CONNECT_REFUSED"));
    assert_eq!(network.look_ups.load(Ordering::SeqCst), 1, "a second answer could be another");
    assert_eq!(network.dialled(), [PUBLIC]);

    assert_refused(&post(&courier, "http://rebind.example/").await, "the changed answer");
    assert_eq!(network.dialled(), [PUBLIC]);
}

#[tokio::test]
async fn all_of_a_names_addresses_are_dialled_or_none() {
    let good = Watched::new(|_, _| vec![ip("2606:4700:4700::1111"), ip(PUBLIC)]);
    post(&good.courier(production()), "https://two.example/").await;
    assert_eq!(good.dialled(), ["2606:4700:4700::1111", PUBLIC]);

    for bad in ["10.0.0.1", "::1", "169.254.169.254", "::ffff:127.0.0.1", "64:ff9b::a00:1"] {
        for bad_first in [true, false] {
            let network = Watched::new(move |_, _| {
                let both = [ip(bad), ip(PUBLIC)];
                if bad_first { both.to_vec() } else { both.into_iter().rev().collect() }
            });
            assert_refused(
                &post(&network.courier(production()), "http://mixed.example/").await,
                bad,
            );
            assert_eq!(network.dialled(), [""; 0]);
        }
    }
}

#[tokio::test]
async fn what_a_connection_ended_up_at_is_checked_too() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut network = Watched::new(|_, _| vec![ip(PUBLIC)]);
    network.leads_to = Some(listener.local_addr().unwrap());
    assert_refused(&post(&network.courier(production()), "http://moved.example/").await, "peer");
    assert_eq!(network.dialled(), [PUBLIC]);
    let (mut stream, _) = listener.accept().await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0, "something was sent");
}

#[tokio::test]
async fn a_kept_connection_needs_no_look_up_and_serves_no_other_name() {
    let receiver = Receiver::always(EMPTY_OK).await;
    let mut network =
        Watched::new(|_, n| vec![ip(if n == 0 { "127.0.0.1" } else { "169.254.169.254" })]);
    network.leads_to = Some(receiver.addr);
    let courier = network.courier(allowing_loopback());
    for _ in 0..3 {
        assert_eq!(post(&courier, "http://a.example/").await.verdict, Verdict::Accepted);
    }
    assert_eq!((network.look_ups.load(Ordering::SeqCst), network.dialled().len()), (1, 1));
    assert_refused(&post(&courier, "http://b.example/").await, "another name, same address before");
}

#[tokio::test]
async fn a_host_that_is_allowed_by_name_may_be_inside_and_its_neighbours_not() {
    let network = Watched::new(|_, _| vec![ip("10.0.0.1")]);
    let hosts = AllowedHosts::parse("reservation-api").unwrap();
    let courier = network.courier(Policy { hosts, ..Policy::default() });
    post(&courier, "http://Reservation-API.:8010/hook").await;
    assert_eq!(network.dialled(), ["10.0.0.1"]);
    for other in ["http://10.0.0.1/", "http://payment-db/", "http://reservation-api.example/"] {
        assert_refused(&post(&courier, other).await, other);
    }
    assert_eq!(network.dialled().len(), 1);
}

// ---- Redirects ----

#[tokio::test]
async fn a_redirect_to_the_inside_is_an_answer_and_no_order() {
    let inside = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let target = inside.local_addr().unwrap();
    let receiver = Receiver::start(move |n, _| {
        let status = [301, 302, 303, 307, 308][n];
        let head = format!(
            "HTTP/1.1 {status} Go\r\nlocation: http://{target}/\r\nrefresh: 0;url=http://{target}/\r\n"
        );
        Answer::Keep(format!("{head}content-length: 0\r\n\r\n").into_bytes())
    })
    .await;
    let network = connecting(allowing_loopback());
    let courier = WebhookCourier::with_connector(connector(network), settings());
    for status in [301, 302, 303, 307, 308] {
        let done = post(&courier, &receiver.url()).await;
        assert_eq!(done.attempt.error, Some(format!("HTTP {status}")));
        assert_eq!(done.verdict, Verdict::Retry { not_before: None });
    }
    let accepted = tokio::time::timeout(std::time::Duration::ZERO, inside.accept()).await;
    assert!(accepted.is_err(), "it was followed");
}
