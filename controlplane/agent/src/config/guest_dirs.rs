//! Which sockets and RAM files of guests this agent may touch.
//!
//! What is checked is what was opened, never a name that may lead elsewhere a
//! moment later: a socket is opened (`O_PATH`), checked, and connected to
//! through that descriptor; a RAM file is the descriptor that the VMM's own
//! mapping gave. Where a descriptor's file is, the kernel tells.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use ramferry_guest::QmpSocket;
use ramferry_ram::RamFile;
use rustix::fs::{AtFlags, MemfdFlags, Mode, OFlags, Stat, StatxFlags};
use rustix::io::Errno;
use thiserror::Error;

/// What the kernel adds to the name of a file that has none any more.
const DELETED: &[u8] = b" (deleted)";

/// The directories that hold guests' QMP sockets and RAM files. Empty: any place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestDirs(Vec<PathBuf>);

impl GuestDirs {
    /// Allows what is below `dirs`; any place when there are none.
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self(dirs)
    }

    /// Whether any place is allowed.
    pub fn is_any(&self) -> bool {
        self.0.is_empty()
    }

    /// The socket at `path`, when it is below one of the directories once
    /// symbolic links are resolved.
    pub fn open_socket(&self, path: &Path) -> Result<QmpSocket, GuestPathError> {
        if !path.is_absolute() {
            return Err(GuestPathError::Relative { path: path.to_owned() });
        }
        // Where the path leads is told only for allowed places: the answer for
        // any other is the same whether or not something is there.
        let outside = || GuestPathError::Outside { path: path.to_owned(), dirs: self.clone() };
        let opened = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .and_then(|socket| Ok((place_of(socket.as_fd())?, socket)));
        match opened {
            Ok((real, socket)) if self.is_any() || self.holds(&real) => Ok(QmpSocket::pinned(real, socket)),
            Err(errno) if self.is_any() || self.lexically_below(path) => {
                Err(GuestPathError::Unreachable { path: path.to_owned(), source: errno.into() })
            }
            _ => Err(outside()),
        }
    }

    /// Whether RAM file `file` of `block` is below one of the directories.
    ///
    /// A file that was unlinked is where it was. A memfd is nowhere: nobody has
    /// it to whom it was not given, so that its VMM may have it.
    pub fn check_ram(&self, block: &str, file: &RamFile) -> Result<(), GuestPathError> {
        if self.is_any() {
            return Ok(());
        }
        let file = file.as_fd();
        let unseen = |errno: Errno| GuestPathError::RamUnseen {
            block: block.to_owned(),
            path: PathBuf::new(),
            source: errno.into(),
        };
        let stat = rustix::fs::fstat(file).map_err(unseen)?;
        let shown = place_of(file).map_err(unseen)?;
        if stat.st_nlink == 0 && is_memfd(file, &shown, &stat) {
            return Ok(());
        }
        let path = if stat.st_nlink == 0 { without_deleted(&shown) } else { shown };
        let hidden =
            |source| GuestPathError::RamUnseen { block: block.to_owned(), path: path.clone(), source };
        let is_there = if stat.st_nlink == 0 { was_there(file, &path) } else { is_there(&stat, &path) };
        match is_there {
            _ if !self.holds(&path) => {
                Err(GuestPathError::RamOutside { block: block.to_owned(), path, dirs: self.clone() })
            }
            Ok(true) => Ok(()),
            Ok(false) => Err(hidden(io::Error::other("another file has this name here"))),
            Err(errno) => Err(hidden(errno.into())),
        }
    }

    /// Whether `real`, which holds no symbolic link, is below a directory.
    fn holds(&self, real: &Path) -> bool {
        self.0.iter().any(|dir| std::fs::canonicalize(dir).is_ok_and(|dir| real.starts_with(dir)))
    }

    fn lexically_below(&self, path: &Path) -> bool {
        let climbs = path.components().any(|part| part == std::path::Component::ParentDir);
        !climbs && self.0.iter().any(|dir| path.starts_with(dir))
    }
}

impl fmt::Display for GuestDirs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, dir) in self.0.iter().enumerate() {
            let separator = if index > 0 { ", " } else { "" };
            write!(f, "{separator}{}", dir.display())?;
        }
        Ok(())
    }
}

/// Where the file of a descriptor is, as the kernel knows it: no symbolic link is in it.
fn place_of(descriptor: BorrowedFd<'_>) -> Result<PathBuf, Errno> {
    let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    let place = rustix::fs::readlink(link, Vec::new())?;
    Ok(OsStr::from_bytes(place.as_bytes()).into())
}

fn without_deleted(path: &Path) -> PathBuf {
    let bytes = path.as_os_str().as_bytes();
    OsStr::from_bytes(bytes.strip_suffix(DELETED).unwrap_or(bytes)).into()
}

/// Whether `path`, seen from here, is the file. A VMM's mounts may be others than ours.
fn is_there(stat: &Stat, path: &Path) -> Result<bool, Errno> {
    let found = rustix::fs::lstat(path)?;
    Ok((found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino))
}

