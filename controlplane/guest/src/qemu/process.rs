//! The process of a VMM, held by a descriptor, so that its number cannot come
//! to mean another process.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use tokio::time::{Instant, sleep};

use crate::GuestError;

/// How long a process that closed its sockets may take to be gone. A process
/// that dies has given its memory back by then; and a guest may be standing
/// still while this is found out.
const EXIT_DELAY: Duration = Duration::from_millis(100);

/// Between looks at a process that is to end.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    pidfd: OwnedFd,
}

impl Process {
    pub(super) fn open(pid: u32) -> Result<Self, GuestError> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(GuestError::Gone { pid })?;
        let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::empty())
            .map_err(|errno| GuestError::Watch { pid, source: errno.into() })?;
        Ok(Self { pid, pidfd })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn has_exited(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(rustix::event::poll(&mut fds, Some(&Timespec::default())), Ok(1))
    }

    /// Well, too, when it is gone.
    pub(super) fn kill(&self) -> Result<(), GuestError> {
        match rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(GuestError::Watch { pid: self.pid, source: errno.into() }),
        }
    }

    /// Whether it is gone, or will be in a moment.
    pub(super) async fn exits_soon(&self) -> bool {
        self.exits_within(EXIT_DELAY).await
    }

    pub(super) async fn exits_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.has_exited() {
            if Instant::now() >= deadline {
                return false;
            }
            sleep(LOOK_INTERVAL).await;
        }
        true
    }
}
