//! Which windows come next, and which make room for them.

use std::cmp::Ordering;

use ramferry_ram::{BlockIndex, BlockRange, PageRun};

use super::table::{Entry, State};
use super::{Position, RegistrationMode, Window, WindowAction, WindowId, Windows};

/// How many windows may be ahead for each one configured, if they are short:
/// scattered pages must not make the copy wait for a round trip each.
const SHORT_WINDOWS: usize = 32;

/// How far ahead of the cursor windows are.
#[derive(Default)]
struct Lead {
    windows: usize,
    bytes: u64,
}

/// Room that is kept for windows that have to wait until others are deregistered.
#[derive(Default)]
struct Promised {
    windows: usize,
    bytes: u64,
}

impl Promised {
    fn add(&mut self, bytes: u64) {
        self.windows += 1;
        self.bytes += bytes;
    }
}

impl Windows {
    pub(super) fn plan(&mut self, out: &mut Vec<WindowAction>) {
        self.in_line.clear();
        let mut promised = Promised::default();
        let ahead = self.plan_from(self.cursor, &mut promised, out);
        match self.mode {
            // Often enough to keep most of the lead, not for every short window.
            RegistrationMode::Dynamic => self.windows_to_go = (ahead / 4).max(1),
            RegistrationMode::PinAll => {
                self.plan_from((BlockIndex(0), 0), &mut promised, out);
                self.windows_to_go = usize::MAX;
            }
        }
    }

    /// Registers what is wanted from `from` on; how many windows are ahead then.
    fn plan_from(&mut self, from: Position, promised: &mut Promised, out: &mut Vec<WindowAction>) -> usize {
        let mut lead = Lead::default();
        let mut at = from;
        while let Some((block, offset)) = self.next_wanted(at) {
            if self.is_ahead(&lead, block) {
                break;
            }
            if let Some(end) = self.table.refused_until(block, offset) {
                at = (block, end);
                continue;
            }
            let end = match self.table.covering(block, offset).map(|id| self.table.get(id)) {
                Some(entry) => {
                    if entry.state == State::Deregistering {
                        promised.add(entry.end() - offset);
                    }
                    entry.end()
                }
                None => {
                    let range = self.window_at(block, offset);
                    self.next_window_bytes = self.next_window_bytes.saturating_mul(2);
                    if !self.make_room(range, promised, out) {
                        self.starved = true;
                        break;
                    }
                    self.register_or_promise(range, promised, out);
                    offset + range.length
                }
            };
            lead.windows += 1;
            lead.bytes += end - offset;
            at = (block, end);
        }
        lead.windows
    }

    fn register_or_promise(
        &mut self,
        range: BlockRange,
        promised: &mut Promised,
        out: &mut Vec<WindowAction>,
    ) {
        // Room that a nearer window waits for must not be taken first.
        if self.in_line.is_empty() && self.table.has_room(range.length) {
            self.register(range, out);
        } else {
            promised.add(range.length);
            self.in_line.push_back(range);
        }
    }

    pub(super) fn register(&mut self, range: BlockRange, out: &mut Vec<WindowAction>) {
        let id = WindowId(self.next_id);
        self.next_id += 1;
        self.table.insert(id, range);
        out.push(WindowAction::Register(Window { id, range }));
    }

    fn is_ahead(&self, lead: &Lead, block: BlockIndex) -> bool {
        if self.mode == RegistrationMode::PinAll {
            return false;
        }
        let enough_bytes = self.blocks[block.get()].window_bytes.saturating_mul(self.ahead_windows as u64);
        lead.bytes >= enough_bytes || lead.windows >= self.ahead_windows.saturating_mul(SHORT_WINDOWS)
    }

    /// The first wanted page at or after `at`.
    fn next_wanted(&self, (block, offset): Position) -> Option<Position> {
        let mut from = offset;
        for index in block.get()..self.blocks.len() {
            let block = BlockIndex(index as u32);
            let page_bytes = self.blocks[index].page_bytes;
            if let Some(run) = self.wanted.block(block).next_run_capped(from / page_bytes, 1) {
                return Some((block, run.first * page_bytes));
            }
            from = 0;
        }
        None
    }

    /// The window to register for the wanted page at `offset`.
    fn window_at(&self, block: BlockIndex, offset: u64) -> BlockRange {
        let shape = &self.blocks[block.get()];
        let wanted = self.wanted.block(block);
        let whole_pages = (self.next_window_bytes / shape.page_bytes).max(1) * shape.page_bytes;
        let longest = offset.saturating_add(shape.window_bytes.min(whole_pages)).min(shape.length_bytes);
        let limit = longest.min(self.table.free_until(block, offset));
        let mut end = offset;
        while end < limit {
            let next = wanted.next_run_before(end / shape.page_bytes, limit / shape.page_bytes);
            let Some(run) = next else { break };
            if run.first * shape.page_bytes - end > self.hole_tolerance_bytes {
                break;
            }
            end = run.end() * shape.page_bytes;
        }
        BlockRange { block, offset, length: end - offset }
    }

    /// Evicts until `range` fits beside what stays and what is promised, once the
    /// evicted are gone. Whether that was possible.
    fn make_room(&mut self, range: BlockRange, promised: &Promised, out: &mut Vec<WindowAction>) -> bool {
        loop {
            if self.table.will_have_room(promised.bytes.saturating_add(range.length), promised.windows + 1) {
                return true;
            }
            let Some(victim) = self.victim((range.block, range.offset)) else { return false };
            self.table.deregister(victim);
            out.push(WindowAction::Deregister(victim));
        }
    }

    /// The least recently used window that the round needs no more; or else the one
    /// that it needs last, if that is after `wanted`.
    fn victim(&self, wanted: Position) -> Option<WindowId> {
        let idle = || self.table.idle_windows();
        idle().find(|id| !self.is_needed(self.table.get(*id))).or_else(|| {
            let last = idle().max_by_key(|id| self.table.get(*id).start())?;
            (self.table.get(last).start() > wanted).then_some(last)
        })
    }

    /// Whether `entry` covers a wanted page at or after the cursor.
    pub(super) fn is_needed(&self, entry: &Entry) -> bool {
        let block = entry.range.block;
        let from = match block.cmp(&self.cursor.0) {
            Ordering::Less => return false,
            Ordering::Equal => entry.range.offset.max(self.cursor.1),
            Ordering::Greater => entry.range.offset,
        };
        let page_bytes = self.blocks[block.get()].page_bytes;
        let first = from / page_bytes;
        let count = (entry.end() / page_bytes).saturating_sub(first);
        self.wanted.block(block).intersects(PageRun { first, count })
    }
}
