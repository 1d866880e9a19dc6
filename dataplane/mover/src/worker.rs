//! A copying thread: drives one link through the passes and fences that the
//! migration's driver orders.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use ramferry_fabric::windows::WindowId;
use ramferry_fabric::{Completion, Link, OpId, Place, PostError, Transfer};
use ramferry_ram::{BlockIndex, BlockRange, PageHasher, PageRun};

use crate::MoverError;
use crate::copy::{CHUNK_BYTES, Chunk, Copy, Next, Pass};
use crate::counters::{CompletionStatus, Opcode, Stall};
use crate::recheck::Recheck;

/// Longest operation that is posted at once.
pub(crate) const TRANSFER_BYTES: u64 = 1 << 20;
/// How long a thread that has nothing to do spins before it sleeps. Waking a
/// sleeper costs some 50 us, so that spinning longer can at most halve the wait.
pub(crate) const SPIN: Duration = Duration::from_micros(50);
/// Longest sleep, so that a stop is seen soon. A link wakes its thread when something completes; each look without
/// that takes processor time that others may need, by as many threads as there are links.
pub(crate) const NAP: Duration = Duration::from_millis(10);
/// A link that completes nothing for so long is dead.
pub(crate) const STALL_LIMIT: Duration = Duration::from_secs(30);
/// Bytes written between two fences within a pass, so that windows can be
/// released while it is under way.
const PROVE_BYTES: u64 = 8 << 20;
/// Runs of zero pages that are kept for one order.
const ZERO_RUNS: usize = 4096;

/// What a copying thread is told to do.
pub(crate) enum Job {
    Copy(Arc<Pass>),
    Recheck(Arc<Recheck>),
    Fence,
}

/// Operations of one chunk, or a fence, on their way.
struct InFlight {
    purpose: Purpose,
    /// When each of those under way was posted. A link completes them in that order.
    posted: VecDeque<Instant>,
    /// More are being posted.
    is_open: bool,
}

enum Purpose {
    /// Writes into this window.
    Writes(WindowId),
    /// A fence; it proves what was written into these windows.
    Fence(Vec<WindowId>),
}

impl Purpose {
    fn opcode(&self) -> Opcode {
        match self {
            Purpose::Writes(_) => Opcode::Write,
            Purpose::Fence(_) => Opcode::Fence,
        }
    }
}

pub(crate) struct Worker {
    link: Box<dyn Link>,
    copy: Arc<Copy>,
    in_flight: HashMap<u64, InFlight>,
    next_id: u64,
    completions: Vec<Completion>,
    zero: Vec<(BlockIndex, PageRun)>,
    /// Once pages are filled late.
    hasher: Option<PageHasher>,
    /// Windows whose writes have completed. That alone does not prove placement:
    /// a window is given back, and may be released, only behind a fence.
    unproven: Vec<WindowId>,
    unproven_bytes: u64,
    idle_since: Option<Instant>,
    /// Waiting within the job under way.
    waited: Duration,
}

impl Worker {
    pub(crate) fn new(link: Box<dyn Link>, copy: Arc<Copy>) -> Self {
        Self {
            link,
            copy,
            in_flight: HashMap::new(),
            next_id: 0,
            completions: Vec::new(),
            zero: Vec::new(),
            hasher: None,
            unproven: Vec::new(),
            unproven_bytes: 0,
            idle_since: None,
            waited: Duration::ZERO,
        }
    }

    /// Runs jobs until there will be no more, then closes the link.
    pub(crate) fn run(mut self, jobs: &Receiver<Job>, report: impl Fn(Result<(), MoverError>)) {
        while let Some(job) = next_job(jobs) {
            let started = Instant::now();
            self.waited = Duration::ZERO;
            report(match job {
                Job::Copy(pass) => self.copy_pass(&pass),
                Job::Recheck(recheck) => self.recheck(&recheck),
                Job::Fence => self.fence(),
            });
            self.copy.counters.add_busy(started.elapsed().saturating_sub(self.waited));
        }
        self.link.close();
    }

    fn copy_pass(&mut self, pass: &Pass) -> Result<(), MoverError> {
        loop {
            self.reap()?;
            if !pass.guest_paused && self.pace(pass) {
                continue;
            }
            match self.copy.next(pass, CHUNK_BYTES) {
                Next::Chunk(chunk) => {
                    self.progressed();
                    self.send(&chunk)?;
                }
                Next::Wait => {
                    // It may be our windows that are waited for.
                    self.prove()?;
                    self.idle(Stall::Registration)?;
                }
                Next::Done => break,
            }
        }
        self.flush_zero();
        if pass.guest_paused {
            // The guest waits: what is placed is not asked for apart.
            return self.fence();
        }
        self.drain()
    }

