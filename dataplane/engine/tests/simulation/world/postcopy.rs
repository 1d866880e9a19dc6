//! Memory that is owed to the destination's guest: the list that outlives the agent, the VMM that waits, the links.

use ramferry_engine::{DestinationEvent, Failure, Reason};
use ramferry_ram::{BlockIndex, PageSets};

use super::{Happening, PAGE_BYTES, PAGES, Page, World, ZERO, microseconds};
use crate::checker::Violation;
use crate::faults::{Fate, Sabotage};
use crate::network::{Message, Side};

#[derive(Debug)]
pub(crate) struct Owed {
    /// Pages that are not in place yet.
    pub(crate) pages: [bool; PAGES],
    /// The destination's VMM waits where it accesses one of them.
    pub(crate) is_armed: bool,
    /// The source serves reads of its memory.
    pub(crate) is_served: bool,
    /// Its memory is gone for good.
    pub(crate) is_lost: bool,
    /// Links that the destination reads over; they are alive.
    pub(crate) link: Option<u32>,
    links: u32,
    /// The pull that counts.
    pull: u32,
    /// What the guest waits for, and what it then writes.
    pub(crate) waits_for: Option<(usize, Option<Page>)>,
    /// How often it waited.
    pub(crate) waited: u32,
    /// What the guest's memory is, wherever that lies.
    pub(crate) truth: [Page; PAGES],
}

impl Default for Owed {
    fn default() -> Self {
        Self {
            pages: [false; PAGES],
            is_armed: false,
            is_served: false,
            is_lost: false,
            link: None,
            links: 0,
            pull: 0,
            waits_for: None,
            waited: 0,
            truth: [ZERO; PAGES],
        }
    }
}

impl Owed {
    pub(crate) fn any(&self) -> bool {
        self.pages.contains(&true)
    }

    fn bytes(&self) -> u64 {
        self.pages.iter().filter(|owed| **owed).count() as u64 * PAGE_BYTES
    }
}

impl World {
    /// Takes the list down, and opens links.
    pub(super) fn hold_owed(&mut self, pages: &PageSets) {
        for page in pages.block(BlockIndex(0)).runs().flat_map(|run| run.first..run.end()) {
            self.owed.pages[page as usize] = true;
        }
        self.open_links();
    }

    fn open_links(&mut self) -> bool {
        if self.owed.link.is_none() && self.owed.is_served && self.source.is_up {
            self.owed.links += 1;
            self.owed.link = Some(self.owed.links);
        }
        self.owed.link.is_some()
    }

    /// Has what is owed read from the source. What an earlier pull has under way does not count any more.
    pub(crate) fn pull(&mut self, fate: Fate) {
        self.owed.pull += 1;
        let (life, pull) = (self.destination.life, self.owed.pull);
        match fate {
            Fate::Fail { .. } => self.fail(Side::Destination, microseconds(300), Reason::LinkLost),
            // A link that makes no progress fails in the end.
            Fate::Mute | Fate::Slow => {
                self.after(super::SLOW, Happening::PullBegins { life, pull });
            }
            _ => self.after(microseconds(300), Happening::PullBegins { life, pull }),
        }
    }

    fn pulls(&self, life: u32, pull: u32) -> bool {
        self.is_alive(Side::Destination, life) && self.owed.pull == pull
    }

    pub(super) fn pull_begins(&mut self, life: u32, pull: u32) {
        if !self.pulls(life, pull) {
            return;
        }
        if self.open_links() {
            self.destination_hears(life, DestinationEvent::PullResumed);
            self.read_page(life, pull);
        } else {
            self.pull_fails(life);
        }
    }

