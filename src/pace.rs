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
    /// Who brings it waits for it: as much as has been usual is company enough too, since no more may come before.
    pub is_awaited: bool,
}

/// Rounds whose largest says what is usual.
const RECENT: usize = 8;

pub struct Pace {
    rules: Rules,
    began: Stopwatch,
    /// In the last rounds, the one that began then being the last.
    taken: [usize; RECENT],
}

impl Pace {
    pub fn new(rules: Rules) -> Self {
        Self { rules, began: Stopwatch::start(), taken: [0; RECENT] }
    }

    /// How long a round of so much is still put off.
    pub fn wait(&self, waiting: usize) -> Option<Duration> {
        self.wait_after(waiting, self.began.elapsed())
    }

    /// The one before having begun `ago`.
    fn wait_after(&self, waiting: usize, ago: Duration) -> Option<Duration> {
        let Rules { every, busy, company, is_awaited } = self.rules;
        let [.., last] = self.taken;
        let usual = self.taken.into_iter().fold(0, usize::max);
        let enough = if is_awaited { company.min(usual) } else { company };
        let is_alone = last >= busy && waiting < enough;
        is_alone.then(|| every.checked_sub(ago)).flatten()
    }

    pub fn begin(&mut self, taken: usize) {
        self.began = Stopwatch::start();
        self.taken.rotate_left(1);
        self.taken[RECENT - 1] = taken;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules =
        Rules { every: Duration::from_millis(2), busy: 8, company: 250, is_awaited: true };

    #[test]
    fn under_load_a_round_waits_for_company_and_what_comes_alone_never() {
        let after_all = |rounds: &[usize]| {
            let mut pace = Pace::new(RULES);
            rounds.iter().for_each(|taken| pace.begin(*taken));
            pace
        };
        let after = |taken| after_all(&[300, taken]);
        let (soon, late) = (Duration::from_micros(500), Duration::from_millis(3));
        assert_eq!(after(100).wait_after(20, soon), Some(Duration::from_micros(1_500)));
        assert_eq!(after(100).wait_after(20, late), None);
        assert_eq!(after(100).wait_after(RULES.company, soon), None);
        assert_eq!(after(1).wait_after(1, soon), None);
        let closed = after_all(&[64; 3]);
        assert_eq!(closed.wait_after(64, soon), None, "all who ask have asked");
        let unawaited = Pace { rules: Rules { is_awaited: false, ..RULES }, ..after_all(&[64; 3]) };
        assert!(unawaited.wait_after(64, soon).is_some(), "more comes all the same");
        assert!(closed.wait_after(63, soon).is_some());
        let slowed = after_all(&[300, 20, 20, 20, 20, 20, 20, 20, 20]);
        assert_eq!(slowed.wait_after(20, soon), None, "what was usual long ago is not");
    }
}
