//! From the guest's pause to the answer to COMMIT.
//!
//! The last fence proves that every write is placed. The destination's acknowledgement adds its word that its links
//! and its RAM are sound: HANDED_OVER needs that, the device state does not. So the two go side by side, unless RAM is
//! compared, which takes both sides' word that it is complete.

use std::time::Duration;

use ramferry_ram::PageSets;

use super::ending::Plan;
use super::phase::Phase;
use super::{Outcome, Source, SourceAction, SourceEvent};
use crate::limits::{LAST_COPY, LAST_COPY_FACTOR, RETRY_FIRST};
use crate::retry::Retry;
use crate::{Failure, Reason};

impl Source {
    pub(super) fn switchover_answered(
        &mut self,
        now: Duration,
        answer: SourceEvent,
        actions: &mut Vec<SourceAction>,
    ) {
        let took = self.phase_took(now);
        match (&mut self.phase, answer) {
            (Phase::Pause, SourceEvent::GuestPaused) => {
                self.paused_at = Some(now);
                self.progress.downtime_parts.pause = took;
                self.next(now, Phase::LastHarvest, SourceAction::Harvest, actions);
            }
            (Phase::LastHarvest, SourceEvent::Harvested { written, elapsed }) => {
                self.progress.downtime_parts.harvest = took;
                let pages = self.note_harvest(now, written, elapsed);
                if self.parameters.bandwidth_limit.is_some() {
                    actions.push(SourceAction::SetBandwidthLimit(None));
                }
                match self.late.unsettled_but(&pages) {
                    Some(unsettled) => {
                        self.owed = Some(pages);
                        let recheck = SourceAction::Recheck { pages: unsettled };
                        self.next(now, Phase::LastRecheck, recheck, actions);
                    }
                    None => self.last_copy(now, pages, actions),
                }
            }
            (Phase::LastRecheck, SourceEvent::Rechecked { differing, checked_bytes, elapsed }) => {
                self.progress.downtime_parts.recheck = took;
                self.note_recheck(&differing, checked_bytes, elapsed);
                let pages = self.take_owed_and(differing);
                self.last_copy(now, pages, actions);
            }
            (Phase::LastCopy, SourceEvent::Copied { complete: false, .. }) => {
                let message = "the last round ended with pages unsent";
                self.fail(now, Failure::new(Reason::Internal, message), actions);
            }
            (Phase::LastCopy, SourceEvent::Copied { data_bytes, zero_bytes, elapsed, .. }) => {
                self.progress.downtime_parts.copy = took;
                self.note_round(data_bytes, zero_bytes, elapsed);
                self.progress.remaining_bytes = 0;
                self.next(now, Phase::LastFence, SourceAction::Fence, actions);
            }
            (Phase::LastFence, SourceEvent::Fenced { .. }) => {
                self.progress.downtime_parts.fence = took;
                actions.push(SourceAction::EndRound { round: self.progress.round });
                if self.parameters.verify {
                    self.enter(now, Phase::LastAcknowledge { device_state_moved: false });
                } else {
                    self.move_device_state(now, false, actions);
                }
            }
            (Phase::LastAcknowledge { device_state_moved }, SourceEvent::RoundEnded { round })
                if round == self.progress.round =>
            {
                self.progress.downtime_parts.acknowledge = took;
                if *device_state_moved {
                    self.next(now, Phase::Handover, SourceAction::WriteHandedOver, actions);
                } else {
                    self.next(now, Phase::Verify, SourceAction::Verify, actions);
                }
            }
            (Phase::Verify, SourceEvent::Verified { equal }) => {
                self.progress.downtime_parts.verify = took;
                self.verified(now, equal, actions);
            }
            (Phase::DeviceState { acknowledged }, SourceEvent::RoundEnded { round })
                if round == self.progress.round =>
            {
                *acknowledged = true;
            }
            (Phase::DeviceState { acknowledged }, SourceEvent::DeviceStateMoved) => {
                self.progress.downtime_parts.device_state = took;
                if *acknowledged {
                    self.next(now, Phase::Handover, SourceAction::WriteHandedOver, actions);
                } else {
                    self.enter(now, Phase::LastAcknowledge { device_state_moved: true });
                }
            }
            (Phase::Handover, SourceEvent::HandedOverSynced) => {
                self.progress.downtime_parts.journal = took;
                self.commit_at = Some(now);
                self.next(now, Phase::Commit, SourceAction::SendCommit, actions);
            }
            _ => {}
        }
    }

