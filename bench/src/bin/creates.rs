//! Creates a second of the service ÷ those of a bare echo.
//!
//! `store=file pairs=1 seconds=60 connections=50 streams=10 threads=CORES dir=PATH binary=PATH`, or
//! `store=memory`, in 5 pairs of 10 s; exit code 1 when the ratio is less than what is asked of that store.

use std::process::ExitCode;

use bench::{
    argument, benchmark, check_arguments, echo,
    load::{Kind, Load},
    pairs::Pairs,
    subject::Subject,
};

/// Without its cap, which is reached within a minute: dropping payments is no part of this figure.
const IN_MEMORY: [(&str, &str); 2] = [("STORE_URL", "memory:"), ("RETENTION_MAX_PAYMENTS", "0")];

fn main() -> ExitCode {
    benchmark(run)
}

fn run() -> Result<bool, String> {
    check_arguments(&[
        "store",
        "pairs",
        "seconds",
        "connections",
        "streams",
        "threads",
        "dir",
        "binary",
    ])?;
    let (name, least, settings, pairs, seconds) =
        match argument("store", "file".to_owned())?.as_str() {
            // Long enough that compaction takes its part.
            "file" => ("creates", 0.55, &[][..], 1, 60),
            "memory" => ("creates-memory", 0.80, &IN_MEMORY[..], 5, 10),
            other => return Err(format!("store={other}: file or memory")),
        };
    let load = Load::from_arguments(Kind::Create, 10, seconds)?;
    let subject = Subject::from_arguments(settings)?;
    let reply = subject.reply(&load.calls)?;
    let calls = load.calls;
    let pairs = Pairs { name, least, pairs: argument("pairs", pairs)?, load };
    pairs.measure(|| echo::start(&calls, &reply), || subject.service())
}
