use std::time::Duration;

use crate::retry::Retry;
use crate::{Failure, Reason, State};

/// How far the VMM is with the device state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Not told to wait for it.
    Off,
    /// Being told.
    Starting,
    /// Waits for it.
    Ready { postcopy: bool },
    /// Has loaded it.
    Loaded,
}

/// What the destination does for the source right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Serving {
    /// Nothing; the next order may come.
    Nothing,
    /// Drains a round.
    Drain { round: u32 },
    /// Makes digests.
    Digest,
    /// Has the VMM wait for device state.
    Incoming { postcopy: bool },
    /// Takes note of what is owed.
    Hold,
}

#[derive(Clone, Debug)]
pub(super) struct Receiving {
    pub(super) incoming: Incoming,
    pub(super) serving: Serving,
    pub(super) rounds_ended: u32,
}

impl Receiving {
    pub(super) const BEGIN: Self =
        Self { incoming: Incoming::Off, serving: Serving::Nothing, rounds_ended: 0 };

    /// Whether the next order to do something may come: RAM is final once the device state is loaded, or what is
    /// `owed` is held.
    pub(super) fn takes_orders(&self, is_owed: bool) -> bool {
        self.serving == Serving::Nothing && self.incoming != Incoming::Loaded && !is_owed
    }

    /// Whether `round` is the one that ends next.
    pub(super) fn expects(&self, round: u32) -> bool {
        self.rounds_ended.checked_add(1) == Some(round)
    }

    /// Whether COMMIT may come.
    pub(super) fn is_complete(&self) -> bool {
        self.serving == Serving::Nothing && self.incoming == Incoming::Loaded
    }
}

/// The last record of the journal that was found after a restart.
#[derive(Clone, Debug)]
pub(super) enum Found {
    Prepared,
    Committed,
    /// COMMITTED, and memory is owed.
    Postcopy,
    Aborted(Failure),
}

#[derive(Clone, Debug)]
pub(super) enum Phase {
    /// Waits for `Start`.
    Pending,
    /// Waits for the first event after a restart.
    Restarted(Found),
    /// Waits for `Prepared`.
    Prepare,
    /// Takes the source's orders.
    Receiving(Receiving),
    /// COMMITTED is being written. `veto` is what came up meanwhile that speaks against it.
    Committing { veto: Option<Failure> },
    /// COMMITTED is durable; the guest is being resumed.
    Resuming(Retry),
    /// The guest runs; what it is owed is being read.
    Pulling,
    /// Memory is lost; the guest is being stopped, or, once that took too long, its VMM ended.
    Stopping { cause: Failure, retry: Retry, discards: bool },
    /// The guest runs; links are being let go.
    Running { after_postcopy: bool },
    /// The guest stands still for good; links are being let go.
    Lost { cause: Failure },
    /// ABORTED is being written.
    Aborting { cause: Failure, write: Retry, released: bool },
    /// ABORTED is durable; the guest is being discarded.
    Discarding { cause: Failure, discard: Option<Retry>, released: bool },
    /// Only answers.
    EndedRunning,
    /// Only answers.
    EndedAborted { cause: Failure },
    /// Only answers.
    EndedLost { cause: Failure },
}

impl Phase {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Restarted(_) => "restarted",
            Self::Prepare => "prepare",
            Self::Receiving(receiving) => match (receiving.serving, receiving.incoming) {
                (Serving::Drain { .. }, _) => "drain",
                (Serving::Digest, _) => "verify",
                (Serving::Incoming { .. }, _) => "incoming",
                (Serving::Hold, _) => "hold",
                (Serving::Nothing, Incoming::Off) => "receive",
                (Serving::Nothing, Incoming::Loaded) => "loaded",
                (Serving::Nothing, _) => "receive_last",
            },
            Self::Committing { .. } => "commit",
            Self::Resuming(_) => "resume",
            Self::Aborting { .. } => "abort",
            Self::Discarding { .. } => "discard",
            Self::Pulling => "pull",
            Self::Stopping { .. } => "stop",
            Self::Running { .. } | Self::Lost { .. } => "release",
            Self::EndedRunning | Self::EndedAborted { .. } | Self::EndedLost { .. } => "ended",
        }
    }

    pub(super) fn state(&self) -> State {
        match self {
            Self::Pending => State::Pending,
            Self::Prepare => State::Preparing,
            Self::Receiving(receiving) if receiving.incoming == Incoming::Off => State::Precopy,
            Self::Receiving(_)
            | Self::Committing { .. }
            | Self::Resuming(_)
            | Self::Running { after_postcopy: false } => State::SwitchingOver,
            Self::Pulling | Self::Stopping { .. } | Self::Running { .. } | Self::Lost { .. } => {
                State::Postcopy
            }
            Self::Restarted(Found::Committed | Found::Postcopy) => State::SwitchingOver,
            Self::Restarted(_) | Self::Aborting { .. } | Self::Discarding { .. } => State::Cancelling,
            Self::EndedRunning => State::Succeeded,
            Self::EndedAborted { cause } if cause.reason == Reason::Cancelled => State::Cancelled,
            Self::EndedAborted { .. } | Self::EndedLost { .. } => State::Failed,
        }
    }

    /// Whether the guest was ordered to resume here: it is never aborted any more.
    pub(super) fn may_have_run(&self) -> bool {
        match self {
            Self::Resuming(_) | Self::Pulling | Self::Stopping { .. } => true,
            Self::Running { .. } | Self::Lost { .. } | Self::EndedRunning | Self::EndedLost { .. } => true,
            Self::Pending | Self::Restarted(_) | Self::Prepare | Self::Receiving(_) => false,
            Self::Committing { .. } | Self::Aborting { .. } | Self::Discarding { .. } => false,
            Self::EndedAborted { .. } => false,
        }
    }

    /// When a retry is due.
    pub(super) fn retry_at(&self) -> Option<Duration> {
        match self {
            Self::Resuming(retry) | Self::Aborting { write: retry, .. } => retry.at(),
            Self::Discarding { discard: Some(retry), .. } | Self::Stopping { retry, .. } => retry.at(),
            Self::Restarted(_) => Some(Duration::ZERO),
            _ => None,
        }
    }
}
