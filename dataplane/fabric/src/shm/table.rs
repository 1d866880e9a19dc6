#![allow(unsafe_code, reason = "maps the table of regions that two processes share, and reaches its slots")]

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ramferry_ram::{BlockIndex, BlockRange};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::domain::Mirror;
use crate::regions::{Need, encloses};
use crate::{AccessFault, Region, RegionKey, Rights};

/// Regions of 64 MiB for 4 TiB; only the pages of slots in use take memory.
const SLOTS: usize = 1 << 16;
/// A key is in one of this many slots, starting from the one it names.
const PROBES: usize = 64;

const REMOTE_WRITE: u32 = 1;
const REMOTE_READ: u32 = 2;

/// One live region. A slot is free when its key and its uses are zero.
///
/// ```text
///  destination                       link
///  fields, then key = K
///                                    uses += 1, then key == K still?
///  key = 0, then waits: uses == 0?     yes: the operation; uses -= 1
///                                      no:  uses -= 1, refused
/// ```
///
/// Each side writes its own word before it reads the other's, in one total
/// order: either the link sees the key gone, or the destination sees the use.
#[repr(C)]
struct Slot {
    key: AtomicU64,
    offset: AtomicU64,
    length: AtomicU64,
    block: AtomicU32,
    rights: AtomicU32,
    uses: AtomicU32,
    reserved: AtomicU32,
}

const _: () = assert!(size_of::<Slot>() == 40);
const TABLE_BYTES: usize = SLOTS * size_of::<Slot>();

/// The table of live regions that a destination shares with one link.
pub(super) struct Table {
    start: NonNull<Slot>,
    fd: OwnedFd,
    /// Where the keys are: what this side published. Empty at the link.
    published: Mutex<HashMap<RegionKey, usize>>,
}

// SAFETY: a `Table` owns its mapping, and reaches it through atomics only.
unsafe impl Send for Table {}
// SAFETY: as for `Send`: every access to the mapping is atomic.
unsafe impl Sync for Table {}

/// An operation under way in a region.
pub(super) struct TableUse<'a> {
    slot: &'a Slot,
}

impl Table {
    /// An empty table, at the destination.
    pub(super) fn create() -> Result<Self, Errno> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("ramferry-regions", flags)?;
        rustix::fs::ftruncate(&fd, TABLE_BYTES as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(fd)
    }

    /// The table that a destination passed, at the link.
    pub(super) fn open(fd: OwnedFd) -> Result<Self, Errno> {
        // A table that can shrink could make a load fault.
        let sealed = rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK);
        if !sealed || rustix::fs::fstat(&fd)?.st_size != TABLE_BYTES as i64 {
            return Err(Errno::INVAL);
        }
        Self::map(fd)
    }

    fn map(fd: OwnedFd) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), TABLE_BYTES, protection, MapFlags::SHARED, &fd, 0)?
        };
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { start, fd, published: Mutex::default() })
    }

    fn slots(&self) -> &[Slot] {
        // SAFETY: `start` is page-aligned and begins `SLOTS` slots that stay mapped while `self`
        // lives; the file is sealed against shrinking at that length (`create` did, `open`
        // checked). A slot is all atomics, for which any bytes are valid and which other
        // processes may write.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), SLOTS) }
    }

    fn candidates(&self, key: RegionKey) -> impl Iterator<Item = (usize, &Slot)> {
        let home = key.0 as usize % SLOTS;
        (home..home + PROBES).map(|index| (index % SLOTS, &self.slots()[index % SLOTS]))
    }

    /// Begins an operation of the link, and says what its region is.
    pub(super) fn begin(
        &self,
        key: RegionKey,
        need: Need,
        offset: u64,
        length: u64,
    ) -> Result<(TableUse<'_>, BlockRange), AccessFault> {
        let slot = self.candidates(key).map(|(_, slot)| slot).find(|slot| slot.key.load(Relaxed) == key.0);
        let slot = slot.filter(|_| key.0 != 0).ok_or(AccessFault::UnknownKey)?;
        slot.uses.fetch_add(1, SeqCst);
        let taken = TableUse { slot };
        if slot.key.load(SeqCst) != key.0 {
            return Err(AccessFault::UnknownKey);
        }
        // The fields are the key's from here on: it cannot leave while it is in use.
        let block = BlockIndex(slot.block.load(Relaxed));
        let region =
            BlockRange { block, offset: slot.offset.load(Relaxed), length: slot.length.load(Relaxed) };
        if !encloses(region, BlockRange { block, offset, length }) {
            return Err(AccessFault::OutOfBounds);
        }
        let rights = slot.rights.load(Relaxed);
        let allowed = match need {
            Need::RemoteWrite => rights & REMOTE_WRITE != 0,
            Need::RemoteRead => rights & REMOTE_READ != 0,
            Need::LocalRead | Need::LocalWrite => false,
        };
        if allowed { Ok((taken, region)) } else { Err(AccessFault::Rights) }
    }

    /// Takes every key out of use, and waits for the operations under way.
    pub(super) fn close(&self, wait: Duration) {
        let keys: Vec<RegionKey> = self.published().keys().copied().collect();
        keys.iter().for_each(|key| self.retract(*key));
        let start = Instant::now();
        while keys.iter().any(|key| self.in_use(*key)) && start.elapsed() < wait {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn published(&self) -> MutexGuard<'_, HashMap<RegionKey, usize>> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mirror for Table {
    fn publish(&self, region: Region, rights: Rights) -> bool {
        let mut published = self.published();
        let free = self
            .candidates(region.key)
            .find(|(_, slot)| slot.key.load(SeqCst) == 0 && slot.uses.load(SeqCst) == 0);
        let Some((index, slot)) = free else { return false };
        let write = if rights.remote_write { REMOTE_WRITE } else { 0 };
        let read = if rights.remote_read { REMOTE_READ } else { 0 };
        slot.offset.store(region.range.offset, Relaxed);
        slot.length.store(region.range.length, Relaxed);
        slot.block.store(region.range.block.0, Relaxed);
        slot.rights.store(write | read, Relaxed);
        slot.key.store(region.key.0, SeqCst);
        published.insert(region.key, index);
        true
    }

    fn retract(&self, key: RegionKey) {
        if let Some(index) = self.published().get(&key) {
            self.slots()[*index].key.store(0, SeqCst);
        }
    }

    fn in_use(&self, key: RegionKey) -> bool {
        let mut published = self.published();
        let in_use = published.get(&key).is_some_and(|index| self.slots()[*index].uses.load(SeqCst) > 0);
        if !in_use {
            published.remove(&key);
        }
        in_use
    }
}

impl AsFd for Table {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by `map` and is unmapped only here; whatever was borrowed
        // from it borrowed `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), TABLE_BYTES) };
    }
}

impl Drop for TableUse<'_> {
    fn drop(&mut self) {
        self.slot.uses.fetch_sub(1, SeqCst);
    }
}
