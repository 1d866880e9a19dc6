use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::{PageRun, PageSet, RamError, huge};

/// Page size of every RAM file that is not on hugetlbfs.
pub(crate) const BASE_PAGE_BYTES: u64 = 4096;

/// `HUGETLBFS_MAGIC` of `linux/magic.h`.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Which file a RAM file is, whatever path or descriptor leads to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// Device of the file system (`st_dev`).
    pub device: u64,
    /// Number of the inode (`st_ino`).
    pub inode: u64,
}

/// What may be done with guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it: the source.
    Read,
    /// Read and write it: the destination.
    ReadWrite,
}

/// The file that holds one block of a guest's RAM.
#[derive(Clone, Debug)]
pub struct RamFile {
    fd: Arc<OwnedFd>,
    access: Access,
    identity: FileIdentity,
    length_bytes: u64,
    page_bytes: u64,
    hugetlbfs: bool,
    /// On hugetlbfs, and where this process may: what presence is asked with. Held
    /// for as long as the file is, as a descriptor that is opened for writing and
    /// closed again looks to whoever watches the file as if it had been written to.
    writable: Option<Arc<OwnedFd>>,
}

impl RamFile {
    /// Opens the RAM file at `path`.
    ///
    /// # Errors
    /// When it cannot be opened with `access`, or is not a regular file.
    pub fn open(path: &Path, access: Access) -> Result<Self, RamError> {
        let mode = match access {
            Access::Read => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        // A FIFO in the file's place must not block the agent.
        let flags = mode | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| RamError::Open { path: path.to_owned(), source: errno.into() })?;
        Self::from_fd(fd, access)
    }

    /// Takes a RAM file that is already open.
    ///
    /// # Errors
    /// When it is not a regular file, or not open for `access`.
    pub fn from_fd(fd: OwnedFd, access: Access) -> Result<Self, RamError> {
        let mut file = Self::to_map(fd, access)?;
        if file.hugetlbfs && file.writable.is_none() {
            let path = format!("/proc/self/fd/{}", file.fd.as_raw_fd());
            file.writable =
                rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok().map(Arc::new);
        }
        Ok(file)
    }

