//! A destination whose every move is checked against the rules of who may run the guest.

use std::time::Duration;

use ramferry_engine::{
    Destination, DestinationAction, DestinationEvent, DestinationOutcome, Failure, Reason, limits,
};
use ramferry_ram::PageSets;

use crate::source_harness::pages;

pub(crate) fn failure(reason: Reason) -> Failure {
    Failure::new(reason, "for a test")
}

pub(crate) fn failed(reason: Reason) -> DestinationEvent {
    DestinationEvent::Failed(failure(reason))
}

/// Each step of a migration that goes well, and the event that leads to the next.
pub(crate) fn good_path() -> Vec<(&'static str, DestinationEvent)> {
    vec![
        ("pending", DestinationEvent::Start),
        ("prepare", DestinationEvent::Prepared),
        ("receive", DestinationEvent::EndRound { round: 1 }),
        ("drain", DestinationEvent::RoundDrained { round: 1 }),
        ("receive", DestinationEvent::PrepareIncoming { postcopy: false }),
        ("incoming", DestinationEvent::IncomingReady),
        ("receive_last", DestinationEvent::EndRound { round: 2 }),
        ("drain", DestinationEvent::RoundDrained { round: 2 }),
        ("receive_last", DestinationEvent::Verify),
        ("verify", DestinationEvent::Verified),
        ("receive_last", DestinationEvent::DeviceStateLoaded),
        ("loaded", DestinationEvent::Commit),
        ("commit", DestinationEvent::CommittedSynced),
        ("resume", DestinationEvent::GuestResumed),
        ("release", DestinationEvent::Released),
    ]
}

/// The same where RAM is not compared: the VMM has its device state before the last round is drained.
pub(crate) fn path_without_verify() -> Vec<(&'static str, DestinationEvent)> {
    let mut path = good_path();
    path.retain(|(phase, event)| *phase != "verify" && *event != DestinationEvent::Verify);
    let drain = path.iter().rposition(|(phase, _)| *phase == "drain").unwrap();
    assert_eq!(path.remove(drain + 1), ("receive_last", DestinationEvent::DeviceStateLoaded));
    path.insert(drain, ("drain", DestinationEvent::DeviceStateLoaded));
    path
}

pub(crate) fn owed() -> PageSets {
    pages(3)
}

/// A migration into post-copy.
pub(crate) fn postcopy_path() -> Vec<(&'static str, DestinationEvent)> {
    vec![
        ("pending", DestinationEvent::Start),
        ("prepare", DestinationEvent::Prepared),
        ("receive", DestinationEvent::PrepareIncoming { postcopy: true }),
        ("incoming", DestinationEvent::IncomingReady),
        ("receive_last", DestinationEvent::Owed { pages: owed() }),
        ("hold", DestinationEvent::OwedHeld),
        ("receive_last", DestinationEvent::DeviceStateLoaded),
        ("loaded", DestinationEvent::Commit),
        ("commit", DestinationEvent::CommittedSynced),
        ("resume", DestinationEvent::GuestResumed),
        ("pull", DestinationEvent::Pulled),
        ("release", DestinationEvent::Released),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    Nothing,
    Committed,
    Aborted,
}

#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub(crate) destination: Destination,
    pub(crate) now: Duration,
    pub(crate) actions: Vec<DestinationAction>,
    last_record: Last,
    write_pending: bool,
    resume_ordered: bool,
    resumed: bool,
    /// Memory is owed, and may not be there.
    owed: bool,
    /// The source told that it never will be.
    memory_lost: bool,
    /// The guest stands still for good, or its VMM is ended, or could not be.
    stopped: bool,
    finished: bool,
}

impl Checked {
    pub(crate) fn new() -> Self {
        Self::over(Destination::new(), Last::Nothing)
    }

    pub(crate) fn restarted_prepared() -> Self {
        Self::over(Destination::recover_prepared(), Last::Nothing)
    }

    pub(crate) fn restarted_committed() -> Self {
        Self::over(Destination::recover_committed(), Last::Committed)
    }

    pub(crate) fn restarted_postcopy() -> Self {
        Self { owed: true, ..Self::over(Destination::recover_postcopy(), Last::Committed) }
    }

    pub(crate) fn restarted_aborted() -> Self {
        Self::over(Destination::recover_aborted(failure(Reason::LinkLost)), Last::Aborted)
    }

    /// After `steps` of the good path.
    pub(crate) fn after(steps: usize) -> Self {
        Self::along(good_path().into_iter().take(steps))
    }

    /// Where the good path first comes to `phase`.
    pub(crate) fn at(phase: &str) -> Self {
        Self::on(good_path(), phase)
    }

