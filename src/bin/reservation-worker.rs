//! reservation-worker: configuration → socket → worker → drain.

use std::process::ExitCode;

use payment_sim::{config::WorkerConfig, reservation::run, start::start};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    start(|config: &WorkerConfig| Ok(run::run(config, run::bind(config)?)))
}
