use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Why a migration did not succeed: what programs read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// A link of the fabric died.
    LinkLost,
    /// The control stream to the other agent ended.
    PeerLost,
    /// The other agent refused an order, or broke the protocol.
    PeerRefused,
    /// The VMM failed at something it was told to do, or ended.
    GuestFailed,
    /// Writes of the guest can no longer be told.
    TrackerFailed,
    /// Memory could not be registered with the fabric.
    RegistrationFailed,
    /// A record could not be written to the journal.
    JournalFailed,
    /// Rounds bring the migration no nearer to its downtime.
    NotConverging,
    /// The migration took longer than its timeout.
    Timeout,
    /// RAM differed between source and destination.
    VerifyFailed,
    /// It was cancelled.
    Cancelled,
    /// The destination gave up.
    DestinationAborted,
    /// An agent was restarted while it migrated.
    AgentRestarted,
    /// A fault of ours.
    Internal,
    /// One step took longer than it may.
    StepTimeout,
    /// The guest cannot be throttled. No migration ends by it: it is what holds one up.
    ThrottleFailed,
    /// The guest ran at the destination, and memory that it needs there cannot be had from the source again.
    MemoryLost,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 17] = [
        Self::LinkLost,
        Self::PeerLost,
        Self::PeerRefused,
        Self::GuestFailed,
        Self::TrackerFailed,
        Self::RegistrationFailed,
        Self::JournalFailed,
        Self::NotConverging,
        Self::Timeout,
        Self::VerifyFailed,
        Self::Cancelled,
        Self::DestinationAborted,
        Self::AgentRestarted,
        Self::Internal,
        Self::StepTimeout,
        Self::ThrottleFailed,
        Self::MemoryLost,
    ];

    /// The reason as the API, the journal and the metrics write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LinkLost => "LINK_LOST",
            Self::PeerLost => "PEER_LOST",
            Self::PeerRefused => "PEER_REFUSED",
            Self::GuestFailed => "GUEST_FAILED",
            Self::TrackerFailed => "TRACKER_FAILED",
            Self::RegistrationFailed => "REGISTRATION_FAILED",
            Self::JournalFailed => "JOURNAL_FAILED",
            Self::NotConverging => "NOT_CONVERGING",
            Self::Timeout => "TIMEOUT",
            Self::VerifyFailed => "VERIFY_FAILED",
            Self::Cancelled => "CANCELLED",
            Self::DestinationAborted => "DESTINATION_ABORTED",
            Self::AgentRestarted => "AGENT_RESTARTED",
            Self::Internal => "INTERNAL",
            Self::StepTimeout => "STEP_TIMEOUT",
            Self::ThrottleFailed => "THROTTLE_FAILED",
            Self::MemoryLost => "MEMORY_LOST",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Reason {
    type Err = UnknownReason;

    fn from_str(text: &str) -> Result<Self, UnknownReason> {
        let known = Self::ALL.into_iter().find(|reason| reason.as_str() == text);
        known.ok_or_else(|| UnknownReason(text.to_owned()))
    }
}

/// A reason that this version does not know.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is not a reason for the end of a migration that this version knows")]
pub struct UnknownReason(pub String);

/// Why a migration did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{reason}: {message}")]
pub struct Failure {
    /// For programs.
    pub reason: Reason,
    /// For people: what happened, and what to do.
    pub message: String,
}

impl Failure {
    /// A failure for `reason`.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// What the source reports when the destination gave up because of `cause`.
    pub(crate) fn destination_aborted(cause: &Failure) -> Self {
        Self::new(Reason::DestinationAborted, format!("the destination gave up: {cause}"))
    }

    /// What both sides report when the guest's memory cannot be had from the source again, because of `cause`.
    pub(crate) fn memory_lost(cause: &Failure) -> Self {
        if cause.reason == Reason::MemoryLost {
            return cause.clone();
        }
        let message = format!(
            "memory that the guest had left at the source is lost: {cause}. The guest is stopped at the destination, \
             and does not run at the source: start it again, as after a power failure"
        );
        Self::new(Reason::MemoryLost, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_read_back_as_it_is_written() {
        for reason in Reason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(reason));
        }
        assert_eq!("BAD_LUCK".parse::<Reason>(), Err(UnknownReason("BAD_LUCK".into())));
    }
}
