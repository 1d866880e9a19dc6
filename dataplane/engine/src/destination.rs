//! The destination of a migration.
//!
//! ```text
//!  Pending
//!    | Start
//!  Prepare
//!    | Prepared
//!  Receiving   EndRound        -> DrainRound    -> AcknowledgeRound        any number of times
//!    |         PrepareIncoming -> StartIncoming -> TellIncomingReady       once
//!    |         Owed            -> HoldOwed      -> TellOwedAccepted        once, only into post-copy; no order but
//!    |                                                                     Commit after this
//!    |         Verify          -> Digest                                   no order while another is served
//!    |         DeviceStateLoaded -> TellDeviceStateLoaded                  also while a round is drained; no order
//!    |                                                                     but Commit after this
//!    | Commit, once the device state is loaded
//!  Committing -- write failed, or a veto came up --+        COMMITTED may be durable; the guest was not resumed
//!    | CommittedSynced                             |
//! ===|=============================================|===== the guest may run: never ABORTED from here =========
//!  Resuming    ResumeGuest, until GuestResumed;    |       memory owed: Pulling, see `postcopy.rs`
//!    |         Pull, where memory is owed          |
//!    | GuestResumed, GuestGone: AnswerRunning      |
//!  Running     Release -> Finish(Running)          |
//!                                                  v
//!  From anywhere above Committing, on Failed, Abort, AskOutcome, PeerLost, a breach of the protocol or a limit:
//!  Aborting    WriteAborted, until AbortedSynced; Release
//!    | AbortedSynced: AnswerAborted
//!  Discarding  DiscardGuest -> Finish(Aborted)
//! ```
//!
//! Restarts: no record -> Aborting; COMMITTED -> Resuming, also where memory is owed; ABORTED -> Discarding. At its end
//! it goes on answering: RUNNING, ABORTED or LOST, to each Commit and AskOutcome.
//!
//! # A COMMITTED that is not to be
//!
//! When the write of COMMITTED fails, the record may be durable all the same. The destination then neither
//! resumes nor says ABORTED, until ABORTED is durable behind it; a restart in between finds one of the two, or
//! neither, and each is consistent, because the source has had no answer yet. The same holds for a veto:
//! the VMM ended, or the source ordered to abort, while COMMITTED was being written. Once the guest was ordered
//! to resume, nothing is a veto any more: the order may have been obeyed even where it seems to have failed, and
//! is repeated until it succeeds.
//!
//! # A guest that ends before it is seen to run
//!
//! When its VMM ends after the order to resume, the guest may have run, and others may have seen what it did: it was
//! this side's, and is lost with its VMM. RUNNING is the answer all the same, for the source must never resume it.

mod aborting;
mod interface;
mod phase;
mod postcopy;
mod receiving;

use std::time::Duration;

pub use interface::{DestinationAction, DestinationEvent, DestinationOutcome};

use crate::limits;
use crate::retry::Retry;
use crate::trouble::Trouble;
use crate::{Failure, Reason, State};
use phase::{Found, Phase, Receiving};
use postcopy::Owed;

const RUNNING: DestinationAction = DestinationAction::AnswerRunning { memory_owed: false };

/// The destination of one migration.
#[derive(Clone, Debug)]
pub struct Destination {
    phase: Phase,
    /// When the step under way has lasted too long.
    limit: Option<Duration>,
    trouble: Option<Trouble>,
    /// Memory that is still at the source.
    owed: Option<Owed>,
}

impl Destination {
    /// A migration that has not begun: `Start` begins it.
    #[expect(clippy::new_without_default, reason = "there is no migration by default")]
    pub fn new() -> Self {
        Self::in_phase(Phase::Pending)
    }

    /// After a restart, when there was a session and the journal has neither COMMITTED nor ABORTED: aborts durably,
    /// from `Start` on.
    pub fn recover_prepared() -> Self {
        Self::in_phase(Phase::Restarted(Found::Prepared))
    }

    /// After a restart, when COMMITTED is the journal's last record: resumes the guest and answers RUNNING, from
    /// `Start` on.
    pub fn recover_committed() -> Self {
        Self::in_phase(Phase::Restarted(Found::Committed))
    }

    /// After a restart, when COMMITTED is the journal's last record and memory is still owed: resumes the guest, goes on
    /// reading what is owed, and answers RUNNING, from `Start` on.
    pub fn recover_postcopy() -> Self {
        Self::in_phase(Phase::Restarted(Found::Postcopy))
    }

