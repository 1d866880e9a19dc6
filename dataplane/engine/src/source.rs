//! The source of a migration.
//!
//! ```text
//!  Pending
//!    | Start
//!  Prepare
//!    | Prepared
//!  Copy -> Fence -> Acknowledge -> Wait -> Harvest        one round; Wait only if the last harvest was just now
//!    ^                                        |
//!    +------------- next round ---------------+
//!    |                                        |
//!    +-- Recheck <-- [Drain <-----------------+           settle: only where writes come late, see `late.rs`
//!                                             |
//!                                             | switch over: expected downtime short enough, or forced
//!  Pause                                      v
//!    | GuestPaused                                        downtime begins
//!  LastHarvest [-> LastRecheck] -> LastCopy -> LastFence [-> LastAcknowledge -> Verify] -> DeviceState
//!    |                                                                                       ^
//!    +-- into post-copy: SendOwed -----------------------------------------------------------+
//!    | DeviceStateMoved and RoundEnded, in either order: where the first comes first, LastAcknowledge
//!  Handover                                               HANDED_OVER is being written; no Cancel from here
//!    | HandedOverSynced
//! ===|================================================== COMMIT is sent: the source may not resume ===========
//!  Commit -- PeerLost, Failed, COMMIT_ANSWER passed --> Ask <-- recover_handed_over
//!    |                                                   |      AskOutcome at PeerBack and at intervals
//!    +------- DestinationRunning, memory owed -----------+--> Serve, see `postcopy.rs`; then, as the next
//!    +------- DestinationRunning, nothing owed ----------+--> Ending: Release, Finish(Succeeded)
//!    +------- DestinationAborted ------------------------+--> Ending: ResumeGuest, Release, Finish(Failed)
//!    +------- DestinationLost ---------------------------+--> Ending: Release, Finish(Lost)
//!
//!  From anywhere above the line, on Failed, Cancel, PeerLost, DestinationAborted, a step's limit or the timeout:
//!  Ending: ResumeGuest (from Pause on), StopCopy, AbortPeer, then Release, then Finish (see `ending.rs`).
//!  recover_before_handover goes there at once.
//! ```
//!
//! # Into post-copy
//!
//! With [`Postcopy::Always`] the first harvest, with [`Postcopy::Allow`] rounds that do not converge, a forced
//! switchover that would take too long, or the timeout: it cuts the round under way short, and what that did not
//! send is owed. So is what was harvested and what is unsettled, see `late.rs`: no round, no recheck and no comparison
//! come between the last harvest and the device state. Where nothing is owed in the end, the switchover is an
//! ordinary one.
//!
//! # Why the source may resume during Handover
//!
//! HANDED_OVER may be in the journal by then: its write may have failed after all of it was on disk, or the peer
//! be lost while it is written. COMMIT is ordered only by the answer to that write, in this phase alone, and
//! an answer that comes after the phase was left is ignored. So COMMIT was not sent, nothing else makes a
//! destination commit, and resuming is safe: as safe as before HANDED_OVER, and better than leaving the guest paused
//! until a destination answers that may be gone for good.
//!
//! A restart may then find HANDED_OVER as the last record, although the guest runs here. It cannot know that
//! COMMIT was not sent, so it asks, and touches the guest no further until it is answered. The answer can only
//! be ABORTED; resuming a guest that runs changes nothing. A driver that writes the outcome to the journal at
//! `Finish` spares itself the question.

mod doubt;
mod ending;
mod interface;
mod late;
mod phase;
mod postcopy;
mod rounds;
mod switchover;
mod throttle;

use std::time::Duration;

pub use interface::{LateWrites, Outcome, SourceAction, SourceEvent};
use ramferry_ram::PageSets;

use crate::convergence::Convergence;
use crate::retry::Retry;
use crate::trouble::Trouble;
use crate::{
    Failure, FixedCosts, ParameterError, Parameters, Postcopy, Progress, Reason, State, TimeoutAction,
};
use ending::{Ending, Guest, Plan};
use late::Late;
pub(crate) use late::RecheckDue;
use phase::Phase;
use throttle::Throttle;

