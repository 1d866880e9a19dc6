//! What happens at a time.

use std::time::Duration;

use ramferry_engine::{DestinationEvent, Failure, Reason, SourceEvent};

use ramferry_ram::PageSets;

use super::Page;
use crate::faults::{Fate, Fault};
use crate::journal::Record;
use crate::network::{Message, Side};

/// Changes outside of the agents' minds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Effect {
    Nothing,
    Written(Record),
    /// The source VMM stops its vCPUs, unless the order was taken back since.
    PauseSource {
        order: u32,
    },
    ResumeSource,
    /// The source guest is held back as the latest order of all has it.
    ThrottleSource,
    /// The source VMM waits for its transfers into RAM.
    EndTransfers,
    /// With `postcopy` its accesses to guest RAM are caught.
    WaitForDeviceState {
        postcopy: bool,
    },
    LoadDeviceState(u64),
    /// The destination VMM resumes its guest, unless it was stopped since.
    ResumeDestination {
        order: u32,
    },
    StopDestination,
    HoldOwed(PageSets),
    Discard,
    Zero(usize),
}

impl Effect {
    /// Whether it happens even when the agent that ordered it is killed meanwhile: a VMM carries it out.
    pub(super) fn outlives_agent(&self) -> bool {
        matches!(
            self,
            Self::PauseSource { .. }
                | Self::ResumeSource
                | Self::ResumeDestination { .. }
                | Self::StopDestination
                | Self::Discard
        )
    }
}

/// What the agent hears after an effect.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Reply {
    None,
    Source(SourceEvent),
    Destination(DestinationEvent),
}

#[derive(Clone, Debug)]
pub(crate) enum Happening {
    Effect {
        side: Side,
        life: u32,
        effect: Effect,
        reply: Reply,
    },
    Tick {
        side: Side,
        life: u32,
        wake: u32,
    },
    Arrives {
        to: Side,
        life: u32,
        stream: u32,
        straggler: bool,
        message: Message,
    },
    StreamLost {
        side: Side,
        life: u32,
    },
    StreamBack,
    /// One more page of the copy under way.
    CopyPage {
        life: u32,
        copy: u32,
    },
    Harvest {
        life: u32,
        fate: Fate,
    },
    Fenced {
        life: u32,
        link: Option<u32>,
        began_at: Duration,
        fate: Fate,
    },
    Lands {
        link: u32,
        page: usize,
        value: Page,
        /// From this word on the link read the page only now.
        late: usize,
    },
    Digest {
        life: u32,
        fate: Fate,
    },
    Drained {
        life: u32,
        round: u32,
        fate: Fate,
    },
    /// The pull that was ordered reads its first page.
    PullBegins {
        life: u32,
        pull: u32,
    },
    PageRead {
        life: u32,
        pull: u32,
        link: u32,
        page: usize,
    },
    PageLetIn {
        life: u32,
        pull: u32,
        page: usize,
    },
    /// Its links are seen to be dead.
    PullLost {
        life: u32,
    },
    Loads {
        life: u32,
        state: u64,
    },
    GuestWrites,
    /// A transfer into the source guest's RAM ends: the page was marked when it began.
    TransferEnds {
        transfer: u32,
    },
    Strikes(Fault),
    Restart(Side),
    CancelCheck,
}

/// Faults and restarts still to come, and what VMMs still do.
pub(super) fn is_pending(happening: &Happening) -> bool {
    match happening {
        Happening::Strikes(_) | Happening::Restart(_) | Happening::CancelCheck => true,
        Happening::Effect { effect, .. } => effect.outlives_agent(),
        Happening::Arrives { .. } | Happening::Lands { .. } => true,
        _ => false,
    }
}

pub(super) fn reason_of(effect: &Effect) -> Reason {
    match effect {
        Effect::Written(_) => Reason::JournalFailed,
        Effect::Nothing | Effect::Zero(_) => Reason::Internal,
        _ => Reason::GuestFailed,
    }
}

pub(super) fn failed(side: Side, reason: Reason) -> Reply {
    let failure = Failure::new(reason, "injected");
    match side {
        Side::Source => Reply::Source(SourceEvent::Failed(failure)),
        Side::Destination => Reply::Destination(DestinationEvent::Failed(failure)),
    }
}
