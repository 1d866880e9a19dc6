//! A stopped thread that is made to call. Runs in the deputy: allocates nothing.

use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

use super::{Attempt, Errand, Faults, RemoteCallError, SYSCALL_INSTRUCTION, UFFD_USER_MODE_ONLY};
use crate::ptrace::{Event, Registers, Resume, Tracee};

/// Stops of a thread on its way through one system call.
const MAX_STOPS: u32 = 1000;

pub(super) struct Injection<'a> {
    pub(super) attempt: &'a Attempt<'a>,
    pub(super) tracee: &'a mut Tracee,
    pub(super) syscall_at: u64,
    pub(super) original: Registers,
}

impl Injection<'_> {
    /// Does the errand; a userfaultfd, with its number in the process, if that was to be taken.
    pub(super) fn run(&mut self) -> Result<Option<(OwnedFd, i32)>, RemoteCallError> {
        match self.attempt.errand {
            Errand::Take { faults, leave_open } => self.take_userfaultfd(faults, leave_open).map(Some),
            Errand::Forget { ranges } => self.forget(ranges).map(|()| None),
            Errand::Close { descriptor } => {
                self.succeed("close", libc::SYS_close, [u64::from(descriptor), 0, 0]).map(|()| None)
            }
        }
    }

    fn take_userfaultfd(
        &mut self,
        faults: Faults,
        leave_open: bool,
    ) -> Result<(OwnedFd, i32), RemoteCallError> {
        let pid = self.attempt.pid;
        let user_only = match faults {
            Faults::UserOnly => UFFD_USER_MODE_ONLY,
            Faults::All => 0,
        };
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | user_only;
        let remote = self.call(libc::SYS_userfaultfd, [flags, 0, 0])?;
        let remote = i32::try_from(remote).ok().filter(|remote| *remote >= 0).ok_or_else(|| {
            RemoteCallError::Refused { pid, source: io::Error::from_raw_os_error(errno_of(remote)) }
        })?;
        let taken = take_descriptor(pid, remote);
        if !leave_open || taken.is_err() {
            // Left open there it would keep the registration alive after us.
            self.call(libc::SYS_close, [remote as u64, 0, 0])?;
        }
        taken.map(|taken| (taken, remote)).map_err(|source| RemoteCallError::Transfer { pid, source })
    }

    fn forget(&mut self, ranges: &[(u64, u64)]) -> Result<(), RemoteCallError> {
        for (start, end) in ranges {
            let arguments = |advice| [*start, end - start, advice as u64];
            let locked_too = self.call(libc::SYS_madvise, arguments(libc::MADV_DONTNEED_LOCKED))?;
            match errno_of(locked_too) {
                0 => {}
                // A kernel before 5.18 knows it for memory only that is not locked.
                libc::EINVAL => self.succeed("madvise", libc::SYS_madvise, arguments(libc::MADV_DONTNEED))?,
                errno => return Err(self.failed("madvise", errno)),
            }
        }
        Ok(())
    }

    fn succeed(
        &mut self,
        call: &'static str,
        number: i64,
        arguments: [u64; 3],
    ) -> Result<(), RemoteCallError> {
        match errno_of(self.call(number, arguments)?) {
            0 => Ok(()),
            errno => Err(self.failed(call, errno)),
        }
    }

    fn failed(&self, call: &'static str, errno: i32) -> RemoteCallError {
        let source = io::Error::from_raw_os_error(errno);
        RemoteCallError::CallFailed { pid: self.attempt.pid, call, source }
    }

    fn call(&mut self, number: i64, [first, second, third]: [u64; 3]) -> Result<i64, RemoteCallError> {
        let registers = Registers {
            rip: self.syscall_at,
            rax: number as u64,
            rdi: first,
            rsi: second,
            rdx: third,
            // Not in a system call: nothing to restart on the way.
            orig_rax: u64::MAX,
            ..self.original
        };
        self.tracee.set_registers(&registers).map_err(|error| self.attempt.trace(error))?;
        let result = self.run_until_returned(number as u64);
        self.tracee.set_registers(&self.original).map_err(|error| self.attempt.trace(error))?;
        result
    }

    fn run_until_returned(&mut self, number: u64) -> Result<i64, RemoteCallError> {
        let failed = |error| self.attempt.trace(error);
        let returns_to = self.syscall_at + SYSCALL_INSTRUCTION.len() as u64;
        let (mut entered, mut signal) = (false, 0);
        for _ in 0..MAX_STOPS {
            self.tracee.resume(Resume::UntilSyscall, signal).map_err(failed)?;
            signal = 0;
            // No deadline: the thread must not be left with these registers.
            match self.tracee.wait(None).map_err(failed)? {
                Event::Syscall => {
                    let registers = self.tracee.registers().map_err(failed)?;
                    let ours = registers.rip == returns_to && registers.orig_rax == number;
                    if ours && entered {
                        return Ok(registers.rax as i64);
                    }
                    entered |= ours;
                }
                Event::Trap => {}
                // Of our making, and not passed on.
                Event::Signal(fault) if is_fault(fault) => break,
                Event::Signal(other) => signal = other,
            }
        }
        // The thread faulted, or did not reach the call.
        let source = io::Error::from_raw_os_error(libc::EFAULT);
        Err(RemoteCallError::Trace { pid: self.attempt.pid, operation: "injected call", source })
    }
}

fn is_fault(signal: i32) -> bool {
    matches!(
        signal,
        libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE | libc::SIGTRAP | libc::SIGSYS
    )
}

pub(super) fn take_descriptor(pid: u32, remote: i32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    Ok(rustix::process::pidfd_getfd(pidfd, remote, PidfdGetfdFlags::empty())?)
}

/// The `errno` that a call's result tells; 0 of one that succeeded.
fn errno_of(result: i64) -> i32 {
    if result >= 0 { 0 } else { i32::try_from(-result).unwrap_or(libc::EINVAL) }
}
