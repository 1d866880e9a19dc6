//! One thread of another process, stopped and looked into with `ptrace(2)`.
//!
//! Tracing belongs to the *thread* that seized: a [`Tracee`] cannot leave it,
//! and whatever is still traced when that thread ends is detached and runs on
//! (kernel: `exit_ptrace`). Whoever changes a thread's registers must therefore
//! be a process that nobody kills (`deputy`).
#![allow(unsafe_code, reason = "ptrace(2) and waitpid(2) with __WALL have no safe binding here")]

use std::collections::HashSet;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::process;

/// Registers of a stopped x86-64 thread.
pub(crate) type Registers = libc::user_regs_struct;

/// How often a thread that keeps receiving signals is asked to stop.
const STOP_ATTEMPTS: u32 = 64;
/// How often a process's threads are listed until no new one is found.
const MAX_STOP_PASSES: u32 = 64;
/// Polls of a tracee's state that only yield, before polls that sleep.
const SPINS: u32 = 100;
const SLEEP_MIN: Duration = Duration::from_micros(20);
const SLEEP_MAX: Duration = Duration::from_millis(5);

const PTRACE_EVENT_STOP: i32 = 128;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const PTRACE_O_TRACESYSGOOD: usize = 1;
const PTRACE_O_SUSPEND_SECCOMP: usize = 1 << 21;
/// What `PTRACE_O_TRACESYSGOOD` adds to SIGTRAP in a stop at a system call.
const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;
/// Size of the kernel's signal mask, which `PTRACE_GETSIGMASK` wants to be told.
const SIGNAL_MASK_BYTES: usize = 8;
const _: () = assert!(SIGNAL_MASK_BYTES == size_of::<u64>());

/// What a tracee was seen to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// It stopped because it was interrupted, or its process is being stopped.
    Trap,
    /// It stopped at the entry to or the exit from a system call.
    Syscall,
    /// It stopped before this signal is delivered to it.
    Signal(i32),
}

/// Why a thread could not be stopped or looked into.
#[derive(Debug, Error)]
pub(crate) enum TraceError {
    #[error("the thread ended")]
    Ended,
    #[error("the thread did not stop in time")]
    Timeout,
    #[error("{operation} failed")]
    Failed {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
}

/// How a stopped thread is let run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resume {
    Freely,
    UntilSyscall,
}

/// A thread that this thread traces. Dropped while stopped, it is detached;
/// dropped while it runs, it is detached when the tracer thread ends.
pub(crate) struct Tracee {
    tid: libc::pid_t,
    stopped: bool,
    ended: bool,
    _belongs_to_this_thread: PhantomData<*const ()>,
}

impl Tracee {
    /// Starts to trace `tid`, which runs on. With `suspend_seccomp` its seccomp
    /// filters do not apply while it is traced.
    pub(crate) fn seize(tid: u32, suspend_seccomp: bool) -> Result<Self, TraceError> {
        let tid = libc::pid_t::try_from(tid).map_err(|_| TraceError::Ended)?;
        let suspend = if suspend_seccomp { PTRACE_O_SUSPEND_SECCOMP } else { 0 };
        let tracee = Self { tid, stopped: false, ended: true, _belongs_to_this_thread: PhantomData };
        tracee.request("PTRACE_SEIZE", libc::PTRACE_SEIZE, 0, PTRACE_O_TRACESYSGOOD | suspend)?;
        Ok(Self { ended: false, ..tracee })
    }

    /// Stops the thread where it can be continued as if nothing had happened.
    /// Signals that arrive before that are delivered.
    pub(crate) fn stop(&mut self, deadline: Instant) -> Result<(), TraceError> {
        self.interrupt()?;
        self.await_stop(deadline)
    }

    /// Waits until the thread has stopped, as [`interrupt`](Self::interrupt) asked it to.
    pub(crate) fn await_stop(&mut self, deadline: Instant) -> Result<(), TraceError> {
        for _ in 0..STOP_ATTEMPTS {
            match self.wait(Some(deadline))? {
                Event::Trap | Event::Syscall => return Ok(()),
                Event::Signal(signal) => {
                    self.resume(Resume::Freely, signal)?;
                    // That stop used up the interrupt: ask again.
                    self.interrupt()?;
                }
            }
        }
        Err(TraceError::Timeout)
    }

