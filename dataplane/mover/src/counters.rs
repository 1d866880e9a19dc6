use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use ramferry_fabric::RegisterError;

use operations::Operations;

use crate::marks;

pub use operations::{CompletionStatus, Opcode, OperationCounts};

mod operations;

/// Registrations, failures and deregistrations, of each so many, that are kept for the next publication; more are
/// only counted.
const EVENTS_KEPT: usize = 1 << 16;

/// What one migration's threads did so far, on one side.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    first_write: OnceLock<Instant>,
    data_bytes: AtomicU64,
    data_pages: AtomicU64,
    zero_bytes: AtomicU64,
    zero_pages: AtomicU64,
    operations: [Operations; Opcode::ALL.len()],
    faults: Operations,
    registration_nanoseconds: AtomicU64,
    registered_bytes: AtomicU64,
    registrations: AtomicU64,
    recent: Mutex<RegistrationEvents>,
    stalled_nanoseconds: [AtomicU64; Stall::ALL.len()],
    busy_nanoseconds: AtomicU64,
    idle_nanoseconds: AtomicU64,
}

/// One local registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registered {
    /// What it took.
    pub elapsed: Duration,
    /// Its length.
    pub bytes: u64,
}

/// What was registered and deregistered locally since it was asked before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistrationEvents {
    /// Registrations that succeeded.
    pub registered: Vec<Registered>,
    /// Those that failed, each with the kernel's error number where the kernel was asked.
    pub failed: Vec<Option<i32>>,
    /// What each deregistration took.
    pub deregistered: Vec<Duration>,
}

impl RegistrationEvents {
    /// Takes those of `other` in.
    pub(crate) fn append(&mut self, mut other: Self) {
        self.registered.append(&mut other.registered);
        self.failed.append(&mut other.failed);
        self.deregistered.append(&mut other.deregistered);
    }
}

/// Why a copying thread had to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stall {
    /// The next window is not registered yet.
    Registration,
    /// The link's queue is full.
    Link,
    /// The bandwidth limit.
    Bandwidth,
}

impl Stall {
    /// Every cause.
    pub const ALL: [Stall; 3] = [Stall::Registration, Stall::Link, Stall::Bandwidth];

    /// The cause's name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Stall::Registration => "registration",
            Stall::Link => "link",
            Stall::Bandwidth => "bandwidth",
        }
    }
}

/// What was counted up to one moment. Everything only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// When the first write was posted.
    pub first_write: Option<Instant>,
    /// Bytes sent as data.
    pub data_bytes: u64,
    /// Pages sent as data.
    pub data_pages: u64,
    /// Bytes of pages that were zero and not sent.
    pub zero_bytes: u64,
    /// Pages that were zero and not sent.
    pub zero_pages: u64,
    /// Operations, in the order of [`Opcode::ALL`].
    pub operations: [OperationCounts; Opcode::ALL.len()],
    /// Pages that a guest in post-copy waited for: from the fault to the page.
    pub faults: OperationCounts,
    /// Time of all local registrations, added up over threads.
    pub registration: Duration,
    /// Bytes registered locally.
    pub registered_bytes: u64,
    /// Local registrations.
    pub registrations: u64,
    /// Waiting, in the order of [`Stall::ALL`], added up over threads.
    pub stalled: [Duration; Stall::ALL.len()],
    /// Time in which copying threads made progress.
    pub poller_busy: Duration,
    /// Time in which they waited.
    pub poller_idle: Duration,
}

impl Counters {
    /// The counters now.
    pub(crate) fn read(&self) -> Counted {
        let nanoseconds = |counter: &AtomicU64| Duration::from_nanos(counter.load(Relaxed));
        Counted {
            first_write: self.first_write.get().copied(),
            data_bytes: self.data_bytes.load(Relaxed),
            data_pages: self.data_pages.load(Relaxed),
            zero_bytes: self.zero_bytes.load(Relaxed),
            zero_pages: self.zero_pages.load(Relaxed),
            operations: std::array::from_fn(|opcode| self.operations[opcode].read()),
            faults: self.faults.read(),
            registration: nanoseconds(&self.registration_nanoseconds),
            registered_bytes: self.registered_bytes.load(Relaxed),
            registrations: self.registrations.load(Relaxed),
            stalled: std::array::from_fn(|cause| nanoseconds(&self.stalled_nanoseconds[cause])),
            poller_busy: nanoseconds(&self.busy_nanoseconds),
            poller_idle: nanoseconds(&self.idle_nanoseconds),
        }
    }

    pub(crate) fn note_first_write(&self) {
        self.first_write.get_or_init(Instant::now);
    }

    pub(crate) fn add_data(&self, bytes: u64, pages: u64) {
        self.data_bytes.fetch_add(bytes, Relaxed);
        self.data_pages.fetch_add(pages, Relaxed);
    }

    pub(crate) fn add_zero(&self, bytes: u64, pages: u64) {
        self.zero_bytes.fetch_add(bytes, Relaxed);
        self.zero_pages.fetch_add(pages, Relaxed);
    }

    pub(crate) fn add_posted(&self, opcode: Opcode) {
        self.operations[opcode as usize].add_posted();
    }

    pub(crate) fn add_completed(&self, opcode: Opcode, status: CompletionStatus, took: Duration) {
        self.operations[opcode as usize].add_completed(status, took);
    }

    /// A page that the guest waited for came.
    pub(crate) fn add_fault(&self, took: Duration) {
        self.faults.add_posted();
        self.faults.add_completed(CompletionStatus::Success, took);
    }

    pub(crate) fn add_registration(&self, bytes: u64, elapsed: Duration) {
        marks::window_registered(bytes, elapsed);
        self.registrations.fetch_add(1, Relaxed);
        self.registered_bytes.fetch_add(bytes, Relaxed);
        add_duration(&self.registration_nanoseconds, elapsed);
        keep(&mut self.recent().registered, Registered { elapsed, bytes });
    }

    pub(crate) fn add_failed_registration(&self, error: &RegisterError) {
        keep(&mut self.recent().failed, error.raw_os_error());
    }

    pub(crate) fn add_deregistration(&self, elapsed: Duration) {
        keep(&mut self.recent().deregistered, elapsed);
    }

    /// What was registered and deregistered since the last call.
    pub(crate) fn take_recent(&self) -> RegistrationEvents {
        std::mem::take(&mut self.recent())
    }

    fn recent(&self) -> MutexGuard<'_, RegistrationEvents> {
        self.recent.lock().expect("no panic while it is held")
    }

    pub(crate) fn add_stall(&self, cause: Stall, elapsed: Duration) {
        add_duration(&self.stalled_nanoseconds[cause as usize], elapsed);
        add_duration(&self.idle_nanoseconds, elapsed);
    }

    pub(crate) fn add_busy(&self, elapsed: Duration) {
        add_duration(&self.busy_nanoseconds, elapsed);
    }
}

fn keep<T>(events: &mut Vec<T>, event: T) {
    if events.len() < EVENTS_KEPT {
        events.push(event);
    }
}

fn add_duration(counter: &AtomicU64, elapsed: Duration) {
    counter.fetch_add(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX), Relaxed);
}
