//! Throttling: the guest gets less processor time, in steps, until rounds bring progress again.
//!
//! ```text
//!  rounds without progress --> ThrottleGuest 20 % --> 30 % --> ... --> the most that is allowed --> does not converge
//!  GuestPaused, an end, a change of parameters ------------------------------------------------> ThrottleGuest 0 %
//! ```
//!
//! The steps are those of QEMU's auto-converge (`cpu-throttle-initial` 20, `cpu-throttle-increment` 10, two rounds before
//! the first; `qapi/migration.json`). A step is taken at most once a second, and only after a whole round under the one
//! before. It begins the time anew in which no progress means no convergence: each step is given its chance. Where the
//! fixed costs alone exceed `max_downtime`, or nothing is owed, throttling cannot help, and is left.
//!
//! It is tried only with [`Postcopy::Never`]: post-copy needs no slower guest, and comes at the first sign of no
//! convergence. That the guest cannot be throttled is no failure of the migration; it then does not converge as if
//! throttling had not been asked for.
//!
//! An order to lift the throttle is given again until it is answered, also while the migration ends, for a bounded time:
//! after that the driver, which keeps account of what it did, has to do it by itself.

use std::time::Duration;

use super::{Source, SourceAction};
use crate::convergence::Verdict;
use crate::limits::{THROTTLE_ANSWER, THROTTLE_INTERVAL};
use crate::trouble::Trouble;
use crate::{Failure, Percent, Postcopy, SourceEvent};

/// What the first step takes.
const FIRST: Percent = Percent(20);
/// What each further step takes on top.
const INCREMENT: Percent = Percent(10);
/// Rounds without progress before the first step, and before each further one.
const ROUNDS_BEFORE: (u32, u32) = (2, 1);

/// What was ordered, and what came of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Throttle {
    ordered: Percent,
    ordered_at: Option<Duration>,
    is_answered: bool,
    /// By the last answer.
    in_force: Percent,
    /// It cannot be had, or only so far.
    trouble: Option<Trouble>,
}

impl Throttle {
    /// Whether the guest may be held back: an order was given, and no word came since that it is not.
    fn may_be_on(&self) -> bool {
        self.ordered_at.is_some() && !(self.is_answered && self.ordered == Percent(0))
    }

    pub(super) fn trouble(&self) -> Option<&Trouble> {
        self.trouble.as_ref()
    }

    /// What it failed at may have been set right since: it goes on from what is in force.
    pub(super) fn try_again(&mut self) {
        self.trouble = None;
        self.is_answered |= self.ordered > Percent(0);
    }

    fn order(&mut self, now: Duration, percent: Percent) -> SourceAction {
        (self.ordered, self.ordered_at, self.is_answered) = (percent, Some(now), false);
        SourceAction::ThrottleGuest { percent }
    }

    /// The next step up to `most`, after `rounds` without progress.
    fn step(&self, now: Duration, rounds: u32, most: Percent) -> Step {
        if self.trouble.is_some() || (self.is_answered && self.in_force >= most) {
            return Step::None;
        }
        let since = self.ordered_at.map(|at| now.saturating_sub(at));
        let is_on = self.in_force > Percent(0);
        match since {
            Some(since) if !self.is_answered && since >= THROTTLE_ANSWER => return Step::None,
            Some(since) if !self.is_answered || since < THROTTLE_INTERVAL => return Step::Later,
            _ => {}
        }
        if rounds < if is_on { ROUNDS_BEFORE.1 } else { ROUNDS_BEFORE.0 } {
            return Step::Later;
        }
        let next = if is_on { Percent(self.in_force.0.saturating_add(INCREMENT.0)) } else { FIRST };
        Step::Now(next.min(most))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Now(Percent),
    /// There is one, or an answer, to be waited for.
    Later,
    /// There is none left.
    None,
}

impl Source {
    /// Steps the throttle where `verdict` asks for that and the caller allows it; the verdict then.
    pub(super) fn throttled(
        &mut self,
        now: Duration,
        verdict: Verdict,
        owed_bytes: u64,
        actions: &mut Vec<SourceAction>,
    ) -> Verdict {
        let allowed = self.throttle_allowed().filter(|_| !self.forced && owed_bytes > 0);
        let (Some(most), Verdict::NextRound | Verdict::NotConverging) = (allowed, verdict) else {
            return verdict;
        };
        if !self.convergence.copy_decides(&self.parameters) {
            return verdict;
        }
        match self.throttle.step(now, self.convergence.rounds_without_progress(), most) {
            Step::Now(percent) => {
                self.convergence.begin_anew(now);
                actions.push(self.throttle.order(now, percent));
                Verdict::NextRound
            }
            Step::Later => Verdict::NextRound,
            Step::None => verdict,
        }
    }