    /// Takes a RAM file that is open already, and is another process' to look after: it is opened for no more than it is.
    ///
    /// # Errors
    /// As [`RamFile::from_fd`].
    pub fn to_map(fd: OwnedFd, access: Access) -> Result<Self, RamError> {
        let stat = rustix::fs::fstat(&fd).map_err(failed("stat"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(RamError::NotRegular);
        }
        let mode = rustix::fs::fcntl_getfl(&fd).map_err(failed("read the flags of"))? & OFlags::RWMODE;
        if access == Access::ReadWrite && mode != OFlags::RDWR {
            return Err(RamError::ReadOnly);
        }
        if mode == OFlags::WRONLY {
            return Err(RamError::File { what: "read", source: io::ErrorKind::PermissionDenied.into() });
        }
        let statfs = rustix::fs::fstatfs(&fd).map_err(failed("find the file system of"))?;
        let hugetlbfs = statfs.f_type as u64 == HUGETLBFS_MAGIC;
        let fd = Arc::new(fd);
        let writable = (hugetlbfs && mode == OFlags::RDWR).then(|| Arc::clone(&fd));
        Ok(Self {
            fd,
            access,
            identity: FileIdentity { device: stat.st_dev, inode: stat.st_ino },
            length_bytes: stat.st_size as u64,
            page_bytes: if hugetlbfs { statfs.f_bsize as u64 } else { BASE_PAGE_BYTES },
            hugetlbfs,
            writable,
        })
    }

    /// Which file this is.
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// What it was opened for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Its length when it was opened, in bytes.
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// Size of its pages in bytes: the huge page size on hugetlbfs, else 4096.
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Whether it is on hugetlbfs.
    pub fn is_hugetlbfs(&self) -> bool {
        self.hugetlbfs
    }

    /// A descriptor of its own for the same open file, to be passed on.
    ///
    /// # Errors
    /// When this process may open no more files.
    pub fn try_clone_fd(&self) -> Result<OwnedFd, RamError> {
        self.fd.try_clone().map_err(|source| RamError::File { what: "duplicate the descriptor of", source })
    }

    /// Which of its first `pages` pages were ever touched. A page outside this
    /// set reads as zeros; a page in it may. No page is touched by asking.
    ///
    /// On hugetlbfs the answer is exact where this process may use userfaultfd
    /// and write to the file; elsewhere it is all pages, unless there is none.
    ///
    /// Pages that are touched while this runs may be missing from the answer.
    ///
    /// # Errors
    /// When the kernel cannot tell.
    pub fn presence(&self, pages: u64) -> Result<PageSet, RamError> {
        if self.hugetlbfs { self.presence_of_huge_pages(pages) } else { self.presence_by_seek(pages) }
    }

    /// Its length now, in bytes.
    pub(crate) fn current_length_bytes(&self) -> Result<u64, RamError> {
        Ok(rustix::fs::fstat(&self.fd).map_err(failed("stat"))?.st_size as u64)
    }

    fn presence_by_seek(&self, pages: u64) -> Result<PageSet, RamError> {
        let mut present = PageSet::new(pages);
        let end = pages.saturating_mul(self.page_bytes);
        let mut offset = 0;
        while offset < end {
            let data = match rustix::fs::seek(&self.fd, SeekFrom::Data(offset)) {
                Ok(data) => data,
                Err(Errno::NXIO) => break,
                Err(errno) => return Err(failed("look for data in")(errno)),
            };
            if data >= end {
                break;
            }
            let hole = match rustix::fs::seek(&self.fd, SeekFrom::Hole(data)) {
                Ok(hole) if hole > data => hole.min(end),
                // Punched meanwhile: the page was there when it was found.
                Ok(_) | Err(Errno::NXIO) => data + 1,
                Err(errno) => return Err(failed("look for holes in")(errno)),
            };
            let first = data / self.page_bytes;
            let count = hole.div_ceil(self.page_bytes) - first;
            present.insert_run(PageRun { first, count });
            offset = (first + count) * self.page_bytes;
        }
        Ok(present)
    }

    fn presence_of_huge_pages(&self, pages: u64) -> Result<PageSet, RamError> {
        let stat = rustix::fs::fstat(&self.fd).map_err(failed("stat"))?;
        let allocated_bytes = (stat.st_blocks as u64).saturating_mul(512);
        if allocated_bytes == 0 {
            return Ok(PageSet::new(pages));
        }
        if allocated_bytes >= stat.st_size as u64 {
            return Ok(PageSet::full(pages));
        }
        let asked = self.writable.as_ref().map(|file| huge::presence(file.as_fd(), pages, self.page_bytes));
        Ok(asked.and_then(Result::ok).unwrap_or_else(|| PageSet::full(pages)))
    }
}

impl AsFd for RamFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn failed(what: &'static str) -> impl Fn(Errno) -> RamError {
    move |errno| RamError::File { what, source: errno.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{memory_file, runs};

    fn write(file: &RamFile, offset: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(file, bytes, offset).unwrap(), bytes.len());
    }

    #[test]
    fn presence_is_what_was_touched() {
        let file = memory_file(300);
        assert!(file.presence(300).unwrap().is_empty());
        write(&file, 0, &[1]);
        write(&file, 70 * 4096 - 1, &[0, 0]);
        write(&file, 299 * 4096, &[1]);
        assert_eq!(runs(&file.presence(300).unwrap()), [(0, 1), (69, 2), (299, 1)]);
        assert_eq!(runs(&file.presence(70).unwrap()), [(0, 1), (69, 1)]);
        write(&file, 0, &vec![1; 300 * 4096]);
        assert_eq!(file.presence(300).unwrap(), PageSet::full(300));
    }

    #[test]
    fn presence_on_a_disk_file_system_covers_what_was_written() {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(1 << 20).unwrap();
        let file = RamFile::open(path.path(), Access::ReadWrite).unwrap();
        write(&file, 100 * 4096 + 5, &[1]);
        assert!(file.presence(256).unwrap().contains(100));
    }

    #[test]
    fn a_file_is_known_by_its_inode() {
        let (a, b) = (memory_file(1), memory_file(1));
        assert_ne!(a.identity(), b.identity());
        let copy = RamFile::from_fd(a.try_clone_fd().unwrap(), Access::Read).unwrap();
        assert_eq!(copy.identity(), a.identity());
        assert_eq!((a.length_bytes(), a.page_bytes(), a.is_hugetlbfs()), (4096, 4096, false));
    }

    #[test]
    fn what_is_no_ram_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let missing = RamFile::open(&directory.path().join("missing"), Access::Read);
        assert!(matches!(missing, Err(RamError::Open { .. })));
        assert!(matches!(RamFile::open(directory.path(), Access::Read), Err(RamError::NotRegular)));
        let path = directory.path().join("ram");
        std::fs::write(&path, [0; 4096]).unwrap();
        let read_only = RamFile::open(&path, Access::Read).unwrap().try_clone_fd().unwrap();
        assert!(matches!(RamFile::from_fd(read_only, Access::ReadWrite), Err(RamError::ReadOnly)));
    }
}
