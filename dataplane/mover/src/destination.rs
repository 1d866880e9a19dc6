//! The destination's driver. Memory arrives through the links without it; it
//! registers the windows that the source asks for, clears zero pages, and runs
//! the destination's engine. In post-copy it reads what the guest is still owed.

mod postcopy;

pub use postcopy::reads_lost;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ramferry_engine::{Destination, DestinationAction, DestinationEvent, Failure, Reason, State};
use ramferry_fabric::windows::{Window, WindowId};
use ramferry_fabric::{Domain, LinkError, RegionKey, Rights};
use ramferry_ram::{BlockIndex, BlockRange, Digest, Memory, Owed, PageRun, PageSet, PageSets};
use ramferry_tracking::postcopy::RemoteFaults;

use crate::counters::Counters;
use crate::pull::{Pull, PullReport, Readers, ReadsSlot};
use crate::served::{Place, Served, WindowsAnswer};
use crate::{Counted, MoverError, RegistrationEvents, Step, wait_until_gone};

/// Between two publications, and two looks at the links.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(100);

/// What a destination's driver leaves to others. Everything is called on the
/// driver's thread.
pub trait DestinationOutside: Send {
    /// Carries out any action but `DrainRound`, `Digest`, `HoldOwed` and `Release`. Must not
    /// block for long; must see to it that the action's event reaches the driver
    /// later. For `Prepare` that is [`DestinationInput::Ready`]. With `StartIncoming` into post-copy,
    /// [`DestinationInput::Readers`] must come before its event. `Pull` it is told of after a restart only, to answer with
    /// [`DestinationInput::Retaken`].
    fn act(&mut self, action: DestinationAction);
    /// Told of every action before it is carried out, those on memory too.
    fn before(&mut self, _step: Step) {}
    /// Takes note of how the migration stands.
    fn publish(&mut self, snapshot: &DestinationSnapshot);
}

/// How a migration stands, at its destination.
#[derive(Clone, Debug)]
pub struct DestinationSnapshot {
    /// The engine's state.
    pub state: State,
    /// What the threads counted: registrations, and in post-copy what was read and waited for.
    pub counted: Counted,
    /// Length of all blocks.
    pub ram_bytes: u64,
    /// Registrations since the last publication.
    pub recent: RegistrationEvents,
    /// Windows registered now.
    pub regions: u64,
    /// Bytes registered now.
    pub pinned_bytes: u64,
    /// In post-copy, what the guest is still owed.
    pub owed_bytes: Option<u64>,
    /// What holds the migration up, where it can neither go on nor end.
    pub trouble: Option<Failure>,
    /// For how long.
    pub trouble_for: Option<Duration>,
}

/// An answer of the destination's data plane to the source's.
#[derive(Clone, Debug)]
pub enum PeerAnswer {
    /// What the destination's RAM files held at the start.
    Presence(PageSets),
    /// To what was ordered about windows.
    Windows(WindowsAnswer),
    /// One a block.
    Digests(Vec<Digest>),
    /// What the guest is still owed, in bytes.
    StillOwed(u64),
    /// The links that this side reads with are lost: others are needed.
    ReadersLost,
}

/// The memory side of a migration, ready to receive.
pub struct DestinationParts {
    /// Whether the links that the source opened are broken; dropping it ends them.
    pub links: Box<dyn FnMut() -> Option<LinkError> + Send>,
    /// Where windows are registered.
    pub domain: Arc<dyn Domain>,
    /// The guest's RAM.
    pub memory: Arc<Memory>,
    /// Threads that register.
    pub registration_workers: usize,
    /// Should it come to post-copy.
    pub postcopy: PostcopyParts,
    /// To the source's agent; `false` when it is lost.
    pub answer: SendAnswer,
}

/// What post-copy needs to know.
#[derive(Clone, Debug)]
pub struct PostcopyParts {
    /// The VMM's process.
    pub vmm: u32,
    /// Processes that reach the guest's RAM and are not made to wait: over shm, the source's agent.
    pub partners: Vec<u32>,
    /// The file that keeps account of what the guest is owed; there is none yet.
    pub owed_path: PathBuf,
    /// The migration's id.
    pub migration: String,
}

/// What an agent that died in post-copy left, taken up again.
pub struct Retaken {
    /// The guest's RAM.
    pub memory: Arc<Memory>,
    /// The VMM, which waits.
    pub faults: RemoteFaults,
    /// What the guest is owed.
    pub owed: Owed,
    /// To the source's agent; `false` when it is lost.
    pub answer: SendAnswer,
}

