//! The yardstick as a process of its own: `bin/echo.rs`, which stores nothing.

use std::path::Path;

use crate::{
    companion::Companion,
    load::{Calls, Kind},
};

/// Starts it with the file whose bytes it answers to such calls.
///
/// # Errors
/// Where it does not start.
pub fn start(calls: &Calls, reply: &Path) -> Result<Companion, String> {
    let method = match calls.kind {
        Kind::Create | Kind::Whole(_) => "create",
        Kind::Get(_) => "get",
    };
    Companion::start("echo", &[format!("{method}={}", reply.display())])
}
