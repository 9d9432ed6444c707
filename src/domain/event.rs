//! The body that a notification carries: the same bytes as webhook and as EventBridge `Detail`, on
//! every attempt, made from nothing but what is stored.

use serde::Serialize;
use serde_json::value::RawValue;

use super::{
    delivery::Notification,
    payment::{Metadata, Terms},
};

/// The renderer that new payments get. A change of the body's shape takes a new number, and keeps
/// the old one for the payments that were born with it.
pub const RENDERER: u8 = 1;

/// Room for nearly every body, so that none grows step by step.
const USUAL_BYTES: usize = 1_024;

/// What receivers read. Every key is always there, null where it has no value; the order is the
/// contract's.
#[derive(Serialize)]
struct Body<'a> {
    event_id: String,
    event_type: &'a str,
    version: u32,
    payment_id: String,
    payment_intent_id: String,
    reservation_id: &'a str,
    user_id: &'a str,
    status: &'a str,
    amount: u64,
    currency: &'a str,
    /// Unix seconds: when the status changed.
    timestamp: i64,
    transaction_id: Option<String>,
    approval_no: Option<String>,
    failure_reason: Option<&'a str>,
    provider: &'a str,
    refund_id: Option<String>,
    refund_amount: Option<u64>,
    refunded_amount: Option<u64>,
    echo: Option<&'a RawValue>,
    metadata: Option<&'a Metadata>,
}

/// Renders a notification of a payment.
pub fn body(terms: &Terms, notification: &Notification) -> Vec<u8> {
    let snapshot = &notification.snapshot;
    let id = terms.id;
    let body = Body {
        event_id: id.event(notification.n),
        event_type: notification.topic.event_type(),
        version: snapshot.version,
        payment_id: id.payment(),
        payment_intent_id: id.intent(),
        reservation_id: &terms.reservation_id,
        user_id: &terms.user_id,
        status: snapshot.status.as_str(),
        amount: terms.amount.amount,
        currency: terms.amount.currency.code(),
        timestamp: snapshot.at.seconds(),
        transaction_id: snapshot.decided.then(|| id.transaction()),
        approval_no: snapshot.approved.then(|| id.approval_no()),
        failure_reason: snapshot.failure_reason.map(|reason| reason.as_str()),
        provider: &terms.provider,
        refund_id: snapshot.refund.map(|(n, _)| id.refund(n as usize)),
        refund_amount: snapshot.refund.map(|(_, amount)| amount),
        refunded_amount: snapshot.refunded_amount,
        echo: terms.echo.as_deref().map(|json| {
            serde_json::from_str(json).expect("echo is stored as JSON that we wrote ourselves")
        }),
        metadata: terms.metadata.as_ref(),
    };
    let mut bytes = Vec::with_capacity(USUAL_BYTES);
    serde_json::to_writer(&mut bytes, &body)
        .expect("a body has string keys and finite numbers only");
    bytes
}
