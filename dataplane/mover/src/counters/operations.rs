//! What became of the operations that were posted, and how long each took.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use ramferry_fabric::{HardwareFault, LinkError, OpError};

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opcode {
    /// Moves bytes to the peer.
    Write,
    /// Proves that what was posted before it is placed.
    Fence,
    /// Moves bytes from the peer.
    Read,
}

impl Opcode {
    /// Every opcode.
    pub const ALL: [Opcode; 3] = [Opcode::Write, Opcode::Fence, Opcode::Read];

    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Opcode::Write => "write",
            Opcode::Fence => "fence",
            Opcode::Read => "read",
        }
    }
}

/// How an operation ended. One that a dying link did not carry out counts under
/// what killed the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionStatus {
    /// Carried out.
    Success,
    /// The peer refused it.
    RemoteAccess,
    /// The peer acknowledged nothing, however often it was sent.
    RetryExceeded,
    /// The peer was not ready for a message.
    ReceiverNotReady,
    /// This side's memory was refused to it.
    LocalProtection,
    /// The device or its port failed.
    Device,
    /// The connection broke, or the peer ended it.
    LinkLost,
    /// Anything else.
    Other,
}

impl CompletionStatus {
    /// Every status.
    pub const ALL: [CompletionStatus; 8] = [
        CompletionStatus::Success,
        CompletionStatus::RemoteAccess,
        CompletionStatus::RetryExceeded,
        CompletionStatus::ReceiverNotReady,
        CompletionStatus::LocalProtection,
        CompletionStatus::Device,
        CompletionStatus::LinkLost,
        CompletionStatus::Other,
    ];

    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            CompletionStatus::Success => "success",
            CompletionStatus::RemoteAccess => "remote_access",
            CompletionStatus::RetryExceeded => "retry_exceeded",
            CompletionStatus::ReceiverNotReady => "receiver_not_ready",
            CompletionStatus::LocalProtection => "local_protection",
            CompletionStatus::Device => "device",
            CompletionStatus::LinkLost => "link_lost",
            CompletionStatus::Other => "other",
        }
    }
}

impl From<&Result<(), OpError>> for CompletionStatus {
    fn from(result: &Result<(), OpError>) -> Self {
        match result {
            Ok(()) => CompletionStatus::Success,
            Err(OpError::RemoteAccess(_)) => CompletionStatus::RemoteAccess,
            Err(OpError::LinkDead(cause)) => of_dead_link(cause),
            Err(_) => CompletionStatus::Other,
        }
    }
}

fn of_dead_link(cause: &LinkError) -> CompletionStatus {
    match cause {
        LinkError::RemoteAccess(_) => CompletionStatus::RemoteAccess,
        LinkError::LocalMemory => CompletionStatus::LocalProtection,
        LinkError::Lost(_) | LinkError::PeerClosed | LinkError::SessionEnded | LinkError::TimedOut { .. } => {
            CompletionStatus::LinkLost
        }
        LinkError::Hardware { fault, .. } => match fault {
            HardwareFault::PathLost => CompletionStatus::RetryExceeded,
            HardwareFault::ReceiverNotReady => CompletionStatus::ReceiverNotReady,
            HardwareFault::LocalProtection => CompletionStatus::LocalProtection,
            HardwareFault::QueuePair
            | HardwareFault::CompletionQueue
            | HardwareFault::PortDown
            | HardwareFault::DeviceFailed
            | HardwareFault::DeviceRemoved => CompletionStatus::Device,
            _ => CompletionStatus::Other,
        },
        _ => CompletionStatus::Other,
    }
}

/// Bounds of [`OperationCounts::latency`] but the last, which has none.
const LATENCY_BOUNDS: usize = 25;

/// The operations of one opcode, up to one moment. Everything only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OperationCounts {
    /// Taken by a link.
    pub posted: u64,
    /// Ended, in the order of [`CompletionStatus::ALL`].
    pub completed: [u64; CompletionStatus::ALL.len()],
    /// Those that took from their posting to their end at most 1 us, at most 2 us and
    /// longer than that, and so on doubling to 16.777216 s; last those that took longer.
    pub latency: [u64; LATENCY_BOUNDS + 1],
    /// All of these times together.
    pub latency_sum: Duration,
}

