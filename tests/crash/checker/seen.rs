//! What there was to judge.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
};

use payment_sim::api::pb::payment::v1::PaymentStatus as Status;

use super::{Arrived, Stored};
use crate::{
    arrival::{Carrier, Channel},
    driver::Story,
};

/// A run without repeats, say, has shown little.
#[derive(Debug, Default)]
pub struct Seen {
    payments: usize,
    /// Stored, though nobody was told so before the kill.
    unacknowledged: usize,
    refunds: usize,
    cancelled: usize,
    /// Events by carrier, then webhooks and letters; refused ones and repeats included.
    arrivals: BTreeMap<Carrier, usize>,
    /// Arrivals of what had arrived before.
    repeats: usize,
    /// Events that the bus or the queue refused for good.
    refused: usize,
    dead_events: usize,
    dead_webhooks: usize,
    replays: usize,
    reuses: usize,
}

impl Seen {
    pub fn of(stored: &Stored, story: &Story, told: &Arrived) -> Self {
        let payments = || stored.values().filter_map(|reply| reply.payment.as_ref());
        let told = || told.by_payment.values().flatten();
        let mut arrivals: BTreeMap<Carrier, usize> = BTreeMap::new();
        told().for_each(|told| *arrivals.entry(told.carrier).or_default() += 1);
        let first: HashSet<_> = told().map(|told| (told.channel(), &told.body.event_id)).collect();
        let dead = |channel: Channel| {
            let all = stored.values().flat_map(|reply| &reply.deliveries);
            all.filter(|d| d.state == "DEAD" && d.channel == channel.name()).count()
        };
        Self {
            payments: stored.len(),
            unacknowledged: payments()
                .filter(|payment| !story.acks.contains_key(&payment.reservation_id))
                .count(),
            refunds: payments().map(|payment| payment.refunds.len()).sum(),
            cancelled: payments().filter(|p| p.status() == Status::Cancelled).count(),
            repeats: told().count() - first.len(),
            refused: told()
                .filter(|told| told.channel() == Channel::Event && told.is_refused())
                .count(),
            arrivals,
            dead_events: dead(Channel::Event),
            dead_webhooks: dead(Channel::Webhook),
            replays: story.acks.values().flatten().filter(|ack| ack.replayed).count(),
            reuses: story.reused.len(),
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { payments, unacknowledged, refunds, cancelled, arrivals, repeats, .. } = self;
        let Self { refused, dead_events, dead_webhooks, replays, reuses, .. } = self;
        let came = |carrier| arrivals.get(&carrier).copied().unwrap_or(0);
        let (bus, queue, stdout) =
            (came(Carrier::Bus), came(Carrier::Queue), came(Carrier::Stdout));
        let (webhooks, letters) = (came(Carrier::Webhook), came(Carrier::Letter));
        writeln!(
            f,
            "{payments} payments ({unacknowledged} unacknowledged, {cancelled} cancelled), {refunds} \
             refunds, {replays} replays, {reuses} keys reused"
        )?;
        write!(
            f,
            "  {bus} events over the bus, {queue} over the queue, {stdout} on stdout ({refused} refused, \
             {dead_events} dead), {webhooks} webhooks ({dead_webhooks} dead), {letters} letters; {repeats} \
             of all are repeats"
        )
    }
}
