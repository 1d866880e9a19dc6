//! The source's driver: one thread that feeds the engine and carries out its
//! actions on memory.

mod jobs;
mod lending;
mod plane;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ramferry_engine::{
    Failure, FixedCosts, LateWrites, Progress, Reason, Source, SourceAction, SourceEvent, State,
};
use ramferry_fabric::windows::{Window, WindowConfig, WindowId};
use ramferry_fabric::{Domain, Link, RegionKey};
use ramferry_ram::{Digest, Memory, PageSets};
use ramferry_tracking::{Tracker, TrackerKind};

use self::jobs::{JobKind, RunningJob};
use self::lending::Lending;
pub use self::lending::Lent;
use self::plane::Plane;
use crate::copy::SendOrder;
use crate::counters::Counters;
use crate::marks::Marked;
use crate::recheck::Recheck;
use crate::served::Place;
use crate::worker::Job;
use crate::{Counted, MoverError, RegistrationEvents, Step};

/// Between two publications of progress.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(100);

/// What a source's driver leaves to others. Everything is called on the
/// driver's thread.
pub trait SourceOutside: Send {
    /// Carries out one of `Prepare`, `EndRound`, `DrainGuest`, `PauseGuest`, `SaveDeviceState`, `Verify`,
    /// `MoveDeviceState`, `WriteHandedOver`, `SendCommit`, `AskOutcome`,
    /// `AbortPeer`, `ResumeGuest`, `Finish`. Must not block for long; must see
    /// to it that the action's event, if it has one, reaches the driver later. For `Prepare`
    /// that is [`SourceInput::Ready`].
    fn act(&mut self, action: SourceAction);
    /// Told of every action before it is carried out, those on memory too.
    fn before(&mut self, _step: Step) {}
    /// Takes note of how the migration stands: on each change, and every 100 ms.
    fn publish(&mut self, snapshot: &SourceSnapshot);
}

/// How a migration stands, at its source.
#[derive(Clone, Debug)]
pub struct SourceSnapshot {
    /// The engine's state.
    pub state: State,
    /// The finer step within the state.
    pub phase: &'static str,
    /// What the engine measured.
    pub progress: Progress,
    /// The downtime that is aimed at.
    pub max_downtime: Duration,
    /// What the threads counted.
    pub counted: Counted,
    /// Bytes to copy in the round under way when it began.
    pub round_bytes: u64,
    /// Length of all blocks.
    pub ram_bytes: u64,
    /// Bytes that were ever touched when the migration began.
    pub present_bytes: u64,
    /// Local registrations since the last publication.
    pub recent: RegistrationEvents,
    /// Windows registered now.
    pub regions: u64,
    /// Bytes registered now.
    pub pinned_bytes: u64,
    /// Most bytes registered at once so far.
    pub pinned_peak_bytes: u64,
    /// The tracker in use.
    pub tracker: Option<TrackerKind>,
    /// Whether pages are filled after they were reported, so that they are rechecked.
    pub late_writes: LateWrites,
    /// Last harvest: its duration and the pages that it found.
    pub last_harvest: Option<(Duration, u64)>,
    /// Harvests so far.
    pub harvests: u64,
    /// Whether both sides' digests were equal.
    pub verified: Option<bool>,
    /// What holds the migration up, where it can neither go on nor end.
    pub trouble: Option<Failure>,
    /// For how long.
    pub trouble_for: Option<Duration>,
}

