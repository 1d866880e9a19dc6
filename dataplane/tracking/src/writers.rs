//! Who can write to the guest's RAM.
//!
//! Seen are processes of our PID namespace that have a RAM file mapped shared
//! and writable, or open for writing. Not seen are processes of other PID
//! namespaces. What comes and goes between two looks, and writes that need no
//! mapping, are noticed by [`watch`](crate::watch). A read-only mapping is no writer;
//! one that `mprotect` makes writable is found by the next look, as a new one is.

use std::fs::{self, File};
use std::io::{self, Read};

use ramferry_ram::BlockIndex;

use crate::error::{TrackError, WriterError};
use crate::holders::{self, Use, find_holders};
use crate::maps::{self, MapsError, Vma};
use crate::process;
use crate::remote_call::RemoteCallError;
use crate::segments::{Segment, reached, segments};
use crate::self_test::self_test;
use crate::{TrackedFile, TrackerKind};

const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;

/// A process that has one of the files mapped shared and writable.
#[derive(Debug)]
pub(crate) struct Mapper {
    pub(crate) pid: u32,
    pub(crate) segments: Vec<Segment>,
}

/// A process that can write to the guest's RAM.
#[derive(Debug)]
#[non_exhaustive]
pub struct Writer {
    /// The process.
    pub pid: u32,
    /// Its name.
    pub comm: String,
    /// Why it could not be tracked, as far as that can be told from outside.
    pub obstacle: Option<WriterError>,
}

/// Tells who has `files` mapped writable or open for writing, and whether each could be tracked.
/// Changes nothing in any of those processes.
///
/// # Errors
/// When `guest` has not mapped a file, or the processes cannot be looked at.
pub fn check(guest: u32, files: &[TrackedFile]) -> Result<Vec<Writer>, TrackError> {
    check_files(files)?;
    check_guest_maps(guest, files)?;
    let mut soft_dirty_works = None;
    let may_be_registered = holders::is_userfaultfd_open();
    let mappers = find_mappers(files, &[])?;
    let known: Vec<u32> = mappers.iter().map(|mapper| mapper.pid).chain([guest]).collect();
    let holders = find_holders(files, &known, Use::Write).map_err(TrackError::Proc)?;
    let holders = holders.into_iter().map(|holder| Writer {
        pid: holder.pid,
        comm: process::comm_of(holder.pid),
        obstacle: Some(holder.obstacle()),
    });
    Ok(mappers
        .into_iter()
        .map(|Mapper { pid, segments }| {
            let obstacle = obstacle(pid, &segments, may_be_registered).filter(|obstacle| {
                let may_fall_back = matches!(obstacle, WriterError::AlreadyRegistered { .. });
                !(may_fall_back
                    && *soft_dirty_works.get_or_insert_with(|| self_test(TrackerKind::SoftDirty).is_ok()))
            });
            Writer { pid, comm: process::comm_of(pid), obstacle }
        })
        .chain(holders)
        .collect())
}

/// Whether `files` can be tracked at all.
pub(crate) fn check_files(files: &[TrackedFile]) -> Result<(), TrackError> {
    if files.is_empty() {
        return Err(TrackError::NoFiles);
    }
    for ((index, file), block) in files.iter().enumerate().zip((0..).map(BlockIndex)) {
        let bad = |why| TrackError::BadFile { block, why };
        if !file.page_bytes.is_power_of_two() || file.page_bytes < 4096 {
            return Err(bad("its page size is not a power of two of at least 4096"));
        }
        if file.pages == 0 || file.pages.checked_mul(file.page_bytes).is_none() {
            return Err(bad("its number of pages is zero or beyond the address space"));
        }
        if files[..index].iter().any(|other| other.identity == file.identity) {
            return Err(bad("its RAM file is also another block's"));
        }
    }
    Ok(())
}

/// Whether `guest` has each of `files` mapped shared and writable.
pub(crate) fn check_guest_maps(guest: u32, files: &[TrackedFile]) -> Result<(), TrackError> {
    let vmas = maps::vmas_of(guest).map_err(|source| match source {
        MapsError::NoProcess { pid } => TrackError::GuestEnded { pid },
        source => TrackError::Hidden { pid: guest, comm: process::comm_of(guest), source },
    })?;
    let mapped = segments(&vmas, files);
    for (index, block) in (0..files.len()).zip((0..).map(BlockIndex)) {
        if !mapped.iter().any(|segment| segment.file == index) {
            return Err(TrackError::NotMapped { pid: guest, block });
        }
    }
    Ok(())
}

/// Processes, other than this one and those in `known`, that have one of
/// `files` mapped shared and writable.
pub(crate) fn find_mappers(files: &[TrackedFile], known: &[u32]) -> Result<Vec<Mapper>, TrackError> {
    find_mappers_by(segments, files, known)
}

/// The same of those that have one mapped in whatever way.
pub(crate) fn find_reachers(files: &[TrackedFile], known: &[u32]) -> Result<Vec<Mapper>, TrackError> {
    find_mappers_by(reached, files, known)
}

fn find_mappers_by(
    segments: fn(&[Vma], &[TrackedFile]) -> Vec<Segment>,
    files: &[TrackedFile],
    known: &[u32],
) -> Result<Vec<Mapper>, TrackError> {
    let mut mappers = Vec::new();
    let may_trace_all = process::have_capability(CAP_SYS_PTRACE);
    for pid in process::other_processes().map_err(TrackError::Proc)? {
        if known.contains(&pid) {
            continue;
        }
        let vmas = match maps::vmas_of(pid) {
            Ok(vmas) => vmas,
            Err(MapsError::NoProcess { .. }) => continue,
            Err(source @ MapsError::Denied { .. }) if may_trace_all => {
                tracing::debug!(pid, error = %source, "a process is hidden even from CAP_SYS_PTRACE");
                continue;
            }
            Err(source) => return Err(TrackError::Hidden { pid, comm: process::comm_of(pid), source }),
        };
        let segments = segments(&vmas, files);
        if !segments.is_empty() {
            mappers.push(Mapper { pid, segments });
        }
    }
    Ok(mappers)
}

