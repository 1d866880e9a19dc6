use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use ramferry_ram::{LayoutError, RamError};
use ramferry_tracking::maps::MapsError;
use thiserror::Error;

use crate::{QmpError, Side, Version};

/// What was asked of a VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Pausing the guest for the switchover.
    Pause,
    /// Sending device state.
    DeviceState,
    /// Making the guest run.
    Resume,
    /// Loading device state.
    Load,
    /// Ending the VMM.
    Quit,
}

impl Step {
    /// The step in words.
    pub fn as_str(self) -> &'static str {
        match self {
            Step::Pause => "pausing the guest",
            Step::DeviceState => "sending device state",
            Step::Resume => "resuming the guest",
            Step::Load => "loading device state",
            Step::Quit => "ending the VMM",
        }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a guest cannot be migrated, or a VMM did not do what it was asked.
///
/// The message says what is so, [`GuestError::remedy`] what to do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestError {
    /// RAM of the guest is private to its VMM.
    #[error(
        "RAM block {block:?} ({length_bytes} bytes) is private memory of the VMM ({kind}, share={share})"
    )]
    PrivateMemory {
        /// Name of the block.
        block: String,
        /// Its length.
        length_bytes: u64,
        /// Type of its memory backend.
        kind: String,
        /// Whether the backend is shared.
        share: bool,
    },
    /// The VMM would send this shared memory itself, with the guest paused.
    #[error("RAM block {block:?} is a {kind}, which QEMU {version} does not leave out of its own stream")]
    NotSkipped {
        /// Name of the block.
        block: String,
        /// Type of its memory backend.
        kind: String,
        /// Version of the VMM.
        version: Version,
    },
    /// A block is not a mapping of the whole of one file.
    #[error("RAM block {block:?} is not mapped from file {path} by process {pid}")]
    NotMapped {
        /// Name of the block.
        block: String,
        /// The backend's `mem-path`.
        path: String,
        /// The VMM.
        pid: u32,
    },
    /// A RAM file has another length than its block.
    #[error("RAM block {block:?} has {block_bytes} bytes, its file {path} has {file_bytes}")]
    FileLength {
        /// Name of the block.
        block: String,
        /// The file.
        path: PathBuf,
        /// Length of the block.
        block_bytes: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// A RAM file is on a file system where writes cannot be tracked.
    #[error("RAM block {block:?} is file {path}, which is neither on tmpfs nor on hugetlbfs")]
    FileSystem {
        /// Name of the block.
        block: String,
        /// The file.
        path: PathBuf,
    },
    /// Two blocks are one file.
    #[error("RAM blocks {first:?} and {second:?} are one file")]
    SameFile {
        /// Name of one block.
        first: String,
        /// Name of the other.
        second: String,
    },
    /// A device writes to guest RAM by itself, unseen by the kernel.
    #[error("devices of the host are passed through to the guest: {}", devices.join(", "))]
    Passthrough {
        /// The devices.
        devices: Vec<String>,
    },
    /// Another process writes to guest RAM.
    #[error("vhost-user back ends write to guest RAM: {}", devices.join(", "))]
    VhostUser {
        /// The devices.
        devices: Vec<String>,
    },
    /// RAM is plugged in and out while the guest runs.
    #[error("the guest has virtio-mem: {}", devices.join(", "))]
    VirtioMem {
        /// The devices.
        devices: Vec<String>,
    },
    /// The balloon is being inflated or deflated.
    #[error("the balloon is in motion: the guest had {before_bytes} bytes, and then {after_bytes}")]
    BalloonMoving {
        /// RAM left to the guest at first.
        before_bytes: u64,
        /// RAM left to it a moment later.
        after_bytes: u64,
    },
    /// The balloon has moved since the migration began.
    #[error("the balloon has moved: {after_bytes} bytes are left to the guest")]
    BalloonMoved {
        /// RAM left to the guest.
        after_bytes: u64,
    },
    /// The guest gives free pages back to the host at any time.
    #[error("{device} reports free pages, which takes them out of the guest's RAM")]
    FreePageReporting {
        /// The balloon.
        device: String,
    },
    /// QEMU knows a reason itself.
    #[error("QEMU does not let this guest be migrated: {}", reasons.join("; "))]
    Blocked {
        /// In QEMU's words.
        reasons: Vec<String>,
    },
    /// Another migration is under way.
    #[error("the guest is being migrated already (status {status})")]
    AlreadyMigrating {
        /// QEMU's word for how far it is.
        status: String,
    },
    /// The destination already listens for a migration, or has had one.
    #[error("the destination listens for another migration already")]
    IncomingStarted,
    /// The guest is not in a state to be migrated from, or to.
    #[error("the guest at the {} is in state {run_state:?}", match side { Side::Source => "source", Side::Destination => "destination" })]
    RunState {
        /// Where.
        side: Side,
        /// QEMU's word for its state.
        run_state: String,
    },
    /// QEMU would encrypt the stream that the agents carry.
    #[error("the migration parameter tls-creds is set to {credentials:?}")]
    TlsCredentials {
        /// Its value.
        credentials: String,
    },
    /// This QEMU is too old.
    #[error("QEMU {version} is older than 6.0")]
    TooOld {
        /// Its version.
        version: Version,
    },
    /// This QEMU lacks something that is needed.
    #[error("QEMU {version} has no migration capability {capability:?}")]
    NoCapability {
        /// The capability.
        capability: &'static str,
        /// Version of the VMM.
        version: Version,
    },
    /// RAM was plugged in or out since the guest was inspected.
    #[error("the guest's RAM blocks have changed since the migration began")]
    LayoutChanged,
    /// A disk fills guest RAM by DMA that did not when the guest was inspected.
    #[error("the guest's disks have changed since the migration began: {} use direct I/O now", disks.join(", "))]
    DisksChanged {
        /// Their nodes.
        disks: Vec<String>,
    },
    /// The blocks make no layout.
    #[error("the guest's RAM blocks are not usable")]
    Layout(#[from] LayoutError),
    /// A RAM file is not usable.
    #[error("RAM block {block:?} is not usable")]
    Ram {
        /// Name of the block.
        block: String,
        /// Why.
        #[source]
        source: RamError,
    },
    /// The mappings of the VMM cannot be seen.
    #[error("cannot see the memory of the VMM")]
    Maps(#[from] MapsError),
    /// What QEMU says of its RAM blocks is not understood.
    #[error("QEMU's list of RAM blocks is not understood: {line:?}")]
    RamBlocks {
        /// The line.
        line: String,
    },
    /// The process behind the QMP socket is not in sight.
    #[error("the process that serves {} is not visible to the agent", path.display())]
    NoProcess {
        /// The QMP socket.
        path: PathBuf,
    },
    /// The VMM's process cannot be watched.
    #[error("cannot watch process {pid}")]
    Watch {
        /// The process.
        pid: u32,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// QMP did not do what it was asked.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The VMM has ended.
    #[error("the VMM (process {pid}) has ended")]
    Gone {
        /// Its process.
        pid: u32,
    },
    /// The control connection was lost; the VMM lives.
    #[error("the QMP connection to process {pid} was lost, which still runs")]
    Disconnected {
        /// Its process.
        pid: u32,
        /// Why.
        #[source]
        source: QmpError,
    },
    /// Another VMM answers at the socket now.
    #[error("{} is now served by process {now}, no longer by {before}", path.display())]
    Replaced {
        /// The QMP socket.
        path: PathBuf,
        /// The process that this guest ran in.
        before: u32,
        /// The one that answered.
        now: u32,
    },
    /// The path of a stream cannot be given to the VMM.
    #[error("{path:?} cannot be the path of a unix socket: it must be valid UTF-8 of at most 107 bytes")]
    StreamPath {
        /// The path.
        path: PathBuf,
    },
    /// The VMM's own migration of device state failed.
    #[error("{step} failed: QEMU's migration status is {status:?}{}", match description { Some(text) => format!(" ({text})"), None => String::new() })]
    Failed {
        /// What was being done.
        step: Step,
        /// QEMU's word for how it ended.
        status: String,
        /// QEMU's own words.
        description: Option<String>,
    },
    /// A step took too long.
    #[error(
        "{step} took longer than {limit:?}; the guest is in state {run_state:?}, its migration in {migration:?}"
    )]
    StepTimeout {
        /// What was being done.
        step: Step,
        /// How long it may take.
        limit: Duration,
        /// QEMU's word for the guest's state, as last seen.
        run_state: String,
        /// QEMU's word for its migration's, as last seen.
        migration: String,
    },
    /// A destination is to run that has not got its device state.
    #[error("the destination guest is in state {run_state:?}, without the source's device state")]
    NotLoaded {
        /// QEMU's word for its state.
        run_state: String,
    },
    /// A destination runs without having been told to, and was stopped.
    #[error("the destination guest ran before it was told to, at {seen:?}; it was stopped again")]
    RanTooEarly {
        /// When this was seen.
        seen: SystemTime,
    },
    /// A destination whose guest runs is to be given up.
    #[error("the destination guest runs; it is left alone")]
    DestinationRuns,
}

impl GuestError {
    /// A word for programs, the same for ever.
    pub fn reason(&self) -> &'static str {
        match self {
            GuestError::PrivateMemory { .. } => "PRIVATE_MEMORY",
            GuestError::NotSkipped { .. } => "SHARED_MEMORY_NOT_SKIPPED",
            GuestError::NotMapped { .. } => "BLOCK_NOT_MAPPED",
            GuestError::FileLength { .. } => "RAM_FILE_LENGTH",
            GuestError::FileSystem { .. } => "RAM_FILE_SYSTEM",
            GuestError::SameFile { .. } => "RAM_FILE_SHARED",
            GuestError::Passthrough { .. } => "PASSTHROUGH_DEVICE",
            GuestError::VhostUser { .. } => "VHOST_USER",
            GuestError::VirtioMem { .. } => "VIRTIO_MEM",
            GuestError::BalloonMoving { .. } => "BALLOON_MOVING",
            GuestError::BalloonMoved { .. } => "BALLOON_MOVING",
            GuestError::FreePageReporting { .. } => "FREE_PAGE_REPORTING",
            GuestError::Blocked { .. } => "MIGRATION_BLOCKED",
            GuestError::AlreadyMigrating { .. } => "ALREADY_MIGRATING",
            GuestError::IncomingStarted => "INCOMING_STARTED",
            GuestError::RunState { .. } => "GUEST_STATE",
            GuestError::TlsCredentials { .. } => "TLS_CREDENTIALS_SET",
            GuestError::TooOld { .. } => "VMM_TOO_OLD",
            GuestError::NoCapability { .. } => "VMM_CAPABILITY_MISSING",
            GuestError::LayoutChanged => "LAYOUT_CHANGED",
            GuestError::DisksChanged { .. } => "DISKS_CHANGED",
            GuestError::Layout(_) => "LAYOUT_UNUSABLE",
            GuestError::Ram { .. } => "RAM_FILE_UNUSABLE",
            GuestError::Maps(_) => "VMM_MEMORY_HIDDEN",
            GuestError::RamBlocks { .. } => "RAM_BLOCKS_UNREADABLE",
            GuestError::NoProcess { .. } => "VMM_PROCESS_HIDDEN",
            GuestError::Watch { .. } => "VMM_PROCESS_UNWATCHABLE",
            GuestError::Qmp(error) => qmp_reason(error),
            GuestError::Gone { .. } => "VMM_GONE",
            GuestError::Disconnected { .. } => "QMP_LOST",
            GuestError::Replaced { .. } => "VMM_REPLACED",
            GuestError::StreamPath { .. } => "STREAM_PATH",
            GuestError::Failed { .. } => "DEVICE_STATE_FAILED",
            GuestError::StepTimeout { .. } => "GUEST_STEP_TIMEOUT",
            GuestError::NotLoaded { .. } => "GUEST_NOT_LOADED",
            GuestError::RanTooEarly { .. } => "GUEST_RAN_TOO_EARLY",
            GuestError::DestinationRuns => "DESTINATION_RUNS",
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> String {
        match self {
            GuestError::PrivateMemory { length_bytes, .. } => return shared_memory_remedy(*length_bytes),
            GuestError::NotSkipped { .. } => {
                "use -object memory-backend-file,share=on with a mem-path on /dev/shm or hugetlbfs"
            }
            GuestError::NotMapped { .. } => {
                "check that the QMP socket was opened by QEMU itself and is this guest's, and that its mem-path is still the file it started with"
            }
            GuestError::FileLength { .. } => {
                "start QEMU with a file of its own for each backend, of exactly the backend's size, at offset 0"
            }
            GuestError::FileSystem { .. } => "put mem-path on a tmpfs such as /dev/shm, or on hugetlbfs",
            GuestError::SameFile { .. } => "give each memory-backend-file a mem-path of its own",
            GuestError::Passthrough { .. } => "unplug the devices before the migration and plug them in again after it",
            GuestError::VhostUser { .. } => "replace them by virtio devices of QEMU or of the kernel (vhost)",
            GuestError::VirtioMem { .. } => "use pc-dimm devices with memory-backend-file,share=on",
            GuestError::BalloonMoving { .. } | GuestError::BalloonMoved { .. } => "wait until the balloon has reached its target, or stop what moves it",
            GuestError::FreePageReporting { .. } => "start the guest with free-page-reporting=off",
            GuestError::Blocked { .. } => "remove what QEMU names",
            GuestError::AlreadyMigrating { .. } => "wait for that migration to end, or end it by migrate_cancel",
            GuestError::IncomingStarted => "start the destination QEMU anew with -incoming defer",
            GuestError::RunState { side, run_state } => return run_state_remedy(*side, run_state).to_owned(),
            GuestError::TlsCredentials { .. } => {
                "set it to the empty string by migrate-set-parameters: the agents encrypt what they carry"
            }
            GuestError::TooOld { .. } | GuestError::NoCapability { .. } => "use QEMU 7.2 or newer",
            GuestError::LayoutChanged => "do not plug RAM while a migration runs; start the migration anew",
            GuestError::DisksChanged { .. } => {
                "do not change the guest's disks while a migration runs; start the migration anew"
            }
            GuestError::Layout(_) | GuestError::Ram { .. } => "correct the guest's memory backends as the cause says",
            GuestError::Maps(_) => "run the agent with CAP_SYS_PTRACE and CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE",
            GuestError::RamBlocks { .. } => "report this version of QEMU as unsupported",
            GuestError::NoProcess { .. } => "run the agent in a PID namespace that contains QEMU's",
            GuestError::Watch { .. } => "check that the VMM still runs",
            GuestError::Qmp(error) => return qmp_remedy(error).to_owned(),
            GuestError::Gone { .. } => "see the VMM's own log for why it ended",
            GuestError::Disconnected { .. } => "leave this QMP socket to the agent while it migrates the guest",
            GuestError::Replaced { .. } => "name the socket of the guest that is to be migrated",
            GuestError::StreamPath { .. } => "give the agent a shorter run directory",
            GuestError::Failed { .. } => "see the logs of both VMMs; the guests must be started with the same devices",
            GuestError::StepTimeout { .. } => "see the VMM's log; slow disks delay a pause, a slow link delays device state",
            GuestError::NotLoaded { .. } => "this guest can only be given up",
            GuestError::RanTooEarly { .. } => "keep others from resuming the destination while it is being migrated to",
            GuestError::DestinationRuns => "nothing; the guest has been migrated",
        }
        .to_owned()
    }
}

fn qmp_reason(error: &QmpError) -> &'static str {
    match error {
        QmpError::Connect { .. } => "QMP_UNREACHABLE",
        QmpError::Silent { .. } => "QMP_BUSY",
        QmpError::Ended(_) => "QMP_LOST",
        QmpError::Timeout { .. } => "QMP_TIMEOUT",
        QmpError::Refused { .. } => "QMP_REFUSED",
        QmpError::Reply { .. } => "QMP_UNREADABLE",
    }
}

fn qmp_remedy(error: &QmpError) -> &'static str {
    match error {
        QmpError::Connect { .. } => {
            "check the path, that QEMU runs, and that the agent may connect to its socket"
        }
        QmpError::Silent { .. } => {
            "QMP serves one client at a time: give the agent a QMP socket of its own (a second -qmp unix:PATH,server=on,wait=off)"
        }
        QmpError::Ended(_) => "check that the VMM still runs and that the socket is a QMP socket",
        QmpError::Timeout { .. } => "see whether the VMM hangs, for example on a slow disk",
        QmpError::Refused { .. } => "see QEMU's own words",
        QmpError::Reply { .. } => "report this version of QEMU as unsupported",
    }
}

fn shared_memory_remedy(length_bytes: u64) -> String {
    let size = if length_bytes.is_multiple_of(1 << 20) {
        format!("{}M", length_bytes >> 20)
    } else {
        format!("{length_bytes}")
    };
    format!(
        "start both QEMUs with the RAM in a shared file: \
         -object memory-backend-file,id=ram0,size={size},mem-path=/dev/shm/NAME,share=on -machine memory-backend=ram0"
    )
}

fn run_state_remedy(side: Side, run_state: &str) -> &'static str {
    match (side, run_state) {
        (Side::Destination, _) => "start the destination QEMU anew with -incoming defer",
        (Side::Source, "postmigrate") => {
            "it was migrated before: if it runs nowhere else, cont it first; else this copy is to be ended"
        }
        (Side::Source, "inmigrate") => "it waits for a migration itself: name the guest that runs",
        (Side::Source, "suspended") => "wake it by system_wakeup",
        (Side::Source, "io-error") => "mend its disk and cont it",
        (Side::Source, _) => "bring it to run, or to be paused, first",
    }
}
