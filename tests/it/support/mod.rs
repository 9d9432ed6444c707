//! The service in this process, and what a test does to it.

mod app;
pub mod bare;
mod client;
mod event_log;
mod sink;

pub use app::{TestApp, with_header};
pub use client::{Refused, create, http_get, krw, refused};
pub use sink::{Answer, Received, WebhookSink};

pub use payment_sim::api::pb::{
    common::v1::{Money, Pagination},
    payment::v1::*,
    simulation::v1::*,
};

use std::{future::Future, time::Duration};

/// When to give up. Nothing depends on how long anything really takes.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until `look` finds what it looks for.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, look: impl Fn() -> F) -> T {
    let found = async {
        loop {
            match look().await {
                Some(found) => return found,
                None => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    };
    tokio::time::timeout(DEADLINE, found).await.unwrap_or_else(|_| panic!("never: {what}"))
}
