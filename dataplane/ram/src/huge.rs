//! Which pages of a hugetlbfs file exist, without making one.
//!
//! hugetlbfs tells no holes by `SEEK_HOLE`, and reading a hole through a mapping
//! allocates a huge page or raises SIGBUS. But `UFFDIO_CONTINUE` maps a page only
//! if the file has it already, and says `EFAULT` where it has none. That is asked
//! here of a mapping made for the purpose, one call for each run of pages that
//! exist and one for each page that does not.
#![allow(unsafe_code, reason = "userfaultfd ioctls on a mapping of its own")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags};

use crate::{PageRun, PageSet};

/// Of `linux/userfaultfd.h`: lets an unprivileged process have a userfaultfd.
const UFFD_USER_MODE_ONLY: u32 = 1;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioContinue {
    start: u64,
    length: u64,
    mode: u64,
    mapped: i64,
}

const UFFDIO_API: libc::Ioctl = request(0x3f, size_of::<UffdioApi>());
const UFFDIO_REGISTER: libc::Ioctl = request(0x00, size_of::<UffdioRegister>());
const UFFDIO_CONTINUE: libc::Ioctl = request(0x07, size_of::<UffdioContinue>());

const _: () = assert!(UFFDIO_API == 0xc018_aa3f);
const _: () = assert!(UFFDIO_REGISTER == 0xc020_aa00);
const _: () = assert!(UFFDIO_CONTINUE == 0xc020_aa07);

/// `_IOWR(UFFDIO, number, size)` of `asm-generic/ioctl.h`.
const fn request(number: u8, size: usize) -> libc::Ioctl {
    (3 << 30 | (size as u64) << 16 | 0xaa << 8 | number as u64) as libc::Ioctl
}

/// Which of the first `pages` pages of `file` exist. It has to be open for writing,
/// though nothing is written.
///
/// # Errors
/// When this process may not use userfaultfd, or the kernel is older than 5.13.
pub(crate) fn presence(file: BorrowedFd<'_>, pages: u64, page_bytes: u64) -> io::Result<PageSet> {
    let probe = Probe::new(file, pages * page_bytes)?;
    let mut present = PageSet::new(pages);
    let mut page = 0;
    while page < pages {
        let found = probe.existing_bytes(page * page_bytes)?.div_ceil(page_bytes);
        if found > 0 {
            present.insert_run(PageRun { first: page, count: found });
        }
        // What stopped the run is a page that does not exist.
        page += found + 1;
    }
    Ok(present)
}

/// A read-only mapping of the file, under a userfaultfd.
struct Probe {
    userfaultfd: OwnedFd,
    start: *mut libc::c_void,
    length: usize,
}

impl Probe {
    fn new(file: BorrowedFd<'_>, length_bytes: u64) -> io::Result<Self> {
        let user_mode_only = UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | user_mode_only;
        // SAFETY: the descriptor is used for one mapping only, whose pages nobody reads.
        let userfaultfd = unsafe { rustix::mm::userfaultfd(flags) }?;
        let mut api = UffdioApi { api: UFFD_API, features: UFFD_FEATURE_MINOR_HUGETLBFS, ioctls: 0 };
        // SAFETY: UFFDIO_API takes a `UffdioApi`.
        unsafe { ioctl(&userfaultfd, UFFDIO_API, &mut api) }?;
        let length = usize::try_from(length_bytes).map_err(|_| Errno::OVERFLOW)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, ProtFlags::READ, flags, file, 0) }?;
        let probe = Self { userfaultfd, start, length };
        let mode = UFFDIO_REGISTER_MODE_MINOR;
        let mut range = UffdioRegister { start: start as u64, length: length_bytes, mode, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER takes a `UffdioRegister`; the range is the probe's own mapping.
        unsafe { ioctl(&probe.userfaultfd, UFFDIO_REGISTER, &mut range) }?;
        Ok(probe)
    }

    /// Bytes from `offset` on, up to the first page that does not exist.
    fn existing_bytes(&self, offset: u64) -> io::Result<u64> {
        let start = self.start as u64 + offset;
        let mut range = UffdioContinue { start, length: self.length as u64 - offset, mode: 0, mapped: 0 };
        // SAFETY: UFFDIO_CONTINUE takes a `UffdioContinue`; the range is within the probe's own
        // mapping, in which pages of the file may appear at any time.
        match unsafe { ioctl(&self.userfaultfd, UFFDIO_CONTINUE, &mut range) } {
            Ok(()) => Ok(range.length),
            Err(Errno::FAULT) => Ok(0),
            Err(Errno::AGAIN) if range.mapped > 0 => Ok(range.mapped as u64),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and no pointer into it was given away.
        let _ = unsafe { rustix::mm::munmap(self.start, self.length) };
    }
}

