//! What must hold, whatever was killed when: the journals against what the service says afterwards.

mod case;
mod seen;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use payment_sim::{
    api::pb::{
        common::v1::Pagination,
        payment::v1::{
            Delivery, GetPaymentIntentRequest, GetPaymentIntentResponse, ListPaymentsRequest,
            Payment, PaymentStatus as Status,
        },
        simulation::v1::{DeliveryFilter, ListDeliveriesRequest},
    },
    clock::Stopwatch,
};
use tokio::task::JoinSet;
use tonic::Code;

use crate::{
    arrival::{Arrival, Told},
    driver::{CURRENCY, Call, Create, Driver, Story, Timing},
    support::chance::Chance,
};
use case::Case;
pub use seen::Seen;

/// By then nothing is owed any more.
const QUIET_WITHIN: Duration = Duration::from_secs(60);
/// Payments asked for at a time.
const PARALLEL: usize = 32;
/// Keys that are sent once more, of those acknowledged and of those not.
const REPLAYS: usize = 200;
const PAGE_SIZE: i32 = 100;

/// Something that must not be. `names` are what the journals know it by.
#[derive(Clone, Debug)]
pub struct Violation {
    pub invariant: &'static str,
    pub names: Vec<String>,
    pub what: String,
}

/// Lost what was acknowledged, or kept it with another content.
pub const I1_ACKNOWLEDGED: &str = "I1 acknowledged is stored";
pub const I2_DECIDED_ONCE: &str = "I2 decided once";
pub const I3_TOLD: &str = "I3 every decision told";
pub const I4_NO_PHANTOM: &str = "I4 no phantom";
pub const I5_ONE_A_KEY: &str = "I5 one payment a key";
pub const I6_FORWARD: &str = "I6 versions go forward";
pub const I7_SAME_BYTES: &str = "I7 repeats are the same";
pub const I8_SUMS: &str = "I8 refunds add up";
pub const I9_IN_TIME: &str = "I9 nothing early, nothing after cancel";
pub const LIVENESS: &str = "L comes to rest";
pub const ERRORS: &str = "E only documented errors";

#[derive(Default)]
pub struct Found(pub Vec<Violation>);

impl Found {
    fn add(&mut self, invariant: &'static str, names: &[&str], what: impl Into<String>) {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        self.0.push(Violation { invariant, names, what: what.into() });
    }

    fn unless(
        &mut self,
        holds: bool,
        invariant: &'static str,
        names: &[&str],
        what: impl FnOnce() -> String,
    ) {
        if !holds {
            self.add(invariant, names, what());
        }
    }
}

/// Checks what holds at any moment, whatever is away: what is decided is delivered, dead or owed. Asks
/// the service for these payments, and then for the journals.
pub async fn check_books(
    driver: &Arc<Driver>,
    ids: &BTreeSet<String>,
    journals: impl AsyncFnOnce() -> (Story, Vec<Arrival>),
    stdout: Stdout,
) -> Result<Found, String> {
    let mut found = Found::default();
    let ids: Vec<String> = ids.iter().cloned().collect();
    let replies = get_all(driver, &ids).await?;
    let (story, arrivals) = journals().await;
    let told = sort(arrivals, &mut found);
    for (id, reply) in replies {
        match reply {
            None => found.add(I1_ACKNOWLEDGED, &[&id], "is not there"),
            Some(reply) => {
                let case = Case::of(&reply, &told, &story);
                case.check_told(&case.changes(), stdout, &mut found);
            }
        }
    }
    Ok(found)
}

/// Whether what the service wrote to its standard output is in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdout {
    Read,
    /// Some of it may still be in the pipe.
    Behind,
}

