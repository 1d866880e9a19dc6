//! Files to track, and what a migration would have of them.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use ramferry_ram::{Block, BlockIndex, FileIdentity, Layout, PageSets};
use ramferry_tracking::TrackedFile;

pub(crate) const PAGE: u64 = 4096;

/// A RAM file, opened by others through our descriptor.
pub(crate) struct RamFile {
    pub(crate) file: File,
    pub(crate) pages: u64,
    pub(crate) page_bytes: u64,
}

impl RamFile {
    /// A file on tmpfs.
    pub(crate) fn new(pages: u64) -> Self {
        Self::of(tempfile::tempfile_in("/dev/shm").unwrap(), pages, PAGE)
    }

    /// `file`, made that long.
    pub(crate) fn of(file: File, pages: u64, page_bytes: u64) -> Self {
        file.set_len(pages * page_bytes).unwrap();
        // For reading only: who has it open for writing could write to it.
        let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        drop(file);
        Self { file: read_only, pages, page_bytes }
    }

    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    pub(crate) fn tracked(&self) -> TrackedFile {
        let stat = rustix::fs::fstat(&self.file).unwrap();
        let identity = FileIdentity { device: stat.st_dev, inode: stat.st_ino };
        TrackedFile { identity, pages: self.pages, page_bytes: self.page_bytes }
    }

    /// The first bytes of a page, where helpers leave their stamps.
    pub(crate) fn stamp(&self, page: u64) -> [u8; 64] {
        let mut stamp = [0; 64];
        self.file.read_exact_at(&mut stamp, page * self.page_bytes).unwrap();
        stamp
    }
}

/// Empty sets for `files`, one block each.
pub(crate) fn sets(files: &[&RamFile]) -> PageSets {
    let mut blocks = Vec::new();
    let mut guest_address = 0;
    for (index, file) in files.iter().enumerate() {
        let length_bytes = file.pages * file.page_bytes;
        blocks.push(Block {
            name: format!("ram{index}"),
            guest_address,
            length_bytes,
            page_bytes: file.page_bytes,
        });
        guest_address += length_bytes;
    }
    PageSets::new(&Layout::new(blocks).unwrap())
}

/// Members of the set of the `index`th file.
pub(crate) fn members(sets: &PageSets, index: u32) -> Vec<u64> {
    sets.block(BlockIndex(index)).runs().flat_map(|run| run.first..run.end()).collect()
}

/// What the destination of a migration would have: the pages that were
/// reported, as they were read after each report.
pub(crate) struct Replica {
    stamps: Vec<[u8; 64]>,
}

impl Replica {
    pub(crate) fn new(file: &RamFile) -> Self {
        Self { stamps: (0..file.pages).map(|page| file.stamp(page)).collect() }
    }

    pub(crate) fn copy(&mut self, file: &RamFile, pages: &[u64]) {
        for page in pages {
            self.stamps[*page as usize] = file.stamp(*page);
        }
    }

    /// Pages that differ from `file`, which nobody may be writing to.
    pub(crate) fn lost(&self, file: &RamFile) -> Vec<u64> {
        (0..file.pages).filter(|page| self.stamps[*page as usize] != file.stamp(*page)).collect()
    }
}

/// Small pseudo-random numbers: the same in each run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}
