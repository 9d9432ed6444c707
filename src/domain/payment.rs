//! The state machine of a payment, here and only here.
//!
//! `create` and `transition` are the only ways to a new state, and every state carries the
//! notifications that it owes: neither can be saved without the other.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    Text,
    card::Card,
    deliveries::{DeliveryId, DeliveryNo},
    delivery::{self, Attempted, Channel, Delivery, Notification, RetryPolicy, Snapshot, Topic},
    ids::{Idempotency, PaymentId},
    money::Money,
    refund::{REFUNDS_MAX, Refund, RefundError, Remaining},
    scenario::{Course, FailureReason, Outcome, Plan},
    status::Status,
    time::Timestamp,
    timeline::{Cause, Detail, Entry, Kind, Timeline},
    validation::{Violation, Violations},
};

/// A payment owes at most so many simulated webhooks at a time.
pub const SIMULATED_OWED_MAX: usize = 100;
/// Simulated webhooks that are over are kept up to here, the newest.
const SIMULATED_KEPT: usize = 100;

/// What is fixed at creation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    pub id: PaymentId,
    pub reservation_id: Text,
    pub user_id: Text,
    pub amount: Money,
    pub vat: Option<u64>,
    pub method: Method,
    pub plan: Plan,
    pub provider: Text,
    pub webhook_url: Option<Text>,
    /// Whether changes are published as events: the sink's setting at creation.
    pub events: bool,
    pub metadata: Option<Metadata>,
    /// Canonical JSON, given back in every webhook.
    pub echo: Option<String>,
    pub card: Option<Card>,
    pub created_at: Timestamp,
    pub trace: Trace,
    pub idempotency: Option<Idempotency>,
    /// Which renderer makes this payment's webhook bodies, so that they never change between attempts.
    pub renderer: u8,
}

impl Terms {
    /// A payment on these terms has its outcome as soon as it is there, and nobody is told of it: nothing
    /// will ever happen to it by itself.
    pub const fn are_settled_at_once(&self) -> bool {
        self.plan.decided_at_once().is_some() && !self.events && self.webhook_url.is_none()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Method {
    Unspecified,
    CreditCard,
    DebitCard,
    BankTransfer,
    MobilePay,
    DigitalWallet,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    pub source: Text,
    pub user_agent: Text,
    pub ip_address: Text,
    pub session_id: Text,
    pub tags: BTreeMap<Text, Text>,
}

/// W3C trace context of the request that made the payment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    pub trace_id: [u8; 16],
    pub parent_span: [u8; 8],
    pub sampled: bool,
}

/// Data lives in the state that has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PaymentState {
    Pending { next: Next },
    Processing { settles_at: Timestamp },
    Completed { at: Timestamp },
    Failed { at: Timestamp, reason: FailureReason },
    Cancelled { at: Timestamp },
    Refunded { at: Timestamp, completed_at: Timestamp },
    Expired { at: Timestamp },
}

/// What happens to a pending payment by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Next {
    Decide {
        at: Timestamp,
        outcome: Outcome,
    },
    /// As `Decide` to COMPLETED, but ProcessPayment does not answer.
    Settle {
        at: Timestamp,
    },
    Expire {
        at: Timestamp,
    },
}

impl PaymentState {
    pub const fn status(&self) -> Status {
        match self {
            Self::Pending { .. } => Status::Pending,
            Self::Processing { .. } => Status::Processing,
            Self::Completed { .. } => Status::Completed,
            Self::Failed { .. } => Status::Failed,
            Self::Cancelled { .. } => Status::Cancelled,
            Self::Refunded { .. } => Status::Refunded,
            Self::Expired { .. } => Status::Expired,
        }
    }

    /// When this state changes by itself; a timer is nothing but this, read from what is stored.
    pub const fn wakes_at(&self) -> Option<Timestamp> {
        match self {
            Self::Pending {
                next: Next::Decide { at, .. } | Next::Settle { at } | Next::Expire { at },
            } => Some(*at),
            Self::Processing { settles_at } => Some(*settles_at),
            Self::Completed { .. }
            | Self::Failed { .. }
            | Self::Cancelled { .. }
            | Self::Refunded { .. }
            | Self::Expired { .. } => None,
        }
    }

