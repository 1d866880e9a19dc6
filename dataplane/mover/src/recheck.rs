//! What each page held just before it was sent, and the comparison with what it holds now: for guests whose
//! pages are filled after the tracker reported them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use ramferry_ram::{
    BlockIndex, BlockRange, Layout, Memory, PageHash, PageHasher, PageRun, PageSets, RamError,
};

/// Pages whose hashes are allocated together.
const PIECE_PAGES: u64 = 8 << 10;
/// Most that a thread looks at between two looks at whether it should stop.
const CHUNK_BYTES: u64 = 1 << 20;

type Piece = Box<[AtomicU64]>;

/// The hashes of pages as they were sent: 8 bytes a page, allocated where pages are sent.
pub(crate) struct Notes {
    seed: u64,
    /// Of each block; 0 stands for a page that was not sent.
    blocks: Vec<Box<[OnceLock<Piece>]>>,
}

impl Notes {
    pub(crate) fn new(layout: &Layout) -> Self {
        let mut seed = [0; 8];
        if let Err(error) = getrandom::fill(&mut seed) {
            tracing::warn!(%error, "pages are hashed with a seed that a guest could know");
        }
        let pieces = |pages: u64| (0..pages.div_ceil(PIECE_PAGES)).map(|_| OnceLock::new()).collect();
        let blocks = layout.blocks().iter().map(|block| pieces(block.pages())).collect();
        Self { seed: u64::from_ne_bytes(seed), blocks }
    }

    pub(crate) fn hasher(&self) -> PageHasher {
        PageHasher::new(self.seed)
    }

    /// Must be called before the page is sent: a fill between the two then shows.
    pub(crate) fn note(&self, block: BlockIndex, page: u64, hash: PageHash) {
        let piece = &self.blocks[block.get()][(page / PIECE_PAGES) as usize];
        let piece = piece.get_or_init(|| (0..PIECE_PAGES).map(|_| AtomicU64::new(0)).collect());
        piece[(page % PIECE_PAGES) as usize].store(hash.value(), Ordering::Relaxed);
    }

    fn noted(&self, block: BlockIndex, page: u64) -> Option<PageHash> {
        let piece = self.blocks[block.get()][(page / PIECE_PAGES) as usize].get()?;
        PageHash::from_value(piece[(page % PIECE_PAGES) as usize].load(Ordering::Relaxed))
    }
}

/// One comparison, by all copying threads.
pub(crate) struct Recheck {
    todo: Mutex<Todo>,
    differing: Mutex<PageSets>,
    checked_bytes: AtomicU64,
    stop: AtomicBool,
}

struct Todo {
    pages: PageSets,
    cursor: (BlockIndex, u64),
}

impl Recheck {
    pub(crate) fn new(pages: PageSets, layout: &Layout) -> Self {
        Self {
            todo: Mutex::new(Todo { pages, cursor: (BlockIndex(0), 0) }),
            differing: Mutex::new(PageSets::new(layout)),
            checked_bytes: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    pub(crate) fn checked_bytes(&self) -> u64 {
        self.checked_bytes.load(Ordering::Relaxed)
    }

    /// Pages that do not hold what was noted of them, or of which nothing was.
    pub(crate) fn take_differing(&self, layout: &Layout) -> PageSets {
        let mut differing = self.differing.lock().expect("no panic while it is held");
        std::mem::replace(&mut *differing, PageSets::new(layout))
    }

    /// One thread's share.
    pub(crate) fn run(
        &self,
        memory: &Memory,
        notes: &Notes,
        hasher: &mut PageHasher,
    ) -> Result<(), RamError> {
        while !self.stop.load(Ordering::Acquire) {
            let next = self.todo.lock().expect("no panic while it is held").next();
            let Some((block, run)) = next else { break };
            let length = memory.layout().blocks()[block.get()].page_bytes;
            for page in run.first..run.end() {
                let found = hasher.hash(memory, BlockRange { block, offset: page * length, length })?;
                if notes.noted(block, page) != Some(found.hash) {
                    let mut differing = self.differing.lock().expect("no panic while it is held");
                    differing.block_mut(block).insert_run(PageRun { first: page, count: 1 });
                }
            }
            self.checked_bytes.fetch_add(run.count * length, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Todo {
    fn next(&mut self) -> Option<(BlockIndex, PageRun)> {
        let (mut block, mut page) = self.cursor;
        while block.get() < self.pages.iter().count() {
            let most = (CHUNK_BYTES / self.pages.page_bytes(block)).max(1);
            if let Some(run) = self.pages.block(block).next_run_capped(page, most) {
                self.cursor = (block, run.end());
                return Some((block, run));
            }
            (block, page) = (BlockIndex(block.0 + 1), 0);
            self.cursor = (block, page);
        }
        None
    }
}
