//! Which operations the requests of a send queue belong to, and how they ended,
//! where only some of the requests have their end told.
//!
//! Requests end in the order posted. So one that ends well says that all before it
//! did, and so does the first that fails. From then on the device tells the end of
//! each, and what was skipped was not carried out.

use std::collections::VecDeque;

use crate::status::Outcome;

/// Requests that were accepted and have not ended.
#[derive(Debug)]
pub(crate) struct SendQueue<T> {
    /// The operation, with its last request.
    requests: VecDeque<Option<T>>,
    /// Number of the first of them.
    first: u64,
    /// How the requests of the first operation ended before its last one, if badly.
    part_failed: Option<Outcome>,
    failed: bool,
}

impl<T> SendQueue<T> {
    pub(crate) fn new() -> Self {
        Self { requests: VecDeque::new(), first: 0, part_failed: None, failed: false }
    }

    pub(crate) fn len(&self) -> usize {
        self.requests.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Adds a request: the last one of `operation`, or one before that. Returns its number.
    pub(crate) fn push(&mut self, operation: Option<T>) -> u64 {
        self.requests.push_back(operation);
        self.first + self.requests.len() as u64 - 1
    }

    /// The end of a request is told. `end` is given each operation that has ended by it.
    ///
    /// # Errors
    /// When no request has the number.
    pub(crate) fn ended(
        &mut self,
        number: u64,
        outcome: Outcome,
        mut end: impl FnMut(T, Outcome),
    ) -> Result<(), UnknownRequest> {
        let index = number.checked_sub(self.first).ok_or(UnknownRequest)?;
        if index >= self.requests.len() as u64 {
            return Err(UnknownRequest);
        }
        for _ in 0..index {
            let carried_out = !self.failed || outcome == Outcome::Done;
            let skipped = if carried_out { Outcome::Done } else { Outcome::Flushed };
            self.end_first(skipped, &mut end);
        }
        self.end_first(outcome, &mut end);
        self.failed |= outcome != Outcome::Done;
        Ok(())
    }

    /// Nothing that is left will be carried out, or told. `end` is given each operation.
    pub(crate) fn abandon(&mut self, mut end: impl FnMut(T, Outcome)) {
        self.failed = true;
        while !self.requests.is_empty() {
            self.end_first(Outcome::Flushed, &mut end);
        }
    }

    /// As [`SendQueue::abandon`], of the requests from this number on.
    pub(crate) fn abandon_from(&mut self, number: u64, mut end: impl FnMut(T, Outcome)) {
        self.failed = true;
        let keep = number.saturating_sub(self.first).min(self.requests.len() as u64) as usize;
        let dropped: Vec<_> = self.requests.drain(keep..).flatten().collect();
        for operation in dropped {
            end(operation, Outcome::Flushed);
        }
    }

    fn end_first(&mut self, outcome: Outcome, end: &mut impl FnMut(T, Outcome)) {
        let Some(operation) = self.requests.pop_front() else { return };
        self.first += 1;
        if outcome != Outcome::Done {
            self.part_failed.get_or_insert(outcome);
        }
        if let Some(operation) = operation {
            let outcome = self.part_failed.take().unwrap_or(outcome);
            end(operation, outcome);
        }
    }
}

/// No request has the number that the end of one was told under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnknownRequest;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ended(queue: &mut SendQueue<u32>, number: u64, outcome: Outcome) -> Vec<(u32, Outcome)> {
        let mut ends = Vec::new();
        queue.ended(number, outcome, |operation, outcome| ends.push((operation, outcome))).unwrap();
        ends
    }

    #[test]
    fn one_that_ends_well_says_so_of_all_before_it() {
        let mut queue = SendQueue::new();
        for operation in 0..5 {
            assert_eq!(queue.push(Some(operation)), u64::from(operation));
        }
        let done = |operation| (operation, Outcome::Done);
        assert_eq!(ended(&mut queue, 2, Outcome::Done), [done(0), done(1), done(2)]);
        assert_eq!(ended(&mut queue, 4, Outcome::Done), [done(3), done(4)]);
        assert!(queue.is_empty());
        assert_eq!(queue.push(None), 5);
    }

    #[test]
    fn what_was_before_the_first_failure_was_carried_out_and_nothing_after_it() {
        let mut queue = SendQueue::new();
        for operation in 0..6 {
            queue.push(Some(operation));
        }
        let failed = ended(&mut queue, 2, Outcome::RemoteAccess);
        assert_eq!(failed, [(0, Outcome::Done), (1, Outcome::Done), (2, Outcome::RemoteAccess)]);
        let flushed = ended(&mut queue, 4, Outcome::Flushed);
        assert_eq!(flushed, [(3, Outcome::Flushed), (4, Outcome::Flushed)]);
        let mut rest = Vec::new();
        queue.abandon(|operation, outcome| rest.push((operation, outcome)));
        assert_eq!(rest, [(5, Outcome::Flushed)]);
    }

    #[test]
    fn an_operation_ends_with_its_last_part_and_fails_with_any() {
        let mut queue = SendQueue::new();
        queue.push(None);
        queue.push(None);
        queue.push(Some(7));
        assert_eq!(ended(&mut queue, 0, Outcome::Done), []);
        assert_eq!(ended(&mut queue, 1, Outcome::RemoteAccess), []);
        assert_eq!(ended(&mut queue, 2, Outcome::Flushed), [(7, Outcome::RemoteAccess)]);
    }

    #[test]
    fn numbers_of_no_request_are_refused() {
        let mut queue = SendQueue::<u32>::new();
        let refuse = |queue: &mut SendQueue<u32>, number| {
            queue.ended(number, Outcome::Done, |_, _| panic!("no operation"))
        };
        assert_eq!(refuse(&mut queue, 0), Err(UnknownRequest));
        queue.push(Some(1));
        ended(&mut queue, 0, Outcome::Done);
        assert_eq!(refuse(&mut queue, 0), Err(UnknownRequest));
        assert_eq!(refuse(&mut queue, u64::MAX), Err(UnknownRequest));
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Push { parts: u8 },
        End { skip: u8, outcome: Outcome },
        AbandonFrom { back: u8 },
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let outcomes = vec![Outcome::Done, Outcome::Done, Outcome::Flushed, Outcome::RemoteAccess];
        prop_oneof![
            3 => (1_u8..4).prop_map(|parts| Step::Push { parts }),
            3 => (0_u8..6, proptest::sample::select(outcomes))
                .prop_map(|(skip, outcome)| Step::End { skip, outcome }),
            1 => (0_u8..9).prop_map(|back| Step::AbandonFrom { back }),
        ]
    }

    proptest! {
        #[test]
        fn every_operation_ends_once_in_order_whatever_is_told(steps in proptest::collection::vec(any_step(), 0..200)) {
            let mut queue = SendQueue::new();
            let (mut pushed, mut pushed_requests, mut ends) = (0_u32, 0_u64, Vec::new());
            let (mut abandoned, mut failed, mut done_after_failure) = (false, false, 0);
            for step in steps {
                match step {
                    Step::Push { parts } if !abandoned => {
                        for _ in 1..parts {
                            queue.push(None);
                        }
                        queue.push(Some(pushed));
                        pushed += 1;
                        pushed_requests += u64::from(parts);
                    }
                    Step::Push { .. } => {}
                    Step::End { skip, outcome } => {
                        let number = pushed_requests - queue.len() as u64 + u64::from(skip);
                        if u64::from(skip) < queue.len() as u64 {
                            queue.ended(number, outcome, |operation, outcome| ends.push((operation, outcome))).unwrap();
                            if failed && outcome == Outcome::Done {
                                // It, and what it skips.
                                done_after_failure += usize::from(skip) + 1;
                            }
                            failed |= outcome != Outcome::Done;
                        }
                    }
                    Step::AbandonFrom { back } => {
                        // Whole operations are left unposted, and nothing is pushed any more.
                        (abandoned, failed) = (true, true);
                        let number = pushed_requests.saturating_sub(u64::from(back));
                        let before = queue.len();
                        let mut late = Vec::new();
                        queue.abandon_from(number, |operation, outcome| late.push((operation, outcome)));
                        pushed_requests -= (before - queue.len()) as u64;
                        prop_assert!(late.iter().all(|(_, outcome)| *outcome == Outcome::Flushed));
                        // They end at once, ahead of those that were posted.
                        pushed -= late.len() as u32;
                    }
                }
            }
            queue.abandon(|operation, outcome| ends.push((operation, outcome)));
            let operations: Vec<u32> = ends.iter().map(|(operation, _)| *operation).collect();
            prop_assert_eq!(operations, (0..pushed).collect::<Vec<_>>());
            let failure = ends.iter().position(|(_, outcome)| *outcome != Outcome::Done).unwrap_or(ends.len());
            let told_done = ends[failure..].iter().filter(|(_, outcome)| *outcome == Outcome::Done).count();
            prop_assert!(told_done <= done_after_failure, "what is skipped after a failure was not carried out");
        }
    }
}
