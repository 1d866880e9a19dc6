//! One control stream between the agents, and what it carries.

use std::time::Duration;

use ramferry_engine::Failure;
use ramferry_ram::PageSets;

use crate::world::Page;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

impl Side {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Message {
    // To the destination.
    ZeroPage(usize),
    EndRound(u32),
    PrepareIncoming(bool),
    Owed(PageSets),
    Verify,
    DeviceState(u64),
    Commit,
    Ask,
    Abort(Failure),
    MemoryLost(Failure),
    // To the source.
    RoundEnded(u32),
    IncomingReady,
    Digests(Vec<Page>),
    OwedAccepted,
    DeviceStateLoaded,
    /// Whether memory is owed.
    Running(bool),
    StillOwed(u64),
    Aborted(Failure),
    Lost(Failure),
}

/// The stream that is there now, or was last.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) stream: u32,
    pub(crate) is_up: bool,
    /// Streams that ended without delivering what was on its way.
    pub(crate) dropped: Vec<u32>,
    /// Arrival of the last message to the source and to the destination: messages do not overtake.
    last_arrival: [Duration; 2],
}

pub(crate) const DELAY: Duration = Duration::from_micros(200);

impl Network {
    pub(crate) fn new(stream: u32) -> Self {
        Self { stream, is_up: true, dropped: Vec::new(), last_arrival: [Duration::ZERO; 2] }
    }

    /// When a message that is sent now arrives.
    pub(crate) fn arrival(&mut self, now: Duration, to: Side, jitter: Duration) -> Duration {
        let last = &mut self.last_arrival[to as usize];
        *last = (now + DELAY + jitter).max(*last);
        *last
    }
}
