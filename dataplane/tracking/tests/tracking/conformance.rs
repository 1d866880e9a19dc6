//! What every tracker must do.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use ramferry_tracking::{TrackError, Tracker, TrackerKind, WriterError, arm, check, self_test};

use crate::file::{PAGE, RamFile, Random, Replica, members, sets};
use crate::helper::{Helper, protected};
use crate::kinds::works;

macro_rules! suite {
    ($($test:ident)*) => {
        mod uffd_wp { $(#[test] fn $test() { super::run(super::TrackerKind::UffdWp, super::$test); })* }
        mod soft_dirty { $(#[test] fn $test() { super::run(super::TrackerKind::SoftDirty, super::$test); })* }
    };
}

suite! {
    pages_written_are_reported_and_no_others
    no_write_is_lost_while_it_races_the_harvest
    several_mappings_with_offsets_are_one_file
    several_files_keep_their_pages_apart
    two_processes_that_map_one_file_are_both_seen
    writes_made_by_system_calls_are_seen
    writes_through_another_process_s_memory_file_are_seen
    a_page_written_and_dropped_from_the_page_tables_is_reported
    a_new_mapping_is_reported_whole_and_then_tracked
    a_mapping_that_moves_is_reported_whole_and_then_tracked
    a_mapping_replaced_in_place_is_reported_whole_and_then_tracked
    a_mapping_that_goes_is_reported_whole
    a_mapping_made_writable_is_reported_whole_and_then_tracked
    a_process_that_begins_to_map_is_found_by_the_next_look
    a_forked_child_is_found_by_the_next_look
    a_writer_that_ends_is_reported_whole
    a_guest_that_ends_is_an_error
    readers_and_private_mappers_are_no_writers
    a_file_that_the_guest_has_not_mapped_is_refused
    page_sets_of_another_layout_are_refused
    dropping_the_tracker_leaves_the_guest_alone
    a_tracker_can_be_armed_again_after_it_was_dropped
    memory_tracked_by_a_userfaultfd_is_told_from_memory_that_is_free
    memory_never_touched_costs_nothing_to_arm_and_is_tracked
    a_harvest_shared_among_threads_is_as_exact
    a_last_harvest_reports_what_was_written_and_a_further_one_loses_nothing
    no_write_is_lost_while_it_races_a_last_harvest
    memory_first_touched_before_a_last_harvest_is_in_it_and_is_tracked
    a_last_harvest_leaves_nothing_of_another_process_to_the_confirmation
}

fn run(kind: TrackerKind, test: fn(TrackerKind)) {
    if !works(kind) {
        return;
    }
    test(kind);
}

/// A tracker with its files.
struct Armed<'a> {
    tracker: Box<dyn Tracker>,
    files: Vec<&'a RamFile>,
}

impl<'a> Armed<'a> {
    fn new(kind: TrackerKind, guest: &Helper, files: &[&'a RamFile]) -> Self {
        let tracked: Vec<_> = files.iter().map(|file| file.tracked()).collect();
        Self { tracker: arm(Some(kind), guest.pid(), &tracked).unwrap(), files: files.to_vec() }
    }

    /// The pages of each file that a harvest reports.
    fn harvest(&mut self) -> Vec<Vec<u64>> {
        let mut written = sets(&self.files);
        let harvest = self.tracker.harvest(&mut written).unwrap();
        assert_eq!(harvest.written_pages, written.count());
        (0..self.files.len() as u32).map(|index| members(&written, index)).collect()
    }

    /// The pages of the only file that a last harvest reports.
    fn harvest_last(&mut self) -> Vec<u64> {
        let mut written = sets(&self.files);
        let harvest = self.tracker.harvest_last(&mut written).unwrap();
        assert_eq!(harvest.written_pages, written.count());
        members(&written, 0)
    }

    /// The pages of the only file that a harvest reports.
    fn harvest_one(&mut self) -> Vec<u64> {
        let [pages] = self.harvest().try_into().unwrap();
        pages
    }

    fn recheck(&mut self) -> Vec<u64> {
        let mut written = sets(&self.files);
        self.tracker.recheck(&mut written).unwrap();
        members(&written, 0)
    }
}

fn all(file: &RamFile) -> Vec<u64> {
    (0..file.pages).collect()
}

fn pages_written_are_reported_and_no_others(kind: TrackerKind) {
    let file = RamFile::new(1000);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 1000);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    let mut random = Random(42);
    for round in 0..50 {
        let count = random.below(20) * random.below(3);
        let mut pages: Vec<u64> = (0..count).map(|_| random.below(1000)).collect();
        guest.write("a", &pages, 100 + round);
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(armed.harvest_one(), pages, "round {round}");
    }
    guest.order("write a 0 1000 9");
    assert_eq!(armed.harvest_one(), all(&file));
    assert!(armed.harvest_one().is_empty());
}

fn no_write_is_lost_while_it_races_the_harvest(kind: TrackerKind) {
    let file = RamFile::new(4096);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 4096);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    let mut replica = Replica::new(&file);
    for round in 0..8 {
        guest.order(&format!("hammer a {}", 1 + round));
        race(30, 200, || {
            let pages = armed.harvest_one();
            replica.copy(&file, &pages);
            pages.len()
        });
        guest.order("rest");
        let pages = armed.harvest_one();
        replica.copy(&file, &pages);
        assert_eq!(replica.lost(&file), [0; 0], "round {round}");
    }
}

/// Harvests so many times at least, and until so many pages were reported: on a busy machine the guest has its turns late.
fn race(times: usize, pages: usize, mut harvest: impl FnMut() -> usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let (mut harvests, mut reported) = (0, 0);
    while harvests < times || reported < pages {
        reported += harvest();
        harvests += 1;
        assert!(Instant::now() < deadline, "{reported} pages reported in {harvests} harvests");
    }
}

fn several_mappings_with_offsets_are_one_file(kind: TrackerKind) {
    let file = RamFile::new(300);
    let mut guest = Helper::spawn();
    guest.map("low", &file, 0, 100);
    guest.map("high", &file, 150, 150);
    // A second mapping of pages that are mapped already, as VMMs have for aliases.
    guest.map("alias", &file, 90, 20);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.write("low", &[0, 99], 2);
    guest.write("high", &[0, 149], 3);
    guest.write("alias", &[0, 19], 4);
    assert_eq!(armed.harvest_one(), [0, 90, 99, 109, 150, 299]);
    assert_eq!(armed.harvest_one(), [0; 0]);
}

fn several_files_keep_their_pages_apart(kind: TrackerKind) {
    let (one, two) = (RamFile::new(50), RamFile::new(70));
    let mut guest = Helper::spawn();
    guest.map("one", &one, 0, 50);
    guest.map("two", &two, 0, 70);
    let mut armed = Armed::new(kind, &guest, &[&one, &two]);
    guest.write("one", &[3], 2);
    guest.write("two", &[69], 2);
    assert_eq!(armed.harvest(), [vec![3], vec![69]]);
}

fn two_processes_that_map_one_file_are_both_seen(kind: TrackerKind) {
    let file = RamFile::new(2000);
    let (mut guest, mut other) = (Helper::spawn(), Helper::spawn());
    guest.map("a", &file, 0, 2000);
    other.map("a", &file, 500, 1000);
    guest.order("write a 0 2000 1");
    let writers = check(guest.pid(), &[file.tracked()]).unwrap();
    let mut pids: Vec<u32> = writers.iter().map(|writer| writer.pid).collect();
    pids.sort_unstable();
    let mut expected = [guest.pid(), other.pid()];
    expected.sort_unstable();
    assert_eq!(pids, expected);
    assert!(writers.iter().all(|writer| writer.obstacle.is_none() && !writer.comm.is_empty()));

    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.write("a", &[7], 2);
    other.write("a", &[0, 3], 3);
    assert_eq!(armed.harvest_one(), [7, 500, 503]);
    let mut replica = Replica::new(&file);
    guest.order("hammer a 1");
    other.order("hammer a 9");
    for _ in 0..50 {
        let pages = armed.harvest_one();
        replica.copy(&file, &pages);
    }
    guest.order("rest");
    other.order("rest");
    let pages = armed.harvest_one();
    replica.copy(&file, &pages);
    assert_eq!(replica.lost(&file), [0; 0]);
}

fn writes_made_by_system_calls_are_seen(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 100);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.order("kernel_write a 13 99");
    assert_eq!(armed.harvest_one(), [13]);
    assert_eq!(file.stamp(13)[..8], 99u64.to_ne_bytes());
    assert_eq!(armed.harvest_one(), [0; 0]);
    guest.order("kernel_write a 13 100");
    assert_eq!(armed.harvest_one(), [13]);
}

fn writes_through_another_process_s_memory_file_are_seen(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 100);
    let vmas = ramferry_tracking::maps::vmas_of(guest.pid()).unwrap();
    let vma = vmas.iter().find(|vma| vma.identity == Some(file.tracked().identity)).unwrap();
    let mut armed = Armed::new(kind, &guest, &[&file]);
    let memory = std::fs::OpenOptions::new().write(true).open(format!("/proc/{}/mem", guest.pid())).unwrap();
    memory.write_all_at(b"from outside", vma.start + 44 * PAGE).unwrap();
    assert_eq!(armed.harvest_one(), [44]);
}

