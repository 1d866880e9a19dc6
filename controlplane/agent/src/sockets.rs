//! Unix sockets in the agent's run directory: each is removed with what it was
//! made for, and those of agents that were killed at the next start.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

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
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Its VMM may have removed it.
        let _ = std::fs::remove_file(&self.0);
    }
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
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A process that has ended, and was waited for.
    fn ended() -> u32 {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
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