/// Whether a file that was unlinked had its name `path` in a directory that is
/// seen from here: then both are of one mount.
fn was_there(file: BorrowedFd<'_>, path: &Path) -> Result<bool, Errno> {
    let mount_of = |descriptor: BorrowedFd<'_>| {
        let statx = rustix::fs::statx(descriptor, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
        let told = StatxFlags::from_bits_retain(statx.stx_mask).contains(StatxFlags::MNT_ID);
        if told { Ok(statx.stx_mnt_id) } else { Err(Errno::NOSYS) }
    };
    let parent = path.parent().ok_or(Errno::NOENT)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let parent = rustix::fs::open(parent, flags, Mode::empty())?;
    Ok(mount_of(file)? == mount_of(parent.as_fd())?)
}

/// Whether a file without a name never had one: it lies on the kernel's own
/// mount, where a memfd of ours would be.
fn is_memfd(file: BorrowedFd<'_>, shown: &Path, stat: &Stat) -> bool {
    let ours = |flags| {
        let memfd = rustix::fs::memfd_create("ramferry-place", flags | MemfdFlags::CLOEXEC)?;
        rustix::fs::fstat(&memfd)
    };
    let page_bytes = rustix::fs::fstatfs(file).map_or(0, |statfs| statfs.f_bsize as u64);
    let flags = if page_bytes > 4096 {
        let log2 = page_bytes.trailing_zeros();
        MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(log2 << 26)
    } else {
        MemfdFlags::empty()
    };
    shown.as_os_str().as_bytes().starts_with(b"/memfd:")
        && ours(flags).is_ok_and(|ours| ours.st_dev == stat.st_dev)
}

