mod mapped;

use std::io;
use std::time::Duration;

use ramferry_ram::{BlockRange, RamError};
use rustix::io::Errno;
use thiserror::Error;

use crate::RegionKey;

pub use mapped::MappedDomain;
pub(crate) use mapped::{Mirror, RegionUse};

/// What the peer may do with a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// Write to it.
    pub remote_write: bool,
    /// Read it.
    pub remote_read: bool,
}

impl Rights {
    /// For operations that this side posts only.
    pub const LOCAL: Rights = Rights { remote_write: false, remote_read: false };
    /// The peer writes.
    pub const REMOTE_WRITE: Rights = Rights { remote_write: true, remote_read: false };
    /// The peer reads.
    pub const REMOTE_READ: Rights = Rights { remote_write: false, remote_read: true };
}

/// A registered range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its key, at both sides.
    pub key: RegionKey,
    /// What was registered.
    pub range: BlockRange,
}

/// One side's registered memory of one session.
///
/// An implementation *must* give keys that cannot be guessed and that are never
/// used again within the session, must end the key's use before `deregister`
/// returns well, and must bound every wait. Regions of one domain never overlap.
///
/// A caller *may rely on* both calls being usable from any thread at once; they
/// block. Whatever is registered is released with the domain.
pub trait Domain: Send + Sync {
    /// Pins a range of whole pages and makes it usable for operations.
    ///
    /// # Errors
    /// Nothing was registered.
    fn register(&self, range: BlockRange, rights: Rights) -> Result<Region, RegisterError>;

    /// Makes a region unusable, waits for the operations under way in it, then
    /// unpins it.
    ///
    /// # Errors
    /// [`RegisterError::InUse`] when operations did not end in time: no operation
    /// of this side begins in the region any more, the memory is still pinned, and
    /// the call may be made again.
    fn deregister(&self, key: RegionKey) -> Result<(), RegisterError>;

    /// Bytes pinned now.
    fn pinned_bytes(&self) -> u64;
}

/// Why memory was not registered or deregistered.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The range is empty or not within a block.
    #[error("{} bytes at {:#x} of {} are not within it", range.length, range.offset, range.block)]
    Range {
        /// What was to be registered.
        range: BlockRange,
    },
    /// The range is not whole pages.
    #[error(
        "{} bytes at {:#x} of {} are not whole pages of {page_bytes} bytes", range.length, range.offset, range.block
    )]
    Misaligned {
        /// What was to be registered.
        range: BlockRange,
        /// The block's page size.
        page_bytes: u64,
    },
    /// Part of the range is registered already.
    #[error(
        "{} bytes at {:#x} of {} overlap a region: deregister that first", range.length, range.offset, range.block
    )]
    Overlap {
        /// What was to be registered.
        range: BlockRange,
    },
    /// The peer is to write to memory that this side may only read.
    #[error("the peer cannot be given the right to write: this side's RAM files are open for reading only")]
    ReadOnly,
    /// The memory could not be made present.
    #[error("the memory cannot be made present: {0}")]
    Ram(#[source] RamError),
    /// A link has room for no more regions.
    #[error("there are too many regions: use larger windows")]
    TooManyRegions,
    /// No region has the key.
    #[error("no region has this key")]
    UnknownKey,
    /// Operations under way in the region did not end.
    #[error("operations under way in the region did not end within {waited:?}: try again, or end the link")]
    InUse {
        /// How long that was waited for.
        waited: Duration,
    },
    /// The kernel gave no randomness for a key.
    #[error("the kernel gives no randomness for a key")]
    Random(#[source] getrandom::Error),
    /// The limit of locked memory is reached.
    #[error(
        "cannot pin {needed_bytes} bytes: RLIMIT_MEMLOCK is {limit_bytes} bytes, of which {pinned_bytes} are pinned. \
         Raise it for the agent (systemd: LimitMEMLOCK=infinity; container: --ulimit memlock=-1:-1; shell: \
         ulimit -l unlimited), give it CAP_IPC_LOCK, or set a lower pin budget"
    )]
    PinLimit {
        /// What was to be pinned.
        needed_bytes: u64,
        /// What this process has pinned already.
        pinned_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The kernel pins only memory that is mapped for writing, also to read it.
    #[error(
        "this kernel pins only memory that is mapped for writing (before Linux 6.2), and this side's RAM files are \
         open for reading only: let the agent open them for writing, or upgrade the kernel"
    )]
    PinsWritableOnly,
    /// The fabric's own reason.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

impl RegisterError {
    /// The kernel's error number, where the kernel was asked.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            RegisterError::PinLimit { .. } => Some(Errno::NOMEM.raw_os_error()),
            RegisterError::PinsWritableOnly => Some(Errno::FAULT.raw_os_error()),
            error => std::iter::successors(std::error::Error::source(error), |error| error.source())
                .find_map(|error| error.downcast_ref::<io::Error>()?.raw_os_error()),
        }
    }
}

impl From<RamError> for RegisterError {
    fn from(error: RamError) -> Self {
        match error {
            RamError::ReadOnly => RegisterError::ReadOnly,
            other => RegisterError::Ram(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_registration_names_the_kernels_error_where_there_is_one() {
        let refused = io::Error::from_raw_os_error(Errno::PERM.raw_os_error());
        let system = RegisterError::System { what: "register memory", source: refused };
        assert_eq!(system.raw_os_error(), Some(Errno::PERM.raw_os_error()));
        let limit = RegisterError::PinLimit { needed_bytes: 1, pinned_bytes: 0, limit_bytes: 0 };
        assert_eq!(limit.raw_os_error(), Some(Errno::NOMEM.raw_os_error()));
        let full = io::Error::from_raw_os_error(Errno::NOSPC.raw_os_error());
        let ram = RegisterError::from(RamError::File { what: "allocate", source: full });
        assert_eq!(ram.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
        assert_eq!(RegisterError::TooManyRegions.raw_os_error(), None);
    }
}