    /// Asks the thread to stop.
    pub(crate) fn interrupt(&self) -> Result<(), TraceError> {
        self.request("PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, 0, 0)
    }

    /// Waits for the thread's next stop; for ever when there is no deadline.
    pub(crate) fn wait(&mut self, deadline: Option<Instant>) -> Result<Event, TraceError> {
        let mut sleep = SLEEP_MIN;
        let mut spins = 0;
        loop {
            if let Some(event) = self.poll()? {
                return Ok(event);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(TraceError::Timeout);
            }
            if spins < SPINS {
                spins += 1;
                thread::yield_now();
            } else {
                thread::sleep(sleep);
                sleep = (sleep * 2).min(SLEEP_MAX);
            }
        }
    }

    fn poll(&mut self) -> Result<Option<Event>, TraceError> {
        // Only looked at first: the end of a child of ours is for whoever started it to reap.
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        let options = libc::WEXITED | libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
        // SAFETY: `info` is a valid place for the structure, and is only written during the call.
        let looked = unsafe { libc::waitid(libc::P_PID, self.tid as libc::id_t, info.as_mut_ptr(), options) };
        if looked == -1 {
            return self.wait_failed("waitid");
        }
        // SAFETY: all zeros, or what waitid wrote: it is initialised either way, and of the kind for SIGCHLD.
        let (pid, code) = unsafe { (info.assume_init_ref().si_pid(), info.assume_init_ref().si_code) };
        if pid == 0 {
            return Ok(None);
        }
        if matches!(code, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED) {
            return Err(self.gone());
        }
        let mut status = 0;
        // SAFETY: `status` is a valid place for one int, and is only written during the call.
        let waited = unsafe { libc::waitpid(self.tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
        if waited == -1 {
            return self.wait_failed("waitpid");
        }
        if waited == 0 {
            return Ok(None);
        }
        if !libc::WIFSTOPPED(status) {
            return Err(self.gone());
        }
        self.stopped = true;
        Ok(Some(match (status >> 16, libc::WSTOPSIG(status)) {
            (PTRACE_EVENT_STOP, _) => Event::Trap,
            (_, SYSCALL_STOP) => Event::Syscall,
            (0, signal) => Event::Signal(signal),
            _ => Event::Trap,
        }))
    }

    fn wait_failed(&mut self, operation: &'static str) -> Result<Option<Event>, TraceError> {
        let source = io::Error::last_os_error();
        match source.raw_os_error() {
            Some(libc::EINTR) => Ok(None),
            Some(libc::ECHILD) => Err(self.gone()),
            _ => Err(TraceError::Failed { operation, source }),
        }
    }

    fn gone(&mut self) -> TraceError {
        self.ended = true;
        self.stopped = false;
        TraceError::Ended
    }

    /// Lets the stopped thread run, with `signal` delivered to it unless that is 0.
    pub(crate) fn resume(&mut self, how: Resume, signal: i32) -> Result<(), TraceError> {
        let (operation, request) = match how {
            Resume::Freely => ("PTRACE_CONT", libc::PTRACE_CONT),
            Resume::UntilSyscall => ("PTRACE_SYSCALL", libc::PTRACE_SYSCALL),
        };
        self.request(operation, request, 0, signal as usize)?;
        self.stopped = false;
        Ok(())
    }

    /// Ends tracing; the thread runs on, with `signal` delivered to it unless that is 0.
    pub(crate) fn detach(mut self, signal: i32) -> Result<(), TraceError> {
        let detached = self.request("PTRACE_DETACH", libc::PTRACE_DETACH, 0, signal as usize);
        self.stopped = detached.is_err() && self.stopped;
        detached
    }

    /// Registers of the stopped thread.
    pub(crate) fn registers(&self) -> Result<Registers, TraceError> {
        let mut registers = MaybeUninit::<Registers>::uninit();
        self.request("PTRACE_GETREGS", libc::PTRACE_GETREGS, 0, registers.as_mut_ptr() as usize)?;
        // SAFETY: the request succeeded, so the kernel wrote the whole structure; any bits are valid in it.
        Ok(unsafe { registers.assume_init() })
    }

    /// Sets the registers of the stopped thread.
    pub(crate) fn set_registers(&self, registers: &Registers) -> Result<(), TraceError> {
        self.request("PTRACE_SETREGS", libc::PTRACE_SETREGS, 0, std::ptr::from_ref(registers) as usize)
    }

    /// Signals that the stopped thread blocks: bit `n - 1` for signal `n`.
    pub(crate) fn blocked_signals(&self) -> Result<u64, TraceError> {
        let mut mask = 0u64;
        let place = &raw mut mask as usize;
        self.request("PTRACE_GETSIGMASK", PTRACE_GETSIGMASK, SIGNAL_MASK_BYTES, place)?;
        Ok(mask)
    }

    /// Sets the signals that the stopped thread blocks.
    pub(crate) fn set_blocked_signals(&self, mask: u64) -> Result<(), TraceError> {
        let place = &raw const mask as usize;
        self.request("PTRACE_SETSIGMASK", PTRACE_SETSIGMASK, SIGNAL_MASK_BYTES, place)
    }

    /// Address of the stopped thread's `struct rseq`, if it has registered one.
    pub(crate) fn rseq_address(&self) -> Option<u64> {
        // struct ptrace_rseq_configuration: the address, then size, signature, flags and padding.
        let mut configuration = [0u64; 3];
        let place = configuration.as_mut_ptr() as usize;
        let size = size_of_val(&configuration);
        self.request("PTRACE_GET_RSEQ_CONFIGURATION", PTRACE_GET_RSEQ_CONFIGURATION, size, place).ok()?;
        Some(configuration[0]).filter(|address| *address != 0)
    }

    fn request(
        &self,
        operation: &'static str,
        request: libc::c_uint,
        address: usize,
        data: usize,
    ) -> Result<(), TraceError> {
        // SAFETY: every caller passes as `data` a number, or the address of a live local
        // that is as large as the request reads or writes, and mutable if it writes.
        // The thread's own memory and registers are changed only by the requests that say so.
        let result = unsafe { libc::ptrace(request as _, self.tid, address, data) };
        if result != -1 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        match source.raw_os_error() {
            Some(libc::ESRCH) => Err(TraceError::Ended),
            _ => Err(TraceError::Failed { operation, source }),
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if self.stopped && !self.ended {
            let _ = self.request("PTRACE_DETACH", libc::PTRACE_DETACH, 0, 0);
        }
    }
}

/// Stops every thread of process `pid`, and tells which thread would not.
/// Dropping what is returned lets them run on.
pub(crate) fn stop_all(pid: u32, deadline: Instant) -> Result<Vec<Tracee>, (u32, TraceError)> {
    let mut stopped: Vec<Tracee> = Vec::new();
    let mut seen = HashSet::new();
    for _ in 0..MAX_STOP_PASSES {
        let threads = process::threads_of(pid).map_err(|_| (pid, TraceError::Ended))?;
        let mut fresh = Vec::new();
        for tid in threads.into_iter().filter(|tid| seen.insert(*tid)) {
            // A thread that has ended writes no more.
            if process::thread_status(pid, tid).map_or(true, |status| status.ended) {
                continue;
            }
            match Tracee::seize(tid, false).and_then(|tracee| tracee.interrupt().map(|()| tracee)) {
                Ok(tracee) => fresh.push((tid, tracee)),
                Err(TraceError::Ended) => {}
                Err(error) => return Err((tid, error)),
            }
        }
        // With all known threads stopped and no other there, nobody is left to start one.
        if fresh.is_empty() {
            return Ok(stopped);
        }
        for (tid, mut tracee) in fresh {
            match tracee.await_stop(deadline) {
                Ok(()) => stopped.push(tracee),
                Err(TraceError::Ended) => {}
                Err(error) => return Err((tid, error)),
            }
        }
    }
    Err((pid, TraceError::Timeout))
}
