//! What happened to a payment, in order.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Text, status::Status, time::Timestamp};

/// Past this the oldest entries that are no status change go, and are counted.
pub const TIMELINE_MAX: usize = 200;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub at: Timestamp,
    pub kind: Kind,
    /// The status from then on.
    pub status: Status,
    pub cause: Cause,
    /// Ids, amounts and reasons; never card data.
    pub detail: Detail,
}

/// Names and values.
pub type Detail = Vec<(Text, Text)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Created,
    StatusChanged,
    PartiallyRefunded,
    WebhookSimulated,
    RedeliveryOrdered,
}

impl Kind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::StatusChanged => "status_changed",
            Self::PartiallyRefunded => "partially_refunded",
            Self::WebhookSimulated => "webhook_simulated",
            Self::RedeliveryOrdered => "redelivery_ordered",
        }
    }

    const fn is_status_change(self) -> bool {
        match self {
            Self::Created | Self::StatusChanged => true,
            Self::PartiallyRefunded | Self::WebhookSimulated | Self::RedeliveryOrdered => false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    CreatePaymentIntent,
    /// The plan, at the moment it names.
    Scenario,
    ProcessPayment,
    CancelPayment,
    SimulateWebhook,
    Redeliver,
}

impl Cause {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CreatePaymentIntent => "CreatePaymentIntent",
            Self::Scenario => "scenario",
            Self::ProcessPayment => "ProcessPayment",
            Self::CancelPayment => "CancelPayment",
            Self::SimulateWebhook => "SimulateWebhook",
            Self::Redeliver => "Redeliver",
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// Shared: most of what happens to a payment adds nothing here.
    entries: Arc<Vec<Entry>>,
    dropped: u32,
}

impl Timeline {
    /// With room for what most payments have: their creation and their outcome.
    pub fn beginning(created: Entry) -> Self {
        let mut entries = Vec::with_capacity(2);
        entries.push(created);
        Self { entries: Arc::new(entries), dropped: 0 }
    }

    pub fn push(&mut self, entry: Entry) {
        let entries = Arc::make_mut(&mut self.entries);
        entries.push(entry);
        if entries.len() > TIMELINE_MAX
            && let Some(oldest) = entries.iter().position(|e| !e.kind.is_status_change())
        {
            entries.remove(oldest);
            self.dropped = self.dropped.saturating_add(1);
        }
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many entries went for want of room.
    pub const fn dropped(&self) -> u32 {
        self.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_timeline_drops_the_oldest_that_is_no_status_change() {
        let entry = |ms, kind| Entry {
            at: Timestamp::from_ms(ms),
            kind,
            status: Status::Completed,
            cause: Cause::SimulateWebhook,
            detail: Vec::new(),
        };
        let mut timeline = Timeline::default();
        timeline.push(entry(0, Kind::Created));
        for ms in 1..=300 {
            timeline.push(entry(ms, Kind::WebhookSimulated));
        }
        assert_eq!(timeline.entries().len(), TIMELINE_MAX);
        assert_eq!(timeline.dropped(), 101);
        assert_eq!(timeline.entries()[0].kind, Kind::Created);
        assert_eq!(timeline.entries()[1].at.ms(), 102);
    }
}
