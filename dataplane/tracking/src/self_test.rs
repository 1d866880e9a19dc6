//! Proof that a tracker works on this host, before anything depends on it.
//!
//! A child of ours maps a file, writes to known pages of it on command, and the
//! tracker must report exactly those: through the very code that tracks guests.
#![allow(unsafe_code, reason = "fork(2), and mapping and writing memory in the child")]

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

use ramferry_ram::{Block, BlockIndex, FileIdentity, Layout, PageSets};
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::process::Signal;

use crate::deputy::{self, Never};
use crate::error::{SelfTestError, TrackError};
use crate::soft_dirty::SoftDirty;
use crate::tracker::{FileTracker, Mechanism};
use crate::uffd_wp::UffdWp;
use crate::{TrackedFile, Tracker, TrackerKind};

const PAGE_BYTES: usize = 4096;
const PAGES: u8 = 128;
const LENGTH_BYTES: usize = PAGES as usize * PAGE_BYTES;
/// How long the child has for one command.
const PATIENCE: Duration = Duration::from_secs(30);

/// Command to the child: write to the page that the next byte names.
const WRITE: u8 = b'w';
/// Command to the child: write to it, and drop its page table entry.
const WRITE_AND_FORGET: u8 = b'f';

/// Tests whether tracker `kind` reports the pages that another process
/// writes, and no others.
///
/// # Errors
/// When it does not, or could not be tested.
pub fn self_test(kind: TrackerKind) -> Result<(), SelfTestError> {
    match kind {
        TrackerKind::UffdWp => run::<UffdWp>(),
        TrackerKind::SoftDirty => run::<SoftDirty>(),
    }
}

/// The same, unless it passed before: neither the kernel nor what this process may do changes while it lives.
pub(crate) fn once(kind: TrackerKind) -> Result<(), SelfTestError> {
    static PASSED: [OnceLock<()>; TrackerKind::ALL.len()] =
        [const { OnceLock::new() }; TrackerKind::ALL.len()];
    let passed = &PASSED[kind as usize];
    if passed.get().is_none() {
        self_test(kind)?;
        passed.get_or_init(|| ());
    }
    Ok(())
}

fn run<M: Mechanism>() -> Result<(), SelfTestError> {
    let kind = M::KIND;
    let setup = |what| move |source: io::Error| SelfTestError::Setup { kind, what, source };
    let broken = |error: TrackError| SelfTestError::Tracker { kind, source: Box::new(error) };

    let file = rustix::fs::memfd_create("ramferry-self-test", MemfdFlags::CLOEXEC)
        .and_then(|file| rustix::fs::ftruncate(&file, LENGTH_BYTES as u64).map(|()| file))
        .map_err(io::Error::from)
        .map_err(setup("creating a file"))?;
    let stat = rustix::fs::fstat(&file).map_err(io::Error::from).map_err(setup("looking at a file"))?;
    let tracked = TrackedFile {
        identity: FileIdentity { device: stat.st_dev, inode: stat.st_ino },
        pages: u64::from(PAGES),
        page_bytes: PAGE_BYTES as u64,
    };
    let mut child = Child::spawn(&file).map_err(setup("starting a child"))?;
    for page in 0..PAGES {
        child.order(WRITE, page).map_err(setup("writing in a child"))?;
    }
    let mut tracker = FileTracker::<M>::of_guest(child.pid as u32, &[tracked]).map_err(broken)?;

    let rounds: [(u8, &[u8]); 6] = [
        (WRITE, &[0, 7, 8, 63, 64, 65, PAGES - 1]),
        (WRITE, &[]),
        (WRITE, &[7, 30]),
        (WRITE_AND_FORGET, &[7, 9]),
        (WRITE, &[9, 9, 100]),
        (WRITE, &[]),
    ];
    for (command, pages) in rounds {
        for page in pages {
            child.order(command, *page).map_err(setup("writing in a child"))?;
        }
        let mut written = empty_sets();
        tracker.harvest(&mut written).map_err(broken)?;
        compare(kind, pages, &written)?;
    }

    let last = [3, 4, 90];
    for page in last {
        child.order(WRITE, page).map_err(setup("writing in a child"))?;
    }
    let mut written = empty_sets();
    tracker.harvest_last(&mut written).map_err(broken)?;
    compare(kind, &last, &written)
}

