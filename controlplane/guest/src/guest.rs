use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use ramferry_ram::Layout;

use crate::GuestError;

/// Which side of a migration a guest is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// It runs here, and is to leave.
    Source,
    /// It waits here for what the source's sends.
    Destination,
}

/// How long each thing that is asked of a VMM may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Connecting to the QMP socket; also one command.
    pub command: Duration,
    /// Until the transfers that have begun into a running guest's RAM have ended.
    pub drain: Duration,
    /// From the order to pause for the switchover until the guest stands still.
    pub pause: Duration,
    /// From the call of [`Guest::move_device_state`] until the device state is at the
    /// destination, the last round included.
    pub device_state: Duration,
    /// From the call of [`Guest::wait_loaded`] until the device state is there,
    /// the source's last round included.
    pub load: Duration,
    /// Making a guest run again.
    pub resume: Duration,
    /// From the order to quit until the VMM is gone.
    pub quit: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            command: Duration::from_secs(5),
            drain: Duration::from_secs(20),
            pause: Duration::from_secs(30),
            device_state: Duration::from_secs(300),
            load: Duration::from_secs(300),
            resume: Duration::from_secs(10),
            quit: Duration::from_secs(10),
        }
    }
}

/// What a guest is.
#[derive(Clone, Debug)]
pub struct GuestInfo {
    /// Process of its VMM.
    pub pid: u32,
    /// E.g. `QEMU 7.2.22`.
    pub vmm: String,
    /// E.g. `pc-q35-7.2`.
    pub machine: String,
    /// Its RAM blocks that are shared files: what the agents move.
    pub layout: Layout,
    /// Whether its vCPUs run.
    pub running: bool,
    /// Number of its vCPUs.
    pub vcpus: u32,
    /// RAM that is not in `layout` (firmware, video memory): the VMM moves it
    /// itself, with the device state.
    pub private_bytes: u64,
    /// Names of its block nodes and devices that bypass the host's page cache: they
    /// fill guest RAM by DMA, and [`Guest::drain_io`] waits for them.
    pub direct_io_disks: Vec<String>,
    /// Names of its devices that do so without the VMM knowing when: a pause ends
    /// that, a drain does not.
    pub undrainable_devices: Vec<String>,
    /// Names of its block nodes that keep guest RAM pinned, and fill it again and
    /// again without marking it written.
    pub pinning_disks: Vec<String>,
    /// Its name, where it was given one.
    pub name: Option<String>,
}

/// What a VMM says of its guest now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestStatus {
    /// Whether its vCPUs run.
    pub running: bool,
    /// The VMM's own word for its state, e.g. `paused`.
    pub run_state: String,
    /// The VMM's own word for the migration it has or had, e.g. `pre-switchover`.
    pub migration: Option<String>,
}

/// A guest that stands still for its switchover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paused {
    /// When its vCPUs stopped, by the host's clock.
    pub stop_time: SystemTime,
    /// Whether they ran until then. If not, the destination's must not either.
    pub was_running: bool,
}

/// How a guest was found after it was to run again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resumed {
    /// Its vCPUs run.
    Running,
    /// It stands still, as it did before the migration.
    LeftPaused,
    /// It stopped for a reason of its own while it was being migrated: it shut
    /// itself down, crashed or was suspended.
    StoppedItself {
        /// The VMM's own word for its state.
        run_state: String,
    },
}

/// What a call of [`Guest`] returns.
pub type GuestFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A guest as a migration uses it, through its VMM.
///
/// ```text
/// source       prepare_source [-> drain_io] -> pause_for_switchover -> move_device_state
///                    \____________________________ | ___________________/
///                                 resume_source (from anywhere)
///
/// destination  prepare_destination -> start_incoming -> wait_loaded -> resume_destination
///                    \_________________ | ____________/
///                                    discard
/// ```
///
/// A caller may rely on: every wait is bounded; a call that is dropped leaves
/// the guest where a later `resume_source` or `discard` can take it up;
/// nothing but `resume_destination` makes a destination's vCPUs run.
///
/// An implementer must make `resume_source`, `resume_destination` and `discard`
/// idempotent and right from every state that a crash of the caller may leave.
pub trait Guest: Send + Sync {
    /// Process of the VMM.
    fn pid(&self) -> u32;

    /// Makes the VMM ready to send device state only, and to pause before it does.
    ///
    /// # Errors
    /// When it refuses.
    fn prepare_source(&self) -> GuestFuture<'_, Result<(), GuestError>>;

