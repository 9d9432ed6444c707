//! The one place that reads the machine's clocks.
//!
//! Everything else takes a [`Clock`] (the time of day, for what is due when) or a [`Stopwatch`]
//! (monotonic, for how long something took). clippy bans the rest.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

/// The longest that [`SystemClock`] sleeps without reading the wall clock again: a clock that is
/// set forward (or a machine that was suspended) makes what is due at most this late.
const LONGEST_SLICE: Duration = Duration::from_secs(1);

/// The time of day in milliseconds since 1970 (UTC). It may jump, either way.
pub trait Clock: Send + Sync + 'static {
    fn now_ms(&self) -> i64;

    /// Ends when [`Clock::now_ms`] has reached `at_ms`; at once when it already has. Dropping the
    /// future costs nothing.
    fn sleep_until_ms(&self, at_ms: i64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// The machine's wall clock. Sleeping needs a tokio runtime with its timer on.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the file that the ban points to")]
    fn now_ms(&self) -> i64 {
        // A machine set to before 1970 counts as standing at its start: nothing is due, nothing breaks.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    }

    fn sleep_until_ms(&self, at_ms: i64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(sleep_in_slices(|| self.now_ms(), at_ms, LONGEST_SLICE))
    }
}

async fn sleep_in_slices(now_ms: impl Fn() -> i64, at_ms: i64, longest: Duration) {
    while let Some(left) = time_left(now_ms(), at_ms) {
        tokio::time::sleep(left.min(longest)).await;
    }
}

/// `None` when `at_ms` is reached.
fn time_left(now_ms: i64, at_ms: i64) -> Option<Duration> {
    let left_ms = u64::try_from(at_ms.saturating_sub(now_ms)).ok()?;
    (left_ms > 0).then(|| Duration::from_millis(left_ms))
}

/// A clock that stands still until a test moves it. Clones show the same time.
#[derive(Debug, Clone)]
pub struct ManualClock {
    now_ms: watch::Sender<i64>,
}

impl ManualClock {
    pub fn at_ms(now_ms: i64) -> Self {
        Self { now_ms: watch::Sender::new(now_ms) }
    }

    /// Moves the clock forward and wakes whoever's time has come.
    ///
    /// # Panics
    /// When `by` is not a whole number of milliseconds: a test would lose the rest unnoticed.
    pub fn advance(&self, by: Duration) {
        assert_eq!(
            by.subsec_nanos() % 1_000_000,
            0,
            "this clock counts whole milliseconds, not {by:?}"
        );
        let by_ms = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.now_ms.send_modify(|now_ms| *now_ms = now_ms.saturating_add(by_ms));
    }

    /// Sets the clock, also back, as a machine's clock may be.
    pub fn set_ms(&self, now_ms: i64) {
        self.now_ms.send_replace(now_ms);
    }

    /// How many sleeps are under way: a test waits for the loop it drives to be asleep, then moves
    /// the clock.
    pub fn sleepers(&self) -> usize {
        self.now_ms.receiver_count()
    }
}

impl Clock for ManualClock {
    fn now_ms(&self) -> i64 {
        *self.now_ms.borrow()
    }

    fn sleep_until_ms(&self, at_ms: i64) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let mut now_ms = self.now_ms.subscribe();
        Box::pin(async move {
            // `wait_for` looks before it waits, so a move between the call and the first poll is
            // not lost. It fails only without a sender, and `self` is one.
            let _reached = now_ms.wait_for(|now_ms| *now_ms >= at_ms).await;
        })
    }
}