fn a_page_written_and_dropped_from_the_page_tables_is_reported(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 100);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.write("a", &[5, 6], 2);
    guest.order("forget a 5 1");
    assert_eq!(armed.harvest_one(), [5, 6]);
    guest.write("a", &[5], 3);
    assert_eq!(armed.harvest_one(), [5]);
}

fn a_new_mapping_is_reported_whole_and_then_tracked(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 50);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.map("b", &file, 60, 10);
    assert_eq!(armed.harvest_one(), (60..70).collect::<Vec<_>>());
    guest.write("a", &[1], 2);
    guest.write("b", &[1], 2);
    let mut pages = armed.harvest_one();
    if kind == TrackerKind::SoftDirty {
        // A new mapping counts as dirty once more.
        pages.retain(|page| [1, 61].contains(page));
    }
    assert_eq!(pages, [1, 61]);
    assert_eq!(armed.harvest_one(), [0; 0]);
}

fn then_tracked(armed: &mut Armed<'_>, guest: &mut Helper) {
    armed.harvest_one();
    assert_eq!(armed.harvest_one(), [0; 0]);
    guest.write("a", &[17], 9);
    assert_eq!(armed.harvest_one(), [17]);
}

fn a_mapping_that_moves_is_reported_whole_and_then_tracked(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 100);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.write("a", &[3], 2);
    guest.order("move a");
    guest.write("a", &[4], 2);
    assert_eq!(armed.harvest_one(), all(&file));
    then_tracked(&mut armed, &mut guest);
}

