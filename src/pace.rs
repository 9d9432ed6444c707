//! Rounds that cost about the same however much is in them: under load the next one waits for company.

use std::time::Duration;

use crate::clock::Stopwatch;

#[derive(Clone, Copy)]
pub struct Rules {
    /// Under load a round begins so long after the one before.
    pub every: Duration,
    /// So much in a round is load. Less is work that nothing follows: the next is taken up at once.
    pub busy: usize,
    /// So much is company enough.
    pub company: usize,
}

pub struct Pace {
    rules: Rules,
    began: Stopwatch,
    /// In the round that began then.
    taken: usize,
}

impl Pace {
    pub fn new(rules: Rules) -> Self {
        Self { rules, began: Stopwatch::start(), taken: 0 }
    }

    /// How long a round of so much is still put off.
    pub fn wait(&self, waiting: usize) -> Option<Duration> {
        self.wait_after(waiting, self.began.elapsed())
    }

    /// The one before having begun `ago`.
    fn wait_after(&self, waiting: usize, ago: Duration) -> Option<Duration> {
        let Rules { every, busy, company } = self.rules;
        let is_alone = self.taken >= busy && waiting < company;
        is_alone.then(|| every.checked_sub(ago)).flatten()
    }

    pub fn begin(&mut self, taken: usize) {
        *self = Self { rules: self.rules, began: Stopwatch::start(), taken };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { every: Duration::from_millis(2), busy: 8, company: 250 };

    #[test]
    fn under_load_a_round_waits_for_company_and_what_comes_alone_never() {
        let after = |taken| {
            let mut pace = Pace::new(RULES);
            pace.begin(taken);
            pace
        };
        let (soon, late) = (Duration::from_micros(500), Duration::from_millis(3));
        assert_eq!(after(100).wait_after(20, soon), Some(Duration::from_micros(1_500)));
        assert_eq!(after(100).wait_after(20, late), None);
        assert_eq!(after(100).wait_after(RULES.company, soon), None);
        assert_eq!(after(1).wait_after(1, soon), None);
    }
}