    /// The same, on `path`.
    pub(crate) fn on(path: Vec<(&'static str, DestinationEvent)>, phase: &str) -> Self {
        let steps = path.iter().position(|(name, _)| *name == phase);
        let steps = steps.unwrap_or_else(|| panic!("{phase} is not on the path"));
        Self::along(path.into_iter().take(steps))
    }

    fn along(path: impl Iterator<Item = (&'static str, DestinationEvent)>) -> Self {
        let mut checked = Self::new();
        for (phase, event) in path {
            assert_eq!(checked.destination.phase(), phase);
            checked.handle(event);
        }
        checked
    }

    fn over(destination: Destination, last_record: Last) -> Self {
        Self {
            destination,
            now: Duration::from_millis(1),
            actions: Vec::new(),
            last_record,
            write_pending: false,
            resume_ordered: false,
            resumed: false,
            owed: false,
            memory_lost: false,
            stopped: false,
            finished: false,
        }
    }

    /// Handles `event`, checks what is done, and returns it.
    pub(crate) fn handle(&mut self, event: DestinationEvent) -> Vec<DestinationAction> {
        let pending_before = self.write_pending;
        match &event {
            DestinationEvent::CommittedSynced
                if self.write_pending && self.destination.phase() == "commit" =>
            {
                (self.last_record, self.write_pending) = (Last::Committed, false);
            }
            DestinationEvent::AbortedSynced if self.destination.phase() == "abort" => {
                (self.last_record, self.write_pending) = (Last::Aborted, false);
            }
            DestinationEvent::Failed(failure) if failure.reason == Reason::JournalFailed => {
                self.write_pending = false;
            }
            // One that is gone may have run.
            DestinationEvent::GuestResumed | DestinationEvent::GuestGone(_) if self.resume_ordered => {
                self.resumed = true;
            }
            _ => {}
        }
        self.note_memory(&event);
        let mut actions = Vec::new();
        self.destination.handle(self.now, event, &mut actions);
        for action in &actions {
            self.check(action, pending_before);
            self.actions.push(action.clone());
        }
        assert_eq!(self.destination.state().is_final(), self.finished);
        actions
    }

    fn note_memory(&mut self, event: &DestinationEvent) {
        let phase = self.destination.phase();
        match event {
            DestinationEvent::OwedHeld if phase == "hold" => self.owed = true,
            DestinationEvent::Pulled if self.resume_ordered && !self.memory_lost => self.owed = false,
            // There is no guest to owe anything to.
            DestinationEvent::GuestGone(_) if self.resume_ordered && !self.memory_lost => self.owed = false,
            DestinationEvent::MemoryLost(_) if ["resume", "pull"].contains(&phase) && self.owed => {
                self.memory_lost = true;
            }
            DestinationEvent::GuestStopped
            | DestinationEvent::GuestGone(_)
            | DestinationEvent::GuestDiscarded
                if phase == "stop" =>
            {
                self.stopped = true;
            }
            DestinationEvent::Tick if self.now >= limits::STOP + limits::DISCARD && phase == "stop" => {
                self.stopped = true;
            }
            _ => {}
        }
    }

    /// The same destination after `event`.
    pub(crate) fn then(&self, event: &DestinationEvent) -> Self {
        let mut checked = self.clone();
        checked.handle(event.clone());
        checked
    }

    /// The time passes until the next tick is due; false when none is.
    pub(crate) fn tick(&mut self) -> bool {
        let Some(deadline) = self.destination.deadline() else { return false };
        self.now = self.now.max(deadline);
        self.handle(DestinationEvent::Tick);
        true
    }

    pub(crate) fn times(&self, action: &DestinationAction) -> usize {
        self.actions.iter().filter(|done| *done == action).count()
    }

    fn check(&mut self, action: &DestinationAction, pending_before: bool) {
        let answers = matches!(
            action,
            DestinationAction::AnswerRunning { .. }
                | DestinationAction::AnswerAborted(_)
                | DestinationAction::AnswerLost(_)
        );
        assert!(!self.finished || answers, "{action:?} after the end");
        match action {
            DestinationAction::WriteCommitted => {
                assert_eq!(self.last_record, Last::Nothing);
                assert!(!self.write_pending);
                self.write_pending = true;
            }
            DestinationAction::WriteAborted(_) => {
                assert!(!self.write_pending, "two writes at once (pending before: {pending_before})");
                assert!(!self.resume_ordered, "aborts a guest that may run");
                self.write_pending = true;
            }
            DestinationAction::ResumeGuest => {
                assert_eq!(self.last_record, Last::Committed, "resumes before COMMITTED is durable");
                assert!(!self.memory_lost, "resumes on what is not its memory");
                self.resume_ordered = true;
            }
            DestinationAction::AnswerRunning { memory_owed } => {
                assert!(self.resumed, "says that it runs and it does not");
                assert_eq!(*memory_owed, self.owed, "the source lets go by this");
                assert!(!self.memory_lost);
            }
            DestinationAction::AnswerLost(_) => {
                assert!(self.memory_lost && self.stopped, "it may run on");
                assert!(self.finished, "a restart would resume it, and the source not tell again");
            }
            DestinationAction::Pull => {
                assert!(self.owed && self.resume_ordered && !self.memory_lost);
            }
            DestinationAction::StopGuest => assert!(self.owed && self.memory_lost && !self.stopped),
            DestinationAction::Release if self.resume_ordered => {
                assert!(!self.owed || self.stopped, "lets go of what the guest waits for");
            }
            DestinationAction::AnswerAborted(_) => {
                assert_eq!(self.last_record, Last::Aborted, "says that it aborted before that is durable");
            }
            DestinationAction::DiscardGuest => {
                let must_go = self.last_record == Last::Aborted || (self.memory_lost && !self.stopped);
                assert!(must_go, "discards what it may have to run");
            }
            DestinationAction::Finish(outcome) => {
                let expected = match outcome {
                    DestinationOutcome::Running => self.resumed && !self.owed,
                    DestinationOutcome::Aborted(_) => !self.resume_ordered,
                    DestinationOutcome::Lost(failure) => {
                        assert_eq!(failure.reason, Reason::MemoryLost);
                        self.memory_lost && self.stopped
                    }
                };
                assert!(expected, "{outcome:?}");
                self.finished = true;
            }
            _ => {}
        }
    }
}
