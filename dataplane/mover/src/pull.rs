//! Post-copy at the destination: the guest runs, and what it is still owed is read from the source.
//!
//! ```text
//!  VMM touches a page -> fault --+-- not owed: let in, with its neighbours
//!                                `-- owed: read over a link of the fault threads' own -.
//!  stream threads: the rest, in order, from where the last fault was ------------------+-> bytes are in the file
//!                                                                                          -> no longer owed -> let in
//! ```
//!
//! There is one owner of what is owed, and nothing is ever written from afar: a page that was let in is the
//! guest's. What is owed outlives this process, and so does the VMM's registration: an agent that dies leaves a guest
//! that waits, and another takes both up.

mod portion;
mod reader;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ramferry_fabric::windows::{WindowConfig, Windows};
use ramferry_fabric::{Domain, Link};
use ramferry_ram::{BlockIndex, Memory, Owed, PageRun, PageSets};
use ramferry_tracking::postcopy::{PageFault, RemoteFaults};

use self::reader::Reader;
use crate::copy::{Chunk, Copy, Next, Pass, SendOrder};
use crate::counters::Counters;
use crate::{MoverError, Stall};

/// Threads that serve faults, each with a link of its own.
pub const FAULT_LINKS: usize = 2;
/// Read for a page that the guest waits for, from it on: what it is likely to want next. The page goes ahead of the rest, for
/// the guest waits for it alone.
const AROUND_BYTES: u64 = 64 << 10;
/// What is not owed is let in together, as far as it lies in one such piece.
const LET_IN_BYTES: u64 = 2 << 20;
/// Chunks that a stream thread has under way.
const DEPTH: usize = 2;
/// So long after a fault nothing is asked for that nobody waits for: one fault follows another, and what is under
/// way when it comes takes processors and the link from it.
const QUIET: Duration = Duration::from_micros(300);
/// However many faults there are, behind so long a quiet a stream thread goes on for [`TURN`].
const LONGEST_QUIET: Duration = Duration::from_millis(10);
const TURN: Duration = Duration::from_millis(2);
/// Between two looks whether to stop.
const PATIENCE: Duration = Duration::from_millis(100);
/// Between two looks at faults that cannot be served yet.
const RETRY: Duration = Duration::from_millis(1);

/// What a destination reads the source's memory with.
pub struct Readers {
    /// [`FAULT_LINKS`] for faults, the others for the stream: at least one.
    pub links: Vec<Box<dyn Link>>,
    /// Where windows are registered.
    pub domain: Arc<dyn Domain>,
    /// The registration policy.
    pub windows: WindowConfig,
    /// Threads that register.
    pub registration_workers: usize,
    /// To the source's agent.
    pub order: SendOrder,
}

/// What the threads tell the driver.
#[derive(Debug)]
pub enum PullReport {
    /// Nothing is owed any more.
    Pulled,
    /// The links of this attempt carry nothing more; the guest waits for what it is owed.
    LinkLost(u64, MoverError),
    /// The VMM ended.
    VmmEnded,
    /// The VMM cannot be served.
    Failed(MoverError),
}

/// Tells the driver.
type Report = Arc<dyn Fn(PullReport) + Send + Sync>;

/// The windows that are read through now, if any are.
pub(crate) type ReadsSlot = Arc<Mutex<Option<Arc<Copy>>>>;

pub(crate) struct Pull {
    shared: Arc<Shared>,
    fault_threads: Vec<JoinHandle<()>>,
    reading: Option<Reading>,
    attempts: u64,
    /// What answers of the source are for, while there are links.
    slot: ReadsSlot,
}

/// One attempt to read: until its links break.
struct Reading {
    copy: Arc<Copy>,
    pass: Arc<Pass>,
    /// For the stream, until it begins.
    stream_links: Vec<Reader>,
    stream_threads: Vec<JoinHandle<()>>,
    attempt: u64,
}

/// A page that is read for a fault.
struct FaultRead {
    block: BlockIndex,
    offset: u64,
    /// When the fault was heard of.
    since: Instant,
}

