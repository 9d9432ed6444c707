//! Scenarios: what a payment will do and when, drawn once at its creation.
//!
//! A plan is a pure function of (settings, seed, draw key, now) and is stored whole with its payment,
//! so that another seed or setting later changes no payment that exists.

use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::time::Timestamp;

/// How long `expires_at` lies ahead where nothing expires by itself.
const NOMINAL_TTL: Duration = Duration::from_secs(30 * 60);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Scenario {
    Approve,
    Fail,
    Delay,
    Random,
    Timeout,
    Manual,
}

impl Scenario {
    pub const ALL: [Self; 6] =
        [Self::Approve, Self::Fail, Self::Delay, Self::Random, Self::Timeout, Self::Manual];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Approve => "approve",
            Self::Fail => "fail",
            Self::Delay => "delay",
            Self::Random => "random",
            Self::Timeout => "timeout",
            Self::Manual => "manual",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scenario| scenario.as_str() == name)
    }

    /// Whether a plan takes anything from chance, and so needs a draw key.
    pub const fn draws(self) -> bool {
        match self {
            Self::Fail | Self::Random => true,
            Self::Approve | Self::Delay | Self::Timeout | Self::Manual => false,
        }
    }
}

/// Why a payment was declined, in the order that draws count (seed 001), with ISO 8583 codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FailureReason {
    InsufficientBalance,
    InvalidCard,
    ExpiredCard,
    LimitExceeded,
    SystemError,
}

impl FailureReason {
    pub const ALL: [Self; 5] = [
        Self::InsufficientBalance,
        Self::InvalidCard,
        Self::ExpiredCard,
        Self::LimitExceeded,
        Self::SystemError,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InsufficientBalance => "INSUFFICIENT_BALANCE",
            Self::InvalidCard => "INVALID_CARD",
            Self::ExpiredCard => "EXPIRED_CARD",
            Self::LimitExceeded => "LIMIT_EXCEEDED",
            Self::SystemError => "SYSTEM_ERROR",
        }
    }

    /// ISO 8583 response code.
    pub const fn response_code(self) -> i32 {
        match self {
            Self::InsufficientBalance => 51,
            Self::InvalidCard => 14,
            Self::ExpiredCard => 54,
            Self::LimitExceeded => 61,
            Self::SystemError => 96,
        }
    }

    /// The provider's own words.
    pub const fn gateway_response(self) -> &'static str {
        match self {
            Self::InsufficientBalance => "Insufficient balance",
            Self::InvalidCard => "Invalid card",
            Self::ExpiredCard => "Expired card",
            Self::LimitExceeded => "Limit exceeded",
            Self::SystemError => "Provider system error",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Completed,
    Failed(FailureReason),
}

/// What will happen by itself, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Course {
    /// Decided in the create's own commit; notified later.
    DecidedAtOnce { outcome: Outcome, notify_at: Timestamp },
    /// Decided at a moment, and notified then.
    DecidedAt { outcome: Outcome, at: Timestamp },
    /// Settles by itself; a ProcessPayment meanwhile is held.
    Settles { at: Timestamp },
    /// Waits for a call, and expires without one.
    Waits { until: Timestamp },
}

/// A scenario as drawn for one payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub scenario: Scenario,
    pub course: Course,
    pub expires_at: Timestamp,
}

/// The settings that shape plans (`DEFAULT_DELAY_MS` and its like).
#[derive(Clone, Debug)]
pub struct Settings {
    pub default_scenario: Scenario,
    pub default_delay: Duration,
    pub timeout_settle: Duration,
    pub manual_ttl: Duration,
    pub random_approval_rate: f64,
    pub seed: u64,
}

