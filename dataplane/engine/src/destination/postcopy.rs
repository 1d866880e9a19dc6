//! Post-copy, at the destination: the guest runs here, and its memory is read from the source.
//!
//! ```text
//!  Resuming    ResumeGuest, Pull                  after a restart, too
//!    | GuestResumed: AnswerRunning, memory owed
//!  Pulling     Pull again at intervals, and at PeerBack, from Failed until PullResumed
//!    |    |
//!    |    | Pulled, GuestGone: AnswerRunning, nothing owed
//!    |    +--> Running   Release -> Finish(Running)
//!    |
//!    | MemoryLost; also while Resuming
//!  Stopping    StopGuest, until GuestStopped or GuestGone; after STOP DiscardGuest, until GuestDiscarded
//!    |         or DISCARD has passed
//!  Lost        Release -> Finish(Lost), AnswerLost
//! ```
//!
//! What is owed has one owner, this side: nothing but its own reads brings pages, so that none is overwritten once the
//! guest was let in. Links and control stream may come and go meanwhile, with the source's agent: the guest waits
//! where it needs a page, and runs on with the others. A guest whose VMM ends is lost with it, as any guest's that
//! has moved: the source is told that nothing is owed, so that it lets go.
//!
//! Where the source has lost memory for good, the guest must not wait for ever, nor run on anything else. It is stopped,
//! and its VMM ended where it does not stop. The source hears of that only once the end is in the journal; until then it
//! tells again, also a restarted agent that has resumed the guest.

use std::time::Duration;

use super::phase::Phase;
use super::{Destination, DestinationAction, DestinationEvent, DestinationOutcome};
use crate::limits::{DISCARD, RELEASE, RESUME_ANSWER, RETRY_FIRST, STOP};
use crate::retry::Retry;
use crate::trouble::Trouble;
use crate::{Failure, Reason};

/// Memory that is still at the source.
#[derive(Clone, Debug)]
pub(super) struct Owed {
    retry: Retry,
    pulled_at: Option<Duration>,
    links: Option<Trouble>,
    stream: Option<Trouble>,
}

impl Default for Owed {
    fn default() -> Self {
        Self { retry: Retry::new(None), pulled_at: None, links: None, stream: None }
    }
}

impl Owed {
    pub(super) fn trouble(&self) -> Option<&Trouble> {
        self.links.as_ref().or(self.stream.as_ref())
    }

    fn interrupted(&mut self, now: Duration, failure: Failure) {
        Trouble::note(&mut self.links, now, failure);
        if self.retry.at().is_none() {
            self.retry.put_off(now);
        }
    }

    fn stream_lost(&mut self, now: Duration) {
        let message = "the control stream from the source's agent ended. The guest runs here, and memory that it needs is \
                       still there: see that both agents run and reach each other";
        Trouble::note(&mut self.stream, now, Failure::new(Reason::PeerLost, message));
    }

    /// Where links are waited for, they are tried as soon as that makes sense.
    fn peer_back(&mut self, now: Duration) {
        self.stream = None;
        if self.retry.at().is_some() {
            let not_before = self.pulled_at.map_or(now, |pulled_at| pulled_at.saturating_add(RETRY_FIRST));
            self.retry.ordered(Some(not_before.max(now)));
        }
    }
}

impl Destination {
    /// When what is owed is to be asked for again.
    pub(super) fn pull_at(&self) -> Option<Duration> {
        let pulls = matches!(self.phase, Phase::Resuming(_) | Phase::Pulling);
        self.owed.as_ref().filter(|_| pulls)?.retry.at()
    }

    pub(super) fn pull(&mut self, now: Duration, actions: &mut Vec<DestinationAction>) {
        if let Some(owed) = &mut self.owed {
            owed.pulled_at = Some(now);
            actions.push(DestinationAction::Pull);
        }
    }

