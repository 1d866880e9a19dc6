//! A thread's work: writes through one link for a while, or copies as fast as
//! the limit goes, over the thread's share of the memory.

use std::time::{Duration, Instant};

use ramferry_fabric::limits::Sender;
use ramferry_fabric::{Completion, Link, OpId, Place, PostError, RegionKey, Transfer};
use ramferry_ram::Memory;

use crate::bench::memory::{BASE_PAGE_BYTES, range};
use crate::bench::{BenchError, Bounds};

/// Bytes posted and not completed on one link, about: enough for any network, and
/// little to wait for at a run's end.
const UNDER_WAY_BYTES: u64 = 16 << 20;
/// Posted before completions are looked at, and the clock.
const BURST_BYTES: u64 = 1 << 20;
/// As deep as `ib_write_bw` goes.
const MOST_UNDER_WAY: u64 = 128;
/// How long a thread that has nothing to do spins before it sleeps, as a copying thread does.
const SPIN: Duration = Duration::from_micros(50);
const NAP: Duration = Duration::from_millis(2);
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// Round trips that are measured, at most.
const MOST_ROUND_TRIPS: usize = 2000;
const FENCE: OpId = OpId(u64::MAX);

/// One thread's part of one run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) size: u32,
    pub(super) duration: Duration,
    pub(super) share: Share,
    pub(super) bounds: &'a Bounds,
}

/// A part of the memory, through which one walks round and round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    start: u64,
    length: u64,
}

impl Share {
    /// The part of thread `index` of `count`; none where a write does not fit into it.
    pub(super) fn of(memory_bytes: u64, index: u32, count: u32, size: u32) -> Option<Self> {
        let length = memory_bytes / u64::from(count) / BASE_PAGE_BYTES * BASE_PAGE_BYTES;
        (length >= u64::from(size)).then_some(Self { start: u64::from(index) * length, length })
    }

    /// Where the `turn`th write goes.
    fn offset(self, turn: u64, size: u32) -> u64 {
        self.start + turn % (self.length / u64::from(size)) * u64::from(size)
    }
}

/// Both sides' memory, as the link knows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys {
    pub(super) local: RegionKey,
    pub(super) remote: RegionKey,
}

/// Writes for as long as the job says, and a fence; how many writes that were.
pub(super) fn write(link: &mut dyn Link, keys: Keys, job: Job<'_>) -> Result<u64, BenchError> {
    let size = u64::from(job.size);
    let depth = (UNDER_WAY_BYTES / size).clamp(2, MOST_UNDER_WAY);
    let burst = (BURST_BYTES / size).clamp(1, depth);
    let mut progress = Progress::new();
    let mut writes = 0;
    let until = Instant::now() + job.duration;
    while Instant::now() < until {
        job.bounds.check()?;
        let room = burst.min(depth - progress.under_way);
        let mut posted = 0;
        while posted < room && post(link, keys, job.share.offset(writes, job.size), job.size)? {
            posted += 1;
            writes += 1;
        }
        progress.under_way += posted;
        if progress.reap(link)? == 0 && posted == 0 {
            progress.idle(link)?;
        }
    }
    fence(link, &mut progress, job.bounds)?;
    Ok(writes)
}

/// Writes all of the share once.
pub(super) fn warm(link: &mut dyn Link, keys: Keys, job: Job<'_>) -> Result<(), BenchError> {
    let mut progress = Progress::new();
    for turn in 0..job.share.length / u64::from(job.size) {
        job.bounds.check()?;
        while !post(link, keys, job.share.offset(turn, job.size), job.size)? {
            job.bounds.check()?;
            if progress.reap(link)? == 0 {
                progress.idle(link)?;
            }
        }
        progress.under_way += 1;
        progress.reap(link)?;
    }
    fence(link, &mut progress, job.bounds)
}

/// How long single fences take, on a link that carries nothing else.
pub(super) fn fences(
    link: &mut dyn Link,
    duration: Duration,
    bounds: &Bounds,
) -> Result<Vec<Duration>, BenchError> {
    round_trips(duration, bounds, || fence(link, &mut Progress::new(), bounds))
}

/// Sends for as long as the job says, until it is received; how many pieces that were.
pub(super) fn send(sender: &mut Sender, from: &Memory, job: Job<'_>) -> Result<u64, BenchError> {
    let size = u64::from(job.size);
    let mut pieces = 0;
    let until = Instant::now() + job.duration;
    while Instant::now() < until {
        job.bounds.check()?;
        let turns = job.share.length / size;
        let burst = (BURST_BYTES / size).clamp(1, turns - pieces % turns);
        sender.send(from, job.share.offset(pieces, job.size), burst * size, job.size)?;
        pieces += burst;
    }
    sender.settle()?;
    Ok(pieces)
}