    /// The most that may be taken, where any may.
    fn throttle_allowed(&self) -> Option<Percent> {
        self.parameters.throttle.filter(|_| self.parameters.postcopy == Postcopy::Never)
    }

    /// After a change of the parameters: no more is taken than they allow now.
    pub(super) fn throttle_as_allowed(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        let most = self.throttle_allowed().unwrap_or_default();
        if self.phase.is_before_switchover() && self.throttle.ordered > most {
            actions.push(self.throttle.order(now, most));
        }
    }

    /// Orders the throttle lifted, where there may be one.
    pub(super) fn lift_throttle(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        if self.throttle.may_be_on() {
            actions.push(self.throttle.order(now, Percent(0)));
        }
    }

    /// Takes in what became of an order, whatever the phase.
    pub(super) fn note_throttle(&mut self, now: Duration, event: &SourceEvent) {
        match event {
            SourceEvent::Throttled { percent } => {
                self.throttle.is_answered |= *percent == self.throttle.ordered;
                self.throttle.in_force = *percent;
                self.progress.throttle = *percent;
                self.progress.throttle_peak = self.progress.throttle_peak.max(*percent);
            }
            SourceEvent::ThrottleFailed(failure) => {
                Trouble::note(&mut self.throttle.trouble, now, failure.clone());
            }
            _ => {}
        }
    }

    /// `failure`, with what kept the throttle from helping.
    pub(super) fn and_throttle(&self, mut failure: Failure) -> Failure {
        if let Some(trouble) = &self.throttle.trouble {
            failure.message.push_str(". The guest could not be throttled: ");
            failure.message.push_str(&trouble.failure.message);
        } else if self.throttle.ordered > Percent(0) {
            let Percent(percent) = self.throttle.ordered;
            failure.message.push_str(&format!(". It was so with {percent} % of its processor time taken"));
        }
        failure
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Percent = Percent(99);

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    /// Ordered at 0 s, and answered.
    fn at(percent: u8) -> Throttle {
        let mut throttle = Throttle::default();
        throttle.order(seconds(0), Percent(percent));
        (throttle.is_answered, throttle.in_force) = (true, Percent(percent));
        throttle
    }

    #[test]
    fn steps_grow_to_the_most_that_is_allowed() {
        let first = Throttle::default().step(seconds(0), 2, MOST);
        assert_eq!(first, Step::Now(Percent(20)));
        assert_eq!(Throttle::default().step(seconds(0), 2, Percent(15)), Step::Now(Percent(15)));
        assert_eq!(at(20).step(seconds(1), 1, MOST), Step::Now(Percent(30)));
        assert_eq!(at(90).step(seconds(1), 1, MOST), Step::Now(MOST));
        assert_eq!(at(99).step(seconds(1), 1, MOST), Step::None);
        assert_eq!(at(40).step(seconds(1), 1, Percent(40)), Step::None);
    }

    #[test]
    fn a_step_waits_for_a_round_without_progress_a_second_and_its_answer() {
        assert_eq!(Throttle::default().step(seconds(0), 1, MOST), Step::Later);
        assert_eq!(at(20).step(seconds(9), 0, MOST), Step::Later);
        assert_eq!(at(20).step(Duration::from_millis(999), 5, MOST), Step::Later);
        let unanswered = Throttle { is_answered: false, ..at(20) };
        assert_eq!(unanswered.step(seconds(2), 5, MOST), Step::Later);
        assert_eq!(unanswered.step(THROTTLE_ANSWER, 5, MOST), Step::None);
    }

    #[test]
    fn one_that_failed_is_not_tried_further() {
        let mut throttle = at(20);
        let failure = Failure::new(crate::Reason::ThrottleFailed, "no controller");
        Trouble::note(&mut throttle.trouble, seconds(1), failure);
        assert_eq!(throttle.step(seconds(9), 9, MOST), Step::None);
        assert!(throttle.may_be_on(), "what was taken before is still to be given back");

        let mut throttle = Throttle::default();
        throttle.order(seconds(0), Percent(20));
        throttle.try_again();
        assert_eq!(throttle.step(seconds(9), 9, MOST), Step::Now(Percent(20)));
        assert!(throttle.may_be_on());
    }

    #[test]
    fn it_may_be_on_from_its_order_until_the_answer_that_it_is_not() {
        assert!(!Throttle::default().may_be_on());
        assert!(at(20).may_be_on());
        assert!(!at(0).may_be_on());
        assert!(Throttle { is_answered: false, ..at(0) }.may_be_on());
    }
}
