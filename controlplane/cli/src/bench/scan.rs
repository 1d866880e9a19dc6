//! How fast memory is looked through for zero pages and hashed, and what a
//! harvest of written pages costs.
//!
//! A second process maps the memory and writes to it between harvests, as a VMM
//! does.

pub(crate) mod writer;

use std::time::Instant;

use ramferry_ram::{Access, BlockIndex, Memory, PageHasher, PageSets, zero};
use ramferry_tracking::{TrackedFile, Tracker, TrackerKind};
use serde::Serialize;

use self::writer::Writer;
use super::memory::{self, BASE_PAGE_BYTES, range};
use super::{BenchError, Bounds, Observer, Spread};
use crate::failure::chain;

/// Shares of the pages that are written before a harvest.
const DIRTY_PERCENT: [u64; 3] = [0, 20, 100];
/// Pages between two looks at the bounds.
const LOOK_PAGES: u64 = 4096;
/// The hasher's; any is as good.
const SEED: u64 = 1;

#[derive(Debug, Serialize)]
pub(crate) struct ScanReport {
    pub(crate) bench: &'static str,
    /// Whether everything was measured that is not told as skipped.
    pub(crate) complete: bool,
    pub(crate) memory_bytes: u64,
    pub(crate) runs: u32,
    /// How pages are compared with zero on this processor.
    pub(crate) zero_scan_by: &'static str,
    pub(crate) zero_scan: Vec<Pass>,
    /// Of every byte.
    pub(crate) page_hash: Option<Pass>,
    pub(crate) tracker: Option<&'static str>,
    pub(crate) harvest: Vec<Harvest>,
    /// Why there is none.
    pub(crate) harvest_skipped: Option<String>,
}