fn a_mapping_replaced_in_place_is_reported_whole_and_then_tracked(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 100);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.write("a", &[3], 2);
    guest.order("replace a");
    guest.write("a", &[4], 2);
    assert_eq!(armed.harvest_one(), all(&file));
    then_tracked(&mut armed, &mut guest);
}

fn a_mapping_that_goes_is_reported_whole(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 60);
    guest.map("b", &file, 70, 30);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.write("b", &[3], 2);
    guest.order("unmap b");
    // All of the file: its closing could be somebody else's.
    assert_eq!(armed.harvest_one(), all(&file));
    then_tracked(&mut armed, &mut guest);
}

fn a_mapping_made_writable_is_reported_whole_and_then_tracked(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 50);
    guest.map_as("ro", "b", &file, 50, 50);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    assert_eq!(armed.harvest_one(), [0; 0]);
    guest.order("protect b rw");
    guest.write("b", &[1], 2);
    assert_eq!(armed.harvest_one(), (50..100).collect::<Vec<_>>());
    then_tracked(&mut armed, &mut guest);
}

fn a_process_that_begins_to_map_is_found_by_the_next_look(kind: TrackerKind) {
    let file = RamFile::new(100);
    let (mut guest, mut other) = (Helper::spawn(), Helper::spawn());
    guest.map("a", &file, 0, 100);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    assert_eq!(armed.recheck(), [0; 0]);
    other.map("b", &file, 40, 20);
    assert_eq!(armed.recheck(), all(&file));
    then_tracked(&mut armed, &mut guest);
    other.write("b", &[2], 5);
    assert_eq!(armed.harvest_one(), [42]);
    assert_eq!(armed.recheck(), [0; 0]);
}

fn a_forked_child_is_found_by_the_next_look(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 100);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.order("fork a");
    guest.order("child_write 5");
    assert_eq!(armed.recheck(), all(&file));
    then_tracked(&mut armed, &mut guest);
    guest.order("child_write 6");
    assert_eq!(armed.harvest_one(), [6]);
}

fn a_writer_that_ends_is_reported_whole(kind: TrackerKind) {
    let file = RamFile::new(100);
    let (mut guest, mut other) = (Helper::spawn(), Helper::spawn());
    guest.map("a", &file, 0, 100);
    other.map("b", &file, 40, 20);
    guest.order("write a 0 100 1");
    let mut armed = Armed::new(kind, &guest, &[&file]);
    other.write("b", &[2], 5);
    other.kill();
    // All of the file: its closing could be somebody else's.
    assert_eq!(armed.harvest_one(), all(&file));
    then_tracked(&mut armed, &mut guest);
}

fn a_guest_that_ends_is_an_error(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 100);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.kill();
    let mut written = sets(&[&file]);
    assert!(matches!(armed.tracker.harvest(&mut written), Err(TrackError::GuestEnded { .. })));
    let gone = arm(Some(kind), guest.pid(), &[file.tracked()]);
    assert!(matches!(gone.err(), Some(TrackError::GuestEnded { .. })));
}

