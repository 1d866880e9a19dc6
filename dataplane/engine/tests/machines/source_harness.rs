//! A source whose every move is checked against the rules of who may run the guest.

use std::time::Duration;

use ramferry_engine::{
    Failure, FixedCosts, LateWrites, Outcome, Parameters, Percent, Postcopy, Reason, Source, SourceAction,
    SourceEvent, State,
};
use ramferry_ram::{Block, BlockIndex, Layout, PageRun, PageSets};

pub(crate) const PAGES: u64 = 64;
pub(crate) const PAGE_BYTES: u64 = 4096;

pub(crate) fn milliseconds(count: u64) -> Duration {
    Duration::from_millis(count)
}

pub(crate) fn pages(count: u64) -> PageSets {
    let block = Block {
        name: "ram".into(),
        guest_address: 0,
        length_bytes: PAGES * PAGE_BYTES,
        page_bytes: PAGE_BYTES,
    };
    let mut pages = PageSets::new(&Layout::new(vec![block]).unwrap());
    pages.block_mut(BlockIndex(0)).insert_run(PageRun { first: 0, count });
    pages
}

pub(crate) fn failure(reason: Reason) -> Failure {
    Failure::new(reason, "for a test")
}

pub(crate) fn prepared() -> SourceEvent {
    SourceEvent::Prepared { pages: pages(PAGES), fixed: FixedCosts::default() }
}

pub(crate) fn harvested(count: u64) -> SourceEvent {
    SourceEvent::Harvested { written: pages(count), elapsed: Duration::from_micros(10) }
}

/// `count` pages in 1 ms.
pub(crate) fn copied(count: u64) -> SourceEvent {
    SourceEvent::Copied {
        data_bytes: count * PAGE_BYTES,
        zero_bytes: 0,
        elapsed: milliseconds(1),
        complete: true,
        unsent: pages(0),
    }
}

pub(crate) fn cut_short(unsent: u64) -> SourceEvent {
    SourceEvent::Copied {
        data_bytes: 0,
        zero_bytes: 0,
        elapsed: milliseconds(1),
        complete: false,
        unsent: pages(unsent),
    }
}

pub(crate) fn fenced() -> SourceEvent {
    SourceEvent::Fenced { elapsed: Duration::from_micros(10) }
}

/// `differing` of all pages.
pub(crate) fn rechecked(differing: u64) -> SourceEvent {
    SourceEvent::Rechecked {
        differing: pages(differing),
        checked_bytes: PAGES * PAGE_BYTES,
        elapsed: milliseconds(1),
    }
}

/// Each step of a migration whose guest has pages filled late, and cannot be drained.
pub(crate) fn late_path() -> Vec<(&'static str, SourceEvent)> {
    vec![
        ("pending", SourceEvent::Start),
        ("prepare", SourceEvent::LateWrites(LateWrites::Drainable)),
        ("prepare", prepared()),
        ("copy", copied(PAGES)),
        ("fence", fenced()),
        ("acknowledge", SourceEvent::RoundEnded { round: 1 }),
        ("wait", SourceEvent::Tick),
        ("harvest", harvested(1)),
        ("drain", SourceEvent::Drained { complete: false }),
        ("recheck", rechecked(2)),
        ("copy", copied(2)),
        ("fence", fenced()),
        ("acknowledge", SourceEvent::RoundEnded { round: 2 }),
        ("wait", SourceEvent::Tick),
        ("harvest", harvested(1)),
        ("pause", SourceEvent::GuestPaused),
        ("last_harvest", harvested(2)),
        ("last_recheck", rechecked(3)),
        ("last_copy", copied(3)),
        ("last_fence", fenced()),
        ("last_acknowledge", SourceEvent::RoundEnded { round: 3 }),
        ("verify", SourceEvent::Verified { equal: true }),
        ("device_state", SourceEvent::DeviceStateMoved),
        ("handover", SourceEvent::HandedOverSynced),
        ("commit", SourceEvent::DestinationRunning { memory_owed: false }),
        ("release", SourceEvent::Released),
    ]
}

/// Steps that only a guest has whose pages are filled late.
pub(crate) const LATE_STEPS: [&str; 3] = ["drain", "recheck", "last_recheck"];

