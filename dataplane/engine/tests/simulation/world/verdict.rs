//! What must hold at the end.

use super::World;
use super::happening::is_pending;
use crate::checker::Violation;

impl World {
    /// Whether both sides came to their ends and nothing is left that could change that.
    pub(super) fn is_settled(&self) -> bool {
        let ended = self.source.outcome.is_some() && self.destination.outcome.is_some();
        ended && self.source.is_up && self.destination.is_up && !self.queue.values().any(is_pending)
    }

    pub(super) fn check_end(&mut self) {
        let destination_runs = self.destination_vmm.running;
        let could_tell = self.died_uncommitted_in == Some(self.destination.life);
        if self.destination_vmm.dead && self.has_committed() && !could_tell {
            return; // It died as any guest may that has moved.
        }
        self.checker.require(self.source_vmm.running || destination_runs, Violation::NeitherRuns);
        self.checker.require(!(self.source_vmm.running && destination_runs), Violation::BothRun);
        let ended = self.source.outcome.is_some() && self.destination.outcome.is_some();
        self.checker.require(ended, Violation::Unfinished);
        let source_agrees = self.source.says_moved() == Some(destination_runs);
        let destination_agrees = self.destination.says_running() == Some(destination_runs);
        self.checker.require(source_agrees && destination_agrees, Violation::WrongOutcome);
    }
}
