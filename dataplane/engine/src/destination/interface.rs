use crate::Failure;

/// What a destination is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationEvent {
    /// Begin.
    Start,
    /// Answer to `Prepare`.
    Prepared,
    /// The source's order: all of a round was sent and placed.
    EndRound {
        /// From 1.
        round: u32,
    },
    /// Answer to `DrainRound`: all zero pages of the round are applied, and the link is sound.
    RoundDrained {
        /// As it was in the action.
        round: u32,
    },
    /// The source's order: have the VMM wait for device state.
    PrepareIncoming,
    /// Answer to `StartIncoming`.
    IncomingReady,
    /// The source's order: digests of all blocks.
    Verify,
    /// Answer to `Digest`: the digests are sent.
    Verified,
    /// The VMM has loaded all of the device state.
    DeviceStateLoaded,
    /// The source's order: run the guest.
    Commit,
    /// The source's question: did you commit? If not, never do.
    AskOutcome,
    /// The source's order: never run the guest.
    Abort(Failure),
    /// The control stream ended.
    PeerLost,
    /// There is a control stream again.
    PeerBack,
    /// Answer to `WriteCommitted`: the record is durable.
    CommittedSynced,
    /// Answer to `WriteAborted`: the record is durable.
    AbortedSynced,
    /// Answer to `ResumeGuest`: the guest runs.
    GuestResumed,
    /// Answer to `ResumeGuest`: its VMM has ended. The guest may have run before that.
    GuestGone(Failure),
    /// Answer to `DiscardGuest`.
    GuestDiscarded,
    /// Answer to `Release`.
    Released,
    /// An action failed, or the link or the guest did; at any time.
    Failed(Failure),
    /// `deadline()` has passed.
    Tick,
}

/// What a destination wants done. In brackets: how the result is reported, if not by `Failed`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Take links in, read presence (`Prepared`).
    Prepare,
    /// Apply all zero pages of the round, and see that the link is sound (`RoundDrained`).
    DrainRound {
        /// The round.
        round: u32,
    },
    /// Tell the source that the round is in this guest's memory.
    AcknowledgeRound {
        /// The round.
        round: u32,
    },
    /// See that the VMM will not start its guest by itself, and have it wait for device state (`IncomingReady`).
    StartIncoming,
    /// Tell the source that the VMM waits.
    TellIncomingReady,
    /// Make digests of all blocks and send them (`Verified`).
    Digest,
    /// Tell the source that the device state is loaded.
    TellDeviceStateLoaded,
    /// Append COMMITTED to the journal, durably (`CommittedSynced`).
    WriteCommitted,
    /// Have the guest run here. Idempotent: a guest that runs is left alone (`GuestResumed`).
    ResumeGuest,
    /// Tell the source that the guest runs, if it can be reached.
    AnswerRunning,
    /// Append ABORTED to the journal, durably (`AbortedSynced`).
    WriteAborted(Failure),
    /// Be rid of the guest, whatever is under way on it. Idempotent (`GuestDiscarded`).
    DiscardGuest,
    /// Tell the source that the guest never will run, if it can be reached.
    AnswerAborted(Failure),
    /// Let go of links and regions, and end whatever is still under way (`Released`).
    Release,
    /// The end. Only answers to the source's questions follow.
    Finish(DestinationOutcome),
}

impl DestinationAction {
    /// The action's name, without what it is about.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::DrainRound { .. } => "drain_round",
            Self::AcknowledgeRound { .. } => "acknowledge_round",
            Self::StartIncoming => "start_incoming",
            Self::TellIncomingReady => "tell_incoming_ready",
            Self::Digest => "digest",
            Self::TellDeviceStateLoaded => "tell_device_state_loaded",
            Self::WriteCommitted => "write_committed",
            Self::ResumeGuest => "resume_guest",
            Self::AnswerRunning => "answer_running",
            Self::WriteAborted(_) => "write_aborted",
            Self::DiscardGuest => "discard_guest",
            Self::AnswerAborted(_) => "answer_aborted",
            Self::Release => "release",
            Self::Finish(_) => "finish",
        }
    }

    /// The round that it is about, if it is about one.
    pub fn round(&self) -> Option<u32> {
        match self {
            Self::DrainRound { round } | Self::AcknowledgeRound { round } => Some(*round),
            _ => None,
        }
    }
}

/// How a migration ended, seen from its destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationOutcome {
    /// The guest runs here.
    Running,
    /// The guest never will run here.
    Aborted(Failure),
}