impl OperationCounts {
    /// What came since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            posted: self.posted - before.posted,
            completed: std::array::from_fn(|index| self.completed[index] - before.completed[index]),
            latency: std::array::from_fn(|index| self.latency[index] - before.latency[index]),
            latency_sum: self.latency_sum.saturating_sub(before.latency_sum),
        }
    }

    /// Takes those of `other` in.
    pub fn add(&mut self, other: &Self) {
        self.posted += other.posted;
        self.latency_sum = self.latency_sum.saturating_add(other.latency_sum);
        let (completed, latency) = (self.completed.iter_mut(), self.latency.iter_mut());
        completed.zip(other.completed).for_each(|(total, more)| *total += more);
        latency.zip(other.latency).for_each(|(total, more)| *total += more);
    }

    /// Posted, and not ended.
    pub fn in_flight(&self) -> u64 {
        self.posted.saturating_sub(self.completed.iter().sum())
    }
}

/// Counts the operations of one opcode.
#[derive(Debug, Default)]
pub(super) struct Operations {
    posted: AtomicU64,
    completed: [AtomicU64; CompletionStatus::ALL.len()],
    latency: [AtomicU64; LATENCY_BOUNDS + 1],
    latency_nanoseconds: AtomicU64,
}

impl Operations {
    pub(super) fn add_posted(&self) {
        self.posted.fetch_add(1, Relaxed);
    }

    pub(super) fn add_completed(&self, status: CompletionStatus, took: Duration) {
        self.latency[bucket(took)].fetch_add(1, Relaxed);
        super::add_duration(&self.latency_nanoseconds, took);
        self.completed[status as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn read(&self) -> OperationCounts {
        // What has ended before what was posted: never more of the former.
        let completed = std::array::from_fn(|index| self.completed[index].load(Relaxed));
        OperationCounts {
            completed,
            latency: std::array::from_fn(|index| self.latency[index].load(Relaxed)),
            latency_sum: Duration::from_nanos(self.latency_nanoseconds.load(Relaxed)),
            posted: self.posted.load(Relaxed),
        }
    }
}

fn bucket(took: Duration) -> usize {
    let microseconds = took.as_nanos().div_ceil(1000).clamp(1, 1 << LATENCY_BOUNDS);
    (microseconds.next_power_of_two().trailing_zeros() as usize).min(LATENCY_BOUNDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_falls_under_the_least_bound_that_is_not_below_it() {
        let of = |nanoseconds| bucket(Duration::from_nanos(nanoseconds));
        assert_eq!((of(0), of(1), of(1000), of(1001), of(2000), of(2001)), (0, 0, 0, 1, 1, 2));
        assert_eq!((of(16_777_216_000), of(16_777_216_001)), (24, 25));
        assert_eq!(bucket(Duration::MAX), 25);
    }

    #[test]
    fn a_path_that_is_lost_is_told_from_a_peer_that_refuses() {
        let hardware = |fault| OpError::LinkDead(LinkError::Hardware { device: "rxe0".into(), fault });
        let of = |error| CompletionStatus::from(&Err(error));
        assert_eq!(of(hardware(HardwareFault::PathLost)), CompletionStatus::RetryExceeded);
        assert_eq!(of(hardware(HardwareFault::PortDown)), CompletionStatus::Device);
        assert_eq!(of(OpError::LinkDead(LinkError::PeerClosed)), CompletionStatus::LinkLost);
        let refused = ramferry_fabric::AccessFault::Rights;
        assert_eq!(of(OpError::RemoteAccess(refused)), CompletionStatus::RemoteAccess);
        assert_eq!(CompletionStatus::from(&Ok(())), CompletionStatus::Success);
    }

    #[test]
    fn what_was_posted_and_has_not_ended_is_in_flight() {
        let operations = Operations::default();
        let before = operations.read();
        for _ in 0..3 {
            operations.add_posted();
        }
        operations.add_completed(CompletionStatus::Success, Duration::from_micros(3));
        operations.add_completed(CompletionStatus::LinkLost, Duration::from_micros(5));
        let counts = operations.read().since(&before);
        assert_eq!((counts.posted, counts.in_flight()), (3, 1));
        assert_eq!(counts.completed[CompletionStatus::LinkLost as usize], 1);
        assert_eq!((counts.latency[2], counts.latency[3]), (1, 1));
        assert_eq!(counts.latency_sum, Duration::from_micros(8));
    }
}
