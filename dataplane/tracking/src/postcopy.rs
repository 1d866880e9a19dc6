//! Post-copy at the destination: a guest runs on RAM that has not all arrived.
//!
//! A page is let into the VMM's page tables once its bytes are in the RAM file, and
//! whoever reaches for it before waits:
//!
//! ```text
//! arm:    userfaultfd in the VMM, its descriptor left open there -> register MINOR|MISSING -> the VMM empties its page tables
//! access: no entry in the page table -> fault -> [wait] -> bytes into the file -> [let_in] -> goes on
//! end:    unregister -> the VMM closes its descriptor
//! ```
//!
//! The pages that are owed stay in the file, with whatever was there before: a fault in
//! minor mode comes also where the file has the page. So nothing is punched, and what is
//! registered with a device stays valid.
//!
//! A registration lives as long as any descriptor of its userfaultfd. That is why the VMM keeps one: an
//! agent that is killed takes ours with it, and yet nobody reads a page that has not come. [`RemoteFaults::retake`] goes
//! on from there.
//!
//! Faults of the kernel on the VMM's behalf (KVM, `read(2)` into guest RAM, vhost) wait as its own do; the VMM must be
//! allowed that (`vm.unprivileged_userfaultfd`, or CAP_SYS_PTRACE). Whoever else maps a RAM file does not wait, and is
//! refused by name.

mod error;
mod left;
mod let_in;
mod obstacles;
mod places;
mod userfaultfd;

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ramferry_ram::{Access, BlockIndex, Memory};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

pub use error::{FaultsError, Reach};
pub use let_in::LetIn;
pub use obstacles::check;
pub(crate) use userfaultfd::FEATURES;

use crate::TrackedFile;
use crate::remote_call::{Faults, RemoteCallError, lasting_userfaultfd, remote_forget};
use crate::segments::Segment;
use crate::watch::FileWatch;
use crate::writers::check_files;
use places::Places;
use userfaultfd::{MESSAGE_BYTES, Message, Told, Userfaultfd};

/// Most faults that one [`RemoteFaults::wait`] tells of.
pub const FAULT_BATCH: usize = 64;
/// Of mapped memory, what one thread of the VMM empties page tables of at a time: some tenth of a second.
const FORGET_PIECE_BYTES: u64 = 4 << 30;

/// An access that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// The block.
    pub block: BlockIndex,
    /// The page, of the block's page size.
    pub page: u64,
    /// Whether the file has it.
    pub kind: FaultKind,
    /// Whether it is to be written.
    pub write: bool,
}

/// Whether the RAM file has the page that an access waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// It has.
    Minor,
    /// It has a hole there.
    Missing,
}

/// The accesses of a VMM to its RAM, which wait until they are let in.
///
/// Dropped without [`end`](Self::end), it leaves the VMM's own descriptor open: what was not let in goes on
/// waiting, whatever becomes of this process, rather than that the guest reads what has not come.
pub struct RemoteFaults {
    vmm: u32,
    /// Readable once the VMM has ended.
    pidfd: OwnedFd,
    memory: Arc<Memory>,
    partners: Vec<u32>,
    places: Places,
    /// Tells of who opens a RAM file after the last look at every process.
    watch: Mutex<FileWatch>,
    userfaultfd: Userfaultfd,
    /// Its number in the VMM.
    descriptor: u32,
}

impl RemoteFaults {
    /// Makes every access of `vmm` to the files of `memory` wait from when this returned. No process but it and this one
    /// may reach them; `partners` may, which are not made to wait (over shm, the agent of the source).
    ///
    /// # Errors
    /// When that cannot be done; `vmm` is then as before, as far as it can be reached.
    pub fn arm(vmm: u32, memory: Arc<Memory>, partners: &[u32]) -> Result<Self, FaultsError> {
        let files = files_of(&memory)?;
        let watch = watch(vmm, &files)?;
        obstacles::refuse_others(vmm, &files, partners)?;
        let pidfd = open_pidfd(vmm)?;
        let (fd, descriptor) =
            lasting_userfaultfd(vmm, Faults::All).map_err(|error| obstacles::not_taken(vmm, error))?;
        let mut faults = Self {
            vmm,
            pidfd,
            memory,
            partners: partners.to_vec(),
            places: Places::of(files),
            watch,
            userfaultfd: Userfaultfd::new(fd),
            descriptor: descriptor as u32,
        };
        match faults.cover() {
            Ok(()) => Ok(faults),
            Err(error) => {
                if let Err(left) = faults.end() {
                    tracing::warn!(vmm, error = %left, "a userfaultfd may be left in the VMM");
                }
                Err(error)
            }
        }
    }

