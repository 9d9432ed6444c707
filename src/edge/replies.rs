//! What waits to be taken by clients is bounded: HTTP/2 lets a client ask and then take nothing of the
//! replies, a connection's streams full, for as long as the connection lives.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;
use tonic::body::Body;

use super::GRPC_STATUS;
use crate::api::MAX_REPLY_BYTES;

/// Replies up to this are not counted. All but lists are smaller; with every connection taken by who
/// asks and takes nothing they are 2 GiB.
const UNCOUNTED_BYTES: usize = 4 * 1024;

/// How much of the replies is encoded and not yet sent, of one connection and of all.
#[derive(Clone, Debug)]
pub struct Untaken {
    connection: Arc<Semaphore>,
    all: Arc<Semaphore>,
}

/// There is no room for a reply.
pub struct NoRoom;

impl Untaken {
    pub fn new(connection_max: usize, all: &Arc<Semaphore>) -> Self {
        Self { connection: Arc::new(Semaphore::new(connection_max)), all: Arc::clone(all) }
    }

    /// Whether the connection has room for the largest reply. Where it has not, working for it is vain.
    pub fn has_room(&self) -> bool {
        self.connection.available_permits() >= MAX_REPLY_BYTES
    }

    /// Encodes a unary reply of tonic's, and counts it until the last of it is in the socket.
    pub async fn encode(&self, response: Response<Body>) -> Result<Response<Reply>, NoRoom> {
        let (head, mut body) = response.into_parts();
        if body.is_end_stream() {
            return Ok(Response::from_parts(head, Reply::Nothing));
        }
        let first = match body.frame().await {
            None => None,
            Some(Ok(frame)) => Some(Ok(match frame.into_data() {
                Ok(bytes) => Frame::data(self.count(bytes)?),
                Err(trailers) => trailers,
            })),
            Some(Err(status)) => Some(Err(status)),
        };
        Ok(Response::from_parts(head, Reply::Stream { first, rest: body }))
    }

    /// Counts a message until the last of it is in the socket.
    pub fn count(&self, bytes: Bytes) -> Result<Bytes, NoRoom> {
        if bytes.len() <= UNCOUNTED_BYTES {
            return Ok(bytes);
        }
        let length = u32::try_from(bytes.len()).map_err(|_| NoRoom)?;
        let room =
            |of: &Arc<Semaphore>| Arc::clone(of).try_acquire_many_owned(length).map_err(|_| NoRoom);
        let room = [room(&self.connection)?, room(&self.all)?];
        Ok(Bytes::from_owner(Counted { bytes, _room: room }))
    }
}

/// h2 keeps parts of it until they are sent; the last one to go gives the room back.
struct Counted {
    bytes: Bytes,
    _room: [OwnedSemaphorePermit; 2],
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The body of a reply.
pub enum Reply {
    /// One message, and after it that all went well.
    Message(Bytes),
    WentWell,
    /// All was said in the headers.
    Nothing,
    /// As tonic goes on with it, its first frame perhaps polled already.
    Stream {
        first: Option<Result<Frame<Bytes>, Status>>,
        rest: Body,
    },
}

impl From<Bytes> for Reply {
    fn from(message: Bytes) -> Self {
        Self::Message(message)
    }
}

impl From<Body> for Reply {
    fn from(rest: Body) -> Self {
        Self::Stream { first: None, rest }
    }
}

impl http_body::Body for Reply {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = match &mut *self {
            Self::Stream { first, rest } => match first.take() {
                Some(first) => return Poll::Ready(Some(first)),
                None => return Pin::new(rest).poll_frame(cx),
            },
            Self::Message(message) => Frame::data(std::mem::take(message)),
            Self::WentWell => Frame::trailers(went_well()),
            Self::Nothing => return Poll::Ready(None),
        };
        *self = if frame.is_data() { Self::WentWell } else { Self::Nothing };
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Message(_) | Self::WentWell => false,
            Self::Nothing => true,
            Self::Stream { first, rest } => first.is_none() && rest.is_end_stream(),
        }
    }
}

fn went_well() -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(&GRPC_STATUS, HeaderValue::from_static("0"));
    trailers
}
