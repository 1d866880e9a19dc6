//! The VMM that runs a guest, seen from outside it: what its RAM is, whether it
//! can be migrated, and how it is paused, resumed and handed over.
//!
//! [`Guest`] is what a migration asks of a VMM; [`Qemu`] is an unmodified QEMU
//! reached through its QMP socket by [`QmpClient`].

mod error;
mod guest;
mod qemu;
mod qmp;

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub use qemu::fuzzing;

pub use error::{GuestError, Step};
pub use guest::{Guest, GuestFuture, GuestInfo, GuestStatus, Paused, Resumed, Side, Timeouts};
pub use qemu::Qemu;
pub use qmp::{Ended, QmpClient, QmpError, QmpEvent, QmpSocket, Version};
