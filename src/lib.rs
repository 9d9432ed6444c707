//! payment-sim: the payment gateway that teams can load-test, break and replay.

pub mod clock;
pub mod config;
pub mod healthcheck;
pub mod metrics;
pub mod telemetry;