/// What reaches a destination's driver.
pub enum DestinationInput {
    /// An order of the source, with its place.
    Placed(Box<DestinationInput>, Place),
    /// An event for the engine.
    Event(DestinationEvent),
    /// `Prepare` succeeded.
    Ready(Box<DestinationParts>),
    /// Links by which the source's memory is read in post-copy, in the place of those before.
    Readers(Box<Readers>),
    /// `Pull` after a restart succeeded.
    Retaken(Box<Retaken>),
    /// The source's order.
    RegisterWindows(Vec<Window>),
    /// The source's order.
    ReleaseWindows(Vec<WindowId>),
    /// The source's order.
    ZeroPages {
        /// The pages' block.
        block: BlockIndex,
        /// Runs of pages.
        runs: Vec<PageRun>,
    },
    #[doc(hidden)]
    Digested(Result<Vec<Digest>, MoverError>),
    #[doc(hidden)]
    Pulling(PullReport),
}

impl From<DestinationEvent> for DestinationInput {
    fn from(event: DestinationEvent) -> Self {
        DestinationInput::Event(event)
    }
}

/// Reaches a destination's driver.
#[derive(Clone)]
pub struct DestinationHandle {
    inputs: Sender<DestinationInput>,
    reads: ReadsSlot,
}

impl DestinationHandle {
    /// Hands an input to the driver; one that has ended drops it.
    pub fn send(&self, input: impl Into<DestinationInput>) {
        let _ = self.inputs.send(input.into());
    }

    /// The source answered `RegisterWindows`. The driver is passed by: it may be writing to the journal, and a guest may
    /// wait for this.
    pub fn windows_registered(&self, windows: Vec<(WindowId, Result<RegionKey, String>)>) {
        if let Some(copy) = self.reading() {
            copy.remote_registered(windows);
        }
    }

    /// The source answered `ReleaseWindows`. The driver is passed by; blocks while there is no room for what is ordered next.
    pub fn windows_released(&self, ids: &[WindowId]) {
        if let Some(copy) = self.reading() {
            copy.remote_released(ids);
        }
    }

    fn reading(&self) -> Option<Arc<crate::copy::Copy>> {
        self.reads.lock().expect("no panic while it is held").clone()
    }
}

/// Starts a driver for `engine`. With `start` the engine begins at once;
/// without, it was recovered and waits to be asked.
pub fn spawn_destination<O: DestinationOutside + 'static>(
    engine: Destination,
    outside: impl FnOnce(DestinationHandle) -> O,
) -> (DestinationHandle, JoinHandle<()>) {
    let (sender, inputs) = channel();
    let handle = DestinationHandle { inputs: sender, reads: ReadsSlot::default() };
    let outside: Box<dyn DestinationOutside> = Box::new(outside(handle.clone()));
    let driver = Driver {
        engine,
        outside,
        handle: handle.clone(),
        started: Instant::now(),
        plane: None,
        pull: None,
        runs: false,
        postcopy: None,
        counters: Arc::default(),
        answer: None,
        ram_bytes: 0,
        events: VecDeque::new(),
        feeding: false,
        finished: false,
    };
    let builder = thread::Builder::new().name("destination".into());
    let thread = builder.spawn(move || driver.run(&inputs)).expect("the kernel gives a thread");
    (handle, thread)
}

struct Driver {
    engine: Destination,
    outside: Box<dyn DestinationOutside>,
    handle: DestinationHandle,
    started: Instant,
    plane: Option<Plane>,
    pull: Option<Pull>,
    /// The guest was seen to run while it was owed memory.
    runs: bool,
    postcopy: Option<PostcopyParts>,
    counters: Arc<Counters>,
    answer: Option<SendAnswer>,
    ram_bytes: u64,
    events: VecDeque<DestinationEvent>,
    feeding: bool,
    finished: bool,
}

/// Everything that [`DestinationAction::Release`] takes down, in this order.
struct Plane {
    links: Box<dyn FnMut() -> Option<LinkError> + Send>,
    served: Served,
    memory: Arc<Memory>,
}

/// To the source's agent; `false` when it is lost. May block while the control stream is full.
pub type SendAnswer = Arc<dyn Fn(PeerAnswer) -> bool + Send + Sync>;