    fn recheck(&mut self, recheck: &Recheck) -> Result<(), MoverError> {
        let copy = Arc::clone(&self.copy);
        let Some(notes) = copy.notes.get() else {
            unreachable!("nothing is rechecked before late writes are expected");
        };
        let hasher = self.hasher.get_or_insert_with(|| notes.hasher());
        recheck.run(&copy.memory, notes, hasher).map_err(MoverError::Ram)
    }

    /// Waits until all that this thread ever wrote is in the peer's memory, which where nothing was written since the last
    /// fence it is.
    fn fence(&mut self) -> Result<(), MoverError> {
        if self.unproven.is_empty() && self.in_flight.is_empty() {
            return Ok(());
        }
        self.post_fence()?;
        self.drain()?;
        // What was under way when the fence was posted was posted before it.
        for window in self.unproven.drain(..) {
            self.copy.give_back(window);
        }
        Ok(())
    }

    /// Posts a fence behind what has completed, if anything has.
    fn prove(&mut self) -> Result<(), MoverError> {
        if self.unproven.is_empty() { Ok(()) } else { self.post_fence() }
    }

    fn post_fence(&mut self) -> Result<(), MoverError> {
        self.unproven_bytes = 0;
        let windows = std::mem::take(&mut self.unproven);
        let id = self.begin(Purpose::Fence(windows));
        self.post(|link| link.post_fence(OpId(id)))?;
        self.posted(id, Instant::now());
        self.finish_posting(id);
        Ok(())
    }

    fn send(&mut self, chunk: &Chunk) -> Result<(), MoverError> {
        let (data, zero) = self.scan(chunk.range)?;
        let block = chunk.range.block;
        let page_bytes = self.page_bytes(block);
        for run in self.copy.settle(block, &data, &zero) {
            self.zero.push((block, run));
        }
        if self.zero.len() >= ZERO_RUNS {
            self.flush_zero();
        }
        let id = self.begin(Purpose::Writes(chunk.window));
        for run in data {
            let (start, end) = (run.first * page_bytes, run.end() * page_bytes);
            let mut offset = start;
            while offset < end {
                let length = TRANSFER_BYTES.min(end - offset);
                let transfer = Transfer {
                    id: OpId(id),
                    local: Place { key: chunk.local_key, offset },
                    remote: Place { key: chunk.remote_key, offset },
                    length: u32::try_from(length).expect("at most TRANSFER_BYTES"),
                };
                self.post(|link| link.post_write(transfer))?;
                self.copy.counters.note_first_write();
                let now = Instant::now();
                self.posted(id, now);
                self.copy.pacer.spend(now, length);
                offset += length;
            }
            self.copy.counters.add_data(end - start, run.count);
        }
        self.finish_posting(id);
        self.unproven_bytes += chunk.range.length;
        if self.unproven_bytes >= PROVE_BYTES { self.prove() } else { Ok(()) }
    }

    /// Splits a range's pages into runs that hold data and runs that are zero.
    fn scan(&mut self, range: BlockRange) -> Result<(Vec<PageRun>, Vec<PageRun>), MoverError> {
        let page_bytes = self.page_bytes(range.block);
        let (mut data, mut zero): (Vec<PageRun>, Vec<PageRun>) = (Vec::new(), Vec::new());
        let first = range.offset / page_bytes;
        for page in first..first + range.length / page_bytes {
            let place = BlockRange { block: range.block, offset: page * page_bytes, length: page_bytes };
            let runs = if self.is_zero(page, place)? { &mut zero } else { &mut data };
            match runs.last_mut() {
                Some(run) if run.end() == page => run.count += 1,
                _ => runs.push(PageRun { first: page, count: 1 }),
            }
        }
        let zero_pages: u64 = zero.iter().map(|run| run.count).sum();
        self.copy.counters.add_zero(zero_pages * page_bytes, zero_pages);
        Ok((data, zero))
    }

    /// Whether a page is zero. Where pages are filled late, notes what it holds.
    fn is_zero(&mut self, page: u64, place: BlockRange) -> Result<bool, MoverError> {
        let Some(notes) = self.copy.notes.get() else {
            return Ok(self.copy.memory.span(place)?.is_zero());
        };
        let hasher = self.hasher.get_or_insert_with(|| notes.hasher());
        let found = hasher.hash(&self.copy.memory, place)?;
        notes.note(place.block, page, found.hash);
        Ok(found.is_zero)
    }

    fn page_bytes(&self, block: BlockIndex) -> u64 {
        self.copy.memory.layout().blocks()[block.get()].page_bytes
    }

    /// Orders the zero runs gathered so far, block by block.
    fn flush_zero(&mut self) {
        let mut zero = std::mem::take(&mut self.zero);
        zero.sort_unstable_by_key(|(block, run)| (*block, run.first));
        for group in zero.chunk_by(|a, b| a.0 == b.0) {
            self.copy.order_zero(group[0].0, group.iter().map(|(_, run)| *run).collect());
        }
    }

