//! A userfaultfd: what every use of one begins with, and one that write-protects asynchronously.
#![allow(unsafe_code, reason = "ioctl(2) on a userfaultfd has no safe binding")]

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use crate::deputy;

/// Protocol version that `UFFDIO_API` agrees on.
const UFFD_API: u64 = 0xaa;
pub(crate) const UFFDIO: u8 = 0xaa;

const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const FEATURES: u64 =
    FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;

/// Features, each with its name in `linux/userfaultfd.h`.
pub(crate) type NamedFeatures = [(u64, &'static str)];

/// Of a [`WriteProtector`].
pub(crate) const WRITE_PROTECTION: &NamedFeatures = &[
    (FEATURE_PAGEFAULT_FLAG_WP, "UFFD_FEATURE_PAGEFAULT_FLAG_WP"),
    (FEATURE_WP_HUGETLBFS_SHMEM, "UFFD_FEATURE_WP_HUGETLBFS_SHMEM"),
    (FEATURE_WP_UNPOPULATED, "UFFD_FEATURE_WP_UNPOPULATED"),
    (FEATURE_WP_ASYNC, "UFFD_FEATURE_WP_ASYNC"),
];

const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
pub(crate) struct UffdioRange {
    pub(crate) start: u64,
    pub(crate) length: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

const UFFDIO_API: Opcode = opcode::read_write::<UffdioApi>(UFFDIO, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<UffdioRegister>(UFFDIO, 0x00);
const UFFDIO_WRITEPROTECT: Opcode = opcode::read_write::<UffdioWriteprotect>(UFFDIO, 0x06);

const _: () = assert!(size_of::<UffdioApi>() == 24 && UFFDIO_API as u64 == 0xc018_aa3f);
const _: () = assert!(size_of::<UffdioRegister>() == 32 && UFFDIO_REGISTER as u64 == 0xc020_aa00);
const _: () = assert!(size_of::<UffdioWriteprotect>() == 24 && UFFDIO_WRITEPROTECT as u64 == 0xc018_aa06);

/// Which of `needed` the kernel does not have, of a userfaultfd on which nothing was agreed yet.
pub(crate) fn lacking(fd: &OwnedFd, needed: &NamedFeatures) -> io::Result<Vec<&'static str>> {
    let mut api = UffdioApi { api: UFFD_API, features: 0, ioctls: 0 };
    // SAFETY: the opcode is that of `UffdioApi`, which the kernel reads and writes in place.
    unsafe { ioctl(fd, Updater::<UFFDIO_API, _>::new(&mut api)) }?;
    let absent = needed.iter().filter(|(bit, _)| api.features & bit == 0);
    Ok(absent.map(|(_, name)| *name).collect())
}

/// Agrees on `features` with the kernel. `false` when it lacks one; nothing is agreed on then.
pub(crate) fn agree(fd: &OwnedFd, features: u64) -> io::Result<bool> {
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the opcode is that of `UffdioApi`, which the kernel reads and writes in place.
    match unsafe { ioctl(fd, Updater::<UFFDIO_API, _>::new(&mut api)) } {
        Ok(()) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Registers `start..end` of the userfaultfd's process. May be repeated.
///
/// # Safety
/// That process must be able to bear what `mode` makes of its accesses: somebody must answer its faults.
pub(crate) unsafe fn register(fd: &OwnedFd, start: u64, end: u64, mode: u64) -> io::Result<()> {
    let range = UffdioRange { start, length: end - start };
    let mut register = UffdioRegister { range, mode, ioctls: 0 };
    // SAFETY: the opcode is that of `UffdioRegister`; the caller answers for what it changes.
    unsafe { ioctl(fd, Updater::<UFFDIO_REGISTER, _>::new(&mut register)) }.map_err(Into::into)
}

/// A userfaultfd in asynchronous write-protect mode. Dropping it lifts every
/// protection and registration made through it.
pub(crate) struct WriteProtector {
    /// `None` only within the drop.
    fd: Option<OwnedFd>,
}

impl WriteProtector {
    /// Agrees on the features needed with the kernel. `Ok(None)` when it lacks one.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Option<Self>> {
        Ok(agree(&fd, FEATURES)?.then_some(Self { fd: Some(fd) }))
    }

    /// Registers `start..end` of its process. May be repeated.
    pub(crate) fn register(&self, start: u64, end: u64) -> io::Result<()> {
        // SAFETY: asynchronous write-protection lets every access go through; no fault waits for an answer.
        unsafe { register(self.fd(), start, end, REGISTER_MODE_WP) }
    }

    /// Write-protects every page of `start..end`, present or not.
    pub(crate) fn protect(&self, start: u64, end: u64) -> io::Result<()> {
        let range = UffdioRange { start, length: end - start };
        let mut protect = UffdioWriteprotect { range, mode: WRITEPROTECT_MODE_WP };
        // SAFETY: the opcode is that of `UffdioWriteprotect`. A write to a page protected so is
        // noted by the kernel and goes through.
        unsafe { ioctl(self.fd(), Updater::<UFFDIO_WRITEPROTECT, _>::new(&mut protect)) }.map_err(Into::into)
    }

    fn fd(&self) -> &OwnedFd {
        self.fd.as_ref().expect("it is there until the drop")
    }
}

impl Drop for WriteProtector {
    fn drop(&mut self) {
        // A fork's copy would keep the registration alive after us.
        deputy::while_no_fork(|| drop(self.fd.take()));
    }
}
