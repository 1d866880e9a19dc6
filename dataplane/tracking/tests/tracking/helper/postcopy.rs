//! What a helper does in post-copy: reach for its memory as a VMM, or serve another process's as an agent.

use std::collections::HashMap;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ramferry_ram::{Owed, OwedError};
use ramferry_tracking::postcopy::RemoteFaults;

use super::Mapped;
use crate::destination::{self, Destination, arrived, arrived_bytes};
use crate::file::Random;

/// The first and the last word of a page.
pub(super) fn read(mapped: &Mapped, page: u64) -> String {
    let last = (mapped.page_bytes / 8 - 1) as usize;
    let place = mapped.place(page);
    // SAFETY: words of a page of our own mapping, which nothing of Rust refers to.
    let (first, last) = unsafe { (place.read_volatile(), place.add(last).read_volatile()) };
    format!("{first} {last}")
}

/// The first word of a page, as a system call reads it.
pub(super) fn kernel_read(mapped: &Mapped, page: u64) -> String {
    let (mut reader, writer) = std::io::pipe().unwrap();
    // SAFETY: eight bytes within our own mapping.
    let written = unsafe { libc::write(writer.as_raw_fd(), mapped.place(page).cast(), 8) };
    assert_eq!(written, 8);
    let mut bytes = [0; 8];
    reader.read_exact(&mut bytes).unwrap();
    u64::from_ne_bytes(bytes).to_string()
}

/// Has the kernel split the mapping.
pub(super) fn split(mapped: &Mapped, page: u64, pages: u64) {
    let length = (pages * mapped.page_bytes) as usize;
    // SAFETY: advice about core dumps, for a part of our own mapping.
    let advised = unsafe { libc::madvise(mapped.place(page).cast(), length, libc::MADV_DONTDUMP) };
    assert_eq!(advised, 0);
}

/// Threads that go to random pages: what they read must be what arrived, or what they wrote since.
#[derive(Default)]
pub(super) struct Exercise {
    threads: Vec<JoinHandle<Result<u64, String>>>,
    enough: Arc<AtomicBool>,
}

impl Exercise {
    pub(super) fn begin(&mut self, mapped: &Mapped, threads: u64, seed: u64) {
        self.enough.store(false, Ordering::Relaxed);
        for thread in 0..threads {
            let (mapped, enough) = (mapped.clone(), Arc::clone(&self.enough));
            let mut random = Random(seed * 100 + thread + 1);
            self.threads.push(std::thread::spawn(move || {
                let pages = mapped.length as u64 / mapped.page_bytes;
                let mut written = HashMap::new();
                let mut accesses = 0;
                while !enough.load(Ordering::Relaxed) {
                    accesses += 1;
                    access(&mapped, random.below(pages), 1 + thread as usize, &mut written, accesses)?;
                }
                Ok(accesses)
            }));
        }
    }

    pub(super) fn end(&mut self) -> String {
        self.enough.store(true, Ordering::Relaxed);
        let results: Result<Vec<u64>, String> =
            self.threads.drain(..).map(|thread| thread.join().unwrap()).collect();
        results.map_or_else(|error| error, |accesses| format!("ok {}", accesses.iter().sum::<u64>()))
    }
}

fn access(
    mapped: &Mapped,
    page: u64,
    word: usize,
    written: &mut HashMap<u64, u64>,
    stamp: u64,
) -> Result<(), String> {
    let last = (mapped.page_bytes / 8 - 1) as usize;
    let place = mapped.place(page);
    // Half of the accesses begin with a write.
    if stamp.is_multiple_of(2) {
        // SAFETY: a word of a page of our own mapping, of this thread alone.
        unsafe { place.add(word).write_volatile(stamp) };
        written.insert(page, stamp);
    }
    let expected = written.get(&page).copied().unwrap_or(arrived(page));
    for (word, expected) in [(0, arrived(page)), (last, arrived(page)), (word, expected)] {
        // SAFETY: a word of a page of our own mapping.
        let found = unsafe { place.add(word).read_volatile() };
        if found != expected {
            return Err(format!("word {word} of page {page} is {found:#x} instead of {expected:#x}"));
        }
    }
    Ok(())
}

/// Serves process `pid` until it is owed nothing, then ends; by itself, while further orders are taken. Its source has
/// `had_pages` pages, and then says nothing more.
pub(super) fn serve(
    how: &str,
    pid: u32,
    path: &str,
    pages: u64,
    page_bytes: u64,
    had_pages: u64,
    owed: &str,
) {
    let layout = destination::layout(&[(pages, page_bytes)]);
    let memory = destination::memory(&layout, &[Path::new(path)]);
    let owed = open(Path::new(owed), &layout);
    // The test reads the file when all is done.
    let test = std::os::unix::process::parent_id();
    let faults = match how {
        "arm" => RemoteFaults::arm(pid, Arc::clone(&memory), &[test]),
        _ => RemoteFaults::retake(pid, Arc::clone(&memory), &[test]),
    };
    let faults = faults.unwrap();
    std::thread::spawn(move || {
        let asked = AtomicU64::new(0);
        let source = |_, page, bytes: &mut [u8]| {
            while asked.fetch_add(1, Ordering::Relaxed) >= had_pages {
                std::thread::park();
            }
            arrived_bytes(page, bytes);
        };
        Destination::new(&memory, &owed, &faults, &source).serve(2, || {
            // Slowly, so that an agent that is killed leaves something.
            std::thread::sleep(Duration::from_millis(20));
        });
        faults.end().unwrap();
        owed.remove().unwrap();
    });
}

/// A lock is let go of when the last process that had it open has ended.
fn open(path: &Path, layout: &ramferry_ram::Layout) -> Owed {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match Owed::open(path, destination::MIGRATION, layout) {
            Err(OwedError::Locked { .. }) if Instant::now() < deadline => std::thread::yield_now(),
            opened => return opened.unwrap(),
        }
    }
}