    /// The VMM's threads that are the guest's vCPUs, each once.
    ///
    /// # Errors
    /// When it does not say.
    fn vcpu_threads(&self) -> GuestFuture<'_, Result<Vec<u32>, GuestError>>;

    /// Returns when every transfer into guest RAM that had begun before the call
    /// has ended, but for those of `undrainable_devices`. The guest runs on; it may
    /// be held up meanwhile.
    ///
    /// # Errors
    /// When that cannot be had of the VMM in time. Nothing was changed.
    fn drain_io(&self) -> GuestFuture<'_, Result<(), GuestError>>;

    /// Orders the switchover: the VMM connects to `stream`, a unix socket that
    /// must be listening already and be read from at once, and stops the vCPUs.
    /// Returns when they stand still; the device state is still to come.
    ///
    /// # Errors
    /// When the guest is not paused in time, or the stream breaks. The guest
    /// may be paused or on its way there: `resume_source` must follow.
    fn pause_for_switchover<'a>(&'a self, stream: &'a Path) -> GuestFuture<'a, Result<Paused, GuestError>>;

    /// Has the device state saved and written to the stream. Returns when all of it was
    /// sent and the destination's VMM has said that it loaded it.
    ///
    /// # Errors
    /// When that fails or takes too long: `resume_source` must follow.
    fn move_device_state(&self) -> GuestFuture<'_, Result<(), GuestError>>;

    /// Ends whatever migration there is, makes the guest run if it ran before,
    /// and undoes `prepare_source`. Idempotent.
    ///
    /// The caller must have dropped its calls of the steps above, and must be sure that the guest does not and
    /// will not run at the destination.
    ///
    /// # Errors
    /// When the VMM is gone, or the guest does not run in time. Calling again is right.
    fn resume_source(&self) -> GuestFuture<'_, Result<Resumed, GuestError>>;

    /// Makes the VMM ready to receive device state, and not to run the guest by itself.
    ///
    /// # Errors
    /// When it refuses, or does not wait for a migration.
    fn prepare_destination(&self) -> GuestFuture<'_, Result<(), GuestError>>;

    /// Makes the VMM listen at `stream`, a unix socket that it makes.
    ///
    /// # Errors
    /// When it refuses.
    fn start_incoming<'a>(&'a self, stream: &'a Path) -> GuestFuture<'a, Result<(), GuestError>>;

    /// Returns when all device state was loaded. The guest stands still.
    ///
    /// # Errors
    /// When loading fails (the VMM may exit then), takes too long, or the guest runs.
    fn wait_loaded(&self) -> GuestFuture<'_, Result<(), GuestError>>;

    /// Makes the guest run. Idempotent.
    ///
    /// # Errors
    /// When it is not loaded, or does not run in time. Calling again is right.
    fn resume_destination(&self) -> GuestFuture<'_, Result<(), GuestError>>;

    /// Undoes `prepare_destination` once the guest runs here. Idempotent.
    ///
    /// # Errors
    /// When the VMM does not answer.
    fn settle_destination(&self) -> GuestFuture<'_, Result<(), GuestError>>;

    /// At a destination that ran: has the guest stand still. Idempotent.
    ///
    /// # Errors
    /// When the VMM does not answer: it may itself wait for memory that the guest lacks.
    fn stop_destination(&self) -> GuestFuture<'_, Result<(), GuestError>>;

    /// Ends the VMM of a guest that ran and must not run on. Idempotent.
    ///
    /// # Errors
    /// When it cannot be ended.
    fn end_destination(&self) -> GuestFuture<'_, Result<(), GuestError>>;

    /// Gives a destination up: before `start_incoming` leaves the VMM as it was
    /// found, after it ends the VMM. Idempotent; a VMM that is gone is given up.
    ///
    /// # Errors
    /// When the guest runs, which is left alone, or the VMM does not end.
    fn discard(&self) -> GuestFuture<'_, Result<(), GuestError>>;

    /// Resolves, with the reason, when the guest cannot be migrated any more:
    /// its VMM ended or its control connection was lost, or it gives RAM back
    /// to the host while it is being moved.
    fn lost(&self) -> GuestFuture<'_, GuestError>;

    /// What the VMM says of its guest now.
    ///
    /// # Errors
    /// When it does not answer.
    fn status(&self) -> GuestFuture<'_, Result<GuestStatus, GuestError>>;
}
