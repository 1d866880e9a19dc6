//! A migration's guest, which an agent that was restarted has to find again.

use std::path::Path;
use std::sync::Arc;

use ramferry_engine::{Failure, Reason};
use ramferry_guest::{Guest, Qemu};
use tokio::sync::OnceCell;

use crate::config::GuestDirs;
use crate::journal::Created;
use crate::status::causes;

/// A guest, or where to find it.
pub(crate) struct GuestCell {
    guest: OnceCell<Arc<dyn Guest>>,
    place: Option<Place>,
}

struct Place {
    qmp: String,
    dirs: GuestDirs,
    pid: u32,
    was_running: bool,
}

impl GuestCell {
    pub(crate) fn found(guest: Arc<dyn Guest>) -> Self {
        Self { guest: OnceCell::from(guest), place: None }
    }

    /// The guest of a migration that a restart interrupted; only below `dirs` is it looked for.
    pub(crate) fn lost(qmp: String, dirs: GuestDirs, created: &Created) -> Self {
        let (pid, was_running) = (created.guest_pid, created.guest_was_running);
        let place = Place { qmp, dirs, pid, was_running };
        Self { guest: OnceCell::new(), place: Some(place) }
    }

    /// The guest, if it was found.
    pub(crate) fn now(&self) -> Option<&Arc<dyn Guest>> {
        self.guest.get()
    }

    /// Whether the VMM of a guest that was not found has ended.
    pub(crate) fn is_gone(&self) -> bool {
        self.guest.get().is_none() && self.place.as_ref().is_some_and(Place::is_gone)
    }

    /// The guest; looks for it when it was not found before.
    pub(crate) async fn get(&self) -> Result<&Arc<dyn Guest>, Failure> {
        self.guest.get_or_try_init(|| self.find()).await
    }

    async fn find(&self) -> Result<Arc<dyn Guest>, Failure> {
        let failed = |message: String| Failure::new(Reason::GuestFailed, message);
        let place = self.place.as_ref().expect("a guest that was not found has a place");
        let (pid, path) = (place.pid, &place.qmp);
        let unreachable = |error: &dyn std::error::Error| {
            if place.is_gone() {
                return failed(format!("the guest of process {pid} has ended"));
            }
            let why = causes(error);
            failed(format!("the guest of process {pid} cannot be reached at {path}: {why}"))
        };
        let socket = place.dirs.open_socket(Path::new(path)).map_err(|error| unreachable(&error))?;
        let qemu = match Qemu::attach(socket, place.was_running).await {
            Ok(qemu) if qemu.pid() == pid => qemu,
            Ok(qemu) => {
                let now = qemu.pid();
                return Err(failed(format!(
                    "the guest of process {pid} has ended; process {now} has {path} now"
                )));
            }
            Err(error) => return Err(unreachable(&error)),
        };
        Ok(Arc::new(qemu))
    }
}

impl Place {
    /// Whether the process has ended; one that only waits for its parent has.
    fn is_gone(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid));
        // The state follows the name, which is in parentheses and may hold any character.
        let state = |stat: &str| stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        stat.map_or(true, |stat| matches!(state(&stat), None | Some('Z' | 'X')))
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn place(qmp: &Path, dirs: GuestDirs, pid: u32) -> Place {
        Place { qmp: qmp.display().to_string(), dirs, pid, was_running: true }
    }

    #[tokio::test]
    async fn guest_outside_the_allowed_directories_is_not_spoken_to_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let (allowed, outside) = (directory.path().join("allowed"), directory.path().join("outside"));
        std::fs::create_dir(&allowed).unwrap();
        let listener = UnixListener::bind(&outside).unwrap();
        listener.set_nonblocking(true).unwrap();
        let link = allowed.join("qmp");
        std::os::unix::fs::symlink(&outside, &link).unwrap();
        for qmp in [&outside, &link] {
            let place = place(qmp, GuestDirs::new(vec![allowed.clone()]), std::process::id());
            let cell = GuestCell { guest: OnceCell::new(), place: Some(place) };
            let refused = cell.get().await.err().expect("it is outside").message;
            assert!(refused.contains("guest_dirs"), "{refused}");
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn process_that_waits_for_its_parent_is_gone() {
        let place = |pid| place("".as_ref(), GuestDirs::default(), pid);
        assert!(!place(std::process::id()).is_gone());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let wait = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::waitid(rustix::process::WaitId::Pid(pid), wait).unwrap();
        assert!(place(child.id()).is_gone());
        child.wait().unwrap();
        assert!(place(child.id()).is_gone());
    }
}
