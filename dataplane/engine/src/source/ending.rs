//! How a source ends: the guest first, then everything else.
//!
//! ```text
//!            ResumeGuest       (only if the guest is to stay, and may be paused)
//!  begin --> StopCopy          (only if a copy or recheck is under way) --> Release --> Finish
//!            AbortPeer         (only if the destination may not know)
//!            ThrottleGuest 0   (only if the guest may be throttled)
//!                |                                                     ^         ^
//!                +-- GuestResumed or GuestGone, and Copied, Rechecked or UNDO passed
//!                +-- PeerAborted, or UNDO passed --------------------------------+
//!                +-- Throttled 0, or UNDO passed --------------------------------+
//! ```
//!
//! All four are ordered at once: the guest's resume waits for nothing. Nothing is let go before it runs.

use std::time::Duration;

use super::{Outcome, SourceAction, SourceEvent};
use crate::limits::{RELEASE, RESUME, RESUME_ANSWER, THROTTLE_ANSWER, UNDO};
use crate::retry::Retry;
use crate::trouble::Trouble;
use crate::{Failure, Percent, Reason, State};

/// Whose the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// The source's: to be resumed where it may be paused.
    Stays { resume: bool },
    /// The destination's, or was; it is not resumed here, whatever comes.
    Left { state: State },
}

/// What is to be undone.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) outcome: Outcome,
    pub(super) guest: Guest,
    /// A copy or a recheck is under way.
    pub(super) stop_copy: bool,
    /// The destination does not know yet that it ends, and why.
    pub(super) abort_peer: Option<Failure>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Release {
    Held,
    Ordered,
    Done,
}

#[derive(Clone, Debug)]
struct Resume {
    retry: Retry,
    give_up_at: Duration,
    trouble: Option<Trouble>,
}

#[derive(Clone, Debug)]
pub(super) struct Ending {
    outcome: Outcome,
    guest: Guest,
    resume: Option<Resume>,
    copy_stops: bool,
    telling_peer: bool,
    /// When the throttle's lift is ordered again.
    lift: Option<Retry>,
    release: Release,
    /// When the copy, the peer and the throttle are no longer waited for.
    undo_limit: Option<Duration>,
    /// When the release no longer is.
    release_limit: Option<Duration>,
}

impl Ending {
    /// Begins; appends what is to be done to `actions`, and `lift` among it: what lifts the throttle, where there may be
    /// one. Never ends at once: there is always a release to wait for.
    pub(super) fn begin(
        now: Duration,
        plan: Plan,
        lift: Vec<SourceAction>,
        actions: &mut Vec<SourceAction>,
    ) -> Self {
        let lift_answer_by = Some(now.saturating_add(THROTTLE_ANSWER));
        let mut ending = Self {
            outcome: plan.outcome,
            guest: plan.guest,
            resume: None,
            copy_stops: plan.stop_copy,
            telling_peer: plan.abort_peer.is_some(),
            lift: (!lift.is_empty()).then(|| Retry::new(lift_answer_by)),
            release: Release::Held,
            undo_limit: Some(now.saturating_add(UNDO)),
            release_limit: None,
        };
        if plan.guest == (Guest::Stays { resume: true }) {
            ending.order_resume(now, actions);
        }
        // Behind the guest's resume, which waits for no answer to it.
        actions.extend(lift);
        if plan.stop_copy {
            actions.push(SourceAction::StopCopy);
        }
        actions.extend(plan.abort_peer.map(SourceAction::AbortPeer));
        ending.advance(now, actions);
        ending
    }