impl Driver {
    fn run(mut self, inputs: &Receiver<DestinationInput>) {
        let span = tracing::info_span!("destination_driver");
        let _entered = span.enter();
        self.feed(DestinationEvent::Start);
        let mut published = (self.engine.state(), Instant::now());
        while !self.finished {
            match inputs.recv_timeout(self.patience()) {
                Ok(input) => self.take(input),
                Err(RecvTimeoutError::Timeout) => self.tick(),
                Err(RecvTimeoutError::Disconnected) => unreachable!("the driver holds a sender"),
            }
            if self.engine.state() != published.0 || published.1.elapsed() >= PUBLISH_INTERVAL {
                published = (self.engine.state(), Instant::now());
                self.look_at_links();
                self.tell_still_owed();
                self.publish();
            }
        }
        self.release();
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn patience(&self) -> Duration {
        let deadline = self.engine.deadline().map(|at| at.saturating_sub(self.now()));
        deadline.map_or(PUBLISH_INTERVAL, |left| left.min(PUBLISH_INTERVAL))
    }

    fn tick(&mut self) {
        if self.engine.deadline().is_some_and(|at| at <= self.now()) {
            self.feed(DestinationEvent::Tick);
        }
    }

    fn take(&mut self, input: DestinationInput) {
        let (input, place) = match input {
            DestinationInput::Placed(input, place) => (*input, Some(place)),
            input => (input, None),
        };
        match input {
            DestinationInput::Placed(..) => unreachable!("an order has one place"),
            DestinationInput::Event(event) => self.feed(event),
            DestinationInput::Ready(parts) => self.set_up(*parts),
            DestinationInput::Readers(readers) => self.read_with(*readers),
            DestinationInput::Retaken(retaken) => self.go_on(*retaken),
            DestinationInput::Pulling(report) => self.pulling(report),
            DestinationInput::RegisterWindows(windows) => self.register(windows, place.as_ref()),
            DestinationInput::ReleaseWindows(ids) => {
                if let Some(plane) = &self.plane {
                    plane.served.release(ids, place);
                }
            }
            DestinationInput::ZeroPages { block, runs } => self.clear(block, &runs),
            DestinationInput::Digested(Ok(digests)) => {
                self.answer(PeerAnswer::Digests(digests));
                self.feed(DestinationEvent::Verified);
            }
            DestinationInput::Digested(Err(error)) => self.fail(Reason::GuestFailed, error.to_string()),
        }
    }

    /// Feeds the engine. Events that its actions bring about at once wait until
    /// all actions of the event before them are carried out.
    fn feed(&mut self, event: DestinationEvent) {
        self.events.push_back(event);
        if std::mem::replace(&mut self.feeding, true) {
            return;
        }
        while let Some(event) = self.events.pop_front() {
            let mut actions = Vec::new();
            self.engine.handle(self.now(), event, &mut actions);
            for action in actions {
                self.carry_out(action);
            }
        }
        self.feeding = false;
    }

    fn fail(&mut self, reason: Reason, message: String) {
        self.feed(DestinationEvent::Failed(Failure { reason, message }));
    }

    fn carry_out(&mut self, action: DestinationAction) {
        tracing::debug!(?action, state = ?self.engine.state());
        let (phase, round) = (self.engine.phase(), action.round());
        self.outside.before(Step { action: action.name(), phase, round });
        match action {
            DestinationAction::DrainRound { round } => {
                self.look_at_links();
                let checked = self.plane.as_ref().map_or(Ok(()), |plane| plane.memory.check());
                match checked.map_err(MoverError::from).and_then(|()| self.hold_nothing()) {
                    Err(error) => self.fail(Reason::GuestFailed, error.to_string()),
                    Ok(()) => self.feed(DestinationEvent::RoundDrained { round }),
                }
            }
            DestinationAction::Digest => self.digest(),
            DestinationAction::StartIncoming { postcopy: true } => match self.arm() {
                Ok(()) => self.outside.act(action),
                Err(error) => self.fail(Reason::GuestFailed, error.to_string()),
            },
            DestinationAction::HoldOwed { pages } => self.hold(&pages),
            DestinationAction::TellDeviceStateLoaded => match self.confirm() {
                Ok(()) => self.outside.act(action),
                Err(error) => self.fail(Reason::GuestFailed, error.to_string()),
            },
            DestinationAction::Pull => self.begin_to_pull(),
            DestinationAction::AnswerRunning { memory_owed } => {
                self.outside.act(action);
                if memory_owed {
                    self.guest_runs();
                }
            }
            DestinationAction::Release => {
                self.release();
                self.feed(DestinationEvent::Released);
            }
            DestinationAction::Finish(outcome) => {
                self.finished = true;
                self.publish();
                self.outside.act(DestinationAction::Finish(outcome));
            }
            action => self.outside.act(action),
        }
    }

    fn set_up(&mut self, parts: DestinationParts) {
        match parts.memory.first_presence() {
            Ok(presence) => {
                (parts.answer)(PeerAnswer::Presence(Arc::unwrap_or_clone(presence)));
            }
            Err(error) => return self.fail(Reason::GuestFailed, error.to_string()),
        }
        self.ram_bytes = parts.memory.layout().total_bytes();
        let answering = Arc::clone(&parts.answer);
        let served = Served::new(
            parts.domain,
            Arc::clone(&parts.memory),
            Arc::clone(&self.counters),
            Rights::REMOTE_WRITE,
            parts.registration_workers,
            Box::new(move |answer| answering(PeerAnswer::Windows(answer))),
        );
        self.answer = Some(parts.answer);
        self.postcopy = Some(parts.postcopy);
        self.plane = Some(Plane { links: parts.links, served, memory: parts.memory });
        self.feed(DestinationEvent::Prepared);
    }

    fn register(&mut self, windows: Vec<Window>, place: Option<&Place>) {
        let Some(plane) = &self.plane else {
            return;
        };
        if let Err(why) = plane.served.register(windows, place) {
            self.fail(Reason::PeerRefused, format!("the source's order was refused: {why}"));
        }
    }

    fn clear(&mut self, block: BlockIndex, runs: &[PageRun]) {
        let Some(plane) = &self.plane else {
            return;
        };
        if let Err(why) = clear(&plane.memory, block, runs) {
            self.fail(Reason::PeerRefused, why);
        }
    }

    fn digest(&mut self) {
        let Some(plane) = &self.plane else {
            return;
        };
        let (memory, handle) = (Arc::clone(&plane.memory), self.handle.clone());
        let builder = thread::Builder::new().name("digest".into());
        let body = move || {
            let digests = memory.digests().map_err(MoverError::from);
            handle.send(DestinationInput::Digested(digests));
        };
        if let Err(error) = builder.spawn(body) {
            self.fail(Reason::Internal, MoverError::Thread(error).to_string());
        }
    }

    fn look_at_links(&mut self) {
        let failure = self.plane.as_mut().and_then(|plane| (plane.links)());
        if let Some(error) = failure {
            self.fail(Reason::LinkLost, format!("the link is lost: {error}"));
        }
    }

    fn answer(&self, answer: PeerAnswer) -> bool {
        self.answer.as_ref().is_some_and(|send| send(answer))
    }

    fn release(&mut self) {
        let memory = self.memory().map(Arc::downgrade);
        self.end_pull();
        self.take_plane_down();
        if let Some(memory) = memory {
            wait_until_gone(&memory);
        }
    }

    fn memory(&self) -> Option<&Arc<Memory>> {
        let plane = self.plane.as_ref().map(|plane| &plane.memory);
        plane.or_else(|| self.pull.as_ref().map(Pull::memory))
    }

    fn take_plane_down(&mut self) {
        if let Some(plane) = self.plane.take() {
            drop(plane.links);
            plane.served.close();
        }
    }

    fn publish(&mut self) {
        let plane = self.plane.as_ref().map_or((0, 0), |plane| plane.served.pinned());
        let pull = self.pull.as_ref().map_or((0, 0), Pull::pinned);
        let snapshot = DestinationSnapshot {
            state: self.engine.state(),
            counted: self.counters.read(),
            ram_bytes: self.ram_bytes,
            recent: self.counters.take_recent(),
            regions: plane.0 + pull.0,
            pinned_bytes: plane.1 + pull.1,
            owed_bytes: self.pull.as_ref().and_then(Pull::owed_bytes),
            trouble: self.engine.trouble().cloned(),
            trouble_for: self.engine.trouble_since().map(|since| self.now().saturating_sub(since)),
        };
        self.outside.publish(&snapshot);
    }
}

/// Makes pages zero that the source named.
fn clear(memory: &Memory, block: BlockIndex, runs: &[PageRun]) -> Result<(), String> {
    let layout = memory.layout();
    let entry = layout.block(block).ok_or_else(|| format!("the source named {block}: there is none"))?;
    let pages = PageSet::new(entry.pages());
    for run in runs {
        if !pages.admits(*run) {
            return Err(format!("the source's zero pages {run:?} are outside block {:?}", entry.name));
        }
        let (offset, length) = (run.first * entry.page_bytes, run.count * entry.page_bytes);
        let span = memory.span(BlockRange { block, offset, length });
        span.map_err(|error| error.to_string())?.zero();
    }
    Ok(())
}