    /// Takes over what an agent that died had armed, and has every waiter try again: what the agent had been told of
    /// is told of once more. Only for an agent whose [`arm`](Self::arm) had returned.
    ///
    /// # Errors
    /// [`FaultsError::NotArmed`] when there is nothing, or a mapping does not wait: the guest may then have read what it is
    /// owed, unless nothing is owed any more (see [`release`]).
    pub fn retake(vmm: u32, memory: Arc<Memory>, partners: &[u32]) -> Result<Self, FaultsError> {
        let files = files_of(&memory)?;
        let watch = watch(vmm, &files)?;
        let pidfd = open_pidfd(vmm)?;
        let places = Places::of(files).look_again(vmm)?;
        if !left::is_registered(vmm, places.segments())? {
            return Err(FaultsError::NotArmed { vmm });
        }
        for left::Left { descriptor, fd } in left::find(vmm)? {
            let userfaultfd = Userfaultfd::new(fd);
            // Of what is registered with another one, the kernel says that it is busy.
            match places.segments().iter().try_for_each(|segment| register(vmm, segment, &userfaultfd)) {
                Ok(()) => {}
                Err(FaultsError::AlreadyRegistered { .. }) => continue,
                Err(error) => return Err(error),
            }
            let partners = partners.to_vec();
            let faults = Self { vmm, pidfd, memory, partners, places, watch, userfaultfd, descriptor };
            faults.wake_all()?;
            faults.recheck()?;
            return Ok(faults);
        }
        Err(FaultsError::NotArmed { vmm })
    }

    /// The VMM.
    pub fn vmm(&self) -> u32 {
        self.vmm
    }

    /// Makes sure that every mapping of the RAM files still waits, in every process but this one and its partners.
    ///
    /// # Errors
    /// When one does not: which one.
    pub fn recheck(&self) -> Result<(), FaultsError> {
        self.look_for_changes()?;
        obstacles::refuse_others(self.vmm, self.places.files(), &self.partners)
    }

    /// [`recheck`](Self::recheck) for a moment at which the guest stands still: every process is looked at only if somebody
    /// opened a RAM file since the last time.
    ///
    /// # Errors
    /// When a mapping does not wait: which one.
    pub fn confirm(&self) -> Result<(), FaultsError> {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = watch.look().map_err(FaultsError::Files)?;
        drop(watch);
        if seen.iter().any(|activity| activity.opened) { self.recheck() } else { self.look_for_changes() }
    }

    /// Waits for accesses, for `timeout` at most, and adds up to [`FAULT_BATCH`] of them to `faults`; how many.
    /// Any number of threads may wait: each access is told to one of them, and one of which several threads of
    /// the VMM wait for the same page is told several times. With no `timeout` it is one look, which a thread may
    /// spin on; the end of the VMM is noticed by those that wait.
    ///
    /// # Errors
    /// When the VMM ended, or the kernel tells what it should not. What was understood was added.
    pub fn wait(&self, timeout: Duration, faults: &mut Vec<PageFault>) -> Result<usize, FaultsError> {
        // Where many are told of, the next is there before it is waited for.
        let told = self.read(faults)?;
        if told > 0 || timeout.is_zero() || !self.await_event(timeout)? {
            return Ok(told);
        }
        self.read(faults)
    }

    /// Nothing is owed any more: lets everything in, and leaves the VMM as it was before [`arm`](Self::arm).
    ///
    /// # Errors
    /// When part of that failed; the rest was done. Unless the error is of unregistering, nobody waits any more, and
    /// what is left is a descriptor in the VMM that serves nothing.
    pub fn end(self) -> Result<(), FaultsError> {
        let unregistered = unregister(self.vmm, &self.places, &self.userfaultfd);
        let closed = left::close(self.vmm, self.userfaultfd.as_fd(), self.descriptor);
        unregistered.and(closed)
    }

