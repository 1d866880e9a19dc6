//! The windows there are, and what is known of each.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ramferry_ram::{BlockIndex, BlockRange};

use super::{MAX_WINDOWS, Position, WindowId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Registering,
    Ready { in_flight: u64 },
    Deregistering,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) range: BlockRange,
    pub(super) state: State,
    last_used: u64,
}

impl Entry {
    pub(super) fn start(&self) -> Position {
        (self.range.block, self.range.offset)
    }

    pub(super) fn end(&self) -> u64 {
        self.range.offset + self.range.length
    }
}

#[derive(Debug)]
pub(super) struct Table {
    budget_bytes: u64,
    pub(super) max_windows: usize,
    entries: HashMap<WindowId, Entry>,
    /// For each block: where its windows start.
    starts: Vec<BTreeMap<u64, WindowId>>,
    /// For each block: the ranges that could not be registered, by start, to their ends.
    refused: Vec<BTreeMap<u64, u64>>,
    /// Windows that are ready and have nothing in flight, the least recently used first.
    idle: BTreeSet<(u64, WindowId)>,
    uses: u64,
    held_bytes: u64,
    peak_bytes: u64,
    leaving_bytes: u64,
    leaving_windows: usize,
}

impl Table {
    pub(super) fn new(blocks: usize, budget_bytes: u64) -> Self {
        Self {
            budget_bytes,
            max_windows: MAX_WINDOWS,
            entries: HashMap::new(),
            starts: vec![BTreeMap::new(); blocks],
            refused: vec![BTreeMap::new(); blocks],
            idle: BTreeSet::new(),
            uses: 0,
            held_bytes: 0,
            peak_bytes: 0,
            leaving_bytes: 0,
            leaving_windows: 0,
        }
    }

    pub(super) fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    pub(super) fn peak_bytes(&self) -> u64 {
        self.peak_bytes
    }

    /// Whether a window of `length` bytes fits beside all there are.
    pub(super) fn has_room(&self, length: u64) -> bool {
        self.held_bytes.saturating_add(length) <= self.budget_bytes && self.entries.len() < self.max_windows
    }

    /// Whether `windows` windows, of `bytes` together, fit beside those that are left
    /// when what is being deregistered is.
    pub(super) fn will_have_room(&self, bytes: u64, windows: usize) -> bool {
        let staying_bytes = self.held_bytes - self.leaving_bytes;
        let staying_windows = self.entries.len() - self.leaving_windows;
        staying_bytes.saturating_add(bytes) <= self.budget_bytes
            && staying_windows + windows <= self.max_windows
    }

    pub(super) fn get(&self, id: WindowId) -> &Entry {
        &self.entries[&id]
    }

    pub(super) fn find(&self, id: WindowId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// The windows that may be deregistered, the least recently used first.
    pub(super) fn idle(&self) -> Vec<WindowId> {
        self.idle_windows().collect()
    }

    pub(super) fn idle_windows(&self) -> impl Iterator<Item = WindowId> + '_ {
        self.idle.iter().map(|(_, id)| *id)
    }

    /// The window, in whatever state, that covers `offset`.
    pub(super) fn covering(&self, block: BlockIndex, offset: u64) -> Option<WindowId> {
        let (_, id) = self.starts[block.get()].range(..=offset).next_back()?;
        (offset < self.entries[id].end()).then_some(*id)
    }

    /// The end of the range around `offset` that could not be registered.
    pub(super) fn refused_until(&self, block: BlockIndex, offset: u64) -> Option<u64> {
        let (_, end) = self.refused[block.get()].range(..=offset).next_back()?;
        (offset < *end).then_some(*end)
    }

    /// Where a window that begins at `offset` has to end at the latest.
    pub(super) fn free_until(&self, block: BlockIndex, offset: u64) -> u64 {
        let window = self.starts[block.get()].range(offset..).next().map(|(start, _)| *start);
        let refused = self.refused[block.get()].range(offset..).next().map(|(start, _)| *start);
        window.unwrap_or(u64::MAX).min(refused.unwrap_or(u64::MAX))
    }

