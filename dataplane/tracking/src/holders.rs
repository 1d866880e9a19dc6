//! Who could begin to write to the guest's RAM at any time: it has a RAM file open for writing.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use ramferry_ram::FileIdentity;

use crate::TrackedFile;
use crate::error::{TrackError, WriterError};
use crate::process;

/// Between two looks at every process; new ones are looked at each time.
const FULL_LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A child that has its parent's descriptors until its `execve` is given so long.
const FORK_PATIENCE: Duration = Duration::from_millis(200);
const FORK_POLL: Duration = Duration::from_millis(5);
/// What a descriptor allows, as the link in `/proc/PID/fd` has it among its permissions.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Use {
    Write,
    ReadOrWrite,
}

impl Use {
    fn is_allowed_by(self, mode: u32) -> bool {
        let wanted = match self {
            Use::Write => 0o200,
            Use::ReadOrWrite => 0o600,
        };
        mode & wanted != 0
    }
}

/// A process that has a file open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) pid: u32,
    pub(crate) descriptor: u32,
}

impl Holder {
    pub(crate) fn obstacle(self) -> WriterError {
        WriterError::HoldsDescriptor { descriptor: self.descriptor }
    }
}

/// Looks for holders again and again, at bounded cost.
#[derive(Debug, Default)]
pub(crate) struct HolderSearch {
    looked_at: Option<Instant>,
    seen: HashSet<u32>,
}

impl HolderSearch {
    /// Refuses a process, but for `known` ones, that has one of `files` open for writing. Unless `all` are to be
    /// looked at, those that were seen a moment ago are passed over.
    pub(crate) fn refuse(
        &mut self,
        files: &[TrackedFile],
        known: &[u32],
        all: bool,
    ) -> Result<(), TrackError> {
        let due = self.looked_at.is_none_or(|at| at.elapsed() >= FULL_LOOK_INTERVAL);
        let mut processes = process::other_processes().map_err(TrackError::Proc)?;
        let now: HashSet<u32> = processes.iter().copied().collect();
        if all || due {
            self.looked_at = Some(Instant::now());
        } else {
            processes.retain(|pid| !self.seen.contains(pid));
        }
        processes.retain(|pid| !known.contains(pid));
        self.seen = now;
        match processes.into_iter().find_map(|pid| lasting_holder(pid, files, Use::Write)) {
            Some(holder @ Holder { pid, .. }) => {
                Err(TrackError::Writer { pid, comm: process::comm_of(pid), source: holder.obstacle() })
            }
            None => Ok(()),
        }
    }
}

/// Processes, other than this one and those in `known`, that have one of `files` open for `purpose`.
pub(crate) fn find_holders(files: &[TrackedFile], known: &[u32], purpose: Use) -> io::Result<Vec<Holder>> {
    let others = process::other_processes()?;
    Ok(others
        .into_iter()
        .filter(|pid| !known.contains(pid))
        .filter_map(|pid| lasting_holder(pid, files, purpose))
        .collect())
}

/// Whether any process that can be seen has a userfaultfd open. Where that cannot be told, it may.
pub(crate) fn is_userfaultfd_open() -> bool {
    let Ok(mut processes) = process::other_processes() else { return true };
    processes.push(std::process::id());
    let is_open = |pid: u32| match process::userfaultfds_of(pid) {
        Ok(found) => !found.is_empty(),
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    };
    processes.into_iter().any(is_open)
}

fn lasting_holder(pid: u32, files: &[TrackedFile], purpose: Use) -> Option<Holder> {
    let deadline = Instant::now() + FORK_PATIENCE;
    loop {
        let holder = holder(pid, files, purpose)?;
        if Instant::now() >= deadline {
            return Some(holder);
        }
        std::thread::sleep(FORK_POLL);
    }
}

/// A process whose descriptors may not be seen is one whose mappings may not: those are asked for first.
fn holder(pid: u32, files: &[TrackedFile], purpose: Use) -> Option<Holder> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten() {
        // A descriptor may be closed under us.
        let Ok(file) = fs::metadata(entry.path()) else { continue };
        let identity = FileIdentity { device: file.dev(), inode: file.ino() };
        let is_ours = files.iter().any(|file| file.identity == identity);
        if is_ours && entry.metadata().is_ok_and(|link| purpose.is_allowed_by(link.mode())) {
            let descriptor = entry.file_name().to_str().and_then(|name| name.parse().ok())?;
            return Some(Holder { pid, descriptor });
        }
    }
    None
}
