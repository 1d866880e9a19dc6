//! What a harvest and a zero scan cost, for each GiB, at several dirty shares.
//!
//! A second process maps the memory and writes to it between harvests.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use ramferry_ram::{Access, Block, BlockIndex, BlockRange, Layout, Mapping, Memory, PageSets, RamFile};
use ramferry_tracking::{TrackedFile, Tracker, TrackerKind};

use crate::measuring::report::Report;

const PAGE_BYTES: u64 = 4096;
const GIB: u64 = 1 << 30;
const DIRTY_PERCENT: [u64; 3] = [0, 20, 100];
pub(crate) const WRITER: &str = "--writer";

/// Measures each, `runs` times in turns, with the tracker that works here.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let file = tempfile::Builder::new().prefix("ramferry-bench").tempfile_in("/dev/shm")?;
    file.as_file().set_len(GIB)?;
    let ram = RamFile::open(file.path(), Access::Read)?;
    let identity = ram.identity();
    let block = Block { name: "ram".into(), guest_address: 0, length_bytes: GIB, page_bytes: PAGE_BYTES };
    let layout = Layout::new(vec![block])?;
    let memory = Memory::new(layout.clone(), vec![ram], Access::Read)?;
    let mut writer = Writer::start(file.path())?;
    writer.write(100, 1)?;
    let tracked = TrackedFile { identity, pages: GIB / PAGE_BYTES, page_bytes: PAGE_BYTES };
    let kind = ramferry_tracking::self_test(TrackerKind::UffdWp)
        .map_or(TrackerKind::SoftDirty, |()| TrackerKind::UffdWp);
    let mut tracker = ramferry_tracking::arm(Some(kind), writer.child.id(), &[tracked])?;
    harvest(tracker.as_mut(), &layout)?;
    for run in 1..=runs {
        eprintln!("harvest and zero scan: run {run} of {runs}");
        for percent in DIRTY_PERCENT {
            for (holds, value) in [("data", 1), ("zero pages", 0)] {
                writer.write(percent, value)?;
                let (pages, seconds) = harvest(tracker.as_mut(), &layout)?;
                let expected = GIB / PAGE_BYTES * percent / 100;
                ensure!(
                    pages.count() >= expected,
                    "{} of {expected} written pages were harvested",
                    pages.count()
                );
                report.add(&format!("harvest {kind}, {percent} % dirty, each GiB"), GIB, seconds);
                let started = Instant::now();
                let zero = zero_pages(&memory, &pages)?;
                ensure!(
                    value == 1 || zero == pages.count(),
                    "{zero} of {} pages were seen to be zero",
                    pages.count()
                );
                let seconds = started.elapsed().as_secs_f64();
                report.add(&format!("zero scan of {holds}, {percent} % dirty, each GiB"), GIB, seconds);
            }
        }
    }
    Ok(())
}

fn harvest(tracker: &mut dyn Tracker, layout: &Layout) -> Result<(PageSets, f64)> {
    let mut pages = PageSets::new(layout);
    let harvest = tracker.harvest(&mut pages)?;
    Ok((pages, harvest.elapsed.as_secs_f64()))
}

fn zero_pages(memory: &Memory, pages: &PageSets) -> Result<u64> {
    let mut zero = 0;
    for run in pages.block(BlockIndex(0)).runs() {
        for page in run.first..run.end() {
            let range = BlockRange { block: BlockIndex(0), offset: page * PAGE_BYTES, length: PAGE_BYTES };
            zero += u64::from(memory.span(range)?.is_zero());
        }
    }
    Ok(zero)
}

/// The second process: this program again.
struct Writer {
    child: Child,
    orders: ChildStdin,
    done: BufReader<ChildStdout>,
}

impl Writer {
    fn start(path: &Path) -> Result<Writer> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(WRITER)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (orders, done) =
            child.stdin.take().zip(child.stdout.take()).context("the writer has no pipes")?;
        Ok(Writer { child, orders, done: BufReader::new(done) })
    }

    /// Has it write `value` all over that share of the pages, evenly spread.
    fn write(&mut self, percent: u64, value: u8) -> Result<()> {
        writeln!(self.orders, "{percent} {value}")?;
        let mut line = String::new();
        ensure!(self.done.read_line(&mut line)? > 0, "the writer ended");
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the second process does until its input ends.
pub(crate) fn write_on_command(path: &Path) -> Result<()> {
    let mapping = Mapping::new(&RamFile::open(path, Access::ReadWrite)?, GIB, Access::ReadWrite)?;
    for line in std::io::stdin().lines() {
        let line = line?;
        let (percent, value) = line.split_once(' ').context("an order is two numbers")?;
        let (percent, page) = (percent.parse::<u64>()?, [value.parse::<u8>()?; PAGE_BYTES as usize]);
        for index in (0..GIB / PAGE_BYTES).filter(|index| index % 100 < percent) {
            mapping.span(index * PAGE_BYTES, PAGE_BYTES)?.write_from(&page);
        }
        println!();
    }
    Ok(())
}
