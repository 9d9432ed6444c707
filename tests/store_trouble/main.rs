//! The store in trouble: a disk that fails, one that is full, and files that have changed on it. Nothing
//! acknowledged may be lost unseen, and nothing may be acknowledged that is not on the disk.

mod damage;
mod derived;
mod failing_disk;
mod full_disk;
#[path = "../support/mod.rs"]
mod support;

use std::{io::Write, time::Duration};

use payment_sim::api::pb::{
    common::v1::Money,
    payment::v1::{CreatePaymentIntentRequest, GetPaymentIntentRequest},
};
use support::{Client, setting};
use tonic::Status;

/// Longest wait for what must happen; it is slower under strace.
const SOON: Duration = Duration::from_secs(60);

/// A line that is seen also when a test's output is captured.
fn skip(why: &str, must_be_possible: bool) {
    assert!(setting("CI").is_none() || !must_be_possible, "CI skips nothing: {why}");
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
}

fn request(key: &str) -> CreatePaymentIntentRequest {
    CreatePaymentIntentRequest {
        reservation_id: key.to_owned(),
        user_id: "trouble".to_owned(),
        amount: Some(Money { amount: 1_000, currency: "KRW".to_owned() }),
        idempotency_key: key.to_owned(),
        ..Default::default()
    }
}

async fn create(client: &mut Client, key: &str) -> Result<String, Status> {
    Ok(client.create_payment_intent(request(key)).await?.into_inner().payment_intent_id)
}

/// The reservation of a payment.
async fn reservation(client: &mut Client, id: &str) -> Result<String, Status> {
    let request =
        GetPaymentIntentRequest { payment_intent_id: id.to_owned(), ..Default::default() };
    let reply = client.get_payment_intent(request).await?.into_inner();
    Ok(reply.payment.expect("a payment").reservation_id)
}
