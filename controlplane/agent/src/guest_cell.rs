//! A migration's guest, which an agent that was restarted has to find again.

use std::path::Path;
use std::sync::Arc;

use ramferry_engine::{Failure, Reason};
use ramferry_guest::{Guest, Qemu};
use tokio::sync::OnceCell;

use crate::journal::Created;
use crate::status::causes;

/// A guest, or where to find it.
pub(crate) struct GuestCell {
    guest: OnceCell<Arc<dyn Guest>>,
    place: Option<Place>,
}

struct Place {
    qmp: String,
    pid: u32,
    was_running: bool,
}

impl GuestCell {
    pub(crate) fn found(guest: Arc<dyn Guest>) -> Self {
        Self { guest: OnceCell::from(guest), place: None }
    }

    /// The guest of a migration that a restart interrupted.
    pub(crate) fn lost(qmp: String, created: &Created) -> Self {
        let place = Place { qmp, pid: created.guest_pid, was_running: created.guest_was_running };
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
        let qemu = match Qemu::attach(Path::new(path), place.was_running).await {
            Ok(qemu) if qemu.pid() == pid => qemu,
            Ok(qemu) => {
                let now = qemu.pid();
                return Err(failed(format!(
                    "the guest of process {pid} has ended; process {now} has {path} now"
                )));
            }
            Err(_) if place.is_gone() => return Err(failed(format!("the guest of process {pid} has ended"))),
            Err(error) => {
                let why = causes(&error);
                let message = format!("the guest of process {pid} cannot be reached at {path}: {why}");
                return Err(failed(message));
            }
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
    use super::*;

    #[test]
    fn process_that_waits_for_its_parent_is_gone() {
        let place = |pid| Place { qmp: String::new(), pid, was_running: true };
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
