//! A userfaultfd of another process, without that process's help; and what else
//! only a process itself may do.
//!
//! A userfaultfd serves the address space of whoever called `userfaultfd(2)`.
//! So one thread of the process is stopped with `ptrace(2)`, is made to call it
//! and, once we hold a copy of the descriptor, to close it again; then it goes
//! on where it was.
//!
//! ```text
//! seize -> stop -> block its signals -> [userfaultfd] -> pidfd_getfd -> [close]
//!   -> its registers and signal mask as before -> stop once more -> detach
//! ```
//!
//! Where the registration must outlive us, its copy is left open; it is closed the same
//! way later. So is it made to empty its page tables.
//!
//! What keeps the process unharmed:
//!
//! * The thread's registers are its own except within `[..]`, a few microseconds
//!   each. There the tracer must not leave: so it is not the agent, but a process
//!   of its own that the agent's end does not touch (`deputy`). It waits as long as
//!   it takes, while the caller of [`remote_userfaultfd`] gets an error after
//!   [`PATIENCE`].
//! * A system call that the stop interrupted is restarted, or ends with EINTR
//!   if a handler ran, as after any signal: `rax` and `orig_rax` are put back as
//!   they were, `-ERESTART*` and the call's number, and the last stop before
//!   the thread is let go is the one after which the kernel looks at them.
//! * No signal is lost: they wait while the thread's mask is full. SIGSTOP cannot
//!   be blocked; it is passed on, and the process is stopped when we leave it.
//! * Only threads that come to user mode are borrowed, not those that the kernel
//!   runs in the process for io_uring, vhost and KVM.
//! * A seccomp filter that would kill the process for calling `userfaultfd` is
//!   suspended for this thread while we trace it; where that is not allowed,
//!   nothing is tried.

mod error;
mod injection;
mod report;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

pub use error::RemoteCallError;

use crate::deputy;
use crate::maps::{self, Vma};
use crate::process;
use crate::ptrace::{Event, Registers, Resume, TraceError, Tracee};
use injection::Injection;

/// How long a thread has to stop before another is tried.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a caller waits for one thread's part. It takes a millisecond; on a host that has many
/// more threads to run than processors, each of its dozens of turns may come late.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long the deputy of an agent that was killed may still be busy with a thread.
const DEPUTY_PATIENCE: Duration = Duration::from_millis(500);
const DEPUTY_POLL: Duration = Duration::from_millis(5);
/// Threads that are tried.
const MAX_THREADS: usize = 4;
/// Times a thread found in a restartable sequence is let run and stopped again.
const MAX_RSEQ_RETRIES: u32 = 32;

/// `syscall` on x86-64.
const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];
/// Bytes of executable mappings outside the vDSO that are searched for one.
const MAX_SEARCH_BYTES: u64 = 64 << 20;
const SEARCH_PIECE_BYTES: usize = 64 << 10;
/// Code segment of a 64-bit thread.
const USER_CS: u64 = 0x33;
pub(crate) const UFFD_USER_MODE_ONLY: u64 = 1;

/// Which faults a userfaultfd is to be told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// Faults in user mode only. Enough, and allowed to every process, where
    /// nobody waits for faults: asynchronous write protection is resolved by the
    /// kernel whatever mode wrote.
    UserOnly,
    /// Also faults of the kernel, such as KVM's and vhost's, on the process's
    /// behalf. The process needs CAP_SYS_PTRACE or `vm.unprivileged_userfaultfd=1`.
    All,
}

/// Makes a userfaultfd for the address space of process `pid` and takes it
/// over; `pid` keeps nothing of it, and one of its threads has spent some hundred
/// microseconds stopped: the first one if it can be, or the one that `pid` names.
///
/// # Errors
/// When it cannot be had, whatever the reason; the process is then as before.
pub fn remote_userfaultfd(pid: u32, faults: Faults) -> Result<OwnedFd, RemoteCallError> {
    let (fd, _) = taken(pid, run_errand(pid, Errand::Take { faults, leave_open: false })?)?;
    Ok(fd)
}

