//! Who else would read what has not arrived, and what else stands in the way.

use std::fs;
use std::time::{Duration, Instant};

use super::error::{FaultsError, Reach};
use super::places::Places;
use crate::error::{TrackError, WriterError};
use crate::holders::{self, Use, find_holders};
use crate::remote_call::RemoteCallError;
use crate::watch::FileWatch;
use crate::writers::{Mapper, check_files, find_reachers, obstacle};
use crate::{TrackedFile, features, process};

const CAP_SYS_PTRACE: u32 = 19;
/// A child that has its parent's mappings until its `execve` is given so long.
const FORK_PATIENCE: Duration = Duration::from_millis(200);
const FORK_POLL: Duration = Duration::from_millis(5);

/// Whether [`RemoteFaults::arm`](super::RemoteFaults::arm) would be refused, as far as that can be told without touching
/// the VMM: for whoever decides on post-copy beforehand.
///
/// # Errors
/// What it would be refused for.
pub fn check(vmm: u32, files: &[TrackedFile], partners: &[u32]) -> Result<(), FaultsError> {
    check_files(files).map_err(FaultsError::Files)?;
    let places = Places::of(files.to_vec()).look_again(vmm)?;
    FileWatch::new(vmm, files).map_err(FaultsError::Files)?;
    let lacking = features::postcopy_lacks()
        .map_err(|source| FaultsError::Failed { operation: "userfaultfd", source })?;
    if !lacking.is_empty() {
        return Err(FaultsError::KernelTooOld { lacking });
    }
    if !may_have_kernel_faults(vmm) {
        return Err(FaultsError::KernelFaultsDenied { vmm });
    }
    let may_be_registered = holders::is_userfaultfd_open();
    match obstacle(vmm, places.segments(), may_be_registered) {
        None => {}
        Some(WriterError::Ended) => return Err(FaultsError::Ended { vmm }),
        Some(WriterError::AlreadyRegistered { start }) => {
            return Err(FaultsError::AlreadyRegistered { vmm, start });
        }
        Some(WriterError::RemoteCall(source)) => return Err(FaultsError::RemoteCall { vmm, source }),
        Some(source) => {
            let comm = process::comm_of(vmm);
            return Err(FaultsError::Files(TrackError::Writer { pid: vmm, comm, source }));
        }
    }
    refuse_others(vmm, files, partners)
}

/// Refuses a process besides `vmm`, this one and `partners` that reaches one of `files`: nobody makes it wait.
pub(super) fn refuse_others(vmm: u32, files: &[TrackedFile], partners: &[u32]) -> Result<(), FaultsError> {
    let known: Vec<u32> = partners.iter().copied().chain([vmm]).collect();
    let deadline = Instant::now() + FORK_PATIENCE;
    // One that shares the VMM's address space, as a child made with `vfork` does, waits with it.
    let is_other = |pid: &u32| !process::share_address_space(*pid, vmm);
    loop {
        let mappers = find_reachers(files, &known).map_err(FaultsError::Files)?;
        let Some(pid) = mappers.into_iter().map(|Mapper { pid, .. }| pid).find(is_other) else { break };
        if Instant::now() >= deadline {
            return Err(other_process(pid, Reach::Maps));
        }
        std::thread::sleep(FORK_POLL);
    }
    let holders = find_holders(files, &known, Use::ReadOrWrite)
        .map_err(|source| FaultsError::Files(TrackError::Proc(source)))?;
    match holders.into_iter().find(|holder| is_other(&holder.pid)) {
        Some(holder) => Err(other_process(holder.pid, Reach::Holds { descriptor: holder.descriptor })),
        None => Ok(()),
    }
}

/// What it means that no userfaultfd could be had.
pub(super) fn not_taken(vmm: u32, error: RemoteCallError) -> FaultsError {
    match error {
        RemoteCallError::Ended { .. } => FaultsError::Ended { vmm },
        RemoteCallError::Refused { source, .. } if source.raw_os_error() == Some(libc::EPERM) => {
            FaultsError::KernelFaultsDenied { vmm }
        }
        source => FaultsError::RemoteCall { vmm, source },
    }
}

fn other_process(pid: u32, reach: Reach) -> FaultsError {
    FaultsError::OtherProcess { pid, comm: process::comm_of(pid), reach }
}

/// Whether `userfaultfd(2)` would give `vmm` a descriptor that is told of the kernel's faults. Where that cannot be
/// told, it may: the call itself will say.
fn may_have_kernel_faults(vmm: u32) -> bool {
    let allowed = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if allowed.is_ok_and(|allowed| allowed.trim() != "0") {
        return true;
    }
    // The capability counts in the first user namespace only, which is that of process 1 wherever this agent may look.
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/user")).ok();
    let elsewhere = matches!((namespace(vmm), namespace(1)), (Some(theirs), Some(first)) if theirs != first);
    !elsewhere && process::has_capability(&vmm.to_string(), CAP_SYS_PTRACE)
}