fn empty_sets() -> PageSets {
    let block = Block {
        name: "self-test".to_owned(),
        guest_address: 0,
        length_bytes: LENGTH_BYTES as u64,
        page_bytes: PAGE_BYTES as u64,
    };
    PageSets::new(&Layout::new(vec![block]).expect("a layout of one block that starts at zero"))
}

fn compare(kind: TrackerKind, written: &[u8], reported: &PageSets) -> Result<(), SelfTestError> {
    let written: BTreeSet<u64> = written.iter().map(|page| u64::from(*page)).collect();
    let set = reported.block(BlockIndex(0));
    let missed = written.iter().filter(|page| !set.contains(**page)).count() as u64;
    if missed > 0 {
        return Err(SelfTestError::Missed { kind, missed, written: written.len() as u64 });
    }
    match set.count() - written.len() as u64 {
        0 => Ok(()),
        extra => Err(SelfTestError::Extra { kind, extra }),
    }
}

/// A child that writes to pages of a file. Killed and reaped on drop.
struct Child {
    pid: libc::pid_t,
    orders: UnixStream,
}

impl Child {
    fn spawn(file: &OwnedFd) -> io::Result<Self> {
        let (orders, theirs) = UnixStream::pair()?;
        orders.set_read_timeout(Some(PATIENCE))?;
        orders.set_write_timeout(Some(PATIENCE))?;
        // `serve` makes system calls only, allocates nothing and does not return.
        let pid = deputy::fork(file.as_fd(), &orders, &theirs, || serve(file, &theirs))?;
        Ok(Self { pid, orders })
    }

    fn order(&mut self, command: u8, page: u8) -> io::Result<()> {
        self.orders.write_all(&[command, page])?;
        let mut done = [0];
        self.orders.read_exact(&mut done)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: the child was not reaped yet, so its pid is its own; waitpid may
        // be told to store no status.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            while libc::waitpid(self.pid, std::ptr::null_mut(), 0) == -1
                && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
            {}
        }
    }
}

/// What the child does until it is killed, or its parent is.
fn serve(file: &OwnedFd, orders: &UnixStream) -> Never {
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let mapped = unsafe {
        rustix::mm::mmap(std::ptr::null_mut(), LENGTH_BYTES, protection, MapFlags::SHARED, file.as_fd(), 0)
    };
    let mut order = [0; 2];
    let mut stamp = 0u8;
    while let (Ok(mapped), Ok(2)) = (&mapped, rustix::io::read(orders, &mut order)) {
        let [command, page] = order;
        if page >= PAGES {
            break;
        }
        stamp = stamp.wrapping_add(1);
        // SAFETY: `page` is below `PAGES`, so this is within the mapping above, which only we use.
        unsafe {
            let place = mapped.cast::<u8>().add(usize::from(page) * PAGE_BYTES);
            place.write_volatile(stamp);
            if command == WRITE_AND_FORGET {
                let _ = rustix::mm::madvise(place.cast(), PAGE_BYTES, Advice::LinuxDontNeed);
            }
        }
        if rustix::io::write(orders, &[1]) != Ok(1) {
            break;
        }
    }
    // SAFETY: ends the process at once; nothing of ours runs at its exit.
    unsafe { libc::_exit(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_from_what_was_written_fails() {
        let mut reported = empty_sets();
        let kind = TrackerKind::SoftDirty;
        assert!(compare(kind, &[], &reported).is_ok());
        let missed = compare(kind, &[3, 3, 4], &reported);
        assert!(matches!(missed, Err(SelfTestError::Missed { missed: 2, written: 2, .. })));
        reported.block_mut(BlockIndex(0)).insert_run(ramferry_ram::PageRun { first: 3, count: 3 });
        assert!(matches!(compare(kind, &[3, 4], &reported), Err(SelfTestError::Extra { extra: 1, .. })));
        assert!(compare(kind, &[3, 4, 5], &reported).is_ok());
    }
}
