//! Answers of a destination on the control stream, at a source's driver and engine that migrate a guest. Each time
//! the source asks for something, the next answer of the input comes first, and the right one after it.
#![no_main]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use ramferry_agent::fuzzing::Answers;
use ramferry_engine::{
    Failure, FixedCosts, LateWrites, Outcome, Parameters, Reason, Source, SourceAction, SourceEvent,
};
use ramferry_fabric::windows::{RegistrationMode, WindowConfig};
use ramferry_fabric::{Completion, Link, LinkError, MappedDomain, OpId, PostError, RegionKey, Transfer};
use ramferry_fuzz::{PAGE, layout, memory, messages, range};
use ramferry_mover::{
    PeerOrder, SourceHandle, SourceInput, SourceOutside, SourceParts, SourceSnapshot, spawn_source,
};
use ramferry_ram::{Memory, PageSets};
use ramferry_tracking::{Harvest, TrackError, Tracker, TrackerKind};

const PAGES: u64 = 32;

/// What the destination says, and to whom.
struct Peer {
    script: Mutex<VecDeque<SourceInput>>,
    source: OnceLock<SourceHandle>,
    /// It said that the guest never will run there.
    aborted: AtomicBool,
}

impl Peer {
    /// The next answer of the input, then the right one.
    fn answer(&self, right: Option<SourceInput>) {
        let Some(source) = self.source.get() else { return };
        let next = self.script.lock().expect("no panic while it is held").pop_front();
        for input in next.into_iter().chain(right) {
            if let SourceInput::Event(SourceEvent::DestinationAborted(_)) = input {
                self.aborted.store(true, Ordering::SeqCst);
            }
            source.send(input);
        }
    }

    fn take(&self, order: PeerOrder) -> bool {
        let right = match order {
            PeerOrder::RegisterWindows(windows) => {
                let registered = windows.into_iter().map(|window| (window.id, Ok(RegionKey(window.id.0))));
                Some(SourceInput::WindowsRegistered(registered.collect()))
            }
            PeerOrder::ReleaseWindows(ids) => Some(SourceInput::WindowsReleased(ids)),
            PeerOrder::ZeroPages { .. } => None,
        };
        self.answer(right);
        true
    }
}

/// An agent whose guest does whatever it is told, at once.
struct Agent {
    peer: Arc<Peer>,
    /// Until the driver has it, which waits for whoever else holds it when it ends.
    start: Option<Arc<Memory>>,
    memory: Weak<Memory>,
    presence: PageSets,
    orders: Vec<&'static str>,
    ended: Sender<(Outcome, Vec<&'static str>)>,
}

impl SourceOutside for Agent {
    fn act(&mut self, action: SourceAction) {
        let right: SourceInput = match action {
            SourceAction::Prepare => SourceInput::Ready(Box::new(self.parts())),
            SourceAction::EndRound { round } => SourceEvent::RoundEnded { round }.into(),
            SourceAction::PauseGuest { .. } => {
                self.orders.push("pause");
                SourceEvent::GuestPaused.into()
            }
            SourceAction::Verify => {
                let memory = self.memory.upgrade().expect("the driver holds it");
                SourceInput::PeerDigests(memory.digests().expect("RAM is there"))
            }
            SourceAction::MoveDeviceState => SourceEvent::DeviceStateMoved.into(),
            SourceAction::WriteHandedOver => {
                self.orders.push("HANDED_OVER");
                SourceEvent::HandedOverSynced.into()
            }
            SourceAction::SendCommit => {
                self.orders.push("COMMIT");
                SourceEvent::DestinationRunning { memory_owed: false }.into()
            }
            SourceAction::AskOutcome => {
                SourceEvent::DestinationAborted(Failure::new(Reason::DestinationAborted, "asked")).into()
            }
            SourceAction::AbortPeer(_) => SourceEvent::PeerAborted.into(),
            SourceAction::ResumeGuest => {
                self.orders.push("resume");
                SourceEvent::GuestResumed.into()
            }
            SourceAction::Finish(outcome) => {
                let _ = self.ended.send((outcome, std::mem::take(&mut self.orders)));
                return;
            }
            _ => return,
        };
        self.peer.answer(Some(right));
    }

