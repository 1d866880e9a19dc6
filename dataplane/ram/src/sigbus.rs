//! A RAM file that loses a page under us must not kill the process.
//!
//! Reading a mapped page that its file can no longer give raises SIGBUS. The
//! handler here looks the address up among our mappings, puts a page of zeros
//! in its place, and notes the fault for [`Registration::fault`]. Any other
//! SIGBUS goes where it would have gone without us.
//!
//! ```text
//! slot:  FREE --register--> CLAIMED --fields stored--> LIVE --drop--> FREE
//! ```
//!
//! The handler runs at any instruction of any thread: it touches the atomics of
//! a fixed table, makes raw system calls, and nothing else.
#![allow(unsafe_code, reason = "signal handling")]

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use libc::{c_int, c_void, siginfo_t};

use crate::RamError;

/// Mappings that there may be in the process at once.
const SLOTS: usize = 1024;

/// The low bit of a slot's generation: a mapping is described by it.
const LIVE: usize = 1;

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The file has no page there, or there was no memory for one.
    Missing,
    /// The hardware reported a memory error.
    Poisoned,
}

/// The handler's knowledge of one mapping; forgotten on drop.
#[derive(Debug)]
pub(crate) struct Registration {
    slot: usize,
}

/// Makes the handler answer for `length` bytes from `start`, mapped from a file
/// with pages of `page_bytes`.
pub(crate) fn register(
    start: usize,
    length: usize,
    page_bytes: usize,
    writable: bool,
) -> Result<Registration, RamError> {
    install()?;
    let slot = TABLE.iter().position(Slot::claim).ok_or(RamError::TooManyMappings { limit: SLOTS })?;
    TABLE[slot].fill(start, length, page_bytes, writable);
    Ok(Registration { slot })
}

impl Registration {
    /// The first fault that the handler repaired, and the offset of its page in
    /// the mapping.
    pub(crate) fn fault(&self) -> Option<(Fault, usize)> {
        let slot = &TABLE[self.slot];
        match slot.fault.load(Ordering::Acquire) {
            NO_FAULT => None,
            word if word & POISONED != 0 => Some((Fault::Poisoned, word & !FLAGS)),
            word => Some((Fault::Missing, word & !FLAGS)),
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let slot = &TABLE[self.slot];
        slot.generation.fetch_add(1, Ordering::AcqRel);
        slot.claimed.store(false, Ordering::Release);
    }
}

/// Value of [`Slot::fault`] before the first fault. Another value is the offset
/// of the page, which leaves the bits below the smallest page size for flags.
const NO_FAULT: usize = 0;
const MISSING: usize = 1;
const POISONED: usize = 2;
const FLAGS: usize = MISSING | POISONED;

/// One mapping. The fields mean something while the generation is odd and does not
/// change: of a mapping that a thread is faulting on, it never changes, because
/// that thread still borrows the mapping.
struct Slot {
    claimed: AtomicBool,
    generation: AtomicUsize,
    start: AtomicUsize,
    length: AtomicUsize,
    page_bytes: AtomicUsize,
    writable: AtomicBool,
    fault: AtomicUsize,
}

static TABLE: [Slot; SLOTS] = [const { Slot::new() }; SLOTS];

/// What SIGBUS did before us.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// A page of one of our mappings that a fault hit.
struct Hit {
    slot: &'static Slot,
    start: usize,
    length: usize,
    offset: usize,
    page_bytes: usize,
    protection: c_int,
}

impl Slot {
    const fn new() -> Self {
        Self {
            claimed: AtomicBool::new(false),
            generation: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            length: AtomicUsize::new(0),
            page_bytes: AtomicUsize::new(0),
            writable: AtomicBool::new(false),
            fault: AtomicUsize::new(NO_FAULT),
        }
    }