    pub(super) fn pulling(
        &mut self,
        now: Duration,
        event: DestinationEvent,
        actions: &mut Vec<DestinationAction>,
    ) {
        match event {
            DestinationEvent::Commit | DestinationEvent::AskOutcome => {
                actions.push(DestinationAction::AnswerRunning { memory_owed: true });
            }
            DestinationEvent::GuestGone(_) => self.runs(now, actions),
            event => self.pull_answered(now, event, actions),
        }
        if self.owed.is_none() && matches!(self.phase, Phase::Pulling) {
            self.runs(now, actions);
        }
    }

    /// While memory is owed, whether the guest was seen to run or not yet.
    pub(super) fn pull_answered(
        &mut self,
        now: Duration,
        event: DestinationEvent,
        actions: &mut Vec<DestinationAction>,
    ) {
        let Some(owed) = &mut self.owed else { return };
        match event {
            DestinationEvent::Pulled => self.owed = None,
            DestinationEvent::PullResumed => {
                owed.links = None;
                owed.retry.done();
            }
            DestinationEvent::Failed(failure) => owed.interrupted(now, failure),
            DestinationEvent::PeerLost => owed.stream_lost(now),
            DestinationEvent::PeerBack => owed.peer_back(now),
            DestinationEvent::Tick if owed.retry.is_due(now) => {
                owed.retry.put_off(now);
                self.pull(now, actions);
            }
            DestinationEvent::MemoryLost(failure) => self.stop(now, &failure, actions),
            _ => {}
        }
    }

    fn stop(&mut self, now: Duration, cause: &Failure, actions: &mut Vec<DestinationAction>) {
        let cause = Failure::memory_lost(cause);
        let retry = Retry::new(Some(now.saturating_add(RESUME_ANSWER)));
        self.owed = None;
        self.enter(Phase::Stopping { cause, retry, discards: false }, Some(now.saturating_add(STOP)));
        actions.push(DestinationAction::StopGuest);
    }

    pub(super) fn stopping(
        &mut self,
        now: Duration,
        event: DestinationEvent,
        actions: &mut Vec<DestinationAction>,
    ) {
        let Phase::Stopping { cause, retry, discards } = &mut self.phase else { return };
        let order = |discards| match discards {
            true => DestinationAction::DiscardGuest,
            false => DestinationAction::StopGuest,
        };
        match event {
            DestinationEvent::GuestStopped
            | DestinationEvent::GuestDiscarded
            | DestinationEvent::GuestGone(_) => self.stopped(now, actions),
            DestinationEvent::Failed(failure) if failure.reason == Reason::GuestFailed => {
                retry.put_off(now);
                Trouble::note(&mut self.trouble, now, failure);
            }
            DestinationEvent::Tick if self.limit.is_some_and(|limit| limit <= now) => {
                if *discards {
                    cause.message.push_str(". It could not be stopped, nor its VMM be ended: end it by hand");
                    return self.stopped(now, actions);
                }
                *discards = true;
                *retry = Retry::new(Some(now.saturating_add(RESUME_ANSWER)));
                self.limit = Some(now.saturating_add(DISCARD));
                actions.push(order(true));
            }
            DestinationEvent::Tick if retry.is_due(now) => {
                retry.ordered(Some(now.saturating_add(RESUME_ANSWER)));
                actions.push(order(*discards));
            }
            _ => {}
        }
    }

    fn stopped(&mut self, now: Duration, actions: &mut Vec<DestinationAction>) {
        let Phase::Stopping { cause, .. } = &self.phase else { return };
        self.enter(Phase::Lost { cause: cause.clone() }, Some(now.saturating_add(RELEASE)));
        actions.push(DestinationAction::Release);
    }

    pub(super) fn ends_lost(&mut self, cause: Failure, actions: &mut Vec<DestinationAction>) {
        actions.extend([
            DestinationAction::Finish(DestinationOutcome::Lost(cause.clone())),
            DestinationAction::AnswerLost(cause.clone()),
        ]);
        self.enter(Phase::EndedLost { cause }, None);
    }
}