/// Waits until nothing is owed any more, then checks everything.
pub async fn check(
    driver: &Arc<Driver>,
    story: &Story,
    arrivals: impl AsyncFnOnce() -> Vec<Arrival>,
    timing: Timing,
    chance: &mut Chance,
) -> Result<(Seen, Found), String> {
    let mut found = Found::default();
    let created = created(story);
    let mut ids: BTreeSet<String> = created.values().map(|(id, _)| (*id).clone()).collect();
    ids.extend(list(driver).await?.into_iter().map(|payment| payment.payment_intent_id));
    let stored = come_to_rest(driver, ids, &mut found).await?;
    let told = sort(arrivals().await, &mut found);

    check_list(&stored, &list(driver).await?, &mut found);
    check_standing(driver, &stored, &mut found).await?;
    check_creates(&stored, story, &created, &mut found);
    check_commands(&stored, story, &mut found);
    check_keys(&stored, story, &mut found);
    check_reads(&stored, story, &mut found);
    for reply in stored.values() {
        Case::of(reply, &told, story).check(&mut found);
    }
    for (id, arrivals) in &told.by_payment {
        found.unless(stored.contains_key(id), I4_NO_PHANTOM, &[id], || {
            format!("told {} times of a payment that does not exist", arrivals.len())
        });
    }
    check_replays(driver, story, &stored, timing, chance, &mut found).await;
    Ok((Seen::of(&stored, story, &told), found))
}

type Stored = HashMap<String, GetPaymentIntentResponse>;

/// Create keys with the payment that they were acknowledged with.
fn created(story: &Story) -> HashMap<&String, (&String, &Create)> {
    let creates = story.sends.iter().filter_map(|(key, (call, _))| match call {
        Call::Create(create) => Some((key, &story.acks.get(key)?.first()?.id, create)),
        Call::Process { .. } | Call::Cancel { .. } => None,
    });
    creates.map(|(key, id, create)| (key, (id, create))).collect()
}

async fn list(driver: &Arc<Driver>) -> Result<Vec<Payment>, String> {
    let mut client = driver.client(0);
    let mut payments = Vec::new();
    let mut cursor = String::new();
    loop {
        let pagination = Some(Pagination { page: 0, page_size: PAGE_SIZE, cursor });
        let request = ListPaymentsRequest { pagination, ..Default::default() };
        let page = client.list_payments(request).await.map_err(|e| format!("a list: {e}"))?;
        let page = page.into_inner();
        payments.extend(page.payments);
        let info = page.page_info.ok_or("a list without page_info")?;
        if !info.has_next_page {
            return Ok(payments);
        }
        cursor = info.next_cursor;
    }
}

