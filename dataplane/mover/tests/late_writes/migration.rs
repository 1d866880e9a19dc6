//! A source's driver over shm, with the rest of a migration played by the test.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use ramferry_engine::{FixedCosts, Outcome, Parameters, Progress, Source, SourceAction, SourceEvent};
use ramferry_fabric::windows::{RegistrationMode, WindowConfig};
use ramferry_fabric::{Admission, Domain, MappedDomain, Rights, SessionToken, shm};
use ramferry_mover::{
    PeerOrder, SourceHandle, SourceInput, SourceOutside, SourceParts, SourceSnapshot, spawn_source,
};
use ramferry_ram::{Access, BlockRange, Layout, Memory, RamFile};
use ramferry_tracking::Tracker;

pub(crate) use ramferry_engine::LateWrites;

const PATIENCE: Duration = Duration::from_secs(60);

/// Where a test may fill pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    RoundEnded(u32),
    Drain,
    Pause,
}

pub(crate) type Fill = Box<dyn FnMut(Moment) + Send>;

/// What a migration is to be.
pub(crate) struct Plan {
    pub(crate) layout: Layout,
    pub(crate) source: RamFile,
    pub(crate) destination: RamFile,
    pub(crate) tracker: Box<dyn Tracker>,
    pub(crate) late_writes: LateWrites,
    /// Whether a drain is complete.
    pub(crate) drains: bool,
}

/// How it ended.
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) progress: Progress,
    pub(crate) late_writes: LateWrites,
    /// Each step at which the outside was asked for something.
    pub(crate) moments: Vec<Moment>,
}

/// Runs a migration; `fill` is called while the driver waits for the answer at that moment.
pub(crate) fn migrate(plan: Plan, fill: Fill) -> Ended {
    let Plan { layout, source, destination, tracker, late_writes, drains } = plan;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("shm.sock");
    let memory = |file, access| Arc::new(Memory::new(layout.clone(), vec![file], access).unwrap());
    let (source, destination) = (memory(source, Access::Read), memory(destination, Access::ReadWrite));
    let destination_presence = destination.presence().unwrap();
    let far = Arc::new(MappedDomain::new(Arc::clone(&destination)).unwrap());
    let token = SessionToken::random().unwrap();
    let listener = shm::Listener::bind(&path).unwrap();
    let admission: Admission = listener.admit(token.clone(), Arc::clone(&far), 2);
    let near = Arc::new(MappedDomain::new(Arc::clone(&source)).unwrap());
    let links = (0..2).map(|_| shm::connect(&path, &token, Arc::clone(&near), PATIENCE).unwrap()).collect();
    let (ended, end) = channel();
    let (handle, thread) = spawn_source(Source::new(Parameters::default()).unwrap(), |handle| {
        let answering = handle.clone();
        let parts = SourceParts {
            links,
            domain: near,
            tracker,
            memory: source,
            windows: WindowConfig::new(RegistrationMode::Dynamic),
            registration_workers: 1,
            destination_presence,
            late_writes,
            fixed_costs: FixedCosts::default(),
            order: Box::new(move |order| answer(&order, &far, &destination, &answering)),
            poller_cpus: None,
        };
        Outside { handle, parts: Some(parts), fill, drains, moments: Vec::new(), last: None, ended }
    });
    let ended = end.recv_timeout(PATIENCE).unwrap();
    drop(handle);
    thread.join().unwrap();
    drop(admission);
    ended
}

/// The destination's agent.
fn answer(order: &PeerOrder, domain: &MappedDomain, memory: &Memory, source: &SourceHandle) -> bool {
    match order {
        PeerOrder::RegisterWindows(windows) => {
            let keys = windows.iter().map(|window| {
                let region = domain.register(window.range, Rights::REMOTE_WRITE);
                (window.id, region.map(|region| region.key).map_err(|error| error.to_string()))
            });
            source.send(SourceInput::WindowsRegistered(keys.collect()));
        }
        PeerOrder::ReleaseWindows(ids) => source.send(SourceInput::WindowsReleased(ids.clone())),
        PeerOrder::ZeroPages { block, runs } => {
            let page_bytes = memory.layout().blocks()[block.get()].page_bytes;
            for run in runs {
                let (offset, length) = (run.first * page_bytes, run.count * page_bytes);
                memory.span(BlockRange { block: *block, offset, length }).unwrap().zero();
            }
        }
    }
    true
}

struct Outside {
    handle: SourceHandle,
    parts: Option<SourceParts>,
    fill: Fill,
    drains: bool,
    moments: Vec<Moment>,
    last: Option<SourceSnapshot>,
    ended: Sender<Ended>,
}

impl Outside {
    fn at(&mut self, moment: Moment) {
        self.moments.push(moment);
        (self.fill)(moment);
    }
}

impl SourceOutside for Outside {
    fn act(&mut self, action: SourceAction) {
        let event = match action {
            SourceAction::Prepare => {
                let parts = self.parts.take().unwrap();
                return self.handle.send(SourceInput::Ready(Box::new(parts)));
            }
            SourceAction::EndRound { round } => {
                self.at(Moment::RoundEnded(round));
                SourceEvent::RoundEnded { round }
            }
            SourceAction::DrainGuest => {
                self.at(Moment::Drain);
                SourceEvent::Drained { complete: self.drains }
            }
            SourceAction::PauseGuest { .. } => {
                self.at(Moment::Pause);
                return self.handle.send(SourceInput::GuestPaused(Duration::ZERO));
            }
            SourceAction::SaveDeviceState => return,
            SourceAction::MoveDeviceState => SourceEvent::DeviceStateMoved,
            SourceAction::WriteHandedOver => SourceEvent::HandedOverSynced,
            SourceAction::SendCommit => SourceEvent::DestinationRunning { memory_owed: false },
            SourceAction::AbortPeer(_) => SourceEvent::PeerAborted,
            SourceAction::ResumeGuest => SourceEvent::GuestResumed,
            SourceAction::Finish(outcome) => {
                let last = self.last.take().unwrap();
                let (progress, late_writes) = (last.progress, last.late_writes);
                let moments = std::mem::take(&mut self.moments);
                return drop(self.ended.send(Ended { outcome, progress, late_writes, moments }));
            }
            other => panic!("{other:?} is not ordered of a source that does not verify"),
        };
        self.handle.send(event);
    }

    fn publish(&mut self, snapshot: &SourceSnapshot) {
        self.last = Some(snapshot.clone());
    }
}
