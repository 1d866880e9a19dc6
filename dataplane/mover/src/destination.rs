//! The destination's driver. Memory arrives through the links without it; it
//! registers the windows that the source asks for, clears zero pages, and runs
//! the destination's engine.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ramferry_engine::{Destination, DestinationAction, DestinationEvent, Failure, Reason, State};
use ramferry_fabric::windows::{Window, WindowId};
use ramferry_fabric::{Domain, LinkError, RegionKey, Rights};
use ramferry_ram::{BlockIndex, BlockRange, Digest, Memory, PageRun, PageSet, PageSets};

use crate::batch::batches;
use crate::counters::Counters;
use crate::pool::Pool;
use crate::{Counted, MoverError, RegistrationEvents, Step, wait_until_gone};

/// Between two publications, and two looks at the links.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(100);
/// Most windows that a source may hold at once: 64 TiB in windows of 64 MiB.
const MAX_WINDOWS: usize = 1 << 20;

/// What a destination's driver leaves to others. Everything is called on the
/// driver's thread.
pub trait DestinationOutside: Send {
    /// Carries out any action but `DrainRound`, `Digest` and `Release`. Must not
    /// block for long; must see to it that the action's event reaches the driver
    /// later. For `Prepare` that is [`DestinationInput::Ready`].
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
    /// What the threads counted: registrations only.
    pub counted: Counted,
    /// Length of all blocks.
    pub ram_bytes: u64,
    /// Registrations since the last publication.
    pub recent: RegistrationEvents,
    /// Windows registered now.
    pub regions: u64,
    /// Bytes registered now.
    pub pinned_bytes: u64,
}

/// What became of a window that the source wants registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisteredWindow {
    /// The window.
    pub id: WindowId,
    /// Its remote key, or why there is none.
    pub key: Result<RegionKey, String>,
    /// What the registration took.
    pub elapsed: Duration,
}

/// An answer of the destination's data plane to the source's.
#[derive(Clone, Debug)]
pub enum PeerAnswer {
    /// What the destination's RAM files held at the start.
    Presence(PageSets),
    /// To `RegisterWindows`, in any order and number.
    WindowsRegistered(Vec<RegisteredWindow>),
    /// To `ReleaseWindows`.
    WindowsReleased(Vec<WindowId>),
    /// One a block.
    Digests(Vec<Digest>),
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
    /// To the source's agent; `false` when it is lost.
    pub answer: Box<dyn Fn(PeerAnswer) -> bool + Send + Sync>,
}

/// A place in a bounded queue of the source's orders: given back, by being
/// dropped, when the order was carried out.
pub type Place = Arc<dyn Send + Sync>;

/// What reaches a destination's driver.
pub enum DestinationInput {
    /// An order of the source, with its place.
    Placed(Box<DestinationInput>, Place),
    /// An event for the engine.
    Event(DestinationEvent),
    /// `Prepare` succeeded.
    Ready(Box<DestinationParts>),
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
}

impl DestinationHandle {
    /// Hands an input to the driver; one that has ended drops it.
    pub fn send(&self, input: impl Into<DestinationInput>) {
        let _ = self.inputs.send(input.into());
    }
}

