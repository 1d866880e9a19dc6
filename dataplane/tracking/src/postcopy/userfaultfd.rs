//! A userfaultfd whose faults wait until they are answered.
#![allow(unsafe_code, reason = "ioctl(2) on a userfaultfd has no safe binding")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use crate::uffd::{self, NamedFeatures, UFFDIO, UffdioRange};

const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;

/// What is agreed on, no more and no less: a descriptor that an agent left is known by it. Of an address only its page
/// is of interest, so that the exact one is not asked for.
pub(crate) const FEATURES: &NamedFeatures = &[
    (FEATURE_MISSING_HUGETLBFS, "UFFD_FEATURE_MISSING_HUGETLBFS"),
    (FEATURE_MISSING_SHMEM, "UFFD_FEATURE_MISSING_SHMEM"),
    (FEATURE_MINOR_HUGETLBFS, "UFFD_FEATURE_MINOR_HUGETLBFS"),
    (FEATURE_MINOR_SHMEM, "UFFD_FEATURE_MINOR_SHMEM"),
];
/// The kernel's own mark, in what it tells of a descriptor, that features were agreed on.
const FEATURE_INITIALIZED: u64 = 1 << 31;

/// A fault on a page of which the file has none.
const REGISTER_MODE_MISSING: u64 = 1 << 0;
/// A fault on a page that the file has.
const REGISTER_MODE_MINOR: u64 = 1 << 2;

const EVENT_PAGEFAULT: u8 = 0x12;
const PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
const PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

/// `struct uffd_msg`.
pub(super) const MESSAGE_BYTES: usize = 32;
pub(super) type Message = [u8; MESSAGE_BYTES];

#[repr(C)]
struct UffdioContinue {
    range: UffdioRange,
    mode: u64,
    mapped: i64,
}

const UFFDIO_UNREGISTER: Opcode = opcode::read::<UffdioRange>(UFFDIO, 0x01);
const UFFDIO_WAKE: Opcode = opcode::read::<UffdioRange>(UFFDIO, 0x02);
const UFFDIO_CONTINUE: Opcode = opcode::read_write::<UffdioContinue>(UFFDIO, 0x07);

const _: () = assert!(size_of::<UffdioRange>() == 16 && UFFDIO_UNREGISTER as u64 == 0x8010_aa01);
const _: () = assert!(UFFDIO_WAKE as u64 == 0x8010_aa02);
const _: () = assert!(size_of::<UffdioContinue>() == 32 && UFFDIO_CONTINUE as u64 == 0xc020_aa07);

/// What became of an attempt to let accesses in.
#[derive(Debug)]
pub(super) enum Continued {
    /// This many bytes from the start were let in, and their waiters woken.
    Mapped(u64),
    /// The first page had been let in before. Nobody was woken.
    Present,
    /// The file has no first page.
    Hole,
    /// Nothing was done; it may be tried again.
    Busy,
    /// The range is not within one mapping that is registered.
    NotOneMapping,
}

/// What the kernel tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    Fault { address: u64, minor: bool, write: bool },
    Other(u8),
}

