//! A VM with a real RDMA stack, guests that prove themselves, and fixtures that run them under a real QEMU.
//!
//! A test boots a guest, moves it, and then asks it whether anything was lost:
//!
//! ```no_run
//! # use ramferry_lab::{Qemu, Workload};
//! # use std::time::Duration;
//! # fn main() -> anyhow::Result<()> {
//! let guest = Workload { mib: 64, rate_mib: 100, ..Workload::default() };
//! let source = Qemu::builder().proof(guest).start()?;
//! source.wait_ready(Duration::from_secs(20))?;
//! let destination = source.destination().start()?;
//! // Move it with `source.qmp_path()` and `destination.qmp_path()`, then:
//! assert_eq!(destination.verify(Duration::from_secs(20))?.errors, 0);
//! # Ok(())
//! # }
//! ```

mod authority;
mod binaries;
mod debian;
mod held_disk;
mod hugepages;
pub mod inside;
mod proof;
mod qemu;
mod scratch;
pub mod vm;

pub use authority::{Authority, Credentials};
pub use binaries::{QemuVersion, qemu_binary};
pub use debian::DebianGuest;
pub use held_disk::{HeldDisk, Releaser};
pub use hugepages::HugePages;
pub use proof::{Fill, Lost, PAGE_BYTES, Place, Tick, Verified, Workload};
pub use qemu::memory::{Backing, RamBlock, Role};
pub use qemu::serial::Line;
pub use qemu::{Accel, Guest, Machine, Qemu, QemuBuilder, downtime_seen, joined_lines};

/// Says on stderr why a test did not run. The test then returns.
pub fn skipped(reason: impl std::fmt::Display) {
    eprintln!("SKIPPED: {reason}");
}