    /// Asks for the page that the guest waits for, or for any.
    fn read_page(&mut self, life: u32, pull: u32) {
        if !self.pulls(life, pull) {
            return;
        }
        let Some(link) = self.owed.link else { return self.pull_fails(life) };
        let owed: Vec<_> = (0..PAGES).filter(|page| self.owed.pages[*page]).collect();
        if owed.is_empty() {
            return self.destination_hears(life, DestinationEvent::Pulled);
        }
        let waits_for = self.owed.waits_for.map(|(page, _)| page).filter(|page| owed.contains(page));
        let page = waits_for.unwrap_or_else(|| owed[self.random.below(owed.len() as u64) as usize]);
        let takes = microseconds(200 + self.random.below(2000));
        self.after(takes, Happening::PageRead { life, pull, link, page });
    }

    /// The page's bytes are in place; it is not let in yet.
    pub(super) fn page_read(&mut self, life: u32, pull: u32, link: u32, page: usize) {
        if !self.pulls(life, pull) {
            return;
        }
        if self.owed.link != Some(link) {
            return self.pull_fails(life);
        }
        self.checker.require(self.owed.pages[page], Violation::Overwritten);
        if self.sabotage == Sabotage::ClearBeforeBytes {
            self.owed.pages[page] = false;
        } else {
            self.destination_vmm.ram[page] = self.source_vmm.ram[page];
        }
        self.after(microseconds(300), Happening::PageLetIn { life, pull, page });
    }

    pub(super) fn page_let_in(&mut self, life: u32, pull: u32, page: usize) {
        if !self.pulls(life, pull) {
            return;
        }
        if self.sabotage == Sabotage::ClearBeforeBytes {
            self.destination_vmm.ram[page] = self.source_vmm.ram[page];
        }
        self.owed.pages[page] = false;
        if let Some((_, write)) = self.owed.waits_for.take_if(|(waits_for, _)| *waits_for == page) {
            self.destination_accesses(page, write);
        }
        self.send(Side::Destination, Message::StillOwed(self.owed.bytes()), Fate::Normal);
        self.read_page(life, pull);
    }

    fn pull_fails(&mut self, life: u32) {
        let failure = Failure::new(Reason::LinkLost, "the link to the source died");
        self.destination_hears(life, DestinationEvent::Failed(failure));
    }

    /// The links that the destination reads over die, with whatever is under way on them.
    pub(super) fn cut_pull(&mut self) {
        if self.owed.link.take().is_some() {
            let life = self.destination.life;
            self.after(microseconds(1000), Happening::PullLost { life });
        }
    }

    pub(super) fn pull_lost(&mut self, life: u32) {
        if self.owed.link.is_none() && self.owed.any() {
            self.pull_fails(life);
        }
    }

    /// While it loads device state, the VMM accesses what it likes, too.
    pub(crate) fn vmm_accesses(&mut self) {
        if !self.owed.any() {
            return;
        }
        let page = self.random.below(PAGES as u64) as usize;
        if self.owed.pages[page] && self.owed.link.is_some() {
            self.destination_vmm.ram[page] = self.source_vmm.ram[page];
            self.owed.pages[page] = false;
        }
    }

    /// The destination guest reads `page`, and writes it where it is to.
    pub(super) fn destination_accesses(&mut self, page: usize, write: Option<Page>) {
        if !self.destination_vmm.running || self.owed.waits_for.is_some() {
            return;
        }
        if self.owed.is_armed && self.owed.pages[page] {
            self.owed.waits_for = Some((page, write));
            self.owed.waited += 1;
            return;
        }
        let is_right = self.destination_vmm.ram[page] == self.owed.truth[page];
        self.checker.require(is_right, Violation::Differs);
        if let Some(value) = write {
            (self.destination_vmm.ram[page], self.owed.truth[page]) = (value, value);
        }
    }

    /// Whether the destination has each page of the source's that it is not owed.
    pub(crate) fn has_the_rest(&self) -> bool {
        (0..PAGES)
            .all(|page| self.owed.pages[page] || self.destination_vmm.ram[page] == self.source_vmm.ram[page])
    }
}
