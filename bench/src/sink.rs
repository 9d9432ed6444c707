//! Where webhooks and events go in the benchmarks: a process of its own that takes both and costs little.
//!
//! It reads of HTTP/1.1 what it must, the length of a body, and of `PutEvents` how many entries there are.

use std::{
    convert::Infallible,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
};

use crate::companion::Companion;

/// A call of `PutEvents` has no more entries.
const ENTRIES_MAX: usize = 10;
/// Once in each entry; within the text of a `Detail` its quotes are escaped.
const ENTRY: &[u8] = b"\"DetailType\":";
const HEAD_END: &[u8] = b"\r\n\r\n";
const LENGTH: &[u8] = b"content-length:";
const BUFFER_BYTES: usize = 16 * 1024;

/// `bin/sink.rs`; ends with this value.
pub struct Sink(Companion);

/// How many have arrived, repeats included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    pub webhooks: u64,
    pub events: u64,
}

impl Sink {
    /// # Errors
    /// Where it does not start.
    pub fn start() -> Result<Self, String> {
        Companion::start("sink", &[]).map(Self)
    }

    pub fn address(&self) -> SocketAddr {
        self.0.address()
    }

    pub fn pid(&self) -> u32 {
        self.0.pid()
    }

    pub fn webhook_url(&self) -> String {
        format!("http://{}/hooks/payment", self.address())
    }

    /// For `AWS_ENDPOINT_URL`.
    pub fn aws_url(&self) -> String {
        format!("http://{}", self.address())
    }

    /// # Errors
    /// Where it no longer answers.
    pub fn received(&self) -> Result<Received, String> {
        let ask = || {
            let mut stream = TcpStream::connect(self.address())?;
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
            let mut reply = String::new();
            stream.read_to_string(&mut reply).map(|_| reply)
        };
        let reply = ask().map_err(|error| format!("the sink: {error}"))?;
        let mut counts = reply.split_whitespace().map(str::parse);
        match (counts.next(), counts.next()) {
            (Some(Ok(webhooks)), Some(Ok(events))) => Ok(Received { webhooks, events }),
            _ => Err(format!("the sink answers {reply:?}")),
        }
    }
}

/// Serves until the process ends; says on standard output where.
///
/// # Errors
/// Where the system has no port.
pub async fn serve() -> Result<Infallible, String> {
    let text = |error: std::io::Error| error.to_string();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(text)?;
    println!("{}", listener.local_addr().map_err(text)?);
    let counts = Arc::new(Counts::default());
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.map_err(text)?;
        let counts = Arc::clone(&counts);
        connections.spawn(async move {
            // Whoever sends something else, or breaks off, is missed where it matters: in the counts.
            let _ = answer(stream, &counts).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

#[derive(Default)]
struct Counts {
    webhooks: AtomicU64,
    events: AtomicU64,
}

async fn answer(mut stream: tokio::net::TcpStream, counts: &Counts) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let replies: Vec<Vec<u8>> = (0..=ENTRIES_MAX).map(events_reply).collect();
    let mut unread = Vec::with_capacity(BUFFER_BYTES);
    while stream.read_buf(&mut unread).await? > 0 {
        while let Some((head, body)) = request(&unread) {
            if head.starts_with(b"GET ") {
                let [webhooks, events] = [&counts.webhooks, &counts.events].map(load);
                return stream.write_all(format!("{webhooks} {events}\n").as_bytes()).await;
            }
            let length = head.len() + body.len();
            if head.starts_with(b"POST / ") {
                let entries = entries(body);
                counts.events.fetch_add(entries as u64, Ordering::Relaxed);
                stream.write_all(&replies[entries.min(ENTRIES_MAX)]).await?;
            } else {
                counts.webhooks.fetch_add(1, Ordering::Relaxed);
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await?;
            }
            unread.drain(..length);
        }
    }
    Ok(())
}

fn load(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

/// Head and body of the first request, once all of it is there.
fn request(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let head_end = HEAD_END.len() + bytes.windows(HEAD_END.len()).position(|w| w == HEAD_END)?;
    let (head, rest) = bytes.split_at(head_end);
    let length = head.split(|byte| *byte == b'\n').find_map(|line| {
        let (name, value) = line.split_at_checked(LENGTH.len())?;
        name.eq_ignore_ascii_case(LENGTH).then_some(value)
    });
    let length = length.and_then(|value| std::str::from_utf8(value).ok()?.trim().parse().ok());
    Some((head, rest.get(..length.unwrap_or(0))?))
}

fn entries(body: &[u8]) -> usize {
    body.windows(ENTRY.len()).filter(|window| *window == ENTRY).count()
}

fn events_reply(entries: usize) -> Vec<u8> {
    let entries = vec![r#"{"EventId":"00000000-0000-0000-0000-000000000000"}"#; entries].join(",");
    let body = format!(r#"{{"FailedEntryCount":0,"Entries":[{entries}]}}"#);
    let length = body.len();
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/x-amz-json-1.1\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_taken_when_all_of_it_is_there() {
        let all = b"POST /hook HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcPOST";
        let (head, body) = request(all).unwrap();
        assert!(head.ends_with(b"\r\n\r\n"));
        assert_eq!(body, b"abc");
        let end = head.len() + body.len();
        assert_eq!(request(&all[..end - 1]), None);
        assert_eq!(request(&all[end..]), None);
    }

    #[test]
    fn entries_are_told_from_what_is_in_them() {
        let detail = r#"{\"DetailType\":1}"#;
        let entry = format!(r#"{{"Detail":"{detail}","DetailType":"x"}}"#);
        assert_eq!(entries(format!(r#"{{"Entries":[{entry},{entry}]}}"#).as_bytes()), 2);
        assert_eq!(entries(b"{}"), 0);
    }
}
