use std::thread;

use super::*;
use crate::huge;
use crate::testing::{memory_file, runs};

const PAGE: u64 = 4096;

fn mapped(pages: u64) -> (RamFile, Mapping) {
    let file = memory_file(pages);
    let mapping = Mapping::new(&file, pages * PAGE, Access::ReadWrite).unwrap();
    (file, mapping)
}

fn read(span: Span<'_>) -> Vec<u8> {
    let mut bytes = vec![0xaa; span.len()];
    span.read_into(&mut bytes);
    bytes
}

#[test]
fn spans_reach_the_file_and_nothing_outside_the_mapping() {
    let (file, mapping) = mapped(4);
    mapping.span(4090, 10).unwrap().write_from(b"0123456789");
    let reader = Mapping::new(&file, 4 * PAGE, Access::Read).unwrap();
    assert_eq!(read(reader.span(4090, 10).unwrap()), b"0123456789");
    assert!(!reader.span(0, PAGE).unwrap().is_zero());
    assert!(mapping.span(4 * PAGE, 0).unwrap().is_empty());
    for (offset, length) in [(0, 4 * PAGE + 1), (4 * PAGE, 1), (u64::MAX, 1), (1, u64::MAX)] {
        assert!(matches!(mapping.span(offset, length), Err(RamError::OutOfBounds { .. })));
    }
}

#[test]
fn spans_are_copied_and_zeroed() {
    let ((_a, a), (_b, b)) = (mapped(2), mapped(2));
    let (from, to) = (a.span(0, 2 * PAGE).unwrap(), b.span(0, 2 * PAGE).unwrap());
    from.write_from(&vec![7; 2 * PAGE as usize]);
    to.copy_from(from);
    to.copy_from(to);
    assert_eq!(read(to), vec![7; 2 * PAGE as usize]);
    b.span(1, 2 * PAGE - 2).unwrap().zero();
    assert!(b.span(1, 2 * PAGE - 2).unwrap().is_zero());
    assert_eq!((read(to)[0], read(to)[2 * PAGE as usize - 1]), (7, 7));
}

#[test]
#[should_panic(expected = "spans that do not overlap")]
fn spans_that_overlap_are_not_copied() {
    let (_file, mapping) = mapped(2);
    mapping.span(1, PAGE).unwrap().copy_from(mapping.span(0, PAGE).unwrap());
}

#[test]
fn a_read_only_mapping_gives_no_pointer_to_write() {
    let (file, _) = mapped(1);
    let reader = Mapping::new(&file, PAGE, Access::Read).unwrap();
    assert!(matches!(reader.span(0, 1).unwrap().as_mut_ptr(), Err(RamError::ReadOnly)));
    assert!(matches!(reader.populate(0, PAGE, Access::ReadWrite), Err(RamError::ReadOnly)));
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&rustix::fd::AsFd::as_fd(&file)));
    let read_only = RamFile::open(path.as_ref(), Access::Read).unwrap();
    assert!(matches!(Mapping::new(&read_only, PAGE, Access::ReadWrite), Err(RamError::ReadOnly)));
}

#[test]
fn a_mapping_is_whole_pages_of_the_file() {
    let file = memory_file(2);
    for length in [0, 1, PAGE + 1] {
        assert!(matches!(Mapping::new(&file, length, Access::Read), Err(RamError::Misaligned { .. })));
    }
    assert!(matches!(Mapping::new(&file, 3 * PAGE, Access::Read), Err(RamError::FileTooShort { .. })));
    assert_eq!(Mapping::new(&file, PAGE, Access::Read).unwrap().length_bytes(), PAGE);
}

#[test]
fn populating_makes_pages_present() {
    let (file, mapping) = mapped(8);
    mapping.populate(2 * PAGE, 3 * PAGE, Access::ReadWrite).unwrap();
    assert_eq!(runs(&file.presence(8).unwrap()), [(2, 3)]);
    mapping.populate(0, 0, Access::Read).unwrap();
    assert!(matches!(mapping.populate(1, PAGE, Access::Read), Err(RamError::Misaligned { .. })));
    assert!(matches!(mapping.populate(0, 9 * PAGE, Access::Read), Err(RamError::OutOfBounds { .. })));
    rustix::fs::ftruncate(&file, 0).unwrap();
    assert!(matches!(mapping.populate(0, PAGE, Access::ReadWrite), Err(RamError::Populate { .. })));
}