/// The same, but the process keeps its descriptor, of the number that is told: what is registered with it
/// stays registered when we are gone.
pub(crate) fn lasting_userfaultfd(pid: u32, faults: Faults) -> Result<(OwnedFd, i32), RemoteCallError> {
    taken(pid, run_errand(pid, Errand::Take { faults, leave_open: true })?)
}

/// Has process `pid` forget what its page tables say of `ranges`, each a start and an end: their pages are
/// dropped from them, and stay in the file.
///
/// The ranges MUST be shared mappings of files: of other memory the pages themselves would be gone.
pub(crate) fn remote_forget(pid: u32, ranges: &[(u64, u64)]) -> Result<(), RemoteCallError> {
    run_errand(pid, Errand::Forget { ranges }).map(|_| ())
}

/// Has process `pid` close a descriptor of its own.
pub(crate) fn remote_close(pid: u32, descriptor: u32) -> Result<(), RemoteCallError> {
    run_errand(pid, Errand::Close { descriptor }).map(|_| ())
}

/// A copy of another process's descriptor.
pub(crate) fn take_descriptor(pid: u32, descriptor: i32) -> io::Result<OwnedFd> {
    injection::take_descriptor(pid, descriptor)
}

/// What a thread is borrowed for.
#[derive(Clone, Copy, Debug)]
enum Errand<'a> {
    Take { faults: Faults, leave_open: bool },
    Forget { ranges: &'a [(u64, u64)] },
    Close { descriptor: u32 },
}

fn taken(pid: u32, taken: Option<(OwnedFd, i32)>) -> Result<(OwnedFd, i32), RemoteCallError> {
    taken.ok_or_else(|| RemoteCallError::Transfer { pid, source: io::ErrorKind::UnexpectedEof.into() })
}

fn run_errand(pid: u32, errand: Errand<'_>) -> Result<Option<(OwnedFd, i32)>, RemoteCallError> {
    let threads = process::threads_of(pid).map_err(|_| RemoteCallError::Ended { pid })?;
    let pid = process::process_of(pid).map_err(|_| RemoteCallError::Ended { pid })?;
    let mut last = RemoteCallError::Ended { pid };
    let can_call =
        |tid: &u32| process::thread_status(pid, *tid).is_ok_and(|status| !status.ended && !status.is_worker);
    for tid in threads.into_iter().filter(can_call).take(MAX_THREADS) {
        last = match Attempt::prepare(pid, tid, errand).and_then(Attempt::by_deputy) {
            Ok(done) => return Ok(done),
            // Another thread may still be one that stops.
            Err(error @ (RemoteCallError::NotStopped { .. } | RemoteCallError::Ended { .. })) => error,
            Err(error @ RemoteCallError::Stuck { .. }) => return Err(error),
            // Whatever fails with a process on its way out.
            Err(_) if !maps::vmas_of(pid).is_ok_and(|vmas| !vmas.is_empty()) => {
                return Err(RemoteCallError::Ended { pid });
            }
            Err(error) => return Err(error),
        };
    }
    Err(last)
}

/// One try with one thread: what is found out before, and what a deputy does.
struct Attempt<'a> {
    pid: u32,
    tid: u32,
    errand: Errand<'a>,
    memory: File,
    syscall_at: u64,
    /// Whether seccomp filters apply to the thread.
    filtered: bool,
}

