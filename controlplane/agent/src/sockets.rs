//! Unix sockets in the agent's run directory: each is removed with what it was
//! made for, and those of agents that were killed at the next start.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Uid};
use rustix::io::Errno;
use thiserror::Error;
use tokio::net::UnixListener;

/// The name of a VMM's socket in its room.
const SOCKET: &str = "sock";

/// A socket's path, free to be bound; whatever is there is removed on drop.
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

impl SocketFile {
    /// Removes what a crash may have left at `path`.
    pub(crate) fn new(path: PathBuf) -> Self {
        // There is most often nothing; and what cannot be removed cannot be bound either.
        let _ = std::fs::remove_file(&path);
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Listens there, for process `vmm` of whatever user.
    pub(crate) fn listen_for(&self, vmm: u32) -> Result<UnixListener, VmmSocketError> {
        let made = |source| VmmSocketError::Make { path: self.0.clone(), source };
        let listener = UnixListener::bind(&self.0).map_err(made)?;
        give(&self.0, FileType::Socket, Mode::RUSR | Mode::WUSR, vmm)?;
        Ok(listener)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Its VMM may have removed it.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A directory of a VMM's own, which cannot make its socket in the agent's.
/// Removed on drop, with the socket.
#[derive(Debug)]
pub(crate) struct SocketRoom(PathBuf);

impl SocketRoom {
    /// Removes what a crash may have left at `path`.
    pub(crate) fn new(path: PathBuf) -> Self {
        let room = Self(path);
        room.remove();
        room
    }

    /// Makes it for process `vmm`; returns the path for the socket.
    pub(crate) fn open_for(&self, vmm: u32) -> Result<PathBuf, VmmSocketError> {
        rustix::fs::mkdir(&self.0, Mode::RWXU)
            .map_err(|errno| VmmSocketError::Make { path: self.0.clone(), source: errno.into() })?;
        give(&self.0, FileType::Directory, Mode::RWXU, vmm)?;
        Ok(self.0.join(SOCKET))
    }

    /// What else the VMM has put there is its own affair: it stays.
    fn remove(&self) {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let removed = rustix::fs::open(&self.0, flags, Mode::empty()).and_then(|room| {
            match rustix::fs::unlinkat(&room, SOCKET, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => rustix::fs::rmdir(&self.0),
                Err(errno) => Err(errno),
            }
        });
        match removed {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => {
                tracing::warn!(path = ?self.0, %error, "cannot remove the directory of a VMM's socket");
            }
        }
    }
}

impl Drop for SocketRoom {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Why a VMM cannot be given a socket.
#[derive(Debug, Error)]
pub(crate) enum VmmSocketError {
    #[error("cannot make {path:?}; free its name, and see to it that the agent may write to run_dir")]
    Make {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("another file took the place of {path:?}; let nobody but the agent write to run_dir")]
    Replaced { path: PathBuf },
    #[error("cannot tell the user of process {vmm}; is /proc mounted without hidepid?")]
    User {
        vmm: u32,
        #[source]
        source: io::Error,
    },
    #[error("cannot give {path:?} to user {user}, the VMM's; run the agent as root, or as that user")]
    Give {
        path: PathBuf,
        user: u32,
        #[source]
        source: io::Error,
    },
}

/// Makes what was just made at `path` the own of the user of process `vmm`. Whoever
/// else may write to the directory cannot have another file given away so.
fn give(path: &Path, kind: FileType, mode: Mode, vmm: u32) -> Result<(), VmmSocketError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty())
        .and_then(|made| Ok((rustix::fs::fstat(&made)?, made)))
        .map_err(|errno| VmmSocketError::Make { path: path.to_owned(), source: errno.into() });
    let (stat, made) = opened?;
    let ours = stat.st_uid == rustix::process::geteuid().as_raw();
    if !ours || FileType::from_raw_mode(stat.st_mode) != kind {
        return Err(VmmSocketError::Replaced { path: path.to_owned() });
    }
    let user = user_of(vmm).map_err(|source| VmmSocketError::User { vmm, source })?;
    rustix::fs::chmod(format!("/proc/self/fd/{}", made.as_raw_fd()), mode)
        .and_then(|()| rustix::fs::chownat(&made, "", Some(user), None, AtFlags::EMPTY_PATH))
        .map_err(|errno| VmmSocketError::Give {
            path: path.to_owned(),
            user: user.as_raw(),
            source: errno.into(),
        })
}

/// As whom process `pid` opens files. The owner of its directory in /proc is root
/// where the process has changed its user.
fn user_of(pid: u32) -> io::Result<Uid> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    // The real, the effective and the saved one, and that for files.
    let user = users.and_then(|users| users.split_whitespace().nth(3)?.parse().ok());
    user.map(Uid::from_raw).ok_or_else(|| io::Error::other("its status names no user"))
}

/// The name of the shm fabric's socket of the agent with this process.
pub(crate) fn shm_name(pid: u32) -> String {
    format!("shm-{pid}.sock")
}

/// Removes the shm fabric's sockets of agents that were killed. Others may run
/// with the same directory: only a socket on which nobody listens, and whose
/// process is gone, is one of theirs.
pub(crate) fn sweep(run_dir: &Path) {
    let Ok(entries) = std::fs::read_dir(run_dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let Some(pid) = owner(&entry.file_name().to_string_lossy()) else { continue };
        if Path::new("/proc").join(pid.to_string()).exists() || is_listened_on(&path) {
            continue;
        }
        match std::fs::remove_file(&path) {
            Ok(()) => tracing::info!(?path, "removed the socket of an agent that was killed"),
            Err(error) => {
                tracing::warn!(?path, %error, "cannot remove the socket of an agent that was killed");
            }
        }
    }
}

fn owner(name: &str) -> Option<u32> {
    let pid = name.strip_prefix("shm-")?.strip_suffix(".sock")?.parse().ok()?;
    (shm_name(pid) == name).then_some(pid)
}

fn is_listened_on(path: &Path) -> bool {
    !matches!(UnixStream::connect(path), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    use super::*;

    /// A process that has ended, and was waited for.
    fn ended() -> u32 {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    /// Whether user `user` may do to `path` what `right` of test(1) says.
    fn may(user: u32, right: &str, path: &Path) -> bool {
        Command::new("test").uid(user).gid(user).arg(right).arg(path).status().unwrap().success()
    }

    #[tokio::test]
    async fn what_is_made_for_a_vmm_is_its_own_and_nobody_elses() {
        const VMM: u32 = 65533;
        const ANOTHER: u32 = 65532;
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: only root can run a VMM of another user");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let open = std::fs::Permissions::from_mode(0o711);
        std::fs::set_permissions(directory.path(), open).unwrap();
        let mut vmm = Command::new("sleep").arg("600").uid(VMM).gid(VMM).spawn().unwrap();
        let (file, room) = (SocketFile::new(directory.path().join("file")), directory.path().join("room"));
        let room = SocketRoom::new(room);
        let listener = file.listen_for(vmm.id());
        let socket = room.open_for(vmm.id());
        vmm.kill().unwrap();
        vmm.wait().unwrap();
        let (_listener, socket) = (listener.unwrap(), socket.unwrap());
        assert!(may(VMM, "-w", file.path()) && !may(ANOTHER, "-w", file.path()));
        assert!(may(VMM, "-w", &room.0) && !may(ANOTHER, "-x", &room.0));
        assert!(!may(VMM, "-w", directory.path()));
        drop(UnixListener::bind(&socket).unwrap());
        drop((room, file));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn another_file_in_the_place_of_a_socket_is_not_given_away() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [file, link] {
            let refused = give(&path, FileType::Socket, Mode::RWXU, std::process::id());
            assert!(matches!(refused, Err(VmmSocketError::Replaced { .. })), "{refused:?}");
        }
    }

    #[test]
    fn only_sockets_of_agents_that_are_gone_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let dead = path(&shm_name(ended()));
        drop(UnixListener::bind(&dead).unwrap());
        let ours = path(&shm_name(std::process::id()));
        drop(UnixListener::bind(&ours).unwrap());
        let listened = path(&shm_name(ended()));
        let _listener = UnixListener::bind(&listened).unwrap();
        let others = [path("shm-x.sock"), path("other.sock"), path("shm-007.sock")];
        for other in &others {
            drop(UnixListener::bind(other).unwrap());
        }
        sweep(directory.path());
        assert!(!dead.exists());
        assert!(ours.exists() && listened.exists() && others.iter().all(|other| other.exists()));
    }

    #[test]
    fn socket_is_removed_with_what_it_was_made_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        drop(UnixListener::bind(&path).unwrap());
        let socket = SocketFile::new(path.clone());
        let _listener = UnixListener::bind(socket.path()).unwrap();
        drop(socket);
        assert!(!path.exists());
    }
}
