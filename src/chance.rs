//! The one source of chance that is not drawn from a seed: what must merely be spread out.

/// Uniform in 0 … 1.
///
/// # Panics
/// When the system gives no randomness.
pub fn chance() -> f64 {
    let random = getrandom::u64().expect("the system gives randomness, or nothing here is safe");
    random as f64 / 2_f64.powi(64)
}