    fn claim(&self) -> bool {
        self.claimed.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn fill(&self, start: usize, length: usize, page_bytes: usize, writable: bool) {
        // A handler that reads one of the values below also sees the even generation.
        fence(Ordering::SeqCst);
        self.start.store(start, Ordering::Relaxed);
        self.length.store(length, Ordering::Relaxed);
        self.page_bytes.store(page_bytes, Ordering::Relaxed);
        self.writable.store(writable, Ordering::Relaxed);
        self.fault.store(NO_FAULT, Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    fn find(&'static self, address: usize) -> Option<Hit> {
        let generation = self.generation.load(Ordering::SeqCst);
        if generation & LIVE == 0 {
            return None;
        }
        let start = self.start.load(Ordering::Relaxed);
        let length = self.length.load(Ordering::Relaxed);
        let page_bytes = self.page_bytes.load(Ordering::Relaxed);
        let writable = self.writable.load(Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.generation.load(Ordering::SeqCst) != generation {
            return None;
        }
        let offset = address.checked_sub(start).filter(|offset| *offset < length)?;
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        Some(Hit { slot: self, start, length, offset: offset & !(page_bytes - 1), page_bytes, protection })
    }
}

impl Hit {
    /// Notes the fault and puts zeros where the page was. Whether that worked.
    fn repair(&self, flag: usize) -> bool {
        let word = self.offset | flag;
        // The first fault is the one to tell of.
        let _ = self.slot.fault.compare_exchange(NO_FAULT, word, Ordering::AcqRel, Ordering::Relaxed);
        // A process may have only so many separate mappings; the whole one in one
        // piece fits always.
        self.replace(self.start + self.offset, self.page_bytes) || self.replace(self.start, self.length)
    }

    fn replace(&self, start: usize, length: usize) -> bool {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range is within a mapping of ours that the faulting thread still borrows
        // (see `Slot`), so nothing else is there to be replaced. All accesses to it are made
        // through raw pointers that expect any value.
        let mapped = unsafe {
            libc::syscall(libc::SYS_mmap, start, length, self.protection, flags, -1_isize, 0_usize)
        };
        mapped == start as libc::c_long
    }
}

fn install() -> Result<(), RamError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            let previous = exchange(None)?;
            PREVIOUS.get_or_init(|| previous);
            // SAFETY: all-zero is a valid `sigaction`: an empty mask and no flags.
            let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            exchange(Some(&action)).map(|_| ())
        })
        .map_err(|errno| RamError::SignalHandler(io::Error::from_raw_os_error(errno)))
}

/// Sets the action of SIGBUS, if one is given, and returns the one before; or the `errno`.
fn exchange(action: Option<&libc::sigaction>) -> Result<libc::sigaction, i32> {
    let mut previous = MaybeUninit::<libc::sigaction>::uninit();
    let action = action.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: `action` is null or a valid action, whose handler keeps to what a handler
    // may do; `previous` has room for one.
    if unsafe { libc::sigaction(libc::SIGBUS, action, previous.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
    }
    // SAFETY: the call succeeded, so it has filled `previous`.
    Ok(unsafe { previous.assume_init() })
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: `errno` of this thread is always there.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: with SA_SIGINFO the kernel passes a valid `siginfo_t`, and for a SIGBUS
    // from it (a positive code) `si_addr` is set.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    let flag = match code {
        libc::BUS_ADRERR => Some(MISSING),
        libc::BUS_MCEERR_AR => Some(POISONED),
        _ => None,
    };
    let repaired = flag.is_some_and(|flag| {
        TABLE.iter().find_map(|slot| slot.find(address)).is_some_and(|hit| hit.repair(flag))
    });
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if !repaired {
        pass_on(signal, info, context);
    }
}

/// Does what would have been done without this handler.
fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let previous = PREVIOUS.get();
    let handler = previous.map_or(libc::SIG_DFL, |action| action.sa_sigaction);
    // SAFETY: as in `on_sigbus`.
    let sent = unsafe { (*info).si_code } <= 0;
    if handler == libc::SIG_IGN && sent {
        return;
    }
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // The kernel ignores no fault: back to the default, under which the instruction
        // faults again when this returns, and a signal that was sent is sent again.
        // SAFETY: `signal` and `raise` are async-signal-safe; SIG_DFL is a valid action.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            if sent {
                libc::raise(signal);
            }
        }
        return;
    }
    let with_info = previous.is_some_and(|action| action.sa_flags & libc::SA_SIGINFO != 0);
    // SAFETY: the handler was installed as an action for this signal, in the form that
    // SA_SIGINFO tells, and gets what the kernel would have given it.
    unsafe {
        if with_info {
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = std::mem::transmute(handler);
            handler(signal, info, context);
        } else {
            let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
            handler(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    use super::*;
    use crate::testing::memory_file;
    use crate::{Access, Mapping};

    const CHILD: &str = "RAMFERRY_SIGBUS_CHILD";

    /// Runs the test `name` alone in a process of its own, as the child.
    fn run_child(name: &str) -> ExitStatus {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", &format!("sigbus::tests::{name}"), "--nocapture"]).env(CHILD, "1");
        command.output().unwrap().status
    }

    fn is_child() -> bool {
        if std::env::var_os(CHILD).is_none() {
            return false;
        }
        let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
        rustix::process::setrlimit(rustix::process::Resource::Core, none).unwrap();
        true
    }

    /// Faults on a truncated file that no [`Mapping`] is of.
    fn fault_elsewhere() {
        let file = memory_file(1);
        let flags = rustix::mm::MapFlags::SHARED;
        // SAFETY: a new mapping replaces nothing; the process is to die by reading it.
        unsafe {
            let start = rustix::mm::mmap(ptr::null_mut(), 4096, rustix::mm::ProtFlags::READ, flags, &file, 0);
            rustix::fs::ftruncate(&file, 0).unwrap();
            start.unwrap().cast::<u8>().read_volatile();
        }
    }

    #[test]
    fn a_fault_elsewhere_kills_as_it_would_have() {
        if is_child() {
            let file = memory_file(1);
            let _mapping = Mapping::new(&file, 4096, Access::Read).unwrap();
            return fault_elsewhere();
        }
        let status = run_child("a_fault_elsewhere_kills_as_it_would_have");
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    }

    #[test]
    fn a_signal_that_was_sent_kills_under_the_default_action() {
        if is_child() {
            // SAFETY: the default action is valid.
            unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
            let file = memory_file(1);
            let _mapping = Mapping::new(&file, 4096, Access::Read).unwrap();
            // SAFETY: no precondition.
            unsafe { libc::raise(libc::SIGBUS) };
            return;
        }
        let status = run_child("a_signal_that_was_sent_kills_under_the_default_action");
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    }

    #[test]
    fn a_fault_elsewhere_reaches_the_handler_before_ours() {
        extern "C" fn leave(_signal: c_int) {
            // SAFETY: `_exit` is async-signal-safe.
            unsafe { libc::_exit(42) };
        }
        if is_child() {
            // SAFETY: the handler is async-signal-safe.
            unsafe { libc::signal(libc::SIGBUS, leave as extern "C" fn(c_int) as usize) };
            let file = memory_file(1);
            let mapping = Mapping::new(&file, 4096, Access::Read).unwrap();
            rustix::fs::ftruncate(&file, 0).unwrap();
            assert!(mapping.span(0, 4096).unwrap().is_zero());
            mapping.check().unwrap_err();
            return fault_elsewhere();
        }
        let status = run_child("a_fault_elsewhere_reaches_the_handler_before_ours");
        assert_eq!(status.code(), Some(42), "{status}");
    }

    #[test]
    fn slots_are_given_back() {
        let file = memory_file(1);
        for _ in 0..3 * SLOTS {
            Mapping::new(&file, 4096, Access::Read).unwrap();
        }
    }
}