/// Why a path of a guest is refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestPathError {
    /// Relative to nothing the caller knows.
    #[error("path {} of a guest is relative; give an absolute path", path.display())]
    Relative {
        /// As given.
        path: PathBuf,
    },
    /// In no directory of `guest_dirs`.
    #[error(
        "path {} is in none of the agent's guest_dirs ({dirs}); move the socket there, or add its directory",
        path.display()
    )]
    Outside {
        /// As given.
        path: PathBuf,
        /// Where it may be.
        dirs: GuestDirs,
    },
    /// Not there, or not to be reached by the agent.
    #[error("path {} cannot be reached; check that the guest runs and that the agent may use it", path.display())]
    Unreachable {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A RAM file is in no directory of `guest_dirs`.
    #[error(
        "RAM block {block:?} is file {}, which is in none of the agent's guest_dirs ({dirs}); \
         start the VMM with its mem-path in one of them, or add the file's directory to guest_dirs",
        path.display()
    )]
    RamOutside {
        /// The block.
        block: String,
        /// The file.
        path: PathBuf,
        /// Where it may be.
        dirs: GuestDirs,
    },
    /// A RAM file's name means something else to the agent than to the VMM.
    #[error(
        "RAM block {block:?} is file {} to its VMM, which the agent cannot find there; \
         mount the file's directory at the same path for the agent, and do not unlink the file",
        path.display()
    )]
    RamUnseen {
        /// The block.
        block: String,
        /// The file, as the VMM sees it.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl GuestPathError {
    /// The reason, as in ErrorInfo.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Relative { .. } => "GUEST_PATH_RELATIVE",
            Self::Outside { .. } => "GUEST_PATH_NOT_ALLOWED",
            Self::Unreachable { .. } => "GUEST_UNREACHABLE",
            Self::RamOutside { .. } | Self::RamUnseen { .. } => "RAM_FILE_NOT_ALLOWED",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symlink_out_of_the_directory_is_refused_like_a_path_outside() {
        let dir = tempfile::tempdir().unwrap();
        let allowed = dir.path().join("guests");
        let secret = dir.path().join("secret.sock");
        std::fs::create_dir(&allowed).unwrap();
        std::fs::write(&secret, "").unwrap();
        std::fs::write(allowed.join("vm.sock"), "").unwrap();
        std::os::unix::fs::symlink(&secret, allowed.join("link.sock")).unwrap();
        let dirs = GuestDirs::new(vec![allowed.clone()]);

        assert!(dirs.open_socket(&allowed.join("vm.sock")).is_ok());
        for refused in [secret, allowed.join("link.sock"), allowed.join("../secret.sock"), "/nowhere".into()]
        {
            let error = dirs.open_socket(&refused).unwrap_err();
            assert_eq!(error.reason(), "GUEST_PATH_NOT_ALLOWED", "{}", refused.display());
        }
    }

    #[test]
    fn missing_socket_in_the_directory_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = GuestDirs::new(vec![dir.path().to_owned()]);
        assert_eq!(dirs.open_socket(&dir.path().join("gone")).unwrap_err().reason(), "GUEST_UNREACHABLE");
        assert_eq!(dirs.open_socket(Path::new("vm.sock")).unwrap_err().reason(), "GUEST_PATH_RELATIVE");
    }

    #[test]
    fn no_directories_allow_any_absolute_path() {
        assert!(GuestDirs::default().open_socket(Path::new("/proc/self/stat")).is_ok());
    }

    #[test]
    fn socket_that_takes_the_place_of_the_one_checked_is_not_connected_to() {
        use std::os::unix::net::UnixListener;
        let dir = tempfile::tempdir().unwrap();
        let (allowed, elsewhere) = (dir.path().join("guests"), dir.path().join("elsewhere"));
        for place in [&allowed, &elsewhere] {
            std::fs::create_dir(place).unwrap();
        }
        let guest = UnixListener::bind(allowed.join("vm.sock")).unwrap();
        let victim = UnixListener::bind(elsewhere.join("vm.sock")).unwrap();
        victim.set_nonblocking(true).unwrap();
        let socket = GuestDirs::new(vec![allowed.clone()]).open_socket(&allowed.join("vm.sock")).unwrap();
        // Between the check and the connection the directory becomes a link to another.
        std::fs::rename(&allowed, dir.path().join("moved")).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &allowed).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let limit = std::time::Duration::from_millis(50);
        // Neither greets; only one is connected to.
        runtime.block_on(ramferry_guest::QmpClient::connect(socket, limit)).unwrap_err();
        guest.accept().unwrap();
        assert_eq!(victim.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    fn ram(path: &Path) -> RamFile {
        std::fs::write(path, [0; 4096]).unwrap();
        RamFile::open(path, ramferry_ram::Access::Read).unwrap()
    }

    fn refusal(dirs: &GuestDirs, file: &RamFile) -> GuestPathError {
        let error = dirs.check_ram("ram0", file).unwrap_err();
        assert_eq!(error.reason(), "RAM_FILE_NOT_ALLOWED");
        error
    }

    #[test]
    fn ram_file_is_judged_by_where_it_is_and_not_by_how_it_was_named() {
        let dir = tempfile::tempdir().unwrap();
        let (allowed, link) = (dir.path().join("ram"), dir.path().join("link"));
        std::fs::create_dir(&allowed).unwrap();
        std::os::unix::fs::symlink(&allowed, &link).unwrap();
        let dirs = GuestDirs::new(vec![link.clone()]);
        dirs.check_ram("ram0", &ram(&link.join("vm"))).unwrap();
        dirs.check_ram("ram0", &ram(&allowed.join("../ram/other"))).unwrap();

        let outside = ram(&dir.path().join("secret"));
        std::os::unix::fs::symlink(dir.path().join("secret"), allowed.join("bait")).unwrap();
        let baited = RamFile::open(&allowed.join("bait"), ramferry_ram::Access::Read).unwrap();
        for file in [&outside, &baited] {
            let text = refusal(&dirs, file).to_string();
            for part in ["ram0", "secret", &link.display().to_string(), "add the file's directory"] {
                assert!(text.contains(part), "{text:?} does not say {part:?}");
            }
            GuestDirs::default().check_ram("ram0", file).unwrap();
        }
    }

    #[test]
    fn file_that_was_moved_away_or_replaced_is_judged_as_what_was_opened() {
        let dir = tempfile::tempdir().unwrap();
        let allowed = dir.path().join("ram");
        std::fs::create_dir(&allowed).unwrap();
        let dirs = GuestDirs::new(vec![allowed.clone()]);
        let file = ram(&allowed.join("vm"));
        std::fs::rename(allowed.join("vm"), dir.path().join("vm")).unwrap();
        std::fs::write(allowed.join("vm"), [0; 4096]).unwrap();
        assert!(matches!(refusal(&dirs, &file), GuestPathError::RamOutside { .. }));
    }

    #[test]
    fn unlinked_file_is_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let allowed = dir.path().join("ram");
        std::fs::create_dir(&allowed).unwrap();
        let dirs = GuestDirs::new(vec![allowed.clone()]);
        let (inside, outside) = (allowed.join("vm (deleted)"), dir.path().join("vm"));
        let files = [ram(&inside), ram(&outside)];
        std::fs::remove_file(inside).unwrap();
        std::fs::remove_file(outside).unwrap();
        dirs.check_ram("ram0", &files[0]).unwrap();
        assert!(matches!(refusal(&dirs, &files[1]), GuestPathError::RamOutside { .. }));
    }

    #[test]
    fn memfd_is_its_owners_and_one_that_only_looks_like_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = GuestDirs::new(vec![dir.path().join("ram")]);
        let memfd = rustix::fs::memfd_create("memory-backend-memfd", MemfdFlags::CLOEXEC).unwrap();
        dirs.check_ram("ram0", &RamFile::from_fd(memfd, ramferry_ram::Access::Read).unwrap()).unwrap();
        let path = dir.path().join("memfd:memory-backend-memfd");
        let file = ram(&path);
        std::fs::remove_file(&path).unwrap();
        refusal(&dirs, &file);
    }
}