impl<'a> Attempt<'a> {
    fn prepare(pid: u32, tid: u32, errand: Errand<'a>) -> Result<Self, RemoteCallError> {
        let memory =
            File::open(format!("/proc/{pid}/mem")).map_err(|source| match source.raw_os_error() {
                Some(libc::EACCES | libc::EPERM) => RemoteCallError::Denied { pid, source },
                _ => RemoteCallError::Ended { pid },
            })?;
        let syscall_at = find_syscall(pid, &memory)?;
        let deadline = Instant::now() + DEPUTY_PATIENCE;
        let mut status = process::thread_status(pid, tid).map_err(|_| RemoteCallError::Ended { pid })?;
        while status.tracer != 0 && Instant::now() < deadline {
            std::thread::sleep(DEPUTY_POLL);
            status = process::thread_status(pid, tid).map_err(|_| RemoteCallError::Ended { pid })?;
        }
        if status.ended {
            return Err(RemoteCallError::Ended { pid });
        }
        if status.tracer != 0 {
            let comm = process::comm_of(status.tracer);
            return Err(RemoteCallError::AlreadyTraced { pid, tracer: status.tracer, comm });
        }
        Ok(Self { pid, tid, errand, memory, syscall_at, filtered: status.seccomp != 0 })
    }

    fn by_deputy(self) -> Result<Option<(OwnedFd, i32)>, RemoteCallError> {
        let pid = self.pid;
        let failed = |source| RemoteCallError::Trace { pid, operation: "deputy", source };
        let work = || match self.run() {
            Ok(Some((fd, number))) => (report::of_descriptor(number), Some(fd)),
            Ok(None) => (report::SUCCESS, None),
            Err(error) => (report::encode(&error), None),
        };
        match deputy::send_out(self.memory.as_fd(), PATIENCE, work).map_err(failed)? {
            Some((report, Some(fd))) => {
                check_descriptor(&fd).map_err(|source| RemoteCallError::Transfer { pid, source })?;
                Ok(Some((fd, report::descriptor(report))))
            }
            Some((report::SUCCESS, None)) => Ok(None),
            Some((report, None)) => Err(report::decode(pid, report)),
            None => Err(RemoteCallError::Stuck { pid }),
        }
    }

    /// Runs in the deputy: allocates nothing.
    fn run(&self) -> Result<Option<(OwnedFd, i32)>, RemoteCallError> {
        let pid = self.pid;
        let mut tracee = self.seize()?;
        let original = self.stop_outside_rseq(&mut tracee, &self.memory)?;
        if original.cs != USER_CS {
            return Err(RemoteCallError::NotSixtyFourBit { pid });
        }
        let mask = tracee.blocked_signals().map_err(|error| self.trace(error))?;
        tracee.set_blocked_signals(u64::MAX).map_err(|error| self.trace(error))?;
        let syscall_at = self.syscall_at;
        let mut injection = Injection { attempt: self, tracee: &mut tracee, syscall_at, original };
        let done = injection.run();
        tracee.set_blocked_signals(mask).map_err(|error| self.trace(error))?;
        self.let_go(tracee)?;
        done
    }

    fn seize(&self) -> Result<Tracee, RemoteCallError> {
        let (pid, filtered) = (self.pid, self.filtered);
        Tracee::seize(self.tid, filtered).map_err(|error| match error {
            TraceError::Failed { source, .. } if filtered => RemoteCallError::Seccomp { pid, source },
            TraceError::Failed { source, .. } => RemoteCallError::Denied { pid, source },
            error => self.trace(error),
        })
    }

    /// Stops the thread and tells its registers. A thread in a restartable
    /// sequence would be taken for one that left it, so it is let run on.
    fn stop_outside_rseq(&self, tracee: &mut Tracee, memory: &File) -> Result<Registers, RemoteCallError> {
        let deadline = Instant::now() + STOP_TIMEOUT;
        for _ in 0..MAX_RSEQ_RETRIES {
            tracee.stop(deadline).map_err(|error| self.trace(error))?;
            let registers = tracee.registers().map_err(|error| self.trace(error))?;
            if !in_rseq(tracee, memory, &registers) {
                return Ok(registers);
            }
            tracee.resume(Resume::Freely, 0).map_err(|error| self.trace(error))?;
        }
        Err(RemoteCallError::NotStopped { pid: self.pid })
    }

