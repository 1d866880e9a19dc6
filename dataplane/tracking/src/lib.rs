//! Which pages of a running guest were written, without the VMM's help; and, in
//! post-copy, which it reaches for ([`postcopy`]).
//!
//! The guest's RAM is files that its VMM, and perhaps other processes, have
//! mapped shared. A [`Tracker`] watches every process that can write to them,
//! by one of two means of the kernel:
//!
//! | kind | how | needs |
//! |---|---|---|
//! | `uffd_wp` | asynchronous write-protection through a userfaultfd taken from the process | kernel 6.7 |
//! | `soft_dirty` | soft-dirty bits, read and cleared while the process is stopped | `CONFIG_MEM_SOFT_DIRTY` |
//!
//! Neither is trusted before [`self_test`] has seen it work on this host.
//! When a tracker is dropped, and when the agent dies, the guest runs on unharmed
//! and untraced.
//!
//! The agent needs CAP_SYS_PTRACE to look into processes of other users, and
//! CAP_SYS_ADMIN where the VMM runs under seccomp.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("ramferry-tracking knows the system call convention of x86-64 Linux only");

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use ramferry_ram::{FileIdentity, PageSets};

mod deputy;
mod error;
pub mod features;
mod holders;
mod huge;
pub mod maps;
mod pagemap;
pub mod postcopy;
mod process;
mod ptrace;
pub mod remote_call;
mod segments;
mod self_test;
mod soft_dirty;
mod touched;
mod tracker;
mod uffd;
mod uffd_wp;
mod watch;
mod writers;

pub use error::{SelfTestError, TrackError, WriterError};
pub use self_test::self_test;
pub use writers::{Writer, check, hidden_processes};

use soft_dirty::SoftDirty;
use tracker::FileTracker;
use uffd_wp::UffdWp;

/// By which means written pages are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TrackerKind {
    /// Asynchronous write-protection through a userfaultfd.
    UffdWp,
    /// Soft-dirty bits.
    SoftDirty,
}

impl TrackerKind {
    /// Every kind, the best first.
    pub const ALL: [Self; 2] = [Self::UffdWp, Self::SoftDirty];

    /// The name in options, metrics and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UffdWp => "uffd_wp",
            Self::SoftDirty => "soft_dirty",
        }
    }
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for TrackerKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|kind| kind.as_str() == name);
        found.ok_or_else(|| format!("{name:?} is no tracker: use uffd_wp or soft_dirty"))
    }
}

/// A RAM file to track: one for each block, in the order of the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackedFile {
    /// Which file it is.
    pub identity: FileIdentity,
    /// Pages of the block; what the file has beyond them is not tracked.
    pub pages: u64,
    /// Size of a page, in bytes: the huge page size on hugetlbfs.
    pub page_bytes: u64,
}

/// What one harvest brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Harvest {
    /// Pages reported, each once.
    pub written_pages: u64,
    /// How long it took.
    pub elapsed: Duration,
}

/// Tells which pages of a guest's RAM files were written.
///
/// An implementer MUST report every page written between the previous harvest
/// (or the arming) and this one, and MAY report more; dropping it MUST leave
/// every process as if it had never been tracked.
///
/// A caller MUST read a page only after the harvest that reported it returned;
/// MUST call [`recheck`](Self::recheck) in each round, as late as it can, since a
/// process that began to map a RAM file is tracked only from then on; and after
/// an error MUST NOT take any page for unwritten unless a later harvest succeeds
/// (what a failed one found is kept for that one).
pub trait Tracker: Send {
    /// By which means.
    fn kind(&self) -> TrackerKind;

    /// Adds the pages written since the previous harvest to `written`, and
    /// begins anew.
    ///
    /// # Errors
    /// When the guest ended, a process can no longer be tracked, or one that was
    /// not tracked may have written.
    fn harvest(&mut self, written: &mut PageSets) -> Result<Harvest, TrackError>;

    /// The same for a guest that stands still, and is not expected to write again: it need not begin anew for what the
    /// guest wrote, which takes longer than to look. Where there is another harvest after all, that one MUST report every
    /// page written from now on, and MAY report once more what this one did.
    ///
    /// # Errors
    /// As [`harvest`](Self::harvest).
    fn harvest_last(&mut self, written: &mut PageSets) -> Result<Harvest, TrackError> {
        self.harvest(written)
    }

    /// Whether a process other than the guest writes, or did since this was armed, to a tracked file: it may do
    /// so by DMA, and cannot be asked whether it has ended.
    fn has_other_writers(&self) -> bool;

    /// Looks for processes that began to map a RAM file writable, tracks them,
    /// and adds all pages of that file to `written`.
    ///
    /// # Errors
    /// When there is one that cannot be tracked, or that could begin to write at any time: it is named.
    fn recheck(&mut self, written: &mut PageSets) -> Result<(), TrackError>;

    /// The last look, with the guest paused and everything copied that the last harvest reported: makes sure that
    /// nobody but the guest wrote since.
    ///
    /// # Errors
    /// When somebody did, or may have: it is named as far as it is known.
    fn confirm(&mut self) -> Result<(), TrackError>;
}

/// Begins to track what `guest`, and every other process, writes to `files`.
/// Pages written after this returned are reported. Without a `choice`, the first
/// kind does that passes its self-test and can be armed.
///
/// # Errors
/// When no tracker can be trusted with it; the guest is then as before.
pub fn arm(
    choice: Option<TrackerKind>,
    guest: u32,
    files: &[TrackedFile],
) -> Result<Box<dyn Tracker>, TrackError> {
    if let Some(kind) = choice {
        return arm_tested(kind, guest, files);
    }
    let uffd_wp = match arm_tested(TrackerKind::UffdWp, guest, files) {
        Err(error) if error.is_of_this_kind_only() => Box::new(error),
        result => return result,
    };
    tracing::warn!(error = %uffd_wp, "uffd_wp cannot be used, trying soft_dirty");
    arm_tested(TrackerKind::SoftDirty, guest, files).map_err(|error| {
        if error.is_of_this_kind_only() {
            TrackError::NoTracker { uffd_wp, soft_dirty: Box::new(error) }
        } else {
            error
        }
    })
}

fn arm_tested(kind: TrackerKind, guest: u32, files: &[TrackedFile]) -> Result<Box<dyn Tracker>, TrackError> {
    self_test::once(kind)?;
    Ok(match kind {
        TrackerKind::UffdWp => Box::new(FileTracker::<UffdWp>::arm(guest, files)?),
        TrackerKind::SoftDirty => Box::new(FileTracker::<SoftDirty>::arm(guest, files)?),
    })
}
