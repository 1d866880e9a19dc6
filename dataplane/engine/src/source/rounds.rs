//! Rounds while the guest runs.

use std::time::Duration;

use ramferry_ram::PageSets;

use super::phase::Phase;
use super::{Source, SourceAction, SourceEvent};
use crate::convergence::{Convergence, Verdict};
use crate::limits::ROUND_INTERVAL;
use crate::{Postcopy, Round, TimeoutAction};

impl Source {
    pub(super) fn rounds_answered(
        &mut self,
        now: Duration,
        answer: SourceEvent,
        actions: &mut Vec<SourceAction>,
    ) {
        match (&self.phase, answer) {
            (Phase::Prepare, SourceEvent::Prepared { pages, fixed }) => {
                self.convergence = Convergence::new(fixed);
                self.progress.setup_time = Some(now.saturating_sub(self.started_at));
                self.last_harvest_at = now;
                if self.leaves_at_once() {
                    self.owed = Some(pages);
                    return self.pause(now, true, actions);
                }
                if let Some(limit) = self.parameters.bandwidth_limit {
                    actions.push(SourceAction::SetBandwidthLimit(Some(limit)));
                }
                self.copy(now, Phase::Copy, pages, actions);
            }
            (Phase::Copy, SourceEvent::Copied { data_bytes, zero_bytes, elapsed, complete, unsent }) => {
                self.note_round(data_bytes, zero_bytes, elapsed);
                self.late.settled_round_ended();
                self.owed = (!complete).then_some(unsent);
                self.enter(now, Phase::Fence);
                actions.push(SourceAction::Fence);
            }
            (Phase::Fence, SourceEvent::Fenced { elapsed }) => {
                self.convergence.fenced(elapsed);
                self.enter(now, Phase::Acknowledge);
                actions.push(SourceAction::EndRound { round: self.progress.round });
            }
            (Phase::Acknowledge, SourceEvent::RoundEnded { round }) if round == self.progress.round => {
                self.convergence.acknowledged(self.phase_took(now));
                self.harvest_when_due(now, actions);
            }
            (Phase::Harvest, SourceEvent::Harvested { written, elapsed }) => {
                let pages = self.note_harvest(now, written, elapsed);
                self.judge(now, pages, actions);
            }
            (Phase::Drain, SourceEvent::Drained { complete }) => {
                self.late.drained(complete);
                if self.leaves_at_once() {
                    return self.pause(now, true, actions);
                }
                self.recheck(now, actions);
            }
            // Cut short: it settles nothing.
            (Phase::Recheck, SourceEvent::Rechecked { differing, .. }) if self.leaves_at_once() => {
                self.owed = Some(self.take_owed_and(differing));
                self.pause(now, true, actions);
            }
            (Phase::Recheck, SourceEvent::Rechecked { differing, checked_bytes, elapsed }) => {
                self.note_recheck(&differing, checked_bytes, elapsed);
                self.late.settled();
                let pages = self.take_owed_and(differing);
                self.copy(now, Phase::Copy, pages, actions);
            }
            _ => {}
        }
    }

    fn harvest_when_due(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        let due = self.last_harvest_at.saturating_add(ROUND_INTERVAL);
        if now < due && !self.forced && !self.leaves_at_once() {
            self.enter(now, Phase::Wait);
            self.phase_limit = Some(due);
        } else {
            self.harvest(now, actions);
        }
    }

    pub(super) fn harvest(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        self.enter(now, Phase::Harvest);
        actions.push(SourceAction::Harvest);
    }

