//! The threads that carry out what a migration engine decides: on the source,
//! one driver that runs the engine, harvests and paces; one copying thread a
//! link; a few that register windows ahead of the copy. On the destination, one
//! driver and the registering threads: memory arrives without its help.
//!
//! What is not memory (the guest, the journal, the peer's control stream) is
//! left to whoever implements [`SourceOutside`] and [`DestinationOutside`].

mod batch;
mod copy;
mod counters;
mod destination;
pub mod marks;
mod pacer;
mod pool;
mod pull;
mod recheck;
mod served;
mod source;
mod worker;

use std::sync::Weak;
use std::time::{Duration, Instant};

use ramferry_fabric::windows::{Window, WindowError, WindowId};
use ramferry_fabric::{LinkError, OpError, PostError, RegisterError};
use ramferry_ram::{BlockIndex, Memory, OwedError, PageRun, RamError};
use ramferry_tracking::TrackError;
use ramferry_tracking::postcopy::FaultsError;
use thiserror::Error;

pub use copy::SendOrder;
pub use counters::{
    CompletionStatus, Counted, Opcode, OperationCounts, Registered, RegistrationEvents, Stall,
};
pub use destination::{
    DestinationHandle, DestinationInput, DestinationOutside, DestinationParts, DestinationSnapshot,
    PeerAnswer, PostcopyParts, Retaken, SendAnswer, reads_lost, spawn_destination,
};
pub use pull::{FAULT_LINKS, Readers};
pub use served::{Place, RegisteredWindow, SendWindowsAnswer, WindowsAnswer};
pub use source::{Lent, SourceHandle, SourceInput, SourceOutside, SourceParts, SourceSnapshot, spawn_source};

/// An action that a driver is about to carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The action's name.
    pub action: &'static str,
    /// The engine's phase.
    pub phase: &'static str,
    /// The round under way; none before the first, and where the action is of none.
    pub round: Option<u32>,
}

/// An order of the source's data plane to the destination's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerOrder {
    /// Register these ranges, for remote writes.
    RegisterWindows(Vec<Window>),
    /// Release these windows.
    ReleaseWindows(Vec<WindowId>),
    /// Make these pages zero.
    ZeroPages {
        /// Their block.
        block: BlockIndex,
        /// Runs of pages, ascending.
        runs: Vec<PageRun>,
    },
}

/// Why the data plane cannot go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MoverError {
    /// Guest RAM could not be reached.
    #[error("cannot reach the guest's RAM: {0}")]
    Ram(#[from] RamError),
    /// The tracker failed.
    #[error("cannot track the guest's writes: {0}")]
    Track(#[from] TrackError),
    /// The VMM's accesses cannot be held up and let in.
    #[error("cannot serve the guest's accesses in post-copy: {0}")]
    Faults(#[from] FaultsError),
    /// It cannot be told what of its memory the guest has.
    #[error("cannot keep account of what the guest is owed: {0}")]
    Owed(#[from] OwedError),
    /// What was under way was given up.
    #[error("the copy was stopped")]
    Stopped,
    /// A window was not registered on this side.
    #[error("cannot register memory: {0}")]
    Registration(#[source] RegisterError),
    /// A window was not registered on the other side.
    #[error("the destination cannot register memory: {message}")]
    RemoteRegistration {
        /// The destination's reason.
        message: String,
    },
    /// The registration policy cannot work with what it was given.
    #[error("the registration policy cannot be carried out: {0}")]
    Windows(#[from] WindowError),
    /// The link did not take an operation.
    #[error("the link took no operation: {0}")]
    Post(#[source] PostError),
    /// An operation failed.
    #[error("an operation on the other side's memory failed: {0}")]
    Operation(#[source] OpError),
    /// The link died.
    #[error("the link is lost: {0}")]
    Link(#[source] LinkError),
    /// The kernel gave no thread.
    #[error("cannot start a thread; raise the limit of tasks (TasksMax, RLIMIT_NPROC): {0}")]
    Thread(#[source] std::io::Error),
    /// A defect of ours.
    #[error("a copying thread ended by itself; report it with the agent's log")]
    ThreadEnded,
    /// Nothing moved for too long.
    #[error("no progress for {limit:?} while waiting for {cause}: is the network or the destination stuck?")]
    Stalled {
        /// What was waited for.
        cause: &'static str,
        /// How long.
        limit: Duration,
    },
}

/// Waits, for a moment at most, until nobody holds a guest's memory: threads of
/// links and registrations end by themselves. What comes next with this guest, a
/// migration onwards, must not find us still at its RAM files.
fn wait_until_gone(memory: &Weak<Memory>) {
    const PATIENCE: Duration = Duration::from_secs(1);
    const NAP: Duration = Duration::from_millis(1);
    let started = Instant::now();
    while memory.strong_count() > 0 && started.elapsed() < PATIENCE {
        std::thread::sleep(NAP);
    }
}
