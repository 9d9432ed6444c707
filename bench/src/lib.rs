//! What the benchmarks share: payments that are a pure function of their number, the service as a
//! process of its own, receivers of webhooks, and what the kernel says of a process.

pub mod client;
pub mod gauge;
pub mod payments;
pub mod receiver;
pub mod service;

/// As the product: the allocator is part of what is measured.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `name=value` arguments over their defaults.
///
/// # Errors
/// An argument that is none of `known`, or no number where one is needed.
pub fn argument<T: std::str::FromStr>(name: &str, default: T) -> Result<T, String> {
    let given = std::env::args().skip(1).find_map(|argument| {
        let (n, value) = argument.split_once('=')?;
        (n == name).then(|| value.to_owned())
    });
    given.map_or(Ok(default), |value| {
        value.parse().map_err(|_| format!("{name}={value}: not what is allowed there"))
    })
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
