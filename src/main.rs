//! payment-sim: configuration → sockets → service → drain.

use std::process::ExitCode;

use payment_sim::{
    config::Config,
    runtime::{self, Listeners},
    start::start,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    start(|config: &Config| Ok(runtime::run(config, Listeners::bind(config)?)))
}
