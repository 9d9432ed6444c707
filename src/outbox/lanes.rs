//! Who goes next: one lane for each origin, with its limits and its breaker, taken in turn.
//!
//! No I/O and no clock in here; `webhooks` asks for the next one, and says how each ended.

use std::collections::{BTreeSet, HashMap, VecDeque};

use crate::{courier::Origin, domain::time::Timestamp};

/// Failed attempts in a row after which a breaker opens.
const BREAKER_FAILURES: u32 = 10;
/// Idle origins are remembered up to here, for their breakers' sake.
const ORIGINS_KEPT: usize = 10_000;
/// The longest wait for a rate, of one a second; where it seems longer, the clock was set back.
const RATE_WAIT_MAX_MS: u64 = 1_000;
/// What a rate limit lets go at once, as a part of a second's worth.
const BURST_OF_SECOND: f64 = 0.05;

/// What is under way at most, and how fast it goes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub concurrency: usize,
    pub origin_concurrency: usize,
    /// Of one origin, attempts a second; `None`: no limit.
    pub origin_max_rps: Option<u32>,
}

/// What is to become of the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// To be attempted; [`Lanes::ended`] must follow.
    Attempt,
    /// Its origin is down: to be counted as failed without an attempt.
    Withheld,
}

/// What an attempt tells of its origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    Healthy,
    Failing,
    /// Nothing: it was abandoned, or refused for a reason of its own.
    None,
}

#[derive(Debug)]
pub struct Lanes<T> {
    limits: Limits,
    under_way: usize,
    waiting: usize,
    lanes: HashMap<Origin, Lane<T>>,
    /// Origins with something waiting and maybe a place for it, in turn.
    ready: VecDeque<Origin>,
    /// Origins that wait for their rate.
    resting: BTreeSet<(Timestamp, Origin)>,
    sweep_at: usize,
}

#[derive(Debug)]
struct Lane<T> {
    waiting: VecDeque<T>,
    under_way: usize,
    failures: u32,
    /// Stands in `ready` or in `resting`.
    listed: bool,
    bucket: Option<Bucket>,
}

impl<T> Lane<T> {
    const fn is_down(&self) -> bool {
        self.failures >= BREAKER_FAILURES
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.under_way == 0
    }

    fn is_forgettable(&self, now: Timestamp) -> bool {
        self.is_idle() && self.failures == 0 && self.bucket.as_ref().is_none_or(|b| b.is_full(now))
    }
}