/// What a draw depends on, besides the seed and its purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DrawKey<'a> {
    Idempotency(&'a str),
    /// The n-th create of a reservation that drew without a key, counted from 0.
    Reservation(&'a str, u64),
}

impl Plan {
    /// `key` is not looked at where the scenario draws nothing.
    pub fn draw(
        scenario: Scenario,
        settings: &Settings,
        key: &DrawKey<'_>,
        now: Timestamp,
    ) -> Self {
        let at_once = |outcome| Course::DecidedAtOnce {
            outcome,
            notify_at: now.plus(settings.default_delay),
        };
        let reason = || Outcome::Failed(draw_reason(settings.seed, key));
        let course = match scenario {
            Scenario::Approve => at_once(Outcome::Completed),
            Scenario::Fail => at_once(reason()),
            Scenario::Random => at_once(match draw_approval(settings, key) {
                true => Outcome::Completed,
                false => reason(),
            }),
            Scenario::Delay => Course::DecidedAt {
                outcome: Outcome::Completed,
                at: now.plus(settings.default_delay),
            },
            Scenario::Timeout => Course::Settles { at: now.plus(settings.timeout_settle) },
            Scenario::Manual => Course::Waits { until: now.plus(settings.manual_ttl) },
        };
        let nominal = now.plus(NOMINAL_TTL);
        let expires_at = match course {
            Course::DecidedAtOnce { .. } => nominal,
            Course::DecidedAt { at, .. } | Course::Settles { at } => nominal.max(at),
            Course::Waits { until } => until,
        };
        Self { scenario, course, expires_at }
    }

    /// The outcome that a payment has from its creation on.
    pub const fn decided_at_once(&self) -> Option<Outcome> {
        match self.course {
            Course::DecidedAtOnce { outcome, .. } => Some(outcome),
            Course::DecidedAt { .. } | Course::Settles { .. } | Course::Waits { .. } => None,
        }
    }
}

fn draw_approval(settings: &Settings, key: &DrawKey<'_>) -> bool {
    let fraction = draw(settings.seed, "outcome", key, 0) as f64 / 2_f64.powi(64);
    // A rate of 1 approves everything, also where the fraction rounds up to 1.
    fraction < settings.random_approval_rate || settings.random_approval_rate >= 1.0
}

fn draw_reason(seed: u64, key: &DrawKey<'_>) -> FailureReason {
    let count = FailureReason::ALL.len() as u128;
    // floor(count · draw / 2^64), in whole numbers.
    let number = (u128::from(draw(seed, "reason", key, 0)) * count) >> 64;
    FailureReason::ALL[usize::try_from(number).expect("less than the number of reasons")]
}

/// HMAC-SHA256(seed as 8 big-endian bytes, purpose ‖ 0 ‖ draw key ‖ 0 ‖ attempt): its first 8 bytes,
/// big-endian.
fn draw(seed: u64, purpose: &str, key: &DrawKey<'_>, attempt: u32) -> u64 {
    let mut mac = Hmac::<Sha256>::new_from_slice(&seed.to_be_bytes())
        .expect("HMAC takes a key of any length");
    mac.update(purpose.as_bytes());
    mac.update(&[0]);
    match key {
        DrawKey::Idempotency(key) => mac.update(key.as_bytes()),
        DrawKey::Reservation(reservation, n) => {
            mac.update(reservation.as_bytes());
            mac.update(&[0]);
            mac.update(n.to_string().as_bytes());
        }
    }
    mac.update(&[0]);
    mac.update(attempt.to_string().as_bytes());
    let mut head = [0; 8];
    head.copy_from_slice(&mac.finalize().into_bytes()[..8]);
    u64::from_be_bytes(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn settings() -> Settings {
        Settings {
            default_scenario: Scenario::Approve,
            default_delay: Duration::from_secs(2),
            timeout_settle: Duration::from_secs(30),
            manual_ttl: Duration::from_secs(20),
            random_approval_rate: 0.8,
            seed: 0,
        }
    }

    const NOW: Timestamp = Timestamp::from_ms(1_000_000);

    fn outcome(plan: Plan) -> Outcome {
        match plan.course {
            Course::DecidedAtOnce { outcome, .. } => outcome,
            course => panic!("not decided at once: {course:?}"),
        }
    }

    #[test]
    fn every_scenario_has_its_course() {
        let key = DrawKey::Idempotency("k");
        let at = |s| Plan::draw(s, &settings(), &key, NOW);
        let two_seconds = NOW.plus_ms(2_000);
        assert_eq!(
            at(Scenario::Approve).course,
            Course::DecidedAtOnce { outcome: Outcome::Completed, notify_at: two_seconds }
        );
        assert!(matches!(outcome(at(Scenario::Fail)), Outcome::Failed(_)));
        assert_eq!(
            at(Scenario::Delay).course,
            Course::DecidedAt { outcome: Outcome::Completed, at: two_seconds }
        );
        assert_eq!(at(Scenario::Timeout).course, Course::Settles { at: NOW.plus_ms(30_000) });
        assert_eq!(at(Scenario::Manual).course, Course::Waits { until: NOW.plus_ms(20_000) });
        assert_eq!(at(Scenario::Manual).expires_at, NOW.plus_ms(20_000));
        assert_eq!(at(Scenario::Approve).expires_at, NOW.plus_ms(1_800_000));
    }

    #[test]
    fn a_settlement_after_half_an_hour_moves_the_expiry() {
        let slow = Settings { timeout_settle: Duration::from_secs(7200), ..settings() };
        let plan = Plan::draw(Scenario::Timeout, &slow, &DrawKey::Idempotency("k"), NOW);
        assert_eq!(plan.expires_at, NOW.plus_ms(7_200_000));
    }

    #[test]
    fn rates_of_zero_and_one_leave_nothing_to_chance() {
        for n in 0..200 {
            let key = DrawKey::Reservation("r", n);
            let with = |rate| Settings { random_approval_rate: rate, ..settings() };
            let never = Plan::draw(Scenario::Random, &with(0.0), &key, NOW);
            assert!(matches!(outcome(never), Outcome::Failed(_)));
            let always = Plan::draw(Scenario::Random, &with(1.0), &key, NOW);
            assert_eq!(outcome(always), Outcome::Completed);
        }
    }

    #[test]
    fn the_mix_is_what_the_rate_says() {
        let completed = (0..10_000)
            .filter(|n| draw_approval(&settings(), &DrawKey::Reservation("load-test", *n)))
            .count();
        assert!((7_800..=8_200).contains(&completed), "{completed} of 10000");
        let mut reasons = std::collections::HashMap::new();
        for n in 0..10_000 {
            *reasons.entry(draw_reason(0, &DrawKey::Reservation("r", n))).or_insert(0) += 1;
        }
        assert!(reasons.values().all(|n| (1_800..=2_200).contains(n)), "{reasons:?}");
    }

    /// The committed vectors were computed with another implementation (Python's `hmac`).
    #[test]
    fn draws_match_the_golden_vectors() {
        let text = include_str!("../../tests/vectors/draws.json");
        let vectors: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        assert!(vectors.len() >= 20);
        for v in vectors {
            let seed = v["seed"].as_str().unwrap().parse().unwrap();
            let name = v["key"].as_str().unwrap();
            let key = match v["n"].as_u64() {
                Some(n) => DrawKey::Reservation(name, n),
                None => DrawKey::Idempotency(name),
            };
            let hex = |purpose| format!("{:016x}", draw(seed, purpose, &key, 0));
            assert_eq!(hex("outcome"), v["outcome"].as_str().unwrap(), "{v}");
            assert_eq!(hex("reason"), v["reason"].as_str().unwrap(), "{v}");
            let with_seed = Settings { seed, ..settings() };
            assert_eq!(draw_approval(&with_seed, &key), v["approved"].as_bool().unwrap(), "{v}");
            assert_eq!(draw_reason(seed, &key).as_str(), v["failure_reason"].as_str().unwrap());
        }
    }
}
