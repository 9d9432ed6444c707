//! EventBridge: buses, rules, targets, and `PutEvents`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json, value::RawValue};

use super::{
    ACCOUNT, Entry, Fate, Fault, REGION,
    pattern::Pattern,
    sqs::{Queues, Sent},
    wire::{Asked, Refusal, Reply},
};

const CALL_MAX_ENTRIES: usize = 10;
/// What AWS counts for an entry's `Time`.
const TIME_BYTES: usize = 14;
/// The bus that every account has.
const DEFAULT_BUS: &str = "default";

pub(super) struct Events {
    buses: BTreeMap<String, Bus>,
    put_max_bytes: usize,
    put: u64,
}

#[derive(Default)]
struct Bus {
    rules: BTreeMap<String, Rule>,
}

struct Rule {
    pattern: Pattern,
    is_enabled: bool,
    /// ARNs by target id.
    targets: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct PutEntry {
    time: Option<f64>,
    #[serde(default)]
    source: String,
    #[serde(default)]
    detail_type: String,
    #[serde(default)]
    detail: String,
    event_bus_name: Option<String>,
    #[serde(default)]
    resources: Vec<String>,
    trace_header: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Envelope<'a> {
    version: &'static str,
    id: &'a str,
    detail_type: &'a str,
    source: &'a str,
    account: &'static str,
    time: String,
    region: &'static str,
    resources: &'a [String],
    detail: &'a RawValue,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct RuleName {
    name: Option<String>,
    rule: Option<String>,
    event_bus_name: Option<String>,
    event_pattern: Option<String>,
    state: Option<String>,
    targets: Option<Vec<Target>>,
    // Everything fits on one page, so there is never a token to go on with.
    limit: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct Target {
    id: String,
    arn: String,
}

impl Events {
    pub(super) fn new(put_max_bytes: usize) -> Self {
        let buses = BTreeMap::from([(DEFAULT_BUS.to_owned(), Bus::default())]);
        Self { buses, put_max_bytes, put: 0 }
    }

    /// Everything but `PutEvents`.
    pub(super) fn answer(&mut self, asked: &Asked) -> Result<Value, Refusal> {
        let named: RuleName = asked.parse()?;
        let bus = bus_name(named.event_bus_name.as_deref()).to_owned();
        let rule = named.rule.as_deref().unwrap_or_default();
        let name = named.name.as_deref();
        match asked.operation.as_str() {
            "CreateEventBus" => {
                let name = bus_name(name);
                if self.buses.contains_key(name) {
                    let why = format!("Event bus {name} already exists.");
                    return Err(Refusal::new("ResourceAlreadyExistsException", why));
                }
                self.make_bus(name);
                Ok(json!({"EventBusArn": bus_arn(name)}))
            }
            "DescribeEventBus" => {
                let name = bus_name(name);
                self.bus(name)?;
                Ok(json!({"Name": name, "Arn": bus_arn(name)}))
            }
            "PutRule" => {
                let (name, pattern) = (name.unwrap_or_default(), named.event_pattern);
                let is_enabled = named.state.as_deref() != Some("DISABLED");
                self.make_rule(&bus, name, &pattern.unwrap_or_default(), is_enabled)?;
                Ok(json!({"RuleArn": rule_arn(&bus, name)}))
            }
            "PutTargets" => {
                for target in named.targets.unwrap_or_default() {
                    self.add_target(&bus, rule, &target.id, &target.arn)?;
                }
                Ok(json!({"FailedEntryCount": 0, "FailedEntries": []}))
            }
            "ListRules" => {
                let rules = self.bus(&bus)?.rules.iter().map(|(name, rule)| {
                    json!({"Name": name, "Arn": rule_arn(&bus, name), "EventBusName": bus,
                        "EventPattern": rule.pattern.text, "State": rule.state()})
                });
                Ok(json!({"Rules": rules.collect::<Vec<_>>()}))
            }
            "ListTargetsByRule" => {
                let targets = &self.rule(&bus, rule)?.targets;
                let targets = targets.iter().map(|(id, arn)| json!({"Id": id, "Arn": arn}));
                Ok(json!({"Targets": targets.collect::<Vec<_>>()}))
            }
            other => Err(Refusal::unknown_operation(other)),
        }
    }

    pub(super) fn make_bus(&mut self, name: &str) {
        self.buses.entry(name.to_owned()).or_default();
    }

    pub(super) fn make_rule(
        &mut self,
        bus: &str,
        name: &str,
        pattern: &str,
        is_enabled: bool,
    ) -> Result<(), Refusal> {
        let pattern = Pattern::parse(pattern).map_err(|why| {
            let why = format!("Event pattern is not valid. Reason: {why}");
            Refusal::new("InvalidEventPatternException", why)
        })?;
        let rules = &mut self.bus(bus)?.rules;
        let targets = rules.remove(name).map(|before| before.targets).unwrap_or_default();
        rules.insert(name.to_owned(), Rule { pattern, is_enabled, targets });
        Ok(())
    }

    pub(super) fn add_target(
        &mut self,
        bus: &str,
        rule: &str,
        id: &str,
        arn: &str,
    ) -> Result<(), Refusal> {
        self.rule(bus, rule)?.targets.insert(id.to_owned(), arn.to_owned());
        Ok(())
    }

    fn bus(&mut self, name: &str) -> Result<&mut Bus, Refusal> {
        let missing = || format!("Event bus {name} does not exist.");
        let bus = self.buses.get_mut(name);
        bus.ok_or_else(|| Refusal::new("ResourceNotFoundException", missing()))
    }

    fn rule(&mut self, bus: &str, name: &str) -> Result<&mut Rule, Refusal> {
        let rule = self.bus(bus)?.rules.get_mut(name);
        let missing = || format!("Rule {name} does not exist on EventBus {bus}.");
        rule.ok_or_else(|| Refusal::new("ResourceNotFoundException", missing()))
    }

    /// Each entry by itself; what rules make of those that are taken is in the queues at once.
    pub(super) fn put(
        &mut self,
        asked: &Asked,
        fault: Option<&Fault>,
        queues: &mut Queues,
        now_ms: i64,
    ) -> Result<Reply, Refusal> {
        let parsed: Vec<PutEntry> = asked.parse_entries()?;
        if parsed.is_empty() || parsed.len() > CALL_MAX_ENTRIES {
            let why = "Member must have length between 1 and 10, inclusive: entries".to_owned();
            return Err(Refusal::new("ValidationException", why));
        }
        if parsed.iter().map(bytes).sum::<usize>() > self.put_max_bytes {
            let why = "Total size of the entries in the request is over the limit.".to_owned();
            return Err(Refusal::new("ValidationException", why));
        }
        let mut entries = Vec::with_capacity(parsed.len());
        let mut results = Vec::with_capacity(parsed.len());
        for (place, (entry, raw)) in parsed.iter().zip(asked.entries()).enumerate() {
            let on_order = Fault::of_entry(fault, place).map(|code| (code.to_owned(), "on order"));
            let taken = match on_order {
                Some(refused) => Err(refused),
                None => self.take(entry, queues, now_ms),
            };
            let (result, fate) = match taken {
                Ok(id) => (json!({"EventId": id}), Fate::Taken(id)),
                Err((code, why)) => {
                    (json!({"ErrorCode": code, "ErrorMessage": why}), Fate::Failed(code))
                }
            };
            results.push(result);
            entries.push(Entry { raw: raw.to_owned(), fate });
        }
        let failed = entries.iter().filter(|entry| !entry.is_taken()).count();
        let body = json!({"FailedEntryCount": failed, "Entries": results});
        Ok(Reply { body, entries })
    }

    fn take(
        &mut self,
        entry: &PutEntry,
        queues: &mut Queues,
        now_ms: i64,
    ) -> Result<String, (String, &'static str)> {
        let detail = check(entry)?;
        self.put += 1;
        let id = format!("{:08x}-0000-4000-8000-{:012x}", self.put >> 48, self.put);
        // As real EventBridge: what goes to a bus that is not there is taken, and gone.
        let Some(bus) = self.buses.get(bus_name(entry.event_bus_name.as_deref())) else {
            return Ok(id);
        };
        let targets = bus.rules.values().filter(|rule| rule.wants(entry));
        let targets: Vec<&String> = targets.flat_map(|rule| rule.targets.values()).collect();
        if !targets.is_empty() {
            let body = envelope(entry, detail, &id, now_ms).into();
            let trace_header = entry.trace_header.clone();
            let sent = Sent { body, trace_header, ..Sent::default() };
            for arn in targets {
                queues.deliver(arn, sent.clone(), now_ms);
            }
        }
        Ok(id)
    }
}

impl Rule {
    const fn state(&self) -> &'static str {
        if self.is_enabled { "ENABLED" } else { "DISABLED" }
    }

    fn wants(&self, entry: &PutEntry) -> bool {
        self.is_enabled && self.pattern.matches(|name| entry.field(name))
    }
}

impl PutEntry {
    /// A field of the event that a pattern may ask for.
    fn field(&self, name: &str) -> Option<Value> {
        match name {
            "source" => Some(self.source.clone().into()),
            "detail-type" => Some(self.detail_type.clone().into()),
            "account" => Some(ACCOUNT.into()),
            "region" => Some(REGION.into()),
            "resources" => Some(self.resources.clone().into()),
            "detail" => serde_json::from_str(&self.detail).ok(),
            _ => None,
        }
    }
}

/// As AWS counts them.
fn bytes(entry: &PutEntry) -> usize {
    let resources: usize = entry.resources.iter().map(String::len).sum();
    let time = entry.time.map_or(0, |_| TIME_BYTES);
    time + entry.source.len() + entry.detail_type.len() + entry.detail.len() + resources
}

fn check(entry: &PutEntry) -> Result<&RawValue, (String, &'static str)> {
    for (value, why) in [
        (&entry.source, "Parameter Source is not valid. Reason: Source is a required argument."),
        (
            &entry.detail_type,
            "Parameter DetailType is not valid. Reason: DetailType is a required argument.",
        ),
        (&entry.detail, "Parameter Detail is not valid. Reason: Detail is a required argument."),
    ] {
        if value.is_empty() {
            return Err(("InvalidArgument".to_owned(), why));
        }
    }
    if entry.source.starts_with("aws.") {
        let why = "Not authorized for the source.";
        return Err(("NotAuthorizedForSourceException".to_owned(), why));
    }
    let detail: Result<&RawValue, _> = serde_json::from_str(&entry.detail);
    let object = detail.ok().filter(|detail| detail.get().starts_with('{'));
    object.ok_or(("MalformedDetail".to_owned(), "Detail is malformed."))
}

fn envelope(entry: &PutEntry, detail: &RawValue, id: &str, now_ms: i64) -> String {
    let given = entry.time.map(|seconds| (seconds * 1000.0).round() as i64);
    let second = given.unwrap_or(now_ms).div_euclid(1000);
    let envelope = Envelope {
        version: "0",
        id,
        detail_type: &entry.detail_type,
        source: &entry.source,
        account: ACCOUNT,
        time: jiff::Timestamp::from_second(second).expect("a time of a calendar").to_string(),
        region: REGION,
        resources: &entry.resources,
        detail,
    };
    serde_json::to_string(&envelope).expect("an envelope is JSON")
}

/// A bus may be named by its ARN; none is the default one.
fn bus_name(given: Option<&str>) -> &str {
    given.map_or(DEFAULT_BUS, |name| name.rsplit_once('/').map_or(name, |(_, name)| name))
}

fn bus_arn(name: &str) -> String {
    format!("arn:aws:events:{REGION}:{ACCOUNT}:event-bus/{name}")
}

fn rule_arn(bus: &str, name: &str) -> String {
    format!("arn:aws:events:{REGION}:{ACCOUNT}:rule/{bus}/{name}")
}
