//! Both guests, and what reaches their memory.

use std::time::Duration;

use ramferry_engine::{LateWrites, Percent};

use super::{HOT_PAGES, Happening, PAGES, Page, World, ZERO, insert, microseconds};
use crate::checker::Violation;
use crate::faults::Sabotage;
use crate::journal::Record;

/// A VMM with its guest.
#[derive(Debug)]
pub(crate) struct Vmm {
    pub(crate) ram: [Page; PAGES],
    pub(crate) running: bool,
    pub(crate) dead: bool,
    /// Counts its guest's writes; stands for the device state.
    pub(crate) device_state: Option<u64>,
    /// Counts orders to pause and resume: at the destination, to stop.
    pub(crate) pause_order: u32,
    /// At the destination: for device state.
    pub(crate) waits: bool,
    /// At the source: processor time that is taken from its guest.
    pub(crate) throttle: Percent,
}

impl Vmm {
    pub(super) fn new(ram: [Page; PAGES], running: bool) -> Self {
        Self {
            ram,
            running,
            dead: false,
            device_state: None,
            pause_order: 0,
            waits: false,
            throttle: Percent(0),
        }
    }
}

impl World {
    pub(crate) fn resume_source(&mut self) {
        if self.source_vmm.running {
            return;
        }
        self.note("source guest resumes");
        self.source_vmm.running = true;
        self.checker.require(!self.destination_vmm.running, Violation::BothRun);
        if self.sabotage == Sabotage::None {
            let aborted = matches!(self.destination.journal.records.last(), Some(Record::Aborted(_)));
            self.checker.require(!self.commit_sent || aborted, Violation::ResumedInDoubt);
        }
    }

    pub(crate) fn resume_destination(&mut self) {
        if self.destination_vmm.running || self.destination_vmm.dead {
            return;
        }
        self.note("destination guest resumes");
        self.destination_vmm.running = true;
        self.checker.require(!self.source_vmm.running, Violation::BothRun);
        if self.sabotage == Sabotage::None {
            self.checker.require(self.has_committed(), Violation::ResumedWithoutCommitted);
        }
        if !self.moved {
            self.moved = true;
            self.owed.truth = self.source_vmm.ram;
            let same_ram = self.has_the_rest();
            let same_state = self.destination_vmm.device_state == Some(self.stamp);
            self.checker.require(same_ram && same_state, Violation::Differs);
        }
    }

    pub(super) fn lands(&mut self, link: u32, page: usize, mut value: Page, late: usize) {
        if link == self.links && self.destination.takes_writes {
            self.checker.require(!self.destination_vmm.running, Violation::WrittenWhileRunning);
            value[late..].copy_from_slice(&self.source_vmm.ram[page][late..]);
            self.destination_vmm.ram[page] = value;
        }
    }

    /// Every guest that runs writes a page. It calms down after a while.
    pub(super) fn guest_writes(&mut self) {
        let page = self.random.below(HOT_PAGES) as usize;
        let is_zero = self.random.chance(5);
        if self.source_vmm.running || self.destination_vmm.running {
            self.stamp += 1;
        }
        let value = if is_zero { ZERO } else { contents(self.stamp) };
        if self.source_vmm.running {
            self.source_vmm.ram[page] = value;
            if self.is_tracked {
                insert(&mut self.dirty, page);
            }
        }
        self.destination_accesses(page, Some(value));
        if self.owed.any() {
            let page = self.random.below(PAGES as u64) as usize;
            self.destination_accesses(page, None);
        }
        if self.late != LateWrites::None && self.source_vmm.running && self.random.chance(3) {
            self.begin_transfer();
        }
        let busy = self.now - self.source.began_at;
        let pause = match busy.as_millis() {
            0..60 => microseconds(700),
            60..1000 => microseconds(20_000),
            _ => Duration::from_secs(2),
        };
        self.after(pause, Happening::GuestWrites);
    }

    /// A disk's transfer begins: its page is pinned, which marks it, and filled later.
    pub(super) fn begin_transfer(&mut self) {
        let page = HOT_PAGES as usize + self.random.below(PAGES as u64 - HOT_PAGES) as usize;
        if self.transfers.iter().any(|(_, other, _)| *other == page) {
            return;
        }
        self.stamp += 1;
        self.transfers_begun += 1;
        self.transfers.push((self.transfers_begun, page, self.stamp));
        if self.is_tracked {
            insert(&mut self.dirty, page);
        }
        let takes = microseconds(self.random.below(60_000));
        self.after(takes, Happening::TransferEnds { transfer: self.transfers_begun });
    }

    /// Whether a page is pinned, and so there whatever it holds.
    pub(crate) fn is_pinned(&self, page: usize) -> bool {
        self.transfers.iter().any(|(_, pinned, _)| *pinned == page)
    }

    /// Fills the page of one transfer, or of all.
    pub(super) fn end_transfers(&mut self, which: Option<u32>) {
        let (ending, rest): (Vec<_>, Vec<_>) =
            self.transfers.drain(..).partition(|(number, ..)| which.is_none_or(|which| which == *number));
        self.transfers = rest;
        for (_, page, stamp) in ending {
            self.source_vmm.ram[page] = contents(stamp);
        }
    }

    /// The device state as it would be saved now.
    pub(crate) fn device_state(&self) -> u64 {
        self.stamp
    }
}

/// A page that the guest wrote whole, as its `stamp`th write.
pub(super) fn contents(stamp: u64) -> Page {
    std::array::from_fn(|word| stamp << 8 | word as u64)
}
