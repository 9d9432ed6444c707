//! A gRPC client of a few lines: tonic's own would need features that the product is built without.

use std::net::SocketAddr;

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;

/// A compression flag and a length stand before each message.
const HEAD: usize = 5;

#[derive(Clone)]
pub struct Client {
    connection: SendRequest<Full<Bytes>>,
    address: SocketAddr,
}

impl Client {
    /// # Errors
    /// Where nobody listens, or speaks HTTP/2.
    pub async fn connect(address: SocketAddr) -> Result<Self, String> {
        let stream = tokio::net::TcpStream::connect(address).await.map_err(|e| e.to_string())?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let (connection, driver) = handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(|error| error.to_string())?;
        // Ends with the last clone of this client.
        hyper::rt::Executor::execute(&TokioExecutor::new(), async {
            let _ = driver.await;
        });
        Ok(Self { connection, address })
    }

    /// # Errors
    /// A status other than OK, or a reply that is none.
    pub async fn call<A: Message + Default>(
        &self,
        path: &str,
        request: &impl Message,
    ) -> Result<A, String> {
        let reply = self.call_framed(path, framed(request)).await?;
        A::decode(reply).map_err(|error| error.to_string())
    }

    /// What came as the message of a reply, undecoded.
    ///
    /// # Errors
    /// A status other than OK, or a reply that is none.
    pub async fn call_framed(&self, path: &str, request: Bytes) -> Result<Bytes, String> {
        let request = http::Request::post(format!("http://{}{path}", self.address))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::from(request))
            .map_err(|error| error.to_string())?;
        let mut connection = self.connection.clone();
        connection.ready().await.map_err(|error| error.to_string())?;
        let reply = connection.send_request(request).await.map_err(|error| error.to_string())?;
        let (head, body) = reply.into_parts();
        let body = body.collect().await.map_err(|error| error.to_string())?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        let said = |name| head.headers.get(name).or(trailers.get(name));
        if said("grpc-status").is_none_or(|code| code != "0") {
            return Err(format!(
                "{} {:?} {:?}",
                head.status,
                said("grpc-status"),
                said("grpc-message")
            ));
        }
        let mut message = body.to_bytes();
        if message.len() < HEAD {
            return Err("a reply without a message".to_owned());
        }
        Ok(message.split_off(HEAD))
    }
}

/// A message as gRPC sends it, its head before it.
///
/// # Panics
/// Never: no message of ours comes near 4 GiB.
pub fn framed(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(HEAD + length);
    frame.put_u8(0);
    frame.put_u32(length.try_into().expect("messages are smaller than 4 GiB"));
    message.encode(&mut frame).expect("the buffer grows");
    frame.freeze()
}