    /// Posts, waiting while the link's queue is full.
    fn post(
        &mut self,
        mut post: impl FnMut(&mut dyn Link) -> Result<(), PostError>,
    ) -> Result<(), MoverError> {
        loop {
            match post(&mut *self.link) {
                Ok(()) => return Ok(()),
                Err(PostError::Full) => {
                    self.reap()?;
                    self.idle(Stall::Link)?;
                }
                Err(error) => return Err(MoverError::Post(error)),
            }
        }
    }

    fn begin(&mut self, purpose: Purpose) -> u64 {
        self.next_id += 1;
        self.in_flight.insert(self.next_id, InFlight { purpose, posted: VecDeque::new(), is_open: true });
        self.next_id
    }

    fn posted(&mut self, id: u64, now: Instant) {
        if let Some(in_flight) = self.in_flight.get_mut(&id) {
            in_flight.posted.push_back(now);
            self.copy.counters.add_posted(in_flight.purpose.opcode());
        }
    }

    fn finish_posting(&mut self, id: u64) {
        if let Some(in_flight) = self.in_flight.get_mut(&id) {
            in_flight.is_open = false;
        }
        self.settle_if_done(id);
    }

    fn completed(&mut self, id: u64, status: CompletionStatus, now: Instant) {
        let Some(in_flight) = self.in_flight.get_mut(&id) else {
            return;
        };
        let took = in_flight.posted.pop_front().map_or(Duration::ZERO, |posted| now - posted);
        self.copy.counters.add_completed(in_flight.purpose.opcode(), status, took);
        self.settle_if_done(id);
    }

    fn settle_if_done(&mut self, id: u64) {
        let is_done = |in_flight: &InFlight| in_flight.posted.is_empty() && !in_flight.is_open;
        if !self.in_flight.get(&id).is_some_and(is_done) {
            return;
        }
        match self.in_flight.remove(&id).map(|in_flight| in_flight.purpose) {
            Some(Purpose::Writes(window)) => self.unproven.push(window),
            Some(Purpose::Fence(windows)) => {
                for window in windows {
                    self.copy.give_back(window);
                }
            }
            None => {}
        }
    }

    /// Takes what has completed.
    fn reap(&mut self) -> Result<(), MoverError> {
        let mut completions = std::mem::take(&mut self.completions);
        self.link.poll(&mut completions);
        let now = Instant::now();
        let mut result = Ok(());
        for completion in completions.drain(..) {
            self.progressed();
            self.completed(completion.id.0, CompletionStatus::from(&completion.result), now);
            if let (Err(error), Ok(())) = (completion.result, &result) {
                result = Err(MoverError::Operation(error));
            }
        }
        self.completions = completions;
        result
    }

    /// Waits until every operation has completed.
    fn drain(&mut self) -> Result<(), MoverError> {
        self.progressed();
        while !self.in_flight.is_empty() {
            self.reap()?;
            if !self.in_flight.is_empty() {
                self.idle(Stall::Link)?;
            }
        }
        Ok(())
    }

    /// Waits while the bandwidth limit does not allow more; whether it did.
    fn pace(&mut self, pass: &Pass) -> bool {
        let now = Instant::now();
        let delay = self.copy.pacer.delay(now);
        if delay.is_zero() || pass.is_stopped() {
            return false;
        }
        thread::sleep(delay.min(NAP));
        self.stalled(Stall::Bandwidth, now.elapsed());
        true
    }

    fn progressed(&mut self) {
        self.idle_since = None;
    }

    /// Waits a moment: spins at first, then sleeps.
    fn idle(&mut self, cause: Stall) -> Result<(), MoverError> {
        let now = Instant::now();
        let since = *self.idle_since.get_or_insert(now);
        let waited = now.saturating_duration_since(since);
        if waited > STALL_LIMIT {
            return Err(MoverError::Stalled { cause: cause.as_str(), limit: STALL_LIMIT });
        }
        if waited < SPIN {
            std::hint::spin_loop();
        } else if self.in_flight.is_empty() && cause == Stall::Registration {
            self.copy.wait_for_windows(NAP);
        } else {
            self.link.wait(NAP).map_err(MoverError::Link)?;
        }
        self.stalled(cause, now.elapsed());
        Ok(())
    }

    fn stalled(&mut self, cause: Stall, elapsed: Duration) {
        self.waited += elapsed;
        self.copy.counters.add_stall(cause, elapsed);
    }
}

/// The next job; `None` when there will be none. Spins a moment first: within
/// a switchover the next job follows at once.
fn next_job(jobs: &Receiver<Job>) -> Option<Job> {
    let start = Instant::now();
    while start.elapsed() < SPIN {
        match jobs.try_recv() {
            Ok(job) => return Some(job),
            Err(std::sync::mpsc::TryRecvError::Disconnected) => return None,
            Err(std::sync::mpsc::TryRecvError::Empty) => std::hint::spin_loop(),
        }
    }
    jobs.recv().ok()
}
