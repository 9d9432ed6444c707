//! One payment: what must hold of its timeline, its deliveries and all that arrived about it.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use payment_sim::api::pb::{
    common::v1::Money,
    payment::v1::{
        Delivery, GetPaymentIntentResponse, Payment, PaymentScenario as Scenario,
        PaymentStatus as Status, TimelineEntry,
    },
};
use prost_types::Timestamp;

use super::{
    Arrived, Found, I2_DECIDED_ONCE, I3_TOLD, I4_NO_PHANTOM, I6_FORWARD, I7_SAME_BYTES, I8_SUMS,
    I9_IN_TIME, Stdout,
};
use crate::{
    arrival::{Carrier, Channel, Told},
    driver::{Call, Story, Timing},
};

/// A payment with all that was said of it.
pub struct Case<'a> {
    id: &'a str,
    payment: &'a Payment,
    deliveries: &'a [Delivery],
    told: &'a [Told],
    /// The delays of the services that its create was sent to.
    timings: Vec<Timing>,
    /// Empty: none.
    webhook_url: &'a str,
}

/// A change that others are told of.
pub struct Change<'a> {
    n: usize,
    version: i64,
    entry: &'a TimelineEntry,
}

impl<'a> Case<'a> {
    pub fn of(reply: &'a GetPaymentIntentResponse, told: &'a Arrived, story: &'a Story) -> Self {
        let payment = reply.payment.as_ref().expect("a reply has a payment");
        let send = story.sends.get(&payment.reservation_id);
        let webhook_url = match send {
            Some((Call::Create(create), _)) => create.webhook_url.as_str(),
            _ => "",
        };
        let timings = send.map(|(_, sends)| sends.iter().map(|(_, timing)| *timing).collect());
        Self {
            id: &payment.payment_intent_id,
            payment,
            deliveries: &reply.deliveries,
            told: told.by_payment.get(&payment.payment_intent_id).map_or(&[], Vec::as_slice),
            timings: timings.unwrap_or_default(),
            webhook_url,
        }
    }

    pub fn check(&self, found: &mut Found) {
        let changes = self.changes();
        self.check_decision(&changes, found);
        self.check_told(&changes, Stdout::Read, found);
        self.check_letters(found);
        self.check_repeats(&changes, found);
        self.check_order(found);
        self.check_sums(found);
        self.check_times(&changes, found);
    }

    fn names(&self) -> [&str; 2] {
        [self.id, &self.payment.reservation_id]
    }