    fn last_copy(&mut self, now: Duration, pages: PageSets, actions: &mut Vec<SourceAction>) {
        let expected = self.convergence.copy_time(pages.bytes()).unwrap_or_default();
        self.copy(now, Phase::LastCopy, pages, actions);
        let limit = LAST_COPY.max(expected.saturating_mul(LAST_COPY_FACTOR));
        self.phase_limit = Some(now.saturating_add(limit));
    }

    fn move_device_state(&mut self, now: Duration, acknowledged: bool, actions: &mut Vec<SourceAction>) {
        let phase = Phase::DeviceState { acknowledged };
        self.next(now, phase, SourceAction::MoveDeviceState, actions);
    }

    fn next(&mut self, now: Duration, phase: Phase, action: SourceAction, actions: &mut Vec<SourceAction>) {
        self.enter(now, phase);
        actions.push(action);
    }

    fn verified(&mut self, now: Duration, equal: bool, actions: &mut Vec<SourceAction>) {
        self.progress.verified = Some(equal);
        if equal {
            self.move_device_state(now, true, actions);
        } else {
            let message = "RAM at the destination differs from the source's after the last round: something \
                           writes it that is not tracked. The guest runs on at the source";
            self.fail(now, Failure::new(Reason::VerifyFailed, message), actions);
        }
    }

    /// Below the line: only the destination's answer ends the doubt. Nothing else resumes the guest or gives up,
    /// however often it has to be asked.
    pub(super) fn in_doubt(&mut self, now: Duration, event: SourceEvent, actions: &mut Vec<SourceAction>) {
        match event {
            SourceEvent::DestinationRunning => self.destination_runs(now, actions),
            SourceEvent::DestinationAborted(cause) => self.destination_aborted(now, &cause, actions),
            SourceEvent::PeerLost => {
                let message = "the control stream to the destination's agent ended, and whether the guest runs \
                               there is not known. It is asked until it answers: see that its agent runs and can \
                               be reached";
                self.doubt(now, Failure::new(Reason::PeerLost, message));
            }
            SourceEvent::Failed(failure) | SourceEvent::GuestGone(failure) => self.doubt(now, failure),
            SourceEvent::Start => self.ask_outcome(now, actions),
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
            self.ask_outcome(now, actions);
        }
    }

    /// An answer may be on its way already: gives it time before it asks.
    fn doubt(&mut self, now: Duration, failure: Failure) {
        self.doubt = Some(failure);
        if matches!(self.phase, Phase::Commit) {
            self.enter(now, Phase::Ask);
            self.ask = Retry::new(Some(now.saturating_add(RETRY_FIRST)));
        }
    }

    /// Asks at once, unless it has just asked: a stream that comes and goes must not make it spin.
    fn peer_back(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        let not_before = self.asked_at.map(|asked_at| asked_at.saturating_add(RETRY_FIRST));
        match not_before {
            Some(not_before) if now < not_before => self.ask.ordered(Some(not_before)),
            _ => self.ask_outcome(now, actions),
        }
    }

    fn ask_outcome(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        if matches!(self.phase, Phase::Commit) {
            self.enter(now, Phase::Ask);
        }
        self.ask.put_off(now);
        self.asked_at = Some(now);
        actions.push(SourceAction::AskOutcome);
    }

    fn destination_runs(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        if let (Some(paused_at), Some(commit_at)) = (self.paused_at, self.commit_at) {
            self.progress.downtime_parts.commit = now.saturating_sub(commit_at);
            self.progress.downtime = Some(now.saturating_sub(paused_at));
            self.progress.total_time = Some(now.saturating_sub(self.started_at));
        }
        let outcome = Outcome::Succeeded;
        let plan = Plan { outcome, resume_guest: false, stop_copy: false, abort_peer: None };
        self.end(now, plan, actions);
    }
}
