//! Who goes first where there is more to do than time: requests, and the commits that they wait for.

/// What can wait, how far behind: in Linux's steps of niceness, with each of which a thread gets a fifth less time
/// beside others.
#[derive(Clone, Copy)]
pub enum Background {
    /// Merging files takes a tenth of a core under full load. A sixth of what others get is enough for it.
    Merging = 8,
    /// Where upkeep falls far behind, creates are refused: it gets two fifths.
    Upkeep = 4,
}

/// For a thread whose work can wait: a busy machine gives its time to others first. What the thread starts
/// inherits it. Elsewhere than on Linux a process has one priority, which stays.
pub fn step_back(work: Background) {
    #[cfg(not(target_os = "linux"))]
    let _ = work;
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::nice(work as i32) {
        tracing::debug!(%error, "a thread in the background keeps its priority");
    }
}
