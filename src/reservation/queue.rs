//! The queue, as the worker sees it: what is received stays hidden from others for a while, and comes
//! back unless it is deleted.

use std::time::Duration;

use async_trait::async_trait;

/// The most that SQS takes in one call.
pub const BATCH_MAX: usize = 10;

#[derive(Clone, Debug)]
pub struct Message {
    /// Names this one receipt of the message.
    pub receipt: String,
    pub body: String,
    /// From the queue's own trace header.
    pub traceparent: Option<String>,
}

/// Why a call as a whole came to nothing. For logs.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct QueueError(pub String);

/// One of a batch that was refused, with the queue's code.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    pub receipt: String,
    pub code: String,
}

#[async_trait]
pub trait Queue: Send + Sync + 'static {
    /// At most `max` (up to [`BATCH_MAX`]) messages, hidden for `visibility`. Waits a while where there
    /// are none. May be dropped at any await: what was received then comes back by itself.
    async fn receive(&self, max: usize, visibility: Duration) -> Result<Vec<Message>, QueueError>;

    /// Removes up to [`BATCH_MAX`] for good.
    async fn delete(&self, receipts: &[String]) -> Result<Vec<Refused>, QueueError>;

    /// Hides up to [`BATCH_MAX`] for `visibility` from now on; zero shows them at once.
    async fn hide(
        &self,
        receipts: &[String],
        visibility: Duration,
    ) -> Result<Vec<Refused>, QueueError>;
}
