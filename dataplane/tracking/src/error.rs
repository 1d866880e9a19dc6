use std::io;
use std::path::PathBuf;

use ramferry_ram::BlockIndex;
use thiserror::Error;

use crate::TrackerKind;
use crate::maps::MapsError;
use crate::remote_call::RemoteCallError;

/// Why a guest's written pages cannot be told.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrackError {
    /// There is nothing to track.
    #[error("no RAM file to track")]
    NoFiles,
    /// A RAM file was described in a way that cannot be.
    #[error("{block}: {why}")]
    BadFile {
        /// The block whose file it is.
        block: BlockIndex,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The page sets to harvest into are not those of the tracked files.
    #[error("the page sets do not match the tracked RAM files")]
    WrongPageSets,
    /// The guest does not have a RAM file mapped shared and writable.
    #[error("process {pid} has not mapped the RAM file of {block} shared and writable: is this its VMM?")]
    NotMapped {
        /// The VMM.
        pid: u32,
        /// The block whose file it is.
        block: BlockIndex,
    },
    /// The VMM ended.
    #[error("the guest's process {pid} ended")]
    GuestEnded {
        /// The VMM.
        pid: u32,
    },
    /// We may not see what a process has mapped, so it may be writing unseen.
    #[error(
        "cannot tell whether process {pid} ({comm}) writes to the guest's RAM: give the agent CAP_SYS_PTRACE"
    )]
    Hidden {
        /// The process.
        pid: u32,
        /// Its name.
        comm: String,
        /// Why.
        #[source]
        source: MapsError,
    },
    /// A process that writes to the guest's RAM cannot be tracked.
    #[error("cannot track what process {pid} ({comm}) writes to the guest's RAM")]
    Writer {
        /// The process.
        pid: u32,
        /// Its name.
        comm: String,
        /// Why.
        #[source]
        source: WriterError,
    },
    /// A RAM file cannot be watched.
    #[error(
        "cannot watch the RAM file of {block}: raise fs.inotify.max_user_watches and max_user_instances, or run the agent as the VMM's user or root"
    )]
    Watch {
        /// The block whose file it is.
        block: BlockIndex,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Somebody changed a RAM file other than through a mapping.
    #[error(
        "the RAM file of {block} was written, truncated or punched by system calls, which no tracker sees: find out by whom, and end that before the guest is migrated"
    )]
    Modified {
        /// The block whose file it is.
        block: BlockIndex,
    },
    /// A process that was not tracked had a RAM file open for writing.
    #[error(
        "a process that is gone had the RAM file of {block} open for writing, and may have written to it unseen: see that nothing but the VMM opens it, and migrate again"
    )]
    UnseenWriter {
        /// The block whose file it was.
        block: BlockIndex,
    },
    /// A process wrote to RAM while the guest stood still.
    #[error(
        "process {pid} ({comm}) wrote to the guest's RAM, or ended, after the last of it was copied: end or quiet it before the guest is migrated"
    )]
    WroteLate {
        /// The process.
        pid: u32,
        /// Its name.
        comm: String,
    },
    /// The tracker does not work on this host.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    /// No tracker could be armed.
    #[error("neither tracker can be used: uffd_wp: {}; soft_dirty: {}", chain(uffd_wp), chain(soft_dirty))]
    NoTracker {
        /// Why not the first.
        uffd_wp: Box<TrackError>,
        /// Why not the second.
        soft_dirty: Box<TrackError>,
    },
    /// `/proc` could not be read.
    #[error("cannot list the processes of this host")]
    Proc(#[source] io::Error),
    /// Processes kept mapping the RAM file while the tracker was being armed.
    #[error("new processes keep mapping the guest's RAM, the last one is {pid} ({comm})")]
    Unsettled {
        /// The last one seen.
        pid: u32,
        /// Its name.
        comm: String,
    },
}

