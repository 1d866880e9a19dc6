//! When to register which memory: the policy, without the registering.
//!
//! A round's pages are known before it begins and are copied in ascending order.
//! So the windows around them are registered ahead of the copy's cursor, by
//! whoever carries out the [`WindowAction`]s, and no copy waits for more than the
//! first. What was never touched is never registered. Under a pin budget, windows
//! that the round has passed make room, the least recently used first.
//!
//! ```text
//!              Register                  acquire
//!   (none) --------------> REGISTERING     +--+
//!     ^ ^                   |   |          |  v
//!     | +-------------------+   | registered  |
//!     |        failed           +-------> READY (operations in flight: 0, 1, ...)
//!     |                                    |  ^
//!     |                                    +--+ release
//!     |  deregistered                      |
//!     +----------------- DEREGISTERING <---+ Deregister (none in flight)
//! ```
//!
//! What holds at any time:
//!
//! * No two windows share a byte, whatever state they are in.
//! * The windows in all three states together stay within the pin budget.
//! * A window with operations in flight is not deregistered.
//! * While somebody waits for one position and operations in flight end in time,
//!   that position becomes ready: the budget has room for any one window.

mod plan;
mod table;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use ramferry_ram::{BlockIndex, BlockRange, Layout, PageRun, PageSets};
use thiserror::Error;

use table::Table;

/// Length of a window unless configured otherwise: long enough that the cost of
/// a registration's round trip vanishes, short enough that several are under way.
pub const DEFAULT_WINDOW_BYTES: u64 = 64 << 20;

/// Length of the first window unless configured otherwise: what the first write waits for.
pub const DEFAULT_FIRST_WINDOW_BYTES: u64 = 1 << 20;

/// Windows registered ahead of the cursor unless configured otherwise.
pub const DEFAULT_AHEAD_WINDOWS: usize = 16;

/// Longest gap between touched pages that is registered with them unless
/// configured otherwise. A gap that is registered takes memory.
pub const DEFAULT_HOLE_TOLERANCE_BYTES: u64 = 256 << 10;

/// Most windows that there may be at once, however short they are.
pub const MAX_WINDOWS: usize = 1 << 19;

/// What is registered, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RegistrationMode {
    /// Windows around the pages to be copied, ahead of the copy.
    Dynamic,
    /// All of the guest's RAM, in parallel pieces, once.
    PinAll,
}

impl RegistrationMode {
    /// The mode's name.
    pub fn as_str(self) -> &'static str {
        match self {
            RegistrationMode::Dynamic => "dynamic",
            RegistrationMode::PinAll => "pin-all",
        }
    }
}

/// How memory is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowConfig {
    /// What is registered, and when.
    pub mode: RegistrationMode,
    /// Length of a window, in bytes. Under a pin budget they are shorter, so that
    /// at least four fit; they are never shorter than a page.
    pub window_bytes: u64,
    /// Length of a session's first window, in bytes. Each is up to twice as long as the
    /// one before, until they are as long as others: the copy begins behind a short one.
    pub first_window_bytes: u64,
    /// Most bytes that may be registered at once.
    pub pin_budget_bytes: Option<u64>,
    /// Of the budget, what the links register for themselves.
    pub links_bytes: u64,
    /// Windows to register ahead of the cursor. Of windows that are shorter than
    /// `window_bytes`, more are registered ahead.
    pub ahead_windows: usize,
    /// Longest gap between wanted pages that is registered with them, in bytes.
    pub hole_tolerance_bytes: u64,
    /// The first window's name; the others count on from it. For sessions that follow one another: an answer that comes
    /// late names none of the next one's.
    pub first_id: u64,
}

impl WindowConfig {
    /// The defaults for `mode`, without a pin budget.
    pub fn new(mode: RegistrationMode) -> Self {
        Self {
            mode,
            window_bytes: DEFAULT_WINDOW_BYTES,
            first_window_bytes: DEFAULT_FIRST_WINDOW_BYTES,
            pin_budget_bytes: None,
            links_bytes: 0,
            ahead_windows: DEFAULT_AHEAD_WINDOWS,
            hole_tolerance_bytes: DEFAULT_HOLE_TOLERANCE_BYTES,
            first_id: 0,
        }
    }
}

/// Why memory cannot be registered as configured.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum WindowError {
    /// The pin budget has no room for one page.
    #[error(
        "the pin budget leaves {budget_bytes} bytes for the guest's RAM, less than one page of {page_bytes}: raise it"
    )]
    BudgetBelowPage {
        /// The pin budget, but for what the links take of it.
        budget_bytes: u64,
        /// Longest page of the guest.
        page_bytes: u64,
    },
    /// The pin budget has no room for the guest.
    #[error(
        "the pin budget leaves {budget_bytes} bytes for the guest's RAM, less than the {guest_bytes} that pin-all \
         registers: raise it, or register dynamically"
    )]
    BudgetBelowGuest {
        /// The pin budget, but for what the links take of it.
        budget_bytes: u64,
        /// The guest's RAM.
        guest_bytes: u64,
    },
    /// The windows are so short that the guest needs too many.
    #[error(
        "windows of {window_bytes} bytes make more than {MAX_WINDOWS} of the guest's RAM: make them longer"
    )]
    TooManyWindows {
        /// Length of a window.
        window_bytes: u64,
    },
}