    /// Takes an event in; the outcome, once all is done.
    pub(super) fn handle(
        &mut self,
        now: Duration,
        event: SourceEvent,
        actions: &mut Vec<SourceAction>,
    ) -> Option<Outcome> {
        match event {
            SourceEvent::GuestResumed => self.resume = None,
            SourceEvent::GuestGone(failure) if self.resume.is_some() => self.lost(&failure),
            SourceEvent::GuestPaused if self.guest_stays() => self.order_resume(now, actions),
            SourceEvent::Failed(failure) => self.failed(now, failure),
            SourceEvent::Throttled { percent: Percent(0) } => self.lift = None,
            SourceEvent::ThrottleFailed(_) => self.lift.iter_mut().for_each(|lift| lift.put_off(now)),
            SourceEvent::Copied { .. } | SourceEvent::Rechecked { .. } => self.copy_stops = false,
            SourceEvent::PeerAborted | SourceEvent::PeerLost => self.telling_peer = false,
            SourceEvent::Released if self.release == Release::Ordered => self.release = Release::Done,
            SourceEvent::Tick => self.tick(now, actions),
            _ => {}
        }
        self.advance(now, actions);
        let is_undone = self.resume.is_none() && self.lift.is_none() && !self.telling_peer;
        let done = is_undone && self.release == Release::Done;
        done.then(|| self.outcome.clone())
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        let resume = self.resume.iter().flat_map(|resume| [resume.retry.at(), Some(resume.give_up_at)]);
        let lift = self.lift.as_ref().and_then(Retry::at);
        resume.chain([lift, self.undo_limit, self.release_limit]).flatten().min()
    }

    pub(super) fn phase(&self) -> &'static str {
        if self.resume.is_some() { "resume" } else { "release" }
    }

    pub(super) fn state(&self) -> State {
        match self.guest {
            Guest::Stays { .. } => State::Cancelling,
            Guest::Left { state } => state,
        }
    }

    pub(super) fn guest_stays(&self) -> bool {
        matches!(self.guest, Guest::Stays { .. })
    }

    /// Why the guest does not run yet.
    pub(super) fn trouble(&self) -> Option<&Trouble> {
        self.resume.as_ref()?.trouble.as_ref()
    }

    fn order_resume(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        let answer_by = Some(now.saturating_add(RESUME_ANSWER));
        match &mut self.resume {
            Some(resume) => resume.retry.ordered(answer_by),
            None => {
                let give_up_at = now.saturating_add(RESUME);
                self.resume = Some(Resume { retry: Retry::new(answer_by), give_up_at, trouble: None });
            }
        }
        actions.push(SourceAction::ResumeGuest);
    }

    /// Of all that can still fail, only the resume is tried again.
    fn failed(&mut self, now: Duration, failure: Failure) {
        if failure.reason == Reason::GuestFailed
            && let Some(resume) = &mut self.resume
        {
            resume.retry.put_off(now);
            Trouble::note(&mut resume.trouble, now, failure);
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        match &self.resume {
            Some(resume) if resume.give_up_at <= now => self.give_resume_up(),
            Some(resume) if resume.retry.is_due(now) => self.order_resume(now, actions),
            _ => {}
        }
        if self.undo_limit.is_some_and(|limit| limit <= now) {
            self.undo_limit = None;
            self.copy_stops = false;
            self.telling_peer = false;
            self.lift = None;
        }
        if let Some(lift) = self.lift.as_mut().filter(|lift| lift.is_due(now)) {
            lift.put_off(now);
            actions.push(SourceAction::ThrottleGuest { percent: Percent(0) });
        }
        if self.release_limit.is_some_and(|limit| limit <= now) {
            self.release_limit = None;
            self.release = Release::Done;
        }
    }

    fn give_resume_up(&mut self) {
        let cause =
            self.trouble().map_or("it did not answer".to_owned(), |trouble| trouble.failure.to_string());
        let message = format!(
            "the source guest could not be resumed for {RESUME:?} ({cause}). The destination never runs it: resume \
             it here through its VMM (QMP: `migrate_cancel`, `cont`), or start it again"
        );
        self.outcome = Outcome::Failed(Failure::new(Reason::GuestFailed, message));
        self.resume = None;
    }

    /// The destination's was discarded, or is about to be: there is no other.
    fn lost(&mut self, failure: &Failure) {
        let message = format!("the source guest is lost: {failure}. The destination never runs it");
        self.outcome = Outcome::Failed(Failure::new(Reason::GuestFailed, message));
        self.resume = None;
    }

    fn advance(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        if self.release == Release::Held && self.resume.is_none() && !self.copy_stops {
            self.release = Release::Ordered;
            self.release_limit = Some(now.saturating_add(RELEASE));
            actions.push(SourceAction::Release);
        }
    }
}