    /// All changes but PROCESSING are told of, numbered from 1; each raises the version.
    pub fn changes(&self) -> Vec<Change<'_>> {
        let raises =
            self.payment.timeline.iter().filter(|entry| {
                matches!(entry.kind.as_str(), "status_changed" | "partially_refunded")
            });
        let numbered = raises.enumerate().map(|(i, entry)| (2 + i as i64, entry));
        numbered
            .filter(|(_, entry)| entry.status() != Status::Processing)
            .enumerate()
            .map(|(i, (version, entry))| Change { n: i + 1, version, entry })
            .collect()
    }

    fn event_id(&self, n: usize) -> String {
        format!("evt_{}_{n}", self.id.trim_start_matches("pi_"))
    }

    fn check_decision(&self, changes: &[Change<'_>], found: &mut Found) {
        let names = self.names();
        let decisions: Vec<_> = changes
            .iter()
            .filter(|change| change.entry.kind == "status_changed")
            .map(|change| change.entry.status())
            .filter(|status| *status != Status::Refunded)
            .collect();
        found.unless(decisions.len() == 1, I2_DECIDED_ONCE, &names, || {
            format!("decided {} times: {decisions:?}", decisions.len())
        });
        let last = changes.last().map(|change| (change.version, change.entry.status()));
        let now = (self.payment.version, self.payment.status());
        found.unless(last == Some(now), I6_FORWARD, &names, || {
            format!("its timeline ends at {last:?}, it is at {now:?}")
        });
        let told: BTreeSet<&str> = self
            .told
            .iter()
            .map(|told| told.body.status.as_str())
            .filter(|status| *status != Status::Refunded.as_str_name())
            .collect();
        let decided: BTreeSet<&str> = decisions.iter().map(|status| status.as_str_name()).collect();
        found.unless(told.is_subset(&decided), I2_DECIDED_ONCE, &names, || {
            format!("decided {decided:?}, told {told:?}")
        });
    }

    fn delivery(&self, n: usize, channel: Channel) -> Option<&Delivery> {
        let bare = self.id.trim_start_matches("pi_");
        let name = format!("dlv_{bare}_{n}_{}", channel.name());
        self.deliveries.iter().find(|delivery| delivery.delivery_id == name)
    }

    /// What is owed is not told yet, which is in order; how long it may stay so is another invariant's.
    pub fn check_told(&self, changes: &[Change<'_>], stdout: Stdout, found: &mut Found) {
        for change in changes {
            self.check_told_by(Channel::Event, change, stdout, found);
            if self.webhook_url.is_empty() {
                continue;
            }
            self.check_told_by(Channel::Webhook, change, stdout, found);
            let webhook = self.delivery(change.n, Channel::Webhook);
            if webhook.is_some_and(|webhook| webhook.state == "DEAD") {
                self.check_told_by(Channel::Letter, change, stdout, found);
            }
        }
    }

    fn check_told_by(
        &self,
        channel: Channel,
        change: &Change<'_>,
        stdout: Stdout,
        found: &mut Found,
    ) {
        let event_id = self.event_id(change.n);
        let mut arrived = self
            .told
            .iter()
            .filter(|told| told.channel() == channel && told.body.event_id == event_id);
        let is_unread = channel == Channel::Event && stdout == Stdout::Behind;
        let state = self.delivery(change.n, channel).map(|delivery| delivery.state.as_str());
        let why = match (state, channel) {
            (Some("OWED" | "HELD"), _) => return,
            (Some("DELIVERED"), _) if is_unread || arrived.any(Told::is_taken) => return,
            (Some("DELIVERED"), _) => "is delivered, and yet it never arrived".to_owned(),
            (Some("DEAD"), Channel::Webhook) => return,
            (Some("DEAD"), Channel::Event) if arrived.any(Told::is_refused) => return,
            (Some("DEAD"), Channel::Event) => "is dead, and yet nobody refused it".to_owned(),
            _ => format!("is {state:?}"),
        };
        let (n, status) = (change.n, change.entry.status().as_str_name());
        let what = format!("n. {n}, {status}: its {} {why}", channel.name());
        found.add(I3_TOLD, &self.names(), what);
    }

    /// A letter is about a webhook that was given up, and tells its story.
    fn check_letters(&self, found: &mut Found) {
        let names = self.names();
        for told in self.told {
            let Some(letter) = &told.letter else { continue };
            let id = &told.body.event_id;
            let webhook = self.delivery(number(id), Channel::Webhook);
            let Some(dead) = webhook.filter(|webhook| webhook.state == "DEAD") else {
                let state = webhook.map(|webhook| &webhook.state);
                found.add(I4_NO_PHANTOM, &names, format!("a letter of {id}, which is {state:?}"));
                continue;
            };
            let last_error = dead.attempts.last().map_or("", |attempt| attempt.error.as_str());
            let attempts = dead.attempts_made.to_string();
            let says = (&letter.event_id, &letter.event_type, &letter.webhook_url);
            let is = (id, &dead.event_type, &dead.url);
            let tells_why = (&*letter.reason, &*letter.attempts) == (last_error, &*attempts);
            found.unless(says == is && tells_why, I7_SAME_BYTES, &names, || {
                format!("{letter:?} is about {dead:?}")
            });
        }
    }

    /// One id, one body, over all channels, and the body says what the timeline says.
    fn check_repeats(&self, changes: &[Change<'_>], found: &mut Found) {
        let names = self.names();
        let mut bodies: BTreeMap<&str, &Told> = BTreeMap::new();
        let mut wholes: BTreeMap<(Carrier, &str), &Told> = BTreeMap::new();
        for told in self.told {
            let id = told.body.event_id.as_str();
            found.unless(told.id == id, I7_SAME_BYTES, &names, || {
                format!("{:?} {} carries {id}", told.carrier, told.id)
            });
            let first = *bodies.entry(id).or_insert(told);
            found.unless(first.hash == told.hash, I7_SAME_BYTES, &names, || {
                format!("{id} says {:?} and {:?}", first.body, told.body)
            });
            let first = *wholes.entry((told.carrier, id)).or_insert(told);
            let same = (&first.whole, &first.letter) == (&told.whole, &told.letter);
            found.unless(same, I7_SAME_BYTES, &names, || {
                format!("{id} came by {:?} in two forms", told.carrier)
            });
            let is_listed = self.delivery(number(id), told.channel()).is_some();
            found.unless(is_listed, I4_NO_PHANTOM, &names, || {
                format!("{id} came by {:?}, of which the payment knows nothing", told.carrier)
            });
        }
        for (id, told) in bodies {
            let change = changes.iter().find(|change| self.event_id(change.n) == id);
            let Some(change) = change else {
                found.add(I4_NO_PHANTOM, &names, format!("{id} tells of no change"));
                continue;
            };
            let body = &told.body;
            let says = (body.version, body.status.as_str(), body.reservation_id.as_str());
            let is = (
                change.version,
                change.entry.status().as_str_name(),
                self.payment.reservation_id.as_str(),
            );
            found.unless(says == is, I2_DECIDED_ONCE, &names, || {
                format!("{id} says {says:?}, the timeline {is:?}")
            });
        }
    }

    /// The first arrivals of a channel come in the order of the changes.
    fn check_order(&self, found: &mut Found) {
        for channel in Channel::ALL {
            let mut seen = HashSet::new();
            let told = self.told.iter().filter(|told| told.channel() == channel);
            let first: Vec<_> = told
                .filter(|told| seen.insert(&told.body.event_id))
                .map(|told| told.body.version)
                .collect();
            found.unless(first.is_sorted(), I6_FORWARD, &self.names(), || {
                format!("{channel:?}s came in the order of versions {first:?}")
            });
        }
    }

    fn check_sums(&self, found: &mut Found) {
        let amount = |money: &Option<_>| money.as_ref().map_or(0, money_amount);
        let sum: i64 = self.payment.refunds.iter().map(|refund| amount(&refund.amount)).sum();
        let (refunded, all) = (amount(&self.payment.refunded_amount), amount(&self.payment.amount));
        let is_refunded = self.payment.status() == Status::Refunded;
        let adds_up = sum == refunded && sum <= all && is_refunded == (sum == all);
        found.unless(adds_up, I8_SUMS, &self.names(), || {
            format!("refunds of {sum}, refunded {refunded} of {all}, {:?}", self.payment.status())
        });
        let ids: HashSet<_> = self.payment.refunds.iter().map(|refund| &refund.refund_id).collect();
        found.unless(ids.len() == self.payment.refunds.len(), I8_SUMS, &self.names(), || {
            "two refunds have one id".into()
        });
    }

    fn check_times(&self, changes: &[Change<'_>], found: &mut Found) {
        let names = self.names();
        for change in changes {
            let event_id = self.event_id(change.n);
            for told in self.told.iter().filter(|told| told.body.event_id == event_id) {
                found.unless(told.at >= ms(&change.entry.at), I9_IN_TIME, &names, || {
                    format!("{event_id} was told at {}, before it was", told.at)
                });
            }
        }
        let Some(first) = changes.first() else { return };
        let earliest = |of: fn(&Timing) -> u64| {
            let least = self.timings.iter().map(of).min().unwrap_or(0);
            ms(&self.payment.created_at) + i64::try_from(least).expect("small")
        };
        let (due, what) = match self.payment.scenario() {
            Scenario::Approve | Scenario::Fail | Scenario::Random => {
                let told = self.told.iter().filter(|t| t.body.event_id == self.event_id(1));
                (earliest(|timing| timing.delay_ms), told.map(|told| told.at).min())
            }
            _ if first.entry.cause != "scenario" => return,
            Scenario::Delay => (earliest(|timing| timing.delay_ms), Some(ms(&first.entry.at))),
            Scenario::Timeout => (earliest(|timing| timing.settle_ms), Some(ms(&first.entry.at))),
            Scenario::Manual => (earliest(|timing| timing.ttl_ms), Some(ms(&first.entry.at))),
            Scenario::Unspecified => return,
        };
        found.unless(what.is_none_or(|at| at >= due), I9_IN_TIME, &names, || {
            format!("due at {due}, came at {what:?}")
        });
        let cancelled = first.entry.status() == Status::Cancelled;
        found.unless(!cancelled || changes.len() == 1, I9_IN_TIME, &names, || {
            "changed after it was cancelled".into()
        });
    }
}

/// The number of the notification that an event id names; 0 names none.
fn number(event_id: &str) -> usize {
    event_id.rsplit('_').next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn money_amount(money: &Money) -> i64 {
    money.amount
}

fn ms(at: &Option<Timestamp>) -> i64 {
    at.as_ref().map_or(0, |at| at.seconds * 1_000 + i64::from(at.nanos) / 1_000_000)
}
