//! The destination of a migration.
//!
//! ```text
//!  Pending
//!    | Start
//!  Prepare
//!    | Prepared
//!  Receiving   EndRound        -> DrainRound    -> AcknowledgeRound        any number of times
//!    |         PrepareIncoming -> StartIncoming -> TellIncomingReady       once
//!    |         Verify          -> Digest                                   no order while another is served
//!    |         DeviceStateLoaded -> TellDeviceStateLoaded                  also while a round is drained; no order
//!    |                                                                     but Commit after this
//!    | Commit, once the device state is loaded
//!  Committing -- write failed, or a veto came up --+        COMMITTED may be durable; the guest was not resumed
//!    | CommittedSynced                             |
//! ===|=============================================|===== the guest may run: never ABORTED from here =========
//!  Resuming    ResumeGuest, until GuestResumed     |
//!    | GuestResumed, GuestGone: AnswerRunning      |
//!  Running     Release -> Finish(Running)          |
//!                                                  v
//!  From anywhere above Committing, on Failed, Abort, AskOutcome, PeerLost, a breach of the protocol or a limit:
//!  Aborting    WriteAborted, until AbortedSynced; Release
//!    | AbortedSynced: AnswerAborted
//!  Discarding  DiscardGuest -> Finish(Aborted)
//! ```
//!
//! Restarts: no record -> Aborting; COMMITTED -> Resuming; ABORTED -> Discarding. At its end it goes on answering:
//! RUNNING or ABORTED, to each Commit and AskOutcome.
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

mod interface;
mod phase;

use std::time::Duration;

pub use interface::{DestinationAction, DestinationEvent, DestinationOutcome};

use crate::limits;
use crate::retry::Retry;
use crate::{Failure, Reason, State};
use phase::{Found, Incoming, Phase, Receiving, Serving};

