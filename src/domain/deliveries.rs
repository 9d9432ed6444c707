//! The deliveries of a payment one by one: named, and picked by filters.

use std::fmt;

use super::{
    delivery::{Channel, Delivery, DeliveryState, Notification, is_held},
    ids::PaymentId,
    origin::{Origin, origin},
    payment::{Payment, Progress},
};

/// The number of a notification, and where it goes: one delivery among a payment's. In this order they
/// are listed.
pub type DeliveryNo = (u32, Channel);

/// Names one delivery: `dlv_`, the payment's 26 characters, the number, the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeliveryId {
    pub payment: PaymentId,
    pub no: DeliveryNo,
}

impl DeliveryId {
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("dlv_")?.splitn(3, '_');
        let payment = PaymentId::parse_bare(parts.next()?)?;
        let n = parts.next()?.parse().ok()?;
        let channel = Channel::parse(parts.next()?)?;
        let id = Self { payment, no: (n, channel) };
        // "+1" and "01" are numbers too: one delivery has one spelling.
        (id.to_string() == text).then_some(id)
    }
}

impl fmt::Display for DeliveryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, channel) = self.no;
        write!(f, "dlv_{}_{n}_{}", self.payment, channel.as_str())
    }
}

/// How a delivery stands, as callers see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Owed,
    /// Owed, and waits for an earlier one of its payment and channel.
    Held,
    Delivered,
    Dead,
}

impl Standing {
    pub const ALL: [Self; 4] = [Self::Owed, Self::Held, Self::Delivered, Self::Dead];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Owed => "OWED",
            Self::Held => "HELD",
            Self::Delivered => "DELIVERED",
            Self::Dead => "DEAD",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|standing| standing.as_str() == text)
    }
}

/// One of a payment's deliveries, with what it is told from.
#[derive(Clone, Copy, Debug)]
pub struct Listed<'a> {
    pub notification: &'a Notification,
    pub channel: Channel,
    pub delivery: &'a Delivery,
    pub standing: Standing,
}

impl Listed<'_> {
    pub const fn no(&self) -> DeliveryNo {
        (self.notification.n, self.channel)
    }
}

impl Payment {
    /// Oldest notification first.
    pub fn deliveries(&self) -> impl Iterator<Item = Listed<'_>> {
        let notifications = &self.progress.notifications;
        let all = notifications.iter().flat_map(|n| Channel::ALL.map(|channel| (n, channel)));
        all.filter_map(move |(notification, channel)| {
            let delivery = notification.delivery(channel)?;
            let standing = match delivery.state {
                DeliveryState::Owed { .. } if is_held(notifications, notification.n, channel) => {
                    Standing::Held
                }
                DeliveryState::Owed { .. } | DeliveryState::Redelivery { .. } => Standing::Owed,
                DeliveryState::Delivered { .. } => Standing::Delivered,
                DeliveryState::Dead { .. } | DeliveryState::DeadLettered { .. } => Standing::Dead,
            };
            Some(Listed { notification, channel, delivery, standing })
        })
    }
}

impl Progress {
    /// Whether anything was given up, and not ordered again since.
    pub fn has_dead(&self) -> bool {
        self.notifications.iter().any(Notification::has_dead)
    }
}

/// Which deliveries are meant; what is absent matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeliveryFilter {
    pub standing: Option<Standing>,
    pub channel: Option<Channel>,
    pub payment: Option<PaymentId>,
    /// Webhooks that go there; nothing else has an origin.
    pub origin: Option<Origin>,
}

impl DeliveryFilter {
    /// The deliveries of a payment that are meant.
    pub fn pick<'a>(&self, payment: &'a Payment) -> impl Iterator<Item = Listed<'a>> {
        let url = payment.terms.webhook_url.as_deref();
        let to = self.origin.as_ref();
        let goes_there = to.is_none_or(|to| url.and_then(origin).as_ref() == Some(to))
            && self.payment.is_none_or(|id| id == payment.terms.id);
        let (standing, channel) = (self.standing, self.channel);
        let webhooks_only = to.is_some();
        payment.deliveries().filter(move |listed| {
            goes_there
                && standing.is_none_or(|standing| standing == listed.standing)
                && channel.is_none_or(|channel| channel == listed.channel)
                && (!webhooks_only || listed.channel == Channel::Webhook)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::Timestamp;

    #[test]
    fn a_delivery_id_has_one_spelling() {
        let payment = PaymentId::from_parts(Timestamp::from_ms(1_767_225_600_000), 9);
        for channel in Channel::ALL {
            let id = DeliveryId { payment, no: (12, channel) };
            assert_eq!(DeliveryId::parse(&id.to_string()), Some(id));
        }
        let bare = payment.bare();
        let letter = DeliveryId { payment, no: (1, Channel::DeadLetter) };
        assert_eq!(letter.to_string(), format!("dlv_{bare}_1_dead_letter"));
        for wrong in [
            String::new(),
            format!("dlv_{bare}_1"),
            format!("dlv_{bare}_01_event"),
            format!("dlv_{bare}_+1_event"),
            format!("dlv_{bare}_1_letter"),
            format!("dlv_{}_1_event", bare.to_lowercase()),
            format!("evt_{bare}_1_event"),
            format!("dlv_{bare}_4294967296_event"),
            format!("dlv_{bare}_1_event "),
        ] {
            assert_eq!(DeliveryId::parse(&wrong), None, "{wrong}");
        }
    }
}
