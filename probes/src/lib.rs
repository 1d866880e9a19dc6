//! What registering memory costs on this host, of any process, seen through eBPF.
//!
//! ```text
//!   any process        ibv_reg_mr, ibv_dereg_mr ... <-- uprobes (objects/uprobes.bpf.o)
//!   its driver         ibv_cmd_reg_mr           <-- uretprobe: why it failed
//!   ---------------------------------------------------------------------------------------
//!   the kernel         ib_uverbs_reg_mr         <-- kprobes (objects/kernel.bpf.o, optional)
//!                        ib_umem_get            <-- the pinning of pages alone
//!                          try_to_compact_pages <-- what makes it stall
//! ```
//!
//! The programs add to histograms in maps, which [`Probes::read`] reads: nothing
//! is sent an event at a time, and nothing is sampled. Each probe attaches by
//! itself, or says why not ([`Absence`]); a host where none can attach gives
//! [`Probes`] that have seen nothing, never an error.

pub use absence::Absence;
pub use histogram::{BOUNDS_US, Histogram, SLOTS};
pub use library::standard_libraries;
pub use load::{Options, Probes};
pub use probe::{Absent, Probe, ProbeState, absences};
pub use reading::{Activity, Filter, Operation, Pressure, SizeClass, Snapshot};

mod absence;
mod capabilities;
mod histogram;
mod library;
mod load;

mod probe;
mod reading;
mod records;
mod symbols;
