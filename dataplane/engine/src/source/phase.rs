use std::time::Duration;

use super::ending::Ending;
use crate::{Failure, State, limits};

/// What a source waits for.
#[derive(Clone, Debug)]
pub(super) enum Phase {
    /// `Start`.
    Pending,
    /// The first event after a restart, with no HANDED_OVER in the journal.
    Restarted,
    /// `Prepared`.
    Prepare,
    /// `Copied`, of a round that is not the last.
    Copy,
    /// `Fenced`.
    Fence,
    /// `RoundEnded`.
    Acknowledge,
    /// The time at which the next harvest is due.
    Wait,
    /// `Harvested`.
    Harvest,
    /// `Drained`.
    Drain,
    /// `Rechecked`.
    Recheck,
    /// `GuestPaused`.
    Pause {
        postcopy: bool,
    },
    /// `Harvested`, with the guest paused; and so on.
    LastHarvest {
        postcopy: bool,
    },
    LastRecheck,
    LastCopy,
    LastFence,
    /// `RoundEnded`: before RAM is compared, or, when the device state has moved already, to hand over.
    LastAcknowledge {
        device_state_moved: bool,
    },
    /// `Verified`.
    Verify,
    /// `OwedAccepted`.
    SendOwed,
    /// `DeviceStateMoved`, and `RoundEnded` unless that came.
    DeviceState {
        acknowledged: bool,
    },
    /// `HandedOverSynced`. COMMIT was not sent.
    Handover,
    /// `DestinationRunning` or `DestinationAborted`. COMMIT was sent.
    Commit,
    /// The same, asking. COMMIT may have been sent.
    Ask,
    /// `DestinationRunning` with nothing owed: the destination pulls. Once memory is `lost`, `DestinationLost`.
    Serve {
        lost: Option<Failure>,
    },
    /// Its own end.
    Ending(Ending),
    /// Nothing.
    Ended(State),
}

impl Phase {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Restarted => "restarted",
            Self::Prepare => "prepare",
            Self::Copy => "copy",
            Self::Fence => "fence",
            Self::Acknowledge => "acknowledge",
            Self::Wait => "wait",
            Self::Harvest => "harvest",
            Self::Drain => "drain",
            Self::Recheck => "recheck",
            Self::Pause { .. } => "pause",
            Self::LastHarvest { .. } => "last_harvest",
            Self::LastRecheck => "last_recheck",
            Self::LastCopy => "last_copy",
            Self::LastFence => "last_fence",
            Self::LastAcknowledge { .. } => "last_acknowledge",
            Self::Verify => "verify",
            Self::SendOwed => "send_owed",
            Self::DeviceState { .. } => "device_state",
            Self::Handover => "handover",
            Self::Commit => "commit",
            Self::Ask => "ask",
            Self::Serve { lost: None } => "serve",
            Self::Serve { lost: Some(_) } => "memory_lost",
            Self::Ending(ending) => ending.phase(),
            Self::Ended(_) => "ended",
        }
    }

    pub(super) fn state(&self) -> State {
        match self {
            Self::Pending => State::Pending,
            Self::Prepare => State::Preparing,
            Self::Copy
            | Self::Fence
            | Self::Acknowledge
            | Self::Wait
            | Self::Harvest
            | Self::Drain
            | Self::Recheck => State::Precopy,
            Self::Pause { .. }
            | Self::LastHarvest { .. }
            | Self::LastRecheck
            | Self::LastCopy
            | Self::LastFence
            | Self::LastAcknowledge { .. }
            | Self::Verify
            | Self::SendOwed
            | Self::DeviceState { .. }
            | Self::Handover
            | Self::Commit
            | Self::Ask => State::SwitchingOver,
            Self::Serve { .. } => State::Postcopy,
            Self::Ending(ending) => ending.state(),
            Self::Restarted => State::Cancelling,
            Self::Ended(state) => *state,
        }
    }

    /// How long the phase may last. `Wait` and `Ask` have times of their own; a round may take as long as it
    /// takes while the guest runs, for its links fail when they make no progress, and so may post-copy.
    pub(super) fn limit(&self) -> Option<Duration> {
        match self {
            Self::Prepare => Some(limits::PREPARE),
            Self::Fence | Self::LastFence => Some(limits::FENCE),
            Self::Acknowledge | Self::LastAcknowledge { .. } => Some(limits::ACKNOWLEDGE),
            Self::Harvest | Self::LastHarvest { .. } => Some(limits::HARVEST),
            Self::Drain => Some(limits::DRAIN_GUEST),
            Self::Recheck | Self::LastRecheck => Some(limits::RECHECK),
            Self::Pause { .. } => Some(limits::PAUSE),
            Self::LastCopy => Some(limits::LAST_COPY),
            Self::Verify => Some(limits::VERIFY),
            Self::SendOwed => Some(limits::OWED),
            Self::DeviceState { .. } => Some(limits::DEVICE_STATE),
            Self::Handover => Some(limits::HANDOVER),
            Self::Commit => Some(limits::COMMIT_ANSWER),
            Self::Pending | Self::Restarted | Self::Copy | Self::Wait | Self::Ask => None,
            Self::Serve { .. } | Self::Ending(_) | Self::Ended(_) => None,
        }
    }

    /// Under way, and the guest not yet ordered to pause.
    pub(super) fn is_before_switchover(&self) -> bool {
        matches!(
            self,
            Self::Prepare
                | Self::Copy
                | Self::Fence
                | Self::Acknowledge
                | Self::Wait
                | Self::Harvest
                | Self::Drain
                | Self::Recheck
        )
    }

    /// A copy or a recheck is under way.
    pub(super) fn reads_memory(&self) -> bool {
        matches!(self, Self::Copy | Self::LastCopy | Self::Recheck | Self::LastRecheck)
    }

    /// COMMIT was sent, or may have been before a restart: only the destination knows who runs the guest.
    pub(super) fn is_in_doubt(&self) -> bool {
        matches!(self, Self::Commit | Self::Ask)
    }
}