    /// After a restart, when ABORTED is the journal's last record: discards the guest and answers ABORTED, from
    /// `Start` on.
    pub fn recover_aborted(cause: Failure) -> Self {
        Self::in_phase(Phase::Restarted(Found::Aborted(cause)))
    }

    /// Takes an event in; appends what is to be done to `actions`.
    pub fn handle(&mut self, now: Duration, event: DestinationEvent, actions: &mut Vec<DestinationAction>) {
        match &mut self.phase {
            Phase::Restarted(_) => self.restart(now, actions),
            Phase::Pending | Phase::Prepare | Phase::Receiving(_) => self.before_commit(now, event, actions),
            Phase::Committing { .. } => self.committing(now, event, actions),
            Phase::Resuming(_) => self.resuming(now, event, actions),
            Phase::Pulling => self.pulling(now, event, actions),
            Phase::Stopping { .. } => self.stopping(now, event, actions),
            Phase::Running { .. } | Phase::Lost { .. } => self.releasing(now, &event, actions),
            Phase::Aborting { .. } => self.aborting(now, event, actions),
            Phase::Discarding { .. } => self.discarding(now, &event, actions),
            Phase::EndedRunning => answer(&event, RUNNING, actions),
            Phase::EndedLost { cause } => {
                answer(&event, DestinationAction::AnswerLost(cause.clone()), actions);
            }
            Phase::EndedAborted { cause } => {
                answer(&event, DestinationAction::AnswerAborted(cause.clone()), actions);
            }
        }
    }

