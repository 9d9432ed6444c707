//! At most so many log lines a second; the rest is counted and told by the next line.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Stopwatch;

/// The window that a budget is for.
const WINDOW: Duration = Duration::from_secs(1);

/// Shared by all threads that write lines of one kind.
#[derive(Debug)]
pub struct LogBudget {
    per_second: u32,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    began: Stopwatch,
    written: u32,
    withheld: u64,
}

impl LogBudget {
    pub fn new(per_second: u32) -> Self {
        let window = Window { began: Stopwatch::start(), written: 0, withheld: 0 };
        Self { per_second, window: Mutex::new(window) }
    }

    /// `Some` when a line may be written: how many were withheld since the last report, zero mostly.
    pub fn spend(&self) -> Option<u64> {
        // The numbers are right whatever a panicking holder did: each is written in one step.
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.began.elapsed() >= WINDOW {
            window.began = Stopwatch::start();
            window.written = 0;
        }
        if window.written >= self.per_second {
            window.withheld += 1;
            return None;
        }
        window.written += 1;
        Some(std::mem::take(&mut window.withheld))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_the_budget_is_counted_and_told_once() {
        let budget = LogBudget::new(2);
        assert_eq!(budget.spend(), Some(0));
        assert_eq!(budget.spend(), Some(0));
        assert_eq!(budget.spend(), None);
        assert_eq!(budget.spend(), None);
        std::thread::sleep(WINDOW);
        assert_eq!(budget.spend(), Some(2));
        assert_eq!(budget.spend(), Some(0));
    }
}