    /// Detaches from where the kernel restarts an interrupted call. The thread's
    /// registers are its own, so it may also be left while it runs.
    fn let_go(&self, mut tracee: Tracee) -> Result<(), RemoteCallError> {
        let left = tracee
            .interrupt()
            .and_then(|()| tracee.resume(Resume::Freely, 0))
            .and_then(|()| tracee.wait(Some(Instant::now() + STOP_TIMEOUT)))
            .and_then(|event| match event {
                Event::Signal(signal) => tracee.detach(signal),
                Event::Trap | Event::Syscall => tracee.detach(0),
            });
        match left {
            Ok(()) | Err(TraceError::Timeout) => Ok(()),
            Err(error) => Err(self.trace(error)),
        }
    }

    fn trace(&self, error: TraceError) -> RemoteCallError {
        let pid = self.pid;
        match error {
            TraceError::Ended => RemoteCallError::Ended { pid },
            TraceError::Timeout => RemoteCallError::NotStopped { pid },
            TraceError::Failed { operation, source } => RemoteCallError::Trace { pid, operation, source },
        }
    }
}

fn find_syscall(pid: u32, memory: &File) -> Result<u64, RemoteCallError> {
    let mut vmas = maps::vmas_of(pid).map_err(|source| RemoteCallError::Maps { pid, source })?;
    vmas.retain(|vma| vma.executable);
    vmas.sort_by_key(|vma| vma.path.as_os_str() != "[vdso]");
    let mut left = MAX_SEARCH_BYTES;
    vmas.iter()
        .find_map(|vma| find_instruction(memory, vma, &mut left))
        .ok_or(RemoteCallError::NoSyscallInstruction { pid })
}

/// A thread may have descriptors of its own, apart from its process's.
fn check_descriptor(fd: &OwnedFd) -> io::Result<()> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if link.as_os_str() != "anon_inode:[userfaultfd]" {
        return Err(io::Error::other(format!("what was taken is {}", link.display())));
    }
    Ok(())
}

/// Whether the stopped thread is within a restartable sequence (`rseq(2)`).
fn in_rseq(tracee: &Tracee, memory: &File, registers: &Registers) -> bool {
    // struct rseq: cpu_id_start and cpu_id (u32 each), then the address of the
    // current struct rseq_cs: version and flags (u32 each), start_ip,
    // post_commit_offset, abort_ip.
    if (registers.orig_rax as i64) >= 0 {
        return false;
    }
    let read = |at: u64| {
        let mut word = [0; 8];
        memory.read_exact_at(&mut word, at).ok().map(|()| u64::from_ne_bytes(word))
    };
    let sequence = || {
        let current = read(tracee.rseq_address()?.checked_add(8)?).filter(|current| *current != 0)?;
        let start = read(current.checked_add(8)?)?;
        let length = read(current.checked_add(16)?)?;
        Some(registers.rip.wrapping_sub(start) < length)
    };
    sequence().unwrap_or(false)
}

fn find_instruction(memory: &File, vma: &Vma, left_bytes: &mut u64) -> Option<u64> {
    let mut at = vma.start;
    let mut piece = vec![0; SEARCH_PIECE_BYTES];
    while at < vma.end && *left_bytes > 0 {
        let wanted = (vma.end - at).min(SEARCH_PIECE_BYTES as u64) as usize;
        let read = memory.read_at(&mut piece[..wanted], at).ok().filter(|read| *read >= 2)?;
        let found = piece[..read].windows(2).position(|pair| pair == SYSCALL_INSTRUCTION);
        if let Some(position) = found {
            return Some(at + position as u64);
        }
        *left_bytes = left_bytes.saturating_sub(read as u64);
        // The last byte again: the instruction may lie across two pieces.
        at += read as u64 - 1;
    }
    None
}