/// Name of a window within one session. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WindowId(pub u64);

/// A range to be registered as one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its name.
    pub id: WindowId,
    /// What it covers: whole pages.
    pub range: BlockRange,
}

/// What is to be done now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WindowAction {
    /// Register it on both sides, then call [`Windows::registered`] or [`Windows::failed`].
    Register(Window),
    /// Deregister it on both sides, then call [`Windows::deregistered`].
    Deregister(WindowId),
}

/// Whether a position may be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquire {
    /// It may; one operation in flight was counted.
    Ready {
        /// The window that covers it, to be given to [`Windows::release`].
        id: WindowId,
        /// How many bytes from the position on the window covers: at least one page's rest.
        bytes: u64,
    },
    /// It has to be registered first; that is begun by the next [`Windows::actions`].
    NotYet,
}

/// A place in the copy's order: blocks in order, each from its start.
type Position = (BlockIndex, u64);

/// The windows of one session.
///
/// [`Windows::actions`] is to be called after every other call, or as soon as
/// anything waits: that is where room is made and registrations are begun.
#[derive(Debug)]
pub struct Windows {
    mode: RegistrationMode,
    ahead_windows: usize,
    hole_tolerance_bytes: u64,
    blocks: Vec<BlockShape>,
    table: Table,
    wanted: PageSets,
    cursor: Position,
    /// The window that the last operation was counted in.
    current: Option<WindowId>,
    /// Planned windows that wait until others are deregistered, the nearest first.
    in_line: VecDeque<BlockRange>,
    next_id: u64,
    /// Most bytes of the next window that is planned, however long windows may be.
    next_window_bytes: u64,
    total_registered_bytes: u64,
    /// Whether planning again could find anything to do.
    stale: bool,
    /// Whether the last planning stopped for want of room.
    starved: bool,
    /// How many more windows the cursor may go through before planning again.
    windows_to_go: usize,
    ended: bool,
}

#[derive(Debug)]
struct BlockShape {
    length_bytes: u64,
    page_bytes: u64,
    window_bytes: u64,
}

impl Windows {
    /// No windows yet, for a guest of this layout.
    ///
    /// # Errors
    /// When the configuration cannot work for it.
    pub fn new(config: WindowConfig, layout: &Layout) -> Result<Self, WindowError> {
        let budget_bytes =
            config.pin_budget_bytes.map_or(u64::MAX, |bytes| bytes.saturating_sub(config.links_bytes));
        let page_bytes = layout.blocks().iter().map(|block| block.page_bytes).max().unwrap_or(0);
        if budget_bytes < page_bytes {
            return Err(WindowError::BudgetBelowPage { budget_bytes, page_bytes });
        }
        let target_bytes = match config.mode {
            RegistrationMode::Dynamic => config.window_bytes.min(budget_bytes / 4),
            RegistrationMode::PinAll => config.window_bytes,
        };
        let shape = |block: &ramferry_ram::Block| BlockShape {
            length_bytes: block.length_bytes,
            page_bytes: block.page_bytes,
            window_bytes: (target_bytes / block.page_bytes).max(1) * block.page_bytes,
        };
        let blocks: Vec<_> = layout.blocks().iter().map(shape).collect();
        if config.mode == RegistrationMode::PinAll {
            let guest_bytes = layout.total_bytes();
            if budget_bytes < guest_bytes {
                return Err(WindowError::BudgetBelowGuest { budget_bytes, guest_bytes });
            }
            // One more a block: pieces need not begin where the block does. The first are shorter.
            let pieces = blocks.iter().map(|block| block.length_bytes.div_ceil(block.window_bytes) + 1);
            let shorter = config.window_bytes.max(1).ilog2()
                - config.first_window_bytes.clamp(1, config.window_bytes.max(1)).ilog2();
            if pieces.sum::<u64>() + u64::from(shorter) > MAX_WINDOWS as u64 {
                return Err(WindowError::TooManyWindows { window_bytes: config.window_bytes });
            }
        }
        let mut wanted = PageSets::new(layout);
        if config.mode == RegistrationMode::PinAll {
            for (index, block) in (0..).map(BlockIndex).zip(layout.blocks()) {
                wanted.block_mut(index).insert_run(PageRun { first: 0, count: block.pages() });
            }
        }
        Ok(Self {
            mode: config.mode,
            ahead_windows: config.ahead_windows.max(1),
            hole_tolerance_bytes: config.hole_tolerance_bytes,
            table: Table::new(blocks.len(), budget_bytes),
            blocks,
            wanted,
            cursor: (BlockIndex(0), 0),
            current: None,
            in_line: VecDeque::new(),
            next_id: config.first_id,
            next_window_bytes: config.first_window_bytes.max(1),
            total_registered_bytes: 0,
            stale: false,
            starved: false,
            windows_to_go: 0,
            ended: false,
        })
    }