/// Processes, with their names, that this one may not look into: whether they
/// write to a guest's RAM cannot be told.
///
/// # Errors
/// When the processes cannot be listed.
pub fn hidden_processes() -> Result<Vec<(u32, String)>, TrackError> {
    let mut hidden = process::other_processes().map_err(TrackError::Proc)?;
    hidden.retain(|pid| matches!(maps::vmas_of(*pid), Err(MapsError::Denied { .. })));
    Ok(hidden.into_iter().map(|pid| (pid, process::comm_of(pid))).collect())
}

/// Why process `pid` could not be tracked, as far as can be told without touching it.
pub(crate) fn obstacle(pid: u32, segments: &[Segment], may_be_registered: bool) -> Option<WriterError> {
    let refused = |error| Some(WriterError::RemoteCall(error));
    let status = match process::thread_status(pid, pid) {
        Ok(status) if !status.ended => status,
        _ => return Some(WriterError::Ended),
    };
    if status.tracer != 0 {
        let comm = process::comm_of(status.tracer);
        return refused(RemoteCallError::AlreadyTraced { pid, tracer: status.tracer, comm });
    }
    // The kernel asks the same of who opens this as of who traces.
    if let Err(source) = File::open(format!("/proc/{pid}/mem")) {
        return refused(RemoteCallError::Denied { pid, source });
    }
    if status.seccomp != 0 && !may_suspend_seccomp() {
        let source = io::Error::from_raw_os_error(libc::EPERM);
        return refused(RemoteCallError::Seccomp { pid, source });
    }
    if !runs_64_bit(pid) {
        return refused(RemoteCallError::NotSixtyFourBit { pid });
    }
    // To make `smaps` the kernel visits every page that is mapped, which for a large guest takes seconds. A mapping is
    // registered no longer than its userfaultfd is open, in whatever process; one of another PID namespace is
    // found when the mapping is to be registered again.
    if !may_be_registered {
        return None;
    }
    match fs::read_to_string(format!("/proc/{pid}/smaps")) {
        Ok(smaps) => {
            registered_mapping(&smaps, segments).map(|start| WriterError::AlreadyRegistered { start })
        }
        Err(source) => Some(WriterError::Maps(MapsError::Read { pid, source })),
    }
}

fn may_suspend_seccomp() -> bool {
    let ours = std::process::id();
    process::have_capability(CAP_SYS_ADMIN)
        && process::thread_status(ours, ours).is_ok_and(|status| status.seccomp == 0)
}

/// Whether the program of `pid` is of the 64-bit ELF class; `true` when that cannot be read.
fn runs_64_bit(pid: u32) -> bool {
    const ELFCLASS32: u8 = 1;
    let mut header = [0; 5];
    let read = File::open(format!("/proc/{pid}/exe")).and_then(|mut exe| exe.read_exact(&mut header));
    read.is_err() || header[4] != ELFCLASS32
}

/// Start of a mapping in `segments` that has a userfaultfd, by the `VmFlags` of `smaps`.
fn registered_mapping(smaps: &str, segments: &[Segment]) -> Option<u64> {
    let mut current = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let registered = flags.split_whitespace().any(|flag| matches!(flag, "um" | "uw" | "ui"));
            if let (true, Some(start)) = (registered, current) {
                return Some(start);
            }
            continue;
        }
        let header = line.split_once('-').and_then(|(start, _)| u64::from_str_radix(start, 16).ok());
        if let Some(start) = header {
            let ours = segments.iter().any(|segment| (segment.start..segment.end).contains(&start));
            current = ours.then_some(start);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use ramferry_ram::FileIdentity;

    use super::*;

    #[test]
    fn a_userfaultfd_is_seen_by_the_flags_of_our_mapping_only() {
        let smaps = |ours: &str, other: &str| {
            format!(
                "7f0000000000-7f0000001000 rw-s 00000000 00:1a 42 /dev/shm/a\nSize: 4 kB\nVmFlags: rd wr sh {ours}\n\
                 7f0000009000-7f000000a000 rw-p 00000000 00:00 0 \nVmFlags: rd wr {other}\n"
            )
        };
        let start = 0x7f00_0000_0000;
        let segments = [Segment { start, end: start + 4096, file: 0, offset: 0 }];
        assert_eq!(registered_mapping(&smaps("mr", "uw"), &segments), None);
        for flag in ["um", "uw", "ui"] {
            assert_eq!(registered_mapping(&smaps(flag, ""), &segments), Some(start));
        }
    }

    #[test]
    fn files_that_cannot_be_are_refused() {
        let file = TrackedFile { identity: FileIdentity { device: 1, inode: 2 }, pages: 1, page_bytes: 4096 };
        assert!(matches!(check_files(&[]), Err(TrackError::NoFiles)));
        assert!(check_files(&[file]).is_ok());
        let bad = [
            TrackedFile { pages: 0, ..file },
            TrackedFile { page_bytes: 5000, ..file },
            TrackedFile { pages: u64::MAX, ..file },
        ];
        for bad in bad {
            assert!(matches!(check_files(&[bad]), Err(TrackError::BadFile { .. })));
        }
        let twice = check_files(&[file, file]);
        assert!(matches!(twice, Err(TrackError::BadFile { block: BlockIndex(1), .. })));
    }
}
