//! What the copying threads of one migration share: the pages still to copy,
//! the windows that are registered for them, and what the destination holds.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use ramferry_fabric::windows::{Acquire, Window, WindowAction, WindowId, Windows};
use ramferry_fabric::{Domain, RegionKey, RegisterError, Rights};
use ramferry_ram::{BlockIndex, BlockRange, Memory, PageRun, PageSets};

use crate::batch::batches;
use crate::counters::Counters;
use crate::pacer::Pacer;
use crate::pool::Pool;
use crate::recheck::Notes;
use crate::{MoverError, PeerOrder};

/// Longest range that a thread takes at once: long enough that its costs
/// vanish, short enough that it stays in a core's cache between the zero scan
/// and the copy, and that threads share a round evenly.
pub(crate) const CHUNK_BYTES: u64 = 1 << 20;

/// Sends an order to the destination's agent; `false` when that is lost.
/// May block while the control stream is full.
pub type SendOrder = Box<dyn Fn(PeerOrder) -> bool + Send + Sync>;

/// One pass of all copying threads over a round's pages.
#[derive(Debug)]
pub(crate) struct Pass {
    /// The guest stands still: no bandwidth limit.
    pub(crate) guest_paused: bool,
    stop: AtomicBool,
}

impl Pass {
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// What a thread is to do next.
pub(crate) enum Next {
    Chunk(Chunk),
    /// The next window is not registered yet.
    Wait,
    /// Every page of the pass has been handed out.
    Done,
}

/// A range to copy, within one window that is registered on both sides and
/// stays so until the chunk is given back.
pub(crate) struct Chunk {
    pub(crate) range: BlockRange,
    pub(crate) window: WindowId,
    pub(crate) local_key: RegionKey,
    pub(crate) remote_key: RegionKey,
}

pub(crate) struct Copy {
    pub(crate) memory: Arc<Memory>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) pacer: Pacer,
    /// Only where pages are filled late.
    pub(crate) notes: OnceLock<Notes>,
    domain: Arc<dyn Domain>,
    order: SendOrder,
    pool: Pool,
    failed: Box<dyn Fn(MoverError) + Send + Sync>,
    plan: Mutex<Plan>,
    /// Notified when the awaited position is ready.
    ready: Condvar,
    /// Notified when any window is: for those that wait each for a page of its own.
    registered: Condvar,
    /// Pages whose bytes at the destination may differ from zero.
    destination_holds: Mutex<PageSets>,
}

struct Plan {
    windows: Windows,
    registrations: HashMap<WindowId, Registration>,
    todo: PageSets,
    cursor: (BlockIndex, u64),
    /// The position that those wait for who take what comes next, if they do: it is the same for all.
    awaited: Option<(BlockIndex, u64)>,
}

/// A window's way through registration on both sides.
struct Registration {
    range: BlockRange,
    local: Option<RegionKey>,
    remote: Option<RegionKey>,
    /// Who still has to release it, once that was ordered.
    releasing: Option<Holders>,
}

/// Sides that hold a window.
#[derive(Clone, Copy)]
struct Holders {
    local: bool,
    remote: bool,
}

/// Orders and work that follow from a change of the plan, to be carried out
/// when the plan is not locked any more.
#[derive(Default)]
struct Follow {
    register: Vec<Window>,
    release: Vec<(WindowId, Option<RegionKey>)>,
}

impl Copy {
    pub(crate) fn new(
        memory: Arc<Memory>,
        domain: Arc<dyn Domain>,
        windows: Windows,
        destination_presence: PageSets,
        order: SendOrder,
        registration_workers: usize,
        failed: Box<dyn Fn(MoverError) + Send + Sync>,
    ) -> Arc<Self> {
        let todo = PageSets::new(memory.layout());
        Arc::new(Self {
            memory,
            counters: Arc::default(),
            pacer: Pacer::new(None),
            notes: OnceLock::new(),
            domain,
            order,
            pool: Pool::new("register", registration_workers),
            failed,
            plan: Mutex::new(Plan {
                windows,
                registrations: HashMap::new(),
                todo,
                cursor: (BlockIndex(0), 0),
                awaited: None,
            }),
            ready: Condvar::new(),
            registered: Condvar::new(),
            destination_holds: Mutex::new(destination_presence),
        })
    }

