//! What post-copy costs at the destination, apart from the link: `cargo run --release -p ramferry-tracking --example
//! postcopy_cost [huge]`. With `huge` it needs 512 huge pages of 2 MiB.
#![allow(unsafe_code, reason = "a process that maps memory and reaches for it")]

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ramferry_ram::{Access, Block, BlockIndex, BlockRange, Layout, Memory, PageRun, RamFile};
use ramferry_tracking::postcopy::{LetIn, RemoteFaults};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

const BYTES: u64 = 1 << 30;
const BATCH_BYTES: u64 = 2 << 20;
const ACCESSES: u64 = 20_000;
const RAM: BlockIndex = BlockIndex(0);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["vmm", path, page_bytes] => vmm(path, page_bytes.parse()?),
        ["huge"] => measure(MemfdFlags::HUGETLB, 2 << 20),
        _ => measure(MemfdFlags::empty(), 4096),
    }
}

fn measure(flags: MemfdFlags, page_bytes: u64) -> Result<()> {
    let file: OwnedFd = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC | flags)?;
    rustix::fs::ftruncate(&file, BYTES)?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let block = Block { name: "ram".into(), guest_address: 0, length_bytes: BYTES, page_bytes };
    let files = vec![RamFile::open(Path::new(&path), Access::ReadWrite)?];
    let memory = Arc::new(Memory::new(Layout::new(vec![block])?, files, Access::ReadWrite)?);
    let mut vmm = Command::new(std::env::current_exe()?)
        .args(["vmm", &path, &page_bytes.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut orders = vmm.stdin.take().context("a pipe")?;
    let mut answers = BufReader::new(vmm.stdout.take().context("a pipe")?).lines();
    let mut answer = move || answers.next().context("the process ended")?.context("an answer");
    answer()?;

    for turn in ["first", "second", "third"] {
        let start = Instant::now();
        let faults = RemoteFaults::arm(vmm.id(), Arc::clone(&memory), &[])?;
        println!("{turn}: arm {:?}", start.elapsed());
        let_in_all(&faults, page_bytes)?;
        let start = Instant::now();
        faults.end()?;
        println!("  end {:?}", start.elapsed());

        let start = Instant::now();
        let faults = RemoteFaults::arm(vmm.id(), Arc::clone(&memory), &[])?;
        println!("  arm again {:?}", start.elapsed());
        writeln!(orders, "reach")?;
        let told = serve_until(&faults, &memory, page_bytes, &mut answer)?;
        println!("  an access served by one thread, as it sees it: {told}");
        drop(faults);
        let start = Instant::now();
        let faults = RemoteFaults::retake(vmm.id(), Arc::clone(&memory), &[])?;
        println!("  retake {:?}", start.elapsed());
        let_in_all(&faults, page_bytes)?;
        let start = Instant::now();
        faults.recheck()?;
        println!("  recheck {:?}", start.elapsed());
        let start = Instant::now();
        faults.end()?;
        println!("  end {:?}", start.elapsed());
    }
    drop(orders);
    vmm.wait()?;
    Ok(())
}

fn let_in_all(faults: &RemoteFaults, page_bytes: u64) -> Result<()> {
    let start = Instant::now();
    let mut done = LetIn::default();
    for first in (0..BYTES / page_bytes).step_by((BATCH_BYTES / page_bytes) as usize) {
        done += faults.let_in(RAM, PageRun { first, count: BATCH_BYTES / page_bytes })?;
    }
    println!("  let in 1 GiB in batches of 2 MiB: {:?} ({done:?})", start.elapsed());
    Ok(())
}

/// Answers each access by a copy of one page, until the process says that it has made them all.
fn serve_until(
    faults: &RemoteFaults,
    memory: &Memory,
    page_bytes: u64,
    answer: &mut (impl FnMut() -> Result<String> + Send),
) -> Result<String> {
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| -> Result<()> {
            let bytes = vec![7; page_bytes as usize];
            let mut told = Vec::new();
            while !enough.load(Ordering::Relaxed) {
                told.clear();
                faults.wait(Duration::from_millis(20), &mut told)?;
                for fault in &told {
                    let range =
                        BlockRange { block: RAM, offset: fault.page * page_bytes, length: page_bytes };
                    memory.span(range)?.write_from(&bytes);
                    faults.let_in(fault.block, PageRun { first: fault.page, count: 1 })?;
                }
            }
            Ok(())
        });
        let told = answer();
        enough.store(true, Ordering::Relaxed);
        serving.join().map_err(|_| anyhow::anyhow!("the serving thread panicked"))??;
        told
    })
}

/// A process that has all of it mapped, and reaches for a page here and there when told.
fn vmm(path: &str, page_bytes: u64) -> Result<()> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let length = BYTES as usize;
    // SAFETY: a fresh mapping at an address of the kernel's choice; nothing of Rust refers to it.
    let start =
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, &file, 0)? };
    let pages = BYTES / page_bytes;
    // SAFETY: `page` is one of the mapping's.
    let place = |page: u64| unsafe { start.cast::<u64>().byte_add((page * page_bytes) as usize) };
    for page in 0..pages {
        // SAFETY: a word of the mapping.
        unsafe { place(page).write_volatile(1) };
    }
    println!("ready");
    for order in std::io::stdin().lines() {
        order?;
        let accesses = ACCESSES.min(pages);
        let mut took: Vec<Duration> = (0..accesses)
            .map(|access| {
                let page = access * 7919 % pages;
                let before = Instant::now();
                // SAFETY: a word of the mapping.
                unsafe { place(page).read_volatile() };
                before.elapsed()
            })
            .collect();
        took.sort_unstable();
        let at = |share: usize| took[took.len() * share / 1000];
        println!("p50 {:?}, p99 {:?}, most {:?}", at(500), at(990), at(1000 - 1));
    }
    Ok(())
}
