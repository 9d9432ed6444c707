//! payment-sim: the payment gateway that teams can load-test, break and replay.

pub mod api;
pub mod app;
pub mod clock;
pub mod domain;
pub mod driver;
pub mod metrics;
pub mod scheduler;
pub mod store;
