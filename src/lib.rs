//! payment-sim: the payment gateway that teams can load-test, break and replay.

pub mod api;
pub mod app;
pub mod clock;
pub mod config;
pub mod domain;
pub mod driver;
#[cfg(feature = "faults")]
pub mod faults;
pub mod healthcheck;
pub mod metrics;
pub mod scheduler;
pub mod store;
pub mod telemetry;
