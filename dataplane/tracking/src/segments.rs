//! Where a process can write to the tracked files.

use ramferry_ram::{PageRun, PageSet};

use crate::TrackedFile;
use crate::maps::Vma;

/// A range of addresses through which a process writes to a range of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Segment {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Position of the file among the tracked ones.
    pub(crate) file: usize,
    /// Offset of `start` in the file, in bytes.
    pub(crate) offset: u64,
}

impl Segment {
    /// The pages of `file` that `start..end`, addresses in this segment, reach.
    pub(crate) fn run(&self, file: &TrackedFile, start: u64, end: u64) -> PageRun {
        let first = (self.offset + (start - self.start)) / file.page_bytes;
        let last = (self.offset + (end - self.start)).div_ceil(file.page_bytes).min(file.pages);
        PageRun { first, count: last.saturating_sub(first) }
    }

    /// Address of the byte at `offset` in the file, which this segment maps or ends at.
    pub(crate) fn address(&self, offset: u64) -> u64 {
        self.start + (offset - self.offset)
    }

    /// Adds all of this segment's pages to its file's set in `sets`.
    pub(crate) fn add_to(&self, files: &[TrackedFile], sets: &mut [PageSet]) {
        sets[self.file].insert_run(self.run(&files[self.file], self.start, self.end));
    }
}

/// The segments of `vmas`, which ascend, over `files`: shared and writable
/// mappings, cut to the files' pages. Neighbours that continue each other are
/// one, so that a mapping which the kernel splits or merges stays the same.
pub(crate) fn segments(vmas: &[Vma], files: &[TrackedFile]) -> Vec<Segment> {
    joined(vmas.iter().filter(|vma| vma.shared && vma.writable), files)
}

/// The same of every mapping, also those that are private or only read.
pub(crate) fn reached(vmas: &[Vma], files: &[TrackedFile]) -> Vec<Segment> {
    joined(vmas.iter(), files)
}

/// What `vma` maps of `files`, cut to the file's pages.
pub(crate) fn segment(vma: &Vma, files: &[TrackedFile]) -> Option<Segment> {
    let file = files.iter().position(|file| Some(file.identity) == vma.identity)?;
    let tracked_bytes = files[file].pages * files[file].page_bytes;
    let length = vma.length_bytes().min(tracked_bytes.saturating_sub(vma.offset));
    let segment = Segment { start: vma.start, end: vma.start + length, file, offset: vma.offset };
    (length > 0).then_some(segment)
}

fn joined<'a>(vmas: impl Iterator<Item = &'a Vma>, files: &[TrackedFile]) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    for segment in vmas.filter_map(|vma| segment(vma, files)) {
        match segments.last_mut() {
            Some(last)
                if last.end == segment.start
                    && last.file == segment.file
                    && last.offset + (last.end - last.start) == segment.offset =>
            {
                last.end = segment.end;
            }
            _ => segments.push(segment),
        }
    }
    segments
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use ramferry_ram::FileIdentity;

    use super::*;

    const PAGE: u64 = 4096;

    fn identity(inode: u64) -> FileIdentity {
        FileIdentity { device: 1, inode }
    }

    fn file(inode: u64, pages: u64) -> TrackedFile {
        TrackedFile { identity: identity(inode), pages, page_bytes: PAGE }
    }

    fn vma(start_page: u64, pages: u64, inode: u64, offset_page: u64) -> Vma {
        Vma {
            start: start_page * PAGE,
            end: (start_page + pages) * PAGE,
            offset: offset_page * PAGE,
            writable: true,
            executable: false,
            shared: true,
            identity: Some(identity(inode)),
            path: PathBuf::new(),
            deleted: false,
        }
    }

    #[test]
    fn mappings_that_continue_each_other_are_one_segment() {
        let files = [file(7, 100), file(8, 10)];
        let vmas =
            [vma(10, 5, 7, 0), vma(15, 5, 7, 5), vma(20, 5, 8, 5), vma(25, 5, 7, 90), vma(40, 5, 7, 95)];
        let found = segments(&vmas, &files);
        let pages: Vec<_> =
            found.iter().map(|s| (s.start / PAGE, s.end / PAGE, s.file, s.offset / PAGE)).collect();
        assert_eq!(pages, [(10, 20, 0, 0), (20, 25, 1, 5), (25, 30, 0, 90), (40, 45, 0, 95)]);
    }

    #[test]
    fn private_read_only_foreign_and_surplus_mappings_are_no_segments() {
        let files = [file(7, 4)];
        let private = Vma { shared: false, ..vma(1, 1, 7, 0) };
        let read_only = Vma { writable: false, ..vma(3, 1, 7, 0) };
        let anonymous = Vma { identity: None, ..vma(5, 1, 7, 0) };
        let vmas = [private, read_only, anonymous, vma(7, 1, 9, 0), vma(9, 1, 7, 4), vma(11, 4, 7, 2)];
        let found = segments(&vmas, &files);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].run(&files[0], found[0].start, found[0].end), PageRun { first: 2, count: 2 });
    }

    #[test]
    fn a_part_of_a_huge_page_is_that_huge_page() {
        let huge = TrackedFile { identity: identity(7), pages: 4, page_bytes: 2 << 20 };
        let segment = Segment { start: 0, end: 8 << 20, file: 0, offset: 0 };
        let run = segment.run(&huge, (2 << 20) + 4096, (2 << 20) + 8192);
        assert_eq!(run, PageRun { first: 1, count: 1 });
    }

    proptest! {
        #[test]
        fn splitting_a_mapping_changes_nothing(cuts in proptest::collection::btree_set(1u64..64, 0..10)) {
            let files = [file(7, 60)];
            let whole = segments(&[vma(100, 64, 7, 0)], &files);
            let mut edges = vec![0];
            edges.extend(cuts);
            edges.push(64);
            let pieces: Vec<_> =
                edges.windows(2).map(|edge| vma(100 + edge[0], edge[1] - edge[0], 7, edge[0])).collect();
            prop_assert_eq!(segments(&pieces, &files), whole);
        }
    }
}
