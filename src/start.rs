//! What both binaries begin with: settings → logs → descriptors, pages → work.

use std::{fmt::Display, process::ExitCode};

use crate::{
    config::{self, BinaryConfig, Invocation},
    healthcheck, process, telemetry,
};

/// The process's whole life; `serve` binds, and works until it is told to stop.
pub fn start<C: BinaryConfig>(serve: impl FnOnce(&C) -> Result<ExitCode, String>) -> ExitCode {
    let config = match config::load::<C>() {
        Ok(Invocation::Serve(config)) => config,
        Ok(Invocation::Healthcheck { ops }) => {
            let healthy = healthcheck::run(ops).map(|()| ExitCode::SUCCESS);
            return healthy.unwrap_or_else(|why| give_up::<C>(&why));
        }
        Err(code) => return code,
    };
    let (stage, level) = config.logs();
    if let Err(error) = telemetry::init(stage, level) {
        return give_up::<C>(&error);
    }
    process::raise_descriptor_limit();
    process::refuse_huge_pages();
    serve(&config).unwrap_or_else(|why| give_up::<C>(&why))
}

fn give_up<C: BinaryConfig>(why: &dyn Display) -> ExitCode {
    eprintln!("{}: {why}", C::BINARY.name());
    ExitCode::FAILURE
}