/// Starts a driver for `engine`. With `start` the engine begins at once;
/// without, it was recovered and waits to be asked.
pub fn spawn_destination<O: DestinationOutside + 'static>(
    engine: Destination,
    outside: impl FnOnce(DestinationHandle) -> O,
) -> (DestinationHandle, JoinHandle<()>) {
    let (sender, inputs) = channel();
    let handle = DestinationHandle { inputs: sender };
    let outside: Box<dyn DestinationOutside> = Box::new(outside(handle.clone()));
    let driver = Driver {
        engine,
        outside,
        handle: handle.clone(),
        started: Instant::now(),
        plane: None,
        counted: Counted::default(),
        recent: RegistrationEvents::default(),
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
    counted: Counted,
    /// What was not published when the plane was taken down.
    recent: RegistrationEvents,
    ram_bytes: u64,
    events: VecDeque<DestinationEvent>,
    feeding: bool,
    finished: bool,
}

/// Everything that [`DestinationAction::Release`] takes down, in this order.
struct Plane {
    links: Box<dyn FnMut() -> Option<LinkError> + Send>,
    pool: Pool,
    shared: Arc<Shared>,
}

struct Shared {
    domain: Arc<dyn Domain>,
    memory: Arc<Memory>,
    counters: Counters,
    regions: Mutex<HashMap<WindowId, Option<RegionKey>>>,
    answer: Box<dyn Fn(PeerAnswer) -> bool + Send + Sync>,
}

impl Driver {
    fn run(mut self, inputs: &Receiver<DestinationInput>) {
        let span = tracing::info_span!("destination_driver");
        let _entered = span.enter();
        self.feed(DestinationEvent::Start);
        let mut published = Instant::now();
        while !self.finished {
            match inputs.recv_timeout(self.patience()) {
                Ok(input) => self.take(input),
                Err(RecvTimeoutError::Timeout) => self.tick(),
                Err(RecvTimeoutError::Disconnected) => unreachable!("the driver holds a sender"),
            }
            if published.elapsed() >= PUBLISH_INTERVAL {
                published = Instant::now();
                self.look_at_links();
                self.publish();
            }
        }
        self.plane = None;
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
            DestinationInput::RegisterWindows(windows) => self.register(windows, place.as_ref()),
            DestinationInput::ReleaseWindows(ids) => self.release_windows(ids, place),
            DestinationInput::ZeroPages { block, runs } => self.clear(block, &runs),
            DestinationInput::Digested(Ok(digests)) => {
                if let Some(plane) = &self.plane {
                    (plane.shared.answer)(PeerAnswer::Digests(digests));
                }
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
                match self.plane.as_ref().map(|plane| plane.shared.memory.check()) {
                    Some(Err(error)) => self.fail(Reason::GuestFailed, error.to_string()),
                    _ => self.feed(DestinationEvent::RoundDrained { round }),
                }
            }
            DestinationAction::Digest => self.digest(),
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
        let shared = Shared {
            domain: parts.domain,
            memory: parts.memory,
            counters: Counters::default(),
            regions: Mutex::new(HashMap::new()),
            answer: parts.answer,
        };
        self.plane = Some(Plane {
            links: parts.links,
            pool: Pool::new("register", parts.registration_workers),
            shared: Arc::new(shared),
        });
        self.feed(DestinationEvent::Prepared);
    }

    fn register(&mut self, windows: Vec<Window>, place: Option<&Place>) {
        let Some(plane) = &self.plane else {
            return;
        };
        let (admitted, refused) = plane.shared.admit(windows);
        for batch in batches(&admitted) {
            let (shared, batch, place) = (Arc::clone(&plane.shared), batch.to_vec(), place.cloned());
            plane.pool.run(move || {
                shared.register(&batch);
                drop(place);
            });
        }
        if let Some(why) = refused {
            self.fail(Reason::PeerRefused, format!("the source's order was refused: {why}"));
        }
    }

    fn release_windows(&mut self, ids: Vec<WindowId>, place: Option<Place>) {
        if let Some(plane) = &self.plane {
            let shared = Arc::clone(&plane.shared);
            plane.pool.run(move || {
                shared.release(ids);
                drop(place);
            });
        }
    }

    fn clear(&mut self, block: BlockIndex, runs: &[PageRun]) {
        let Some(plane) = &self.plane else {
            return;
        };
        if let Err(why) = plane.shared.clear(block, runs) {
            self.fail(Reason::PeerRefused, why);
        }
    }

    fn digest(&mut self) {
        let Some(plane) = &self.plane else {
            return;
        };
        let (shared, handle) = (Arc::clone(&plane.shared), self.handle.clone());
        let builder = thread::Builder::new().name("digest".into());
        let body = move || {
            let digests = shared.memory.digests().map_err(MoverError::from);
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

    fn release(&mut self) {
        if let Some(plane) = self.plane.take() {
            self.counted = plane.shared.counters.read();
            self.recent = plane.shared.counters.take_recent();
            drop(plane.links);
            plane.pool.close();
            let memory = Arc::downgrade(&plane.shared.memory);
            drop(plane.shared);
            wait_until_gone(&memory);
        }
    }

    fn publish(&mut self) {
        let (mut recent, mut regions, mut pinned_bytes) = (std::mem::take(&mut self.recent), 0, 0);
        if let Some(plane) = &self.plane {
            self.counted = plane.shared.counters.read();
            recent = plane.shared.counters.take_recent();
            regions = plane.shared.regions().len() as u64;
            pinned_bytes = plane.shared.domain.pinned_bytes();
        }
        let snapshot = DestinationSnapshot {
            state: self.engine.state(),
            counted: self.counted,
            ram_bytes: self.ram_bytes,
            recent,
            regions,
            pinned_bytes,
        };
        self.outside.publish(&snapshot);
    }
}

impl Shared {
    fn regions(&self) -> std::sync::MutexGuard<'_, HashMap<WindowId, Option<RegionKey>>> {
        self.regions.lock().expect("no panic while it is held")
    }

    /// Takes note of windows that are to be registered: those that may be, and why one may not.
    fn admit(&self, windows: Vec<Window>) -> (Vec<Window>, Option<String>) {
        let mut refused = None;
        let mut regions = self.regions();
        let mut may_be_registered = |window: &Window| {
            let why = if !self.memory.layout().contains(window.range) || window.range.length == 0 {
                format!("window {:?} is outside the guest's RAM", window.range)
            } else if regions.len() >= MAX_WINDOWS {
                format!("more than {MAX_WINDOWS} windows")
            } else if regions.insert(window.id, None).is_some() {
                format!("window {} was registered already", window.id.0)
            } else {
                return true;
            };
            refused = Some(why);
            false
        };
        let admitted = windows.into_iter().filter(&mut may_be_registered).collect();
        (admitted, refused)
    }

    fn register(&self, windows: &[Window]) {
        let registered = windows.iter().map(|window| self.register_one(window)).collect();
        (self.answer)(PeerAnswer::WindowsRegistered(registered));
    }

    fn register_one(&self, window: &Window) -> RegisteredWindow {
        let started = Instant::now();
        let rights = Rights { remote_write: true, remote_read: false };
        let key = self.domain.register(window.range, rights).map(|region| region.key);
        let elapsed = started.elapsed();
        match &key {
            Ok(key) => {
                self.counters.add_registration(window.range.length, elapsed);
                self.regions().insert(window.id, Some(*key));
            }
            Err(error) => {
                self.counters.add_failed_registration(error);
                self.regions().remove(&window.id);
            }
        }
        RegisteredWindow { id: window.id, key: key.map_err(|error| error.to_string()), elapsed }
    }

    fn release(&self, ids: Vec<WindowId>) {
        for id in &ids {
            let Some(key) = self.regions().remove(id).flatten() else { continue };
            let started = Instant::now();
            match self.domain.deregister(key) {
                Ok(()) => self.counters.add_deregistration(started.elapsed()),
                Err(error) => tracing::warn!(%error, "a window could not be deregistered"),
            }
        }
        (self.answer)(PeerAnswer::WindowsReleased(ids));
    }

    fn clear(&self, block: BlockIndex, runs: &[PageRun]) -> Result<(), String> {
        let layout = self.memory.layout();
        let entry = layout.block(block).ok_or_else(|| format!("the source named {block}: there is none"))?;
        let pages = PageSet::new(entry.pages());
        for run in runs {
            if !pages.admits(*run) {
                return Err(format!("the source's zero pages {run:?} are outside block {:?}", entry.name));
            }
            let (offset, length) = (run.first * entry.page_bytes, run.count * entry.page_bytes);
            let span = self.memory.span(BlockRange { block, offset, length });
            span.map_err(|error| error.to_string())?.zero();
        }
        Ok(())
    }
}
