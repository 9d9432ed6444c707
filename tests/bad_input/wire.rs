//! gRPC by hand over HTTP/2: what no client library would send.

use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Request};
use tokio::{net::TcpStream, task::JoinSet, time::timeout};
use tonic::{Code, Status};

/// Longest wait for one reply; the service's own deadline is 10 s.
const REPLY_WITHIN: Duration = Duration::from_secs(30);

/// A connection and the task that drives it.
pub struct Wire {
    send: SendRequest<Bytes>,
    port: u16,
    _driver: JoinSet<()>,
}

/// What came back, as it stood on the wire.
pub struct Reply {
    pub status: Status,
    pub body: Vec<u8>,
    /// Of the headers that carry the status: names, values and 32 bytes each, as HTTP/2 counts.
    pub status_bytes: usize,
}

impl Wire {
    pub async fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("the service listens");
        stream.set_nodelay(true).expect("a socket");
        let (send, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // Its end shows in the calls.
            let _ = connection.await;
        });
        Self { send, port, _driver: driver }
    }

    /// One call with these very bytes as its body. An error is what no caller should ever see.
    pub async fn call(
        &mut self,
        path: &str,
        headers: &[(&'static str, Bytes)],
        body: Bytes,
    ) -> Result<Reply, String> {
        match timeout(REPLY_WITHIN, self.exchange(path, headers, body)).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => {
                *self = Self::connect(self.port).await;
                Err(error)
            }
            Err(_) => {
                *self = Self::connect(self.port).await;
                Err(format!("no reply within {REPLY_WITHIN:?}"))
            }
        }
    }

    async fn exchange(
        &mut self,
        path: &str,
        headers: &[(&'static str, Bytes)],
        body: Bytes,
    ) -> Result<Reply, String> {
        let mut request = Request::post(format!("http://127.0.0.1:{}{path}", self.port))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in headers {
            let value = http::HeaderValue::from_maybe_shared(value.clone()).expect("a value");
            request = request.header(*name, value);
        }
        let request = request.body(()).expect("a request");
        let mut send = self.send.clone().ready().await.map_err(|e| format!("connection: {e}"))?;
        let (response, mut stream) =
            send.send_request(request, false).map_err(|e| format!("request: {e}"))?;
        // An early refusal may have closed the stream already.
        let _ = stream.send_data(body, true);
        let (head, mut recv) = response.await.map_err(|e| format!("response: {e}"))?.into_parts();
        let mut body = Vec::new();
        let mut trailers = None;
        if Status::from_header_map(&head.headers).is_none() {
            while let Some(chunk) = recv.data().await {
                let chunk = chunk.map_err(|e| format!("body: {e}"))?;
                recv.flow_control().release_capacity(chunk.len()).map_err(|e| e.to_string())?;
                body.extend_from_slice(&chunk);
            }
            trailers = recv.trailers().await.map_err(|e| format!("trailers: {e}"))?;
        }
        let carrier = trailers.as_ref().unwrap_or(&head.headers);
        let status = Status::from_header_map(carrier)
            .ok_or_else(|| format!("no grpc-status, HTTP {}: {:?}", head.status, head.headers))?;
        if status.code() == Code::Ok && body.len() < 5 {
            return Err("OK without a message".to_owned());
        }
        Ok(Reply { status_bytes: size(carrier), status, body })
    }
}

fn size(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

/// One gRPC message: a flag, a length, the bytes.
pub fn framed(flag: u8, length: usize, bytes: &[u8]) -> Bytes {
    let length = u32::try_from(length).expect("a frame's length has 32 bits");
    [&[flag][..], &length.to_be_bytes(), bytes].concat().into()
}

pub fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A field's key.
pub fn key(number: u32, wire_type: u32) -> Vec<u8> {
    varint(u64::from(number) << 3 | u64::from(wire_type))
}

pub fn delimited(number: u32, bytes: &[u8]) -> Vec<u8> {
    [&key(number, 2)[..], &varint(bytes.len() as u64), bytes].concat()
}

/// Bytes of a message that lies within others, from the outermost field on. After a whole message they
/// are merged into it.
pub fn within(parents: &[u32], bytes: &[u8]) -> Vec<u8> {
    parents.iter().rev().fold(bytes.to_vec(), |inner, number| delimited(*number, &inner))
}