    /// Begins a pass over `pages`. No other may be under way.
    pub(crate) fn begin(self: &Arc<Self>, pages: PageSets, guest_paused: bool) -> Arc<Pass> {
        self.set_todo(pages);
        Arc::new(Pass { guest_paused, stop: AtomicBool::new(false) })
    }

    /// From now on the pass under way is over `pages`, for the first of which windows are registered. No chunk may have been
    /// handed out.
    pub(crate) fn set_todo(self: &Arc<Self>, pages: PageSets) {
        let mut follow = Follow::default();
        {
            let mut plan = self.plan();
            plan.windows.begin_round(&pages);
            plan.todo = pages;
            plan.cursor = (BlockIndex(0), 0);
            plan.awaited = None;
            plan.advance(&mut follow);
        }
        self.carry_out(follow);
    }

    /// Pages of the last pass that no thread took.
    pub(crate) fn take_unsent(&self) -> PageSets {
        let empty = PageSets::new(self.memory.layout());
        std::mem::replace(&mut self.plan().todo, empty)
    }

    /// The next chunk, of at most `most_bytes` but a whole page.
    pub(crate) fn next(self: &Arc<Self>, pass: &Pass, most_bytes: u64) -> Next {
        if pass.is_stopped() {
            return Next::Done;
        }
        let mut follow = Follow::default();
        let next = self.plan().next(most_bytes, &mut follow);
        self.carry_out(follow);
        next
    }

    /// The chunk that begins at `page`, of at most `most_bytes` but a whole page; [`Next::Done`] where that page was handed out
    /// already, or is not of the pass. The pass goes on behind it.
    pub(crate) fn next_at(
        self: &Arc<Self>,
        pass: &Pass,
        block: BlockIndex,
        page: u64,
        most_bytes: u64,
    ) -> Next {
        if pass.is_stopped() {
            return Next::Done;
        }
        let mut follow = Follow::default();
        let next = self.plan().next_at(block, page, most_bytes, &mut follow);
        self.carry_out(follow);
        next
    }

    /// Gives back a chunk whose operations have all completed.
    pub(crate) fn give_back(self: &Arc<Self>, window: WindowId) {
        let mut follow = Follow::default();
        {
            let mut plan = self.plan();
            plan.windows.release(window);
            plan.advance(&mut follow);
        }
        self.carry_out(follow);
    }

    /// Sleeps until what is to be copied next is registered, at most `timeout`.
    pub(crate) fn wait_for_windows(&self, timeout: Duration) {
        drop(self.ready.wait_timeout_while(self.plan(), timeout, |plan| plan.awaited.is_some()));
    }

    /// Sleeps until the window of that page is registered, at most `timeout`; whether it is.
    pub(crate) fn wait_for_window(&self, block: BlockIndex, page: u64, timeout: Duration) -> bool {
        let plan = self.plan();
        let offset = page * plan.todo.page_bytes(block);
        let is_awaited = |plan: &mut Plan| !plan.windows.is_ready(block, offset);
        let waited = self.registered.wait_timeout_while(plan, timeout, is_awaited);
        !waited.expect("no panic while it is held").1.timed_out()
    }

    /// Notes what became of the pages of a chunk; the runs returned are zero
    /// here and must be made zero at the destination.
    pub(crate) fn settle(&self, block: BlockIndex, data: &[PageRun], zero: &[PageRun]) -> Vec<PageRun> {
        let mut holds = self.destination_holds.lock().expect("no panic while it is held");
        let holds = holds.block_mut(block);
        let mut to_clear = Vec::new();
        for run in zero {
            let mut from = run.first;
            while let Some(held) = holds.next_run_before(from, run.end()) {
                to_clear.push(held);
                from = held.end();
            }
            holds.remove_run(*run);
        }
        for run in data {
            holds.insert_run(*run);
        }
        to_clear
    }

    /// Orders pages to be made zero at the destination.
    pub(crate) fn order_zero(&self, block: BlockIndex, runs: Vec<PageRun>) {
        if !runs.is_empty() {
            (self.order)(PeerOrder::ZeroPages { block, runs });
        }
    }

