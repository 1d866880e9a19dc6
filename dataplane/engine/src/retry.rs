use std::time::Duration;

use crate::limits::{RETRY_FIRST, RETRY_MOST};

/// When to do something again that failed or was not answered: at growing, bounded intervals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Retry {
    at: Option<Duration>,
    interval: Duration,
}

impl Retry {
    /// For something that was just ordered, whose answer may take until `at`.
    pub(crate) fn new(at: Option<Duration>) -> Self {
        Self { at, interval: RETRY_FIRST }
    }

    /// When it is due again, if no answer comes before.
    pub(crate) fn at(&self) -> Option<Duration> {
        self.at
    }

    /// Whether it is due.
    pub(crate) fn is_due(&self, now: Duration) -> bool {
        self.at.is_some_and(|at| at <= now)
    }

    /// It was ordered again, and its answer may take until `at`.
    pub(crate) fn ordered(&mut self, at: Option<Duration>) {
        self.at = at;
    }

    /// It was done: not due again before it is put off.
    pub(crate) fn done(&mut self) {
        *self = Self::new(None);
    }

    /// It failed, or nothing tells when it does: puts the next try off.
    pub(crate) fn put_off(&mut self, now: Duration) {
        self.at = Some(now.saturating_add(self.interval));
        self.interval = (self.interval * 2).min(RETRY_MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_grow_to_a_bound() {
        let mut retry = Retry::new(None);
        assert!(!retry.is_due(Duration::MAX));
        let mut interval = RETRY_FIRST;
        for _ in 0..20 {
            retry.put_off(Duration::ZERO);
            assert_eq!(retry.at(), Some(interval));
            assert!(retry.is_due(interval));
            interval = (interval * 2).min(RETRY_MOST);
        }
        assert_eq!(retry.at(), Some(RETRY_MOST));
    }
}