impl<T> Lanes<T> {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            under_way: 0,
            waiting: 0,
            lanes: HashMap::new(),
            ready: VecDeque::new(),
            resting: BTreeSet::new(),
            sweep_at: ORIGINS_KEPT,
        }
    }

    pub const fn waiting(&self) -> usize {
        self.waiting
    }

    pub fn push(&mut self, origin: Origin, item: T, now: Timestamp) {
        self.sweep();
        let rate = self.limits.origin_max_rps;
        let lane = self.lanes.entry(origin.clone()).or_insert_with(|| Lane {
            waiting: VecDeque::new(),
            under_way: 0,
            failures: 0,
            listed: false,
            bucket: rate.map(|per_second| Bucket::full(per_second, now)),
        });
        lane.waiting.push_back(item);
        self.waiting += 1;
        if !lane.listed {
            lane.listed = true;
            self.ready.push_back(origin);
        }
    }

    /// The next one that may go now.
    pub fn next(&mut self, now: Timestamp) -> Option<(Origin, T, Turn)> {
        self.wake_rested(now);
        loop {
            let free = self.limits.concurrency.saturating_sub(self.under_way);
            if free == 0 {
                return None;
            }
            let origin = self.ready.pop_front()?;
            let lane = self.lanes.get_mut(&origin).expect("whoever is listed has a lane");
            lane.listed = false;
            // Nobody has more places than are left: however many origins hang, there is room for others.
            let share = free.min(self.limits.origin_concurrency);
            let turn = match (lane.is_down(), lane.under_way) {
                (true, 0) => Turn::Attempt,
                (true, _) => Turn::Withheld,
                (false, n) if n < share => Turn::Attempt,
                // Listed again when one of its own ends.
                (false, _) => continue,
            };
            if turn == Turn::Attempt
                && let Some(bucket) = &mut lane.bucket
                && let Err(at) = bucket.take(now)
            {
                lane.listed = true;
                self.resting.insert((at, origin));
                continue;
            }
            let Some(item) = lane.waiting.pop_front() else { continue };
            self.waiting -= 1;
            if turn == Turn::Attempt {
                lane.under_way += 1;
                self.under_way += 1;
            }
            self.list(&origin);
            return Some((origin, item, turn));
        }
    }

    /// An attempt is over, and what it tells of its origin.
    pub fn ended(&mut self, origin: &Origin, sign: Sign, now: Timestamp) {
        let lane = self.lanes.get_mut(origin).expect("a lane stays while anything is under way");
        lane.under_way -= 1;
        self.under_way -= 1;
        match sign {
            Sign::Healthy => lane.failures = 0,
            Sign::Failing => lane.failures = lane.failures.saturating_add(1),
            Sign::None => {}
        }
        if lane.is_forgettable(now) {
            self.lanes.remove(origin);
        } else {
            self.list(origin);
        }
    }

    /// When the first origin that waits for its rate may go on.
    pub fn wakes_at(&self) -> Option<Timestamp> {
        self.resting.first().map(|(at, _)| *at)
    }

    fn list(&mut self, origin: &Origin) {
        if let Some(lane) = self.lanes.get_mut(origin)
            && !lane.waiting.is_empty()
            && !lane.listed
        {
            lane.listed = true;
            self.ready.push_back(origin.clone());
        }
    }

    fn wake_rested(&mut self, now: Timestamp) {
        while self.resting.first().is_some_and(|(at, _)| *at <= now) {
            self.ready.extend(self.resting.pop_first().map(|(_, origin)| origin));
        }
        if self.resting.last().is_some_and(|(at, _)| *at > now.plus_ms(RATE_WAIT_MAX_MS)) {
            let rested = std::mem::take(&mut self.resting);
            self.ready.extend(rested.into_iter().map(|(_, origin)| origin));
        }
    }

    /// Forgets idle origins, their failures too, when there are too many; rarely enough to cost nothing.
    fn sweep(&mut self) {
        if self.lanes.len() >= self.sweep_at {
            self.lanes.retain(|_, lane| !lane.is_idle() || lane.listed);
            self.sweep_at = ORIGINS_KEPT.max(2 * self.lanes.len());
        }
    }
}

/// A token bucket.
#[derive(Debug)]
struct Bucket {
    per_second: f64,
    tokens: f64,
    at: Timestamp,
}

impl Bucket {
    fn full(per_second: u32, at: Timestamp) -> Self {
        let per_second = f64::from(per_second);
        Self { per_second, tokens: Self::burst(per_second), at }
    }

    fn burst(per_second: f64) -> f64 {
        (per_second * BURST_OF_SECOND).max(1.0)
    }

    fn tokens_at(&self, now: Timestamp) -> f64 {
        let gained = now.since(self.at).as_secs_f64() * self.per_second;
        (self.tokens + gained).min(Self::burst(self.per_second))
    }

    fn is_full(&self, now: Timestamp) -> bool {
        self.tokens_at(now) >= Self::burst(self.per_second)
    }