    fn judge(&mut self, now: Duration, pages: PageSets, actions: &mut Vec<SourceAction>) {
        let owed_bytes = pages.bytes();
        let recheck = self.late.recheck_due();
        self.progress.expected_downtime = self.convergence.expected_downtime(owed_bytes, recheck.bytes);
        let verdict = self.convergence.judge(now, owed_bytes, recheck, &self.parameters);
        if self.is_for_postcopy(verdict) {
            self.owed = Some(pages);
            return self.pause(now, true, actions);
        }
        let verdict = self.throttled(now, verdict, owed_bytes, actions);
        let or_fail = self.parameters.timeout_action == TimeoutAction::Cancel;
        match verdict {
            Verdict::SwitchOver if !self.forced && self.shortens(owed_bytes) => {
                self.copy(now, Phase::Copy, pages, actions);
            }
            Verdict::NextRound if !self.forced => self.copy(now, Phase::Copy, pages, actions),
            Verdict::Settle if !self.forced => self.settle(now, pages, actions),
            Verdict::NotConverging if !self.forced && or_fail => {
                let failure = self.convergence.not_converging(owed_bytes, recheck.bytes, &self.parameters);
                self.fail(now, self.and_throttle(failure), actions);
            }
            _ if recheck.never_settled => self.settle(now, pages, actions),
            _ => {
                self.owed = Some(pages);
                self.pause(now, false, actions);
            }
        }
    }

    /// Whether a round more is made although the downtime is short enough. What it sends would have to be rechecked at the
    /// pause, where pages are filled late.
    fn shortens(&mut self, owed_bytes: u64) -> bool {
        let downtime = self.progress.expected_downtime.filter(|_| !self.late.is_expected());
        downtime.is_some_and(|downtime| self.convergence.shortens(owed_bytes, downtime))
    }

    /// Whether the switchover begins now, and leads into post-copy. There nothing has to be settled first: what is
    /// not will be owed.
    fn is_for_postcopy(&self, verdict: Verdict) -> bool {
        let hurried = self.forced || self.leaves_at_once();
        match self.parameters.postcopy {
            Postcopy::Never => false,
            Postcopy::Allow => {
                verdict == Verdict::NotConverging || (hurried && verdict != Verdict::SwitchOver)
            }
            Postcopy::Always => true,
        }
    }

    /// Begins the switchover; all that no round carries is in `owed`.
    fn pause(&mut self, now: Duration, postcopy: bool, actions: &mut Vec<SourceAction>) {
        self.enter(now, Phase::Pause { postcopy });
        actions.push(SourceAction::PauseGuest { postcopy });
    }

    /// Begins the next round with `pages`, in `phase`.
    pub(super) fn copy(
        &mut self,
        now: Duration,
        phase: Phase,
        pages: PageSets,
        actions: &mut Vec<SourceAction>,
    ) {
        self.progress.round = self.progress.round.saturating_add(1);
        self.progress.remaining_bytes = pages.bytes();
        self.late.copied(&pages);
        self.enter(now, phase);
        actions.push(SourceAction::Copy { round: self.progress.round, pages });
    }

    pub(super) fn note_round(&mut self, transferred_bytes: u64, zero_bytes: u64, elapsed: Duration) {
        let number = self.progress.round;
        let round = Round { number, transferred_bytes, zero_bytes, elapsed, dirtied_bytes: 0 };
        self.progress.add_round(round);
        self.convergence.copied(&round);
        self.progress.throughput = self.convergence.throughput();
    }

    /// Counts what the guest wrote; all that is owed now.
    pub(super) fn note_harvest(&mut self, now: Duration, written: PageSets, elapsed: Duration) -> PageSets {
        let written_bytes = written.bytes();
        let interval = now.saturating_sub(self.last_harvest_at);
        self.last_harvest_at = now;
        self.convergence.harvested(written_bytes, interval, elapsed);
        self.progress.add_dirtied(written_bytes);
        self.progress.dirty_rate = self.convergence.dirty_rate();

        let pages = self.take_owed_and(written);
        self.progress.remaining_bytes = pages.bytes();
        pages
    }

    pub(super) fn take_owed_and(&mut self, mut pages: PageSets) -> PageSets {
        if let Some(owed) = self.owed.take() {
            pages.union_with(&owed);
        }
        pages
    }
}