/// How long a plain connection takes there and back.
pub(super) fn plain_round_trips(
    sender: &mut Sender,
    duration: Duration,
    bounds: &Bounds,
) -> Result<Vec<Duration>, BenchError> {
    round_trips(duration, bounds, || Ok(sender.settle()?))
}

/// Copies for as long as the job says; how many pieces that were.
pub(super) fn copy(from: &Memory, to: &Memory, job: Job<'_>) -> Result<u64, BenchError> {
    let burst = (BURST_BYTES / u64::from(job.size)).max(1);
    let mut pieces = 0;
    let until = Instant::now() + job.duration;
    while Instant::now() < until {
        job.bounds.check()?;
        for _ in 0..burst {
            let piece = range(job.share.offset(pieces, job.size), u64::from(job.size));
            to.span(piece)?.copy_from(from.span(piece)?);
            pieces += 1;
        }
    }
    Ok(pieces)
}

fn round_trips(
    duration: Duration,
    bounds: &Bounds,
    mut round_trip: impl FnMut() -> Result<(), BenchError>,
) -> Result<Vec<Duration>, BenchError> {
    let mut taken = Vec::with_capacity(MOST_ROUND_TRIPS);
    let until = Instant::now() + duration;
    while taken.len() < MOST_ROUND_TRIPS && Instant::now() < until {
        bounds.check()?;
        let started = Instant::now();
        round_trip()?;
        taken.push(started.elapsed());
    }
    Ok(taken)
}

/// Whether the link took it; it is full otherwise.
fn post(link: &mut dyn Link, keys: Keys, offset: u64, length: u32) -> Result<bool, BenchError> {
    let place = |key| Place { key, offset };
    let transfer =
        Transfer { id: OpId(offset), local: place(keys.local), remote: place(keys.remote), length };
    accepted(link.post_write(transfer))
}

/// Everything posted before has arrived when it returns.
fn fence(link: &mut dyn Link, progress: &mut Progress, bounds: &Bounds) -> Result<(), BenchError> {
    while !accepted(link.post_fence(FENCE))? {
        bounds.check()?;
        if progress.reap(link)? == 0 {
            progress.idle(link)?;
        }
    }
    progress.under_way += 1;
    while progress.under_way > 0 {
        if progress.reap(link)? == 0 {
            bounds.check()?;
            progress.idle(link)?;
        }
    }
    Ok(())
}

fn accepted(posted: Result<(), PostError>) -> Result<bool, BenchError> {
    match posted {
        Ok(()) => Ok(true),
        Err(PostError::Full) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// What is posted and not completed, and since when nothing was.
struct Progress {
    under_way: u64,
    idle_since: Option<Instant>,
    completions: Vec<Completion>,
}

impl Progress {
    fn new() -> Self {
        Self { under_way: 0, idle_since: None, completions: Vec::new() }
    }

    /// How many completed.
    fn reap(&mut self, link: &mut dyn Link) -> Result<u64, BenchError> {
        let count = link.poll(&mut self.completions) as u64;
        for completion in self.completions.drain(..) {
            completion.result?;
        }
        self.under_way -= count;
        if count > 0 {
            self.idle_since = None;
        }
        Ok(count)
    }

    fn idle(&mut self, link: &mut dyn Link) -> Result<(), BenchError> {
        let now = Instant::now();
        let waited = now.duration_since(*self.idle_since.get_or_insert(now));
        if waited > STALL_LIMIT {
            return Err(BenchError::Stalled(STALL_LIMIT));
        }
        if waited < SPIN {
            std::hint::spin_loop();
        } else {
            link.wait(NAP)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_do_not_overlap_and_hold_every_write_whole() {
        let shares: Vec<Share> = (0..3).filter_map(|index| Share::of(100 * 4096, index, 3, 5000)).collect();
        assert_eq!(shares.iter().map(|share| share.start / 4096).collect::<Vec<_>>(), [0, 33, 66]);
        for share in shares {
            for turn in 0..100 {
                let offset = share.offset(turn, 5000);
                assert!(offset >= share.start && offset + 5000 <= share.start + share.length);
            }
            assert_eq!((share.offset(0, 5000), share.offset(27, 5000)), (share.start, share.start));
        }
        assert_eq!(Share::of(100 * 4096, 0, 64, 5000), None);
    }
}
