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
        let ended = self.source.outcome.is_some() && self.destination.outcome.is_some();
        self.checker.require(ended, Violation::Unfinished);
        if self.source.says_lost() || self.destination.says_lost() {
            return self.check_lost();
        }
        let destination_runs = self.destination_vmm.running;
        let could_tell = self.died_uncommitted_in == Some(self.destination.life);
        if self.destination_vmm.dead && self.has_committed() && !could_tell {
            return; // It died as any guest may that has moved.
        }
        self.checker.require(self.source_vmm.running || destination_runs, Violation::NeitherRuns);
        self.checker.require(!(self.source_vmm.running && destination_runs), Violation::BothRun);
        let source_agrees = self.source.says_moved() == Some(destination_runs);
        let destination_agrees = self.destination.says_running() == Some(destination_runs);
        self.checker.require(source_agrees && destination_agrees, Violation::WrongOutcome);
        if destination_runs {
            let is_whole = !self.owed.any() && self.destination_vmm.ram == self.owed.truth;
            self.checker.require(is_whole, Violation::Differs);
        }
    }

    /// The guest lost its memory on its way, and both sides say so, unless it was lost with its VMM before.
    fn check_lost(&mut self) {
        self.checker.require(self.owed.is_lost && self.moved, Violation::WrongOutcome);
        let both_say = self.source.says_lost() && self.destination.says_lost();
        self.checker.require(both_say, Violation::WrongOutcome);
        let none_runs = !self.source_vmm.running && !self.destination_vmm.running;
        self.checker.require(none_runs, Violation::RunsOn);
    }
}
