#![allow(unsafe_code, reason = "maps guest RAM and reaches it through raw pointers")]

use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::sigbus::{self, Fault};
use crate::{Access, RamError, RamFile, zero};

/// What the kernel maps around a read fault of a page that is present
/// (`fault_around_bytes`, unless somebody changed it), writable where the mapping
/// is: pages of tmpfs need not be told of their first store.
pub const FAULT_AROUND_BYTES: u64 = 64 << 10;

/// The start of a RAM file, mapped shared. Unmapped on drop.
///
/// A page that the file can no longer give (it was truncated, its file system
/// is full, the hardware lost it) reads as zeros from then on instead of
/// killing the process, and [`Mapping::check`] tells.
#[derive(Debug)]
pub struct Mapping {
    // Fields are dropped in this order: the SIGBUS handler must have forgotten the
    // address range before the kernel may give it to somebody else.
    guard: sigbus::Registration,
    area: Area,
    file: RamFile,
    access: Access,
}

impl Mapping {
    /// Maps the first `length_bytes` bytes of `file`.
    ///
    /// # Errors
    /// When they are not whole pages, the file is shorter or not open for
    /// `access`, or the kernel refuses.
    pub fn new(file: &RamFile, length_bytes: u64, access: Access) -> Result<Self, RamError> {
        if access == Access::ReadWrite && file.access() != Access::ReadWrite {
            return Err(RamError::ReadOnly);
        }
        let page_bytes = file.page_bytes();
        if length_bytes == 0 || !length_bytes.is_multiple_of(page_bytes) {
            return Err(RamError::Misaligned { offset: 0, length: length_bytes, page_bytes });
        }
        if length_bytes > file.length_bytes() {
            return Err(RamError::FileTooShort {
                file_bytes: file.length_bytes(),
                needed_bytes: length_bytes,
            });
        }
        let area = Area::map(file, length_bytes, access)?;
        let guard = sigbus::register(
            area.start.as_ptr() as usize,
            area.length,
            page_bytes as usize,
            access == Access::ReadWrite,
        )?;
        Ok(Self { guard, area, file: file.clone(), access })
    }

    /// Length in bytes.
    pub fn length_bytes(&self) -> u64 {
        self.area.length as u64
    }

    /// What it may be used for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// `length` bytes from `offset` on.
    ///
    /// # Errors
    /// When they are not all within the mapping.
    pub fn span(&self, offset: u64, length: u64) -> Result<Span<'_>, RamError> {
        self.check_bounds(offset, length)?;
        // SAFETY: `offset` is at most the mapping's length (checked above), so the
        // result is within the mapping or one past its end.
        let start = unsafe { self.area.start.as_ptr().add(offset as usize) };
        Ok(Span {
            start,
            length: length as usize,
            writable: self.access == Access::ReadWrite,
            mapping: PhantomData,
        })
    }

    /// Makes every page of a range present and maps it, for reading or for
    /// writing. Pages that were never touched are allocated.
    ///
    /// # Errors
    /// When the range is not whole pages of the mapping, or there is no memory.
    pub fn populate(&self, offset: u64, length: u64, access: Access) -> Result<(), RamError> {
        if access == Access::ReadWrite && self.access != Access::ReadWrite {
            return Err(RamError::ReadOnly);
        }
        let start = self.pages(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let advice = match access {
            Access::Read => Advice::LinuxPopulateRead,
            Access::ReadWrite => Advice::LinuxPopulateWrite,
        };
        // SAFETY: the range is within this mapping (`pages` checked), which stays mapped
        // while `self` is borrowed; populating changes no byte of it.
        retry_interrupted(|| unsafe { rustix::mm::madvise(start, length as usize, advice) })
            .map_err(|errno| RamError::Populate { offset, length, source: errno.into() })
    }

    /// Maps a range whose pages are present, at a small part of what a fault for each
    /// would cost. A page that was never touched may be allocated by it.
    ///
    /// # Errors
    /// When the range is not whole pages of the mapping, or a page is lost.
    pub fn map_present(&self, offset: u64, length: u64) -> Result<(), RamError> {
        if self.file.is_hugetlbfs() {
            return self.populate(offset, length, Access::Read);
        }
        self.pages(offset, length)?;
        let end = offset + length;
        let mut next = offset;
        while next < end {
            self.span(next, 1)?.touch();
            next = (next / FAULT_AROUND_BYTES + 1) * FAULT_AROUND_BYTES;
        }
        self.check()
    }

    /// Whether every page reached so far was there.
    ///
    /// # Errors
    /// [`RamError::Truncated`], [`RamError::Unbacked`] or [`RamError::Poisoned`]
    /// when one was not; it has read as zeros since.
    pub fn check(&self) -> Result<(), RamError> {
        let Some((fault, offset)) = self.guard.fault() else { return Ok(()) };
        let offset = offset as u64;
        if fault == Fault::Poisoned {
            return Err(RamError::Poisoned { offset });
        }
        let file_bytes = self.file.current_length_bytes()?;
        Err(if file_bytes < offset + self.file.page_bytes() {
            RamError::Truncated { offset, file_bytes }
        } else {
            RamError::Unbacked { offset }
        })
    }

    fn check_bounds(&self, offset: u64, length: u64) -> Result<(), RamError> {
        let mapped_bytes = self.length_bytes();
        match offset.checked_add(length) {
            Some(end) if end <= mapped_bytes => Ok(()),
            _ => Err(RamError::OutOfBounds { offset, length, mapped_bytes }),
        }
    }

    fn pages(&self, offset: u64, length: u64) -> Result<*mut libc::c_void, RamError> {
        let page_bytes = self.file.page_bytes();
        if !offset.is_multiple_of(page_bytes) || !length.is_multiple_of(page_bytes) {
            return Err(RamError::Misaligned { offset, length, page_bytes });
        }
        Ok(self.span(offset, length)?.start.cast())
    }
}

