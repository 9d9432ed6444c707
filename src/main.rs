//! payment-sim: configuration → sockets → service → drain.

use std::process::ExitCode;

use payment_sim::{
    config::{self, Config, Invocation},
    healthcheck, process,
    runtime::{self, Listeners},
    telemetry,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let config = match config::load::<Config>() {
        Ok(Invocation::Serve(config)) => config,
        Ok(Invocation::Healthcheck { ops }) => return check_health(ops),
        Err(code) => return code,
    };
    if let Err(error) = telemetry::init(config.stage, config.log_level) {
        return give_up(&error);
    }
    process::raise_descriptor_limit();
    match Listeners::bind(&config) {
        Ok(listeners) => runtime::run(&config, listeners),
        Err(error) => give_up(&error),
    }
}

fn check_health(ops: std::net::SocketAddr) -> ExitCode {
    match healthcheck::run(ops) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => give_up(&why),
    }
}

fn give_up(why: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("payment-sim: {why}");
    ExitCode::FAILURE
}
