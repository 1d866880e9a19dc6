//! Where the blocks are in the VMM's address space.

use ramferry_ram::{BlockIndex, PageRun};

use super::FaultsError;
use crate::TrackedFile;
use crate::error::TrackError;
use crate::maps::{self, MapsError, Vma};
use crate::process;
use crate::segments::{Segment, reached, segment};

/// The VMM's mappings of the RAM files, ascending.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Places {
    files: Vec<TrackedFile>,
    /// One for each mapping: what is let in at once must lie in one.
    segments: Vec<Segment>,
    /// The same, neighbours joined: what the kernel splits and merges, as registering does, stays the same here.
    joined: Vec<Segment>,
}

impl Places {
    /// None yet.
    pub(super) fn of(files: Vec<TrackedFile>) -> Self {
        Self { files, ..Self::default() }
    }

    /// Where `vmm` has the same files mapped now.
    pub(super) fn look_again(&self, vmm: u32) -> Result<Self, FaultsError> {
        Self::new(vmm, &vmas_of(vmm)?, self.files.clone())
    }

    fn new(vmm: u32, vmas: &[Vma], files: Vec<TrackedFile>) -> Result<Self, FaultsError> {
        let mut segments = Vec::new();
        for (vma, segment) in vmas.iter().filter_map(|vma| Some((vma, segment(vma, &files)?))) {
            if !vma.shared {
                let block = BlockIndex(segment.file as u32);
                return Err(FaultsError::Private { vmm, start: vma.start, block });
            }
            segments.push(segment);
        }
        for (index, block) in (0..files.len()).zip((0..).map(BlockIndex)) {
            if !segments.iter().any(|segment| segment.file == index) {
                return Err(FaultsError::Files(TrackError::NotMapped { pid: vmm, block }));
            }
        }
        let joined = reached(vmas, &files);
        Ok(Self { files, segments, joined })
    }

    /// What `vmm` has mapped now as it is here, whatever else it has mapped.
    pub(super) fn still_mapped(&self, vmm: u32) -> Result<Vec<Segment>, FaultsError> {
        let vmas = vmas_of(vmm)?;
        let shared = vmas.iter().filter(|vma| vma.shared);
        let mut segments: Vec<Segment> = shared.filter_map(|vma| segment(vma, &self.files)).collect();
        segments.retain(|segment| {
            self.find(segment.start).is_some_and(|known| {
                known.file == segment.file && known.offset + (segment.start - known.start) == segment.offset
            })
        });
        Ok(segments)
    }

    pub(super) fn files(&self) -> &[TrackedFile] {
        &self.files
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// A place that is mapped in one of the two and not, or otherwise, in the other.
    pub(super) fn difference(&self, other: &Self) -> Option<u64> {
        let only_in = |one: &Self, other: &Self| {
            one.joined.iter().find(|segment| !other.joined.contains(segment)).map(|segment| segment.start)
        };
        only_in(other, self).or_else(|| only_in(self, other))
    }

    /// Whether the byte of `file` that `address` was of is there still.
    pub(super) fn is_same_at(&self, other: &Self, address: u64) -> bool {
        let at = |places: &Self| {
            let segment = places.find(address)?;
            Some((segment.file, segment.offset + (address - segment.start)))
        };
        at(self).is_some() && at(self) == at(other)
    }

    /// The page at `address`.
    pub(super) fn page_at(&self, address: u64) -> Option<(BlockIndex, u64)> {
        let segment = self.find(address)?;
        let offset = segment.offset + (address - segment.start);
        Some((BlockIndex(segment.file as u32), offset / self.files[segment.file].page_bytes))
    }

    /// The page size of `block`, if `run` is some of its pages.
    pub(super) fn check(&self, block: BlockIndex, run: PageRun) -> Result<u64, FaultsError> {
        let PageRun { first, count } = run;
        let file = self
            .files
            .get(block.get())
            .filter(|file| count > 0 && first.checked_add(count).is_some_and(|end| end <= file.pages));
        file.map(|file| file.page_bytes).ok_or(FaultsError::OutOfBlock { block, first, count })
    }

    /// Where the pages of `run`, some of `block`, are mapped: start and end of each place, within one mapping.
    pub(super) fn ranges(&self, block: BlockIndex, run: PageRun) -> impl Iterator<Item = (u64, u64)> + '_ {
        let page_bytes = self.files[block.get()].page_bytes;
        let (first, last) = (run.first * page_bytes, run.end() * page_bytes);
        let ours = self.segments.iter().filter(move |segment| segment.file == block.get());
        ours.filter_map(move |segment| {
            let end = segment.offset + (segment.end - segment.start);
            let (from, to) = (first.max(segment.offset), last.min(end));
            (from < to).then(|| (segment.address(from), segment.address(to)))
        })
    }

    /// The byte of the block's file that is at `address`, which is in a mapping of it.
    pub(super) fn offset_of(&self, address: u64) -> Option<u64> {
        self.find(address).map(|segment| segment.offset + (address - segment.start))
    }

    fn find(&self, address: u64) -> Option<&Segment> {
        let after = self.segments.partition_point(|segment| segment.start <= address);
        self.segments[..after].last().filter(|segment| address < segment.end)
    }
}