    pub(super) fn insert(&mut self, id: WindowId, range: BlockRange) {
        let entry = Entry { range, state: State::Registering, last_used: 0 };
        assert!(range.offset + range.length <= self.free_until(range.block, range.offset), "windows overlap");
        assert!(self.covering(range.block, range.offset).is_none(), "windows overlap");
        self.entries.insert(id, entry);
        self.starts[range.block.get()].insert(range.offset, id);
        self.held_bytes += range.length;
        self.peak_bytes = self.peak_bytes.max(self.held_bytes);
    }

    /// Its length, if it was being registered.
    pub(super) fn registered(&mut self, id: WindowId) -> Option<u64> {
        let entry = self.entries.get_mut(&id).filter(|entry| entry.state == State::Registering)?;
        entry.state = State::Ready { in_flight: 0 };
        self.uses += 1;
        entry.last_used = self.uses;
        self.idle.insert((entry.last_used, id));
        Some(entry.range.length)
    }

    pub(super) fn failed(&mut self, id: WindowId) {
        if self.entries.get(&id).is_some_and(|entry| entry.state == State::Registering) {
            let range = self.remove(id);
            self.refused[range.block.get()].insert(range.offset, range.offset + range.length);
        }
    }

    pub(super) fn deregistered(&mut self, id: WindowId) {
        if self.entries.get(&id).is_some_and(|entry| entry.state == State::Deregistering) {
            let range = self.remove(id);
            self.leaving_bytes -= range.length;
            self.leaving_windows -= 1;
        }
    }

    /// Whether the window that covers `offset` may be used.
    pub(super) fn is_ready(&self, block: BlockIndex, offset: u64) -> bool {
        let window = self.covering(block, offset).map(|id| self.get(id));
        window.is_some_and(|entry| matches!(entry.state, State::Ready { .. }))
    }

    /// Counts an operation in the window that covers `offset`, if that is ready:
    /// the window and its end.
    pub(super) fn acquire(&mut self, block: BlockIndex, offset: u64) -> Option<(WindowId, u64)> {
        let id = self.covering(block, offset)?;
        let entry = self.entries.get_mut(&id).expect("a window that covers something is there");
        let State::Ready { in_flight } = &mut entry.state else { return None };
        if *in_flight == 0 {
            self.idle.remove(&(entry.last_used, id));
        }
        *in_flight += 1;
        Some((id, entry.end()))
    }

    /// Whether that was the last operation in flight in it.
    pub(super) fn release(&mut self, id: WindowId) -> bool {
        let entry = self.entries.get_mut(&id).expect("a window with an operation in flight is there");
        let State::Ready { in_flight } = &mut entry.state else { panic!("no operation in flight in {id:?}") };
        *in_flight = in_flight.checked_sub(1).expect("an operation in flight in the window");
        if *in_flight > 0 {
            return false;
        }
        self.uses += 1;
        entry.last_used = self.uses;
        self.idle.insert((entry.last_used, id));
        true
    }

    pub(super) fn deregister(&mut self, id: WindowId) {
        let entry = self.entries.get_mut(&id).expect("a window to deregister is there");
        assert_eq!(entry.state, State::Ready { in_flight: 0 }, "only an idle window is deregistered");
        entry.state = State::Deregistering;
        self.idle.remove(&(entry.last_used, id));
        self.leaving_bytes += entry.range.length;
        self.leaving_windows += 1;
    }

    /// Lets every range be registered that could not be.
    pub(super) fn forgive(&mut self) {
        self.refused.iter_mut().for_each(BTreeMap::clear);
    }

    /// Lets the range around `offset` be registered again; whether it could not be.
    pub(super) fn forgive_at(&mut self, block: BlockIndex, offset: u64) -> bool {
        let refused = &mut self.refused[block.get()];
        let around = refused.range(..=offset).next_back().filter(|(_, end)| offset < **end);
        let start = around.map(|(start, _)| *start);
        start.is_some_and(|start| refused.remove(&start).is_some())
    }

    fn remove(&mut self, id: WindowId) -> BlockRange {
        let entry = self.entries.remove(&id).expect("a window to remove is there");
        self.starts[entry.range.block.get()].remove(&entry.range.offset);
        self.held_bytes -= entry.range.length;
        entry.range
    }
}