    /// `pages` are copied next, in ascending order. With pin-all, everything is
    /// registered whatever they are, beginning with the first of them.
    ///
    /// # Panics
    /// When `pages` are of another layout.
    pub fn begin_round(&mut self, pages: &PageSets) {
        assert_eq!(pages.iter().count(), self.blocks.len(), "pages of this layout");
        let first = pages.iter().find_map(|(block, set)| {
            let run = set.next_run_capped(0, 1)?;
            Some((block, run.first * pages.page_bytes(block)))
        });
        if self.mode == RegistrationMode::Dynamic {
            self.wanted = pages.clone();
        }
        self.cursor = first.unwrap_or((BlockIndex(0), 0));
        self.current = None;
        self.table.forgive();
        self.ended = false;
        self.stale = true;
    }

    /// Adds what is to be done now to `out`.
    pub fn actions(&mut self, out: &mut Vec<WindowAction>) {
        if self.ended {
            return;
        }
        if self.stale {
            self.stale = false;
            self.starved = false;
            self.plan(out);
        }
        while let Some(range) = self.in_line.pop_front_if(|range| self.table.has_room(range.length)) {
            self.register(range, out);
        }
    }

    /// Both sides have registered `id`. Ignored unless it is being registered.
    pub fn registered(&mut self, id: WindowId) {
        if let Some(length) = self.table.registered(id) {
            self.total_registered_bytes += length;
            self.stale |= self.starved;
        }
    }

    /// `id` could not be registered, and is not on either side. Its range is tried
    /// again when it is asked for or a round begins. Ignored unless it is being
    /// registered.
    pub fn failed(&mut self, id: WindowId) {
        self.table.failed(id);
        self.stale |= self.starved;
    }

    /// Both sides have deregistered `id`. Ignored unless it is being deregistered.
    pub fn deregistered(&mut self, id: WindowId) {
        self.stale |= self.starved || self.table.find(id).is_some_and(|entry| self.is_needed(entry));
        self.table.deregistered(id);
    }

    /// Asks for the window that covers `offset` of `block`, and moves the cursor
    /// there. A position that the round did not want becomes wanted.
    ///
    /// # Panics
    /// When the block has no such offset.
    pub fn acquire(&mut self, block: BlockIndex, offset: u64) -> Acquire {
        assert!(offset < self.blocks[block.get()].length_bytes, "{offset:#x} is within {block}");
        let moved = std::mem::replace(&mut self.cursor, (block, offset)) != self.cursor;
        if let Some((id, end)) = self.table.acquire(block, offset) {
            if self.current.replace(id) != Some(id) {
                self.windows_to_go = self.windows_to_go.saturating_sub(1);
                self.stale |= self.windows_to_go == 0 || self.starved;
            }
            return Acquire::Ready { id, bytes: end - offset };
        }
        let page = PageRun { first: offset / self.blocks[block.get()].page_bytes, count: 1 };
        let wanted = self.wanted.block(block).intersects(page);
        self.wanted.block_mut(block).insert_run(page);
        let forgiven = self.table.forgive_at(block, offset);
        self.current = None;
        // Once all windows there are to be are planned, a cursor elsewhere plans no other.
        let is_planned =
            self.mode == RegistrationMode::PinAll && self.table.covering(block, offset).is_some();
        self.stale |= (moved && !is_planned) || forgiven || !wanted;
        Acquire::NotYet
    }

    /// Whether [`Windows::acquire`] would find `offset` of `block` ready.
    pub fn is_ready(&self, block: BlockIndex, offset: u64) -> bool {
        self.table.is_ready(block, offset)
    }

    /// An operation in `id` that [`Windows::acquire`] counted has completed.
    ///
    /// # Panics
    /// When no operation is in flight in it.
    pub fn release(&mut self, id: WindowId) {
        if self.table.release(id) {
            self.stale |= self.starved;
        }
    }

    /// Deregisters every window that has no operation in flight, and registers no
    /// more until a round begins. To be called again, after operations complete and
    /// registrations end, until [`Windows::registered_bytes`] is 0.
    pub fn end_all(&mut self, out: &mut Vec<WindowAction>) {
        self.ended = true;
        self.in_line.clear();
        for id in self.table.idle() {
            self.table.deregister(id);
            out.push(WindowAction::Deregister(id));
        }
    }

    /// Bytes of all windows there are: registered, and on the way to it and from it.
    pub fn registered_bytes(&self) -> u64 {
        self.table.held_bytes()
    }

    /// The most that [`Windows::registered_bytes`] has been.
    pub fn peak_bytes(&self) -> u64 {
        self.table.peak_bytes()
    }

    /// Bytes of every registration that was made, those undone since included.
    pub fn total_registered_bytes(&self) -> u64 {
        self.total_registered_bytes
    }
}
