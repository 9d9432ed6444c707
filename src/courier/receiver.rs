//! The other side, for tests: a receiver that answers as it is told, byte for byte.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use aws_config::SdkConfig;
use aws_sdk_eventbridge::config::{Credentials, SharedCredentialsProvider};
use http::{HeaderMap, HeaderName, HeaderValue};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};

use super::{
    Parcel,
    aws::{self, AwsSettings},
};
use crate::domain::{delivery::Topic, ids::PaymentId, payment::Trace, time::Timestamp};

pub const NOW: Timestamp = Timestamp::from_ms(1_767_225_600_250);
/// Nothing here waits longer than this for something that must come.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub fn parcel(n: u32, url: Option<&str>) -> Parcel {
    let payment = PaymentId::from_parts(NOW, 7);
    Parcel {
        payment,
        n,
        event_id: payment.event(n),
        topic: Topic::StatusUpdated,
        at: NOW,
        url: url.map(str::to_owned),
        body: format!("{{\"event_id\":\"{}\",\"n\":{n}}}", payment.event(n)).into(),
        trace: Trace { trace_id: [0xab; 16], parent_span: [0xcd; 8], sampled: true },
        death: None,
    }
}

/// An AWS at this address.
pub async fn aws_config(addr: SocketAddr) -> SdkConfig {
    let settings = AwsSettings {
        region: Some("ap-northeast-2".into()),
        endpoint_url: Some(format!("http://{addr}")),
        ..AwsSettings::default()
    };
    let dummy = Credentials::new("test", "test", None, None, "test");
    let config = aws::sdk_config(&settings).await.into_builder();
    config.credentials_provider(SharedCredentialsProvider::new(dummy)).build()
}

/// As AWS's JSON protocols answer.
pub fn aws_reply(status: u16, body: &str) -> Answer {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/x-amz-json-1.1\r\ncontent-length: {length}\r\n\r\n"
    );
    Answer::Keep((head + body).into())
}

/// What comes after a request.
pub enum Answer {
    Keep(Vec<u8>),
    Close(Vec<u8>),
    /// Ends the connection with RST.
    Reset(Vec<u8>),
    Hang,
    /// Then a byte every few milliseconds, until the other side is gone.
    Drip(Vec<u8>),
    /// Then bytes as fast as they go, until the other side is gone.
    Flood(Vec<u8>),
}

#[derive(Debug)]
pub struct Seen {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    /// Which connection it came on, from 0.
    pub connection: usize,
}

pub struct Receiver {
    pub addr: SocketAddr,
    pub seen: mpsc::UnboundedReceiver<Seen>,
    /// One for every drip or flood that the other side has cut off.
    pub cut: mpsc::UnboundedReceiver<()>,
    _task: JoinSet<()>,
}

struct Script<F> {
    answer: F,
    requests: AtomicUsize,
    seen: mpsc::UnboundedSender<Seen>,
    cut: mpsc::UnboundedSender<()>,
}

impl Receiver {
    /// `answer` gets the number of the request, from 0, over all connections.
    pub async fn start<F>(answer: F) -> Self
    where
        F: Fn(usize, &Seen) -> Answer + Send + Sync + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (seen, seen_rx) = mpsc::unbounded_channel();
        let (cut, cut_rx) = mpsc::unbounded_channel();
        let script = Arc::new(Script { answer, requests: AtomicUsize::new(0), seen, cut });
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            for number in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                let script = Arc::clone(&script);
                // A connection that the other side breaks off is part of the play.
                connections
                    .spawn(async move { script.serve(stream, number).await.unwrap_or_default() });
            }
        });
        Self { addr, seen: seen_rx, cut: cut_rx, _task: task }
    }

    /// Answers every request alike.
    pub async fn always(reply: &str) -> Self {
        let reply = reply.as_bytes().to_vec();
        Self::start(move |_, _| Answer::Keep(reply.clone())).await
    }

    pub fn url(&self) -> String {
        format!("http://{}/hook", self.addr)
    }

    pub async fn next(&mut self) -> Seen {
        tokio::time::timeout(DEADLINE, self.seen.recv()).await.unwrap().unwrap()
    }
}

impl<F: Fn(usize, &Seen) -> Answer> Script<F> {
    async fn serve(&self, mut stream: TcpStream, connection: usize) -> io::Result<()> {
        while let Some(seen) = read_request(&mut stream, connection).await? {
            let answer = (self.answer)(self.requests.fetch_add(1, Ordering::SeqCst), &seen);
            self.seen.send(seen).unwrap_or_default();
            match answer {
                Answer::Keep(bytes) => stream.write_all(&bytes).await?,
                Answer::Close(bytes) => return stream.write_all(&bytes).await,
                Answer::Reset(bytes) => {
                    stream.write_all(&bytes).await?;
                    return socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                }
                Answer::Hang => std::future::pending().await,
                Answer::Drip(bytes) => {
                    stream.write_all(&bytes).await?;
                    while stream.write_all(b"x").await.is_ok() {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    self.cut.send(()).unwrap_or_default();
                }
                Answer::Flood(bytes) => {
                    stream.write_all(&bytes).await?;
                    while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
                    self.cut.send(()).unwrap_or_default();
                }
            }
        }
        Ok(())
    }
}

async fn read_request(stream: &mut TcpStream, connection: usize) -> io::Result<Option<Seen>> {
    let mut bytes = Vec::new();
    let head_bytes = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    };
    let head = String::from_utf8(bytes[..head_bytes].to_vec()).unwrap();
    let mut lines = head.lines();
    let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let headers: HeaderMap = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(k, v)| (HeaderName::try_from(k).unwrap(), HeaderValue::try_from(v).unwrap()))
        .collect();
    let length = headers["content-length"].to_str().unwrap().parse::<usize>().unwrap();
    let mut body = bytes.split_off(head_bytes);
    while body.len() < length {
        if stream.read_buf(&mut body).await? == 0 {
            return Ok(None);
        }
    }
    Ok(Some(Seen { path, headers, body, connection }))
}

/// A port that nobody listens on, and nobody else gets while the socket lives.
pub fn deaf_port() -> (Socket, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    let addr = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, addr)
}
