//! The memory that is measured with: one block, as a guest's RAM, of anonymous
//! files that are gone with the process.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use ramferry_ram::{Access, Block, BlockIndex, BlockRange, Layout, Memory, RamFile};
use rustix::fs::MemfdFlags;

use super::{BenchError, Bounds};

pub(crate) const BASE_PAGE_BYTES: u64 = 4096;
pub(crate) const HUGE_PAGE_BYTES: u64 = 2 << 20;
const FREE_HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
/// Written at once, between two looks at the bounds.
const PIECE_BYTES: u64 = 1 << 20;

/// How much memory each of `shares` equal ones may take: what was given, else
/// `default_bytes`, or less where half of what is free is less.
pub(crate) fn allowance(given: Option<u64>, default_bytes: u64, shares: u64) -> Result<u64, BenchError> {
    let available = available_bytes()?;
    let Some(given) = given else {
        let most = (available / 2 / shares) & !(HUGE_PAGE_BYTES - 1);
        return Ok(default_bytes.min(most.max(HUGE_PAGE_BYTES)));
    };
    let bytes = given.checked_next_multiple_of(BASE_PAGE_BYTES).unwrap_or(u64::MAX);
    let needed = bytes.saturating_mul(shares);
    if needed > available { Err(BenchError::Memory { needed, available }) } else { Ok(bytes) }
}

/// Bytes in huge pages of 2 MiB that nobody uses.
pub(crate) fn free_huge_bytes() -> u64 {
    let pages = fs::read_to_string(FREE_HUGE_PAGES).ok().and_then(|text| text.trim().parse::<u64>().ok());
    pages.unwrap_or(0).saturating_mul(HUGE_PAGE_BYTES)
}

/// A file of `bytes` that were never touched, in pages of `page_bytes`.
pub(crate) fn file(bytes: u64, page_bytes: u64) -> Result<RamFile, BenchError> {
    let flags = match page_bytes {
        HUGE_PAGE_BYTES => MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        _ => MemfdFlags::CLOEXEC,
    };
    let made = rustix::fs::memfd_create("ramferry-bench", flags).and_then(|file: OwnedFd| {
        rustix::fs::ftruncate(&file, bytes)?;
        Ok(file)
    });
    let file = made.map_err(|errno| BenchError::system("make memory to measure with")(errno.into()))?;
    Ok(RamFile::from_fd(file, Access::ReadWrite)?)
}

/// A mapping of its own of the first `bytes` of `file`.
pub(crate) fn map(file: &RamFile, bytes: u64, access: Access) -> Result<Arc<Memory>, BenchError> {
    let page_bytes = file.page_bytes();
    let block = Block { name: "ram".into(), guest_address: 0, length_bytes: bytes, page_bytes };
    let layout =
        Layout::new(vec![block]).map_err(|_| BenchError::Share { links: 1, size: 1, memory: bytes })?;
    Ok(Arc::new(Memory::new(layout, vec![file.clone()], access)?))
}

/// Memory of `bytes`, every byte of it written.
pub(crate) fn touched(bytes: u64, bounds: &Bounds) -> Result<Arc<Memory>, BenchError> {
    let memory = map(&file(bytes, BASE_PAGE_BYTES)?, bytes, Access::ReadWrite)?;
    touch(&memory, bounds)?;
    Ok(memory)
}

/// Writes every byte of `memory`.
pub(crate) fn touch(memory: &Memory, bounds: &Bounds) -> Result<(), BenchError> {
    // No page is like the next, or zero.
    let piece: Vec<u8> = (0..PIECE_BYTES).map(|at| (at ^ (at >> 8)) as u8 | 1).collect();
    let bytes = memory.layout().total_bytes();
    for offset in (0..bytes).step_by(PIECE_BYTES as usize) {
        bounds.check()?;
        let length = PIECE_BYTES.min(bytes - offset);
        memory.span(range(offset, length))?.write_from(&piece[..length as usize]);
    }
    Ok(memory.check()?)
}

/// A range of the one block.
pub(crate) fn range(offset: u64, length: u64) -> BlockRange {
    BlockRange { block: BlockIndex(0), offset, length }
}

/// What the kernel would give without swapping.
fn available_bytes() -> Result<u64, BenchError> {
    let failed = BenchError::system("read /proc/meminfo");
    let text = fs::read_to_string(Path::new("/proc/meminfo")).map_err(&failed)?;
    available_of(&text).ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))
}

fn available_of(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use super::*;

    #[test]
    fn available_memory_is_read_as_the_kernel_writes_it() {
        assert_eq!(available_of("MemTotal:  9 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(available_of("MemTotal:  9 kB\n"), None);
        assert_eq!(available_of("MemAvailable: 2048 MB\n"), None);
    }

    #[test]
    fn more_memory_than_is_free_is_refused_and_a_default_made_to_fit() {
        let error = allowance(Some(1 << 50), 0, 2).expect_err("a pebibyte");
        assert!(error.to_string().contains("give less --memory"), "{error}");
        assert!(allowance(None, 1 << 50, 2).is_ok_and(|bytes| bytes < 1 << 50));
        assert_eq!(allowance(Some(5000), 0, 1).ok(), Some(8192));
    }

    #[test]
    fn touched_memory_has_no_hole_and_no_zero_page() {
        let bounds = Bounds::new(Arc::new(AtomicBool::new(false)), Duration::from_secs(60));
        let memory = touched(3 << 20, &bounds).expect("memory");
        assert_eq!(memory.presence().expect("it is tmpfs").count(), 768);
        assert!((0..768).all(|page| !memory.span(range(page * 4096, 4096)).expect("it is there").is_zero()));
    }
}
