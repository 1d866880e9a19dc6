//! Tracking by the soft-dirty bits of page table entries (`CONFIG_MEM_SOFT_DIRTY`).
//!
//! The kernel sets the bit at a write; `clear_refs` clears it for the whole
//! process. Reading and clearing are two steps, and a page written between them
//! would have its bit cleared unread. No order of the two avoids that while
//! the process runs, so **it is stopped for both**: every thread is stopped with
//! ptrace, the bits are read and cleared, and all run on. If the agent dies in
//! between, the kernel lets the threads run (a signal or a frozen cgroup would
//! leave them stopped). That costs the guest some milliseconds per GiB at each
//! harvest, and interrupts system calls as a signal does: `uffd_wp` is
//! better wherever it can be had.
//!
//! Why no write is lost:
//!
//! * Threads: `stop_all` lists them until all are stopped and no new one is there.
//! * Kernel threads that write through the page tables while the process is
//!   stopped (vhost): a process that has such a device open is refused.
//! * Another process in the same address space: refused, unless it leaves it soon,
//!   as the child of a `vfork` does.
//! * A page table entry that vanished (reclaim) took its bit along: a page that
//!   had an entry at the previous harvest and has none now is reported. With swap
//!   in use, or where tmpfs may be mapped with huge pages, an entry may have come and
//!   gone between two harvests: then every page without an entry is reported.
//! * Huge pages of hugetlbfs have no such bit: refused.
//! * Mappings that came, went or moved are reported whole, as by every tracker here.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use ramferry_ram::{PageRun, PageSet};

use crate::error::WriterError;
use crate::huge;
use crate::ptrace::{TraceError, stop_all};
use crate::segments::{Segment, segments};
use crate::tracker::{Afterwards, Mechanism, Seen, View};
use crate::{TrackedFile, TrackerKind};

/// How long the threads of the process have to stop. It takes each a turn, which on a host that has many more threads to
/// run than processors may come late; those that have stopped wait meanwhile.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const PAGE_BYTES: u64 = 4096;
const ENTRY_BYTES: usize = 8;
/// Entries read at once.
const CHUNK_ENTRIES: usize = 64 << 10;
/// Bits of a pagemap entry.
const SOFT_DIRTY: u64 = 1 << 55;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;
/// What `clear_refs` clears the bits for.
const CLEAR_SOFT_DIRTY: &[u8] = b"4";

pub(crate) struct SoftDirty {
    clear_refs: File,
    /// Files whose pages may lose their entry within a round.
    may_vanish: Vec<bool>,
    /// Pages of each segment, by their number in it, that had an entry at the last harvest.
    present: Vec<(Segment, PageSet)>,
    buffer: Vec<u8>,
}

impl Mechanism for SoftDirty {
    const KIND: TrackerKind = TrackerKind::SoftDirty;
    const SEES_ADDRESS_SPACE: bool = false;

    fn attach(view: &View, files: &[TrackedFile]) -> Result<Self, WriterError> {
        if files.iter().any(|file| file.page_bytes != PAGE_BYTES) {
            return Err(WriterError::HugePages);
        }
        refuse_kernel_writers(view.pid)?;
        let clear_refs = OpenOptions::new()
            .write(true)
            .open(format!("/proc/{}/clear_refs", view.pid))
            .map_err(|source| match source.raw_os_error() {
                Some(libc::ENOENT | libc::ESRCH) => WriterError::Ended,
                _ => WriterError::Failed { operation: "opening its clear_refs", source },
            })?;
        let may_vanish = files.iter().map(|file| huge::possible(view.pid, file.identity.device)).collect();
        let buffer = vec![0; CHUNK_ENTRIES * ENTRY_BYTES];
        let mut mechanism = Self { clear_refs, may_vanish, present: Vec::new(), buffer };
        // Pages written before this are not asked for. Which have an entry is: without that, the first harvest would
        // have to report every page that was never touched.
        let mut unasked: Vec<PageSet> = files.iter().map(|file| PageSet::new(file.pages)).collect();
        mechanism.read_and(Afterwards::Rearm, view, files, &mut unasked)?;
        Ok(mechanism)
    }

    fn cover(&mut self, _: &View, _: &Segment, _: &TrackedFile) -> Result<(), WriterError> {
        // The bits are kept for the whole process.
        Ok(())
    }

    fn harvest(
        &mut self,
        view: &View,
        _: &[Segment],
        files: &[TrackedFile],
        afterwards: Afterwards,
        written: &mut [PageSet],
    ) -> Result<Seen, WriterError> {
        self.read_and(afterwards, view, files, written)
    }
}

