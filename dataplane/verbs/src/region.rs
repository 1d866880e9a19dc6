//! Regions of guest RAM that a device may reach.
#![allow(unsafe_code, reason = "registers guest RAM with a device")]

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use ramferry_fabric::{RegisterError, Rights};
use ramferry_ram::{Access, BlockRange, Memory, RamError};
use rdma_sys::{ib_uverbs_advise_mr_advice as advice, ibv_access_flags, ibv_mr, ibv_sge};
use rustix::io::Errno;

use crate::kernel::source_access;
use crate::memlock;
use crate::os::{errno, last_errno};
use crate::protection::ProtectionDomain;

/// A registered range of guest RAM. The addresses that operations give for it, on
/// either side, are offsets from the start of its block.
///
/// That fits the device as well as it can: a page of the RAM file has the same
/// alignment in the file as in physical memory, huge pages included, wherever the
/// file is mapped.
#[derive(Debug)]
pub(crate) struct MemoryRegion {
    /// `None` once it was deregistered.
    raw: Mutex<Option<NonNull<ibv_mr>>>,
    local_key: u32,
    remote_key: u32,
    // After the above: the memory is mapped, and the protection domain there, until then.
    _memory: Arc<Memory>,
    _protection: Arc<ProtectionDomain>,
}

// SAFETY: libibverbs allows a region to be used and deregistered from any thread; the pointer
// is behind a lock, and is used to deregister alone.
unsafe impl Send for MemoryRegion {}
// SAFETY: as for `Send`.
unsafe impl Sync for MemoryRegion {}

/// How memory is made reachable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Paging {
    /// Its pages are pinned.
    Pinned,
    /// The device faults pages in as it needs them.
    OnDemand,
}

impl MemoryRegion {
    /// Registers a range of whole pages. Pages that were never touched are allocated.
    pub(crate) fn register(
        protection: &Arc<ProtectionDomain>,
        memory: &Arc<Memory>,
        range: BlockRange,
        rights: Rights,
        paging: Paging,
    ) -> Result<Self, RegisterError> {
        let span = memory.span(range)?;
        let is_writable = span.as_mut_ptr().is_ok();
        let flags = access_flags(rights, is_writable, paging);
        // SAFETY: the range is mapped (`span` checked it) and stays so: the memory is held by what
        // this makes until the region is deregistered. No reference is ever made to guest RAM, so
        // that the device may write to it at any time; it writes only where `flags` say so, which
        // is where the mapping is writable. The protection domain is alive.
        let raw = unsafe {
            rdma_sys::ibv_reg_mr_iova(
                protection.raw(),
                span.as_ptr().cast_mut().cast(),
                span.len(),
                range.offset,
                flags.0.cast_signed(),
            )
        };
        let Some(raw) = NonNull::new(raw) else {
            return Err(refused(last_errno(), range, is_writable));
        };
        // SAFETY: the region was just made, and its keys do not change.
        let (local_key, remote_key) = unsafe { ((*raw.as_ptr()).lkey, (*raw.as_ptr()).rkey) };
        let region = Self {
            raw: Mutex::new(Some(raw)),
            local_key,
            remote_key,
            _memory: Arc::clone(memory),
            _protection: Arc::clone(protection),
        };
        if paging == Paging::OnDemand {
            region.prefetch(range, rights);
        }
        Ok(region)
    }

    /// For this side's operations.
    pub(crate) fn local_key(&self) -> u32 {
        self.local_key
    }

    /// For the peer's.
    pub(crate) fn remote_key(&self) -> u32 {
        self.remote_key
    }

    /// Ends the device's use of the region and unpins it. Does nothing when that was done.
    pub(crate) fn deregister(&self) -> Result<(), Errno> {
        let mut raw = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(region) = *raw else { return Ok(()) };
        // SAFETY: made by `register`, and not deregistered: the lock is held, and the pointer
        // forgotten once this succeeds.
        let result = unsafe { rdma_sys::ibv_dereg_mr(region.as_ptr()) };
        if result != 0 {
            return Err(errno(result));
        }
        *raw = None;
        Ok(())
    }

    /// Asks the device to fault the region's pages in, without waiting for that. Only a hint:
    /// what it refuses is faulted in by the operations.
    fn prefetch(&self, range: BlockRange, rights: Rights) {
        let advised = match rights.remote_write {
            true => advice::IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH_WRITE,
            false => advice::IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH,
        };
        let mut offset = range.offset;
        let end = range.offset + range.length;
        while offset < end {
            let length = u32::try_from(end - offset).unwrap_or(1 << 30);
            let mut part = ibv_sge { addr: offset, length, lkey: self.local_key };
            // SAFETY: the protection domain is alive, and `part` names a part of a live region of
            // it; without the flag to flush the call does not wait.
            let _ = unsafe { rdma_sys::ibv_advise_mr(self._protection.raw(), advised, 0, &mut part, 1) };
            offset += u64::from(length);
        }
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        if let Err(error) = self.deregister() {
            tracing::warn!(%error, "a region could not be deregistered; its memory stays pinned");
        }
    }
}

/// Local writes only where the mapping allows them: the device would be refused the pages.
fn access_flags(rights: Rights, is_writable: bool, paging: Paging) -> ibv_access_flags {
    let mut flags = ibv_access_flags(0);
    if is_writable {
        flags |= ibv_access_flags::IBV_ACCESS_LOCAL_WRITE;
    }
    if rights.remote_write {
        flags |= ibv_access_flags::IBV_ACCESS_REMOTE_WRITE;
    }
    if rights.remote_read {
        flags |= ibv_access_flags::IBV_ACCESS_REMOTE_READ;
    }
    if paging == Paging::OnDemand {
        flags |= ibv_access_flags::IBV_ACCESS_ON_DEMAND;
    }
    flags
}

/// What a refused registration means.
fn refused(reason: Errno, range: BlockRange, is_writable: bool) -> RegisterError {
    match reason {
        Errno::NOMEM | Errno::PERM | Errno::AGAIN => {
            if let Some(limit) = memlock::exceeded_by(range.length) {
                return limit;
            }
        }
        Errno::FAULT if !is_writable && source_access() == Access::ReadWrite => {
            return RegisterError::PinsWritableOnly;
        }
        // The kernel could not fault a page of the file in.
        Errno::FAULT => {
            return RegisterError::Ram(RamError::Populate {
                offset: range.offset,
                length: range.length,
                source: reason.into(),
            });
        }
        _ => {}
    }
    RegisterError::System { what: "register memory with the RDMA device", source: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_given_as_asked_and_no_more() {
        let flags = |rights, is_writable, paging| access_flags(rights, is_writable, paging).0;
        assert_eq!(flags(Rights::LOCAL, false, Paging::Pinned), 0);
        assert_eq!(flags(Rights::LOCAL, true, Paging::Pinned), 1);
        assert_eq!(flags(Rights::REMOTE_WRITE, true, Paging::Pinned), 1 | 2);
        assert_eq!(flags(Rights::REMOTE_READ, false, Paging::Pinned), 4);
        assert_eq!(flags(Rights::REMOTE_READ, false, Paging::OnDemand), 4 | 64);
    }
}
