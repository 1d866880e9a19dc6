//! Tracking by asynchronous write-protection.
//!
//! A protected page that is written loses its protection, in the kernel and
//! without anybody waiting; a harvest finds the pages without protection and
//! protects them again, in one walk of the page tables under their locks. So a
//! write falls either before that, and is reported, or after, and is reported
//! next time. Only the last harvest, of a guest that stands still, leaves the pages as they
//! are: the kernel need not write a page table then, nor flush what processors keep of it. Which mode or thread writes makes no difference: system calls,
//! KVM, vhost and other users of the process's page tables are all seen.
//!
//! A page without an entry in an existing page table counts as written, so reclaim
//! and page migration lose nothing. Memory is protected page by page in parts
//! (see [`touched`](crate::touched)), each once something is in it: this fills its page
//! table, which keeps transparent huge pages out, since splitting one of those would
//! forget what was written. Until then a part has no data, and when it is first
//! found with some all of it is reported.
//!
//! Not seen: punching a hole, which changes what a page holds without a write;
//! who lets the guest return memory must look at what the file still holds.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::thread;

use ramferry_ram::{Access, PageSet};

use crate::error::WriterError;
use crate::maps;
use crate::pagemap::{ScanError, Scanner};
use crate::remote_call::{Faults, RemoteCallError, remote_userfaultfd};
use crate::segments::Segment;
use crate::touched::Touched;
use crate::tracker::{Afterwards, Mechanism, Seen, View};
use crate::uffd::WriteProtector;
use crate::{TrackedFile, TrackerKind};

/// Memory from which on a harvest is shared among threads.
const PARALLEL_FROM_BYTES: u64 = 4 << 30;
const MAX_SCAN_THREADS: usize = 8;
/// Pieces of memory for one thread begin at multiples of this: the largest huge page.
const PIECE_ALIGNMENT_BYTES: u64 = 1 << 30;

pub(crate) struct UffdWp {
    protector: WriteProtector,
    scanners: Vec<Scanner>,
    /// For each file, once a mapping of it is covered.
    touched: Vec<Option<Touched>>,
}

impl Mechanism for UffdWp {
    const KIND: TrackerKind = TrackerKind::UffdWp;
    const SEES_ADDRESS_SPACE: bool = true;

    fn attach(view: &View, files: &[TrackedFile]) -> Result<Self, WriterError> {
        let fd: OwnedFd = match remote_userfaultfd(view.pid, Faults::UserOnly) {
            Ok(fd) => fd,
            Err(RemoteCallError::Ended { .. }) => return Err(WriterError::Ended),
            Err(error) => return Err(WriterError::RemoteCall(error)),
        };
        let protector = WriteProtector::new(fd)
            .map_err(|source| WriterError::Failed { operation: "UFFDIO_API", source })?
            .ok_or(WriterError::KernelTooOld)?;
        let touched = files.iter().map(|_| None).collect();
        Ok(Self { protector, scanners: vec![Scanner::new()], touched })
    }

