//! Looks, once at a start, whether what is published has somewhere to go. AWS would not say: EventBridge
//! reports success for a bus that does not exist, and for events that no rule routes anywhere.

use std::time::Duration;

use aws_config::SdkConfig;
use aws_sdk_eventbridge::{
    error::ProvideErrorMetadata,
    types::{Rule, RuleState},
};
use aws_sdk_sqs::types::QueueAttributeName;
use serde_json::{Map, Value};

use super::aws_call::{bare, why};
use crate::domain::delivery::Topic;

/// Of a whole check: a start does not wait longer.
pub const CHECK_MAX: Duration = Duration::from_secs(10);
const EMULATED: &str = "in an emulated AWS: scripts/aws_setup.py setup";
/// The rule that consumers live on; one for refunds is theirs to want.
const DETAIL_TYPE: &str = Topic::StatusUpdated.detail_type();

/// What has to be there.
#[derive(Default)]
pub struct StartupCheck {
    buses: Vec<Bus>,
    queues: Vec<Queue>,
}

struct Bus {
    client: aws_sdk_eventbridge::Client,
    name: String,
    source: String,
}

struct Queue {
    client: aws_sdk_sqs::Client,
    url: String,
    /// The setting that names it.
    setting: &'static str,
}

impl StartupCheck {
    /// A bus, with an enabled rule that matches `source` and has a target.
    pub fn wants_bus(&mut self, config: &SdkConfig, name: String, source: String) {
        let client = aws_sdk_eventbridge::Client::new(config);
        self.buses.push(Bus { client, name, source });
    }

    pub fn wants_queue(&mut self, config: &SdkConfig, url: String, setting: &'static str) {
        let client = aws_sdk_sqs::Client::new(config);
        self.queues.push(Queue { client, url, setting });
    }

    /// What is missing, or could not be looked at, and how to mend it: one line each.
    pub async fn problems(&self, within: Duration) -> Vec<String> {
        let mut problems = Vec::new();
        if tokio::time::timeout(within, self.look(&mut problems)).await.is_err() {
            problems.push(format!("not everything could be looked at within {within:?}"));
        }
        problems
    }

    async fn look(&self, problems: &mut Vec<String>) {
        for bus in &self.buses {
            problems.extend(bus.problem().await);
        }
        for queue in &self.queues {
            problems.extend(queue.problem().await);
        }
    }
}

/// The enabled and the disabled rules of a bus that match.
#[derive(Default)]
struct Matching {
    enabled: Vec<String>,
    disabled: Vec<String>,
}

impl Bus {
    async fn problem(&self) -> Option<String> {
        self.missing().await.unwrap_or_else(|why| {
            Some(format!(
                "the bus {} could not be looked at: {why}; it takes credentials with \
                 events:DescribeEventBus, events:ListRules and events:ListTargetsByRule",
                self.name
            ))
        })
    }

    /// An error is why there is no answer.
    async fn missing(&self) -> Result<Option<String>, String> {
        let name = &self.name;
        if let Err(error) = self.client.describe_event_bus().name(name).send().await {
            let is_missing =
                error.as_service_error().is_some_and(|e| e.is_resource_not_found_exception());
            return match is_missing {
                true => Ok(Some(format!(
                    "the bus {name} does not exist: every event would vanish; \
                     aws events create-event-bus --name {name}; {EMULATED}"
                ))),
                false => Err(why(&error)),
            };
        }
        let rules = self.matching_rules().await?;
        let Some(first) = rules.enabled.first() else {
            return Ok(Some(self.no_rule(rules.disabled.first())));
        };
        for rule in &rules.enabled {
            if self.has_target(rule).await? {
                return Ok(None);
            }
        }
        Ok(Some(format!(
            "the rule {first} on the bus {name} has no target: every event would vanish; \
             aws events put-targets --event-bus-name {name} --rule {first} \
             --targets Id=1,Arn=YOUR_QUEUE_ARN; {EMULATED}"
        )))
    }

