//! Which parts of a RAM file were ever touched, so that the rest need not be
//! looked at: cost follows touched memory, not the guest's size.
//!
//! On tmpfs a page that was written is in the file, so where `SEEK_DATA` finds
//! nothing nobody has written (or what was written was punched out again). A
//! part that was once found touched stays so, and is not asked for again.

use std::fs::File;

use ramferry_ram::{PageRun, PageSet};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Size of a part: what one page table maps.
pub(crate) const PART_BYTES: u64 = 2 << 20;

/// The touched parts of one file.
pub(crate) struct Touched {
    /// `None`: every part counts as touched.
    file: Option<File>,
    length_bytes: u64,
    parts: PageSet,
}

impl Touched {
    /// Of a file of which `length_bytes` are tracked; without the file itself all counts as touched.
    pub(crate) fn new(file: Option<File>, length_bytes: u64) -> Self {
        let parts = length_bytes.div_ceil(PART_BYTES);
        let parts = if file.is_some() { PageSet::new(parts) } else { PageSet::full(parts) };
        Self { file, length_bytes, parts }
    }

    /// Looks for parts that were touched since the last look, and tells them as
    /// ranges of offsets. Whatever was written before this began is in parts
    /// that are touched now.
    pub(crate) fn look(&mut self) -> Vec<(u64, u64)> {
        let Some(file) = &self.file else { return Vec::new() };
        let mut fresh = PageSet::new(self.parts.pages());
        let mut part = 0;
        loop {
            if let Some(run) = self.parts.next_run(part).filter(|run| run.first == part) {
                part = run.end();
            }
            if part >= self.parts.pages() {
                break;
            }
            let found = match rustix::fs::seek(file, SeekFrom::Data(part * PART_BYTES)) {
                Ok(offset) => offset / PART_BYTES,
                // No data from here on.
                Err(Errno::NXIO) => break,
                // Not to be told: take all that is left.
                Err(_) => {
                    fresh.insert_run(PageRun { first: part, count: self.parts.pages() - part });
                    break;
                }
            };
            if found >= self.parts.pages() {
                break;
            }
            if !self.parts.contains(found) {
                fresh.insert_run(PageRun { first: found, count: 1 });
            }
            part = found + 1;
        }
        self.parts.union_with(&fresh);
        self.ranges(&fresh, 0, self.length_bytes)
    }

    /// The touched ranges of offsets within `start..end`.
    pub(crate) fn within(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        self.ranges(&self.parts, start, end)
    }

    fn ranges(&self, parts: &PageSet, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut ranges = Vec::new();
        let mut from = start / PART_BYTES;
        while let Some(run) = parts.next_run(from) {
            let range = ((run.first * PART_BYTES).max(start), (run.end() * PART_BYTES).min(end));
            if range.0 >= range.1 {
                break;
            }
            ranges.push(range);
            from = run.end();
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use rustix::fs::MemfdFlags;

    use super::*;

    const PART: u64 = PART_BYTES;

    fn file(length_bytes: u64) -> File {
        let memfd = rustix::fs::memfd_create("touched-test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, length_bytes).unwrap();
        memfd.into()
    }

    #[test]
    fn parts_are_found_once_they_are_touched_and_only_then() {
        let length = 10 * PART + 8192;
        let file = file(length);
        let mut touched = Touched::new(Some(file.try_clone().unwrap()), length);
        assert_eq!(touched.look(), []);
        let touch = |offset| file.write_all_at(&[1], offset).unwrap();
        touch(3 * PART - 1);
        touch(3 * PART);
        touch(length - 1);
        assert_eq!(touched.look(), [(2 * PART, 4 * PART), (10 * PART, length)]);
        assert_eq!(touched.look(), []);
        touch(0);
        touch(2 * PART + 7);
        assert_eq!(touched.look(), [(0, PART)]);
        assert_eq!(touched.within(PART / 2, 3 * PART), [(PART / 2, PART), (2 * PART, 3 * PART)]);
        assert_eq!(touched.within(5 * PART, 6 * PART), []);
    }

    #[test]
    fn without_a_file_everything_counts_as_touched() {
        let mut touched = Touched::new(None, 3 * PART);
        assert_eq!(touched.look(), []);
        assert_eq!(touched.within(4096, 2 * PART), [(4096, 2 * PART)]);
    }

    proptest! {
        #[test]
        fn every_touched_byte_is_in_a_range(looks in proptest::collection::vec(
            proptest::collection::vec(0..40 * PART, 0..6), 1..5,
        )) {
            let file = file(40 * PART);
            let mut touched = Touched::new(Some(file.try_clone().unwrap()), 40 * PART);
            let mut known = Vec::new();
            for offsets in looks {
                for offset in &offsets {
                    file.write_all_at(&[1], *offset).unwrap();
                }
                let fresh = touched.look();
                prop_assert!(fresh.iter().all(|range| !known.contains(&range.0)));
                known.extend(fresh.iter().flat_map(|range| (range.0..range.1).step_by(PART as usize)));
                let ranges = touched.within(0, 40 * PART);
                for offset in offsets {
                    prop_assert!(ranges.iter().any(|(start, end)| (*start..*end).contains(&offset)));
                }
            }
        }
    }
}
