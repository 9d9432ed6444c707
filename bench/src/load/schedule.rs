//! Which call comes next, and when it should begin.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// One thread's share of the calls: every `threads`-th, so that the threads take turns all along.
pub struct Schedule {
    next: AtomicU64,
    step: u64,
    rate: Option<u64>,
    duration: Duration,
}

/// One call to make.
#[derive(Debug, PartialEq)]
pub struct Turn {
    /// Which one of all.
    pub n: u64,
    /// When it should begin, since the start of the run: latency counts from here.
    pub due: Duration,
    /// How long that is from now; `None`: it is due already, or has no time of its own.
    pub wait: Option<Duration>,
}

impl Schedule {
    pub fn new(thread: usize, threads: usize, rate: Option<u64>, duration: Duration) -> Self {
        Self { next: AtomicU64::new(thread as u64), step: threads as u64, rate, duration }
    }

    /// The next call for whoever asks; `None` when the run is over. What an open loop owes is called in
    /// full, however late.
    pub fn next(&self, now: Duration) -> Option<Turn> {
        let n = self.next.fetch_add(self.step, Ordering::Relaxed);
        let due = self.rate.map_or(now, |rate| intended(n, rate));
        if due >= self.duration {
            return None;
        }
        let wait = due.checked_sub(now).filter(|wait| !wait.is_zero());
        Some(Turn { n, due, wait })
    }
}

/// The start of the `n`-th of calls that are evenly spaced.
fn intended(n: u64, rate: u64) -> Duration {
    Duration::from_secs(n / rate) + Duration::from_nanos(n % rate * 1_000_000_000 / rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_open_loop_spaces_its_calls_evenly_over_all_threads() {
        let threads = [0, 1, 2].map(|thread| Schedule::new(thread, 3, Some(30_000), SECOND));
        let mut turns: Vec<Turn> = threads
            .iter()
            .flat_map(|schedule| std::iter::from_fn(|| schedule.next(Duration::ZERO)))
            .collect();
        turns.sort_by_key(|turn| turn.n);
        assert_eq!(turns.len(), 30_000);
        for (n, turn) in turns.iter().enumerate() {
            assert_eq!(turn.n, n as u64);
            assert_eq!(turn.due, Duration::from_nanos(n as u64 * 100_000 / 3));
        }
    }

    #[test]
    fn the_intended_start_does_not_drift() {
        assert_eq!(intended(7 * 86_400 * 29_999, 29_999), 7 * 86_400 * SECOND);
    }

    #[test]
    fn a_call_that_is_late_keeps_its_intended_start() {
        let schedule = Schedule::new(0, 1, Some(10), SECOND);
        schedule.next(Duration::ZERO);
        let tenth = SECOND / 10;
        assert_eq!(
            schedule.next(tenth / 4),
            Some(Turn { n: 1, due: tenth, wait: Some(tenth * 3 / 4) })
        );
        assert_eq!(schedule.next(5 * SECOND), Some(Turn { n: 2, due: 2 * tenth, wait: None }));
    }

    #[test]
    fn what_an_open_loop_owes_is_called_after_its_end_too() {
        let schedule = Schedule::new(0, 1, Some(10), SECOND);
        assert_eq!(std::iter::from_fn(|| schedule.next(9 * SECOND)).count(), 10);
    }

    #[test]
    fn a_closed_loop_calls_at_once_until_its_end() {
        let schedule = Schedule::new(1, 2, None, SECOND);
        assert_eq!(schedule.next(SECOND / 2), Some(Turn { n: 1, due: SECOND / 2, wait: None }));
        assert_eq!(schedule.next(SECOND), None);
    }
}
