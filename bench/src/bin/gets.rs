//! Reads of random stored payments a second ÷ those of a bare echo that answers one of them.
//!
//! `payments=5000000 settled=told pairs=5 seconds=10 connections=50 streams=10 threads=CORES dir=PATH binary=PATH`;
//! exit code 1 when the ratio is less than what is asked. Of each payment the webhook has been delivered, or with
//! `settled=bare` they are as `creates` makes them, and have not changed since. What was stored in `dir` stays
//! there for the next run.

use std::{path::PathBuf, process::ExitCode};

use bench::{
    argument, benchmark, check_arguments, echo,
    filling::{Filling, Settled},
    load::{Kind, Load},
    on_a_runtime,
    pairs::Pairs,
    subject::Subject,
};

fn main() -> ExitCode {
    benchmark(run)
}

fn run() -> Result<bool, String> {
    check_arguments(&[
        "payments",
        "settled",
        "pairs",
        "seconds",
        "connections",
        "streams",
        "threads",
        "dir",
        "binary",
    ])?;
    let subject = Subject::from_arguments(&[])?;
    let given: String = argument("dir", String::new())?;
    let folder = match given.as_str() {
        "" => subject.scratch().join("stored"),
        given => PathBuf::from(given).join("stored"),
    };
    let (payments, how) = (argument("payments", 5_000_000)?, argument("settled", Settled::Told)?);
    let filling = on_a_runtime(Filling::fill(&folder, payments, 0, how))?;
    let subject = subject.serving(folder);
    let load = Load::from_arguments(Kind::Get(filling), 10, 10)?;
    let reply = subject.reply(&load.calls)?;
    let calls = load.calls;
    let pairs = Pairs { name: "gets", least: 0.70, pairs: argument("pairs", 5)?, load };
    pairs.measure(|| echo::start(&calls, &reply), || subject.service())
}
