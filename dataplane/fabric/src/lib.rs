//! Links: the way of a guest's RAM from one agent to another, by one-sided
//! operations on registered memory.
//!
//! A [`Domain`] is one side's registered memory of one session. A [`Link`] is
//! one connection; the side that posts names a place in its own registered
//! memory and one in the peer's. A listener of a fabric admits the peers of a
//! session ([`Admission`]) to a domain for as long as the session lives.
//!
//! ```text
//!  source agent                                 destination agent
//!  Domain  <- register windows                  Domain  <- register windows
//!    |                                            |
//!  Link -- post_write(local, remote) ---------> Admission (checks key, bounds, rights)
//!    |  -- post_fence ----------------------->    |
//!    `- poll <--------------- placed ------------'
//! ```
//!
//! Here are the fabrics [`shm`] (both agents on one host) and [`tcp`]. Both
//! register by pinning ([`MappedDomain`]). The feature `conformance` has the
//! suite that every fabric has to pass, and a link that injects faults; `limits`,
//! what a fabric is measured beside.

#[cfg(feature = "conformance")]
pub mod conformance;
mod domain;
#[cfg(feature = "conformance")]
pub mod faulty;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod hello;
#[cfg(feature = "limits")]
pub mod limits;
mod link;
pub mod regions;
mod session;
pub mod shm;
pub mod tcp;
mod token;
pub mod windows;

pub use domain::{Domain, MappedDomain, Region, RegisterError, Rights};
pub use link::{
    AccessFault, Completion, FabricKind, HardwareFault, InvalidOperation, Link, LinkError,
    MAX_TRANSFER_BYTES, OpError, OpId, Place, PostError, RegionKey, Transfer,
};
pub use session::Admission;
pub use token::SessionToken;

/// Registered memory of a session over [`tcp`].
pub type TcpDomain = MappedDomain;
/// Registered memory of a session over [`shm`].
pub type ShmDomain = MappedDomain;