/// Each step of a migration that goes well, and the event that leads to the next.
pub(crate) fn good_path() -> Vec<(&'static str, SourceEvent)> {
    vec![
        ("pending", SourceEvent::Start),
        ("prepare", prepared()),
        ("copy", copied(PAGES)),
        ("fence", fenced()),
        ("acknowledge", SourceEvent::RoundEnded { round: 1 }),
        ("wait", SourceEvent::Tick),
        ("harvest", harvested(1)),
        ("pause", SourceEvent::GuestPaused),
        ("last_harvest", harvested(2)),
        ("last_copy", copied(2)),
        ("last_fence", fenced()),
        ("last_acknowledge", SourceEvent::RoundEnded { round: 2 }),
        ("verify", SourceEvent::Verified { equal: true }),
        ("device_state", SourceEvent::DeviceStateMoved),
        ("handover", SourceEvent::HandedOverSynced),
        ("commit", SourceEvent::DestinationRunning { memory_owed: false }),
        ("release", SourceEvent::Released),
    ]
}

/// The switchover of a migration that does not compare RAM: the device state is there before the acknowledgement.
pub(crate) fn path_without_verify() -> Vec<(&'static str, SourceEvent)> {
    let mut path = good_path();
    path.retain(|(phase, _)| !["verify", "last_acknowledge", "device_state"].contains(phase));
    let handover = path.iter().position(|(phase, _)| *phase == "handover").unwrap();
    path.insert(handover, ("device_state", SourceEvent::DeviceStateMoved));
    path.insert(handover + 1, ("last_acknowledge", SourceEvent::RoundEnded { round: 2 }));
    path
}

/// A migration into post-copy, with a guest whose pages are filled late.
pub(crate) fn postcopy_path() -> Vec<(&'static str, SourceEvent)> {
    vec![
        ("pending", SourceEvent::Start),
        ("prepare", SourceEvent::LateWrites(LateWrites::Drainable)),
        ("prepare", prepared()),
        ("copy", copied(PAGES)),
        ("fence", fenced()),
        ("acknowledge", SourceEvent::RoundEnded { round: 1 }),
        ("wait", SourceEvent::Tick),
        ("harvest", harvested(1)),
        ("pause", SourceEvent::GuestPaused),
        ("last_harvest", harvested(2)),
        ("send_owed", SourceEvent::OwedAccepted),
        ("device_state", SourceEvent::DeviceStateMoved),
        ("handover", SourceEvent::HandedOverSynced),
        ("commit", SourceEvent::DestinationRunning { memory_owed: true }),
        ("serve", SourceEvent::MemoryLost(failure(Reason::LinkLost))),
        ("memory_lost", SourceEvent::DestinationLost(failure(Reason::MemoryLost))),
        ("release", SourceEvent::Released),
    ]
}

/// Steps that only a migration into post-copy has.
pub(crate) const POSTCOPY_STEPS: [&str; 3] = ["send_owed", "serve", "memory_lost"];

#[derive(Clone, Debug)]
pub(crate) struct Checked {
    pub(crate) source: Source,
    pub(crate) now: Duration,
    /// Every action so far.
    pub(crate) actions: Vec<SourceAction>,
    pause_ordered: bool,
    resumed_since_pause: bool,
    handed_over_synced: bool,
    commit_may_be_out: bool,
    peer_aborted: bool,
    peer_running: bool,
    /// Rounds that the destination acknowledged once it was told of their end.
    acknowledged: Option<u32>,
    device_state_moved: bool,
    /// Nothing is owed to it any more.
    peer_has_everything: bool,
    peer_lost_memory: bool,
    owed_accepted: bool,
    verify: bool,
    /// As the last parameters had it.
    postcopy: Postcopy,
    throttle: Option<Percent>,
    /// As it was last ordered.
    throttled: Percent,
}

impl Checked {
    pub(crate) fn new(parameters: Parameters) -> Self {
        let Parameters { verify, postcopy, throttle, .. } = parameters;
        Self { verify, postcopy, throttle, ..Self::over(Source::new(parameters).unwrap()) }
    }

    pub(crate) fn restarted_before_handover() -> Self {
        let source = Source::recover_before_handover(Parameters::default());
        Self { pause_ordered: true, ..Self::over(source) }
    }

    pub(crate) fn restarted_handed_over() -> Self {
        let source = Source::recover_handed_over(Parameters::default());
        Self { pause_ordered: true, commit_may_be_out: true, ..Self::over(source) }
    }

    /// A migration that verifies, as far as `phase` on the good path.
    pub(crate) fn at(phase: &str) -> Self {
        let path = match phase {
            phase if LATE_STEPS.contains(&phase) => late_path(),
            phase if POSTCOPY_STEPS.contains(&phase) => postcopy_path(),
            _ => good_path(),
        };
        Self::on(path, phase)
    }