/// The destination of one migration.
#[derive(Debug)]
pub struct Destination {
    phase: Phase,
    /// When the step under way has lasted too long.
    limit: Option<Duration>,
    trouble: Option<Failure>,
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
            Phase::Running => self.running(now, &event, actions),
            Phase::Aborting { .. } => self.aborting(now, event, actions),
            Phase::Discarding { .. } => self.discarding(now, &event, actions),
            Phase::EndedRunning => answer(&event, DestinationAction::AnswerRunning, actions),
            Phase::EndedAborted { cause } => {
                answer(&event, DestinationAction::AnswerAborted(cause.clone()), actions);
            }
        }
    }

    /// When `Tick` is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.phase.retry_at().into_iter().chain(self.limit).min()
    }

    /// The migration's state, as the source would call it. Final from `Finish` on, not before.
    pub fn state(&self) -> State {
        self.phase.state()
    }

    /// The step under way: finer than the state.
    pub fn phase(&self) -> &'static str {
        self.phase.name()
    }

    /// What holds the migration up, where it can neither go on nor end: the guest does not resume, or a record
    /// cannot be written.
    pub fn trouble(&self) -> Option<&Failure> {
        self.trouble.as_ref()
    }

    fn in_phase(phase: Phase) -> Self {
        Self { phase, limit: None, trouble: None }
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
            | DestinationEvent::PrepareIncoming
            | DestinationEvent::Verify
            | DestinationEvent::Commit => self.order(now, &event, actions),
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

    /// An order of the source. One that may not come now is a breach of the protocol.
    fn order(&mut self, now: Duration, order: &DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let Phase::Receiving(receiving) = &mut self.phase else {
            return self.breach(order, actions);
        };
        let free = receiving.takes_orders();
        let (serving, limit, action) = match *order {
            DestinationEvent::EndRound { round } if free && receiving.expects(round) => {
                (Serving::Drain { round }, limits::DRAIN, DestinationAction::DrainRound { round })
            }
            DestinationEvent::PrepareIncoming if free && receiving.incoming == Incoming::Off => {
                receiving.incoming = Incoming::Starting;
                (Serving::Incoming, limits::INCOMING, DestinationAction::StartIncoming)
            }
            DestinationEvent::Verify if free => (Serving::Digest, limits::VERIFY, DestinationAction::Digest),
            DestinationEvent::Commit if receiving.is_complete() => {
                self.enter(Phase::Committing { veto: None }, None);
                return actions.push(DestinationAction::WriteCommitted);
            }
            _ => return self.breach(order, actions),
        };
        receiving.serving = serving;
        self.limit = Some(now.saturating_add(limit));
        actions.push(action);
    }

    fn breach(&mut self, order: &DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let message = format!("the source's agent ordered {order:?} in the step {}", self.phase.name());
        self.abort(Failure::new(Reason::PeerRefused, message), actions);
    }

    /// The result of an action; passes it on to the source when it is the one waited for.
    fn served(&mut self, result: &DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let Phase::Receiving(receiving) = &mut self.phase else { return };
        match (receiving.serving, result) {
            // The source's VMM sends it beside the last round's end.
            (Serving::Nothing | Serving::Drain { .. }, DestinationEvent::DeviceStateLoaded)
                if receiving.incoming == Incoming::Ready =>
            {
                receiving.incoming = Incoming::Loaded;
                return actions.push(DestinationAction::TellDeviceStateLoaded);
            }
            (Serving::Drain { round }, DestinationEvent::RoundDrained { round: drained })
                if round == *drained =>
            {
                receiving.rounds_ended = round;
                actions.push(DestinationAction::AcknowledgeRound { round });
            }
            (Serving::Incoming, DestinationEvent::IncomingReady) => {
                receiving.incoming = Incoming::Ready;
                actions.push(DestinationAction::TellIncomingReady);
            }
            (Serving::Digest, DestinationEvent::Verified) => {}
            _ => return,
        }
        receiving.serving = Serving::Nothing;
        self.limit = None;
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
            DestinationEvent::Abort(failure) => {
                veto.get_or_insert(failure);
            }
            _ => {}
        }
    }

    fn resume(&mut self, now: Duration, actions: &mut Vec<DestinationAction>) {
        let answer_by = now.saturating_add(limits::RESUME_ANSWER);
        self.enter(Phase::Resuming(Retry::new(Some(answer_by))), None);
        actions.push(DestinationAction::ResumeGuest);
    }

    fn resuming(&mut self, now: Duration, event: DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let Phase::Resuming(retry) = &mut self.phase else { return };
        match event {
            DestinationEvent::GuestResumed | DestinationEvent::GuestGone(_) => {
                self.enter(Phase::Running, Some(now.saturating_add(limits::RELEASE)));
                actions.extend([DestinationAction::AnswerRunning, DestinationAction::Release]);
            }
            DestinationEvent::Failed(failure) if failure.reason == Reason::GuestFailed => {
                retry.put_off(now);
                self.trouble = Some(failure);
            }
            DestinationEvent::Tick if retry.is_due(now) => {
                retry.ordered(Some(now.saturating_add(limits::RESUME_ANSWER)));
                actions.push(DestinationAction::ResumeGuest);
            }
            _ => {}
        }
    }

    fn running(&mut self, now: Duration, event: &DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let given_up = *event == DestinationEvent::Tick && self.limit.is_some_and(|limit| limit <= now);
        if given_up || *event == DestinationEvent::Released {
            self.enter(Phase::EndedRunning, None);
            actions.push(DestinationAction::Finish(DestinationOutcome::Running));
        } else {
            answer(event, DestinationAction::AnswerRunning, actions);
        }
    }

    /// Must not be called once the guest was ordered to resume.
    fn abort(&mut self, cause: Failure, actions: &mut Vec<DestinationAction>) {
        assert!(!matches!(self.phase, Phase::Resuming(_) | Phase::Running | Phase::EndedRunning));
        actions.extend([DestinationAction::WriteAborted(cause.clone()), DestinationAction::Release]);
        self.enter(Phase::Aborting { cause, write: Retry::new(None), released: false }, None);
    }

    /// ABORTED is being written. It is not written anew before the write under way has failed: records must not
    /// change places. There is no giving up: without the record there is no answer to the source, which may be
    /// waiting for it with its guest paused.
    fn aborting(&mut self, now: Duration, event: DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let Phase::Aborting { cause, write, released } = &mut self.phase else { return };
        match event {
            DestinationEvent::AbortedSynced => {
                let (cause, released) = (cause.clone(), *released);
                self.discard(now, cause, released, actions);
            }
            DestinationEvent::Released => *released = true,
            DestinationEvent::Failed(failure) if failure.reason == Reason::JournalFailed => {
                write.put_off(now);
                self.trouble = Some(failure);
            }
            DestinationEvent::Tick if write.is_due(now) => {
                write.ordered(None);
                actions.push(DestinationAction::WriteAborted(cause.clone()));
            }
            _ => {}
        }
    }

    fn discard(
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

    fn discarding(&mut self, now: Duration, event: &DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let Phase::Discarding { cause, discard, released } = &mut self.phase else { return };
        match event {
            DestinationEvent::GuestDiscarded => *discard = None,
            DestinationEvent::Released => *released = true,
            DestinationEvent::Failed(failure) if failure.reason == Reason::GuestFailed => {
                if let Some(retry) = discard {
                    retry.put_off(now);
                    self.trouble = Some(failure.clone());
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

/// Answers where the source wants to know.
fn answer(event: &DestinationEvent, answer: DestinationAction, actions: &mut Vec<DestinationAction>) {
    if matches!(event, DestinationEvent::Commit | DestinationEvent::AskOutcome) {
        actions.push(answer);
    }
}
