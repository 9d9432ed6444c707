//! Moments in milliseconds: the resolution of every clock, due time and timeline entry here.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Timestamp(i64);

impl Timestamp {
    pub const fn from_ms(ms: i64) -> Self {
        Self(ms)
    }

    pub const fn ms(self) -> i64 {
        self.0
    }

    /// Whole Unix seconds, as webhooks carry them.
    pub const fn seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    pub const fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add_unsigned(ms))
    }

    pub fn plus(self, span: Duration) -> Self {
        self.plus_ms(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
    }

    /// How long after `earlier` this is; zero when it is not after it.
    pub const fn since(self, earlier: Self) -> Duration {
        let ms = self.0.saturating_sub(earlier.0);
        Duration::from_millis(if ms < 0 { 0 } else { ms.unsigned_abs() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_round_down_before_the_epoch_too() {
        assert_eq!(Timestamp::from_ms(1_999).seconds(), 1);
        assert_eq!(Timestamp::from_ms(-1).seconds(), -1);
    }

    #[test]
    fn spans_never_go_negative_or_overflow() {
        let t = Timestamp::from_ms(5);
        assert_eq!(t.since(Timestamp::from_ms(9)), Duration::ZERO);
        assert_eq!(t.plus(Duration::MAX).ms(), i64::MAX);
    }
}