struct Shared {
    memory: Arc<Memory>,
    faults: RemoteFaults,
    owed: OnceLock<Owed>,
    counters: Arc<Counters>,
    /// One of each fault thread.
    readers: Vec<Mutex<Option<(u64, Reader)>>>,
    stop: AtomicBool,
    /// The guest runs, or is about to: what is owed is asked for, and its end is news.
    streaming: AtomicBool,
    told: AtomicBool,
    began: Instant,
    /// When the last fault came or was served, in microseconds since `began`.
    faulted_us: AtomicU64,
    report: Report,
}

impl Pull {
    /// Serves the faults of a VMM that was armed, from now on. Until it is known what is owed, they wait.
    pub(crate) fn begin(
        memory: Arc<Memory>,
        faults: RemoteFaults,
        counters: Arc<Counters>,
        report: Report,
        slot: ReadsSlot,
    ) -> Result<Self, MoverError> {
        let shared = Arc::new(Shared {
            memory,
            faults,
            owed: OnceLock::new(),
            counters,
            readers: (0..FAULT_LINKS).map(|_| Mutex::default()).collect(),
            stop: AtomicBool::new(false),
            streaming: AtomicBool::new(false),
            told: AtomicBool::new(false),
            began: Instant::now(),
            faulted_us: AtomicU64::new(0),
            report,
        });
        let mut pull = Self { shared, fault_threads: Vec::new(), reading: None, attempts: 0, slot };
        for index in 0..FAULT_LINKS {
            let shared = Arc::clone(&pull.shared);
            let builder = thread::Builder::new().name(format!("fault-{index}"));
            let body = move || {
                if let Err(error) = shared.serve_faults(index) {
                    shared.fail(error);
                }
            };
            pull.fault_threads.push(builder.spawn(body).map_err(MoverError::Thread)?);
        }
        Ok(pull)
    }

    /// What is owed. Only once.
    pub(crate) fn hold(&mut self, owed: Owed) {
        assert!(self.shared.owed.set(owed).is_ok(), "what is owed is held once");
        self.begin_pass();
    }

    /// Makes sure that all that reaches the guest's RAM still waits.
    pub(crate) fn confirm(&self) -> Result<(), MoverError> {
        Ok(self.shared.faults.confirm()?)
    }

    /// Takes links to the source, in the place of those before.
    pub(crate) fn connect(&mut self, readers: Readers) -> Result<(), MoverError> {
        self.disconnect();
        self.attempts += 1;
        let attempt = self.attempts;
        // Whoever settles windows may hold the copy a moment longer than this lives.
        let report = Arc::clone(&self.shared.report);
        let layout = self.shared.memory.layout();
        let copy = Copy::new(
            Arc::clone(&self.shared.memory),
            readers.domain,
            Windows::new(readers.windows, layout)?,
            PageSets::new(layout),
            readers.order,
            readers.registration_workers,
            Box::new(move |error| report(PullReport::LinkLost(attempt, error))),
        );
        // Before windows are ordered, which are answered at once.
        *lock(&self.slot) = Some(Arc::clone(&copy));
        let pass = copy.begin(PageSets::new(layout), true);
        let mut links: Vec<_> = readers
            .links
            .into_iter()
            .map(|link| Reader::new(link, Arc::clone(&copy), Arc::clone(&pass)))
            .collect();
        let stream_links = links.split_off(FAULT_LINKS.min(links.len().saturating_sub(1)));
        self.reading = Some(Reading { copy, pass, stream_links, stream_threads: Vec::new(), attempt });
        self.begin_pass();
        for (slot, reader) in self.shared.readers.iter().zip(links) {
            *lock(slot) = Some((attempt, reader));
        }
        if self.shared.streaming.load(Ordering::SeqCst) { self.stream() } else { Ok(()) }
    }

    /// Begins to read what nobody waits for, too.
    pub(crate) fn stream(&mut self) -> Result<(), MoverError> {
        self.shared.streaming.store(true, Ordering::SeqCst);
        if self.shared.owed.get().is_some_and(Owed::is_empty) {
            self.shared.tell_pulled();
        }
        let Some(reading) = &mut self.reading else { return Ok(()) };
        for (index, reader) in reading.stream_links.drain(..).enumerate() {
            let (shared, attempt) = (Arc::clone(&self.shared), reading.attempt);
            let builder = thread::Builder::new().name(format!("pull-{index}"));
            let body = move || {
                if let Err(error) = shared.stream(reader) {
                    (shared.report)(PullReport::LinkLost(attempt, error));
                }
            };
            reading.stream_threads.push(builder.spawn(body).map_err(MoverError::Thread)?);
        }
        Ok(())
    }