/// The memory side of a migration, ready to copy.
pub struct SourceParts {
    /// Threads end with the links, links with the domain, all before memory.
    pub links: Vec<Box<dyn Link>>,
    /// Where windows are registered.
    pub domain: Arc<dyn Domain>,
    /// Armed before anything of `memory` was read or registered.
    pub tracker: Box<dyn Tracker>,
    /// The guest's RAM.
    pub memory: Arc<Memory>,
    /// The registration policy.
    pub windows: WindowConfig,
    /// Threads that register.
    pub registration_workers: usize,
    /// Pages that the destination's RAM files hold already.
    pub destination_presence: PageSets,
    /// Whether the guest's own devices fill pages late. Other processes that write to its RAM are the tracker's to tell.
    pub late_writes: LateWrites,
    /// Estimates to start with.
    pub fixed_costs: FixedCosts,
    /// To the destination's agent.
    pub order: SendOrder,
    /// CPUs that copying threads are pinned to, in turn.
    pub poller_cpus: Option<Vec<usize>>,
}

/// What reaches a source's driver.
pub enum SourceInput {
    /// An event for the engine.
    Event(SourceEvent),
    /// `Prepare` succeeded.
    Ready(Box<SourceParts>),
    /// The destination answered `RegisterWindows`.
    WindowsRegistered(Vec<(WindowId, Result<RegionKey, String>)>),
    /// The destination answered `ReleaseWindows`.
    WindowsReleased(Vec<WindowId>),
    /// This side's memory may be read by the destination, over other links than before.
    Lend(Box<Lent>),
    /// The destination's order.
    RegisterWindows(Vec<Window>, Place),
    /// The destination's order.
    ReleaseWindows(Vec<WindowId>, Place),
    /// The guest stands still, and has for this long.
    GuestPaused(Duration),
    /// The destination's digests, one a block.
    PeerDigests(Vec<Digest>),
    #[doc(hidden)]
    OwnDigests(Result<Vec<Digest>, MoverError>),
    #[doc(hidden)]
    JobDone(Result<(), MoverError>),
    #[doc(hidden)]
    MemoryFailed(MoverError),
}

impl From<SourceEvent> for SourceInput {
    fn from(event: SourceEvent) -> Self {
        SourceInput::Event(event)
    }
}

/// Reaches a source's driver.
#[derive(Clone)]
pub struct SourceHandle {
    inputs: Sender<SourceInput>,
}

impl SourceHandle {
    /// Hands an input to the driver; one that has ended drops it.
    pub fn send(&self, input: impl Into<SourceInput>) {
        let _ = self.inputs.send(input.into());
    }
}

/// Starts a driver for `engine`, which begins at once. `outside` is made with
/// the driver's handle. The thread ends when the engine finishes.
pub fn spawn_source<O: SourceOutside + 'static>(
    engine: Source,
    outside: impl FnOnce(SourceHandle) -> O,
) -> (SourceHandle, JoinHandle<()>) {
    let (sender, inputs) = channel();
    let handle = SourceHandle { inputs: sender };
    let outside: Box<dyn SourceOutside> = Box::new(outside(handle.clone()));
    let driver = Driver {
        engine,
        outside,
        handle: handle.clone(),
        started: Instant::now(),
        plane: None,
        lending: None,
        lending_counters: Arc::default(),
        job: None,
        digests: (None, None),
        round_bytes: 0,
        harvests: 0,
        last_harvest: None,
        verified: None,
        counted: Counted::default(),
        pinned_peak_bytes: 0,
        recent: RegistrationEvents::default(),
        sizes: (0, 0),
        tracker_kind: None,
        late_writes: LateWrites::None,
        events: VecDeque::new(),
        feeding: false,
        finished: false,
        marked: Marked::default(),
    };
    let builder = thread::Builder::new().name("source".into());
    let thread = builder.spawn(move || driver.run(&inputs)).expect("the kernel gives a thread");
    (handle, thread)
}