    /// When `Tick` is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.phase.retry_at().into_iter().chain(self.limit).chain(self.pull_at()).min()
    }

    /// The migration's state, as the source would call it. Final from `Finish` on, not before.
    pub fn state(&self) -> State {
        self.phase.state()
    }

    /// The step under way: finer than the state.
    pub fn phase(&self) -> &'static str {
        self.phase.name()
    }

    /// What holds the migration up, where it can neither go on nor end: the guest does not resume or stop, a record
    /// cannot be written, or what is owed does not come.
    pub fn trouble(&self) -> Option<&Failure> {
        self.held_up().map(|trouble| &trouble.failure)
    }

    /// Since when there has been trouble, on the clock of the events.
    pub fn trouble_since(&self) -> Option<Duration> {
        self.held_up().map(|trouble| trouble.since)
    }

    fn held_up(&self) -> Option<&Trouble> {
        self.trouble.as_ref().or_else(|| self.owed.as_ref()?.trouble())
    }

    fn in_phase(phase: Phase) -> Self {
        Self { phase, limit: None, trouble: None, owed: None }
    }

    fn enter(&mut self, phase: Phase, limit: Option<Duration>) {
        self.phase = phase;
        self.limit = limit;
        self.trouble = None;
    }

    /// The first event only begins: whatever it asks will be answered, unasked.
    fn restart(&mut self, now: Duration, actions: &mut Vec<DestinationAction>) {
        match std::mem::replace(&mut self.phase, Phase::Pending) {
            Phase::Restarted(Found::Committed) => self.resume(now, actions),
            Phase::Restarted(Found::Postcopy) => {
                self.owed = Some(Owed::default());
                self.resume(now, actions);
            }
            Phase::Restarted(Found::Aborted(cause)) => {
                actions.push(DestinationAction::Release);
                self.discard(now, cause, false, actions);
            }
            _ => {
                let message = "the destination's agent was restarted before it was told to commit";
                self.abort(Failure::new(Reason::AgentRestarted, message), actions);
            }
        }
    }

    /// Nothing binds it yet: whatever goes wrong, it aborts.
    fn before_commit(
        &mut self,
        now: Duration,
        event: DestinationEvent,
        actions: &mut Vec<DestinationAction>,
    ) {
        match event {
            DestinationEvent::Start => self.start(now, actions),
            DestinationEvent::Prepared => self.prepared(),
            DestinationEvent::Failed(failure)
            | DestinationEvent::GuestGone(failure)
            | DestinationEvent::MemoryLost(failure)
            | DestinationEvent::Abort(failure) => {
                self.abort(failure, actions);
            }
            DestinationEvent::PeerLost => {
                let message = "the control stream from the source's agent ended before it said to commit";
                self.abort(Failure::new(Reason::PeerLost, message), actions);
            }
            DestinationEvent::AskOutcome => {
                let message = "the source's agent asked for the outcome before it said to commit";
                self.abort(Failure::new(Reason::PeerLost, message), actions);
            }
            DestinationEvent::Tick => self.step_limit(now, actions),
            DestinationEvent::EndRound { .. }
            | DestinationEvent::PrepareIncoming { .. }
            | DestinationEvent::Owed { .. }
            | DestinationEvent::Verify
            | DestinationEvent::Commit => self.order(now, event, actions),
            answer => self.served(&answer, actions),
        }
    }

    fn start(&mut self, now: Duration, actions: &mut Vec<DestinationAction>) {
        if matches!(self.phase, Phase::Pending) {
            self.enter(Phase::Prepare, Some(now.saturating_add(limits::PREPARE)));
            actions.push(DestinationAction::Prepare);
        }
    }

    fn prepared(&mut self) {
        if matches!(self.phase, Phase::Prepare) {
            self.enter(Phase::Receiving(Receiving::BEGIN), None);
        }
    }

    fn step_limit(&mut self, now: Duration, actions: &mut Vec<DestinationAction>) {
        if self.limit.is_some_and(|limit| limit <= now) {
            let message = format!("the step {} took too long at the destination", self.phase.name());
            self.abort(Failure::new(Reason::StepTimeout, message), actions);
        }
    }

    /// COMMITTED is being written: its outcome comes first, whatever else happens.
    fn committing(&mut self, now: Duration, event: DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let Phase::Committing { veto } = &mut self.phase else { return };
        match event {
            DestinationEvent::CommittedSynced => match veto.take() {
                Some(cause) => self.abort(cause, actions),
                None => self.resume(now, actions),
            },
            DestinationEvent::Failed(failure) if failure.reason == Reason::JournalFailed => {
                let cause = veto.take().unwrap_or(failure);
                self.abort(cause, actions);
            }
            DestinationEvent::Failed(failure) if failure.reason == Reason::GuestFailed => {
                veto.get_or_insert(failure);
            }
            DestinationEvent::Abort(failure) | DestinationEvent::MemoryLost(failure) => {
                veto.get_or_insert(failure);
            }
            _ => {}
        }
    }

    fn resume(&mut self, now: Duration, actions: &mut Vec<DestinationAction>) {
        let answer_by = now.saturating_add(limits::RESUME_ANSWER);
        self.enter(Phase::Resuming(Retry::new(Some(answer_by))), None);
        actions.push(DestinationAction::ResumeGuest);
        self.pull(now, actions);
    }

    fn resuming(&mut self, now: Duration, event: DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let Phase::Resuming(retry) = &mut self.phase else { return };
        match event {
            DestinationEvent::GuestResumed if self.owed.is_some() => {
                self.enter(Phase::Pulling, None);
                actions.push(DestinationAction::AnswerRunning { memory_owed: true });
            }
            DestinationEvent::GuestResumed | DestinationEvent::GuestGone(_) => self.runs(now, actions),
            DestinationEvent::Failed(failure) if failure.reason == Reason::GuestFailed => {
                retry.put_off(now);
                Trouble::note(&mut self.trouble, now, failure);
            }
            DestinationEvent::Tick if retry.is_due(now) => {
                retry.ordered(Some(now.saturating_add(limits::RESUME_ANSWER)));
                actions.push(DestinationAction::ResumeGuest);
            }
            event => self.pull_answered(now, event, actions),
        }
    }

    /// Nothing is owed to the guest, or to what is left of it.
    fn runs(&mut self, now: Duration, actions: &mut Vec<DestinationAction>) {
        let after_postcopy = matches!(self.phase, Phase::Pulling);
        self.owed = None;
        self.enter(Phase::Running { after_postcopy }, Some(now.saturating_add(limits::RELEASE)));
        actions.extend([RUNNING, DestinationAction::Release]);
    }

    fn releasing(&mut self, now: Duration, event: &DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let given_up = *event == DestinationEvent::Tick && self.limit.is_some_and(|limit| limit <= now);
        let done = given_up || *event == DestinationEvent::Released;
        match &self.phase {
            Phase::Lost { cause } if done => self.ends_lost(cause.clone(), actions),
            Phase::Lost { .. } => {}
            _ if done => {
                self.enter(Phase::EndedRunning, None);
                actions.push(DestinationAction::Finish(DestinationOutcome::Running));
            }
            _ => answer(event, RUNNING, actions),
        }
    }
}

/// Answers where the source wants to know, or would tell again.
fn answer(event: &DestinationEvent, answer: DestinationAction, actions: &mut Vec<DestinationAction>) {
    use DestinationEvent::{AskOutcome, Commit, MemoryLost};
    if matches!(event, Commit | AskOutcome | MemoryLost(_)) {
        actions.push(answer);
    }
}
