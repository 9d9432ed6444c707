//! What waits to be taken by clients is bounded: HTTP/2 lets a client ask and then take nothing of the
//! replies, a connection's streams full, for as long as the connection lives.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::Response;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;
use tonic::body::Body;

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

    /// Encodes a unary reply, and counts it until the last of it is in the socket.
    pub async fn count(&self, response: Response<Body>) -> Result<Response<Body>, NoRoom> {
        if response.body().is_end_stream() {
            return Ok(response);
        }
        let (head, mut body) = response.into_parts();
        let first = match body.frame().await {
            None => None,
            Some(Ok(frame)) => Some(Ok(match frame.into_data() {
                Ok(bytes) => Frame::data(self.take(bytes)?),
                Err(trailers) => trailers,
            })),
            Some(Err(status)) => Some(Err(status)),
        };
        Ok(Response::from_parts(head, Body::new(Begun { first, rest: body })))
    }

    fn take(&self, bytes: Bytes) -> Result<Bytes, NoRoom> {
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

/// A body whose first frame has been polled already.
struct Begun {
    first: Option<Result<Frame<Bytes>, Status>>,
    rest: Body,
}

impl http_body::Body for Begun {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.first.take() {
            Some(first) => Poll::Ready(Some(first)),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
