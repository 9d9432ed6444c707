//! payment-sim: the payment gateway that teams can load-test, break and replay.

pub mod api;
pub mod clock;
pub mod domain;
pub mod edge;
pub mod log_budget;
pub mod metrics;
pub mod ops;
pub mod server;
pub mod store;
