//! How long to wait before an agent that went away is asked again.

use std::time::Duration;

const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// Delays that double, while the time without an answer stays below a limit.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
    patience: Duration,
}

impl Backoff {
    /// Gives up when an agent was away for `patience`.
    pub(crate) fn new(patience: Duration) -> Self {
        Self { next: SHORTEST, patience }
    }

    /// The agent answered.
    pub(crate) fn reset(&mut self) {
        self.next = SHORTEST;
    }

    /// How long to wait when the agent has been `away` for so long; none: give up.
    pub(crate) fn delay(&mut self, away: Duration) -> Option<Duration> {
        let left = self.patience.checked_sub(away).filter(|left| !left.is_zero())?;
        let delay = self.next.min(left);
        self.next = (self.next * 2).min(LONGEST);
        Some(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_to_a_limit_and_end_with_patience() {
        let mut backoff = Backoff::new(Duration::from_secs(60));
        let delays: Vec<_> =
            (0..8).filter_map(|_| backoff.delay(Duration::ZERO)).map(|delay| delay.as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.delay(Duration::from_secs(58)), Some(Duration::from_secs(2)));
        assert_eq!(backoff.delay(Duration::from_secs(60)), None);
    }

    #[test]
    fn an_answer_starts_it_again() {
        let mut backoff = Backoff::new(Duration::from_secs(60));
        backoff.delay(Duration::ZERO);
        backoff.delay(Duration::ZERO);
        backoff.reset();
        assert_eq!(backoff.delay(Duration::ZERO), Some(SHORTEST));
    }
}