/// How much of a mapping this process' page tables hold.
fn mapped_bytes(mapping: &Mapping) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", mapping.span(0, 0).unwrap().as_ptr() as usize);
    let entry = maps.lines().skip_while(|line| !line.starts_with(&start));
    let resident = entry.filter_map(|line| line.strip_prefix("Rss:")).next().unwrap();
    resident.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn present_pages_are_mapped_ahead() {
    let (file, mapping) = mapped(100);
    mapping.span(20 * PAGE, 40 * PAGE).unwrap().write_from(&vec![1; 40 * PAGE as usize]);
    let again = Mapping::new(&file, 100 * PAGE, Access::Read).unwrap();
    assert_eq!(mapped_bytes(&again), 0);
    again.map_present(20 * PAGE, 30 * PAGE).unwrap();
    // The kernel passes over a page around the fault that somebody else has locked.
    let now = mapped_bytes(&again);
    assert!((3 * PAGE..=40 * PAGE).contains(&now), "{now} bytes are mapped");
    assert_eq!(runs(&file.presence(100).unwrap()), [(20, 40)]);
    again.map_present(100 * PAGE, 0).unwrap();
    assert!(matches!(again.map_present(1, PAGE), Err(RamError::Misaligned { .. })));
    assert!(matches!(again.map_present(0, 101 * PAGE), Err(RamError::OutOfBounds { .. })));
}

#[test]
fn a_truncated_file_reads_as_zeros_and_is_reported() {
    let (file, mapping) = mapped(4);
    let all = mapping.span(0, 4 * PAGE).unwrap();
    all.write_from(&vec![1; 4 * PAGE as usize]);
    mapping.check().unwrap();
    rustix::fs::ftruncate(&file, PAGE).unwrap();
    let mut expected = vec![1; PAGE as usize];
    expected.resize(4 * PAGE as usize, 0);
    // The first page that is missed is the one reported, and a copy begins at either end.
    mapping.span(PAGE, 1).unwrap().touch();
    assert_eq!(read(all), expected);
    mapping.span(2 * PAGE, PAGE).unwrap().write_from(&vec![1; PAGE as usize]);
    match mapping.check() {
        Err(RamError::Truncated { offset, file_bytes }) => assert_eq!((offset, file_bytes), (PAGE, PAGE)),
        other => panic!("{other:?}"),
    }
    // Another mapping of the file, and one that takes the slot, know nothing of it.
    drop(mapping);
    let (_other, other) = mapped(4);
    assert!(other.span(0, PAGE).unwrap().is_zero());
    other.check().unwrap();
}

#[test]
fn a_scan_survives_truncation_of_a_file_in_use_by_many_threads() {
    let (file, mapping) = mapped(512);
    mapping.span(0, 512 * PAGE).unwrap().write_from(&vec![1; 512 * PAGE as usize]);
    rustix::fs::ftruncate(&file, 0).unwrap();
    thread::scope(|scope| {
        for first in 0..4 {
            let mapping = &mapping;
            scope.spawn(move || {
                for page in (first..512).step_by(3) {
                    assert!(mapping.span(page * PAGE, PAGE).unwrap().is_zero());
                }
            });
        }
    });
    assert!(matches!(mapping.check(), Err(RamError::Truncated { .. })));
}

#[test]
fn a_huge_page_that_is_not_to_be_had_is_reported() {
    let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
    let Ok(fd) = rustix::fs::memfd_create("ramferry-test", flags | rustix::fs::MemfdFlags::CLOEXEC) else {
        return eprintln!("SKIPPED: no huge pages of 2 MiB");
    };
    // More than any pool of this host.
    let pages = 1 << 24;
    rustix::fs::ftruncate(&fd, pages * huge::tests::PAGE).unwrap();
    let file = RamFile::from_fd(fd, Access::ReadWrite).unwrap();
    let length = pages * huge::tests::PAGE;
    let mapping = match Mapping::new(&file, length, Access::Read) {
        Ok(mapping) => mapping,
        Err(error) => return eprintln!("SKIPPED: {error}"),
    };
    if huge::tests::free_pages() > 0 {
        return eprintln!("SKIPPED: huge pages are free");
    }
    assert!(mapping.span(5 * huge::tests::PAGE + 1, 1).unwrap().is_zero());
    match mapping.check() {
        Err(RamError::Unbacked { offset }) => assert_eq!(offset, 5 * huge::tests::PAGE),
        other => panic!("{other:?}"),
    }
    assert!(file.presence(pages).unwrap().is_empty());
}

#[test]
fn mappings_and_spans_may_be_used_by_any_thread() {
    fn shared<T: Send + Sync>() {}
    shared::<Mapping>();
    shared::<Span<'_>>();
    shared::<crate::Memory>();
}
