//! Who goes first where there is more to do than time: requests, and the commits that they wait for.

/// Of Linux's steps of niceness, each a quarter less time than the one before gets: eight steps back a thread
/// gets a sixth of what others get beside it. Merging files needs a tenth of a core under full load, and must not
/// fall behind for good.
#[cfg(target_os = "linux")]
const STEPS_BACK: i32 = 8;

/// For a thread whose work can wait, such as merging files: a busy machine gives its time to others first. What
/// the thread starts inherits it. Elsewhere than on Linux a process has one priority, which stays.
pub fn step_back() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::nice(STEPS_BACK) {
        tracing::debug!(%error, "a thread in the background keeps its priority");
    }
}