    /// The same, on `path`, which verifies where it has a step for that, and leads into post-copy where it has.
    pub(crate) fn on(path: Vec<(&'static str, SourceEvent)>, phase: &str) -> Self {
        let has = |step| path.iter().any(|(name, _)| *name == step);
        let postcopy = if has("send_owed") { Postcopy::Always } else { Postcopy::Never };
        let parameters = Parameters { verify: has("verify"), postcopy, ..Parameters::default() };
        let mut checked = Self::new(parameters);
        for (name, event) in path {
            assert_eq!(checked.source.phase(), name);
            if name == phase {
                return checked;
            }
            if event == SourceEvent::Tick {
                checked.now = checked.source.deadline().unwrap();
            }
            checked.handle(event);
        }
        assert_eq!(checked.source.phase(), phase);
        checked
    }

    fn over(source: Source) -> Self {
        Self {
            source,
            now: milliseconds(1),
            actions: Vec::new(),
            pause_ordered: false,
            resumed_since_pause: false,
            handed_over_synced: false,
            commit_may_be_out: false,
            peer_aborted: false,
            peer_running: false,
            acknowledged: None,
            device_state_moved: false,
            peer_has_everything: false,
            peer_lost_memory: false,
            owed_accepted: false,
            verify: false,
            postcopy: Postcopy::default(),
            throttle: None,
            throttled: Percent(0),
        }
    }

    /// Handles `event`, checks what is done, and returns it.
    pub(crate) fn handle(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        match &event {
            SourceEvent::DestinationAborted(_) if !self.peer_running => self.peer_aborted = true,
            SourceEvent::DestinationRunning { memory_owed }
                if self.commit_may_be_out && !self.peer_aborted && !self.peer_lost_memory =>
            {
                self.peer_running = true;
                self.peer_has_everything |= !memory_owed;
            }
            SourceEvent::DestinationLost(_)
                if self.commit_may_be_out && !self.peer_aborted && !self.peer_has_everything =>
            {
                (self.peer_running, self.peer_lost_memory) = (true, true);
            }
            SourceEvent::HandedOverSynced if self.source.phase() == "handover" => {
                self.handed_over_synced = true;
            }
            SourceEvent::RoundEnded { round }
                if self.times(&SourceAction::EndRound { round: *round }) > 0 =>
            {
                self.acknowledged = self.acknowledged.max(Some(*round));
            }
            SourceEvent::OwedAccepted => {
                self.owed_accepted |= matches!(self.actions.last(), Some(SourceAction::SendOwed { .. }));
            }
            SourceEvent::SetParameters(parameters) if parameters.check().is_ok() => {
                let Parameters { verify, postcopy, throttle, .. } = *parameters;
                (self.verify, self.postcopy, self.throttle) = (verify, postcopy, throttle);
            }
            SourceEvent::DeviceStateMoved => {
                self.device_state_moved = self.times(&SourceAction::MoveDeviceState) > 0;
            }
            _ => {}
        }
        let ended_before = self.ended().is_some();
        let mut actions = Vec::new();
        self.source.handle(self.now, event, &mut actions);
        assert!(!ended_before || actions.is_empty(), "{actions:?} after the end");
        for (index, action) in actions.iter().enumerate() {
            self.check(index, action, actions.len());
            self.actions.push(action.clone());
        }
        self.check_between();
        actions
    }

    /// The same source after `event`.
    pub(crate) fn then(&self, event: &SourceEvent) -> Self {
        let mut checked = self.clone();
        checked.handle(event.clone());
        checked
    }

    /// The time passes until the next tick is due; false when none is.
    pub(crate) fn tick(&mut self) -> bool {
        let Some(deadline) = self.source.deadline() else { return false };
        self.now = self.now.max(deadline);
        self.handle(SourceEvent::Tick);
        true
    }

    pub(crate) fn ended(&self) -> Option<&Outcome> {
        match self.actions.last() {
            Some(SourceAction::Finish(outcome)) => Some(outcome),
            _ => None,
        }
    }

    pub(crate) fn times(&self, action: &SourceAction) -> usize {
        self.actions.iter().filter(|done| *done == action).count()
    }

    fn check(&mut self, index: usize, action: &SourceAction, batch: usize) {
        let before = &self.actions;
        match action {
            SourceAction::PauseGuest { postcopy } => {
                assert!(*postcopy || self.postcopy != Postcopy::Always);
                assert!(!*postcopy || self.postcopy != Postcopy::Never, "post-copy without consent");
                assert!(!self.pause_ordered, "paused twice");
                self.pause_ordered = true;
            }
            SourceAction::ResumeGuest => {
                assert_eq!(index, 0, "the guest comes first");
                assert!(!self.peer_running, "resumed while the destination runs");
                assert!(!self.commit_may_be_out || self.peer_aborted, "resumed in doubt");
                self.resumed_since_pause = true;
            }
            SourceAction::WriteHandedOver => {
                assert_eq!(before.last(), Some(&SourceAction::MoveDeviceState));
                assert!(self.device_state_moved, "hands over what has not arrived");
                assert_eq!(self.source.progress().postcopy, self.owed_accepted, "what is owed must be held");
                let is_acknowledged = self.acknowledged == Some(self.source.progress().round);
                assert!(is_acknowledged || self.owed_accepted, "an unacknowledged round");
            }
            SourceAction::SendCommit => {
                assert!(self.handed_over_synced, "COMMIT before HANDED_OVER is durable");
                assert!(!self.resumed_since_pause, "COMMIT after the guest was resumed");
                assert!(!self.commit_may_be_out, "COMMIT twice");
                self.commit_may_be_out = true;
            }
            SourceAction::AskOutcome => assert!(self.commit_may_be_out && !self.peer_running),
            SourceAction::Reconnect | SourceAction::TellMemoryLost(_) => {
                assert!(self.peer_running && !self.peer_has_everything, "{action:?}");
                assert!(!self.peer_lost_memory, "{action:?}");
            }
            SourceAction::SendOwed { pages } => {
                assert!(!pages.is_empty());
                let asked: Vec<_> =
                    before.iter().filter(|action| **action != SourceAction::SaveDeviceState).collect();
                let wanted = [&SourceAction::PauseGuest { postcopy: true }, &SourceAction::Harvest];
                assert!(asked.ends_with(&wanted), "what the guest wrote last is not among it");
            }
            SourceAction::SaveDeviceState => {
                let is_early = matches!(before.last(), Some(SourceAction::PauseGuest { .. }));
                assert!(!(is_early && self.verify), "saved before RAM was compared");
                assert!(is_early || self.source.phase() == "device_state", "saved while it may run");
                assert_eq!(self.times(action), 0, "saved twice");
            }
            SourceAction::MoveDeviceState => {
                assert_eq!(self.times(&SourceAction::SaveDeviceState), 1, "not saved");
                let last = before.iter().rfind(|action| **action != SourceAction::SaveDeviceState);
                assert!(self.owed_accepted || !matches!(last, Some(SourceAction::SendOwed { .. })));
            }
            SourceAction::Release => {
                assert_eq!(self.times(action), 0, "released twice");
                let is_served = self.peer_running && !self.peer_lost_memory;
                assert!(!is_served || self.peer_has_everything, "lets go of what is owed");
            }
            SourceAction::AbortPeer(_) => assert!(!self.commit_may_be_out, "aborts what may be committed"),
            SourceAction::ThrottleGuest { percent } => {
                if *percent > Percent(0) {
                    assert!(!self.pause_ordered && self.times(&SourceAction::Release) == 0);
                    assert!(self.postcopy == Postcopy::Never, "throttled where post-copy is allowed");
                    assert!(
                        self.throttle.is_some_and(|most| *percent <= most),
                        "{percent:?} without consent"
                    );
                }
                self.throttled = *percent;
            }
            SourceAction::Finish(outcome) => {
                assert_eq!(self.throttled, Percent(0), "left the guest throttled");
                assert_eq!(index + 1, batch, "actions after the end");
                self.check_outcome(outcome);
            }
            _ => assert_eq!(self.times(&SourceAction::Release), 0, "{action:?} after the release"),
        }
    }

    fn check_outcome(&self, outcome: &Outcome) {
        match outcome {
            Outcome::Succeeded => {
                assert!(self.peer_running && !self.peer_aborted, "no word that the guest runs there");
                assert!(self.peer_has_everything && !self.peer_lost_memory, "its memory is not there");
            }
            Outcome::Lost(failure) => {
                assert!(self.peer_lost_memory, "no word that the guest was stopped there");
                assert_eq!(failure.reason, Reason::MemoryLost);
            }
            Outcome::Failed(_) | Outcome::Cancelled => {
                assert!(!self.peer_running, "the guest is not here");
                assert!(!self.commit_may_be_out || self.peer_aborted, "gave up in doubt");
                assert!(!self.pause_ordered || self.resumed_since_pause, "left the guest paused");
            }
        }
    }

    fn check_between(&self) {
        assert_eq!(self.source.state().is_final(), self.ended().is_some());
        let phase = self.source.phase();
        let waits_for_ever = ["pending", "copy", "ended"].contains(&phase);
        assert!(waits_for_ever || self.source.deadline().is_some(), "no deadline in {phase}");
        if self.commit_may_be_out {
            assert!(!self.source.can_cancel() || self.peer_aborted);
        }
        if self.source.state() == State::Succeeded {
            assert!(self.peer_running);
        }
    }
}
