//! A destination whose every move is checked against the rules of who may run the guest.

use std::time::Duration;

use ramferry_engine::{
    Destination, DestinationAction, DestinationEvent, DestinationOutcome, Failure, Reason, State,
};

pub(crate) fn failure(reason: Reason) -> Failure {
    Failure::new(reason, "for a test")
}

/// Each step of a migration that goes well, and the event that leads to the next.
pub(crate) fn good_path() -> Vec<(&'static str, DestinationEvent)> {
    vec![
        ("pending", DestinationEvent::Start),
        ("prepare", DestinationEvent::Prepared),
        ("receive", DestinationEvent::EndRound { round: 1 }),
        ("drain", DestinationEvent::RoundDrained { round: 1 }),
        ("receive", DestinationEvent::PrepareIncoming),
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    Nothing,
    Committed,
    Aborted,
}

#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) destination: Destination,
    pub(crate) now: Duration,
    pub(crate) actions: Vec<DestinationAction>,
    last_record: Last,
    write_pending: bool,
    resume_ordered: bool,
    resumed: bool,
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

    pub(crate) fn restarted_aborted() -> Self {
        Self::over(Destination::recover_aborted(failure(Reason::LinkLost)), Last::Aborted)
    }

    /// After `steps` of the good path.
    pub(crate) fn after(steps: usize) -> Self {
        let mut checked = Self::new();
        for (phase, event) in good_path().into_iter().take(steps) {
            assert_eq!(checked.destination.phase(), phase);
            checked.handle(event);
        }
        checked
    }

    /// Where the good path first comes to `phase`.
    pub(crate) fn at(phase: &str) -> Self {
        let steps = good_path().iter().position(|(name, _)| *name == phase);
        Self::after(steps.unwrap_or_else(|| panic!("{phase} is not on the path")))
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
        let mut actions = Vec::new();
        self.destination.handle(self.now, event, &mut actions);
        for action in &actions {
            self.check(action, pending_before);
            self.actions.push(action.clone());
        }
        assert_eq!(self.destination.state().is_final(), self.finished);
        actions
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
        let answers =
            matches!(action, DestinationAction::AnswerRunning | DestinationAction::AnswerAborted(_));
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
                self.resume_ordered = true;
            }
            DestinationAction::AnswerRunning => assert!(self.resumed, "says that it runs and it does not"),
            DestinationAction::AnswerAborted(_) => {
                assert_eq!(self.last_record, Last::Aborted, "says that it aborted before that is durable");
            }
            DestinationAction::DiscardGuest => {
                assert_eq!(self.last_record, Last::Aborted, "discards what it may have to run");
            }
            DestinationAction::Finish(outcome) => {
                assert_eq!(*outcome == DestinationOutcome::Running, self.resumed);
                self.finished = true;
            }
            _ => {}
        }
    }
}

/// Every event, in every form that could make a difference.
fn events() -> Vec<DestinationEvent> {
    let mut events = vec![
        DestinationEvent::Start,
        DestinationEvent::Prepared,
        DestinationEvent::EndRound { round: 1 },
        DestinationEvent::EndRound { round: 2 },
        DestinationEvent::EndRound { round: 3 },
        DestinationEvent::RoundDrained { round: 1 },
        DestinationEvent::RoundDrained { round: 2 },
        DestinationEvent::PrepareIncoming,
        DestinationEvent::IncomingReady,
        DestinationEvent::Verify,
        DestinationEvent::Verified,
        DestinationEvent::DeviceStateLoaded,
        DestinationEvent::Commit,
        DestinationEvent::AskOutcome,
        DestinationEvent::Abort(failure(Reason::Cancelled)),
        DestinationEvent::PeerLost,
        DestinationEvent::PeerBack,
        DestinationEvent::CommittedSynced,
        DestinationEvent::AbortedSynced,
        DestinationEvent::GuestResumed,
        DestinationEvent::GuestGone(failure(Reason::GuestFailed)),
        DestinationEvent::GuestDiscarded,
        DestinationEvent::Released,
        DestinationEvent::Tick,
    ];
    let reasons = [Reason::GuestFailed, Reason::JournalFailed, Reason::LinkLost];
    events.extend(reasons.map(failed));
    events
}

/// Where to begin, and what to go on with.
type Way = (fn() -> Checked, Vec<DestinationEvent>);