pub(super) struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Agrees on [`FEATURES`] with the kernel; which it lacks.
    pub(super) fn agree(&self) -> io::Result<Vec<&'static str>> {
        let features = FEATURES.iter().fold(0, |features, (bit, _)| features | bit);
        if uffd::agree(&self.fd, features)? { Ok(Vec::new()) } else { uffd::lacking(&self.fd, FEATURES) }
    }

    /// Makes first accesses to `start..end` wait, whether the file has the page or not. May be repeated.
    pub(super) fn register(&self, start: u64, end: u64) -> io::Result<()> {
        let mode = REGISTER_MODE_MISSING | REGISTER_MODE_MINOR;
        // SAFETY: what waits is the other process, until it is let in: that is what `RemoteFaults`
        // is for, and what it promises to whoever drops it.
        unsafe { uffd::register(&self.fd, start, end, mode) }
    }

    /// Lets all accesses to `start..end` in, from now on.
    pub(super) fn unregister(&self, start: u64, end: u64) -> io::Result<()> {
        let mut range = UffdioRange { start, length: end - start };
        // SAFETY: the opcode is that of `UffdioRange`, which the kernel reads.
        unsafe { ioctl(&self.fd, Updater::<UFFDIO_UNREGISTER, _>::new(&mut range)) }.map_err(Into::into)
    }

    /// Has whoever waits for a page of `start..end` try again.
    pub(super) fn wake(&self, start: u64, end: u64) -> io::Result<()> {
        let mut range = UffdioRange { start, length: end - start };
        // SAFETY: the opcode is that of `UffdioRange`, which the kernel reads.
        unsafe { ioctl(&self.fd, Updater::<UFFDIO_WAKE, _>::new(&mut range)) }.map_err(Into::into)
    }

    /// Enters pages of the file into the process's page tables from `start` on, as far as `end` at most.
    pub(super) fn let_in(&self, start: u64, end: u64) -> io::Result<Continued> {
        let range = UffdioRange { start, length: end - start };
        let mut argument = UffdioContinue { range, mode: 0, mapped: 0 };
        // SAFETY: the opcode is that of `UffdioContinue`, which the kernel reads and writes in
        // place. What it changes is which pages of its file another process sees in its mapping.
        let result = unsafe { ioctl(&self.fd, Updater::<UFFDIO_CONTINUE, _>::new(&mut argument)) };
        match result {
            Ok(()) => Ok(Continued::Mapped(end - start)),
            Err(Errno::AGAIN) => Ok(match u64::try_from(argument.mapped) {
                Ok(mapped) if mapped > 0 => Continued::Mapped(mapped),
                _ => Continued::Busy,
            }),
            Err(Errno::EXIST) => Ok(Continued::Present),
            Err(Errno::FAULT) => Ok(Continued::Hole),
            Err(Errno::NOENT) => Ok(Continued::NotOneMapping),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Reads what is told of, without waiting; how many messages that is.
    pub(super) fn read(&self, messages: &mut [Message]) -> io::Result<usize> {
        match rustix::io::read(&self.fd, messages.as_flattened_mut()) {
            Ok(bytes) if bytes.is_multiple_of(MESSAGE_BYTES) => Ok(bytes / MESSAGE_BYTES),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Reads a `struct uffd_msg`: the event, seven bytes of nothing, flags, address.
pub(super) fn parse(message: &Message) -> Told {
    let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| message[at + byte]));
    match message[0] {
        EVENT_PAGEFAULT => Told::Fault {
            address: word(16),
            minor: word(8) & PAGEFAULT_FLAG_MINOR != 0,
            write: word(8) & PAGEFAULT_FLAG_WRITE != 0,
        },
        other => Told::Other(other),
    }
}

/// Whether `fdinfo` of a userfaultfd tells that exactly [`FEATURES`] were agreed on.
pub(super) fn has_our_features(fdinfo: &str) -> bool {
    let ours = FEATURES.iter().fold(0, |features, (bit, _)| features | bit);
    let api = fdinfo.lines().find_map(|line| line.strip_prefix("API:"));
    let features = api.and_then(|api| api.trim().split(':').nth(1));
    features
        .and_then(|features| u64::from_str_radix(features, 16).ok())
        .is_some_and(|features| features & !FEATURE_INITIALIZED == ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_faults_are_understood_and_others_told_apart() {
        let mut message = [0; MESSAGE_BYTES];
        message[0] = EVENT_PAGEFAULT;
        message[8] = 0b101;
        message[16..24].copy_from_slice(&0x7f00_1234_5000_u64.to_ne_bytes());
        let fault = Told::Fault { address: 0x7f00_1234_5000, minor: true, write: true };
        assert_eq!(parse(&message), fault);
        message[8] = 0;
        let fault = Told::Fault { address: 0x7f00_1234_5000, minor: false, write: false };
        assert_eq!(parse(&message), fault);
        message[0] = 0x13;
        assert_eq!(parse(&message), Told::Other(0x13));
    }

    #[test]
    fn a_userfaultfd_of_ours_is_known_by_its_features() {
        let fdinfo = |features: &str| {
            format!("pos:\t0\nflags:\t02004000\npending:\t0\ntotal:\t1\nAPI:\taa:{features}:9f\n")
        };
        assert!(has_our_features(&fdinfo("630")));
        assert!(has_our_features(&fdinfo("80000630")));
        assert!(!has_our_features(&fdinfo("0")));
        assert!(!has_our_features(&fdinfo("8000b001")));
        assert!(!has_our_features(&fdinfo("xyz")));
        assert!(!has_our_features("pos:\t0\nflags:\t02004000\n"));
    }
}
