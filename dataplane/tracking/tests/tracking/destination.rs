//! A destination in post-copy, as small as it can be: what the source has is made up, page by page.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ramferry_ram::{Access, Block, BlockIndex, BlockRange, Layout, Memory, Owed, PageRun, PageSets, RamFile};
use ramferry_tracking::postcopy::{FaultsError, PageFault, RemoteFaults};

pub(crate) const MIGRATION: &str = "a-migration";
const NEIGHBOURS: u64 = 8;

/// What every word of a page holds once it has arrived.
pub(crate) fn arrived(page: u64) -> u64 {
    0x5eed_0000_0000_0000 | page
}

pub(crate) fn arrived_bytes(page: u64, bytes: &mut [u8]) {
    bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&arrived(page).to_ne_bytes()));
}

/// The layout of blocks of that many pages of that size each.
pub(crate) fn layout(blocks: &[(u64, u64)]) -> Layout {
    let mut guest_address = 0;
    let blocks = (0..).zip(blocks).map(|(index, (pages, page_bytes))| {
        let length_bytes = pages * page_bytes;
        guest_address += length_bytes;
        Block {
            name: format!("ram{index}"),
            guest_address: guest_address - length_bytes,
            length_bytes,
            page_bytes: *page_bytes,
        }
    });
    Layout::new(blocks.collect()).unwrap()
}

pub(crate) fn memory(layout: &Layout, paths: &[&Path]) -> Arc<Memory> {
    let files = paths.iter().map(|path| RamFile::open(path, Access::ReadWrite).unwrap()).collect();
    Arc::new(Memory::new(layout.clone(), files, Access::ReadWrite).unwrap())
}

pub(crate) fn run(first: u64, count: u64) -> PageRun {
    PageRun { first, count }
}

/// The next access that waits.
pub(crate) fn next_fault(faults: &RemoteFaults) -> PageFault {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut told = Vec::new();
    while told.is_empty() {
        assert!(Instant::now() < deadline, "no access waits");
        faults.wait(Duration::from_millis(100), &mut told).unwrap();
    }
    assert_eq!(told.len(), 1, "{told:?}");
    told[0]
}

/// What the source has of a page.
type Source<'a> = dyn Fn(BlockIndex, u64, &mut [u8]) + Sync + 'a;

pub(crate) struct Destination<'a> {
    memory: &'a Memory,
    owed: &'a Owed,
    faults: &'a RemoteFaults,
    source: &'a Source<'a>,
    /// Pages that somebody fetches, or fetched: a second one would undo what the guest wrote since.
    fetched: Mutex<HashSet<(BlockIndex, u64)>>,
}

impl<'a> Destination<'a> {
    pub(crate) fn new(
        memory: &'a Memory,
        owed: &'a Owed,
        faults: &'a RemoteFaults,
        source: &'a Source<'a>,
    ) -> Self {
        Self { memory, owed, faults, source, fetched: Mutex::default() }
    }

    /// Answers faults with so many threads, and fetches what nobody asked for once `before_rest` returned, until
    /// nothing is owed.
    pub(crate) fn serve(&self, threads: usize, before_rest: impl FnOnce()) {
        let enough = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while !enough.load(Ordering::Relaxed) {
                        self.answer().unwrap();
                    }
                });
            }
            before_rest();
            self.fetch_rest();
            while !self.owed.is_empty() {
                std::thread::yield_now();
            }
            enough.store(true, Ordering::Relaxed);
        });
    }

    fn answer(&self) -> Result<(), FaultsError> {
        let mut told = Vec::new();
        self.faults.wait(Duration::from_millis(5), &mut told)?;
        for PageFault { block, page, .. } in told {
            self.fetch(block, page);
            let pages = self.memory.layout().block(block).unwrap().pages();
            for near in page.saturating_sub(NEIGHBOURS)..(page + NEIGHBOURS).min(pages) {
                if !self.owed.is_owed(block, near).unwrap() {
                    self.faults.let_in_present(block, run(near, 1))?;
                }
            }
        }
        Ok(())
    }

    fn fetch(&self, block: BlockIndex, page: u64) {
        if self.owed.is_owed(block, page).unwrap() {
            if !self.fetched.lock().unwrap().insert((block, page)) {
                return;
            }
            let length = self.memory.layout().block(block).unwrap().page_bytes;
            let mut bytes = vec![0; length as usize];
            (self.source)(block, page, &mut bytes);
            let range = BlockRange { block, offset: page * length, length };
            self.memory.span(range).unwrap().write_from(&bytes);
            assert_eq!(self.owed.clear(block, run(page, 1)).unwrap(), 1);
        }
        self.faults.let_in(block, run(page, 1)).unwrap();
    }

    fn fetch_rest(&self) {
        let owed: PageSets = self.owed.to_page_sets().unwrap();
        for (block, set) in owed.iter() {
            set.runs().flat_map(|run| run.first..run.end()).for_each(|page| self.fetch(block, page));
        }
    }
}
