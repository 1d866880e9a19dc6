//! What a process has mapped, as `/proc/PID/maps` tells it.
//!
//! A VMA is known by device and inode, never by its path: a RAM file may have
//! been unlinked, renamed, or live in another mount namespace.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use ramferry_ram::{Access, FileIdentity};
use rustix::fs::{Mode, OFlags};
use thiserror::Error;

/// Longest `/proc/PID/maps` that is read: some 600,000 mappings.
const MAPS_LIMIT_BYTES: u64 = 64 << 20;

/// One mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Offset of `start` in the mapped file, in bytes.
    pub offset: u64,
    /// Whether the process may write through it now.
    pub writable: bool,
    /// Whether it may execute from it.
    pub executable: bool,
    /// Whether it was mapped with `MAP_SHARED`: what is written reaches the file.
    pub shared: bool,
    /// The mapped file; `None` for memory that is not a file's.
    pub identity: Option<FileIdentity>,
    /// The file's path as its process sees it, without the kernel's
    /// ` (deleted)`, or a name such as `[vdso]`; empty where there is none.
    pub path: PathBuf,
    /// Whether the file has no name any more.
    pub deleted: bool,
}

impl Vma {
    /// Length in bytes.
    pub fn length_bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// Why the mappings of a process cannot be told.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MapsError {
    /// There is no such process.
    #[error("process {pid} does not exist")]
    NoProcess {
        /// The process.
        pid: u32,
    },
    /// The kernel does not show us this process.
    #[error(
        "may not read the mappings of process {pid}: run the agent as the user of that process, or with CAP_SYS_PTRACE"
    )]
    Denied {
        /// The process.
        pid: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Reading failed in another way.
    #[error("cannot read the mappings of process {pid}")]
    Read {
        /// The process.
        pid: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There are more mappings than we are ready to read.
    #[error("the list of mappings of process {pid} is longer than {MAPS_LIMIT_BYTES} bytes")]
    TooLong {
        /// The process.
        pid: u32,
    },
    /// A line is not as `proc_pid_maps(5)` has it.
    #[error("a line of the mappings of process {pid} is not understood: {line:?}")]
    Malformed {
        /// The process.
        pid: u32,
        /// The line.
        line: String,
    },
    /// The mapped file cannot be opened.
    #[error(
        "cannot open {path} as process {pid} has it mapped at {start:#x}: this needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE"
    )]
    OpenMapped {
        /// The process.
        pid: u32,
        /// Where it is mapped.
        start: u64,
        /// The file's path as its process sees it.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The mapping is not of a file, or changed before its file was opened.
    #[error("process {pid} has no longer, or never had, a file mapped at {start:#x}")]
    NotMapped {
        /// The process.
        pid: u32,
        /// Where it was looked for.
        start: u64,
    },
}

/// The mappings of process `pid`, in ascending order; none for a kernel thread
/// and for a process that has ended but was not reaped.
///
/// # Errors
/// When there is no such process, it may not be looked at, or what the kernel
/// says is not understood.
pub fn vmas_of(pid: u32) -> Result<Vec<Vma>, MapsError> {
    let file = File::open(format!("/proc/{pid}/maps")).map_err(|source| read_error(pid, source))?;
    read_vmas(pid, &file)
}

/// Opens the file that `vma` maps through `/proc/PID/map_files`, which works
/// for a file that was unlinked or lies in another mount namespace.
///
/// # Errors
/// When `vma` maps no file or is gone, or the file may not be opened so.
pub fn open_mapped_file(pid: u32, vma: &Vma, access: Access) -> Result<OwnedFd, MapsError> {
    let gone = || MapsError::NotMapped { pid, start: vma.start };
    let identity = vma.identity.ok_or_else(gone)?;
    let mode = match access {
        Access::Read => OFlags::RDONLY,
        Access::ReadWrite => OFlags::RDWR,
    };
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
    // A device file in the mapping's place must not block us.
    let flags = mode | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => gone(),
        _ => MapsError::OpenMapped { pid, start: vma.start, path: vma.path.clone(), source },
    };
    let fd = rustix::fs::open(link, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    let stat = rustix::fs::fstat(&fd).map_err(|errno| failed(errno.into()))?;
    if (FileIdentity { device: stat.st_dev, inode: stat.st_ino }) != identity {
        return Err(gone());
    }
    Ok(fd)
}