    pub(crate) fn remote_registered(&self, windows: Vec<(WindowId, Result<RegionKey, String>)>) {
        let named = |message| MoverError::RemoteRegistration { message };
        let results = windows.into_iter().map(|(id, result)| (id, result.map_err(named)));
        self.settle_registrations(results, |registration, key| registration.remote = Some(key));
    }

    pub(crate) fn remote_released(self: &Arc<Self>, windows: &[WindowId]) {
        for id in windows {
            self.released(*id, |holders| holders.remote = false);
        }
    }

    /// Windows now, their bytes, and the most bytes so far.
    pub(crate) fn pinned(&self) -> (u64, u64, u64) {
        let plan = self.plan();
        let windows = plan.registrations.len() as u64;
        (windows, plan.windows.registered_bytes(), plan.windows.peak_bytes())
    }

    /// Ends the registration threads after what they have begun.
    pub(crate) fn close(&self) {
        self.pool.close();
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().expect("no panic while it is held")
    }

    fn carry_out(self: &Arc<Self>, follow: Follow) {
        if !follow.register.is_empty() {
            for batch in batches(&follow.register) {
                let (copy, batch) = (Arc::clone(self), batch.to_vec());
                self.pool.run(move || copy.register(&batch));
            }
            (self.order)(PeerOrder::RegisterWindows(follow.register));
        }
        if !follow.release.is_empty() {
            let ids = follow.release.iter().map(|(id, _)| *id).collect();
            for (id, local) in follow.release {
                let copy = Arc::clone(self);
                self.pool.run(move || copy.deregister(id, local));
            }
            (self.order)(PeerOrder::ReleaseWindows(ids));
        }
    }

    fn register(&self, windows: &[Window]) {
        let register = |window: &Window| {
            let started = Instant::now();
            let region = self.domain.register(window.range, Rights::LOCAL).map_err(|error| {
                self.counters.add_failed_registration(&error);
                MoverError::Registration(error)
            })?;
            self.counters.add_registration(window.range.length, started.elapsed());
            Ok(region.key)
        };
        let results: Vec<_> = windows.iter().map(|window| (window.id, register(window))).collect();
        self.settle_registrations(results, |registration, key| registration.local = Some(key));
    }

    fn deregister(self: &Arc<Self>, id: WindowId, local: Option<RegionKey>) {
        let started = Instant::now();
        let result: Result<(), RegisterError> = local.map_or(Ok(()), |key| self.domain.deregister(key));
        if local.is_some() && result.is_ok() {
            self.counters.add_deregistration(started.elapsed());
        }
        match result {
            Ok(()) => self.released(id, |holders| holders.local = false),
            Err(error) => (self.failed)(MoverError::Registration(error)),
        }
    }

    /// Takes note of what one side made of windows, and wakes the copying threads if it is what they wait for.
    fn settle_registrations(
        &self,
        results: impl IntoIterator<Item = (WindowId, Result<RegionKey, MoverError>)>,
        settle: impl Fn(&mut Registration, RegionKey),
    ) {
        let mut plan = self.plan();
        for (id, result) in results {
            match result {
                Ok(key) => plan.registered(id, |registration| settle(registration, key)),
                Err(error) => {
                    // Told before the range is tried again, which fails for another reason.
                    (self.failed)(error);
                    plan.failed(id);
                }
            }
        }
        if plan.awaited.is_some_and(|(block, offset)| plan.windows.is_ready(block, offset)) {
            plan.awaited = None;
            self.ready.notify_all();
        }
        self.registered.notify_all();
    }

    /// A side has released a window; a peer may say so more than once, or unasked.
    fn released(self: &Arc<Self>, id: WindowId, release: impl FnOnce(&mut Holders)) {
        let mut follow = Follow::default();
        {
            let mut plan = self.plan();
            let Some(holders) = plan.registrations.get_mut(&id).and_then(|entry| entry.releasing.as_mut())
            else {
                return;
            };
            release(holders);
            if !holders.local && !holders.remote {
                plan.registrations.remove(&id);
                plan.windows.deregistered(id);
                plan.advance(&mut follow);
            }
        }
        self.carry_out(follow);
    }
}

impl Plan {
    fn next(&mut self, most_bytes: u64, follow: &mut Follow) -> Next {
        match self.next_run(most_bytes) {
            Some((block, run)) => {
                let next = self.take(block, run, follow);
                if matches!(next, Next::Wait) {
                    self.awaited = Some((block, run.first * self.todo.page_bytes(block)));
                }
                next
            }
            None => Next::Done,
        }
    }