    fn cover(&mut self) -> Result<(), FaultsError> {
        let failed = |source| FaultsError::of_call(self.vmm, "UFFDIO_API", source);
        let lacking = self.userfaultfd.agree().map_err(failed)?;
        if !lacking.is_empty() {
            return Err(FaultsError::KernelTooOld { lacking });
        }
        let places = self.places.look_again(self.vmm)?;
        for (index, segment) in places.segments().iter().enumerate() {
            if let Err(error) = register(self.vmm, segment, &self.userfaultfd) {
                // No more than what is ours: a kernel such as 6.12 lets one undo what another has registered.
                for ours in &places.segments()[..index] {
                    let _ = self.userfaultfd.unregister(ours.start, ours.end);
                }
                return Err(error);
            }
        }
        self.places = places;
        self.forget()?;
        self.recheck()
    }

    /// Has the VMM empty its page tables for the RAM files.
    fn forget(&self) -> Result<(), FaultsError> {
        let vmm = self.vmm;
        for pieces in pieces(self.places.segments().iter().map(|segment| (segment.start, segment.end))) {
            // Looked at just before: what is not a shared mapping of a file would lose its contents.
            self.look_for_changes()?;
            remote_forget(vmm, &pieces).map_err(|source| match source {
                RemoteCallError::Ended { .. } => FaultsError::Ended { vmm },
                source => FaultsError::RemoteCall { vmm, source },
            })?;
        }
        Ok(())
    }

    /// Whether the VMM has its RAM mapped as when it was armed.
    fn look_for_changes(&self) -> Result<(), FaultsError> {
        let now = self.places.look_again(self.vmm)?;
        match self.places.difference(&now) {
            Some(start) => Err(FaultsError::MappingChanged { vmm: self.vmm, start }),
            None => Ok(()),
        }
    }

    fn wake_all(&self) -> Result<(), FaultsError> {
        self.places.segments().iter().try_for_each(|segment| self.wake(segment.start, segment.end))
    }

    fn wake(&self, start: u64, end: u64) -> Result<(), FaultsError> {
        let failed = |source| FaultsError::of_call(self.vmm, "UFFDIO_WAKE", source);
        self.userfaultfd.wake(start, end).map_err(failed)
    }

    fn read(&self, faults: &mut Vec<PageFault>) -> Result<usize, FaultsError> {
        let mut messages: [Message; FAULT_BATCH] = [[0; MESSAGE_BYTES]; FAULT_BATCH];
        let failed = |source| FaultsError::of_call(self.vmm, "reading faults", source);
        let read = self.userfaultfd.read(&mut messages).map_err(failed)?;
        let mut strange = None;
        for message in &messages[..read] {
            match self.understand(message) {
                Ok(fault) => faults.push(fault),
                Err(error) => strange = Some(error),
            }
        }
        strange.map_or(Ok(read), Err)
    }

