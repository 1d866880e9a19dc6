use std::time::Duration;

use ramferry_ram::PageSets;

use crate::{BytesPerSecond, Failure, FixedCosts, Parameters, Percent};

/// What a source is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// Begin.
    Start,
    /// Answer to `Prepare`.
    Prepared {
        /// Pages of round 1: touched at the source, or held by the destination. The tracker was armed before
        /// they were read.
        pages: PageSets,
        /// Estimates.
        fixed: FixedCosts,
    },
    /// Answer to `Harvest`.
    Harvested {
        /// Every page written since the previous harvest, or since the tracker was armed.
        written: PageSets,
        /// Of the harvest.
        elapsed: Duration,
    },
    /// Pages may be filled after they were reported, from now on: before `Prepared`, or before the first `Harvested`
    /// that holds every page which such a writer could reach. Never taken back.
    LateWrites(LateWrites),
    /// Answer to `DrainGuest`.
    Drained {
        /// Whether every transfer that had begun before the order has ended. If not, none is known to have.
        complete: bool,
    },
    /// Answer to `Recheck`.
    Rechecked {
        /// Pages that do not hold what they held just before they were sent.
        differing: PageSets,
        /// Of all that was looked at.
        checked_bytes: u64,
        /// Of the recheck.
        elapsed: Duration,
    },
    /// Answer to `Copy`.
    Copied {
        /// Sent.
        data_bytes: u64,
        /// Found to be zero, and not sent.
        zero_bytes: u64,
        /// Of the copy.
        elapsed: Duration,
        /// Whether all pages were dealt with.
        complete: bool,
        /// Pages that were not; none when `complete`.
        unsent: PageSets,
    },
    /// Answer to `Fence`: everything posted before is placed in the destination's memory.
    Fenced {
        /// Of the fence.
        elapsed: Duration,
    },
    /// The destination's answer to `EndRound`.
    RoundEnded {
        /// As it was in the order.
        round: u32,
    },
    /// Answer to `PauseGuest`: the VMM has stopped its vCPUs, and holds its device state back. `now` may be the
    /// time at which they stopped, even when that is before events that were already handled.
    GuestPaused,
    /// Answer to `Verify`.
    Verified {
        /// Whether all of RAM is equal on both sides.
        equal: bool,
    },
    /// Answer to `SendOwed`: the destination holds the list, and will have its VMM wait for each of the pages.
    OwedAccepted,
    /// Answer to `MoveDeviceState`: the VMM has sent all of it, and the destination has loaded it.
    DeviceStateMoved,
    /// Answer to `WriteHandedOver`: the record is durable.
    HandedOverSynced,
    /// The destination's guest runs. Answer to `SendCommit`, `AskOutcome` and `Reconnect`; comes by itself when nothing
    /// is owed any more.
    DestinationRunning {
        /// Whether memory is still owed. Never again once it is not.
        memory_owed: bool,
    },
    /// The destination's guest ran, and was stopped because memory is lost. Answer to `TellMemoryLost`, `AskOutcome` and
    /// `Reconnect`.
    DestinationLost(Failure),
    /// What the destination is still owed, as it says while it pulls.
    StillOwed {
        /// Of the pages.
        bytes: u64,
    },
    /// This side's memory cannot be had again: its file is gone, say. Answer to `Reconnect`, or at any time.
    MemoryLost(Failure),
    /// The destination's guest never will run. May come at any time.
    DestinationAborted(Failure),
    /// The control stream ended.
    PeerLost,
    /// There is a control stream again.
    PeerBack,
    /// Answer to `ResumeGuest`: the guest runs, and no earlier `PauseGuest` can stop it any more.
    GuestResumed,
    /// Answer to `ResumeGuest`: its VMM has ended, and there is no guest to be resumed.
    GuestGone(Failure),
    /// Answer to `AbortPeer`: delivered, or given up.
    PeerAborted,
    /// Answer to `Release`.
    Released,
    /// Answer to `ThrottleGuest`: so much is taken now, which may be what a later order said.
    Throttled {
        /// Of the guest's processor time.
        percent: Percent,
    },
    /// Answer to `ThrottleGuest`: it was not done, or only in part.
    ThrottleFailed(Failure),
    /// An action failed, or the link, the guest or the tracker did; at any time.
    Failed(Failure),
    /// Give up; the guest stays here.
    Cancel,
    /// Switch over after the round under way.
    ForceSwitchover,
    /// Go on with these. Ignored when they do not pass [`Parameters::check`].
    SetParameters(Parameters),
    /// `deadline()` has passed.
    Tick,
}