    fn next_at(&mut self, block: BlockIndex, page: u64, most_bytes: u64, follow: &mut Follow) -> Next {
        let most = (most_bytes / self.todo.page_bytes(block)).max(1);
        match self.todo.block(block).next_run_capped(page, most) {
            Some(run) if run.first == page => self.take(block, run, follow),
            _ => Next::Done,
        }
    }

    /// Takes the part of a run that its first page's window covers.
    fn take(&mut self, block: BlockIndex, run: PageRun, follow: &mut Follow) -> Next {
        let page_bytes = self.todo.page_bytes(block);
        let position = (block, run.first * page_bytes);
        let acquired = self.windows.acquire(position.0, position.1);
        self.advance(follow);
        let Acquire::Ready { id, bytes } = acquired else { return Next::Wait };
        let registration = &self.registrations[&id];
        let (Some(local_key), Some(remote_key)) = (registration.local, registration.remote) else {
            unreachable!("a window is ready only when both sides have registered it");
        };
        debug_assert!(registration.range.block == block);
        let pages = run.count.min(bytes / page_bytes);
        assert!(pages > 0, "a window covers whole pages");
        let taken = PageRun { first: run.first, count: pages };
        self.todo.block_mut(block).remove_run(taken);
        self.cursor = (block, taken.end());
        let range = BlockRange { block, offset: taken.first * page_bytes, length: pages * page_bytes };
        Next::Chunk(Chunk { range, window: id, local_key, remote_key })
    }

    /// The next pages to copy, as many as one chunk holds: from the cursor on, then from the start.
    fn next_run(&mut self, most_bytes: u64) -> Option<(BlockIndex, PageRun)> {
        let found = self.run_from(self.cursor, most_bytes).or_else(|| {
            let start = (BlockIndex(0), 0);
            if self.todo.is_empty() { None } else { self.run_from(start, most_bytes) }
        });
        self.cursor = found.map_or_else(|| (self.end(), 0), |(block, run)| (block, run.first));
        found
    }

    fn run_from(
        &self,
        (mut block, mut page): (BlockIndex, u64),
        most_bytes: u64,
    ) -> Option<(BlockIndex, PageRun)> {
        while block < self.end() {
            let most = (most_bytes / self.todo.page_bytes(block)).max(1);
            if let Some(run) = self.todo.block(block).next_run_capped(page, most) {
                return Some((block, run));
            }
            (block, page) = (BlockIndex(block.0 + 1), 0);
        }
        None
    }

    /// Behind the last block.
    fn end(&self) -> BlockIndex {
        BlockIndex(u32::try_from(self.todo.iter().count()).expect("blocks are counted by 32 bits"))
    }

    /// One side has registered a window.
    fn registered(&mut self, id: WindowId, settle: impl FnOnce(&mut Registration)) {
        let Some(registration) = self.registrations.get_mut(&id).filter(|entry| entry.releasing.is_none())
        else {
            return;
        };
        settle(registration);
        if registration.local.is_some() && registration.remote.is_some() {
            self.windows.registered(id);
        }
    }

    /// One side could not register a window. A destination may say so of one that is ready; that one stays as it is.
    fn failed(&mut self, id: WindowId) {
        let pending = |entry: &Registration| {
            entry.releasing.is_none() && (entry.local.is_none() || entry.remote.is_none())
        };
        if self.registrations.get(&id).is_some_and(pending) {
            self.registrations.remove(&id);
            self.windows.failed(id);
        }
    }

    fn advance(&mut self, follow: &mut Follow) {
        let mut actions = Vec::new();
        self.windows.actions(&mut actions);
        for action in actions {
            match action {
                WindowAction::Register(window) => {
                    let entry =
                        Registration { range: window.range, local: None, remote: None, releasing: None };
                    self.registrations.insert(window.id, entry);
                    follow.register.push(window);
                }
                WindowAction::Deregister(id) => {
                    let entry = self.registrations.get_mut(&id).expect("it was registered");
                    entry.releasing = Some(Holders { local: true, remote: true });
                    follow.release.push((id, entry.local));
                }
            }
        }
    }
}
