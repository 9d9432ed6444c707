//! HTTP/2 by hand: frames that no well-behaved client library would send.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinSet,
    time::timeout,
};

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// Settings' numbers.
pub const INITIAL_WINDOW_SIZE: u16 = 4;

/// Error codes (RFC 9113, 7).
pub const CANCEL: u32 = 8;
pub const ENHANCE_YOUR_CALM: u32 = 11;

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame").to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

pub fn settings(all: &[(u16, u32)]) -> Vec<u8> {
    let payload: Vec<u8> = all
        .iter()
        .flat_map(|(name, value)| [&name.to_be_bytes()[..], &value.to_be_bytes()].concat())
        .collect();
    frame(SETTINGS, 0, 0, &payload)
}

pub fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())
}

/// Header fields as HPACK literals, neither indexed nor compressed.
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        text(&mut block, name);
        text(&mut block, value);
    }
    block
}

/// A literal that enters the dynamic table, where one byte names it from then on.
pub fn indexed(name: &str, value: &str) -> Vec<u8> {
    let mut block = vec![0x40];
    text(&mut block, name);
    text(&mut block, value);
    block
}

/// The newest entry of the dynamic table.
pub const NEWEST: u8 = 0x80 | 62;

fn text(block: &mut Vec<u8>, text: &str) {
    const PREFIX_MAX: usize = 127;
    if text.len() < PREFIX_MAX {
        block.push(u8::try_from(text.len()).expect("short"));
    } else {
        block.push(0x7F);
        let mut rest = text.len() - PREFIX_MAX;
        while rest >= 128 {
            block.push(u8::try_from(rest % 128).expect("seven bits") | 0x80);
            rest /= 128;
        }
        block.push(u8::try_from(rest).expect("seven bits"));
    }
    block.extend(text.as_bytes());
}

/// The header block of a gRPC call.
pub fn call(method: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let path = format!("/payment.v1.PaymentService/{method}");
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", &path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    block(&[&fields[..], more].concat())
}

/// A message in gRPC's framing.
pub fn message(message: &impl prost::Message) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    let length = u32::try_from(bytes.len()).expect("small").to_be_bytes();
    [&[0][..], &length, &bytes].concat()
}

/// What a server has sent.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Frames by kind.
    pub frames: [u64; 10],
    pub data_bytes: usize,
    /// Code and debug text.
    pub goaway: Option<(u32, String)>,
    pub closed: bool,
}

/// The abusive end of a connection.
pub struct Peer {
    write: OwnedWriteHalf,
    /// While nobody reads.
    read: Option<OwnedReadHalf>,
    seen: Arc<Mutex<Seen>>,
    reading: JoinSet<()>,
}

impl Peer {
    /// Connected, and nothing said.
    pub async fn silent(port: u16) -> Self {
        let tcp = TcpStream::connect(("127.0.0.1", port)).await.expect("a connection");
        let (read, write) = tcp.into_split();
        Self { write, read: Some(read), seen: Arc::default(), reading: JoinSet::new() }
    }

    /// Speaks HTTP/2 and reads nothing until it is told to.
    pub async fn deaf(port: u16, all: &[(u16, u32)]) -> Self {
        let mut peer = Self::silent(port).await;
        peer.send(&[PREFACE, &settings(all)].concat()).await;
        peer
    }

    /// Speaks HTTP/2 and reads all that comes.
    pub async fn open(port: u16, all: &[(u16, u32)]) -> Self {
        let mut peer = Self::deaf(port, all).await;
        peer.listen();
        peer
    }

    pub fn listen(&mut self) {
        if let Some(read) = self.read.take() {
            self.reading.spawn(listen(read, Arc::clone(&self.seen)));
        }
    }

    /// False: the server takes no more.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        self.write.write_all(bytes).await.is_ok()
    }

    /// Sends these bytes over and over, until the time is up or the server takes no more; how often.
    pub async fn flood(&mut self, bytes: &[u8], times: usize, within: Duration) -> usize {
        let mut sent = 0;
        let flood = async {
            while sent < times && self.write.write_all(bytes).await.is_ok() {
                sent += 1;
            }
        };
        let _time_is_up = timeout(within, flood).await;
        sent
    }

    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Waits for the server to end the connection.
    pub async fn ended(&mut self, within: Duration) -> Seen {
        self.listen();
        let _late = timeout(within, self.reading.join_next()).await;
        self.seen()
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn listen(mut read: OwnedReadHalf, seen: Arc<Mutex<Seen>>) {
    loop {
        let mut head = [0; 9];
        let mut payload = Vec::new();
        let got = async {
            read.read_exact(&mut head).await?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            payload = vec![0; usize::try_from(length).expect("24 bits")];
            read.read_exact(&mut payload).await
        };
        let got = got.await;
        let mut seen = lock(&seen);
        if got.is_err() {
            seen.closed = true;
            return;
        }
        if let Some(count) = seen.frames.get_mut(usize::from(head[3])) {
            *count += 1;
        }
        match (head[3], payload.as_slice()) {
            (DATA, data) => seen.data_bytes += data.len(),
            (GOAWAY, [_, _, _, _, a, b, c, d, text @ ..]) => {
                let code = u32::from_be_bytes([*a, *b, *c, *d]);
                seen.goaway = Some((code, String::from_utf8_lossy(text).into_owned()));
            }
            _ => {}
        }
    }
}