fn readers_and_private_mappers_are_no_writers(kind: TrackerKind) {
    let file = RamFile::new(100);
    let (mut guest, mut reader, mut private) = (Helper::spawn(), Helper::spawn(), Helper::spawn());
    guest.map("a", &file, 0, 100);
    reader.map_as("read", "b", &file, 0, 100);
    private.map_as("private", "c", &file, 0, 100);
    let writers = check(guest.pid(), &[file.tracked()]).unwrap();
    assert_eq!(writers.iter().map(|writer| writer.pid).collect::<Vec<_>>(), [guest.pid()]);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    private.write("c", &[3], 3);
    assert_eq!(armed.harvest_one(), [0; 0]);
    assert_eq!(armed.recheck(), [0; 0]);
}

fn memory_tracked_by_a_userfaultfd_is_told_from_memory_that_is_free(kind: TrackerKind) {
    let file = RamFile::new(10);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 10);
    let obstacle = || check(guest.pid(), &[file.tracked()]).unwrap().remove(0).obstacle;
    assert!(obstacle().is_none());
    let armed = Armed::new(kind, &guest, &[&file]);
    // Where soft-dirty works, that would do instead.
    let is_in_the_way = kind == TrackerKind::UffdWp && self_test(TrackerKind::SoftDirty).is_err();
    let found = obstacle();
    assert_eq!(matches!(found, Some(WriterError::AlreadyRegistered { .. })), is_in_the_way, "{found:?}");
    drop(armed);
    assert!(obstacle().is_none());
}

fn a_file_that_the_guest_has_not_mapped_is_refused(kind: TrackerKind) {
    let (file, other) = (RamFile::new(10), RamFile::new(10));
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 10);
    guest.map_as("ro", "b", &other, 0, 10);
    let files = [file.tracked(), other.tracked()];
    let error = arm(Some(kind), guest.pid(), &files).err();
    assert!(matches!(error, Some(TrackError::NotMapped { block, .. }) if block.0 == 1));
    assert!(matches!(check(guest.pid(), &files), Err(TrackError::NotMapped { .. })));
    assert!(matches!(arm(Some(kind), guest.pid(), &[]).err(), Some(TrackError::NoFiles)));
}

fn page_sets_of_another_layout_are_refused(kind: TrackerKind) {
    let (file, other) = (RamFile::new(10), RamFile::new(11));
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 10);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.write("a", &[1], 2);
    for wrong in [&[&other][..], &[&file, &other]] {
        let mut written = sets(wrong);
        assert!(matches!(armed.tracker.harvest(&mut written), Err(TrackError::WrongPageSets)));
        assert!(matches!(armed.tracker.recheck(&mut written), Err(TrackError::WrongPageSets)));
    }
    assert_eq!(armed.harvest_one(), [1]);
}

fn dropping_the_tracker_leaves_the_guest_alone(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 100);
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", guest.pid())).unwrap().count();
    let before = descriptors();
    let armed = Armed::new(kind, &guest, &[&file]);
    assert_eq!(descriptors(), before);
    assert_eq!(guest.status("TracerPid"), "0");
    drop(armed);
    // A child that another test is just starting may share our descriptors until it runs.
    let deadline = Instant::now() + Duration::from_secs(5);
    while protected(guest.pid()) {
        assert!(Instant::now() < deadline, "the guest stays write-protected");
    }
    assert_eq!(descriptors(), before);
    guest.write("a", &[1, 2, 3], 55);
    assert_eq!(file.stamp(3)[..8], 55u64.to_ne_bytes());
}

fn a_tracker_can_be_armed_again_after_it_was_dropped(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 100);
    for round in 0..5 {
        let mut armed = Armed::new(kind, &guest, &[&file]);
        guest.write("a", &[round], round);
        assert_eq!(armed.harvest_one(), [round]);
    }
}

fn memory_never_touched_costs_nothing_to_arm_and_is_tracked(kind: TrackerKind) {
    let file = RamFile::new((6 << 30) / PAGE);
    let mut guest = Helper::spawn();
    guest.map_as("rw", "a", &file, 0, file.pages);
    let touched = [0, 1, 99_999, 262_143, 262_144, file.pages - 1];
    guest.write("a", &touched, 1);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    if kind == TrackerKind::SoftDirty {
        armed.harvest_one();
    }
    assert_eq!(armed.harvest_one(), [0; 0]);
    let tables_kib: u64 = guest.status("VmPTE").trim_end_matches(" kB").parse().unwrap();
    assert!(tables_kib < 1024, "{tables_kib} KiB of page tables");
    let later = [1, 500_000, 700_123, file.pages - 1];
    guest.write("a", &later, 2);
    let reported = armed.harvest_one();
    assert!(later.iter().all(|page| reported.contains(page)));
    assert!(reported.len() <= 4 * 512, "{} pages", reported.len());
    guest.write("a", &later, 3);
    assert_eq!(armed.harvest_one(), later);
}