    /// Lets go of the links of `attempt`, if they are those in use; whether they were.
    pub(crate) fn lost(&mut self, attempt: u64) -> bool {
        let current = self.reading.as_ref().is_some_and(|reading| reading.attempt == attempt);
        if current {
            self.disconnect();
        }
        current
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.shared.memory
    }

    /// Whether it is known what is owed.
    pub(crate) fn is_held(&self) -> bool {
        self.shared.owed.get().is_some()
    }

    /// Whether there are links.
    pub(crate) fn is_connected(&self) -> bool {
        self.reading.is_some()
    }

    /// Windows there are and bytes pinned for them.
    pub(crate) fn pinned(&self) -> (u64, u64) {
        self.reading.as_ref().map_or((0, 0), |reading| {
            let (windows, bytes, _) = reading.copy.pinned();
            (windows, bytes)
        })
    }

    /// Bytes still owed.
    pub(crate) fn owed_bytes(&self) -> Option<u64> {
        self.shared.owed.get().map(Owed::bytes)
    }

    /// Ends the threads. Where nothing is owed any more, lets the VMM at everything and removes the account; otherwise both
    /// stay for whoever decides what becomes of a guest that lacks memory.
    pub(crate) fn end(mut self) -> Result<(), MoverError> {
        self.shared.stop.store(true, Ordering::Release);
        self.disconnect();
        for thread in self.fault_threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that serves faults panicked");
            }
        }
        let shared = Arc::into_inner(self.shared).expect("every thread has ended");
        match shared.owed.into_inner() {
            Some(owed) if owed.is_empty() => {
                shared.faults.end()?;
                Ok(owed.remove()?)
            }
            _ => Ok(()),
        }
    }

    fn begin_pass(&mut self) {
        let Some((reading, owed)) = self.reading.as_mut().zip(self.shared.owed.get()) else { return };
        match owed.to_page_sets() {
            Ok(pages) => reading.copy.set_todo(pages),
            Err(error) => (self.shared.report)(PullReport::Failed(error.into())),
        }
    }

    fn disconnect(&mut self) {
        let Some(reading) = self.reading.take() else { return };
        *lock(&self.slot) = None;
        reading.pass.stop();
        for slot in &self.shared.readers {
            if let Some((_, reader)) = lock(slot).take() {
                reader.close();
            }
        }
        for thread in reading.stream_threads {
            if thread.join().is_err() {
                tracing::error!("a thread that reads the source's memory panicked");
            }
        }
        for reader in reading.stream_links {
            reader.close();
        }
        reading.copy.close();
    }
}

