//! The queue on SQS.

use std::{error::Error, time::Duration};

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_sdk_sqs::{
    Client,
    config::{Builder, timeout::TimeoutConfig},
    error::DisplayErrorContext,
    types::{
        BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry,
        DeleteMessageBatchRequestEntry, Message as SqsMessage, MessageSystemAttributeName,
    },
};

use super::{
    envelope::is_traceparent,
    queue::{Message, Queue, QueueError, Refused},
};

/// The longest that SQS takes: an idle worker asks three times a minute.
const LONG_POLL: Duration = Duration::from_secs(20);
/// A long poll is an answer that takes its time; this much more is a queue in trouble.
const RECEIVE_MAX: Duration = Duration::from_secs(25);

pub struct SqsQueue {
    client: Client,
    /// Waits longer for its answers.
    poller: Client,
    url: String,
}

impl SqsQueue {
    /// `config` as `aws::sdk_config` makes it: without retries of its own, with short time-outs.
    pub fn new(config: &SdkConfig, url: String) -> Self {
        let patient = TimeoutConfig::builder()
            .operation_attempt_timeout(RECEIVE_MAX)
            .operation_timeout(RECEIVE_MAX)
            .build();
        let poller = Builder::from(config).timeout_config(patient).build();
        Self { client: Client::new(config), poller: Client::from_conf(poller), url }
    }
}

#[async_trait]
impl Queue for SqsQueue {
    async fn receive(&self, max: usize, visibility: Duration) -> Result<Vec<Message>, QueueError> {
        let reply = self
            .poller
            .receive_message()
            .queue_url(&self.url)
            .max_number_of_messages(i32::try_from(max).unwrap_or(i32::MAX))
            .wait_time_seconds(seconds(LONG_POLL))
            .visibility_timeout(seconds(visibility))
            .message_system_attribute_names(MessageSystemAttributeName::AwsTraceHeader)
            .send()
            .await
            .map_err(failed)?;
        Ok(reply.messages.unwrap_or_default().into_iter().filter_map(message).collect())
    }

    async fn delete(&self, receipts: &[String]) -> Result<Vec<Refused>, QueueError> {
        let mut call = self.client.delete_message_batch().queue_url(&self.url);
        for (place, receipt) in receipts.iter().enumerate() {
            let entry = DeleteMessageBatchRequestEntry::builder()
                .id(place.to_string())
                .receipt_handle(receipt)
                .build()
                .map_err(failed)?;
            call = call.entries(entry);
        }
        let reply = call.send().await.map_err(failed)?;
        Ok(refused(receipts, reply.failed()))
    }

    async fn hide(
        &self,
        receipts: &[String],
        visibility: Duration,
    ) -> Result<Vec<Refused>, QueueError> {
        let mut call = self.client.change_message_visibility_batch().queue_url(&self.url);
        for (place, receipt) in receipts.iter().enumerate() {
            let entry = ChangeMessageVisibilityBatchRequestEntry::builder()
                .id(place.to_string())
                .receipt_handle(receipt)
                .visibility_timeout(seconds(visibility))
                .build()
                .map_err(failed)?;
            call = call.entries(entry);
        }
        let reply = call.send().await.map_err(failed)?;
        Ok(refused(receipts, reply.failed()))
    }
}

/// SQS counts in whole seconds.
fn seconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_secs()).unwrap_or(i32::MAX)
}

/// Without a receipt nothing can be done about a message: it comes back.
fn message(message: SqsMessage) -> Option<Message> {
    let trace = message.attributes().and_then(|all| {
        all.get(&MessageSystemAttributeName::AwsTraceHeader).and_then(|header| traceparent(header))
    });
    Some(Message {
        receipt: message.receipt_handle?,
        body: message.body.unwrap_or_default(),
        traceparent: trace,
    })
}

/// `Root=1-<8 hex>-<24 hex>;Parent=<16 hex>;Sampled=<0|1>`, as X-Ray spells what W3C calls traceparent.
fn traceparent(header: &str) -> Option<String> {
    let part = |name: &str| {
        header.split(';').find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('='))
    };
    let root = part("Root")?.strip_prefix("1-")?.replace('-', "");
    let sampled = if part("Sampled") == Some("1") { "01" } else { "00" };
    Some(format!("00-{root}-{}-{sampled}", part("Parent")?)).filter(|text| is_traceparent(text))
}

fn refused(receipts: &[String], entries: &[BatchResultErrorEntry]) -> Vec<Refused> {
    let place = |entry: &BatchResultErrorEntry| entry.id().parse::<usize>().ok();
    entries
        .iter()
        .filter_map(|entry| {
            let receipt = receipts.get(place(entry)?)?.clone();
            Some(Refused { receipt, code: entry.code().to_owned() })
        })
        .collect()
}

fn failed(error: impl Error) -> QueueError {
    QueueError(DisplayErrorContext(error).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_header_becomes_a_traceparent() {
        let root = "Root=1-0af76519-16cd43dd8448eb211c80319c";
        let w3c = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";
        for (header, expected) in [
            (format!("{root};Parent=b7ad6b7169203331;Sampled=1"), Some(format!("{w3c}-01"))),
            (format!("Sampled=0;Parent=b7ad6b7169203331; {root}"), Some(format!("{w3c}-00"))),
            (format!("{root};Parent=b7ad6b7169203331;Sampled=?"), Some(format!("{w3c}-00"))),
            (root.to_owned(), None),
            (format!("{root};Parent=short"), None),
            ("nonsense".to_owned(), None),
            (String::new(), None),
        ] {
            assert_eq!(traceparent(&header), expected, "{header}");
        }
    }
}
