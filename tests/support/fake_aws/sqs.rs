//! SQS: queues by name, and what can be asked of them. What a queue does is in `queue`.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::{Map, Value, json};

pub(super) use super::queue::{Redrive, Sent};
use super::{
    ACCOUNT, Entry, Fate, Fault, REGION,
    queue::{Handle, Message, Queue},
    wire::{Asked, Refusal, Reply},
};

const BATCH_MAX: usize = 10;
/// Of a message, and of the messages of a batch together, attributes included.
const BYTES_MAX: usize = 1024 * 1024;
const ATTRIBUTES_MAX: usize = 10;
const ENTRY_ID_MAX_CHARS: usize = 80;
const DELAY_MAX_S: u32 = 900;
const VISIBILITY_MAX_S: u32 = 43_200;
const VISIBILITY_DEFAULT_S: u32 = 30;
const WAIT_MAX_S: u32 = 20;

pub(super) struct Queues {
    /// Where queue URLs begin.
    base: String,
    queues: BTreeMap<String, Queue>,
    sent: u64,
}

/// What a queue is made with.
#[derive(Default)]
pub(super) struct Attributes {
    pub(super) visibility_s: Option<u32>,
    pub(super) redrive: Option<Redrive>,
}

/// A `ReceiveMessage` that was found to be in order.
pub(super) struct Receive {
    queue: String,
    max: usize,
    visibility_s: u32,
    pub(super) wait_s: u32,
    attributes: Vec<String>,
    message_attributes: Vec<String>,
}