/// The source of one migration.
#[derive(Clone, Debug)]
pub struct Source {
    parameters: Parameters,
    progress: Progress,
    convergence: Convergence,
    phase: Phase,
    /// When the phase began, and when it has lasted too long.
    phase_at: Duration,
    phase_limit: Option<Duration>,
    started_at: Duration,
    last_harvest_at: Duration,
    paused_at: Option<Duration>,
    device_state_saved: bool,
    commit_at: Option<Duration>,
    /// When the destination said that the guest runs there.
    resumed_at: Option<Duration>,
    /// Switch over after the round under way.
    forced: bool,
    /// The timeout has passed that post-copy is to answer.
    at_once: bool,
    /// The guest wrote these, and no round carries them yet.
    owed: Option<PageSets>,
    late: Late,
    throttle: Throttle,
    ask: Retry,
    asked_at: Option<Duration>,
    /// Failures that did not end the migration, because the outcome is in doubt, or the guest runs at the destination.
    doubt: Option<Trouble>,
    /// This side's memory was lost while the outcome was in doubt.
    memory_lost: Option<Failure>,
}

impl Source {
    /// A migration that has not begun: `Start` begins it.
    ///
    /// # Errors
    /// When `parameters` do not pass [`Parameters::check`].
    pub fn new(parameters: Parameters) -> Result<Self, ParameterError> {
        parameters.check()?;
        Ok(Self::in_phase(Phase::Pending, parameters))
    }

    /// After a restart, when HANDED_OVER is the last record of the journal: asks for the outcome, from `Start` on.
    /// The driver leaves the guest alone until it is told to resume it.
    pub fn recover_handed_over(parameters: Parameters) -> Self {
        let mut source = Self::in_phase(Phase::Ask, parameters);
        source.ask.ordered(Some(Duration::ZERO));
        source
    }

    /// After a restart, when the migration had begun and the journal has no HANDED_OVER: from `Start` on, resumes
    /// the guest and tells the destination to give up.
    pub fn recover_before_handover(parameters: Parameters) -> Self {
        Self::in_phase(Phase::Restarted, parameters)
    }

    /// Takes an event in; appends what is to be done to `actions`.
    pub fn handle(&mut self, now: Duration, event: SourceEvent, actions: &mut Vec<SourceAction>) {
        self.note_throttle(now, &event);
        match &mut self.phase {
            Phase::Ended(_) => {}
            Phase::Ending(ending) => {
                if let Some(outcome) = ending.handle(now, event, actions) {
                    self.finish(outcome, actions);
                }
            }
            Phase::Restarted => {
                let failure = Failure::new(Reason::AgentRestarted, "the source's agent was restarted");
                self.fail(now, failure, actions);
            }
            Phase::Commit | Phase::Ask => self.in_doubt(now, event, actions),
            Phase::Serve { .. } => self.serving(now, event, actions),
            _ => self.under_way(now, event, actions),
        }
    }

    /// When `Tick` is due.
    pub fn deadline(&self) -> Option<Duration> {
        match &self.phase {
            Phase::Ending(ending) => ending.deadline(),
            Phase::Ask | Phase::Serve { .. } => self.ask.at(),
            Phase::Restarted => Some(Duration::ZERO),
            _ => self.timeout_at().into_iter().chain(self.phase_limit).min(),
        }
    }

    /// The migration's state. Final from `Finish` on, not before.
    pub fn state(&self) -> State {
        self.phase.state()
    }