    fn cover(&mut self, view: &View, segment: &Segment, file: &TrackedFile) -> Result<(), WriterError> {
        let &Segment { start, end, offset, .. } = segment;
        self.protector.register(start, end).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => WriterError::AlreadyRegistered { start },
            Some(libc::EINVAL) => WriterError::NotShmem { start, source },
            Some(libc::ESRCH) => WriterError::Ended,
            _ => WriterError::Failed { operation: "UFFDIO_REGISTER", source },
        })?;
        // Only a file of which nothing is protected yet may be looked at here: what
        // the harvest finds fresh it protects in every mapping, and reports.
        let touched = self.touched[segment.file].get_or_insert_with(|| {
            let mut touched = Touched::new(open_mapped(view, segment), file.pages * file.page_bytes);
            touched.look();
            touched
        });
        for (from, to) in touched.within(offset, offset + (end - start)) {
            self.protector.protect(segment.address(from), segment.address(to)).map_err(protect_failed)?;
        }
        Ok(())
    }

    fn harvest(
        &mut self,
        view: &View,
        segments: &[Segment],
        files: &[TrackedFile],
        afterwards: Afterwards,
        written: &mut [PageSet],
    ) -> Result<Seen, WriterError> {
        let mut lost = Vec::new();
        // Whatever comes afterwards: until then huge pages are not kept out.
        self.protect_fresh(segments, files, written, &mut lost)?;
        let pieces = self.pieces(segments);
        let bytes: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
        let threads = match bytes {
            ..PARALLEL_FROM_BYTES => 1,
            _ => thread::available_parallelism().map_or(1, |threads| threads.get().min(MAX_SCAN_THREADS)),
        };
        let mut add = |segment: &Segment, start, end| {
            written[segment.file].insert_run(segment.run(&files[segment.file], start, end));
        };
        let shares = shares(&pieces, threads);
        lost.extend(match shares.as_slice() {
            [] => Vec::new(),
            [share] => scan(&mut self.scanners[0], view, share, afterwards, &mut add)?,
            shares => {
                self.scanners.resize_with(shares.len().max(self.scanners.len()), Scanner::new);
                scan_in_parallel(&mut self.scanners, view, shares, afterwards, &mut add)?
            }
        });
        // Read after the scan: a range that was mapped then and is not now, or the
        // other way round, is noticed here or, as unprotected, by the next scan.
        Ok(Seen { vmas: view.vmas()?, lost })
    }
}

impl UffdWp {
    /// Protects the parts of the files that were touched for the first time, and
    /// reports all of their pages.
    fn protect_fresh(
        &mut self,
        segments: &[Segment],
        files: &[TrackedFile],
        written: &mut [PageSet],
        lost: &mut Vec<Segment>,
    ) -> Result<(), WriterError> {
        for (index, touched) in self.touched.iter_mut().enumerate() {
            let fresh = touched.as_mut().map(Touched::look).unwrap_or_default();
            for segment in segments.iter().filter(|segment| segment.file == index) {
                let (first, last) = (segment.offset, segment.offset + (segment.end - segment.start));
                for (from, to) in fresh.iter().map(|(from, to)| (*from.max(&first), *to.min(&last))) {
                    if from >= to {
                        continue;
                    }
                    let (start, end) = (segment.address(from), segment.address(to));
                    match self.protector.protect(start, end).map_err(protect_failed) {
                        Ok(()) => {}
                        Err(WriterError::Ended) => return Err(WriterError::Ended),
                        // The mapping may have been replaced.
                        Err(_) => lost.push(*segment),
                    }
                    written[index].insert_run(segment.run(&files[index], start, end));
                }
            }
        }
        Ok(())
    }

    /// The touched parts of `segments`.
    fn pieces<'a>(&self, segments: &'a [Segment]) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        for segment in segments {
            let Some(touched) = &self.touched[segment.file] else { continue };
            let end = segment.offset + (segment.end - segment.start);
            let ranges = touched.within(segment.offset, end).into_iter();
            pieces.extend(ranges.map(|(from, to)| Piece {
                segment,
                start: segment.address(from),
                end: segment.address(to),
            }));
        }
        pieces
    }
}

/// The file that `segment` maps, to ask what of it was touched. Without the
/// capability for that, or on a file system that cannot tell, all of it counts.
fn open_mapped(view: &View, segment: &Segment) -> Option<File> {
    let vmas = view.vmas().ok()?;
    let vma = vmas.iter().find(|vma| (vma.start..vma.end).contains(&segment.start))?;
    match maps::open_mapped_file(view.pid, vma, Access::Read) {
        Ok(fd) => Some(File::from(fd)),
        Err(error) => {
            tracing::warn!(error = %error, "cannot skip memory that was never touched");
            None
        }
    }
}

fn protect_failed(source: io::Error) -> WriterError {
    match source.raw_os_error() {
        Some(libc::ESRCH) => WriterError::Ended,
        _ => WriterError::Failed { operation: "UFFDIO_WRITEPROTECT", source },
    }
}

/// Part of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece<'a> {
    segment: &'a Segment,
    start: u64,
    end: u64,
}

