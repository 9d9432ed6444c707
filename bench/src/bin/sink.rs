//! The sink as a process of its own; see `bench::sink`.

use std::process::ExitCode;

use bench::{on_a_runtime, sink};

fn main() -> ExitCode {
    let Err(problem) = on_a_runtime(sink::serve());
    eprintln!("{problem}");
    ExitCode::from(2)
}
