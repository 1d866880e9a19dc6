//! Post-copy, at the source: the guest runs at the destination, which reads what it is owed.
//!
//! ```text
//!  Commit, Ask -- DestinationRunning, memory owed --> Serve -- DestinationRunning, nothing owed --> Ending, Succeeded
//!                                                     |   |
//!        Reconnect at PeerBack and at intervals, from +---+   PeerLost, Failed, SERVE_SILENCE: until DestinationRunning
//!                                                     | MemoryLost
//!        TellMemoryLost, at PeerBack and at intervals v
//!                                          Serve, lost -- DestinationLost --> Ending, Lost
//! ```
//!
//! Nothing is sent from here: the destination owns what is owed, and reads it over links of its own. A link or a control
//! stream that dies is a pause. The source waits as long as that takes, for the guest has no other memory; nothing
//! is let go before the destination says that it has everything, or that its guest is stopped for good. Whatever
//! comes, the guest is not resumed here: it ran elsewhere. The VMM that it left may end; its memory is held.

use std::time::Duration;

use super::late::Late;
use super::phase::Phase;
use super::{Source, SourceAction, SourceEvent};
use crate::limits::{RETRY_FIRST, SERVE_SILENCE};
use crate::retry::Retry;
use crate::trouble::Trouble;
use crate::{Failure, Reason, State};

impl Source {
    /// Begins to serve. Where the handover went straight through it does already, and the stream that brought the
    /// answer is there; otherwise one of them may not be.
    pub(super) fn serve(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        let goes_on = matches!(self.phase, Phase::Commit) && self.progress.postcopy;
        self.progress.postcopy = true;
        self.late = Late::default();
        self.all_well(now);
        self.enter(now, Phase::Serve { lost: None });
        if let Some(failure) = self.memory_lost.take() {
            self.memory_is_lost(now, &failure, actions);
        } else if !goes_on {
            self.ask(now, actions);
        }
    }

    pub(super) fn serving(&mut self, now: Duration, event: SourceEvent, actions: &mut Vec<SourceAction>) {
        let is_lost = matches!(self.phase, Phase::Serve { lost: Some(_) });
        match event {
            SourceEvent::DestinationRunning { memory_owed: false } => {
                self.has_everything(now, State::Postcopy, actions);
            }
            SourceEvent::DestinationRunning { memory_owed: true } if !is_lost => self.all_well(now),
            SourceEvent::DestinationLost(cause) => self.destination_lost(now, &cause, actions),
            SourceEvent::StillOwed { bytes } => {
                self.progress.remaining_bytes = bytes;
                if self.doubt.is_none() {
                    self.all_well(now);
                }
            }
            SourceEvent::MemoryLost(failure) if !is_lost => self.memory_is_lost(now, &failure, actions),
            SourceEvent::PeerLost => {
                let message = "the control stream to the destination's agent ended. The guest runs there, and waits \
                               where it needs memory that it does not have yet: see that both agents run and reach \
                               each other";
                self.interrupted(now, Failure::new(Reason::PeerLost, message));
            }
            SourceEvent::Failed(failure) => self.interrupted(now, failure),
            SourceEvent::PeerBack => self.peer_back(now, actions),
            SourceEvent::Tick if self.ask.is_due(now) => self.ask(now, actions),
            _ => {}
        }
    }

    /// The destination was heard of. Its last word may be lost all the same: after a while without one it is asked.
    fn all_well(&mut self, now: Duration) {
        self.doubt = None;
        self.ask = Retry::new(Some(now.saturating_add(SERVE_SILENCE)));
    }

    fn interrupted(&mut self, now: Duration, failure: Failure) {
        if matches!(self.phase, Phase::Serve { lost: Some(_) }) {
            return;
        }
        if self.doubt.is_none() {
            self.ask = Retry::new(Some(now.saturating_add(RETRY_FIRST)));
        }
        Trouble::note(&mut self.doubt, now, failure);
    }

    fn memory_is_lost(&mut self, now: Duration, cause: &Failure, actions: &mut Vec<SourceAction>) {
        let failure = Failure::memory_lost(cause);
        self.doubt = None;
        Trouble::note(&mut self.doubt, now, failure.clone());
        self.ask = Retry::new(None);
        self.enter(now, Phase::Serve { lost: Some(failure) });
        self.ask(now, actions);
    }
}
