use std::time::Duration;

use crate::{BytesPerSecond, Percent};

/// How far a migration is, as the API shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Not begun.
    Pending,
    /// Both sides make ready; nothing is copied.
    Preparing,
    /// RAM is copied while the guest runs.
    Precopy,
    /// The guest is being paused, or stands still until its destination runs.
    SwitchingOver,
    /// The guest runs at the destination; memory that it needs is still at the source.
    Postcopy,
    /// It is being undone, because of a failure or because it was cancelled.
    Cancelling,
    /// The guest runs at the destination.
    Succeeded,
    /// It failed; the guest is the source's, or lost its memory on its way.
    Failed,
    /// It was cancelled; the guest runs at the source.
    Cancelled,
}

impl State {
    /// The state as the API, the journal and the metrics write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "PENDING",
            Self::Preparing => "PREPARING",
            Self::Precopy => "PRECOPY",
            Self::SwitchingOver => "SWITCHING_OVER",
            Self::Postcopy => "POSTCOPY",
            Self::Cancelling => "CANCELLING",
            Self::Succeeded => "SUCCEEDED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
        }
    }

    /// Whether it never changes again.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// What parts of the downtime cost that do not depend on RAM: estimates to begin with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FixedCosts {
    /// Of a fence over all links. Measured as soon as there was one.
    pub fence: Duration,
    /// Of the move of the device state.
    pub device_state: Duration,
}

/// One pass over the pages written since the previous pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// From 1.
    pub number: u32,
    /// Sent, without zero pages.
    pub transferred_bytes: u64,
    /// Found to be zero, and not sent.
    pub zero_bytes: u64,
    /// Of the copy.
    pub elapsed: Duration,
    /// Written by the guest from the round's harvest to the next.
    pub dirtied_bytes: u64,
}

/// What the downtime was spent on, on the source's clock: parts that do not overlap and whose sum it is. In this order,
/// from the guest's pause on, but for `acknowledge`, which comes behind `device_state` where RAM is not compared; only
/// `pause` lies before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DowntimeParts {
    /// From the order to pause to the pause. The guest runs in it: not part of the sum.
    pub pause: Duration,
    /// Last look at what the guest wrote.
    pub harvest: Duration,
    /// Comparison of what was sent with what is there, where pages are filled late.
    pub recheck: Duration,
    /// Last round.
    pub copy: Duration,
    /// Until all links had placed what they carried.
    pub fence: Duration,
    /// Of the destination's acknowledgement of the round, what nothing else hid: the device state moves meanwhile, and
    /// only what the acknowledgement took longer counts. All of it where RAM is compared, which needs it first.
    pub acknowledge: Duration,
    /// Comparison of RAM, where it was asked for.
    pub verify: Duration,
    /// Until the destination held the list of pages that it is owed, where the switchover led into post-copy.
    pub owed: Duration,
    /// From when the device state, which was saved meanwhile, could go until the destination had loaded it.
    pub device_state: Duration,
    /// HANDED_OVER to the source's journal.
    pub journal: Duration,
    /// From COMMIT to the word that the destination's guest runs.
    pub commit: Duration,
}

impl DowntimeParts {
    /// The parts with their names, in order.
    pub fn named(&self) -> [(&'static str, Duration); 11] {
        [
            ("pause", self.pause),
            ("harvest", self.harvest),
            ("recheck", self.recheck),
            ("copy", self.copy),
            ("fence", self.fence),
            ("acknowledge", self.acknowledge),
            ("verify", self.verify),
            ("owed", self.owed),
            ("device_state", self.device_state),
            ("journal", self.journal),
            ("commit", self.commit),
        ]
    }
}

/// What a source has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// From 1; 0 before the first.
    pub round: u32,
    /// Copied rounds, oldest first; only the last [`Progress::ROUNDS_KEPT`].
    pub rounds: Vec<Round>,
    /// Of the round under way, when it began; of the next one, between rounds. In post-copy what the destination is still
    /// owed, as it last said.
    pub remaining_bytes: u64,
    /// Sent in all rounds, without zero pages.
    pub transferred_bytes: u64,
    /// Time spent copying, in all rounds.
    pub copy_time: Duration,
    /// Found to be zero in all rounds, and not sent.
    pub zero_bytes: u64,
    /// Written by the guest after the first round began, all rounds together.
    pub redirtied_bytes: u64,
    /// Found to differ from what was sent although nobody was seen to write them, and sent again.
    pub late_bytes: u64,
    /// At which the guest dirties pages, between the last two harvests.
    pub dirty_rate: Option<BytesPerSecond>,
    /// Of the copy, in recent rounds.
    pub throughput: Option<BytesPerSecond>,
    /// Processor time that is taken from the guest.
    pub throttle: Percent,
    /// The most that ever was.
    pub throttle_peak: Percent,
    /// If the switchover began now.
    pub expected_downtime: Option<Duration>,
    /// From the start to the first round.
    pub setup_time: Option<Duration>,
    /// From the start to the destination guest's resume.
    pub total_time: Option<Duration>,
    /// Whether memory was owed when the guest was handed over.
    pub postcopy: bool,
    /// From the destination guest's resume until all of its memory was there, where any was owed.
    pub postcopy_time: Option<Duration>,
    /// From the source guest's pause to the word that the destination's runs.
    pub downtime: Option<Duration>,
    /// Parts of the downtime, as far as they are known.
    pub downtime_parts: DowntimeParts,
    /// Whether RAM was equal on both sides, where that was asked for.
    pub verified: Option<bool>,
}

impl Progress {
    /// Most rounds that are kept in `rounds`.
    pub const ROUNDS_KEPT: usize = 1024;

    pub(crate) fn add_round(&mut self, round: Round) {
        if self.rounds.len() == Self::ROUNDS_KEPT {
            self.rounds.remove(0);
        }
        self.rounds.push(round);
        self.transferred_bytes = self.transferred_bytes.saturating_add(round.transferred_bytes);
        self.zero_bytes = self.zero_bytes.saturating_add(round.zero_bytes);
        self.copy_time = self.copy_time.saturating_add(round.elapsed);
    }

    pub(crate) fn add_dirtied(&mut self, bytes: u64) {
        self.redirtied_bytes = self.redirtied_bytes.saturating_add(bytes);
        if let Some(last) = self.rounds.last_mut() {
            last.dirtied_bytes = bytes;
        }
    }
}