/// A checked range of mapped guest RAM.
///
/// The guest, its peers and links write to it at any time, so it never becomes
/// a reference; what is read from it may be torn. A torn page does no harm:
/// whoever wrote it made it dirty, and it is read again.
///
/// It borrows its [`Mapping`]: a pointer taken from it must not be used after
/// the mapping is dropped.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    start: *mut u8,
    length: usize,
    writable: bool,
    mapping: PhantomData<&'a Mapping>,
}

// SAFETY: a span is an address range and no reference. Guest RAM is written by other
// processes and devices at any time, so every access made through a span has to expect
// concurrent writes, and another thread of ours adds nothing to that.
unsafe impl Send for Span<'_> {}
// SAFETY: as for `Send`; a shared span gives no more than a copy of it does.
unsafe impl Sync for Span<'_> {}

impl Span<'_> {
    /// Its first byte, to be read only.
    pub fn as_ptr(&self) -> *const u8 {
        self.start
    }

    /// Its first byte, to be written.
    ///
    /// # Errors
    /// [`RamError::ReadOnly`] when the mapping is.
    pub fn as_mut_ptr(&self) -> Result<*mut u8, RamError> {
        if self.writable { Ok(self.start) } else { Err(RamError::ReadOnly) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Reads the first byte, so that the kernel maps its page, and present pages
    /// around it.
    pub fn touch(&self) {
        if !self.is_empty() {
            // SAFETY: the span has a first byte, which is mapped readable while it is borrowed
            // (`Mapping::span` checked the bounds). The read is volatile: its value is of no use,
            // its effect is.
            unsafe { self.start.read_volatile() };
        }
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        // SAFETY: `length` bytes from `start` are mapped readable: `Mapping::span` checked
        // the bounds, and the mapping lives as long as this span's lifetime.
        unsafe { zero::is_zero(self.start, self.length) }
    }

    /// Copies it out.
    ///
    /// # Panics
    /// When `destination` has another length.
    pub fn read_into(&self, destination: &mut [u8]) {
        assert_eq!(destination.len(), self.length, "a buffer of the span's length");
        // SAFETY: `length` bytes are mapped readable (checked by `Mapping::span`, kept by the
        // borrow) and writable at `destination` (a `&mut` slice of that length, asserted);
        // they do not overlap, as no Rust reference is ever made to guest RAM. Concurrent
        // guest writes can only tear the copied bytes, which any value of `u8` allows.
        unsafe { std::ptr::copy_nonoverlapping(self.start, destination.as_mut_ptr(), self.length) }
    }

    /// Copies `source` in.
    ///
    /// # Panics
    /// When `source` has another length, or the mapping is read-only.
    pub fn write_from(&self, source: &[u8]) {
        assert!(self.writable, "a writable span");
        assert_eq!(source.len(), self.length, "a buffer of the span's length");
        // SAFETY: `length` bytes are mapped writable (asserted, checked by `Mapping::span`,
        // kept by the borrow) and readable at `source` (a slice of that length, asserted);
        // they do not overlap, as no Rust reference is ever made to guest RAM.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), self.start, self.length) }
    }

    /// Copies `source` in. The two may be the same memory, but not overlap otherwise.
    ///
    /// # Panics
    /// When `source` has another length or overlaps this span in part, or this
    /// span's mapping is read-only.
    pub fn copy_from(&self, source: Span<'_>) {
        assert!(self.writable, "a writable span");
        assert_eq!(source.length, self.length, "a span of the same length");
        if source.start == self.start {
            return;
        }
        let distance = (source.start as usize).abs_diff(self.start as usize);
        assert!(distance >= self.length, "spans that do not overlap");
        // SAFETY: `length` bytes are mapped readable at `source` and writable here (asserted,
        // checked by `Mapping::span`, kept by the borrows), and do not overlap (asserted).
        // Concurrent guest writes can only tear the copied bytes.
        unsafe { std::ptr::copy_nonoverlapping(source.start, self.start, self.length) }
    }

    /// Makes every byte zero; writes only to 4 KiB parts that hold another byte.
    ///
    /// # Panics
    /// When the mapping is read-only.
    pub fn zero(&self) {
        const PART: usize = 4096;
        assert!(self.writable, "a writable span");
        for offset in (0..self.length).step_by(PART) {
            let length = PART.min(self.length - offset);
            // SAFETY: `offset + length` is at most the span's length, whose bytes are mapped
            // readable and writable (asserted, checked by `Mapping::span`, kept by the borrow).
            unsafe {
                let part = self.start.add(offset);
                if !zero::is_zero(part, length) {
                    std::ptr::write_bytes(part, 0, length);
                }
            }
        }
    }
}

/// Mapped address space; unmapped on drop.
#[derive(Debug)]
struct Area {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: an address range that is unmapped once, by whichever thread drops it; access to
// its bytes is the business of `Span`.
unsafe impl Send for Area {}
// SAFETY: a shared `Area` gives an address and a length only.
unsafe impl Sync for Area {}

impl Area {
    fn map(file: &RamFile, length_bytes: u64, access: Access) -> Result<Self, RamError> {
        let map_error = |source: io::Error| RamError::Map { length_bytes, source };
        let length = usize::try_from(length_bytes)
            .ok()
            .filter(|length| isize::try_from(*length).is_ok())
            .ok_or_else(|| map_error(io::ErrorKind::FileTooLarge.into()))?;
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // The guest reserved its huge pages when it mapped the file; ours are the same ones.
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, protection, flags, file, 0) };
        let start = start.map_err(|errno| map_error(errno.into()))?;
        // SAFETY: the range was just mapped, and the advice is about forks of this process: none has
        // a use for it, and one that lives on must not hold a guest's memory.
        unsafe { rustix::mm::madvise(start, length, Advice::LinuxDontFork) }
            .map_err(|errno| map_error(errno.into()))?;
        if access == Access::ReadWrite {
            // SAFETY: the range was just mapped; the advice changes no byte of it. Where the host
            // has huge pages on for shared memory, what is allocated through this mapping is made
            // of them; elsewhere it is refused, or does nothing.
            let _ = unsafe { rustix::mm::madvise(start, length, Advice::LinuxHugepage) };
        }
        let start = NonNull::new(start.cast()).expect("mmap never maps at address zero unasked");
        Ok(Self { start, length })
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by `map` and is unmapped only here; every `Span` of it
        // borrowed the `Mapping` that owned it. Pages put in its place by the SIGBUS handler
        // lie within it. It cannot fail but for a process that has run out of mappings.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

fn retry_interrupted(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    const ATTEMPTS: usize = 100;
    let mut result = call();
    for _ in 1..ATTEMPTS {
        if result != Err(Errno::INTR) {
            break;
        }
        result = call();
    }
    result
}

#[cfg(test)]
mod tests;