    fn publish(&mut self, _: &SourceSnapshot) {}
}

impl Agent {
    fn parts(&mut self) -> SourceParts {
        let peer = Arc::clone(&self.peer);
        let memory = self.start.take().expect("it is prepared once");
        SourceParts {
            links: vec![Box::new(Echo(Vec::new()))],
            domain: Arc::new(MappedDomain::new(Arc::clone(&memory)).expect("presence is known")),
            tracker: Box::new(Still),
            memory,
            // So few bytes that windows come and go.
            windows: WindowConfig {
                window_bytes: 2 * PAGE,
                pin_budget_bytes: Some(8 * PAGE),
                ..WindowConfig::new(RegistrationMode::Dynamic)
            },
            registration_workers: 1,
            destination_presence: self.presence.clone(),
            late_writes: LateWrites::None,
            fixed_costs: FixedCosts { fence: Duration::ZERO, device_state: Duration::ZERO },
            order: Box::new(move |order| peer.take(order)),
            poller_cpus: None,
        }
    }
}

/// A link that has carried out whatever is asked of it.
struct Echo(Vec<OpId>);

impl Link for Echo {
    fn post_write(&mut self, op: Transfer) -> Result<(), PostError> {
        self.post_fence(op.id)
    }

    fn post_read(&mut self, op: Transfer) -> Result<(), PostError> {
        self.post_fence(op.id)
    }

    fn post_fence(&mut self, id: OpId) -> Result<(), PostError> {
        self.0.push(id);
        Ok(())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let count = self.0.len();
        completions.extend(self.0.drain(..).map(|id| Completion { id, result: Ok(()) }));
        count
    }

    fn wait(&mut self, _: Duration) -> Result<(), LinkError> {
        Ok(())
    }

    fn close(self: Box<Self>) {}

    fn is_dead(&self) -> Option<&LinkError> {
        None
    }
}

/// Of a guest that writes nothing.
struct Still;

impl Tracker for Still {
    fn kind(&self) -> TrackerKind {
        TrackerKind::SoftDirty
    }

    fn harvest(&mut self, _: &mut PageSets) -> Result<Harvest, TrackError> {
        Ok(Harvest { written_pages: 0, elapsed: Duration::ZERO })
    }

    fn recheck(&mut self, _: &mut PageSets) -> Result<(), TrackError> {
        Ok(())
    }

    fn has_other_writers(&self) -> bool {
        false
    }

    fn confirm(&mut self) -> Result<(), TrackError> {
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let mut answers = Answers::new(&layout(PAGES));
    let mut script = VecDeque::new();
    for message in messages(data) {
        match answers.take(message) {
            Ok(input) => script.extend(input),
            Err(why) => {
                assert!(!why.is_empty());
                return;
            }
        }
    }
    let presence = answers.presence.unwrap_or_else(|| PageSets::new(&layout(PAGES)));
    assert!(presence.ranges().all(|range| layout(PAGES).contains(range)));
    if script.is_empty() {
        return;
    }
    let memory = memory(PAGES);
    memory.span(range(PAGE, 20 * PAGE)).expect("a span").write_from(&[7; 20 * PAGE as usize]);
    let peer = Arc::new(Peer {
        script: Mutex::new(script),
        source: OnceLock::new(),
        aborted: AtomicBool::new(false),
    });
    let (ended, outcome) = channel();
    let parameters = Parameters { verify: true, ..Parameters::default() };
    let agent_peer = Arc::clone(&peer);
    let (_, thread) = spawn_source(Source::new(parameters).expect("parameters"), |handle| {
        let _ = agent_peer.source.set(handle);
        let weak = Arc::downgrade(&memory);
        Agent { peer: agent_peer, start: Some(memory), memory: weak, presence, orders: Vec::new(), ended }
    });
    thread.join().expect("no answer makes the driver panic");
    let (outcome, orders) = outcome.recv().expect("the engine ends");

    // The rule of who may run the guest.
    let place = |what| orders.iter().position(|order| *order == what);
    if let Some(commit) = place("COMMIT") {
        assert!(place("HANDED_OVER").is_some_and(|handed_over| handed_over < commit), "{orders:?}");
        let resumed = orders[commit..].contains(&"resume");
        assert!(!resumed || peer.aborted.load(Ordering::SeqCst), "resumed in doubt: {orders:?}");
        assert_eq!(outcome == Outcome::Succeeded, !resumed, "{orders:?}");
    } else {
        assert_ne!(outcome, Outcome::Succeeded);
        assert!(place("pause").is_none() || place("resume") > place("pause"), "paused for ever: {orders:?}");
    }
});