/// How to come to each step that there is.
fn steps() -> Vec<Way> {
    let mut steps: Vec<Way> = Vec::new();
    let path: Vec<_> = good_path().into_iter().map(|(_, event)| event).collect();
    steps.extend((0..=path.len()).map(|count| (Checked::new as fn() -> Checked, path[..count].to_vec())));

    let path: Vec<_> = path_without_verify().into_iter().map(|(_, event)| event).collect();
    steps.extend((8..=path.len()).map(|count| (Checked::new as fn() -> Checked, path[..count].to_vec())));

    let lost = vec![DestinationEvent::PeerLost];
    let synced = [lost.clone(), vec![DestinationEvent::AbortedSynced]].concat();
    let ended = [synced.clone(), vec![DestinationEvent::GuestDiscarded, DestinationEvent::Released]].concat();
    steps.extend([lost, synced, ended].map(|events| (loaded as fn() -> Checked, events)));

    for veto in [DestinationEvent::Abort(failure(Reason::Cancelled)), failed(Reason::GuestFailed)] {
        steps.push((committing, vec![veto.clone()]));
        steps.push((committing, vec![veto, DestinationEvent::CommittedSynced]));
    }
    steps.push((committing, vec![failed(Reason::JournalFailed)]));
    steps.push((committing, vec![failed(Reason::JournalFailed); 2]));
    steps.push((committing, vec![DestinationEvent::CommittedSynced, failed(Reason::GuestFailed)]));
    steps.push((Checked::restarted_prepared, vec![]));
    steps.push((Checked::restarted_committed, vec![]));
    steps.push((Checked::restarted_aborted, vec![]));
    steps
}

fn loaded() -> Checked {
    Checked::at("loaded")
}

fn committing() -> Checked {
    Checked::at("commit")
}

fn reach((begin, events): &Way) -> Checked {
    let mut checked = begin();
    for event in events {
        checked.handle(event.clone());
    }
    checked
}

fn failed(reason: Reason) -> DestinationEvent {
    DestinationEvent::Failed(failure(reason))
}

#[test]
fn every_step_is_reached_by_the_table() {
    let mut reached: Vec<_> = steps().iter().map(|step| reach(step).destination.phase()).collect();
    reached.sort_unstable();
    reached.dedup();
    let mut all: Vec<_> = good_path().iter().map(|(phase, _)| *phase).collect();
    all.extend(["abort", "discard", "restarted", "ended"]);
    all.sort_unstable();
    all.dedup();
    assert_eq!(reached, all);
}

/// Any three events in any step. [`Checked`] has the rules.
#[test]
fn no_three_events_in_any_step_break_a_rule() {
    let events = events();
    for step in &steps() {
        for first in &events {
            for second in &events {
                for third in &events {
                    let mut checked = reach(step);
                    for event in [first, second, third] {
                        checked.handle(event.clone());
                    }
                }
            }
        }
    }
}

/// From any step, after any event, ticks alone: it ends, or waits for the source, or for a record.
#[test]
fn silence_after_any_event_in_any_step_leaves_nothing_undecided() {
    for step in &steps() {
        for event in events() {
            let mut checked = reach(step);
            checked.handle(event.clone());
            for _ in 0..1000 {
                checked.tick();
            }
            let phase = checked.destination.phase();
            let rests =
                ["pending", "receive", "receive_last", "loaded", "commit", "abort", "resume", "ended"];
            assert!(rests.contains(&phase), "{event:?}: {phase}");
            if phase == "resume" {
                assert!(checked.times(&DestinationAction::ResumeGuest) > 900);
            }
        }
    }
}

/// The source's question and COMMIT are answered in any step, once what they wait for is there.
#[test]
fn commit_and_ask_are_always_answered_in_the_end() {
    for step in &steps() {
        for question in [DestinationEvent::Commit, DestinationEvent::AskOutcome] {
            let mut checked = reach(step);
            checked.actions.clear();
            checked.handle(question.clone());
            for answer in [
                DestinationEvent::CommittedSynced,
                DestinationEvent::AbortedSynced,
                DestinationEvent::GuestResumed,
            ] {
                checked.handle(answer);
            }
            checked.tick();
            checked.handle(DestinationEvent::AbortedSynced);
            let answered = checked.actions.iter().any(|action| {
                matches!(action, DestinationAction::AnswerRunning | DestinationAction::AnswerAborted(_))
            });
            assert!(answered, "{question:?}: {:?}", checked.actions);
        }
    }
}

#[test]
fn states_follow_the_steps() {
    let states: Vec<_> =
        (0..=good_path().len()).map(|steps| Checked::after(steps).destination.state()).collect();
    assert_eq!(states[0], State::Pending);
    assert_eq!(states[1], State::Preparing);
    assert!(states[2..5].iter().all(|state| *state == State::Precopy));
    assert!(states[5..15].iter().all(|state| *state == State::SwitchingOver));
    assert_eq!(states[15], State::Succeeded);
}