fn vmas_of(vmm: u32) -> Result<Vec<Vma>, FaultsError> {
    match maps::vmas_of(vmm) {
        Ok(vmas) if vmas.is_empty() => Err(FaultsError::Ended { vmm }),
        Ok(vmas) => Ok(vmas),
        Err(MapsError::NoProcess { .. }) => Err(FaultsError::Ended { vmm }),
        Err(source) => {
            let comm = process::comm_of(vmm);
            Err(FaultsError::Files(TrackError::Hidden { pid: vmm, comm, source }))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use ramferry_ram::FileIdentity;

    use super::*;

    const PAGE: u64 = 4096;
    const HUGE: u64 = 2 << 20;

    fn files() -> Vec<TrackedFile> {
        let file = |inode, pages, page_bytes| {
            let identity = FileIdentity { device: 1, inode };
            TrackedFile { identity, pages, page_bytes }
        };
        vec![file(7, 100, PAGE), file(8, 4, HUGE)]
    }

    fn vma(start: u64, bytes: u64, inode: u64, offset: u64) -> Vma {
        Vma {
            start,
            end: start + bytes,
            offset,
            writable: true,
            executable: false,
            shared: true,
            identity: Some(FileIdentity { device: 1, inode }),
            path: PathBuf::new(),
            deleted: false,
        }
    }

    fn vmas() -> [Vma; 4] {
        let read_only = Vma { writable: false, ..vma(1 << 30, 100 * PAGE, 7, 0) };
        [
            vma(PAGE, 40 * PAGE, 7, 0),
            vma(41 * PAGE, 60 * PAGE, 7, 40 * PAGE),
            read_only,
            vma(4 << 30, 3 * HUGE, 8, HUGE),
        ]
    }

    fn places() -> Places {
        Places::new(1, &vmas(), files()).unwrap()
    }

    #[test]
    fn a_page_is_found_in_every_mapping_of_it() {
        let places = places();
        let ranges = |block, first, count| -> Vec<_> {
            places.ranges(BlockIndex(block), PageRun { first, count }).collect()
        };
        let read_only = |page: u64| (1 << 30) + page * PAGE;
        assert_eq!(ranges(0, 3, 1), [(4 * PAGE, 5 * PAGE), (read_only(3), read_only(4))]);
        let across = [(39 * PAGE, 41 * PAGE), (41 * PAGE, 42 * PAGE), (read_only(38), read_only(41))];
        assert_eq!(ranges(0, 38, 3), across);
        assert_eq!(ranges(1, 0, 1), []);
        assert_eq!(ranges(1, 0, 4), [(4 << 30, (4 << 30) + 3 * HUGE)]);
        assert_eq!(places.page_at(4 * PAGE + 5), Some((BlockIndex(0), 3)));
        assert_eq!(places.page_at((4 << 30) + HUGE + 4096), Some((BlockIndex(1), 2)));
        assert_eq!(places.page_at(0), None);
        assert_eq!(places.page_at((4 << 30) + 3 * HUGE), None);
    }

    #[test]
    fn pages_that_a_block_does_not_have_are_refused() {
        let places = places();
        let check = |block, first, count| places.check(BlockIndex(block), PageRun { first, count });
        assert_eq!(check(0, 99, 1).unwrap(), PAGE);
        assert_eq!(check(1, 0, 4).unwrap(), HUGE);
        for (block, first, count) in [(0, 0, 0), (0, 99, 2), (1, 4, 1), (2, 0, 1), (0, u64::MAX, 2)] {
            assert!(matches!(check(block, first, count), Err(FaultsError::OutOfBlock { .. })));
        }
    }

    #[test]
    fn mappings_that_are_split_are_the_same_and_others_are_not() {
        let now = |vmas: &[Vma]| Places::new(1, vmas, files()).unwrap();
        let [first, second, read_only, huge] = vmas();
        let whole = vma(PAGE, 100 * PAGE, 7, 0);
        assert_eq!(places().difference(&now(&[whole, read_only.clone(), huge.clone()])), None);
        let moved = Vma { start: huge.start + HUGE, end: huge.end + HUGE, ..huge.clone() };
        let changed = now(&[first.clone(), second.clone(), read_only.clone(), moved]);
        assert_eq!(places().difference(&changed), Some((4 << 30) + HUGE));
        assert!(!places().is_same_at(&changed, 4 << 30));
        assert!(!places().is_same_at(&changed, (4 << 30) + HUGE));
        assert!(places().is_same_at(&changed, 5 * PAGE));
        let gone = now(&[first.clone(), second.clone(), huge.clone()]);
        assert_eq!(places().difference(&gone), Some(1 << 30));
        let private = Vma { shared: false, ..read_only };
        let refused = Places::new(1, &[first, second, private, huge], files());
        assert!(matches!(refused, Err(FaultsError::Private { start: 0x4000_0000, .. })));
        assert!(matches!(
            Places::new(1, &[], files()),
            Err(FaultsError::Files(TrackError::NotMapped { .. }))
        ));
    }

    proptest! {
        #[test]
        fn any_address_is_a_page_or_none(address in any::<u64>()) {
            if let Some((block, page)) = places().page_at(address) {
                let run = PageRun { first: page, count: 1 };
                places().check(block, run).unwrap();
                let mut ranges = places().ranges(block, run).collect::<Vec<_>>().into_iter();
                prop_assert!(ranges.any(|(start, end)| (start..end).contains(&address)));
            }
        }
    }
}