/// Divides `pieces` into at most `count` shares of about as many bytes each.
fn shares<'a>(pieces: &[Piece<'a>], count: usize) -> Vec<Vec<Piece<'a>>> {
    let bytes: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
    let share_bytes = bytes.div_ceil(count as u64).next_multiple_of(PIECE_ALIGNMENT_BYTES);
    let mut shares: Vec<Vec<Piece<'_>>> = Vec::new();
    let mut left = 0;
    for &Piece { segment, mut start, end: last } in pieces {
        while start < last {
            if left == 0 {
                shares.push(Vec::new());
                left = share_bytes;
            }
            let end = last.min(start.saturating_add(left).next_multiple_of(PIECE_ALIGNMENT_BYTES));
            left = left.saturating_sub(end - start);
            shares.last_mut().expect("one was pushed when nothing was left").push(Piece {
                segment,
                start,
                end,
            });
            start = end;
        }
    }
    shares
}

/// Calls `each` for every written range, and tells which segments were not
/// protected throughout. What `each` was told before an error may be protected
/// again: a caller must then take all of the pieces for written.
fn scan(
    scanner: &mut Scanner,
    view: &View,
    pieces: &[Piece<'_>],
    afterwards: Afterwards,
    mut each: impl FnMut(&Segment, u64, u64),
) -> Result<Vec<Segment>, WriterError> {
    let mut lost = Vec::new();
    for &Piece { segment, start, end } in pieces {
        match scanner.harvest(&view.pagemap, (start, end), afterwards, |start, end| each(segment, start, end))
        {
            Ok(()) => {}
            Err(ScanError::NotProtected) => lost.push(*segment),
            Err(ScanError::Failed(source)) if source.raw_os_error() == Some(libc::ESRCH) => {
                return Err(WriterError::Ended);
            }
            Err(ScanError::Failed(source)) => {
                return Err(WriterError::Failed { operation: "PAGEMAP_SCAN", source });
            }
        }
    }
    Ok(lost)
}

fn scan_in_parallel(
    scanners: &mut [Scanner],
    view: &View,
    shares: &[Vec<Piece<'_>>],
    afterwards: Afterwards,
    mut each: impl FnMut(&Segment, u64, u64),
) -> Result<Vec<Segment>, WriterError> {
    thread::scope(|scope| {
        let mut workers = Vec::new();
        for (scanner, share) in scanners.iter_mut().zip(shares) {
            let work = move || {
                let mut ranges = Vec::new();
                let each = |segment: &Segment, start, end| ranges.push((*segment, start, end));
                let lost = scan(scanner, view, share, afterwards, each)?;
                Ok::<_, WriterError>((ranges, lost))
            };
            let worker = thread::Builder::new().name("ramferry-scan".to_owned()).spawn_scoped(scope, work);
            workers.push(
                worker.map_err(|source| WriterError::Failed { operation: "starting a thread", source })?,
            );
        }
        let mut lost = Vec::new();
        for worker in workers {
            let (ranges, lost_here) = match worker.join() {
                Ok(result) => result?,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            ranges.iter().for_each(|(segment, start, end)| each(segment, *start, *end));
            lost.extend(lost_here);
        }
        Ok(lost)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_every_byte_once() {
        const GIB: u64 = 1 << 30;
        let segments = [
            Segment { start: 3 * GIB + 4096, end: 10 * GIB, file: 0, offset: 0 },
            Segment { start: 20 * GIB, end: 20 * GIB + 8192, file: 1, offset: 0 },
            Segment { start: 30 * GIB, end: 31 * GIB, file: 2, offset: 0 },
        ];
        let whole: Vec<_> = segments
            .iter()
            .map(|segment| Piece { segment, start: segment.start, end: segment.end })
            .collect();
        for count in 1..10 {
            let shares = shares(&whole, count);
            assert!(shares.len() <= count, "{} shares of {count}", shares.len());
            let pieces: Vec<_> = shares.iter().flatten().collect();
            for segment in &segments {
                let mut at = segment.start;
                for piece in pieces.iter().filter(|piece| piece.segment == segment) {
                    assert_eq!(piece.start, at);
                    assert!(piece.start == segment.start || piece.start % GIB == 0);
                    at = piece.end;
                }
                assert_eq!(at, segment.end);
            }
        }
        assert!(shares(&[], 4).is_empty());
    }
}
