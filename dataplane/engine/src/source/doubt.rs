//! Below the line: COMMIT was sent, and only the destination knows who runs the guest.

use std::time::Duration;

use super::ending::{Guest, Plan};
use super::phase::Phase;
use super::{Outcome, Source, SourceAction, SourceEvent};
use crate::limits::RETRY_FIRST;
use crate::retry::Retry;
use crate::trouble::Trouble;
use crate::{Failure, Reason, State};

impl Source {
    /// Only the destination's answer ends the doubt. Nothing else resumes the guest or gives up, however often it has
    /// to be asked.
    pub(super) fn in_doubt(&mut self, now: Duration, event: SourceEvent, actions: &mut Vec<SourceAction>) {
        match event {
            SourceEvent::DestinationRunning { memory_owed } => {
                self.destination_runs(now, memory_owed, actions);
            }
            SourceEvent::DestinationAborted(cause) => self.destination_aborted(now, &cause, actions),
            SourceEvent::DestinationLost(cause) => self.destination_lost(now, &cause, actions),
            SourceEvent::MemoryLost(failure) => self.memory_lost = Some(failure),
            SourceEvent::PeerLost => {
                let message = "the control stream to the destination's agent ended, and whether the guest runs \
                               there is not known. It is asked until it answers: see that its agent runs and can \
                               be reached";
                self.doubt(now, Failure::new(Reason::PeerLost, message));
            }
            SourceEvent::Failed(failure) | SourceEvent::GuestGone(failure) => self.doubt(now, failure),
            SourceEvent::Start => self.ask(now, actions),
            SourceEvent::PeerBack => self.peer_back(now, actions),
            SourceEvent::Tick => self.in_doubt_tick(now, actions),
            _ => {}
        }
    }

    fn in_doubt_tick(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        let unanswered =
            matches!(self.phase, Phase::Commit) && self.phase_limit.is_some_and(|limit| limit <= now);
        let due = matches!(self.phase, Phase::Ask) && self.ask.is_due(now);
        if unanswered || due {
            self.ask(now, actions);
        }
    }

    /// An answer may be on its way already: gives it time before it asks.
    fn doubt(&mut self, now: Duration, failure: Failure) {
        Trouble::note(&mut self.doubt, now, failure);
        if matches!(self.phase, Phase::Commit) {
            self.enter(now, Phase::Ask);
            self.ask = Retry::new(Some(now.saturating_add(RETRY_FIRST)));
        }
    }

    /// Asks at once, unless it has just asked: a stream that comes and goes must not make it spin.
    pub(super) fn peer_back(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        let not_before = self.asked_at.map(|asked_at| asked_at.saturating_add(RETRY_FIRST));
        match not_before {
            Some(not_before) if now < not_before => self.ask.ordered(Some(not_before)),
            _ => self.ask(now, actions),
        }
    }

    /// Asks the destination what the phase has to know of it, and will again if no answer comes.
    pub(super) fn ask(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        if matches!(self.phase, Phase::Commit) {
            self.enter(now, Phase::Ask);
        }
        self.ask.put_off(now);
        self.asked_at = Some(now);
        actions.push(match &self.phase {
            Phase::Serve { lost: None } => SourceAction::Reconnect,
            Phase::Serve { lost: Some(failure) } => SourceAction::TellMemoryLost(failure.clone()),
            _ => SourceAction::AskOutcome,
        });
    }

    fn destination_runs(&mut self, now: Duration, memory_owed: bool, actions: &mut Vec<SourceAction>) {
        if let (Some(paused_at), Some(commit_at)) = (self.paused_at, self.commit_at) {
            self.progress.downtime_parts.commit = now.saturating_sub(commit_at);
            self.progress.downtime = Some(now.saturating_sub(paused_at));
            self.progress.total_time = Some(now.saturating_sub(self.started_at));
            self.resumed_at = Some(now);
        }
        if memory_owed {
            self.serve(now, actions);
        } else {
            self.has_everything(now, State::SwitchingOver, actions);
        }
    }

    /// The destination needs nothing of this side any more.
    pub(super) fn has_everything(&mut self, now: Duration, state: State, actions: &mut Vec<SourceAction>) {
        self.progress.remaining_bytes = 0;
        if self.progress.postcopy {
            self.progress.postcopy_time = self.resumed_at.map(|resumed_at| now.saturating_sub(resumed_at));
        }
        self.let_go(now, Outcome::Succeeded, state, actions);
    }

    pub(super) fn destination_lost(
        &mut self,
        now: Duration,
        cause: &Failure,
        actions: &mut Vec<SourceAction>,
    ) {
        let outcome = Outcome::Lost(Failure::memory_lost(cause));
        self.let_go(now, outcome, State::Postcopy, actions);
    }

    fn let_go(&mut self, now: Duration, outcome: Outcome, state: State, actions: &mut Vec<SourceAction>) {
        let guest = Guest::Left { state };
        self.end(now, Plan { outcome, guest, stop_copy: false, abort_peer: None }, actions);
    }
}