    /// The step under way: finer than the state.
    pub fn phase(&self) -> &'static str {
        self.phase.name()
    }

    /// What was done so far.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The downtime that is aimed at.
    pub fn max_downtime(&self) -> Duration {
        self.parameters.max_downtime
    }

    /// Whether `Cancel` keeps the guest here: not from the order to write HANDED_OVER on.
    pub fn can_cancel(&self) -> bool {
        match &self.phase {
            Phase::Handover | Phase::Commit | Phase::Ask | Phase::Serve { .. } | Phase::Ended(_) => false,
            Phase::Ending(ending) => ending.guest_stays(),
            _ => true,
        }
    }

    /// What holds the migration up, where it can neither go on nor end: the outcome cannot be learnt, the guest does
    /// not resume, or the destination cannot be served. While rounds go on, what keeps the guest from being throttled.
    pub fn trouble(&self) -> Option<&Failure> {
        self.held_up().map(|trouble| &trouble.failure)
    }

    /// Since when there has been trouble, on the clock of the events.
    pub fn trouble_since(&self) -> Option<Duration> {
        self.held_up().map(|trouble| trouble.since)
    }

    fn held_up(&self) -> Option<&Trouble> {
        match &self.phase {
            Phase::Ending(ending) => ending.trouble(),
            Phase::Commit | Phase::Ask | Phase::Serve { .. } => self.doubt.as_ref(),
            phase if phase.is_before_switchover() => self.throttle.trouble(),
            _ => None,
        }
    }

    fn in_phase(phase: Phase, parameters: Parameters) -> Self {
        Self {
            parameters,
            progress: Progress::default(),
            convergence: Convergence::new(FixedCosts::default()),
            phase,
            phase_at: Duration::ZERO,
            phase_limit: None,
            started_at: Duration::ZERO,
            last_harvest_at: Duration::ZERO,
            paused_at: None,
            device_state_saved: false,
            commit_at: None,
            resumed_at: None,
            forced: false,
            at_once: false,
            owed: None,
            late: Late::default(),
            throttle: Throttle::default(),
            ask: Retry::new(None),
            asked_at: None,
            doubt: None,
            memory_lost: None,
        }
    }

    /// Above the line: whatever goes wrong, the guest stays here.
    fn under_way(&mut self, now: Duration, event: SourceEvent, actions: &mut Vec<SourceAction>) {
        match event {
            SourceEvent::Start => self.start(now, actions),
            SourceEvent::Cancel => self.cancel(now, actions),
            SourceEvent::Failed(failure)
            | SourceEvent::GuestGone(failure)
            | SourceEvent::MemoryLost(failure) => self.fail(now, failure, actions),
            SourceEvent::PeerLost => self.peer_lost(now, actions),
            SourceEvent::DestinationAborted(cause) => self.destination_aborted(now, &cause, actions),
            SourceEvent::DestinationRunning { .. } | SourceEvent::DestinationLost(_) => {
                let message =
                    "the destination's agent says that the guest runs there, and was not told to run it";
                self.fail(now, Failure::new(Reason::PeerRefused, message), actions);
            }
            SourceEvent::ForceSwitchover => self.force(now, actions),
            SourceEvent::SetParameters(parameters) => self.set_parameters(now, parameters, actions),
            SourceEvent::Tick => self.tick(now, actions),
            SourceEvent::LateWrites(late) => self.late.expect(late),
            answer => self.answered(now, answer, actions),
        }
    }

    /// An answer moves the phase on that waits for it, and no other.
    fn answered(&mut self, now: Duration, answer: SourceEvent, actions: &mut Vec<SourceAction>) {
        if self.phase.is_before_switchover() {
            self.rounds_answered(now, answer, actions);
        } else {
            self.switchover_answered(now, answer, actions);
        }
    }

    fn start(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        if matches!(self.phase, Phase::Pending) {
            self.started_at = now;
            self.enter(now, Phase::Prepare);
            actions.push(SourceAction::Prepare);
        }
    }

    fn cancel(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        if self.can_cancel() {
            let failure = Failure::new(Reason::Cancelled, "the migration was cancelled");
            self.undo(now, Outcome::Cancelled, Some(failure), actions);
        }
    }

    fn peer_lost(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        if !matches!(self.phase, Phase::Pending) {
            let message = "the control stream to the destination's agent ended. See that it runs and can be \
                           reached, then migrate again";
            self.fail(now, Failure::new(Reason::PeerLost, message), actions);
        }
    }

    fn destination_aborted(&mut self, now: Duration, cause: &Failure, actions: &mut Vec<SourceAction>) {
        self.undo(now, Outcome::Failed(Failure::destination_aborted(cause)), None, actions);
    }

    fn force(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        self.forced = true;
        if matches!(self.phase, Phase::Wait) {
            self.harvest(now, actions);
        }
    }

    fn set_parameters(&mut self, now: Duration, parameters: Parameters, actions: &mut Vec<SourceAction>) {
        if parameters.check().is_err() {
            return;
        }
        let limit = parameters.bandwidth_limit;
        let paced = self.phase.is_before_switchover() && !matches!(self.phase, Phase::Prepare);
        if paced && limit != self.parameters.bandwidth_limit {
            actions.push(SourceAction::SetBandwidthLimit(limit));
        }
        if parameters.throttle != self.parameters.throttle {
            self.throttle.try_again();
        }
        self.parameters = parameters;
        self.throttle_as_allowed(now, actions);
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        if self.phase_limit.is_some_and(|limit| limit <= now) {
            if matches!(self.phase, Phase::Wait) {
                self.harvest(now, actions);
            } else {
                self.phase_took_too_long(now, actions);
            }
        } else if self.timeout_at().is_some_and(|timeout| timeout <= now) {
            self.timed_out(now, actions);
        }
    }

    fn phase_took_too_long(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        let took = now.saturating_sub(self.phase_at);
        let message = format!("the step {} was not done after {took:?}", self.phase.name());
        self.fail(now, Failure::new(Reason::StepTimeout, message), actions);
    }

    /// The caller's timeout, while it still counts. A round that ends in a forced switchover may go on beyond it only
    /// where there is no post-copy.
    fn timeout_at(&self) -> Option<Duration> {
        let is_answered =
            self.leaves_at_once() || (self.forced && self.parameters.postcopy == Postcopy::Never);
        let counts = self.phase.is_before_switchover() && !is_answered;
        self.parameters.timeout.filter(|_| counts).map(|timeout| self.started_at.saturating_add(timeout))
    }

    fn leaves_at_once(&self) -> bool {
        self.at_once && self.parameters.postcopy != Postcopy::Never
    }

    fn timed_out(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        if self.parameters.postcopy != Postcopy::Never {
            return self.leave_at_once(now, actions);
        }
        match self.parameters.timeout_action {
            TimeoutAction::Force => self.force(now, actions),
            TimeoutAction::Cancel => {
                let message = format!(
                    "the guest was not switched over within the timeout of {:?}. Raise the timeout or max_downtime, \
                     allow post-copy, or choose timeout_action FORCE",
                    self.parameters.timeout.unwrap_or_default()
                );
                self.fail(now, Failure::new(Reason::Timeout, message), actions);
            }
        }
    }

    /// Into post-copy, with what the round under way has not sent.
    fn leave_at_once(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        self.at_once = true;
        match self.phase {
            Phase::Wait => self.harvest(now, actions),
            Phase::Copy | Phase::Recheck => actions.push(SourceAction::StopCopy),
            _ => {}
        }
    }

    fn enter(&mut self, now: Duration, phase: Phase) {
        self.phase_limit = phase.limit().map(|limit| now.saturating_add(limit));
        self.phase_at = now;
        self.phase = phase;
    }

    /// Time since the phase began: what it took, once it is over.
    fn phase_took(&self, now: Duration) -> Duration {
        now.saturating_sub(self.phase_at)
    }

    fn fail(&mut self, now: Duration, failure: Failure, actions: &mut Vec<SourceAction>) {
        self.undo(now, Outcome::Failed(failure.clone()), Some(failure), actions);
    }

    /// Ends with the guest here. Must not be called once COMMIT was sent, unless the destination aborted.
    fn undo(
        &mut self,
        now: Duration,
        outcome: Outcome,
        abort_peer: Option<Failure>,
        actions: &mut Vec<SourceAction>,
    ) {
        assert!(!self.phase.is_in_doubt() || abort_peer.is_none(), "COMMIT was sent");
        if matches!(self.phase, Phase::Pending) {
            return self.finish(outcome, actions);
        }
        let plan = Plan {
            outcome,
            guest: Guest::Stays { resume: !self.phase.is_before_switchover() },
            stop_copy: self.phase.reads_memory(),
            abort_peer,
        };
        self.end(now, plan, actions);
    }

    fn end(&mut self, now: Duration, plan: Plan, actions: &mut Vec<SourceAction>) {
        self.owed = None;
        self.late = Late::default();
        let mut lift = Vec::new();
        self.lift_throttle(now, &mut lift);
        let ending = Ending::begin(now, plan, lift, actions);
        self.enter(now, Phase::Ending(ending));
    }

    fn finish(&mut self, outcome: Outcome, actions: &mut Vec<SourceAction>) {
        self.phase = Phase::Ended(match &outcome {
            Outcome::Succeeded => State::Succeeded,
            Outcome::Failed(_) | Outcome::Lost(_) => State::Failed,
            Outcome::Cancelled => State::Cancelled,
        });
        self.phase_limit = None;
        actions.push(SourceAction::Finish(outcome));
    }
}