/// Reads what `/proc/PID/maps` might say.
///
/// # Errors
/// The line that is not understood.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub fn parse_text(text: &[u8]) -> Result<Vec<Vma>, String> {
    parse(text)
}

/// Reads a `/proc/PID/maps` that is open at its start.
pub(crate) fn read_vmas(pid: u32, mut maps: &File) -> Result<Vec<Vma>, MapsError> {
    let mut text = Vec::new();
    let length = (&mut maps)
        .take(MAPS_LIMIT_BYTES)
        .read_to_end(&mut text)
        .map_err(|source| read_error(pid, source))?;
    if length as u64 == MAPS_LIMIT_BYTES {
        return Err(MapsError::TooLong { pid });
    }
    parse(&text).map_err(|line| MapsError::Malformed { pid, line })
}

fn read_error(pid: u32, source: io::Error) -> MapsError {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => MapsError::NoProcess { pid },
        Some(libc::EACCES | libc::EPERM) => MapsError::Denied { pid, source },
        _ => MapsError::Read { pid, source },
    }
}

fn parse(text: &[u8]) -> Result<Vec<Vma>, String> {
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| parse_line(line).ok_or_else(|| String::from_utf8_lossy(line).into_owned()))
        .collect()
}

/// `start-end perms offset major:minor inode   path`
fn parse_line(line: &[u8]) -> Option<Vma> {
    let mut rest = line;
    let mut field = || {
        let end = rest.iter().position(|byte| *byte == b' ').unwrap_or(rest.len());
        let (field, tail) = rest.split_at(end);
        rest = tail.get(1..).unwrap_or_default();
        std::str::from_utf8(field).ok()
    };
    let (start, end) = field()?.split_once('-')?;
    let permissions = field()?.as_bytes();
    let offset = hexadecimal(field()?)?;
    let (major, minor) = field()?.split_once(':')?;
    let inode = field()?.parse::<u64>().ok()?;
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    let device = rustix::fs::makedev(
        u32::try_from(hexadecimal(major)?).ok()?,
        u32::try_from(hexadecimal(minor)?).ok()?,
    );
    let &[_, write, execute, share] = permissions else { return None };
    let padding = rest.iter().take_while(|byte| **byte == b' ').count();
    let (path, deleted) = parse_path(&rest[padding..]);
    if start >= end || offset.checked_add(end - start).is_none() {
        return None;
    }
    Some(Vma {
        start,
        end,
        offset,
        writable: write == b'w',
        executable: execute == b'x',
        shared: share == b's',
        identity: (inode != 0).then_some(FileIdentity { device, inode }),
        path,
        deleted,
    })
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// The kernel writes a newline in a path as `\012`, and nothing else so.
fn parse_path(text: &[u8]) -> (PathBuf, bool) {
    const DELETED: &[u8] = b" (deleted)";
    const NEWLINE: &[u8] = b"\\012";
    let (mut text, deleted) = match text.strip_suffix(DELETED) {
        Some(name) if name.starts_with(b"/") => (name, true),
        _ => (text, false),
    };
    let mut path = Vec::with_capacity(text.len());
    while let Some((first, rest)) = text.split_first() {
        if let Some(rest) = text.strip_prefix(NEWLINE) {
            path.push(b'\n');
            text = rest;
        } else {
            path.push(*first);
            text = rest;
        }
    }
    (PathBuf::from(OsString::from_vec(path)), deleted)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::path::Path;

    use proptest::prelude::*;
    use rustix::fs::MemfdFlags;
    use rustix::mm::{MapFlags, ProtFlags};

    use super::*;

    const REAL: &[u8] = b"\
5581f0a00000-5581f0a20000 r--p 00000000 fd:01 131 /usr/bin/qemu-system-x86_64\n\
7f0000000000-7f0040000000 rw-s 80000000 00:1a 42                         /dev/shm/a b (deleted)\n\
7f0040000000-7f0040001000 r--s 00000000 103:10005 18446744073709551615   /x\\012y\n\
7ffd00000000-7ffd00002000 r-xp 00000000 00:00 0                          [vdso]\n\
7ffd10000000-7ffd10001000 ---p 00000000 00:00 0 \n\
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";

    #[test]
    fn lines_of_every_kind_are_understood() {
        let vmas = parse(REAL).unwrap();
        assert_eq!(vmas.len(), 6);
        let ram = &vmas[1];
        assert_eq!((ram.start, ram.end, ram.offset), (0x7f00_0000_0000, 0x7f00_4000_0000, 0x8000_0000));
        assert!(ram.writable && ram.shared && ram.deleted && !ram.executable);
        assert_eq!(ram.path, Path::new("/dev/shm/a b"));
        assert_eq!(ram.identity, Some(FileIdentity { device: 0x1a, inode: 42 }));
        assert_eq!(ram.length_bytes(), 1 << 30);
        let big = vmas[2].identity.unwrap();
        assert_eq!((big.device, big.inode), (rustix::fs::makedev(0x103, 0x10005), u64::MAX));
        assert_eq!(vmas[2].path, Path::new("/x\ny"));
        assert!(!vmas[2].writable);
        assert_eq!(vmas[3].path, Path::new("[vdso]"));
        assert!(vmas[3].executable && vmas[3].identity.is_none());
        assert_eq!(vmas[4].path, Path::new(""));
    }

    #[test]
    fn garbage_is_named_and_refused() {
        for bad in ["nonsense", "1-2 rw-s 0 00:00", "2-1 rw-s 0 00:00 0", "1-2 rw 0 0:0 0", "1-2 rw-s 0 00 0"]
        {
            assert_eq!(parse(bad.as_bytes()), Err(bad.to_owned()));
        }
        assert_eq!(parse(b"0-2 rw-s ffffffffffffffff 0:0 0").map(|_| ()).unwrap_err().len(), 31);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused_without_panic(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }

        #[test]
        fn a_damaged_line_is_parsed_or_refused_without_panic(at in 0..REAL.len(), byte in any::<u8>()) {
            let mut text = REAL.to_vec();
            text[at] = byte;
            let _ = parse(&text);
        }
    }

    #[test]
    fn our_own_mapping_of_an_unlinked_file_is_found_and_opened() {
        let memfd = rustix::fs::memfd_create("maps-test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, 3 * 4096).unwrap();
        let stat = rustix::fs::fstat(&memfd).unwrap();
        let identity = FileIdentity { device: stat.st_dev, inode: stat.st_ino };
        let mapping = TestMapping::new(memfd.as_fd());
        let ours = std::process::id();
        let vma = vmas_of(ours).unwrap().into_iter().find(|vma| vma.identity == Some(identity)).unwrap();
        assert!(vma.writable && vma.shared && vma.deleted);
        assert_eq!((vma.start, vma.length_bytes(), vma.offset), (mapping.0 as u64, 8192, 4096));
        match open_mapped_file(ours, &vma, Access::ReadWrite) {
            Ok(fd) => assert_eq!(rustix::fs::fstat(&fd).unwrap().st_ino, stat.st_ino),
            Err(error @ MapsError::OpenMapped { .. }) => eprintln!("SKIPPED: {error}"),
            Err(error) => panic!("{error}"),
        }
        let elsewhere = Vma { start: vma.start + 4096, ..vma };
        assert!(open_mapped_file(ours, &elsewhere, Access::Read).is_err());
    }

    #[test]
    fn a_process_that_does_not_exist_is_named() {
        assert!(matches!(vmas_of(u32::MAX >> 1), Err(MapsError::NoProcess { .. })));
    }

    #[test]
    fn a_process_that_ended_has_no_mappings() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        let status = format!("/proc/{pid}/stat");
        while !std::fs::read_to_string(&status).unwrap().contains(") Z") {
            std::thread::yield_now();
        }
        assert_eq!(vmas_of(pid).unwrap(), []);
        child.wait().unwrap();
    }

    struct TestMapping(*mut std::ffi::c_void);

    impl TestMapping {
        #[allow(unsafe_code, reason = "tests map memory of their own")]
        fn new(fd: std::os::fd::BorrowedFd<'_>) -> Self {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a fresh mapping at an address of the kernel's choice; nothing refers to it.
            let at = unsafe {
                rustix::mm::mmap(std::ptr::null_mut(), 8192, protection, MapFlags::SHARED, fd, 4096)
            };
            Self(at.unwrap())
        }
    }

    impl Drop for TestMapping {
        #[allow(unsafe_code, reason = "tests map memory of their own")]
        fn drop(&mut self) {
            // SAFETY: `new` mapped exactly this range, and nothing refers to it.
            unsafe { rustix::mm::munmap(self.0, 8192) }.unwrap();
        }
    }
}