impl SoftDirty {
    /// Reads the bits, and clears them to rearm. Stops the process for it.
    fn read_and(
        &mut self,
        afterwards: Afterwards,
        view: &View,
        files: &[TrackedFile],
        written: &mut [PageSet],
    ) -> Result<Seen, WriterError> {
        // A tracer is a thread; when this one ends, nothing is traced any more.
        let harvested = thread::scope(|scope| {
            let work = || self.read_stopped_and(afterwards, view, files, written);
            let tracer = thread::Builder::new().name("ramferry-trace".to_owned()).spawn_scoped(scope, work);
            tracer.map(|tracer| tracer.join())
        });
        match harvested {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(source) => Err(WriterError::Failed { operation: "starting a thread", source }),
        }
    }

    fn read_stopped_and(
        &mut self,
        afterwards: Afterwards,
        view: &View,
        files: &[TrackedFile],
        written: &mut [PageSet],
    ) -> Result<Seen, WriterError> {
        let stopped =
            stop_all(view.pid, Instant::now() + STOP_TIMEOUT).map_err(|(tid, error)| match error {
                TraceError::Ended => WriterError::Ended,
                TraceError::Timeout => WriterError::NotStopped { tid },
                TraceError::Failed { operation, source } => WriterError::Failed { operation, source },
            })?;
        refuse_kernel_writers(view.pid)?;
        let swap = swap_in_use();
        let vmas = view.vmas()?;
        let mut present = Vec::new();
        for segment in segments(&vmas, files) {
            let may_vanish = swap || self.may_vanish[segment.file];
            let now = self.read_segment(view, &segment, may_vanish, &mut written[segment.file])?;
            present.push((segment, now));
        }
        if afterwards == Afterwards::Rearm {
            self.clear()?;
        }
        drop(stopped);
        self.present = present;
        Ok(Seen { vmas, lost: Vec::new() })
    }

    /// Adds the written pages of `segment` to `written`, and tells which have an entry.
    fn read_segment(
        &mut self,
        view: &View,
        segment: &Segment,
        may_vanish: bool,
        written: &mut PageSet,
    ) -> Result<PageSet, WriterError> {
        let before = self.present.iter().find(|(known, _)| known == segment).map(|(_, before)| before);
        let pages = (segment.end - segment.start) / PAGE_BYTES;
        let first_in_file = segment.offset / PAGE_BYTES;
        let mut present = PageSet::new(pages);
        let mut page = 0;
        while page < pages {
            let count = (pages - page).min(CHUNK_ENTRIES as u64);
            let chunk = &mut self.buffer[..count as usize * ENTRY_BYTES];
            let at = (segment.start / PAGE_BYTES + page) * ENTRY_BYTES as u64;
            view.pagemap
                .read_exact_at(chunk, at)
                .map_err(|source| WriterError::Failed { operation: "reading its page map", source })?;
            for (entry, page) in chunk.chunks_exact(ENTRY_BYTES).zip(page..) {
                let entry = u64::from_ne_bytes(entry.try_into().expect("a chunk is of that size"));
                let has_entry = entry & (PRESENT | SWAPPED) != 0;
                if has_entry {
                    present.insert_run(PageRun { first: page, count: 1 });
                }
                let vanished = || may_vanish || before.is_none_or(|before| before.contains(page));
                if entry & SOFT_DIRTY != 0 || (!has_entry && vanished()) {
                    written.insert_run(PageRun { first: first_in_file + page, count: 1 });
                }
            }
            page += count;
        }
        Ok(present)
    }

    fn clear(&self) -> Result<(), WriterError> {
        (&self.clear_refs).write_all(CLEAR_SOFT_DIRTY).map_err(|source| match source.raw_os_error() {
            Some(libc::ESRCH) => WriterError::Ended,
            _ => WriterError::Failed { operation: "clearing its soft-dirty bits", source },
        })
    }
}

/// Refuses a process for which vhost writes to its memory from a kernel thread.
fn refuse_kernel_writers(pid: u32) -> Result<(), WriterError> {
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => WriterError::Ended,
        _ => WriterError::Failed { operation: "listing its open files", source },
    };
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed)? {
        // A descriptor may be closed under us.
        let target = entry.map_err(failed)?.path().read_link().unwrap_or_default();
        if target.to_str().is_some_and(|target| target.starts_with("/dev/vhost-")) {
            return Err(WriterError::KernelWriter { device: target });
        }
    }
    Ok(())
}

/// Whether the host may reclaim pages of tmpfs; `true` when it cannot be told.
fn swap_in_use() -> bool {
    fs::read_to_string("/proc/swaps").map_or(true, |swaps| swaps.lines().count() > 1)
}
