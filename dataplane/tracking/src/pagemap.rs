//! `PAGEMAP_SCAN`: which pages were written, read and, if so told, re-protected in one call.
#![allow(unsafe_code, reason = "ioctl(2) on a pagemap has no safe binding")]

use std::fs::File;
use std::io;

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use thiserror::Error;

use crate::tracker::Afterwards;

/// Regions that one call can return; a scan continues where one ended.
const MAX_REGIONS: usize = 16 << 10;

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGEMAP_SCAN: Opcode = opcode::read_write::<PmScanArg>(b'f', 16);

const _: () = assert!(size_of::<PageRegion>() == 24);
const _: () = assert!(size_of::<PmScanArg>() == 96 && PAGEMAP_SCAN as u64 == 0xc060_6610);

/// Why a range could not be scanned.
#[derive(Debug, Error)]
pub(crate) enum ScanError {
    /// Part of the range is mapped and not registered for asynchronous
    /// write-protection: the mapping was replaced.
    #[error("part of the range is no longer write-protected")]
    NotProtected,
    /// The kernel does not know the call, or failed at it.
    #[error("PAGEMAP_SCAN failed")]
    Failed(#[source] io::Error),
}

/// Room for the regions of one call.
pub(crate) struct Scanner {
    regions: Vec<PageRegion>,
}

impl Scanner {
    pub(crate) fn new() -> Self {
        Self { regions: vec![PageRegion { start: 0, end: 0, categories: 0 }; MAX_REGIONS] }
    }

    /// Calls `each` with every range of addresses in `start..end` that was
    /// written since it was last protected, and protects it again if told to. A page
    /// without an entry in an existing page table counts as written, a range
    /// that has no page table does not. What was reported before an error was
    /// protected again all the same.
    pub(crate) fn harvest(
        &mut self,
        pagemap: &File,
        (start, end): (u64, u64),
        afterwards: Afterwards,
        mut each: impl FnMut(u64, u64),
    ) -> Result<(), ScanError> {
        let rearm = if afterwards == Afterwards::Rearm { PM_SCAN_WP_MATCHING } else { 0 };
        let mut at = start;
        while at < end {
            let mut scan = Scan {
                argument: PmScanArg {
                    size: size_of::<PmScanArg>() as u64,
                    flags: rearm | PM_SCAN_CHECK_WPASYNC,
                    start: at,
                    end,
                    walk_end: 0,
                    vec: self.regions.as_mut_ptr() as u64,
                    vec_len: self.regions.len() as u64,
                    max_pages: 0,
                    category_inverted: 0,
                    category_mask: PAGE_IS_WRITTEN,
                    category_anyof_mask: 0,
                    // Equal to the mask, and nothing else: the kernel's fast path, which
                    // alone counts an entry that reclaim emptied as written.
                    return_mask: PAGE_IS_WRITTEN,
                },
            };
            // SAFETY: `argument` is the opcode's structure; its `vec` is the address of `vec_len`
            // regions that are ours alone, that live across the call, and that hold any bits.
            let found = match unsafe { ioctl(pagemap, &mut scan) } {
                Ok(found) => found,
                Err(Errno::PERM) => return Err(ScanError::NotProtected),
                Err(errno) => return Err(ScanError::Failed(errno.into())),
            };
            let walk_end = scan.argument.walk_end;
            let regions =
                self.regions.get(..found).ok_or_else(|| malformed("more regions than asked for"))?;
            for region in regions {
                if region.start < at || region.end > end || region.start >= region.end {
                    return Err(malformed("a region outside the range"));
                }
                each(region.start, region.end);
            }
            if walk_end <= at {
                return Err(malformed("no progress"));
            }
            at = walk_end;
        }
        Ok(())
    }
}

fn malformed(what: &'static str) -> ScanError {
    ScanError::Failed(io::Error::new(io::ErrorKind::InvalidData, what))
}

struct Scan {
    argument: PmScanArg,
}

// SAFETY: the opcode is that of `PmScanArg`, to which `as_ptr` points; the call
// writes to it and returns how many regions it filled, or an error.
unsafe impl Ioctl for &mut Scan {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        PAGEMAP_SCAN
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        (&raw mut self.argument).cast()
    }

    unsafe fn output_from_ptr(
        returned: IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> rustix::io::Result<Self::Output> {
        usize::try_from(returned).map_err(|_| Errno::INVAL)
    }
}
