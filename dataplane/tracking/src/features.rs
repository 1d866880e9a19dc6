//! What the running kernel, and what this process may do, have of what trackers are made of: one part at a time, so
//! that a self-test that fails can be told why.
#![allow(unsafe_code, reason = "userfaultfd(2) is marked unsafe: what is done with its descriptor may be")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::mm::UserfaultfdFlags;
use rustix::process::{PidfdFlags, PidfdGetfdFlags};

use crate::pagemap::{ScanError, Scanner};
use crate::postcopy;
use crate::remote_call::UFFD_USER_MODE_ONLY;
use crate::tracker::Afterwards;
use crate::uffd::{self, NamedFeatures};

/// Names of the features of userfaultfd that `uffd_wp` needs and this kernel lacks.
///
/// # Errors
/// When no userfaultfd can be had.
pub fn userfaultfd_lacks() -> io::Result<Vec<&'static str>> {
    lacking(uffd::WRITE_PROTECTION)
}

/// Names of the features of userfaultfd that post-copy needs at the destination and this kernel lacks.
///
/// # Errors
/// When no userfaultfd can be had.
pub fn postcopy_lacks() -> io::Result<Vec<&'static str>> {
    lacking(postcopy::FEATURES)
}

fn lacking(needed: &NamedFeatures) -> io::Result<Vec<&'static str>> {
    let flags = (rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK).bits();
    let flags = UserfaultfdFlags::from_bits_retain(flags | UFFD_USER_MODE_ONLY as u32);
    // SAFETY: nothing is registered with the descriptor, so that it changes nothing of this process' memory.
    let fd: OwnedFd = unsafe { rustix::mm::userfaultfd(flags) }?;
    uffd::lacking(&fd, needed)
}

/// Whether the kernel knows `PAGEMAP_SCAN`.
///
/// # Errors
/// When it does not, or this process may not read its own page map.
pub fn pagemap_scan() -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let ours = Box::new(0_u8);
    let page = (&raw const *ours as u64) & !0xfff;
    match Scanner::new().harvest(&pagemap, (page, page + 4096), Afterwards::Rearm, |_, _| {}) {
        // The page is not write-protected, which only a kernel that knows the call can tell.
        Ok(()) | Err(ScanError::NotProtected) => Ok(()),
        Err(ScanError::Failed(error)) => Err(error),
    }
}

/// Whether a descriptor can be taken from another process, tried on this one.
///
/// # Errors
/// When it cannot.
pub fn pidfd_getfd() -> io::Result<()> {
    let any = File::open("/proc/self/status")?;
    let ours = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&any.as_fd());
    rustix::process::pidfd_getfd(&ours, number, PidfdGetfdFlags::empty())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TrackerKind, self_test};

    #[test]
    fn uffd_wp_passes_its_test_only_where_every_part_is_there() {
        let parts = userfaultfd_lacks().is_ok_and(|lacking| lacking.is_empty())
            && pagemap_scan().is_ok()
            && pidfd_getfd().is_ok();
        assert!(parts || self_test(TrackerKind::UffdWp).is_err());
    }
}