    /// Whether there is something to be read.
    fn await_event(&self, timeout: Duration) -> Result<bool, FaultsError> {
        let failed = |source| FaultsError::Failed { operation: "poll", source };
        let timeout = Timespec::try_from(timeout).map_err(|error| failed(io::Error::other(error)))?;
        let mut polled =
            [PollFd::new(&self.userfaultfd, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        if !polled[1].revents().is_empty() {
            return Err(FaultsError::Ended { vmm: self.vmm });
        }
        if polled[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL) {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        Ok(polled[0].revents().contains(PollFlags::IN))
    }

    fn understand(&self, message: &Message) -> Result<PageFault, FaultsError> {
        match userfaultfd::parse(message) {
            Told::Fault { address, minor, write } => {
                let (block, page) =
                    self.places.page_at(address).ok_or(FaultsError::ForeignAddress { address })?;
                let kind = if minor { FaultKind::Minor } else { FaultKind::Missing };
                Ok(PageFault { block, page, kind, write })
            }
            Told::Other(event) => Err(FaultsError::UnknownEvent { event }),
        }
    }
}

/// Ends whatever an agent that died left in `vmm`, armed or half ended, for one that is owed nothing any more. Whether
/// there was something. Must not be called while anything is owed.
///
/// # Errors
/// When it cannot be ended.
pub fn release(vmm: u32, memory: &Memory) -> Result<bool, FaultsError> {
    let places = Places::of(files_of(memory)?).look_again(vmm)?;
    let left = left::find(vmm)?;
    for left::Left { descriptor, fd } in &left {
        let userfaultfd = Userfaultfd::new(
            fd.try_clone()
                .map_err(|source| FaultsError::Failed { operation: "duplicating a descriptor", source })?,
        );
        let unregistered = unregister(vmm, &places, &userfaultfd);
        left::close(vmm, fd.as_fd(), *descriptor)?;
        unregistered?;
    }
    Ok(!left.is_empty())
}

fn register(vmm: u32, segment: &Segment, userfaultfd: &Userfaultfd) -> Result<(), FaultsError> {
    let start = segment.start;
    userfaultfd.register(start, segment.end).map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => FaultsError::AlreadyRegistered { vmm, start },
        Some(libc::EINVAL | libc::EPERM) => FaultsError::CannotRegister { vmm, start, source },
        _ => FaultsError::of_call(vmm, "UFFDIO_REGISTER", source),
    })
}

/// Unregisters what `vmm` still has mapped as in `places`.
fn unregister(vmm: u32, places: &Places, userfaultfd: &Userfaultfd) -> Result<(), FaultsError> {
    let mut result = Ok(());
    for segment in places.still_mapped(vmm)? {
        match userfaultfd.unregister(segment.start, segment.end) {
            Ok(()) => {}
            // Changed under us: what is registered there ends with the last descriptor.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOMEM)) => {}
            Err(source) => result = Err(FaultsError::of_call(vmm, "UFFDIO_UNREGISTER", source)),
        }
    }
    result
}

fn files_of(memory: &Memory) -> Result<Vec<TrackedFile>, FaultsError> {
    let mut files = Vec::new();
    for (index, block) in (0..).map(BlockIndex).zip(memory.layout().blocks()) {
        if memory.mapping(index).access() != Access::ReadWrite {
            return Err(FaultsError::ReadOnly);
        }
        let identity = memory.file(index).identity();
        files.push(TrackedFile { identity, pages: block.pages(), page_bytes: block.page_bytes });
    }
    check_files(&files).map_err(FaultsError::Files)?;
    Ok(files)
}

fn watch(vmm: u32, files: &[TrackedFile]) -> Result<Mutex<FileWatch>, FaultsError> {
    FileWatch::new(vmm, files).map(Mutex::new).map_err(FaultsError::Files)
}

fn open_pidfd(vmm: u32) -> Result<OwnedFd, FaultsError> {
    let ended = || FaultsError::Ended { vmm };
    let pid = i32::try_from(vmm).ok().and_then(Pid::from_raw).ok_or_else(ended)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| match errno {
        Errno::SRCH => ended(),
        errno => FaultsError::Failed { operation: "pidfd_open", source: errno.into() },
    })
}

/// `ranges` in lists of at most [`FORGET_PIECE_BYTES`], cut where they must be.
fn pieces(ranges: impl Iterator<Item = (u64, u64)>) -> Vec<Vec<(u64, u64)>> {
    let mut lists = vec![Vec::new()];
    let mut room = FORGET_PIECE_BYTES;
    for (mut start, end) in ranges {
        while start < end {
            if room == 0 {
                lists.push(Vec::new());
                room = FORGET_PIECE_BYTES;
            }
            let until = end.min(start + room);
            lists.last_mut().expect("there is always one").push((start, until));
            room -= until - start;
            start = until;
        }
    }
    lists
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tables_are_emptied_in_bounded_pieces() {
        const GIB: u64 = 1 << 30;
        let ranges = [(GIB, 2 * GIB), (10 * GIB, 20 * GIB), (30 * GIB, 31 * GIB)];
        let lists = pieces(ranges.into_iter());
        assert_eq!(lists.len(), 3);
        for list in &lists {
            assert!(list.iter().map(|(start, end)| end - start).sum::<u64>() <= FORGET_PIECE_BYTES);
        }
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for (start, end) in lists.into_iter().flatten() {
            match joined.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => joined.push((start, end)),
            }
        }
        assert_eq!(joined, ranges);
    }
}