struct Driver {
    engine: Source,
    outside: Box<dyn SourceOutside>,
    handle: SourceHandle,
    started: Instant,
    plane: Option<Plane>,
    lending: Option<Lending>,
    lending_counters: Arc<Counters>,
    job: Option<RunningJob>,
    digests: (Option<Vec<Digest>>, Option<Vec<Digest>>),
    round_bytes: u64,
    harvests: u64,
    last_harvest: Option<(Duration, u64)>,
    verified: Option<bool>,
    counted: Counted,
    pinned_peak_bytes: u64,
    /// What was not published when the plane was taken down.
    recent: RegistrationEvents,
    /// RAM and present bytes.
    sizes: (u64, u64),
    tracker_kind: Option<TrackerKind>,
    late_writes: LateWrites,
    events: VecDeque<(Duration, SourceEvent)>,
    feeding: bool,
    finished: bool,
    marked: Marked,
}

impl Driver {
    fn run(mut self, inputs: &Receiver<SourceInput>) {
        let span = tracing::info_span!("source_driver");
        let _entered = span.enter();
        self.feed(SourceEvent::Start);
        let mut published = Instant::now();
        while !self.finished {
            let mut changed = true;
            match inputs.recv_timeout(self.patience()) {
                Ok(input) => self.take(input),
                Err(RecvTimeoutError::Timeout) => changed = self.tick(),
                Err(RecvTimeoutError::Disconnected) => unreachable!("the driver holds a sender"),
            }
            if changed || published.elapsed() >= PUBLISH_INTERVAL {
                published = Instant::now();
                self.look_at_lending();
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

    fn tick(&mut self) -> bool {
        let due = self.engine.deadline().is_some_and(|at| at <= self.now());
        if due {
            self.feed(SourceEvent::Tick);
        }
        due
    }

    fn take(&mut self, input: SourceInput) {
        match input {
            SourceInput::Event(event) => self.feed(event),
            SourceInput::Ready(parts) => match self.set_up(*parts) {
                Ok(event) => self.feed(event),
                Err(error) => self.fail(&error),
            },
            SourceInput::WindowsRegistered(windows) => {
                if let Some(plane) = &self.plane {
                    plane.copy.remote_registered(windows);
                }
            }
            SourceInput::WindowsReleased(ids) => {
                if let Some(plane) = &self.plane {
                    plane.copy.remote_released(&ids);
                }
            }
            SourceInput::Lend(lent) => self.lend(*lent),
            SourceInput::RegisterWindows(windows, place) => self.register_for_reading(windows, &place),
            SourceInput::ReleaseWindows(ids, place) => {
                if let Some(lending) = &self.lending {
                    lending.served.release(ids, Some(place));
                }
            }
            SourceInput::GuestPaused(ago) => {
                self.feed_at(self.now().saturating_sub(ago), SourceEvent::GuestPaused);
            }
            SourceInput::PeerDigests(digests) => {
                self.digests.1 = Some(digests);
                self.compare_digests();
            }
            SourceInput::OwnDigests(Ok(digests)) => {
                self.digests.0 = Some(digests);
                self.compare_digests();
            }
            SourceInput::OwnDigests(Err(error)) | SourceInput::MemoryFailed(error) => self.fail(&error),
            SourceInput::JobDone(result) => self.job_done(&result),
        }
    }

    /// Feeds the engine. Events that its actions bring about at once wait until
    /// all actions of the event before them are carried out.
    fn feed(&mut self, event: SourceEvent) {
        self.feed_at(self.now(), event);
    }

    /// Feeds an event that happened at `now`, a while ago.
    fn feed_at(&mut self, now: Duration, event: SourceEvent) {
        self.events.push_back((now, event));
        if std::mem::replace(&mut self.feeding, true) {
            return;
        }
        while let Some((now, event)) = self.events.pop_front() {
            let mut actions = Vec::new();
            let before = self.engine.state();
            self.engine.handle(now, event, &mut actions);
            // The pause is over, and what follows may take long.
            if self.engine.state() == State::Postcopy && before != State::Postcopy {
                self.publish();
            }
            self.marked.follow(self.engine.progress());
            for action in actions {
                self.carry_out(action);
            }
        }
        self.feeding = false;
    }

    fn fail(&mut self, error: &MoverError) {
        self.feed(SourceEvent::Failed(failure(error)));
    }

    fn carry_out(&mut self, action: SourceAction) {
        tracing::debug!(?action, phase = self.engine.phase());
        let round = Some(self.engine.progress().round).filter(|round| *round > 0);
        self.outside.before(Step { action: action.name(), phase: self.engine.phase(), round });
        match action {
            SourceAction::Harvest => self.harvest(),
            SourceAction::Copy { pages, .. } => self.copy(pages),
            SourceAction::StopCopy => {
                if let Some(job) = &self.job {
                    job.stop();
                }
            }
            SourceAction::Recheck { pages } => self.recheck(pages),
            SourceAction::Fence => self.start_job(JobKind::Fence, || Job::Fence),
            SourceAction::Verify => {
                self.digest();
                self.outside.act(SourceAction::Verify);
            }
            SourceAction::SetBandwidthLimit(limit) => {
                if let Some(plane) = &self.plane {
                    plane.copy.pacer.set_limit(limit.map(|limit| limit.0));
                }
            }
            SourceAction::WriteHandedOver => match self.confirm() {
                Ok(()) => self.outside.act(SourceAction::WriteHandedOver),
                Err(error) => self.fail(&error),
            },
            SourceAction::Release => {
                self.release();
                self.feed(SourceEvent::Released);
            }
            SourceAction::Finish(outcome) => {
                self.finished = true;
                self.publish();
                self.outside.act(SourceAction::Finish(outcome));
            }
            action => self.outside.act(action),
        }
    }

    fn harvest(&mut self) {
        let paused = self.engine.state() == State::SwitchingOver;
        let Some(plane) = &mut self.plane else {
            return;
        };
        let mut written = PageSets::new(plane.memory.layout());
        let started = Instant::now();
        let tracker = &mut plane.tracker;
        // A process that begins to map guest RAM is looked for while the guest
        // runs: the search takes longer than the harvest. Of a guest that stands still there is one harvest only: it
        // runs on without a migration, or elsewhere.
        let harvested = if paused {
            tracker.harvest_last(&mut written)
        } else {
            tracker.recheck(&mut written).and_then(|()| tracker.harvest(&mut written))
        };
        match harvested {
            Ok(harvest) => {
                self.harvests += 1;
                self.last_harvest = Some((harvest.elapsed, harvest.written_pages));
                if plane.tracker.has_other_writers() {
                    self.expect_late_writes(LateWrites::Undrainable);
                }
                self.feed(SourceEvent::Harvested { written, elapsed: started.elapsed() });
            }
            Err(error) => self.fail(&error.into()),
        }
    }

    fn recheck(&mut self, mut pages: PageSets) {
        let Some(plane) = &self.plane else {
            return;
        };
        // Of those nothing was noted, and to read them would allocate them.
        pages.subtract(&plane.unsent_holes);
        let recheck = Arc::new(Recheck::new(pages, plane.memory.layout()));
        self.start_job(JobKind::Recheck(Arc::clone(&recheck)), || Job::Recheck(Arc::clone(&recheck)));
    }

    /// The last moment at which a writer that was not seen can keep the guest here.
    fn confirm(&mut self) -> Result<(), MoverError> {
        match &mut self.plane {
            Some(plane) => Ok(plane.tracker.confirm()?),
            None => Ok(()),
        }
    }

    fn copy(&mut self, mut pages: PageSets) {
        let guest_paused = self.engine.state() == State::SwitchingOver;
        let Some(plane) = &mut self.plane else {
            return;
        };
        if let Some(holes) = plane.holes.take() {
            for (block, set) in holes.iter() {
                let runs: Vec<_> = set.runs().collect();
                for runs in plane.copy.settle(block, &[], &runs).chunks(4096) {
                    plane.copy.order_zero(block, runs.to_vec());
                }
            }
            pages.subtract(&holes);
        }
        plane.unsent_holes.subtract(&pages);
        self.round_bytes = pages.bytes();
        let pass = plane.copy.begin(pages, guest_paused);
        let before = Box::new(plane.copy.counters.read());
        self.start_job(JobKind::Copy { pass: Arc::clone(&pass), before }, || Job::Copy(Arc::clone(&pass)));
    }

    fn digest(&mut self) {
        let Some(plane) = &self.plane else {
            return;
        };
        self.digests = (None, None);
        let (memory, handle) = (Arc::clone(&plane.memory), self.handle.clone());
        let builder = thread::Builder::new().name("digest".into());
        let body = move || {
            let digests = memory.digests().and_then(|digests| memory.check().map(|()| digests));
            handle.send(SourceInput::OwnDigests(digests.map_err(MoverError::from)));
        };
        if let Err(error) = builder.spawn(body) {
            self.fail(&MoverError::Thread(error));
        }
    }

    fn compare_digests(&mut self) {
        if let (Some(own), Some(peer)) = &self.digests {
            let equal = own == peer;
            self.digests = (None, None);
            self.verified = Some(equal);
            self.feed(SourceEvent::Verified { equal });
        }
    }

    fn publish(&mut self) {
        let mut recent = std::mem::take(&mut self.recent);
        let (mut regions, mut pinned_bytes) = (0, 0);
        if let Some(plane) = &self.plane {
            self.counted = plane.copy.counters.read();
            recent = plane.copy.counters.take_recent();
            (regions, pinned_bytes, self.pinned_peak_bytes) = plane.copy.pinned();
        }
        if let Some(lending) = &self.lending {
            recent.append(self.lending_counters.take_recent());
            let (more_regions, more_bytes) = lending.served.pinned();
            (regions, pinned_bytes) = (regions + more_regions, pinned_bytes + more_bytes);
            self.pinned_peak_bytes = self.pinned_peak_bytes.max(pinned_bytes);
        }
        let snapshot = SourceSnapshot {
            state: self.engine.state(),
            phase: self.engine.phase(),
            progress: self.engine.progress().clone(),
            max_downtime: self.engine.max_downtime(),
            counted: self.counted,
            round_bytes: self.round_bytes,
            ram_bytes: self.sizes.0,
            present_bytes: self.sizes.1,
            recent,
            regions,
            pinned_bytes,
            pinned_peak_bytes: self.pinned_peak_bytes,
            tracker: self.tracker_kind,
            late_writes: self.late_writes,
            last_harvest: self.last_harvest,
            harvests: self.harvests,
            verified: self.verified,
            trouble: self.engine.trouble().cloned(),
            trouble_for: self.engine.trouble_since().map(|since| self.now().saturating_sub(since)),
        };
        self.outside.publish(&snapshot);
    }
}

fn failure(error: &MoverError) -> Failure {
    let reason = match error {
        MoverError::Ram(_) => Reason::GuestFailed,
        MoverError::Track(_) => Reason::TrackerFailed,
        MoverError::Registration(_) | MoverError::RemoteRegistration { .. } | MoverError::Windows(_) => {
            Reason::RegistrationFailed
        }
        MoverError::Faults(_) | MoverError::Owed(_) => Reason::GuestFailed,
        MoverError::Thread(_) | MoverError::ThreadEnded | MoverError::Stopped => Reason::Internal,
        MoverError::Post(_) | MoverError::Operation(_) | MoverError::Link(_) | MoverError::Stalled { .. } => {
            Reason::LinkLost
        }
    };
    let mut message = error.to_string();
    // The message of the first cause is part of the error's own.
    let mut cause = std::error::Error::source(error).and_then(std::error::Error::source);
    while let Some(deeper) = cause {
        let told = deeper.to_string();
        if !message.ends_with(&told) {
            message = format!("{message}: {told}");
        }
        cause = deeper.source();
    }
    Failure { reason, message }
}
