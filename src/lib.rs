//! payment-sim: the payment gateway that teams can load-test, break and replay.

pub mod api;