/// # Safety
/// `request` must take a `T`, and what it asks for must be sound.
unsafe fn ioctl<T>(fd: &OwnedFd, request: libc::Ioctl, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: `fd` is open, `argument` a valid `T`; the caller answers for the rest.
    if unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) } == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::fd::AsFd as _;

    use super::*;
    use crate::{Access, Mapping, RamFile};

    pub(crate) const PAGE: u64 = 2 << 20;

    /// Huge pages of 2 MiB that are neither used nor reserved.
    pub(crate) fn free_pages() -> u64 {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
        let value = |name| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
            line.map_or(0, |line| line.split_whitespace().next().unwrap().parse::<u64>().unwrap())
        };
        if value("Hugepagesize:") != PAGE / 1024 {
            return 0;
        }
        value("HugePages_Free:").saturating_sub(value("HugePages_Rsvd:"))
    }

    /// A hugetlbfs file of `pages` pages, if as many huge pages are free.
    pub(crate) fn huge_file(pages: u64) -> Option<RamFile> {
        if free_pages() < pages {
            eprintln!("SKIPPED: needs {pages} free huge pages of 2 MiB (vm.nr_hugepages)");
            return None;
        }
        let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
        let fd = rustix::fs::memfd_create("ramferry-test", flags | rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, pages * PAGE).unwrap();
        Some(RamFile::from_fd(fd, Access::ReadWrite).unwrap())
    }

    #[test]
    fn presence_of_huge_pages_is_exact_and_allocates_none() {
        let Some(file) = huge_file(8) else { return };
        assert!(file.is_hugetlbfs());
        assert_eq!(file.page_bytes(), PAGE);
        assert!(file.presence(8).unwrap().is_empty());
        let mapping = Mapping::new(&file, 8 * PAGE, Access::ReadWrite).unwrap();
        for page in [1, 2, 5] {
            mapping.span(page * PAGE + 77, 1).unwrap().write_from(&[1]);
        }
        let blocks_before = rustix::fs::fstat(&file).unwrap().st_blocks;
        assert_eq!(blocks_before * 512, 3 * PAGE as i64);
        let present = match presence(file.as_fd(), 8, PAGE) {
            Ok(present) => present,
            Err(error) => return eprintln!("SKIPPED: userfaultfd for huge pages: {error}"),
        };
        let runs: Vec<_> = present.runs().map(|run| (run.first, run.count)).collect();
        assert_eq!(runs, [(1, 2), (5, 1)]);
        assert_eq!(file.presence(8).unwrap(), present);
        assert_eq!(rustix::fs::fstat(&file).unwrap().st_blocks, blocks_before);
        mapping.populate(0, 8 * PAGE, Access::ReadWrite).unwrap();
        assert_eq!(file.presence(8).unwrap(), PageSet::full(8));
        assert_eq!(presence(file.as_fd(), 8, PAGE).unwrap(), PageSet::full(8));
    }

    #[test]
    fn presence_of_huge_pages_needs_a_readable_file_only() {
        let Some(file) = huge_file(3) else { return };
        let writable = Mapping::new(&file, 3 * PAGE, Access::ReadWrite).unwrap();
        writable.span(PAGE, 1).unwrap().write_from(&[1]);
        let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        let read_only = RamFile::open(path.as_ref(), Access::Read).unwrap();
        let watch = rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::NONBLOCK).unwrap();
        let closes = rustix::fs::inotify::WatchFlags::CLOSE_WRITE;
        rustix::fs::inotify::add_watch(&watch, path.as_str(), closes).unwrap();
        let runs: Vec<_> = read_only.presence(3).unwrap().runs().collect();
        assert_eq!(runs, [PageRun { first: 1, count: 1 }]);
        let seen = rustix::io::read(&watch, &mut [0; 256]);
        assert_eq!(seen, Err(Errno::AGAIN), "nobody is to take it for a writer");
    }
}
