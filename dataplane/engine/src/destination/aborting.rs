//! The guest never runs here.

use std::time::Duration;

use super::phase::Phase;
use super::{Destination, DestinationAction, DestinationEvent, DestinationOutcome, answer};
use crate::retry::Retry;
use crate::trouble::Trouble;
use crate::{Failure, Reason, limits};

impl Destination {
    /// Must not be called once the guest was ordered to resume.
    pub(super) fn abort(&mut self, cause: Failure, actions: &mut Vec<DestinationAction>) {
        assert!(!self.phase.may_have_run(), "the guest may have run here");
        self.owed = None;
        actions.extend([DestinationAction::WriteAborted(cause.clone()), DestinationAction::Release]);
        self.enter(Phase::Aborting { cause, write: Retry::new(None), released: false }, None);
    }

    /// ABORTED is being written. It is not written anew before the write under way has failed: records must not
    /// change places. There is no giving up: without the record there is no answer to the source, which may be
    /// waiting for it with its guest paused.
    pub(super) fn aborting(
        &mut self,
        now: Duration,
        event: DestinationEvent,
        actions: &mut Vec<DestinationAction>,
    ) {
        let Phase::Aborting { cause, write, released } = &mut self.phase else { return };
        match event {
            DestinationEvent::AbortedSynced => {
                let (cause, released) = (cause.clone(), *released);
                self.discard(now, cause, released, actions);
            }
            DestinationEvent::Released => *released = true,
            DestinationEvent::Failed(failure) if failure.reason == Reason::JournalFailed => {
                write.put_off(now);
                Trouble::note(&mut self.trouble, now, failure);
            }
            DestinationEvent::Tick if write.is_due(now) => {
                write.ordered(None);
                actions.push(DestinationAction::WriteAborted(cause.clone()));
            }
            _ => {}
        }
    }

    pub(super) fn discard(
        &mut self,
        now: Duration,
        cause: Failure,
        released: bool,
        actions: &mut Vec<DestinationAction>,
    ) {
        actions.extend([DestinationAction::AnswerAborted(cause.clone()), DestinationAction::DiscardGuest]);
        let discard = Some(Retry::new(None));
        let limit = Some(now.saturating_add(limits::DISCARD));
        self.enter(Phase::Discarding { cause, discard, released }, limit);
    }

    pub(super) fn discarding(
        &mut self,
        now: Duration,
        event: &DestinationEvent,
        actions: &mut Vec<DestinationAction>,
    ) {
        let Phase::Discarding { cause, discard, released } = &mut self.phase else { return };
        match event {
            DestinationEvent::GuestDiscarded => *discard = None,
            DestinationEvent::Released => *released = true,
            DestinationEvent::Failed(failure) if failure.reason == Reason::GuestFailed => {
                if let Some(retry) = discard {
                    retry.put_off(now);
                    Trouble::note(&mut self.trouble, now, failure.clone());
                }
            }
            DestinationEvent::Tick if self.limit.is_some_and(|limit| limit <= now) => {
                *discard = None;
                *released = true;
            }
            DestinationEvent::Tick => {
                if let Some(retry) = discard.as_mut().filter(|retry| retry.is_due(now)) {
                    retry.ordered(None);
                    actions.push(DestinationAction::DiscardGuest);
                }
            }
            _ => answer(event, DestinationAction::AnswerAborted(cause.clone()), actions),
        }
        if discard.is_none() && *released {
            let cause = cause.clone();
            self.enter(Phase::EndedAborted { cause: cause.clone() }, None);
            actions.push(DestinationAction::Finish(DestinationOutcome::Aborted(cause)));
        }
    }
}