impl TrackError {
    /// Whether a tracker of another kind could still do.
    pub(crate) fn is_of_this_kind_only(&self) -> bool {
        match self {
            Self::SelfTest(_) => true,
            Self::Writer { source, .. } => !matches!(
                source,
                WriterError::Ended | WriterError::Maps(_) | WriterError::HoldsDescriptor { .. }
            ),
            _ => false,
        }
    }
}

/// Why one process that writes to the guest's RAM cannot be tracked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WriterError {
    /// It ended.
    #[error("it ended")]
    Ended,
    /// Its userfaultfd could not be had.
    #[error("its userfaultfd cannot be had")]
    RemoteCall(#[source] RemoteCallError),
    /// The kernel lacks a feature of userfaultfd.
    #[error(
        "the kernel has no asynchronous write-protection: it must be 6.7 or newer, with CONFIG_USERFAULTFD"
    )]
    KernelTooOld,
    /// A userfaultfd of somebody else serves the mapping.
    #[error(
        "its mapping at {start:#x} already has a userfaultfd, of a post-copy or background snapshot: end that first"
    )]
    AlreadyRegistered {
        /// Start of the mapping.
        start: u64,
    },
    /// The file is not of a kind that can be write-protected.
    #[error(
        "its mapping at {start:#x} cannot be write-protected: the RAM file must be on tmpfs or hugetlbfs"
    )]
    NotShmem {
        /// Start of the mapping.
        start: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It may map or write the file at any time.
    #[error(
        "it has a RAM file open for writing as descriptor {descriptor}, and may write to it at any time: end it, or have it close the file"
    )]
    HoldsDescriptor {
        /// The descriptor.
        descriptor: u32,
    },
    /// Its mappings could not be read.
    #[error("its mappings cannot be read")]
    Maps(#[source] MapsError),
    /// An operation on it failed.
    #[error("{operation} failed")]
    Failed {
        /// What failed.
        operation: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Soft-dirty bits are not kept for huge pages.
    #[error("soft_dirty does not see writes to hugetlbfs")]
    HugePages,
    /// Part of its memory is written by a kernel thread that cannot be stopped.
    #[error("it uses {}, through which the kernel writes to its memory while soft_dirty has it stopped", device.display())]
    KernelWriter {
        /// The device.
        device: PathBuf,
    },
    /// Another process runs in the same address space and cannot be stopped with it.
    #[error("process {with} shares its address space and is not stopped with it")]
    SharedAddressSpace {
        /// The other process.
        with: u32,
    },
    /// Its threads could not all be stopped in time.
    #[error("its thread {tid} could not be stopped in time")]
    NotStopped {
        /// The thread.
        tid: u32,
    },
}

/// Why a tracker is not to be trusted on this host.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SelfTestError {
    /// It did not report pages that were written.
    #[error("{kind} did not see {missed} of {written} pages written{}", missed_hint(*kind))]
    Missed {
        /// The tracker.
        kind: TrackerKind,
        /// Pages written and not reported.
        missed: u64,
        /// Pages written.
        written: u64,
    },
    /// It reported pages that nobody wrote.
    #[error("{kind} reported {extra} pages that were not written")]
    Extra {
        /// The tracker.
        kind: TrackerKind,
        /// Pages reported and not written.
        extra: u64,
    },
    /// It could not be armed or harvested.
    #[error("{kind} does not work here: {}", chain(source))]
    Tracker {
        /// The tracker.
        kind: TrackerKind,
        /// Why.
        #[source]
        source: Box<TrackError>,
    },
    /// The test itself could not be made.
    #[error("cannot test {kind}: {what} failed")]
    Setup {
        /// The tracker.
        kind: TrackerKind,
        /// What failed.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

fn missed_hint(kind: TrackerKind) -> &'static str {
    match kind {
        TrackerKind::SoftDirty => ": the kernel was built without CONFIG_MEM_SOFT_DIRTY",
        TrackerKind::UffdWp => "",
    }
}

/// An error with its sources, for one that is told within another.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