/// All payments as they are once nothing is owed.
async fn come_to_rest(
    driver: &Arc<Driver>,
    mut open: BTreeSet<String>,
    found: &mut Found,
) -> Result<Stored, String> {
    let watch = Stopwatch::start();
    let mut stored = Stored::new();
    loop {
        let ids: Vec<String> = open.iter().cloned().collect();
        for part in ids.chunks(PARALLEL * 8) {
            for (id, reply) in get_all(driver, part).await? {
                match reply {
                    None => {
                        found.add(I1_ACKNOWLEDGED, &[&id], "is not there");
                        open.remove(&id);
                    }
                    Some(reply) => {
                        if is_at_rest(&reply) {
                            open.remove(&id);
                        }
                        stored.insert(id, reply);
                    }
                }
            }
        }
        if open.is_empty() {
            return Ok(stored);
        }
        if watch.elapsed() > QUIET_WITHIN {
            for id in &open {
                let payment = stored[id].payment.clone().unwrap_or_default();
                let what = format!(
                    "after {QUIET_WITHIN:?} it is {} and still owes something: {:?}",
                    payment.status().as_str_name(),
                    stored[id].deliveries
                );
                found.add(LIVENESS, &[id], what);
            }
            return Ok(stored);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn get_all(
    driver: &Arc<Driver>,
    ids: &[String],
) -> Result<Vec<(String, Option<GetPaymentIntentResponse>)>, String> {
    let mut tasks = JoinSet::new();
    for (n, ids) in ids.chunks(ids.len().div_ceil(PARALLEL).max(1)).enumerate() {
        let (mut client, ids) = (driver.client(n), ids.to_vec());
        tasks.spawn(async move {
            let mut replies = Vec::with_capacity(ids.len());
            for id in ids {
                let request =
                    GetPaymentIntentRequest { payment_intent_id: id.clone(), ..Default::default() };
                replies.push((id, client.get_payment_intent(request).await));
            }
            replies
        });
    }
    let replies = tasks.join_all().await.into_iter().flatten();
    replies
        .map(|(id, reply)| match reply {
            Ok(reply) => Ok((id, Some(reply.into_inner()))),
            Err(status) if status.code() == Code::NotFound => Ok((id, None)),
            Err(status) => Err(format!("{id} cannot be read: {status}")),
        })
        .collect()
}

fn is_at_rest(reply: &GetPaymentIntentResponse) -> bool {
    let is_open = |delivery: &Delivery| matches!(delivery.state.as_str(), "OWED" | "HELD");
    let waits = reply.payment.as_ref().is_some_and(|payment| {
        matches!(payment.status(), Status::Unspecified | Status::Pending | Status::Processing)
    });
    !waits && !reply.deliveries.iter().any(is_open)
}

/// Arrivals by payment, in order.
pub struct Arrived {
    by_payment: HashMap<String, Vec<Told>>,
}

fn sort(arrivals: Vec<Arrival>, found: &mut Found) -> Arrived {
    let mut by_payment: HashMap<String, Vec<Told>> = HashMap::new();
    for arrival in arrivals {
        match arrival {
            Arrival::Told(told) => {
                by_payment.entry(told.body.payment_intent_id.clone()).or_default().push(*told);
            }
            Arrival::Unreadable { unreadable, .. } => {
                found.add(I7_SAME_BYTES, &[], format!("unreadable arrival: {unreadable}"));
            }
        }
    }
    Arrived { by_payment }
}

fn check_list(stored: &Stored, listed: &[Payment], found: &mut Found) {
    let mut seen = HashSet::new();
    for pair in listed.windows(2) {
        let (newer, older) = (&pair[0].payment_intent_id, &pair[1].payment_intent_id);
        found.unless(newer > older, I5_ONE_A_KEY, &[newer, older], || "listed out of order".into());
    }
    for payment in listed {
        let id = &payment.payment_intent_id;
        found.unless(seen.insert(id), I5_ONE_A_KEY, &[id], || "listed twice".into());
        let Some(mut same) = stored.get(id).and_then(|reply| reply.payment.clone()) else {
            found.add(I4_NO_PHANTOM, &[id], "listed, and yet it cannot be read");
            continue;
        };
        same.timeline.clear();
        found.unless(same == *payment, I1_ACKNOWLEDGED, &[id], || {
            format!("listed as {payment:?}, read as {same:?}")
        });
    }
    for id in stored.keys() {
        found.unless(seen.contains(id), I1_ACKNOWLEDGED, &[id], || "is not listed".into());
    }
}

/// By state, the simulation API lists the same deliveries: nothing owed, and all that is dead.
async fn check_standing(
    driver: &Arc<Driver>,
    stored: &Stored,
    found: &mut Found,
) -> Result<(), String> {
    for state in ["OWED", "HELD", "DEAD"] {
        let listed = list_deliveries(driver, state).await?;
        let deliveries = stored.values().flat_map(|reply| &reply.deliveries);
        let read: BTreeSet<String> =
            deliveries.filter(|d| d.state == state).map(|d| d.delivery_id.clone()).collect();
        for id in listed.symmetric_difference(&read) {
            let (listed, read) = (listed.contains(id), read.contains(id));
            let what = format!("{id} is {state}: listed so {listed}, read so {read}");
            found.add(I3_TOLD, &[id], what);
        }
    }
    Ok(())
}

async fn list_deliveries(driver: &Arc<Driver>, state: &str) -> Result<BTreeSet<String>, String> {
    let mut client = driver.simulation.clone();
    let mut listed = BTreeSet::new();
    let mut cursor = String::new();
    loop {
        let filter = Some(DeliveryFilter { state: state.to_owned(), ..Default::default() });
        let request = ListDeliveriesRequest { filter, page_size: PAGE_SIZE, cursor };
        let page = client.list_deliveries(request).await;
        let page = page.map_err(|e| format!("a list of deliveries: {e}"))?.into_inner();
        let deliveries = page.deliveries.into_iter().filter_map(|listed| listed.delivery);
        listed.extend(deliveries.map(|delivery| delivery.delivery_id));
        if page.next_cursor.is_empty() {
            return Ok(listed);
        }
        cursor = page.next_cursor;
    }
}

fn check_creates(
    stored: &Stored,
    story: &Story,
    created: &HashMap<&String, (&String, &Create)>,
    found: &mut Found,
) {
    for (key, (id, _)) in created {
        let payment = stored.get(*id).and_then(|reply| reply.payment.as_ref());
        // That it is missing was found already.
        let Some(payment) = payment else { continue };
        found.unless(payment.reservation_id == **key, I1_ACKNOWLEDGED, &[key, id], || {
            format!("belongs to {}", payment.reservation_id)
        });
    }
    let mut owners: HashMap<&str, Vec<&str>> = HashMap::new();
    for (id, reply) in stored {
        let Some(payment) = reply.payment.as_ref() else { continue };
        let key = &payment.reservation_id;
        owners.entry(key).or_default().push(id);
        let Some((Call::Create(create), _)) = story.sends.get(key) else {
            found.add(I4_NO_PHANTOM, &[key, id], "nobody asked for it");
            continue;
        };
        let amount = payment.amount.clone().unwrap_or_default();
        let tags = payment.metadata.clone().unwrap_or_default().tags;
        let same = payment.user_id == create.user
            && amount.amount == create.amount
            && amount.currency == CURRENCY
            && payment.method == create.method
            && payment.scenario == create.scenario
            && tags.get("key") == Some(key);
        found.unless(same, I1_ACKNOWLEDGED, &[key, id], || {
            format!("asked for {create:?}, stored {payment:?}")
        });
    }
    for (key, ids) in owners.into_iter().filter(|(_, ids)| ids.len() > 1) {
        found.add(I5_ONE_A_KEY, &[key], format!("made {} payments: {ids:?}", ids.len()));
    }
}

/// What ProcessPayment and CancelPayment were answered, and how often what was asked came true.
fn check_commands(stored: &Stored, story: &Story, found: &mut Found) {
    for (key, (call, _)) in &story.sends {
        let (Call::Process { id } | Call::Cancel { id, .. }) = call else { continue };
        let payment = stored.get(id).and_then(|reply| reply.payment.as_ref());
        let Some(payment) = payment else { continue };
        let status = payment.status();
        let refunds: Vec<_> = payment.refunds.iter().filter(|r| r.reason == *key).collect();
        found.unless(refunds.len() <= 1, I5_ONE_A_KEY, &[key, id], || {
            format!("refunded {} times under one key", refunds.len())
        });
        let Some(ack) = story.acks.get(key).and_then(|acks| acks.first()) else { continue };
        let answered = Status::try_from(ack.status).unwrap_or_default();
        let fits =
            answered == status || (answered == Status::Completed && status == Status::Refunded);
        found.unless(fits, I1_ACKNOWLEDGED, &[key, id], || {
            format!("was answered {}, is {}", answered.as_str_name(), status.as_str_name())
        });
        if let Some((refund, amount)) = &ack.refund {
            let is_there = refunds.iter().any(|r| {
                r.refund_id == *refund && r.amount.as_ref().is_some_and(|m| m.amount == *amount)
            });
            found.unless(is_there, I1_ACKNOWLEDGED, &[key, id], || {
                format!("refund {refund} of {amount} is not there: {:?}", payment.refunds)
            });
        }
    }
}

fn check_keys(stored: &Stored, story: &Story, found: &mut Found) {
    for (key, acks) in &story.acks {
        let first = &acks[0];
        let same = acks
            .iter()
            .all(|ack| (&ack.id, &ack.hash, ack.status) == (&first.id, &first.hash, first.status));
        found.unless(same, I5_ONE_A_KEY, &[key], || format!("answered differently: {acks:?}"));
        let ran = acks.iter().filter(|ack| !ack.replayed).count();
        found.unless(ran <= 1, I5_ONE_A_KEY, &[key], || format!("ran {ran} times"));
    }
    for (key, code) in &story.reused {
        found.unless(*code == Code::AlreadyExists, I5_ONE_A_KEY, &[key], || {
            format!("another request under its key was answered {code:?}")
        });
    }
    for (key, code, message) in &story.refused {
        let is_command = story.sends.get(key).is_some_and(|(call, _)| match call {
            Call::Create(_) => false,
            Call::Process { id } | Call::Cancel { id, .. } => stored.contains_key(id),
        });
        let is_documented = match code {
            Code::FailedPrecondition => is_command,
            Code::ResourceExhausted => true,
            _ => false,
        };
        let invariant = match code {
            Code::NotFound => I1_ACKNOWLEDGED,
            Code::AlreadyExists => I5_ONE_A_KEY,
            _ => ERRORS,
        };
        found.unless(is_documented, invariant, &[key], || format!("refused: {code:?} {message}"));
    }
}

fn check_reads(stored: &Stored, story: &Story, found: &mut Found) {
    let mut last: HashMap<&String, i64> = HashMap::new();
    for (id, version, _) in &story.reads {
        let before = last.insert(id, *version).unwrap_or(0);
        found.unless(*version >= before, I6_FORWARD, &[id], || {
            format!("read at version {version} after version {before}")
        });
    }
    for (id, version) in last {
        let now = stored.get(id).and_then(|reply| reply.payment.as_ref()).map(|p| p.version);
        found.unless(now.is_none_or(|now| now >= version), I6_FORWARD, &[id], || {
            format!("was read at version {version}, is at {now:?}")
        });
    }
}

/// Sends keys again: what was acknowledged answers the same, and what was stored without being
/// acknowledged answers with what was stored.
async fn check_replays(
    driver: &Arc<Driver>,
    story: &Story,
    stored: &Stored,
    timing: Timing,
    chance: &mut Chance,
    found: &mut Found,
) {
    let owner: HashMap<&str, &str> = stored
        .iter()
        .filter_map(|(id, reply)| Some((reply.payment.as_ref()?.reservation_id.as_str(), id)))
        .map(|(key, id)| (key, id.as_str()))
        .collect();
    let mut keys: Vec<&String> = story.sends.keys().collect();
    keys.sort();
    let acked: Vec<&String> =
        keys.iter().filter(|key| story.acks.contains_key(**key)).copied().collect();
    let unacked: Vec<&String> = keys
        .iter()
        .filter(|key| !story.acks.contains_key(**key) && owner.contains_key(key.as_str()))
        .copied()
        .collect();
    for from in [acked, unacked] {
        let count = from.len().min(REPLAYS);
        for i in 0..count {
            let key = if from.len() <= REPLAYS { from[i] } else { chance.pick(&from) };
            let (call, _) = &story.sends[key];
            let expected = story.acks.get(key).and_then(|acks| acks.first());
            match driver.send(driver.client(0), key, call, timing).await {
                Ok(ack) => {
                    let same = match expected {
                        Some(first) => (&ack.id, &ack.hash) == (&first.id, &first.hash),
                        None => owner.get(key.as_str()) == Some(&ack.id.as_str()),
                    };
                    found.unless(same && ack.replayed, I5_ONE_A_KEY, &[key], || {
                        format!("answered {ack:?} instead of {expected:?}")
                    });
                }
                Err(status) => {
                    found.add(I5_ONE_A_KEY, &[key], format!("sent again, it is refused: {status}"));
                }
            }
        }
    }
}
