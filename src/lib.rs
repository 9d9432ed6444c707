//! payment-sim: the payment gateway that teams can load-test, break and replay.

pub mod api;
pub mod app;
pub mod clock;
pub mod config;
pub mod courier;
pub mod domain;
pub mod driver;
pub mod edge;
pub mod healthcheck;
pub mod log_budget;
pub mod metrics;
pub mod ops;
pub mod outbox;
pub mod runtime;
pub mod scheduler;
pub mod server;
pub mod store;
pub mod telemetry;
