//! The whole service over its real sockets, on a clock that stands still until a test moves it.
//!
//! No test sleeps for a time or asserts one: it waits for a condition, with a deadline that only says
//! when to give up. Every test ends with a drain, and fails when anything is left undelivered.

mod support;

mod cards;
mod commands;
mod driver;
mod events;
mod first_implementation;
mod idempotency;
mod lists;
mod ops;
mod outbox;
mod restart;
mod scenarios;
mod simulate;
mod simulation;
mod webhooks;