/// How long something took, by the monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    #[expect(clippy::disallowed_methods, reason = "the file that the ban points to")]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    pub fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::task::JoinSet;

    #[test]
    fn the_wall_clock_is_after_this_was_written_and_counts_milliseconds() {
        let now_ms = SystemClock.now_ms();
        assert!(now_ms > 1_750_000_000_000, "{now_ms}");
        assert!(now_ms < 32_503_680_000_000, "{now_ms} is after the year 3000");
    }

    #[tokio::test]
    async fn the_wall_clock_sleeps_until_its_time_and_not_before() {
        let at_ms = SystemClock.now_ms() + 30;
        let watch = Stopwatch::start();
        SystemClock.sleep_until_ms(at_ms).await;
        assert!(SystemClock.now_ms() >= at_ms);
        assert!(watch.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test]
    async fn the_past_is_slept_until_at_once() {
        SystemClock.sleep_until_ms(0).await;
        SystemClock.sleep_until_ms(i64::MIN).await;
        ManualClock::at_ms(5).sleep_until_ms(5).await;
    }

    #[test]
    fn time_left_is_exact_and_never_overflows() {
        assert_eq!(time_left(1_000, 1_250), Some(Duration::from_millis(250)));
        assert_eq!(time_left(1_250, 1_250), None);
        assert_eq!(time_left(i64::MAX, i64::MIN), None);
        let longest = Duration::from_millis(i64::MAX as u64);
        assert_eq!(time_left(i64::MIN, i64::MAX), Some(longest));
    }

    #[tokio::test]
    async fn a_jump_of_the_wall_clock_is_noticed_at_the_next_slice() {
        const DAY_MS: i64 = 86_400_000;
        let wall = ManualClock::at_ms(0);
        let read = || {
            let now_ms = wall.now_ms();
            wall.set_ms(DAY_MS);
            now_ms
        };
        let watch = Stopwatch::start();
        sleep_in_slices(read, DAY_MS, Duration::from_millis(5)).await;
        assert!(watch.elapsed() >= Duration::from_millis(5));
        assert!(watch.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test]
    async fn a_manual_clock_wakes_to_the_millisecond() {
        let clock = ManualClock::at_ms(1_000);
        let mut sleep = clock.sleep_until_ms(1_500);
        clock.advance(Duration::from_millis(499));
        assert!(futures_pending(&mut sleep).await);
        assert_eq!(clock.now_ms(), 1_499);
        clock.advance(Duration::from_millis(1));
        sleep.await;
        assert_eq!(clock.now_ms(), 1_500);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_manual_clock_wakes_many_tasks_each_at_its_time() {
        const TASKS: i64 = 100;
        let clock = Arc::new(ManualClock::at_ms(0));
        let mut tasks = JoinSet::new();
        for at_ms in 1..=TASKS {
            let clock = Arc::clone(&clock);
            tasks.spawn(async move {
                clock.sleep_until_ms(at_ms).await;
                assert!(clock.now_ms() >= at_ms);
                at_ms
            });
        }
        while clock.sleepers() < TASKS as usize {
            tokio::task::yield_now().await;
        }
        clock.advance(Duration::from_millis(50));
        for _ in 0..50 {
            assert!(tasks.join_next().await.unwrap().unwrap() <= 50);
        }
        assert_eq!(clock.sleepers(), 50);
        clock.set_ms(TASKS);
        assert_eq!(tasks.join_all().await.len(), 50);
    }

    #[test]
    fn a_manual_clock_can_go_back() {
        let clock = ManualClock::at_ms(10);
        clock.clone().set_ms(3);
        assert_eq!(clock.now_ms(), 3);
    }

    #[test]
    #[should_panic(expected = "whole milliseconds")]
    fn a_manual_clock_drops_no_microseconds() {
        ManualClock::at_ms(0).advance(Duration::from_micros(1_500));
    }

    #[test]
    fn a_stopwatch_runs() {
        let watch = Stopwatch::start();
        std::thread::sleep(Duration::from_millis(5));
        assert!(watch.elapsed() >= Duration::from_millis(5));
    }

    async fn futures_pending(sleep: &mut (impl Future<Output = ()> + Unpin)) -> bool {
        std::future::poll_fn(|cx| {
            std::task::Poll::Ready(Pin::new(&mut *sleep).poll(cx).is_pending())
        })
        .await
    }
}