fn a_harvest_shared_among_threads_is_as_exact(kind: TrackerKind) {
    // So large that one thread alone does not harvest it.
    let file = RamFile::new((6 << 30) / PAGE);
    let mut guest = Helper::spawn();
    guest.map_as("rw", "a", &file, 0, file.pages);
    let one_of_each_part: Vec<u64> = (0..file.pages).step_by(512).collect();
    guest.write("a", &one_of_each_part, 1);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    let mut random = Random(7);
    for round in 0..3 {
        let mut pages: Vec<u64> = (0..200).map(|_| one_of_each_part[random.below(3072) as usize]).collect();
        guest.write("a", &pages, 2);
        pages.sort_unstable();
        pages.dedup();
        let reported = armed.harvest_one();
        if round == 0 && kind == TrackerKind::SoftDirty {
            assert!(pages.iter().all(|page| reported.contains(page)));
        } else {
            assert_eq!(reported, pages);
        }
    }
}

fn a_last_harvest_reports_what_was_written_and_a_further_one_loses_nothing(kind: TrackerKind) {
    let file = RamFile::new(100);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 100);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.write("a", &[3, 7], 2);
    assert_eq!(armed.harvest_one(), [3, 7]);
    guest.write("a", &[7, 40, 41], 3);
    assert_eq!(armed.harvest_last(), [7, 40, 41]);
    // It runs on after all, and writes pages that were reported and others.
    guest.write("a", &[41, 99], 4);
    guest.order("forget a 99 1");
    let further = armed.harvest_one();
    assert!([41, 99].iter().all(|page| further.contains(page)), "{further:?}");
    assert!(further.iter().all(|page| [7, 40, 41, 99].contains(page)), "{further:?}");
    then_tracked(&mut armed, &mut guest);
}

fn no_write_is_lost_while_it_races_a_last_harvest(kind: TrackerKind) {
    let file = RamFile::new(4096);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 4096);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    let mut replica = Replica::new(&file);
    for round in 0..4 {
        guest.order(&format!("hammer a {}", 1 + round));
        race(15, 100, || {
            let last = armed.harvest_last();
            replica.copy(&file, &last);
            let further = armed.harvest_one();
            replica.copy(&file, &further);
            last.len() + further.len()
        });
        guest.order("rest");
        let pages = armed.harvest_last();
        replica.copy(&file, &pages);
        assert_eq!(replica.lost(&file), [0; 0], "round {round}");
    }
}

fn memory_first_touched_before_a_last_harvest_is_in_it_and_is_tracked(kind: TrackerKind) {
    let file = RamFile::new((64 << 20) / PAGE);
    let mut guest = Helper::spawn();
    guest.map_as("rw", "a", &file, 0, file.pages);
    guest.write("a", &[0], 1);
    let mut armed = Armed::new(kind, &guest, &[&file]);
    let first = [5000, 5001, file.pages - 1];
    guest.write("a", &first, 2);
    let reported = armed.harvest_last();
    assert!(first.iter().all(|page| reported.contains(page)));
    // A page of the memory that was new then, and one of memory that is new now.
    guest.write("a", &[5100, 9000], 3);
    let further = armed.harvest_one();
    assert!([5100, 9000].iter().all(|page| further.contains(page)));
    guest.write("a", &[5100], 4);
    assert_eq!(armed.harvest_one(), [5100]);
}

fn a_last_harvest_leaves_nothing_of_another_process_to_the_confirmation(kind: TrackerKind) {
    let file = RamFile::new(100);
    let (mut guest, mut other) = (Helper::spawn(), Helper::spawn());
    guest.map("a", &file, 0, 100);
    other.map("b", &file, 40, 20);
    guest.order("write a 0 100 1");
    let mut armed = Armed::new(kind, &guest, &[&file]);
    guest.write("a", &[1], 2);
    other.write("b", &[3], 2);
    assert_eq!(armed.harvest_last(), [1, 43]);
    armed.tracker.confirm().unwrap();
    other.write("b", &[3], 3);
    let late = armed.tracker.confirm();
    assert!(matches!(late, Err(TrackError::WroteLate { pid, .. }) if pid == other.pid()), "{late:?}");
}
