//! What goes wrong outside of the machines, as it strikes.

use std::time::Duration;

use ramferry_engine::{DestinationEvent, Failure, Reason, SourceEvent};

use super::{Happening, World, microseconds};
use crate::destination_agent;
use crate::faults::Fault;
use crate::journal::Record;
use crate::network::Side;
use crate::source_agent;

impl World {
    pub(super) fn strike(&mut self, fault: Fault) {
        self.note(&format!("FAULT {fault:?}"));
        match fault {
            Fault::CrashSource { record_survives } => {
                self.crash(Side::Source, record_survives, Duration::from_millis(20));
            }
            Fault::CrashDestination { record_survives } => {
                self.crash(Side::Destination, record_survives, Duration::from_millis(20));
            }
            Fault::LongCrashDestination => self.crash(Side::Destination, true, Duration::from_secs(300)),
            Fault::CutStream { delivers } => self.cut_stream(delivers),
            Fault::CutLinks => self.cut_links(),
            Fault::CutAll => {
                self.cut_links();
                self.cut_stream(false);
            }
            Fault::DestinationVmmDies => self.destination_vmm_dies(),
            Fault::SourceVmmDies => self.source_vmm_dies(),
            Fault::SourceMemoryLost => self.source_memory_is_lost(),
            Fault::Cancel => self.cancel(),
            Fault::Force => self.source_hears(self.source.life, SourceEvent::ForceSwitchover),
            Fault::Fail { .. } | Fault::Mute | Fault::Slow | Fault::Straggle | Fault::Duplicate { .. } => {}
        }
    }

    pub(super) fn cancel(&mut self) {
        let alone = self.injections.len() == 1;
        if alone && self.source.can_cancel() {
            self.after(Duration::from_millis(100), Happening::CancelCheck);
        }
        self.source_hears(self.source.life, SourceEvent::Cancel);
    }

    pub(crate) fn has_committed(&self) -> bool {
        self.destination.journal.records.last() == Some(&Record::Committed)
    }

    pub(super) fn destination_vmm_dies(&mut self) {
        if self.destination.is_up && !self.has_committed() {
            self.died_uncommitted_in = Some(self.destination.life);
        }
        self.destination_vmm.dead = true;
        self.destination_vmm.running = false;
        let failure = Failure::new(Reason::GuestFailed, "the VMM ended");
        let event = match self.moved {
            true => DestinationEvent::GuestGone(failure),
            false => DestinationEvent::Failed(failure),
        };
        self.destination_hears(self.destination.life, event);
    }

    /// Once the guest has left: before, it would be lost with its VMM.
    fn source_vmm_dies(&mut self) {
        if self.moved {
            self.source_vmm.dead = true;
            let failure = Failure::new(Reason::GuestFailed, "the VMM ended");
            self.source_hears(self.source.life, SourceEvent::GuestGone(failure));
        }
    }

    /// The file of the source guest's RAM is gone, once the guest has left.
    fn source_memory_is_lost(&mut self) {
        if self.moved {
            self.owed.is_lost = true;
            self.owed.is_served = false;
            self.cut_pull();
            let failure = Failure::new(Reason::Internal, "the file is gone");
            self.source_hears(self.source.life, SourceEvent::MemoryLost(failure));
        }
    }

    pub(super) fn crash(&mut self, side: Side, record_survives: bool, down_for: Duration) {
        if !self.is_alive(side, self.life(side)) {
            return;
        }
        self.journal(side).crash(record_survives);
        match side {
            Side::Source => {
                self.source.is_up = false;
                self.owed.is_served = false;
            }
            Side::Destination => self.destination.is_up = false,
        }
        self.cut_links();
        let delivers = self.random.chance(2);
        self.cut_stream(delivers);
        self.is_tracked &= side != Side::Source;
        self.after(down_for, Happening::Restart(side));
    }

    pub(super) fn restart(&mut self, side: Side) {
        self.note(&format!("{side:?} restarts"));
        match side {
            Side::Source => source_agent::restart(self),
            Side::Destination => destination_agent::restart(self),
        }
        self.after(Duration::from_millis(1), Happening::StreamBack);
    }

    pub(crate) fn cut_stream(&mut self, delivers: bool) {
        if !self.network.is_up {
            return;
        }
        self.note(&format!("the control stream ends, delivers: {delivers}"));
        self.network.is_up = false;
        if !delivers {
            self.network.dropped.push(self.network.stream);
        }
        for side in [Side::Source, Side::Destination] {
            let noticed = microseconds(500 + self.random.below(3000));
            self.after(noticed, Happening::StreamLost { side, life: self.life(side) });
        }
        self.after(Duration::from_millis(50), Happening::StreamBack);
    }

    pub(crate) fn cut_links(&mut self) {
        self.cut_pull();
        if self.link.take().is_some() {
            self.note("the links die");
            let mut random = self.random.clone();
            self.queue
                .retain(|_, happening| !matches!(happening, Happening::Lands { .. }) || random.chance(2));
            self.random = random;
        }
    }

    pub(super) fn stream_back(&mut self) {
        if self.network.is_up || !self.source.is_up || !self.destination.is_up {
            return;
        }
        self.network.is_up = true;
        self.network.stream += 1;
        self.source_hears(self.source.life, SourceEvent::PeerBack);
        self.destination_hears(self.destination.life, DestinationEvent::PeerBack);
    }
}
