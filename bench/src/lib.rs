//! What the benchmarks share: payments that are a pure function of their number, the service as a
//! process of its own, the yardstick beside it, load, pairs of the two, receivers of webhooks, and what
//! the kernel says of a process.

pub mod client;
pub mod companion;
pub mod echo;
pub mod figure;
pub mod filling;
pub mod gauge;
pub mod load;
pub mod pairs;
pub mod payments;
pub mod receiver;
pub mod service;
pub mod sink;
pub mod subject;

use std::process::ExitCode;

/// As the product: the allocator is part of what is measured.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `name=value` arguments over their defaults.
///
/// # Errors
/// The value is not what is allowed there.
pub fn argument<T>(name: &str, default: T) -> Result<T, String>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    let given = std::env::args().skip(1).find_map(|argument| {
        let (n, value) = argument.split_once('=')?;
        (n == name).then(|| value.to_owned())
    });
    given.map_or(Ok(default), |value| value.parse().map_err(|why| format!("{name}={value}: {why}")))
}

/// # Errors
/// Names the first argument that nothing reads.
pub fn check_arguments(known: &[&str]) -> Result<(), String> {
    for argument in std::env::args().skip(1) {
        let name = argument.split_once('=').map_or(argument.as_str(), |(name, _)| name);
        if !known.contains(&name) || !argument.contains('=') {
            return Err(format!("{argument}: unknown; known are {}", known.join("=, ") + "="));
        }
    }
    Ok(())
}

/// Runs a benchmark and says how it went: 0 when what is asked was reached, 1 when not, 2 when it could not be measured.
pub fn benchmark(run: impl FnOnce() -> Result<bool, String>) -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::from(2)
        }
    }
}

/// # Panics
/// Where the system has no room for a runtime.
pub fn on_a_runtime<T>(task: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the machine has room for a runtime")
        .block_on(task)
}