pub(super) fn arn(queue: &str) -> String {
    format!("arn:aws:sqs:{REGION}:{ACCOUNT}:{queue}")
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct MakeRequest {
    queue_name: String,
    #[serde(default)]
    attributes: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RedriveText {
    dead_letter_target_arn: String,
    /// AWS takes a number and a string.
    max_receive_count: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct LookRequest {
    #[serde(default)]
    queue_url: String,
    #[serde(default)]
    queue_name: String,
    #[serde(default)]
    attribute_names: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct ReceiveRequest {
    queue_url: String,
    max_number_of_messages: Option<i64>,
    visibility_timeout: Option<i64>,
    wait_time_seconds: Option<i64>,
    #[serde(default)]
    message_attribute_names: Vec<String>,
    #[serde(default)]
    message_system_attribute_names: Vec<String>,
    /// The older name of the field above.
    #[serde(default)]
    attribute_names: Vec<String>,
}

/// The one of a call without entries, and an entry of one with them.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct SendEntry {
    #[serde(default)]
    id: String,
    #[serde(default)]
    queue_url: String,
    #[serde(default)]
    message_body: String,
    #[serde(default)]
    message_attributes: Map<String, Value>,
    #[serde(default)]
    message_system_attributes: Map<String, Value>,
    #[serde(default)]
    delay_seconds: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct HandleEntry {
    #[serde(default)]
    id: String,
    #[serde(default)]
    queue_url: String,
    receipt_handle: String,
    visibility_timeout: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Identified {
    #[serde(default)]
    id: String,
}

impl Queues {
    pub(super) const fn new(base: String) -> Self {
        Self { base, queues: BTreeMap::new(), sent: 0 }
    }

    /// Everything but `ReceiveMessage`, which may have to wait.
    pub(super) fn answer(
        &mut self,
        asked: &Asked,
        fault: Option<&Fault>,
        now_ms: i64,
    ) -> Result<Reply, Refusal> {
        let one = |body| Ok(Reply { body, entries: Vec::new() });
        match asked.operation.as_str() {
            "CreateQueue" => {
                let asked: MakeRequest = asked.parse()?;
                let url = self.make(&asked.queue_name, Attributes::parse(&asked.attributes)?)?;
                one(json!({"QueueUrl": url}))
            }
            "GetQueueUrl" => {
                let asked: LookRequest = asked.parse()?;
                self.named(&asked.queue_name)?;
                one(json!({"QueueUrl": self.url(&asked.queue_name)}))
            }
            "GetQueueAttributes" => {
                let asked: LookRequest = asked.parse()?;
                let all = self.attributes(queue_name(&asked.queue_url), now_ms)?;
                let wanted = |name: &String| is_wanted(&asked.attribute_names, name);
                let wanted: Map<_, _> = all.into_iter().filter(|(name, _)| wanted(name)).collect();
                one(json!({"Attributes": wanted}))
            }
            "SendMessage" => one(self.send(&asked.parse()?, now_ms)?),
            "DeleteMessage" => one(self.delete(&asked.parse()?)?),
            "ChangeMessageVisibility" => one(self.change_visibility(&asked.parse()?, now_ms)?),
            "SendMessageBatch" => {
                let entries: Vec<SendEntry> = self.entries(asked)?;
                if entries.iter().map(SendEntry::bytes).sum::<usize>() > BYTES_MAX {
                    let why = "Batch requests cannot be longer than 1048576 bytes.".to_owned();
                    return Err(Refusal::new("BatchRequestTooLong", why));
                }
                self.each(asked, entries, fault, |queues, entry| queues.send(&entry, now_ms))
            }
            "DeleteMessageBatch" => {
                let entries: Vec<HandleEntry> = self.entries(asked)?;
                self.each(asked, entries, fault, |queues, entry| queues.delete(&entry))
            }
            "ChangeMessageVisibilityBatch" => {
                let entries: Vec<HandleEntry> = self.entries(asked)?;
                self.each(asked, entries, fault, |queues, entry| {
                    queues.change_visibility(&entry, now_ms)
                })
            }
            other => Err(Refusal::unknown_operation(other)),
        }
    }

    /// Making one that is there with the same attributes changes nothing.
    pub(super) fn make(&mut self, name: &str, attributes: Attributes) -> Result<String, Refusal> {
        let visibility_s = attributes.visibility_s.unwrap_or(VISIBILITY_DEFAULT_S);
        if let Some(redrive) = &attributes.redrive
            && !self.queues.contains_key(queue_of_arn(&redrive.target_arn))
        {
            return Err(Refusal::bad_value("RedrivePolicy: the dead-letter queue does not exist."));
        }
        if let Some(queue) = self.queues.get(name) {
            if queue.visibility_s != visibility_s || queue.redrive != attributes.redrive {
                let why = "A queue already exists with the same name and a different value for attributes";
                return Err(Refusal::new("QueueNameExists", why.to_owned()));
            }
            return Ok(self.url(name));
        }
        self.queues.insert(name.to_owned(), Queue::new(visibility_s, attributes.redrive));
        Ok(self.url(name))
    }

    pub(super) fn named(&mut self, name: &str) -> Result<&mut Queue, Refusal> {
        let why = "The specified queue does not exist.";
        let queue = self.queues.get_mut(name);
        queue.ok_or_else(|| Refusal::new("QueueDoesNotExist", why.to_owned()))
    }

    /// From a rule. What cannot be delivered is lost, as with a rule that has no dead-letter queue.
    pub(super) fn deliver(&mut self, target_arn: &str, sent: Sent, now_ms: i64) {
        let id = self.next_id();
        if let Some(queue) = self.queues.get_mut(queue_of_arn(target_arn)) {
            queue.add(id, sent, now_ms);
        }
    }

    fn url(&self, name: &str) -> String {
        format!("{}/{ACCOUNT}/{name}", self.base)
    }

    fn next_id(&mut self) -> String {
        self.sent += 1;
        format!("{:08x}-0000-4000-9000-{:012x}", self.sent >> 48, self.sent)
    }

    fn attributes(&mut self, name: &str, now_ms: i64) -> Result<BTreeMap<String, Value>, Refusal> {
        let queue = self.named(name)?;
        let depth = queue.depth(now_ms);
        let mut all = BTreeMap::from([
            ("QueueArn".to_owned(), arn(name).into()),
            ("VisibilityTimeout".to_owned(), queue.visibility_s.to_string().into()),
            ("ApproximateNumberOfMessages".to_owned(), depth.visible.to_string().into()),
            (
                "ApproximateNumberOfMessagesNotVisible".to_owned(),
                depth.in_flight.to_string().into(),
            ),
            ("ApproximateNumberOfMessagesDelayed".to_owned(), depth.delayed.to_string().into()),
        ]);
        if let Some(redrive) = &queue.redrive {
            let policy = json!({"deadLetterTargetArn": redrive.target_arn,
                "maxReceiveCount": redrive.max_receives});
            all.insert("RedrivePolicy".to_owned(), policy.to_string().into());
        }
        Ok(all)
    }

    fn send(&mut self, entry: &SendEntry, now_ms: i64) -> Result<Value, Refusal> {
        let sent = entry.check()?;
        let id = self.next_id();
        self.named(queue_name(&entry.queue_url))?.add(id.clone(), sent, now_ms);
        Ok(json!({"MessageId": id}))
    }

    fn delete(&mut self, entry: &HandleEntry) -> Result<Value, Refusal> {
        let queue = self.named(queue_name(&entry.queue_url))?;
        queue.delete(entry.handle()?);
        Ok(json!({}))
    }

    fn change_visibility(&mut self, entry: &HandleEntry, now_ms: i64) -> Result<Value, Refusal> {
        let queue = self.named(queue_name(&entry.queue_url))?;
        let handle = entry.handle()?;
        let seconds = entry.visibility_timeout.unwrap_or(-1);
        let seconds = within("VisibilityTimeout", seconds, 0, VISIBILITY_MAX_S)?;
        if !queue.change_visibility(handle, seconds, now_ms) {
            let why = "The message referred to isn't in flight.".to_owned();
            return Err(Refusal::new("MessageNotInflight", why));
        }
        Ok(json!({}))
    }

    /// The entries of a batch, once what holds for all of them is seen to hold.
    fn entries<'a, T: Deserialize<'a>>(&mut self, asked: &'a Asked) -> Result<Vec<T>, Refusal> {
        self.named(queue_name(&asked.queue_url))?;
        let identified: Vec<Identified> = asked.parse_entries()?;
        let of_batch = |code, why: &str| Err(Refusal::new(code, why.to_owned()));
        if identified.is_empty() {
            return of_batch("EmptyBatchRequest", "There should be at least one entry.");
        }
        if identified.len() > BATCH_MAX {
            let why = "Maximum number of entries per request are 10.";
            return of_batch("TooManyEntriesInBatchRequest", why);
        }
        let ids: BTreeSet<&str> = identified.iter().map(|entry| entry.id.as_str()).collect();
        if ids.len() < identified.len() {
            return of_batch("BatchEntryIdsNotDistinct", "Two entries have the same Id.");
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let is_id =
            |id: &str| (1..=ENTRY_ID_MAX_CHARS).contains(&id.len()) && id.chars().all(allowed);
        if !ids.into_iter().all(is_id) {
            let why = "A batch entry id can only contain alphanumeric characters, hyphens and \
                underscores. It can be at most 80 letters long.";
            return of_batch("InvalidBatchEntryId", why);
        }
        asked.parse_entries()
    }

    fn each<T: BatchEntry>(
        &mut self,
        asked: &Asked,
        entries: Vec<T>,
        fault: Option<&Fault>,
        mut apply: impl FnMut(&mut Self, T) -> Result<Value, Refusal>,
    ) -> Result<Reply, Refusal> {
        let (mut successful, mut failed, mut noted) = (Vec::new(), Vec::new(), Vec::new());
        for (place, (mut entry, raw)) in entries.into_iter().zip(asked.entries()).enumerate() {
            entry.belongs_to(&asked.queue_url);
            let id = entry.id().to_owned();
            let done = match Fault::of_entry(fault, place) {
                Some(code) => Err(Refusal::new(code, "on order".to_owned())),
                None => apply(self, entry),
            };
            let fate = match done {
                Ok(mut result) => {
                    result["Id"] = id.clone().into();
                    let message_id = result["MessageId"].as_str().unwrap_or(&id).to_owned();
                    successful.push(result);
                    Fate::Taken(message_id)
                }
                Err(refusal) => {
                    let is_senders = !is_fault_of_aws(&refusal.code);
                    failed.push(json!({"Id": id, "Code": refusal.code,
                        "Message": refusal.why, "SenderFault": is_senders}));
                    Fate::Failed(refusal.code)
                }
            };
            noted.push(Entry { raw: raw.to_owned(), fate });
        }
        Ok(Reply { body: json!({"Successful": successful, "Failed": failed}), entries: noted })
    }

    // ---- Receiving ----

    pub(super) fn receiving(&mut self, asked: &Asked) -> Result<Receive, Refusal> {
        let asked: ReceiveRequest = asked.parse()?;
        let queue = queue_name(&asked.queue_url).to_owned();
        let visibility_s = self.named(&queue)?.visibility_s;
        let max = asked.max_number_of_messages.unwrap_or(1);
        let wait_s = asked.wait_time_seconds.unwrap_or(0);
        let visibility_s = asked.visibility_timeout.unwrap_or_else(|| visibility_s.into());
        let mut attributes = asked.attribute_names;
        attributes.extend(asked.message_system_attribute_names);
        Ok(Receive {
            queue,
            max: within("MaxNumberOfMessages", max, 1, 10)? as usize,
            visibility_s: within("VisibilityTimeout", visibility_s, 0, VISIBILITY_MAX_S)?,
            wait_s: within("WaitTimeSeconds", wait_s, 0, WAIT_MAX_S)?,
            attributes,
            message_attributes: asked.message_attribute_names,
        })
    }

    /// What there is now; with nothing, when there may be something.
    pub(super) fn receive(
        &mut self,
        wanted: &Receive,
        now_ms: i64,
    ) -> Result<(Value, Option<i64>), Refusal> {
        let queue = self.named(&wanted.queue)?;
        let (taken, given_up) = queue.receive(wanted.max, wanted.visibility_s, now_ms);
        let next_ms = queue.next_visible_ms();
        let target = queue.redrive.as_ref().map(|redrive| redrive.target_arn.clone());
        if let Some(target) = target.and_then(|arn| self.queues.get_mut(queue_of_arn(&arn))) {
            for message in given_up {
                target.take_over(message, arn(&wanted.queue));
            }
        }
        if taken.is_empty() {
            return Ok((json!({}), next_ms));
        }
        let messages = taken.iter().map(|(handle, message)| wanted.show(*handle, message));
        Ok((json!({"Messages": messages.collect::<Vec<_>>()}), next_ms))
    }
}

impl Receive {
    fn show(&self, handle: Handle, message: &Message) -> Value {
        let mut shown = json!({
            "MessageId": message.id,
            "ReceiptHandle": handle.to_string(),
            "Body": &*message.sent.body,
        });
        let first_ms = message.first_received_ms.unwrap_or_default();
        let known = [
            ("ApproximateReceiveCount", Some(message.receives.to_string())),
            ("ApproximateFirstReceiveTimestamp", Some(first_ms.to_string())),
            ("SentTimestamp", Some(message.sent_ms.to_string())),
            ("SenderId", Some(ACCOUNT.to_owned())),
            ("AWSTraceHeader", message.sent.trace_header.clone()),
            ("DeadLetterQueueSourceArn", message.moved_from.clone()),
        ];
        let system: Map<_, _> = known
            .into_iter()
            .filter(|(name, _)| is_wanted(&self.attributes, name))
            .filter_map(|(name, value)| Some((name.to_owned(), value?.into())))
            .collect();
        let given: Map<_, _> = message
            .sent
            .attributes
            .iter()
            .filter(|(name, _)| is_wanted(&self.message_attributes, name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        for (name, values) in [("Attributes", system), ("MessageAttributes", given)] {
            if !values.is_empty() {
                shown[name] = values.into();
            }
        }
        shown
    }
}

trait BatchEntry {
    fn id(&self) -> &str;
    fn belongs_to(&mut self, queue_url: &str);
}

impl BatchEntry for SendEntry {
    fn id(&self) -> &str {
        &self.id
    }

    fn belongs_to(&mut self, queue_url: &str) {
        queue_url.clone_into(&mut self.queue_url);
    }
}

impl BatchEntry for HandleEntry {
    fn id(&self) -> &str {
        &self.id
    }

    fn belongs_to(&mut self, queue_url: &str) {
        queue_url.clone_into(&mut self.queue_url);
    }
}

impl SendEntry {
    /// As AWS counts them: the body, and each attribute with its name and type.
    fn bytes(&self) -> usize {
        let part = |value: &Value, field: &str| value[field].as_str().map_or(0, str::len);
        let of_attribute = |(name, value): (&String, &Value)| {
            name.len()
                + part(value, "DataType")
                + part(value, "StringValue")
                // Sent in base64.
                + part(value, "BinaryValue") / 4 * 3
        };
        self.message_body.len() + self.message_attributes.iter().map(of_attribute).sum::<usize>()
    }

    fn check(&self) -> Result<Sent, Refusal> {
        if self.message_body.is_empty() {
            let why = "The request must contain the parameter MessageBody.".to_owned();
            return Err(Refusal::new("MissingParameter", why));
        }
        if self.bytes() > BYTES_MAX {
            return Err(Refusal::bad_value("Message must be shorter than 1048576 bytes."));
        }
        let is_allowed = |c: char| {
            matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{D7FF}' | '\u{E000}'..='\u{FFFD}')
                || c >= '\u{10000}'
        };
        if !self.message_body.chars().all(is_allowed) {
            let why = "The message contains characters outside the allowed set.".to_owned();
            return Err(Refusal::new("InvalidMessageContents", why));
        }
        if self.message_attributes.len() > ATTRIBUTES_MAX {
            return Err(Refusal::bad_value(
                "Number of message attributes exceeds the limit of 10.",
            ));
        }
        for (name, value) in &self.message_attributes {
            let has_value = ["StringValue", "BinaryValue"]
                .iter()
                .any(|field| value[field].as_str().is_some_and(|text| !text.is_empty()));
            let kind = value["DataType"].as_str().unwrap_or_default();
            let kind = kind.split('.').next().unwrap_or_default();
            if !has_value || !matches!(kind, "String" | "Number" | "Binary") {
                let why = format!("The message attribute '{name}' must have a type and a value.");
                return Err(Refusal::bad_value(&why));
            }
        }
        let trace_header = self.message_system_attributes.get("AWSTraceHeader");
        let trace_header = trace_header.and_then(|value| value["StringValue"].as_str());
        Ok(Sent {
            body: self.message_body.as_str().into(),
            attributes: self.message_attributes.clone(),
            trace_header: trace_header.map(str::to_owned),
            delay_s: within("DelaySeconds", self.delay_seconds, 0, DELAY_MAX_S)?,
        })
    }
}

impl HandleEntry {
    fn handle(&self) -> Result<Handle, Refusal> {
        let why = "The input receipt handle is invalid.";
        Handle::parse(&self.receipt_handle)
            .ok_or_else(|| Refusal::new("ReceiptHandleIsInvalid", why.to_owned()))
    }
}

impl Attributes {
    fn parse(given: &BTreeMap<String, String>) -> Result<Self, Refusal> {
        let mut attributes = Self::default();
        for (name, value) in given {
            match name.as_str() {
                "VisibilityTimeout" => {
                    let seconds = value.parse().unwrap_or(-1);
                    let seconds = within(name, seconds, 0, VISIBILITY_MAX_S)?;
                    attributes.visibility_s = Some(seconds);
                }
                "RedrivePolicy" => attributes.redrive = Some(Redrive::parse(value)?),
                _ => {
                    let why = format!("The fake knows no attribute {name}.");
                    return Err(Refusal::new("InvalidAttributeName", why));
                }
            }
        }
        Ok(attributes)
    }
}

impl Redrive {
    pub(super) fn to(target_arn: &str, max_receives: u32) -> Self {
        Self { target_arn: target_arn.to_owned(), max_receives }
    }

    fn parse(text: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::bad_value("RedrivePolicy is no valid policy.");
        let policy: RedriveText = serde_json::from_str(text).map_err(|_| bad())?;
        let count = match policy.max_receive_count {
            Value::String(text) => text.parse().ok(),
            other => other.as_u64(),
        };
        let count = count.filter(|count| (1..=1000).contains(count)).ok_or_else(bad)?;
        Ok(Self::to(&policy.dead_letter_target_arn, count as u32))
    }
}

fn within(name: &str, value: i64, min: u32, max: u32) -> Result<u32, Refusal> {
    let fits = u32::try_from(value).ok().filter(|value| (min..=max).contains(value));
    let why = || format!("Value {value} for parameter {name} is invalid. Must be {min} to {max}.");
    fits.ok_or_else(|| Refusal::bad_value(&why()))
}

fn is_wanted(wanted: &[String], name: &str) -> bool {
    wanted.iter().any(|wanted| wanted == "All" || wanted == ".*" || wanted == name)
}

/// A code that says that the sender did nothing wrong.
fn is_fault_of_aws(code: &str) -> bool {
    code.starts_with("Internal") || matches!(code, "ServiceUnavailable" | "RequestThrottled")
}

fn queue_name(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or_default()
}

fn queue_of_arn(arn: &str) -> &str {
    arn.rsplit(':').next().unwrap_or_default()
}