impl Shared {
    fn serve_faults(&self, index: usize) -> Result<(), MoverError> {
        let mut waiting: Vec<(PageFault, Instant)> = Vec::new();
        let mut batch = Vec::new();
        let mut patience = PATIENCE;
        while !self.stop.load(Ordering::Acquire) {
            match self.faults.wait(patience, &mut batch) {
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            let now = Instant::now();
            waiting.extend(batch.drain(..).map(|fault| (fault, now)));
            patience = PATIENCE;
            if !waiting.is_empty() {
                self.note_fault();
                // A guest that waits raises no other fault: what can be served is not kept back for one.
                let may_go_on = self.serve(index, &mut waiting)?;
                self.note_fault();
                if !waiting.is_empty() {
                    patience = if may_go_on { Duration::ZERO } else { RETRY };
                }
            }
        }
        Ok(())
    }

    fn note_fault(&self) {
        self.faulted_us.store(self.began.elapsed().as_micros() as u64, Ordering::Relaxed);
    }

    /// How long a stream thread keeps out of the way of faults, having done so since `quiet_since`.
    fn quiet(&self, quiet_since: &mut Option<Instant>) -> Duration {
        let faulted = Duration::from_micros(self.faulted_us.load(Ordering::Relaxed));
        let quiet = QUIET.saturating_sub(self.began.elapsed().saturating_sub(faulted));
        if quiet.is_zero() {
            *quiet_since = None;
            return quiet;
        }
        let kept = quiet_since.get_or_insert_with(Instant::now).elapsed();
        if kept < LONGEST_QUIET {
            quiet
        } else {
            if kept >= LONGEST_QUIET + TURN {
                *quiet_since = None;
            }
            Duration::ZERO
        }
    }

    /// Lets in what is here, and reads what is not; leaves in `waiting` what cannot be had yet. Whether some of that can be
    /// by now.
    fn serve(&self, index: usize, waiting: &mut Vec<(PageFault, Instant)>) -> Result<bool, MoverError> {
        let Some(owed) = self.owed.get() else { return Ok(false) };
        waiting.sort_by_key(|(fault, since)| (fault.block, fault.page, *since));
        waiting.dedup_by_key(|(fault, _)| (fault.block, fault.page));
        let mut still_owed = Vec::new();
        for (fault, since) in waiting.drain(..) {
            if owed.is_owed(fault.block, fault.page)? {
                still_owed.push((fault, since));
            } else {
                self.let_in_around(owed, fault.block, fault.page)?;
            }
        }
        if still_owed.is_empty() {
            return Ok(false);
        }
        let mut may_go_on = false;
        let mut slot = lock(&self.readers[index]);
        if let Some((attempt, mut reader)) = slot.take() {
            let asked = still_owed.clone();
            match self.read_faults(&mut reader, &mut still_owed) {
                Ok(is_ready) => {
                    may_go_on = is_ready;
                    *slot = Some((attempt, reader));
                }
                Err(error @ (MoverError::Faults(_) | MoverError::Owed(_))) => return Err(error),
                Err(error) => {
                    reader.close();
                    // Nobody is told of them again.
                    still_owed = asked;
                    (self.report)(PullReport::LinkLost(attempt, error));
                }
            }
        }
        *waiting = still_owed;
        Ok(may_go_on)
    }

    /// Reads the pages that faults wait for, and behind each what is owed after it; leaves those that others are reading, or
    /// whose windows are not registered yet. For one of those it waits a moment: whether it is there then.
    fn read_faults(
        &self,
        reader: &mut Reader,
        faults: &mut Vec<(PageFault, Instant)>,
    ) -> Result<bool, MoverError> {
        let (mut begun, mut arrived, mut left) = (Vec::<FaultRead>::new(), Vec::new(), Vec::new());
        let mut awaited = None;
        for (fault, since) in faults.drain(..) {
            let page_bytes = self.page_bytes(fault.block);
            match reader.copy().next_at(reader.pass(), fault.block, fault.page, page_bytes) {
                Next::Chunk(chunk) => {
                    begun.push(FaultRead { block: fault.block, offset: chunk.range.offset, since });
                    reader.read(chunk, &mut arrived)?;
                }
                Next::Wait => {
                    awaited = Some((fault.block, fault.page));
                    left.push((fault, since));
                }
                Next::Done => left.push((fault, since)),
            }
        }
        *faults = left;
        // Over shm the pages are here by now.
        self.reap_faults(reader, &begun, &mut arrived)?;
        for read in &begun {
            let page_bytes = self.page_bytes(read.block);
            let after = read.offset / page_bytes + 1;
            if page_bytes < AROUND_BYTES
                && let Next::Chunk(chunk) =
                    reader.copy().next_at(reader.pass(), read.block, after, AROUND_BYTES - page_bytes)
            {
                reader.read(chunk, &mut arrived)?;
            }
        }
        loop {
            self.reap_faults(reader, &begun, &mut arrived)?;
            if reader.in_flight() == 0 {
                break;
            }
            if reader.pass().is_stopped() {
                return Err(MoverError::Stopped);
            }
            reader.idle()?;
        }
        Ok(awaited.is_some_and(|(block, page)| reader.copy().wait_for_window(block, page, RETRY)))
    }

    /// Lets in what has come.
    fn reap_faults(
        &self,
        reader: &mut Reader,
        begun: &[FaultRead],
        arrived: &mut Vec<Chunk>,
    ) -> Result<(), MoverError> {
        reader.reap(arrived)?;
        for chunk in arrived.drain(..) {
            let (block, offset) = (chunk.range.block, chunk.range.offset);
            let asked = begun.iter().find(|read| (read.block, read.offset) == (block, offset));
            self.arrived(reader.copy(), &chunk, asked.map(|read| read.since))?;
        }
        Ok(())
    }

    fn stream(&self, mut reader: Reader) -> Result<(), MoverError> {
        let mut arrived = Vec::new();
        let mut quiet_since = None;
        let streamed = loop {
            // What is under way stays owed; closing the link ends it.
            if reader.pass().is_stopped() {
                break Ok(());
            }
            if let Err(error) = reader.reap(&mut arrived) {
                break Err(error);
            }
            let came = !arrived.is_empty();
            let settled = arrived.drain(..).try_for_each(|chunk| self.arrived(reader.copy(), &chunk, None));
            if let Err(error) = settled {
                break Err(error);
            }
            let quiet = self.quiet(&mut quiet_since);
            if !quiet.is_zero() && reader.in_flight() == 0 {
                thread::sleep(quiet);
                continue;
            }
            let mut next = Next::Wait;
            if quiet.is_zero() && reader.in_flight() < DEPTH {
                next = reader.copy().next(reader.pass(), reader.portion_bytes());
            }
            let went_on = match next {
                Next::Chunk(chunk) => reader.read(chunk, &mut arrived),
                Next::Done if reader.in_flight() == 0 => break Ok(()),
                _ if came => Ok(()),
                Next::Wait if reader.in_flight() == 0 => {
                    let started = Instant::now();
                    reader.copy().wait_for_windows(PATIENCE);
                    self.counters.add_stall(Stall::Registration, started.elapsed());
                    Ok(())
                }
                _ => reader.idle(),
            };
            if let Err(error) = went_on {
                break Err(error);
            }
        };
        reader.close();
        match streamed {
            Err(error @ (MoverError::Faults(_) | MoverError::Owed(_))) => {
                self.fail(error);
                Ok(())
            }
            streamed => streamed,
        }
    }

    fn fail(&self, error: MoverError) {
        (self.report)(match error {
            MoverError::Faults(error) if error.vmm_ended() => PullReport::VmmEnded,
            error => PullReport::Failed(error),
        });
    }

    /// The bytes of a chunk are here: the guest, which may have waited for them since then, may have them.
    fn arrived(
        &self,
        copy: &Arc<Copy>,
        chunk: &Chunk,
        waited_since: Option<Instant>,
    ) -> Result<(), MoverError> {
        let owed = self.owed.get().expect("nothing is read before it is known what is owed");
        let page_bytes = self.page_bytes(chunk.range.block);
        let run = PageRun { first: chunk.range.offset / page_bytes, count: chunk.range.length / page_bytes };
        owed.clear(chunk.range.block, run)?;
        self.faults.let_in(chunk.range.block, run)?;
        if let Some(since) = waited_since {
            self.counters.add_fault(since.elapsed());
        }
        self.counters.add_data(chunk.range.length, run.count);
        copy.give_back(chunk.window);
        if owed.is_empty() {
            self.tell_pulled();
        }
        Ok(())
    }

    /// Faults are served before the guest runs, too, and nobody waits for this then.
    fn tell_pulled(&self) {
        if self.streaming.load(Ordering::SeqCst) && !self.told.swap(true, Ordering::AcqRel) {
            (self.report)(PullReport::Pulled);
        }
    }

    /// Lets the VMM at a page that is not owed, and at those around it that are not.
    fn let_in_around(&self, owed: &Owed, block: BlockIndex, page: u64) -> Result<(), MoverError> {
        let let_in = self.faults.let_in(block, PageRun { first: page, count: 1 })?;
        // Told of just before others let it in, and its neighbours with it: each would be a call in vain.
        if let_in.mapped_pages == 0 && let_in.present_pages > 0 {
            return Ok(());
        }
        let entry = &self.memory.layout().blocks()[block.get()];
        let piece = (LET_IN_BYTES / entry.page_bytes).max(1);
        let begin = page / piece * piece;
        let end = (begin + piece).min(entry.pages());
        let mut first = page;
        while first > begin && !owed.is_owed(block, first - 1)? {
            first -= 1;
        }
        let mut after = page + 1;
        while after < end && !owed.is_owed(block, after)? {
            after += 1;
        }
        // Its neighbours may never have been touched: they are not allocated for it.
        self.faults.let_in_present(block, PageRun { first, count: after - first })?;
        Ok(())
    }

    fn page_bytes(&self, block: BlockIndex) -> u64 {
        self.memory.layout().blocks()[block.get()].page_bytes
    }
}

fn lock<T>(slot: &Mutex<T>) -> MutexGuard<'_, T> {
    slot.lock().expect("no panic while it is held")
}
