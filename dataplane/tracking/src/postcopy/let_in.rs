//! Letting accesses in.

use std::ops::AddAssign;

use ramferry_ram::{Access, BlockIndex, PageRun};

use super::userfaultfd::Continued;
use super::{FaultsError, RemoteFaults};

/// How often the kernel may put off to let in the same page, and how often a hole may be one again.
const MAX_TRIES: u32 = 1000;

/// What letting in did, over all mappings of the pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LetIn {
    /// Pages mapped by it.
    pub mapped_pages: u64,
    /// Pages that were let in before; who waits for one was woken.
    pub present_pages: u64,
    /// Holes that were filled first; they are among the mapped ones.
    pub populated_pages: u64,
    /// Holes that were left alone.
    pub hole_pages: u64,
}

impl AddAssign for LetIn {
    fn add_assign(&mut self, more: Self) {
        self.mapped_pages += more.mapped_pages;
        self.present_pages += more.present_pages;
        self.populated_pages += more.populated_pages;
        self.hole_pages += more.hole_pages;
    }
}

/// What becomes of a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holes {
    Fill,
    Leave,
}

impl RemoteFaults {
    /// Lets the VMM at the pages of `run`, whose bytes are in the file, and wakes who waits for one of them. A hole
    /// is filled with zeros first. Must not be asked for a page that is owed.
    ///
    /// # Errors
    /// When they are not pages of `block`, or the kernel refuses.
    pub fn let_in(&self, block: BlockIndex, run: PageRun) -> Result<LetIn, FaultsError> {
        self.let_in_all(block, run, Holes::Fill)
    }

    /// The same, but a hole stays one: for pages that nobody has asked for.
    ///
    /// # Errors
    /// As [`let_in`](Self::let_in).
    pub fn let_in_present(&self, block: BlockIndex, run: PageRun) -> Result<LetIn, FaultsError> {
        self.let_in_all(block, run, Holes::Leave)
    }

    fn let_in_all(&self, block: BlockIndex, run: PageRun, holes: Holes) -> Result<LetIn, FaultsError> {
        let page_bytes = self.places.check(block, run)?;
        let mut done = LetIn::default();
        for (start, end) in self.places.ranges(block, run) {
            done += self.let_in_range(block, page_bytes, (start, end), holes)?;
        }
        Ok(done)
    }

    /// Lets in what one mapping has of a run.
    fn let_in_range(
        &self,
        block: BlockIndex,
        page_bytes: u64,
        (start, end): (u64, u64),
        holes: Holes,
    ) -> Result<LetIn, FaultsError> {
        let failed = |source| FaultsError::of_call(self.vmm, "UFFDIO_CONTINUE", source);
        let mut done = LetIn::default();
        let (mut at, mut whole, mut tries) = (start, true, 0);
        // Who waits for a page that was there has lost a race, and was not woken.
        let mut to_wake: Option<(u64, u64)> = None;
        while at < end {
            let until = if whole { end } else { at + page_bytes };
            let next = match self.userfaultfd.let_in(at, until).map_err(failed)? {
                Continued::Mapped(bytes) => {
                    done.mapped_pages += bytes / page_bytes;
                    at + bytes
                }
                Continued::Present => {
                    done.present_pages += 1;
                    to_wake = Some((to_wake.map_or(at, |(first, _)| first), at + page_bytes));
                    at + page_bytes
                }
                Continued::Hole if holes == Holes::Leave => {
                    done.hole_pages += 1;
                    at + page_bytes
                }
                Continued::Hole => {
                    done.populated_pages += u64::from(tries == 0);
                    self.fill(block, page_bytes, at)?;
                    at
                }
                Continued::Busy => {
                    std::thread::yield_now();
                    at
                }
                // The VMM may have split it, by mprotect(2), madvise(2) or mbind(2).
                Continued::NotOneMapping if until - at > page_bytes => {
                    whole = false;
                    at
                }
                Continued::NotOneMapping => {
                    self.check_unmapped(at)?;
                    at + page_bytes
                }
            };
            tries = if next == at { tries + 1 } else { 0 };
            if tries > MAX_TRIES {
                return Err(FaultsError::Busy { operation: "UFFDIO_CONTINUE" });
            }
            at = next;
        }
        if let Some((start, end)) = to_wake {
            self.wake(start, end)?;
        }
        Ok(done)
    }

    fn fill(&self, block: BlockIndex, page_bytes: u64, address: u64) -> Result<(), FaultsError> {
        let offset = self.places.offset_of(address).ok_or(FaultsError::ForeignAddress { address })?;
        self.memory.mapping(block).populate(offset, page_bytes, Access::ReadWrite).map_err(FaultsError::Ram)
    }

    /// Of an address at which nothing can be let in: whether the VMM has given up what it had mapped there. Nobody waits
    /// for that; what it mapped in its stead is the business of [`recheck`](Self::recheck).
    fn check_unmapped(&self, address: u64) -> Result<(), FaultsError> {
        let now = self.places.look_again(self.vmm)?;
        if self.places.is_same_at(&now, address) {
            return Err(FaultsError::MappingChanged { vmm: self.vmm, start: address });
        }
        Ok(())
    }
}
