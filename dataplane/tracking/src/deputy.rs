//! A process of our own that outlives us for the few microseconds in which
//! another process's thread has registers that are not its own.
//!
//! Tracing ends with the tracer. Were that the agent, one that is killed at the
//! wrong moment would leave a thread of the VMM where it crashes. A fork does
//! it in the agent's stead: it gets no signal but one that is meant for it
//! alone, ends by itself, and brings the thread back whether or not anybody
//! still waits for what it has to tell.
#![allow(unsafe_code, reason = "fork(2), and what may be done after it")]

use std::io::{self, IoSlice, IoSliceMut, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// How long a fork may take to close what it inherited.
const CLOSE_PATIENCE: Duration = Duration::from_secs(30);
/// Length of what it tells.
pub(crate) const REPORT_BYTES: usize = 8;

/// What a deputy tells, with a descriptor if it got one.
pub(crate) type Told = ([u8; REPORT_BYTES], Option<OwnedFd>);

/// Has `work` done by a deputy that keeps only the descriptor `keep`, and waits
/// `patience` for what it tells. `None` when that takes longer: the deputy then
/// goes on by itself.
///
/// `work` runs in a fork of a process with threads: it must not allocate, lock,
/// log or panic.
pub(crate) fn send_out(
    keep: BorrowedFd<'_>,
    patience: Duration,
    work: impl FnOnce() -> Told,
) -> io::Result<Option<Told>> {
    // A message is one read, however late the reader is.
    let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
    let (ours, theirs) = rustix::net::socketpair(family, SocketType::SEQPACKET, flags, None)?;
    let (ours, theirs) = (UnixStream::from(ours), UnixStream::from(theirs));
    let pid = {
        let _blocked = SignalsBlocked::all()?;
        fork(keep, &ours, &theirs, || serve(&theirs, work))?
    };
    drop(theirs);
    let told = hear(&ours, Instant::now() + patience);
    if told.is_ok() {
        reap(pid);
    } else {
        // It may go on for as long as the VMM's thread is stuck.
        std::thread::Builder::new().name("ramferry-reap".to_owned()).spawn(move || reap(pid))?;
    }
    match told {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(None),
        told => told.map(Some),
    }
}

/// Held while a fork has copies of descriptors that are not its business.
static FORKING: Mutex<()> = Mutex::new(());

/// Does `work`, such as closing a descriptor whose end others see, while no fork
/// of this module has a copy of it.
pub(crate) fn while_no_fork<T>(work: impl FnOnce() -> T) -> T {
    let _forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
    work()
}

/// Forks a child that keeps only the descriptors `keep` and `theirs`. It runs
/// `child`, which may only make system calls: other threads of ours may hold any lock.
pub(crate) fn fork(
    keep: BorrowedFd<'_>,
    mut ours: &UnixStream,
    theirs: &UnixStream,
    child: impl FnOnce() -> Never,
) -> io::Result<libc::pid_t> {
    ours.set_read_timeout(Some(CLOSE_PATIENCE))?;
    while_no_fork(|| {
        // SAFETY: what the child does is system calls only: these two, and by this function's
        // contract `child`, which does not return.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                close_others(keep.as_raw_fd(), theirs.as_raw_fd());
                let _ = rustix::io::write(theirs, &[0]);
                match child() {}
            }
            pid => {
                // One that has died instead is noticed by whoever waits for its next word.
                let _ = ours.read_exact(&mut [0]);
                Ok(pid)
            }
        }
    })
}

/// What a child of [`fork`] returns: it ends.
pub(crate) enum Never {}

fn serve(socket: &UnixStream, work: impl FnOnce() -> Told) -> Never {
    // A signal to the agent's process group is not for us. There is no failing: we lead none.
    let _ = rustix::process::setsid();
    if let Ok(told) = catch_unwind(AssertUnwindSafe(work)) {
        tell(socket, &told);
    }
    // SAFETY: ends the process at once; nothing of ours runs at its exit.
    unsafe { libc::_exit(0) }
}

fn tell(socket: &UnixStream, (report, descriptor): &Told) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_ref().map(AsFd::as_fd);
    if let Some(descriptor) = &descriptors {
        control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(descriptor)));
    }
    // There may be nobody left to hear it.
    let _ = rustix::net::sendmsg(socket, &[IoSlice::new(report)], &mut control, SendFlags::NOSIGNAL);
}

fn hear(socket: &UnixStream, deadline: Instant) -> io::Result<Told> {
    loop {
        await_message(socket, deadline)?;
        let mut report = [0; REPORT_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received =
            rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut report)], &mut control, flags)?;
        match received.bytes {
            REPORT_BYTES => {}
            // That it has closed what it inherited: it was not waited for any more.
            1 => continue,
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        let mut descriptors = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        return Ok((report, descriptors.next().and_then(|mut descriptors| descriptors.next())));
    }
}

fn await_message(socket: &UnixStream, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn reap(pid: libc::pid_t) {
    // SAFETY: the deputy is our child and was not reaped yet, so its pid is its own; waitpid
    // may be told to store no status.
    unsafe {
        while libc::waitpid(pid, std::ptr::null_mut(), 0) == -1
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
    }
}

/// Closes, in a fork, every descriptor but two: what it inherited would outlive us there.
fn close_others(one: RawFd, other: RawFd) {
    let (low, high) = (one.min(other) as u32, one.max(other) as u32);
    for between in [0..low, low + 1..high, high + 1..u32::MAX] {
        if !between.is_empty() {
            // SAFETY: takes three numbers; nothing in the child uses these descriptors.
            unsafe { libc::syscall(libc::SYS_close_range, between.start, between.end - 1, 0) };
        }
    }
}

/// Signals do not reach this thread, nor a fork that it makes, while this lives.
struct SignalsBlocked(libc::sigset_t);

impl SignalsBlocked {
    fn all() -> io::Result<Self> {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: both are valid places for a set; `all` is filled before it is read.
        let result = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr())
        };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: the call succeeded, so it wrote the set that was in force.
        Ok(Self(unsafe { before.assume_init() }))
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: restores, on the same thread, a set that the kernel gave.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}