    /// The outcome with its moment, once there is one.
    pub const fn decision(&self) -> Option<(Outcome, Timestamp)> {
        match self {
            Self::Completed { at } | Self::Refunded { completed_at: at, .. } => {
                Some((Outcome::Completed, *at))
            }
            Self::Failed { at, reason } => Some((Outcome::Failed(*reason), *at)),
            Self::Pending { .. }
            | Self::Processing { .. }
            | Self::Cancelled { .. }
            | Self::Expired { .. } => None,
        }
    }
}

/// What changes in a payment's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub state: PaymentState,
    /// What callers see; rises by one with each change.
    pub version: u32,
    pub updated_at: Timestamp,
    /// A card that ProcessPayment brought.
    pub card: Option<Card>,
    pub vat: Option<u64>,
    pub refunds: Vec<Refund>,
    pub timeline: Timeline,
    pub notifications: Vec<Notification>,
    /// The number of the last notification.
    pub notified: u32,
}

impl Progress {
    /// Nothing will change or be told by itself any more.
    pub fn is_settled(&self) -> bool {
        self.state.wakes_at().is_none() && !self.notifications.iter().any(Notification::is_owed)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payment {
    pub terms: Arc<Terms>,
    pub progress: Progress,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// The timer: applies what is due, and nothing else.
    Wake,
    Process {
        card: Option<Card>,
        vat: Option<u64>,
    },
    Cancel(Cancel),
    SimulateWebhook {
        target: Option<Status>,
        at: Timestamp,
    },
    /// Sends a delivery that is over once more.
    Redeliver(DeliveryNo),
    /// Sends those of these deliveries once more that are dead.
    RedeliverDead(Vec<DeliveryNo>),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cancel {
    pub reason: String,
    pub amount: Option<Money>,
    pub vat: Option<Money>,
}

/// What a command came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Woken,
    /// ProcessPayment on a payment with an outcome.
    Decided,
    /// ProcessPayment on a `timeout` payment that has not settled: it is not answered.
    Held,
    Cancelled {
        at: Timestamp,
    },
    /// The number of the refund, from 1.
    Refunded {
        n: usize,
        at: Timestamp,
    },
    /// The number of the notification.
    Simulated {
        n: u32,
        at: Timestamp,
    },
    /// How many deliveries are owed again.
    Redelivered {
        ordered: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the payment is {}: {why}", status.short())]
    InvalidState { status: Status, why: &'static str },
    #[error("the payment has no webhook_url")]
    NoWebhookUrl,
    #[error("the refund exceeds what is left: {left} of amount, {} of VAT", vat_left.unwrap_or(0))]
    RefundExceedsRemaining { left: u64, vat_left: Option<u64> },
    #[error("the payment does not allow it")]
    Invalid(Vec<Violation>),
}

/// What a command does: the payment to save, where anything changed, and the answer. What was due at
/// its own time is applied also where the command itself is refused.
#[derive(Debug)]
pub struct Transition {
    pub changed: Option<Payment>,
    pub answer: Result<Answer, Refusal>,
}

impl Payment {
    /// A new payment: what its terms say, and nothing else. A stored payment that nothing happened to
    /// is rebuilt by this same function.
    pub fn create(terms: Arc<Terms>) -> Self {
        let at = terms.created_at;
        let next = match terms.plan.course {
            Course::DecidedAtOnce { outcome, .. } => Next::Decide { at, outcome },
            Course::DecidedAt { outcome, at } => Next::Decide { at, outcome },
            Course::Settles { at } => Next::Settle { at },
            Course::Waits { until } => Next::Expire { at: until },
        };
        let timeline = Timeline::beginning(Entry {
            at,
            kind: Kind::Created,
            status: Status::Pending,
            cause: Cause::CreatePaymentIntent,
            detail: detail("scenario", terms.plan.scenario.as_str()),
        });
        let progress = Progress {
            state: PaymentState::Pending { next },
            version: 1,
            updated_at: at,
            card: None,
            vat: None,
            refunds: Vec::new(),
            timeline,
            notifications: Vec::new(),
            notified: 0,
        };
        let plan = terms.plan;
        let mut payment = Self { terms, progress };
        if let Course::DecidedAtOnce { outcome, notify_at } = plan.course {
            payment.decide(outcome, at, notify_at, Cause::Scenario);
        }
        payment
    }

    pub fn status(&self) -> Status {
        self.progress.state.status()
    }

    pub fn card(&self) -> Option<&Card> {
        self.progress.card.as_ref().or(self.terms.card.as_ref())
    }

    pub fn vat(&self) -> Option<u64> {
        self.progress.vat.or(self.terms.vat)
    }

    pub fn refunded_amount(&self) -> u64 {
        self.progress.refunds.iter().map(|r| r.amount).sum()
    }

    pub fn refunded_vat(&self) -> Option<u64> {
        self.vat().map(|_| self.progress.refunds.iter().filter_map(|r| r.vat).sum())
    }

    /// When the next delivery of a channel is due.
    pub fn delivery_due(&self, channel: Channel) -> Option<Timestamp> {
        delivery::next_owed(&self.progress.notifications, channel).map(|(_, due)| due)
    }

    /// The notification to attempt now on a channel.
    pub fn due_notification(&self, channel: Channel, now: Timestamp) -> Option<&Notification> {
        let (n, due) = delivery::next_owed(&self.progress.notifications, channel)?;
        (due <= now).then(|| self.notification(n)).flatten()
    }

    pub fn notification(&self, n: u32) -> Option<&Notification> {
        self.progress.notifications.iter().find(|notification| notification.n == n)
    }

    /// The payment after an attempt; `None` where there is no such delivery, or it is owed no more.
    pub fn after_attempt(
        &self,
        (n, channel): (u32, Channel),
        done: Attempted,
        now: Timestamp,
        policy: &RetryPolicy,
        jitter: f64,
    ) -> Option<Self> {
        let mut after = self.clone();
        let slot = after
            .progress
            .notifications
            .iter_mut()
            .find(|notification| notification.n == n)?
            .delivery_mut(channel)?;
        slot.due()?;
        *slot = slot.clone().after_attempt(done, now, policy, jitter);
        after.forget_old_simulated();
        Some(after)
    }

    /// Applies what was due at its own time, then the command.
    pub fn transition(&self, command: Command, now: Timestamp) -> Transition {
        let mut payment = self.clone();
        let woken = payment.wake(now);
        let before = woken.then(|| payment.clone());
        match payment.apply(command, now) {
            Ok((answer, changed)) => {
                Transition { changed: (woken || changed).then_some(payment), answer: Ok(answer) }
            }
            Err(refusal) => Transition { changed: before, answer: Err(refusal) },
        }
    }

    fn wake(&mut self, now: Timestamp) -> bool {
        if self.progress.state.wakes_at().is_none_or(|at| at > now) {
            return false;
        }
        match self.progress.state {
            PaymentState::Pending { next: Next::Decide { at, outcome } } => {
                self.decide(outcome, at, at, Cause::Scenario);
            }
            PaymentState::Pending { next: Next::Settle { at } }
            | PaymentState::Processing { settles_at: at } => {
                self.decide(Outcome::Completed, at, at, Cause::Scenario);
            }
            PaymentState::Pending { next: Next::Expire { at } } => {
                self.enter(PaymentState::Expired { at }, at, Cause::Scenario, Vec::new());
                self.notify(Topic::StatusUpdated, at, at, None);
            }
            PaymentState::Completed { .. }
            | PaymentState::Failed { .. }
            | PaymentState::Cancelled { .. }
            | PaymentState::Refunded { .. }
            | PaymentState::Expired { .. } => return false,
        }
        true
    }

    /// The answer, and whether anything changed.
    fn apply(&mut self, command: Command, now: Timestamp) -> Result<(Answer, bool), Refusal> {
        match command {
            Command::Wake => Ok((Answer::Woken, false)),
            Command::Process { card, vat } => self.process(card, vat, now),
            Command::Cancel(cancel) => self.cancel(cancel, now).map(|answer| (answer, true)),
            Command::SimulateWebhook { target, at } => {
                self.simulate_webhook(target, at, now).map(|answer| (answer, true))
            }
            Command::Redeliver(no) => self.redeliver(no, now).map(|answer| (answer, true)),
            Command::RedeliverDead(wanted) => {
                let ordered = self.redeliver_dead(&wanted, now);
                Ok((Answer::Redelivered { ordered }, ordered > 0))
            }
        }
    }

    fn process(
        &mut self,
        card: Option<Card>,
        vat: Option<u64>,
        now: Timestamp,
    ) -> Result<(Answer, bool), Refusal> {
        let outcome = match self.progress.state {
            PaymentState::Pending { next: Next::Settle { at } } => {
                self.progress.card = card;
                self.progress.vat = vat;
                let processing = PaymentState::Processing { settles_at: at };
                self.enter(processing, now, Cause::ProcessPayment, Vec::new());
                return Ok((Answer::Held, true));
            }
            PaymentState::Processing { .. } => return Ok((Answer::Held, false)),
            PaymentState::Pending { next: Next::Decide { outcome, .. } } => outcome,
            PaymentState::Pending { next: Next::Expire { .. } } => Outcome::Completed,
            PaymentState::Completed { .. }
            | PaymentState::Failed { .. }
            | PaymentState::Refunded { .. } => return Ok((Answer::Decided, false)),
            PaymentState::Cancelled { .. } | PaymentState::Expired { .. } => {
                return Err(self.invalid_state("it can be processed no more"));
            }
        };
        self.progress.card = card;
        self.progress.vat = vat;
        self.decide(outcome, now, now, Cause::ProcessPayment);
        Ok((Answer::Decided, true))
    }

    fn cancel(&mut self, cancel: Cancel, now: Timestamp) -> Result<Answer, Refusal> {
        match self.progress.state {
            PaymentState::Pending { .. } => {
                if cancel.amount.is_some() || cancel.vat.is_some() {
                    return Err(self.invalid_state("there is nothing to refund before the outcome"));
                }
                let detail = detail("reason", cancel.reason);
                self.enter(PaymentState::Cancelled { at: now }, now, Cause::CancelPayment, detail);
                self.notify(Topic::StatusUpdated, now, now, None);
                Ok(Answer::Cancelled { at: now })
            }
            PaymentState::Completed { at } => self.refund(cancel, at, now),
            PaymentState::Processing { .. } => {
                Err(self.invalid_state("it cannot be cancelled while in process"))
            }
            PaymentState::Failed { .. }
            | PaymentState::Cancelled { .. }
            | PaymentState::Refunded { .. }
            | PaymentState::Expired { .. } => {
                Err(self.invalid_state("it can be cancelled no more"))
            }
        }
    }

    fn refund(
        &mut self,
        cancel: Cancel,
        completed_at: Timestamp,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        if self.progress.refunds.len() >= REFUNDS_MAX {
            return Err(self.invalid_state("it has had as many refunds as a payment can have"));
        }
        let mut found = Violations::default();
        let amount = self.refund_part("refund_amount.currency", cancel.amount, &mut found);
        let vat = self.refund_part("refund_vat.currency", cancel.vat, &mut found);
        found.into_result().map_err(Refusal::Invalid)?;
        let left = Remaining::of(self.terms.amount.amount, self.vat(), &self.progress.refunds);
        let (amount, vat) = left.take(amount, vat).map_err(|error| match error {
            RefundError::Exceeds | RefundError::VatExceeds | RefundError::VatRemains => {
                Refusal::RefundExceedsRemaining { left: left.amount, vat_left: left.vat }
            }
            RefundError::NoVat => Refusal::Invalid(vec![Violation::new(
                "refund_vat",
                "must be absent: the payment carries no VAT",
            )]),
        })?;
        let takes_the_rest = amount == left.amount;
        let mut detail = detail("reason", cancel.reason.clone());
        detail.push(("amount".into(), amount.to_string().into()));
        self.progress.refunds.push(Refund { amount, vat, reason: cancel.reason, at: now });
        let n = self.progress.refunds.len();
        let notified = Some((u32::try_from(n).expect("at most 100 refunds"), amount));
        if takes_the_rest {
            let refunded = PaymentState::Refunded { at: now, completed_at };
            self.enter(refunded, now, Cause::CancelPayment, detail);
            self.notify(Topic::StatusUpdated, now, now, notified);
        } else {
            self.change(now, Kind::PartiallyRefunded, Cause::CancelPayment, detail);
            self.notify(Topic::RefundUpdated, now, now, notified);
        }
        Ok(Answer::Refunded { n, at: now })
    }

    fn refund_part(
        &self,
        field: &'static str,
        part: Option<Money>,
        found: &mut Violations,
    ) -> Option<u64> {
        let part = part?;
        let currency = self.terms.amount.currency;
        if part.currency != currency {
            let why = format!("is in {:?}; the payment is in {currency:?}", part.currency);
            found.add(field, why);
        }
        Some(part.amount)
    }

    fn simulate_webhook(
        &mut self,
        target: Option<Status>,
        at: Timestamp,
        now: Timestamp,
    ) -> Result<Answer, Refusal> {
        if self.terms.webhook_url.is_none() {
            return Err(Refusal::NoWebhookUrl);
        }
        let owed = self.progress.notifications.iter();
        if owed.filter(|n| n.topic == Topic::Simulated && n.is_owed()).count() >= SIMULATED_OWED_MAX
        {
            return Err(
                self.invalid_state("it owes as many simulated webhooks as a payment can owe")
            );
        }
        let status = target.unwrap_or_else(|| self.status());
        let mut snapshot = self.snapshot(at, None);
        snapshot.status = status;
        self.progress.notified += 1;
        let n = self.progress.notified;
        self.progress.notifications.push(Notification {
            n,
            topic: Topic::Simulated,
            snapshot,
            event: None,
            webhook: Some(Delivery::owed(at)),
        });
        self.forget_old_simulated();
        let mut detail = detail("target_status", status.as_str());
        detail.push(("event_id".into(), self.terms.id.event(n).into()));
        self.progress.timeline.push(Entry {
            at: now,
            kind: Kind::WebhookSimulated,
            status: self.status(),
            cause: Cause::SimulateWebhook,
            detail,
        });
        Ok(Answer::Simulated { n, at })
    }

    fn redeliver(&mut self, no: DeliveryNo, now: Timestamp) -> Result<Answer, Refusal> {
        if self.delivery(no).is_none() {
            let why = "names no delivery of its payment, or one that is no longer kept";
            return Err(Refusal::Invalid(vec![Violation::new("delivery_id", why)]));
        }
        if !self.owe_again(no, now) {
            return Err(self.invalid_state("the delivery is owed already"));
        }
        Ok(Answer::Redelivered { ordered: 1 })
    }

    fn redeliver_dead(&mut self, wanted: &[DeliveryNo], now: Timestamp) -> u32 {
        let mut ordered = 0;
        for no in wanted {
            // Looked at one by one: what is ordered before takes its own dead letter back.
            if self.delivery(*no).is_some_and(Delivery::is_dead) && self.owe_again(*no, now) {
                ordered += 1;
            }
        }
        ordered
    }

    fn delivery(&self, (n, channel): DeliveryNo) -> Option<&Delivery> {
        self.notification(n)?.delivery(channel)
    }

    /// False: there is no such delivery, or it is owed already.
    fn owe_again(&mut self, no: DeliveryNo, now: Timestamp) -> bool {
        let (n, channel) = no;
        let mut notifications = self.progress.notifications.iter_mut();
        let slot =
            notifications.find(|other| other.n == n).and_then(|found| found.delivery_mut(channel));
        let Some(slot) = slot else { return false };
        let Some(owed) = slot.clone().redelivery(now) else { return false };
        *slot = owed;
        let id = DeliveryId { payment: self.terms.id, no };
        self.progress.timeline.push(Entry {
            at: now,
            kind: Kind::RedeliveryOrdered,
            status: self.status(),
            cause: Cause::Redeliver,
            detail: detail("delivery_id", id.to_string()),
        });
        true
    }

    fn decide(&mut self, outcome: Outcome, at: Timestamp, notify_at: Timestamp, cause: Cause) {
        let (state, detail) = match outcome {
            Outcome::Completed => (PaymentState::Completed { at }, Vec::new()),
            Outcome::Failed(reason) => {
                (PaymentState::Failed { at, reason }, detail("failure_reason", reason.as_str()))
            }
        };
        self.enter(state, at, cause, detail);
        self.notify(Topic::StatusUpdated, at, notify_at, None);
    }

    fn enter(&mut self, state: PaymentState, at: Timestamp, cause: Cause, detail: Detail) {
        self.progress.state = state;
        self.change(at, Kind::StatusChanged, cause, detail);
    }

    fn change(&mut self, at: Timestamp, kind: Kind, cause: Cause, detail: Detail) {
        self.progress.version += 1;
        self.progress.updated_at = at;
        let status = self.status();
        self.progress.timeline.push(Entry { at, kind, status, cause, detail });
    }

    /// Owes what just changed to every channel that the payment has.
    fn notify(&mut self, topic: Topic, at: Timestamp, due: Timestamp, refund: Option<(u32, u64)>) {
        let owed = |wanted: bool| wanted.then(|| Delivery::owed(due));
        let (event, webhook) = (owed(self.terms.events), owed(self.terms.webhook_url.is_some()));
        if event.is_none() && webhook.is_none() {
            return;
        }
        self.progress.notified += 1;
        let snapshot = self.snapshot(at, refund);
        let n = self.progress.notified;
        if self.progress.notifications.is_empty() {
            // Most payments tell one thing, and tens of thousands are open at a time: no room for three more.
            self.progress.notifications.reserve_exact(1);
        }
        self.progress.notifications.push(Notification { n, topic, snapshot, event, webhook });
    }

    fn snapshot(&self, at: Timestamp, refund: Option<(u32, u64)>) -> Snapshot {
        let decision = self.progress.state.decision();
        let refunded = self.refunded_amount();
        Snapshot {
            version: self.progress.version,
            status: self.status(),
            at,
            decided: decision.is_some(),
            approved: matches!(decision, Some((Outcome::Completed, _))),
            failure_reason: match decision {
                Some((Outcome::Failed(reason), _)) => Some(reason),
                Some((Outcome::Completed, _)) | None => None,
            },
            refund,
            refunded_amount: (refunded > 0).then_some(refunded),
        }
    }

    fn forget_old_simulated(&mut self) {
        let over = |n: &Notification| n.topic == Topic::Simulated && !n.is_owed();
        let mut surplus = self
            .progress
            .notifications
            .iter()
            .filter(|n| over(n))
            .count()
            .saturating_sub(SIMULATED_KEPT);
        self.progress.notifications.retain(|n| {
            let goes = surplus > 0 && over(n);
            surplus -= usize::from(goes);
            !goes
        });
    }

    fn invalid_state(&self, why: &'static str) -> Refusal {
        Refusal::InvalidState { status: self.status(), why }
    }
}

/// One pair for the timeline, none where there is nothing to say.
fn detail(name: &'static str, value: impl Into<Text>) -> Detail {
    let value = value.into();
    if value.is_empty() { Detail::new() } else { vec![(name.into(), value)] }
}

#[cfg(test)]
#[path = "payment_tests.rs"]
pub(crate) mod tests;
