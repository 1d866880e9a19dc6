use std::fmt;
use std::io;

use ramferry_ram::{BlockIndex, RamError};
use thiserror::Error;

use crate::error::TrackError;
use crate::remote_call::RemoteCallError;

/// How a process reaches a RAM file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It has it mapped.
    Maps,
    /// It has it open, and may read or map it at any time.
    Holds {
        /// The descriptor.
        descriptor: u32,
    },
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Maps => f.write_str("has it mapped"),
            Self::Holds { descriptor } => write!(f, "has it open as descriptor {descriptor}"),
        }
    }
}

/// Why a VMM's accesses cannot be made to wait, or be let in.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FaultsError {
    /// The VMM ended, and its guest with it.
    #[error("the guest's process {vmm} ended")]
    Ended {
        /// The VMM.
        vmm: u32,
    },
    /// The RAM files cannot be served, or processes not be looked at.
    #[error("the guest's RAM cannot be served page by page")]
    Files(#[source] TrackError),
    /// Our own mapping of them is for reading only.
    #[error("the guest's RAM must be mapped for writing to be served page by page")]
    ReadOnly,
    /// A process besides the VMM reaches a RAM file, and would read pages that have not come yet.
    #[error(
        "process {pid} ({comm}) would read RAM of the guest that has not arrived: it {reach}; end it, or migrate without post-copy"
    )]
    OtherProcess {
        /// The process.
        pid: u32,
        /// Its name.
        comm: String,
        /// How it reaches which file.
        reach: Reach,
    },
    /// The VMM has a RAM file mapped privately.
    #[error(
        "process {vmm} has the RAM file of {block} mapped privately at {start:#x}: give the guest's memory share=on"
    )]
    Private {
        /// The VMM.
        vmm: u32,
        /// Where.
        start: u64,
        /// The block whose file it is.
        block: BlockIndex,
    },
    /// Faults of the kernel on the VMM's behalf, as KVM makes them, would not be told of.
    #[error(
        "process {vmm} may not have a userfaultfd that is told of the kernel's faults, which KVM and vhost make: set \
         vm.unprivileged_userfaultfd=1, or start the VMM with CAP_SYS_PTRACE"
    )]
    KernelFaultsDenied {
        /// The VMM.
        vmm: u32,
    },
    /// The VMM could not be made to call.
    #[error("the guest's process {vmm} cannot be made to wait for its memory")]
    RemoteCall {
        /// The VMM.
        vmm: u32,
        /// Why.
        #[source]
        source: RemoteCallError,
    },
    /// The kernel lacks a feature of userfaultfd.
    #[error("the kernel lacks {}: post-copy needs 5.14 or newer, with CONFIG_USERFAULTFD", lacking.join(", "))]
    KernelTooOld {
        /// Names of the features.
        lacking: Vec<&'static str>,
    },
    /// A userfaultfd of somebody else serves a mapping.
    #[error(
        "the mapping of process {vmm} at {start:#x} already has a userfaultfd, of another post-copy or a background snapshot: end that first"
    )]
    AlreadyRegistered {
        /// The VMM.
        vmm: u32,
        /// Start of the mapping.
        start: u64,
    },
    /// A mapping is not one that can be served.
    #[error(
        "the mapping of process {vmm} at {start:#x} cannot be served: its RAM file must be on tmpfs or hugetlbfs, and open for writing there"
    )]
    CannotRegister {
        /// The VMM.
        vmm: u32,
        /// Start of the mapping.
        start: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is nothing, or not all there was, to be taken over.
    #[error("the RAM of process {vmm} does not wait, wholly, for an agent that died")]
    NotArmed {
        /// The VMM.
        vmm: u32,
    },
    /// The VMM mapped, moved or unmapped a RAM file.
    #[error("process {vmm} changed its mapping of the guest's RAM at {start:#x} while it was being served")]
    MappingChanged {
        /// The VMM.
        vmm: u32,
        /// A mapping that is not as it was.
        start: u64,
    },
    /// A fault was told of that is none of ours.
    #[error("a fault at {address:#x} is in no mapping of the guest's RAM")]
    ForeignAddress {
        /// Where.
        address: u64,
    },
    /// Something was told of that was not asked for.
    #[error("the kernel told of an event {event:#x}, which was not asked for")]
    UnknownEvent {
        /// Its number.
        event: u8,
    },
    /// Pages that are not the block's.
    #[error("{count} pages from {first} on are not pages of {block}")]
    OutOfBlock {
        /// The block.
        block: BlockIndex,
        /// The first page.
        first: u64,
        /// Their number.
        count: u64,
    },
    /// A hole could not be filled.
    #[error("the guest waits for a page that cannot be allocated")]
    Ram(#[source] RamError),
    /// The kernel put it off too often.
    #[error("{operation} was put off by the kernel again and again")]
    Busy {
        /// What was put off.
        operation: &'static str,
    },
    /// Another operation failed.
    #[error("{operation} failed")]
    Failed {
        /// What failed.
        operation: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl FaultsError {
    /// Whether there is no VMM any more.
    pub fn vmm_ended(&self) -> bool {
        matches!(self, Self::Ended { .. })
    }

    /// What a failed call on the userfaultfd of `vmm` means.
    pub(super) fn of_call(vmm: u32, operation: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ESRCH) => Self::Ended { vmm },
            _ => Self::Failed { operation, source },
        }
    }
}