/// What a source wants done. In brackets: how the result is reported, if not by `Failed`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Make links, arm the tracker, read presence on both sides (`Prepared`).
    Prepare,
    /// Collect and re-arm what the guest wrote (`Harvested`).
    Harvest,
    /// Send these pages (`Copied`).
    Copy {
        /// Of the pages.
        round: u32,
        /// To be sent, or made zero.
        pages: PageSets,
    },
    /// Cut the copy or the recheck under way short (its `Copied` or `Rechecked` comes soon).
    StopCopy,
    /// Have the guest end every transfer into its RAM that has begun (`Drained`).
    DrainGuest,
    /// Find the pages that changed since just before they were sent (`Rechecked`).
    Recheck {
        /// All of them were sent since `LateWrites`.
        pages: PageSets,
    },
    /// Wait until everything sent is placed (`Fenced`).
    Fence,
    /// Tell the destination that the round ended (`RoundEnded`).
    EndRound {
        /// The round.
        round: u32,
    },
    /// Have the destination's VMM wait for device state, and this one start its device stream up to where it has
    /// stopped the vCPUs (`GuestPaused`).
    PauseGuest {
        /// The switchover may lead into post-copy: catch accesses there, and serve reads of memory here, from now on.
        postcopy: bool,
    },
    /// Give the destination the list of pages that it is owed (`OwedAccepted`).
    SendOwed {
        /// All that it does not have, or may not have as it is now. Never none.
        pages: PageSets,
    },
    /// Compare all of RAM with the destination's (`Verified`).
    Verify,
    /// Have the VMM save its device state, beside the last harvest and the last round where RAM is not compared. Nothing of it
    /// reaches the destination before `MoveDeviceState`.
    SaveDeviceState,
    /// Let the device state go to the destination, behind what was sent there before, and wait until the destination has
    /// loaded it (`DeviceStateMoved`).
    MoveDeviceState,
    /// Append HANDED_OVER to the journal, durably (`HandedOverSynced`).
    WriteHandedOver,
    /// Tell the destination to commit (`DestinationRunning`, `DestinationAborted`).
    SendCommit,
    /// Ask the destination whether it committed, over a new control stream when there is none (`DestinationRunning`,
    /// `DestinationAborted`, or nothing when it cannot be reached).
    AskOutcome,
    /// Serve reads of memory again, where that was interrupted, and ask the destination how far it is, over a new control
    /// stream when there is none (`DestinationRunning`, `DestinationLost`, `MemoryLost`, or nothing when it cannot be
    /// reached). Ordered again until one of them comes.
    Reconnect,
    /// Tell the destination that memory is lost for good, over a new control stream when there is none
    /// (`DestinationLost`, `DestinationRunning` with nothing owed, or nothing when it cannot be reached). Ordered again
    /// until one of them comes.
    TellMemoryLost(Failure),
    /// Tell the destination to give up, as far as it can be reached, in bounded time (`PeerAborted`).
    AbortPeer(Failure),
    /// Have the guest run here, at once. Idempotent: a guest that runs is left alone (`GuestResumed`).
    ResumeGuest,
    /// Let go of links, regions and the tracker, and end whatever is still under way (`Released`).
    Release,
    /// Take so much of the guest's processor time, none for 0: the latest order counts, whatever came of those before. What is
    /// taken is given back by the driver's end too, whichever that is (`Throttled`, or else `ThrottleFailed`).
    ThrottleGuest {
        /// Of what its vCPUs can have.
        percent: Percent,
    },
    /// Pace the copy, from now on.
    SetBandwidthLimit(Option<BytesPerSecond>),
    /// The end; no action follows. The control stream is closed: a destination that was not told otherwise
    /// learns from that.
    Finish(Outcome),
}

/// Whether pages are filled after the tracker reported them: by DMA into pages that were marked when they were pinned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum LateWrites {
    /// No.
    #[default]
    None,
    /// Yes, and `DrainGuest` waits for those that have begun.
    Drainable,
    /// Yes, by somebody who cannot be asked.
    Undrainable,
}

impl SourceAction {
    /// The action's name, without what it is about.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Harvest => "harvest",
            Self::Copy { .. } => "copy",
            Self::StopCopy => "stop_copy",
            Self::DrainGuest => "drain_guest",
            Self::Recheck { .. } => "recheck",
            Self::Fence => "fence",
            Self::EndRound { .. } => "end_round",
            Self::PauseGuest { .. } => "pause_guest",
            Self::SendOwed { .. } => "send_owed",
            Self::Verify => "verify",
            Self::SaveDeviceState => "save_device_state",
            Self::MoveDeviceState => "move_device_state",
            Self::WriteHandedOver => "write_handed_over",
            Self::SendCommit => "send_commit",
            Self::AskOutcome => "ask_outcome",
            Self::Reconnect => "reconnect",
            Self::TellMemoryLost(_) => "tell_memory_lost",
            Self::AbortPeer(_) => "abort_peer",
            Self::ResumeGuest => "resume_guest",
            Self::Release => "release",
            Self::ThrottleGuest { .. } => "throttle_guest",
            Self::SetBandwidthLimit(_) => "set_bandwidth_limit",
            Self::Finish(_) => "finish",
        }
    }
}

/// How a migration ended, seen from its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs at the destination.
    Succeeded,
    /// The guest is the source's.
    Failed(Failure),
    /// The guest runs at the source.
    Cancelled,
    /// The guest was the destination's, and runs nowhere: its memory is lost.
    Lost(Failure),
}