    /// Takes one, or says when there will be one.
    fn take(&mut self, now: Timestamp) -> Result<(), Timestamp> {
        self.tokens = self.tokens_at(now);
        self.at = now;
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Ok(());
        }
        let wait_ms = (1.0 - self.tokens) / self.per_second * 1_000.0;
        Err(now.plus_ms((wait_ms.ceil() as u64).max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_ms(1_000_000);

    fn limits() -> Limits {
        Limits { concurrency: 1_024, origin_concurrency: 64, origin_max_rps: None }
    }

    fn origin(n: usize) -> Origin {
        Origin { scheme: "http".into(), host: format!("host-{n}"), port: 80 }
    }

    fn lanes(limits: Limits, origins: usize, each: usize) -> Lanes<usize> {
        let mut lanes = Lanes::new(limits);
        for item in 0..each {
            for n in 0..origins {
                lanes.push(origin(n), item, NOW);
            }
        }
        lanes
    }

    /// All that may go now.
    fn go(lanes: &mut Lanes<usize>, now: Timestamp) -> Vec<(Origin, usize, Turn)> {
        std::iter::from_fn(|| lanes.next(now)).collect()
    }

    fn count(gone: &[(Origin, usize, Turn)], n: usize) -> usize {
        gone.iter().filter(|(o, ..)| *o == origin(n)).count()
    }

    #[test]
    fn origins_take_turns_and_each_keeps_its_order() {
        let gone = go(&mut lanes(limits(), 3, 3), NOW);
        let order: Vec<_> = gone.iter().map(|(o, item, _)| (o.host.clone(), *item)).collect();
        let expected: Vec<_> =
            (0..3).flat_map(|item| (0..3).map(move |n| (format!("host-{n}"), item))).collect();
        assert_eq!(order, expected);
    }

    #[test]
    fn an_origin_has_its_limit_and_gets_a_place_back_when_one_ends() {
        let mut lanes = lanes(limits(), 1, 100);
        assert_eq!(go(&mut lanes, NOW).len(), 64);
        assert_eq!(lanes.waiting(), 36);
        lanes.ended(&origin(0), Sign::Healthy, NOW);
        assert_eq!(go(&mut lanes, NOW).len(), 1);
    }

    #[test]
    fn however_many_origins_hang_there_is_a_place_for_one_more() {
        let mut lanes = lanes(limits(), 100, 100);
        let gone = go(&mut lanes, NOW);
        assert!(gone.len() < 1_024, "{} of 1024 are taken", gone.len());
        lanes.push(origin(1_000), 0, NOW);
        assert_eq!(count(&go(&mut lanes, NOW), 1_000), 1);
    }

    #[test]
    fn ten_failures_in_a_row_leave_one_probe_and_one_success_ends_it() {
        let mut lanes = lanes(limits(), 1, 100);
        for _ in 0..9 {
            lanes.next(NOW);
            lanes.ended(&origin(0), Sign::Failing, NOW);
        }
        assert_eq!(lanes.next(NOW).map(|(.., turn)| turn), Some(Turn::Attempt));
        lanes.ended(&origin(0), Sign::Failing, NOW);

        let gone = go(&mut lanes, NOW);
        assert_eq!(gone[0].2, Turn::Attempt, "the probe");
        assert!(gone[1..].iter().all(|(.., turn)| *turn == Turn::Withheld));
        assert_eq!((gone.len(), lanes.waiting()), (90, 0));

        lanes.ended(&origin(0), Sign::None, NOW);
        for item in 0..3 {
            lanes.push(origin(0), item, NOW);
        }
        let turns: Vec<_> = go(&mut lanes, NOW).into_iter().map(|(.., turn)| turn).collect();
        assert_eq!(turns, [Turn::Attempt, Turn::Withheld, Turn::Withheld], "it tells nothing");

        lanes.ended(&origin(0), Sign::Healthy, NOW);
        for item in 0..3 {
            lanes.push(origin(0), item, NOW);
        }
        assert!(go(&mut lanes, NOW).iter().all(|(.., turn)| *turn == Turn::Attempt));
    }

    #[test]
    fn a_success_in_between_keeps_the_breaker_closed() {
        let mut lanes = lanes(limits(), 1, 100);
        for n in 0..50 {
            assert_eq!(lanes.next(NOW).map(|(.., turn)| turn), Some(Turn::Attempt));
            let sign = if n % 9 == 8 { Sign::Healthy } else { Sign::Failing };
            lanes.ended(&origin(0), sign, NOW);
        }
    }

    #[test]
    fn a_rate_is_kept_over_any_second_and_for_each_origin() {
        let limits = Limits { origin_max_rps: Some(100), ..limits() };
        let mut lanes = lanes(limits, 2, 1_000);
        let mut gone = [0, 0];
        let mut now = NOW;
        while now < NOW.plus_ms(5_000) {
            for (origin_of, ..) in go(&mut lanes, now) {
                gone[usize::from(origin_of == origin(1))] += 1;
                lanes.ended(&origin_of, Sign::Healthy, now);
            }
            now = lanes.wakes_at().expect("more waits than may go");
        }
        assert!(gone.iter().all(|n| (495..=505).contains(n)), "{gone:?} of 500");
    }

    #[test]
    fn a_rate_is_kept_also_by_one_at_a_time() {
        let limits = Limits { origin_max_rps: Some(10), ..limits() };
        let mut lanes = Lanes::new(limits);
        let gone = (0..100).filter(|item| {
            let now = NOW.plus_ms(10 * *item);
            lanes.push(origin(0), 0, now);
            let next = lanes.next(now).is_some();
            if next {
                lanes.ended(&origin(0), Sign::Healthy, now);
            }
            next
        });
        assert_eq!(gone.count(), 10, "in a second");
    }

    #[test]
    fn a_clock_that_is_set_back_holds_up_no_rate() {
        let limits = Limits { origin_max_rps: Some(10), ..limits() };
        let mut lanes = lanes(limits, 1, 3);
        assert_eq!(go(&mut lanes, NOW).len(), 1);
        let earlier = Timestamp::from_ms(NOW.ms() - 3_600_000);
        assert_eq!(go(&mut lanes, earlier).len(), 0, "no token yet");
        assert_eq!(lanes.wakes_at(), Some(earlier.plus_ms(100)));
        assert_eq!(go(&mut lanes, earlier.plus_ms(100)).len(), 1);
    }

    #[test]
    fn idle_origins_are_forgotten() {
        let mut lanes = lanes(limits(), 50, 2);
        for (origin, ..) in go(&mut lanes, NOW) {
            lanes.ended(&origin, Sign::Healthy, NOW);
        }
        assert_eq!(lanes.lanes.len(), 0);
        for n in 0..3 * ORIGINS_KEPT {
            lanes.push(origin(n), 0, NOW);
            let (origin, ..) = lanes.next(NOW).unwrap();
            lanes.ended(&origin, Sign::Failing, NOW);
        }
        assert!(lanes.lanes.len() <= ORIGINS_KEPT, "{}", lanes.lanes.len());
    }

    proptest::proptest! {
        /// Whatever happens: limits hold, nothing is lost, and nothing waits while it could go.
        #[test]
        fn limits_hold_and_nothing_is_left_behind(steps in proptest::collection::vec(
            (0..4_usize, 0..3_usize, 0..5_usize), 1..300,
        )) {
            let limits = Limits { concurrency: 7, origin_concurrency: 3, origin_max_rps: None };
            let mut lanes = Lanes::new(limits);
            let (mut pushed, mut gone) = (0, 0);
            let mut under_way: Vec<Origin> = Vec::new();
            for (n, sign, what) in steps {
                match what {
                    0 if !under_way.is_empty() => {
                        let origin = under_way.swap_remove(n % under_way.len());
                        lanes.ended(&origin, [Sign::Healthy, Sign::Failing, Sign::None][sign], NOW);
                    }
                    1 => while let Some((origin, _, turn)) = lanes.next(NOW) {
                        gone += 1;
                        if turn == Turn::Attempt {
                            under_way.push(origin);
                        }
                    },
                    _ => {
                        lanes.push(origin(n), 0, NOW);
                        pushed += 1;
                    }
                }
                proptest::prop_assert!(under_way.len() <= 7);
                for n in 0..4 {
                    proptest::prop_assert!(under_way.iter().filter(|o| **o == origin(n)).count() <= 3);
                }
            }
            for _ in 0..pushed {
                while let Some((origin, _, turn)) = lanes.next(NOW) {
                    gone += 1;
                    if turn == Turn::Attempt {
                        under_way.push(origin);
                    }
                }
                for origin in under_way.drain(..) {
                    lanes.ended(&origin, Sign::Failing, NOW);
                }
            }
            proptest::prop_assert_eq!((pushed, 0), (gone, lanes.waiting()));
        }
    }
}
