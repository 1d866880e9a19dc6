//! A source's driver over links that fail on purpose: the migration succeeds with
//! every byte in its place, or fails with its reason; and no thread is left.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use ramferry_engine::{
    FixedCosts, LateWrites, Outcome, Parameters, Reason, Source, SourceAction, SourceEvent,
};
use ramferry_fabric::conformance::TestMemory;
use ramferry_fabric::faulty::{Faults, FaultyLink};
use ramferry_fabric::windows::{RegistrationMode, WindowConfig, WindowId};
use ramferry_fabric::{
    Completion, Domain, Link, LinkError, MappedDomain, OpId, PostError, Rights, SessionToken, Transfer, tcp,
};
use ramferry_mover::{
    CompletionStatus, Counted, Opcode, PeerOrder, SourceHandle, SourceInput, SourceOutside, SourceParts,
    SourceSnapshot, spawn_source,
};
use ramferry_ram::{Access, PageSets};
use ramferry_tracking::{Harvest, TrackError, Tracker, TrackerKind};

const PATIENCE: Duration = Duration::from_secs(30);
const LINKS: u32 = 2;

/// A guest that writes nothing.
struct Idle;

impl Tracker for Idle {
    fn kind(&self) -> TrackerKind {
        TrackerKind::UffdWp
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

/// The destination: memory, regions, and answers.
struct Peer {
    memory: TestMemory,
    domain: Arc<MappedDomain>,
    regions: std::sync::Mutex<std::collections::HashMap<WindowId, ramferry_fabric::RegionKey>>,
}

impl Peer {
    fn answer(&self, handle: &SourceHandle, order: PeerOrder) {
        match order {
            PeerOrder::RegisterWindows(windows) => {
                let rights = Rights { remote_write: true, remote_read: false };
                for window in windows {
                    let key = self.domain.register(window.range, rights).unwrap().key;
                    self.regions.lock().unwrap().insert(window.id, key);
                    handle.send(SourceInput::WindowsRegistered(vec![(window.id, Ok(key))]));
                }
            }
            PeerOrder::ReleaseWindows(ids) => {
                for id in &ids {
                    let key = self.regions.lock().unwrap().remove(id).unwrap();
                    self.domain.deregister(key).unwrap();
                }
                handle.send(SourceInput::WindowsReleased(ids));
            }
            PeerOrder::ZeroPages { .. } => unreachable!("no page of the pattern is zero"),
        }
    }
}

/// What is not memory: done at once, and well.
struct Outside {
    handle: SourceHandle,
    peer: Arc<Peer>,
    parts: Option<Box<SourceParts>>,
    counted: Counted,
    finished: Sender<(Outcome, Counted)>,
}

impl SourceOutside for Outside {
    fn act(&mut self, action: SourceAction) {
        let input = match action {
            SourceAction::Prepare => SourceInput::Ready(self.parts.take().unwrap()),
            SourceAction::EndRound { round } => SourceEvent::RoundEnded { round }.into(),
            SourceAction::PauseGuest { .. } => SourceInput::GuestPaused(Duration::ZERO),
            SourceAction::Verify => SourceInput::PeerDigests(self.peer.memory.memory.digests().unwrap()),
            SourceAction::SaveDeviceState => return,
            SourceAction::MoveDeviceState => SourceEvent::DeviceStateMoved.into(),
            SourceAction::WriteHandedOver => SourceEvent::HandedOverSynced.into(),
            SourceAction::SendCommit => SourceEvent::DestinationRunning { memory_owed: false }.into(),
            SourceAction::ResumeGuest => SourceEvent::GuestResumed.into(),
            SourceAction::AbortPeer(_) => SourceEvent::PeerAborted.into(),
            SourceAction::Finish(outcome) => return self.finished.send((outcome, self.counted)).unwrap(),
            action => unreachable!("{action:?}"),
        };
        self.handle.send(input);
    }

    fn publish(&mut self, snapshot: &SourceSnapshot) {
        self.counted = snapshot.counted;
    }
}

/// Moves memory over links that `wrap` makes faulty; the outcome, and whether it arrived.
fn move_over(mode: RegistrationMode, wrap: impl Fn(Box<dyn Link>) -> Box<dyn Link>) -> (Outcome, bool) {
    let source = TestMemory::with_blocks(1, Access::ReadWrite, &[24 << 20, 8 << 20]);
    let memory = TestMemory::with_blocks(2, Access::ReadWrite, &[24 << 20, 8 << 20]);
    let domain = Arc::new(MappedDomain::new(Arc::clone(&memory.memory)).unwrap());
    let listener = tcp::Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let token = SessionToken::random().unwrap();
    let _admission = listener.admit(token.clone(), Arc::clone(&domain), LINKS);
    let source_domain = Arc::new(MappedDomain::new(Arc::clone(&source.memory)).unwrap());
    let connect = |_| {
        let domain = Arc::clone(&source_domain);
        wrap(tcp::connect(listener.local_addr(), &token, domain, PATIENCE).unwrap())
    };
    let links = (0..LINKS).map(connect).collect();
    let destination_presence = memory.memory.presence().unwrap();
    let peer = Arc::new(Peer { memory, domain, regions: std::sync::Mutex::default() });

    let (finished, outcome) = channel();
    let parameters = Parameters { verify: true, ..Parameters::default() };
    let (_, thread) = spawn_source(Source::new(parameters).unwrap(), |handle| {
        let (answering, answers) = (Arc::clone(&peer), handle.clone());
        let parts = SourceParts {
            links,
            domain: Arc::clone(&source_domain) as Arc<dyn Domain>,
            tracker: Box::new(Idle),
            memory: Arc::clone(&source.memory),
            windows: WindowConfig::new(mode),
            registration_workers: 2,
            destination_presence,
            late_writes: LateWrites::None,
            fixed_costs: FixedCosts { fence: Duration::from_millis(1), device_state: Duration::ZERO },
            order: Box::new(move |order| {
                answering.answer(&answers, order);
                true
            }),
            poller_cpus: None,
        };
        let counted = Counted::default();
        Outside { handle, peer: Arc::clone(&peer), parts: Some(Box::new(parts)), counted, finished }
    });
    let (outcome, counted) = outcome.recv_timeout(PATIENCE).expect("it ends in time");
    thread.join().unwrap();
    let arrived = source.all() == peer.memory.all();
    for (opcode, operations) in Opcode::ALL.into_iter().zip(counted.operations) {
        let ended: u64 = operations.completed.iter().sum();
        assert!(ended <= operations.posted && operations.latency.iter().sum::<u64>() == ended);
        if outcome == Outcome::Succeeded {
            assert_eq!(operations.completed[CompletionStatus::Success as usize], operations.posted);
            assert!((operations.posted > 0) == (opcode != Opcode::Read) && operations.in_flight() == 0);
        }
    }
    (outcome, arrived)
}

fn reason(outcome: &Outcome) -> Reason {
    match outcome {
        Outcome::Failed(failure) => failure.reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_arrives_over_links_that_are_late_full_and_out_of_order() {
    for mode in [RegistrationMode::Dynamic, RegistrationMode::PinAll] {
        let faults =
            Faults { delay_polls: 7, refuse_every: Some(3), reverse_completions: true, ..Faults::default() };
        let (outcome, arrived) = move_over(mode, |link| Box::new(FaultyLink::new(link, faults)));
        assert_eq!(outcome, Outcome::Succeeded);
        assert!(arrived);
    }
}

#[test]
fn link_that_dies_or_loses_an_operation_fails_the_migration_and_a_retry_succeeds() {
    for number in [1, 2, 3, 8, 21] {
        for faults in [
            Faults { die_after_operations: Some(number), ..Faults::default() },
            Faults { lose_operation: Some(number), delay_polls: 2, ..Faults::default() },
        ] {
            let wrap = |link| -> Box<dyn Link> { Box::new(FaultyLink::new(link, faults)) };
            let (outcome, _) = move_over(RegistrationMode::Dynamic, wrap);
            // Links share the work: each may have less of it than that.
            if number <= 8 || outcome != Outcome::Succeeded {
                assert_eq!(reason(&outcome), Reason::LinkLost, "{faults:?}");
            }
        }
    }
    let (outcome, arrived) = move_over(RegistrationMode::Dynamic, |link| link);
    assert_eq!((outcome, arrived), (Outcome::Succeeded, true));
}

/// Panics where a thread of ours would have a defect.
struct Defective(Box<dyn Link>);

impl Link for Defective {
    fn post_write(&mut self, _: Transfer) -> Result<(), PostError> {
        panic!("injected defect")
    }

    fn post_read(&mut self, op: Transfer) -> Result<(), PostError> {
        self.0.post_read(op)
    }

    fn post_fence(&mut self, id: OpId) -> Result<(), PostError> {
        self.0.post_fence(id)
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        self.0.poll(completions)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), LinkError> {
        self.0.wait(timeout)
    }

    fn close(self: Box<Self>) {
        self.0.close();
    }

    fn is_dead(&self) -> Option<&LinkError> {
        self.0.is_dead()
    }
}

#[test]
fn copying_thread_that_panics_fails_the_migration() {
    let (outcome, _) = move_over(RegistrationMode::Dynamic, |link| Box::new(Defective(link)));
    assert_eq!(reason(&outcome), Reason::Internal);
}
