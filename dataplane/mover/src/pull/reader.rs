//! One link that reads chunks from the source into this side's memory.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use ramferry_fabric::{Completion, Link, OpId, Place, PostError, Transfer};

use super::portion::Portion;
use crate::MoverError;
use crate::copy::{Chunk, Copy, Pass};
use crate::counters::{CompletionStatus, Opcode};
use crate::worker::{NAP, SPIN, STALL_LIMIT, TRANSFER_BYTES};

pub(super) struct Reader {
    link: Box<dyn Link>,
    copy: Arc<Copy>,
    pass: Arc<Pass>,
    in_flight: HashMap<u64, InFlight>,
    next_id: u64,
    completions: Vec<Completion>,
    idle_since: Option<Instant>,
    portion: Portion,
}

/// The reads of one chunk.
struct InFlight {
    chunk: Chunk,
    posted_at: Instant,
    reads: u64,
    is_open: bool,
}

impl Reader {
    pub(super) fn new(link: Box<dyn Link>, copy: Arc<Copy>, pass: Arc<Pass>) -> Self {
        Self {
            link,
            copy,
            pass,
            in_flight: HashMap::new(),
            next_id: 0,
            completions: Vec::new(),
            idle_since: None,
            portion: Portion::new(),
        }
    }

    pub(super) fn copy(&self) -> &Arc<Copy> {
        &self.copy
    }

    pub(super) fn pass(&self) -> &Pass {
        &self.pass
    }

    /// How long the next chunk may be that nobody waits for.
    pub(super) fn portion_bytes(&self) -> u64 {
        self.portion.bytes()
    }

    /// Chunks being read.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Begins to read a chunk. What arrives meanwhile is added to `arrived`.
    pub(super) fn read(&mut self, chunk: Chunk, arrived: &mut Vec<Chunk>) -> Result<(), MoverError> {
        self.idle_since = None;
        let (start, end) = (chunk.range.offset, chunk.range.offset + chunk.range.length);
        let (local_key, remote_key) = (chunk.local_key, chunk.remote_key);
        let id = self.next_id;
        self.next_id += 1;
        let posted_at = Instant::now();
        self.in_flight.insert(id, InFlight { chunk, posted_at, reads: 0, is_open: true });
        let mut offset = start;
        while offset < end {
            let length = TRANSFER_BYTES.min(end - offset);
            let transfer = Transfer {
                id: OpId(id),
                local: Place { key: local_key, offset },
                remote: Place { key: remote_key, offset },
                length: u32::try_from(length).expect("at most TRANSFER_BYTES"),
            };
            match self.link.post_read(transfer) {
                Ok(()) => {
                    self.copy.counters.add_posted(Opcode::Read);
                    self.in_flight.get_mut(&id).expect("it is open").reads += 1;
                    offset += length;
                }
                // Whoever takes the link away must not wait for a peer that fell silent.
                Err(PostError::Full) if self.pass.is_stopped() => return Err(MoverError::Stopped),
                Err(PostError::Full) => {
                    self.reap(arrived)?;
                    self.idle()?;
                }
                Err(error) => return Err(MoverError::Post(error)),
            }
        }
        self.in_flight.get_mut(&id).expect("it is open").is_open = false;
        self.settle(id, arrived);
        Ok(())
    }

    /// Takes what has completed; adds the chunks that are here whole to `arrived`.
    pub(super) fn reap(&mut self, arrived: &mut Vec<Chunk>) -> Result<(), MoverError> {
        let mut completions = std::mem::take(&mut self.completions);
        self.link.poll(&mut completions);
        let now = Instant::now();
        let mut result = Ok(());
        for completion in completions.drain(..) {
            self.idle_since = None;
            let id = completion.id.0;
            let Some(in_flight) = self.in_flight.get_mut(&id) else { continue };
            in_flight.reads = in_flight.reads.saturating_sub(1);
            let status = CompletionStatus::from(&completion.result);
            self.copy.counters.add_completed(Opcode::Read, status, now - in_flight.posted_at);
            match completion.result {
                Ok(()) => self.settle(id, arrived),
                // Never settled: its pages stay owed.
                Err(error) => {
                    in_flight.is_open = true;
                    if result.is_ok() {
                        result = Err(MoverError::Operation(error));
                    }
                }
            }
        }
        self.completions = completions;
        result
    }

    /// Waits a moment for the link.
    pub(super) fn idle(&mut self) -> Result<(), MoverError> {
        let now = Instant::now();
        let waited = now.saturating_duration_since(*self.idle_since.get_or_insert(now));
        if waited > STALL_LIMIT {
            return Err(MoverError::Stalled { cause: "reads of the source's memory", limit: STALL_LIMIT });
        }
        if waited < SPIN {
            // Whoever brings the bytes may have no other processor.
            std::thread::yield_now();
            return Ok(());
        }
        self.link.wait(NAP).map_err(MoverError::Link)
    }

    pub(super) fn close(self) {
        self.link.close();
    }

    fn settle(&mut self, id: u64, arrived: &mut Vec<Chunk>) {
        let is_whole = |in_flight: &InFlight| in_flight.reads == 0 && !in_flight.is_open;
        if self.in_flight.get(&id).is_some_and(is_whole)
            && let Some(whole) = self.in_flight.remove(&id)
        {
            self.portion.came_after(whole.posted_at.elapsed());
            arrived.push(whole.chunk);
        }
    }
}
