use ramferry_ram::PageSets;

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
    PrepareIncoming {
        /// The switchover may lead into post-copy.
        postcopy: bool,
    },
    /// Answer to `StartIncoming`.
    IncomingReady,
    /// The source's order: these pages are owed. They are not here, or not as they are at the source.
    Owed {
        /// All of them.
        pages: PageSets,
    },
    /// Answer to `HoldOwed`.
    OwedHeld,
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
    /// Answer to `ResumeGuest` and `StopGuest`, or at any time in post-copy: its VMM has ended. The guest may have run
    /// before that.
    GuestGone(Failure),
    /// Links to the source are open, and what is owed comes; after a `Failed` of `Pull`.
    PullResumed,
    /// Answer to `Pull`: nothing is owed any more, and every page was let in.
    Pulled,
    /// The source's word: memory that is owed cannot be had again.
    MemoryLost(Failure),
    /// Answer to `StopGuest`: the guest stands still, and no earlier `ResumeGuest` can run it any more.
    GuestStopped,
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
    StartIncoming {
        /// Before that, catch every access of the VMM to guest RAM, and from now on let it in to what is there; to what
        /// is owed once it has been read from the source.
        postcopy: bool,
    },
    /// Tell the source that the VMM waits.
    TellIncomingReady,
    /// Take note of what is owed, so that it outlives this agent; from then on no access reaches it before its bytes
    /// are in place. Open the links that they are read over (`OwedHeld`).
    HoldOwed {
        /// All of it.
        pages: PageSets,
    },
    /// Tell the source that what is owed is held.
    TellOwedAccepted,
    /// Make digests of all blocks and send them (`Verified`).
    Digest,
    /// Tell the source that the device state is loaded.
    TellDeviceStateLoaded,
    /// Append COMMITTED to the journal, durably (`CommittedSynced`).
    WriteCommitted,
    /// Have the guest run here. Idempotent: a guest that runs is left alone (`GuestResumed`). Where memory is owed it may
    /// have to wait for that, and must not hold the `Pull` up that comes behind it.
    ResumeGuest,
    /// Tell the source that the guest runs, if it can be reached.
    AnswerRunning {
        /// Whether memory is still owed. The source lets go once it is not.
        memory_owed: bool,
    },
    /// Read what is owed from the source, what the guest waits for first: over the links that there are, or new ones
    /// (`Pulled`; `Failed` where it cannot go on, and then it is ordered again: `PullResumed`). After a restart catch
    /// accesses again first. Idempotent.
    Pull,
    /// Have the guest stand still: its memory is lost. Idempotent (`GuestStopped`).
    StopGuest,
    /// Tell the source that the guest was stopped because its memory is lost, if it can be reached.
    AnswerLost(Failure),
    /// Append ABORTED to the journal, durably (`AbortedSynced`).
    WriteAborted(Failure),
    /// Be rid of the guest, whatever is under way on it. Idempotent (`GuestDiscarded`).
    DiscardGuest,
    /// Tell the source that the guest never will run, if it can be reached.
    AnswerAborted(Failure),
    /// Let go of links and regions, and end whatever is still under way (`Released`). Where memory is still owed and the
    /// VMM lives, accesses to that go on waiting.
    Release,
    /// The end, to be written to the journal before the answer that follows. Only answers to the source's questions follow.
    Finish(DestinationOutcome),
}

impl DestinationAction {
    /// The action's name, without what it is about.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::DrainRound { .. } => "drain_round",
            Self::AcknowledgeRound { .. } => "acknowledge_round",
            Self::StartIncoming { .. } => "start_incoming",
            Self::HoldOwed { .. } => "hold_owed",
            Self::TellOwedAccepted => "tell_owed_accepted",
            Self::TellIncomingReady => "tell_incoming_ready",
            Self::Digest => "digest",
            Self::TellDeviceStateLoaded => "tell_device_state_loaded",
            Self::WriteCommitted => "write_committed",
            Self::ResumeGuest => "resume_guest",
            Self::AnswerRunning { .. } => "answer_running",
            Self::Pull => "pull",
            Self::StopGuest => "stop_guest",
            Self::AnswerLost(_) => "answer_lost",
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
    /// The guest ran here, and was stopped because its memory is lost.
    Lost(Failure),
}
