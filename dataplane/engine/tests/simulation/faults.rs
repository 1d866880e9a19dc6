//! What can be made to go wrong, and when.

use std::time::Duration;

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The agent is killed; a record that is being written is durable all the same, or is not.
    CrashSource {
        record_survives: bool,
    },
    CrashDestination {
        record_survives: bool,
    },
    /// The agent is killed, and stays away for minutes.
    LongCrashDestination,
    /// The control stream ends; what is on its way arrives before that is noticed, or never.
    CutStream {
        delivers: bool,
    },
    /// All links die; of what is on its way, some lands.
    CutLinks,
    /// Both.
    CutAll,
    /// The destination's VMM dies.
    DestinationVmmDies,
    /// The source's VMM dies once the guest has left: its agent holds the memory.
    SourceVmmDies,
    /// The source's memory cannot be had again, once the guest has left.
    SourceMemoryLost,
    /// The caller's.
    Cancel,
    Force,
    /// The action fails; it had its effect, or had not.
    Fail {
        had_effect: bool,
    },
    /// The action has its effect, and is never answered. A message is lost.
    Mute,
    /// The action takes seconds.
    Slow,
    /// The stream is cut when the action sends its message, which arrives seconds later all the same.
    Straggle,
    /// The message that the action sends arrives twice: the second time soon, or seconds later, whatever became
    /// of the stream.
    Duplicate {
        late: bool,
    },
}

impl Fault {
    /// Those that happen at a time.
    pub(crate) const TIMED: [Self; 11] = [
        Self::CrashSource { record_survives: true },
        Self::CrashSource { record_survives: false },
        Self::CrashDestination { record_survives: true },
        Self::CrashDestination { record_survives: false },
        Self::LongCrashDestination,
        Self::CutStream { delivers: true },
        Self::CutStream { delivers: false },
        Self::CutLinks,
        Self::CutAll,
        Self::DestinationVmmDies,
        Self::Cancel,
    ];
    /// Those that matter in post-copy alone.
    pub(crate) const IN_POSTCOPY: [Self; 2] = [Self::SourceVmmDies, Self::SourceMemoryLost];
    /// Those that befall an action, and the caller's.
    pub(crate) const OF_ACTIONS: [Self; 8] = [
        Self::Fail { had_effect: true },
        Self::Fail { had_effect: false },
        Self::Mute,
        Self::Slow,
        Self::Straggle,
        Self::Duplicate { late: false },
        Self::Duplicate { late: true },
        Self::Force,
    ];

    /// Whether it happens outside of the machines: they hear of it later, if at all.
    pub(crate) fn is_outside(self) -> bool {
        !matches!(
            self,
            Self::Cancel
                | Self::Force
                | Self::DestinationVmmDies
                | Self::SourceVmmDies
                | Self::SourceMemoryLost
        )
    }
}

/// A fault at the `step`th action of both sides together, `after` it began. With no `after`, before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Injection {
    pub(crate) step: u32,
    pub(crate) after: Duration,
    pub(crate) fault: Fault,
}

impl Injection {
    /// All faults at `step`: those of a time before the action, early in it, and late in it.
    pub(crate) fn all_at(step: u32) -> impl Iterator<Item = Self> {
        let timed = Fault::TIMED.into_iter().flat_map(move |fault| {
            [0, 120, 700].map(|after| Self { step, after: Duration::from_micros(after), fault })
        });
        let of_actions = Fault::OF_ACTIONS.into_iter().map(move |fault| Self::before(step, fault));
        timed.chain(of_actions)
    }

    /// Those at `step` that matter in post-copy alone.
    pub(crate) fn in_postcopy_at(step: u32) -> impl Iterator<Item = Self> {
        Fault::IN_POSTCOPY.into_iter().flat_map(move |fault| {
            [120, 700].map(|after| Self { step, after: Duration::from_micros(after), fault })
        })
    }

    pub(crate) fn before(step: u32, fault: Fault) -> Self {
        Self { step, after: Duration::ZERO, fault }
    }
}

/// What befalls one action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Normal,
    Fail { had_effect: bool },
    Mute,
    Slow,
    Straggle,
    Duplicate { late: bool },
}

impl Fate {
    pub(crate) fn of(fault: Fault) -> Option<Self> {
        match fault {
            Fault::Fail { had_effect } => Some(Self::Fail { had_effect }),
            Fault::Mute => Some(Self::Mute),
            Fault::Slow => Some(Self::Slow),
            Fault::Straggle => Some(Self::Straggle),
            Fault::Duplicate { late } => Some(Self::Duplicate { late }),
            _ => None,
        }
    }

    pub(crate) fn has_effect(self) -> bool {
        self != Self::Fail { had_effect: false }
    }
}

/// One of the rules broken on purpose, in the agents around the machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sabotage {
    None,
    /// The destination guest is resumed while COMMITTED is still being written.
    ResumeBeforeCommitted,
    /// The source guest is resumed when its peer is lost after COMMIT.
    ResumeOnPeerLost,
    /// HANDED_OVER is not written.
    CommitWithoutHandedOver,
    /// ABORTED is not written.
    AbortWithoutRecord,
    /// HANDED_OVER is written, and not synced.
    UnsyncedHandedOver,
    /// COMMITTED is written, and not synced.
    UnsyncedCommitted,
    /// What the guest wrote until its pause is not collected.
    SkipLastHarvest,
    /// Writes are not waited for.
    SkipFence,
    /// The outcome is not asked for.
    NeverAsk,
    /// What was sent is not compared with what is there.
    SkipRecheck,
    /// The guest says that it has drained, and has not.
    LieAboutDrain,
    /// A restarted destination does not know what is owed.
    ForgetOwed,
    /// A page counts as in place just before it is.
    ClearBeforeBytes,
    /// The throttle is said to be lifted, and is not.
    ForgetThrottle,
    /// The VMM is given its device state while zero pages still wait to be applied.
    LoadBeforeZeroPages,
}

/// SplitMix64: the same numbers for the same seed, everywhere.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// From 0 to below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}
