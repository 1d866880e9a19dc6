//! What tracking costs on this host: `harvest_cost [GiB] [uffd_wp|soft_dirty]`.
//!
//! A second process maps that much and writes to a part of it between harvests.
#![allow(unsafe_code, reason = "the second process maps memory and writes to it")]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ramferry_ram::{Block, FileIdentity, Layout, PageSets};
use ramferry_tracking::remote_call::{Faults, remote_userfaultfd};
use ramferry_tracking::{TrackedFile, Tracker, TrackerKind, arm, self_test};
use rustix::mm::{MapFlags, ProtFlags};

const PAGE_BYTES: u64 = 4096;
const ROUNDS: u32 = 10;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, path, pages] = arguments.as_slice()
        && role == "writer"
    {
        return write_on_command(path, pages.parse()?);
    }
    let gib: u64 = arguments.first().map_or(Ok(1), |gib| gib.parse())?;
    let kind: TrackerKind = arguments.get(1).map_or("uffd_wp", String::as_str).parse()?;
    let start = Instant::now();
    self_test(kind)?;
    println!("self-test            {:>9.3?}", start.elapsed());

    let file = tempfile::tempfile_in("/dev/shm")?;
    let pages = (gib << 30) / PAGE_BYTES;
    file.set_len(pages * PAGE_BYTES)?;
    let mut writer = Writer::spawn(&file, pages)?;
    println!("userfaultfd          {:>9.3?}", userfaultfd_time(writer.child.id())?);

    let stat = rustix::fs::fstat(&file)?;
    let identity = FileIdentity { device: stat.st_dev, inode: stat.st_ino };
    let tracked = TrackedFile { identity, pages, page_bytes: PAGE_BYTES };
    let untouched = arm_time(kind, &writer, tracked)?;
    println!("arm, none touched    {untouched:>9.3?}");
    writer.write(100)?;
    let touched = arm_time(kind, &writer, tracked)?;
    println!("arm, all touched     {touched:>9.3?}  for {gib} GiB");

    let mut tracker = arm(Some(kind), writer.child.id(), &[tracked])?;
    let mut written = PageSets::new(&Layout::new(vec![Block {
        name: "ram".to_owned(),
        guest_address: 0,
        length_bytes: pages * PAGE_BYTES,
        page_bytes: PAGE_BYTES,
    }])?);
    tracker.harvest(&mut written)?;
    for percent in [0, 1, 20, 100] {
        harvest_times(tracker.as_mut(), &mut writer, &mut written, percent, gib)?;
    }
    let start = Instant::now();
    tracker.recheck(&mut written)?;
    println!("recheck              {:>9.3?}", start.elapsed());
    let start = Instant::now();
    drop(tracker);
    println!("drop                 {:>9.3?}", start.elapsed());
    Ok(())
}

fn userfaultfd_time(pid: u32) -> Result<Duration, Failure> {
    let mut times = Vec::new();
    for _ in 0..101 {
        let start = Instant::now();
        remote_userfaultfd(pid, Faults::UserOnly)?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}

fn arm_time(kind: TrackerKind, writer: &Writer, file: TrackedFile) -> Result<Duration, Failure> {
    let start = Instant::now();
    let _tracker = arm(Some(kind), writer.child.id(), &[file])?;
    Ok(start.elapsed())
}

fn harvest_times(
    tracker: &mut dyn Tracker,
    writer: &mut Writer,
    written: &mut PageSets,
    percent: u64,
    gib: u64,
) -> Result<(), Failure> {
    let mut times = Vec::new();
    let mut pages = 0;
    for _ in 0..ROUNDS {
        writer.write(percent)?;
        let harvest = tracker.harvest(written)?;
        times.push(harvest.elapsed);
        pages = harvest.written_pages;
    }
    times.sort_unstable();
    let median = times[times.len() / 2];
    println!(
        "harvest, {percent:>3} %       {median:>9.3?}  {:>9.3?} a GiB, {pages} pages",
        median / gib as u32
    );
    Ok(())
}

struct Writer {
    child: Child,
}

impl Writer {
    fn spawn(file: &File, pages: u64) -> Result<Self, Failure> {
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let child = Command::new(std::env::current_exe()?)
            .args(["writer", &path, &pages.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut writer = Self { child };
        writer.write(0)?;
        Ok(writer)
    }

    /// Has it write to `percent` of its pages, evenly spread.
    fn write(&mut self, percent: u64) -> Result<(), Failure> {
        let orders = self.child.stdin.as_mut().ok_or("the writer has no input")?;
        writeln!(orders, "{percent}")?;
        let answers = self.child.stdout.as_mut().ok_or("the writer has no output")?;
        BufReader::with_capacity(1, answers).read_line(&mut String::new())?;
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_on_command(path: &str, pages: u64) -> Result<(), Failure> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let length = (pages * PAGE_BYTES) as usize;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let mapped =
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, &file, 0) }?;
    for (line, stamp) in std::io::stdin().lines().zip(0u64..) {
        let percent: u64 = line?.parse()?;
        for page in (0..pages).filter(|page| page % 100 < percent) {
            // SAFETY: `page` is below `pages`, so this is within the mapping above, which only we use.
            unsafe {
                mapped.cast::<u8>().add((page * PAGE_BYTES) as usize).cast::<u64>().write_volatile(stamp);
            };
        }
        println!();
    }
    Ok(())
}
