//! payment-sim: the payment gateway that teams can load-test, break and replay.
//!
//! The data's way, in the order of the modules below:
//!
//! ```text
//! edge ─► api ─► app ─► domain::transition ─► store.commit ─► (reply: durable)
//!                                                ├─► scheduler: due payments  ─► commit
//!                                                └─► outbox: owed deliveries ─► courier ─► commit
//! ```
//!
//! What always holds: a status is stored with the notifications that it owes, or not at all; an
//! acknowledged payment is on the disk; a payment is decided once; a delivery is owed until it is
//! accepted or dead; a repeat carries the same id and the same bytes.

pub mod edge;

pub mod api;
pub mod app;
pub mod domain;
pub mod store;

pub mod driver;
pub mod outbox;
pub mod scheduler;

pub mod courier;

pub mod reservation;

pub mod chance;
pub mod clock;
pub mod config;
pub mod egress;
#[cfg(feature = "faults")]
pub mod faults;
pub mod healthcheck;
pub mod log_budget;
pub mod metrics;
pub mod ops;
pub mod pace;
pub mod process;
pub mod recent;
pub mod runtime;
pub mod server;
pub mod service;
pub mod slot;
pub mod start;
pub mod telemetry;
