//! `reservation-worker`: takes payment events from a queue and confirms or cancels their reservations.
//!
//! ```text
//! queue ─► envelope ─► decision (what is remembered?) ─► calls ─► state (durable) ─► deleted
//! ```
//!
//! At least once, like the queue: a message is deleted only when its effect is remembered on disk. That
//! an effect happens once is the reservation API's part, by the `Idempotency-Key` of each call; the
//! worker's own memory saves calls, and keeps an older event from undoing a newer one.

pub mod calls;
pub mod decision;
pub mod envelope;
mod in_hand;
mod lanes;
pub mod metrics;
pub mod queue;
pub mod run;
mod sqs;
pub mod state;
pub mod worker;

#[cfg(test)]
mod calls_tests;
#[cfg(test)]
mod testbed;
#[cfg(test)]
mod worker_tests;