    fn no_rule(&self, disabled: Option<&String>) -> String {
        let Self { name, source, .. } = self;
        match disabled {
            Some(rule) => format!(
                "the rule {rule} on the bus {name} is disabled: every event would vanish; \
                 aws events enable-rule --event-bus-name {name} --name {rule}"
            ),
            None => format!(
                "no rule on the bus {name} matches source {source} and detail-type {DETAIL_TYPE}: \
                 every event would vanish; \
                 aws events put-rule --event-bus-name {name} --name payment-events-to-sqs \
                 --event-pattern '{{\"source\":[\"{source}\"],\"detail-type\":[\"{DETAIL_TYPE}\"]}}'; \
                 {EMULATED}"
            ),
        }
    }

    async fn matching_rules(&self) -> Result<Matching, String> {
        let mut matching = Matching::default();
        let mut page = None;
        loop {
            let call = self.client.list_rules().event_bus_name(&self.name).set_next_token(page);
            let listed = call.send().await.map_err(|error| why(&error))?;
            for rule in listed.rules().iter().filter(|rule| matches(rule, &self.source)) {
                let name = rule.name().unwrap_or_default().to_owned();
                match rule.state() {
                    Some(RuleState::Disabled) => matching.disabled.push(name),
                    _ => matching.enabled.push(name),
                }
            }
            match listed.next_token() {
                Some(token) => page = Some(token.to_owned()),
                None => return Ok(matching),
            }
        }
    }

    async fn has_target(&self, rule: &str) -> Result<bool, String> {
        let call = self.client.list_targets_by_rule().event_bus_name(&self.name).rule(rule);
        let listed = call.send().await.map_err(|error| why(&error))?;
        Ok(!listed.targets().is_empty())
    }
}

/// Whether a rule lets our status events through, as far as their source and detail type go. What it asks
/// of other fields (`detail`, `account`, `$or`) counts as fulfilled: this looks for what was forgotten, and
/// does not evaluate patterns.
fn matches(rule: &Rule, source: &str) -> bool {
    // A rule without a pattern is a schedule.
    let Some(pattern) = rule.event_pattern() else { return false };
    let Ok(pattern) = serde_json::from_str::<Map<String, Value>>(pattern) else { return true };
    lets_through(pattern.get("source"), source)
        && lets_through(pattern.get("detail-type"), DETAIL_TYPE)
}

fn lets_through(wanted: Option<&Value>, value: &str) -> bool {
    // A field that a pattern does not name may be anything.
    let Some(Value::Array(wanted)) = wanted else { return true };
    wanted.iter().any(|wanted| match wanted {
        Value::String(exact) => exact == value,
        Value::Object(condition) => match condition.get("prefix") {
            Some(Value::String(prefix)) => value.starts_with(prefix),
            // `suffix`, `anything-but`, `wildcard` and what is yet to be invented: cannot tell.
            _ => true,
        },
        _ => false,
    })
}

impl Queue {
    async fn problem(&self) -> Option<String> {
        let Self { client, url, setting } = self;
        let call = client.get_queue_attributes().queue_url(url);
        let error = call.attribute_names(QueueAttributeName::QueueArn).send().await.err()?;
        // AWS's older protocol had the other name; its newer one still says it, in a header.
        let code = error.code().map(bare).unwrap_or_default();
        let is_missing = matches!(code, "QueueDoesNotExist" | "NonExistentQueue");
        Some(match is_missing {
            true => {
                let name = url.rsplit('/').next().unwrap_or_default();
                format!(
                    "the queue {url} ({setting}) does not exist; \
                     aws sqs create-queue --queue-name {name}; {EMULATED}"
                )
            }
            false => format!(
                "the queue {url} ({setting}) could not be looked at: {}; it takes credentials with \
                 sqs:GetQueueAttributes, and AWS_REGION to be the queue's",
                why(&error)
            ),
        })
    }
}