/// One pass over all of the memory.
#[derive(Debug, Serialize)]
pub(crate) struct Pass {
    pub(crate) pages: &'static str,
    pub(crate) bytes_per_second: Spread,
    pub(crate) seconds_per_gib: Spread,
    /// Each run's, in their order.
    pub(crate) seconds: Vec<f64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Harvest {
    pub(crate) dirty_percent: u64,
    /// Of tracked memory.
    pub(crate) seconds_per_gib: Spread,
    /// Each run's, in their order.
    pub(crate) seconds: Vec<f64>,
}

impl ScanReport {
    /// Of nothing yet.
    pub(crate) fn new(memory_bytes: u64, runs: u32) -> Self {
        Self {
            bench: "scan",
            complete: false,
            memory_bytes,
            runs,
            zero_scan_by: zero::implementation(),
            zero_scan: Vec::new(),
            page_hash: None,
            tracker: None,
            harvest: Vec::new(),
            harvest_skipped: None,
        }
    }
}

/// Measures all of it, into `report`.
pub(crate) fn measure(
    bounds: &Bounds,
    observer: &mut dyn Observer,
    report: &mut ScanReport,
) -> Result<(), BenchError> {
    let bytes = report.memory_bytes;
    let steps = 3 + DIRTY_PERCENT.len();
    observer.step(0, steps, "touching memory");
    let file = memory::file(bytes, BASE_PAGE_BYTES)?;
    let memory = memory::map(&file, bytes, Access::Read)?;
    let mut writer = Writer::start(&file, bytes)?;
    for (step, (pages, value)) in [("zero", 0), ("data", 1)].into_iter().enumerate() {
        observer.step(step, steps, &format!("zero scan of {pages} pages"));
        writer.write(100, value, bounds)?;
        let expected = if value == 0 { bytes / BASE_PAGE_BYTES } else { 0 };
        let mut seconds = Vec::new();
        for _ in 0..report.runs {
            let started = Instant::now();
            let seen = zero_pages(&memory, bytes, bounds)?;
            seconds.push(started.elapsed().as_secs_f64());
            if seen != expected {
                return Err(BenchError::Wrong { what: "pages were seen to be zero", seen, expected });
            }
        }
        report.zero_scan.extend(pass(pages, bytes, seconds));
    }
    observer.step(2, steps, "page hashes");
    let mut seconds = Vec::new();
    for _ in 0..report.runs {
        let started = Instant::now();
        hash_pages(&memory, bytes, bounds)?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    report.page_hash = pass("data", bytes, seconds);
    harvests(&file, &memory, &mut writer, bounds, observer, report)?;
    report.complete = true;
    Ok(())
}

fn pass(pages: &'static str, bytes: u64, seconds: Vec<f64>) -> Option<Pass> {
    let bytes_per_second = Spread::of(seconds.iter().map(|seconds| bytes as f64 / seconds))?;
    let seconds_per_gib = per_gib(bytes, &seconds)?;
    Some(Pass { pages, bytes_per_second, seconds_per_gib, seconds })
}

fn per_gib(bytes: u64, seconds: &[f64]) -> Option<Spread> {
    Some(Spread::of(seconds.iter().copied())?.times((1_u64 << 30) as f64 / bytes as f64))
}

fn zero_pages(memory: &Memory, bytes: u64, bounds: &Bounds) -> Result<u64, BenchError> {
    let mut zero = 0;
    for page in 0..bytes / BASE_PAGE_BYTES {
        if page % LOOK_PAGES == 0 {
            bounds.check()?;
        }
        zero += u64::from(memory.span(range(page * BASE_PAGE_BYTES, BASE_PAGE_BYTES))?.is_zero());
    }
    Ok(zero)
}

fn hash_pages(memory: &Memory, bytes: u64, bounds: &Bounds) -> Result<(), BenchError> {
    let mut hasher = PageHasher::new(SEED);
    for page in 0..bytes / BASE_PAGE_BYTES {
        if page % LOOK_PAGES == 0 {
            bounds.check()?;
        }
        hasher.hash(memory, range(page * BASE_PAGE_BYTES, BASE_PAGE_BYTES))?;
    }
    Ok(())
}

fn harvests(
    file: &ramferry_ram::RamFile,
    memory: &Memory,
    writer: &mut Writer,
    bounds: &Bounds,
    observer: &mut dyn Observer,
    report: &mut ScanReport,
) -> Result<(), BenchError> {
    let pages = report.memory_bytes / BASE_PAGE_BYTES;
    let tracked = TrackedFile { identity: file.identity(), pages, page_bytes: BASE_PAGE_BYTES };
    let mut tracker = match ramferry_tracking::arm(None, writer.pid(), &[tracked]) {
        Ok(tracker) => tracker,
        Err(error) => {
            bounds.check()?;
            report.harvest_skipped = Some(chain(&BenchError::Track(error)));
            return Ok(());
        }
    };
    report.tracker = Some(TrackerKind::as_str(tracker.kind()));
    // The first one brings what was written before.
    let mut harvested = PageSets::new(memory.layout());
    tracker.harvest(&mut harvested)?;
    let mut seconds = DIRTY_PERCENT.map(|_| Vec::new());
    for run in 0..report.runs {
        // In turns, so that whatever else the host does is in all of them.
        for (index, percent) in DIRTY_PERCENT.into_iter().enumerate() {
            observer.step(
                3 + index,
                3 + DIRTY_PERCENT.len(),
                &format!("harvest of {percent} % written, run {}", run + 1),
            );
            writer.write(percent, 1 + run as u8, bounds)?;
            seconds[index].push(harvest(tracker.as_mut(), memory, pages, percent)?);
        }
    }
    for (dirty_percent, seconds) in DIRTY_PERCENT.into_iter().zip(seconds) {
        let Some(seconds_per_gib) = per_gib(report.memory_bytes, &seconds) else { continue };
        report.harvest.push(Harvest { dirty_percent, seconds_per_gib, seconds });
    }
    Ok(())
}

fn harvest(tracker: &mut dyn Tracker, memory: &Memory, pages: u64, percent: u64) -> Result<f64, BenchError> {
    let mut written = PageSets::new(memory.layout());
    let harvest = tracker.harvest(&mut written)?;
    let expected = writer::dirty_pages(pages, percent).count() as u64;
    let set = written.block(BlockIndex(0));
    let seen = writer::dirty_pages(pages, percent).filter(|page| set.contains(*page)).count() as u64;
    if seen != expected {
        return Err(BenchError::Wrong { what: "written pages were harvested", seen, expected });
    }
    Ok(harvest.elapsed.as_secs_f64())
}
