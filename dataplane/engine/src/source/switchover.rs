//! From the guest's pause to COMMIT.
//!
//! The last fence proves that every write is placed. The destination's acknowledgement adds its word that its links
//! and its RAM are sound: HANDED_OVER needs that, the device state does not. So the two go side by side, unless RAM is
//! compared, which takes both sides' word that it is complete.
//!
//! Into post-copy there is no last round: the last fence was the last round's while the guest ran, and nothing is sent
//! since. The destination must hold what it is owed before its VMM loads device state, for that reads RAM.
//!
//! The VMM saves its device state from the pause on, beside the harvest and the last round: that takes as long as either. Where
//! RAM is compared it saves behind that, for a VMM that fails to save lets its guest run.

use std::time::Duration;

use ramferry_ram::PageSets;

use super::phase::Phase;
use super::{Source, SourceAction, SourceEvent};
use crate::limits::{LAST_COPY, LAST_COPY_FACTOR};
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
            (Phase::Pause { postcopy }, SourceEvent::GuestPaused) => {
                let postcopy = *postcopy;
                self.paused_at = Some(now);
                self.progress.downtime_parts.pause = took;
                if !self.parameters.verify {
                    self.save_device_state(actions);
                }
                self.next(now, Phase::LastHarvest { postcopy }, SourceAction::Harvest, actions);
                // Not before: what it then wrote until its pause would be more than was expected.
                self.lift_throttle(now, actions);
            }
            (Phase::LastHarvest { postcopy }, SourceEvent::Harvested { written, elapsed }) => {
                let postcopy = *postcopy;
                self.progress.downtime_parts.harvest = took;
                let pages = self.note_harvest(now, written, elapsed);
                if postcopy {
                    self.owe(now, pages, actions);
                } else {
                    self.last_round(now, pages, actions);
                }
            }
            (Phase::SendOwed, SourceEvent::OwedAccepted) => {
                self.progress.downtime_parts.owed = took;
                self.move_device_state(now, true, actions);
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

    /// Into post-copy: nothing is copied any more. Where nothing is owed, an ordinary switchover is as short.
    fn owe(&mut self, now: Duration, pages: PageSets, actions: &mut Vec<SourceAction>) {
        let pages = self.late.and_unsettled(pages);
        if pages.is_empty() {
            return self.last_round(now, pages, actions);
        }
        self.progress.postcopy = true;
        self.progress.remaining_bytes = pages.bytes();
        self.next(now, Phase::SendOwed, SourceAction::SendOwed { pages }, actions);
    }

    fn last_round(&mut self, now: Duration, pages: PageSets, actions: &mut Vec<SourceAction>) {
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

    fn last_copy(&mut self, now: Duration, pages: PageSets, actions: &mut Vec<SourceAction>) {
        let expected = self.convergence.copy_time(pages.bytes()).unwrap_or_default();
        self.copy(now, Phase::LastCopy, pages, actions);
        let limit = LAST_COPY.max(expected.saturating_mul(LAST_COPY_FACTOR));
        self.phase_limit = Some(now.saturating_add(limit));
    }

    fn move_device_state(&mut self, now: Duration, acknowledged: bool, actions: &mut Vec<SourceAction>) {
        self.enter(now, Phase::DeviceState { acknowledged });
        if !self.device_state_saved {
            self.save_device_state(actions);
        }
        actions.push(SourceAction::MoveDeviceState);
    }

    fn save_device_state(&mut self, actions: &mut Vec<SourceAction>) {
        self.device_state_saved = true;
        actions.push(SourceAction::SaveDeviceState);
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
}
