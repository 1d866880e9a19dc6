use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::sync::Barrier;
use std::thread;

use super::*;
use crate::Block;

const HUGE: u64 = 2 << 20;

fn layout() -> Layout {
    let block = |name: &str, guest_address, pages, page_bytes| Block {
        name: name.to_owned(),
        guest_address,
        length_bytes: pages * page_bytes,
        page_bytes,
    };
    Layout::new(vec![block("small", 0, 1000, 4096), block("huge", 1 << 40, 70, HUGE)]).unwrap()
}

const SMALL: BlockIndex = BlockIndex(0);
const BIG: BlockIndex = BlockIndex(1);

fn some_pages() -> PageSets {
    let mut sets = PageSets::new(&layout());
    for (first, count) in [(0, 1), (60, 10), (128, 64), (999, 1)] {
        sets.block_mut(SMALL).insert_run(PageRun { first, count });
    }
    sets.block_mut(BIG).insert_run(PageRun { first: 62, count: 8 });
    sets
}

struct Place {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

fn place_for_one() -> Place {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("owed");
    Place { _directory: directory, path }
}

fn create(place: &Place) -> Owed {
    Owed::create(&place.path, "m-1", &layout(), &some_pages()).unwrap()
}

fn open(place: &Place) -> Result<Owed, OwedError> {
    Owed::open(&place.path, "m-1", &layout())
}

#[test]
fn what_is_owed_is_told_page_by_page_and_run_by_run() {
    let place = place_for_one();
    let owed = create(&place);
    assert_eq!((owed.pages(), owed.bytes()), (84, 76 * 4096 + 8 * HUGE));
    assert_eq!(owed.to_page_sets().unwrap(), some_pages());
    for page in 0..1000 {
        assert_eq!(owed.is_owed(SMALL, page).unwrap(), some_pages().block(SMALL).contains(page));
    }
    let run = |from, cap| owed.next_run(SMALL, from, cap).unwrap().map(|run| (run.first, run.count));
    assert_eq!(run(0, 100), Some((0, 1)));
    assert_eq!(run(1, 4), Some((60, 4)));
    assert_eq!(run(64, 100), Some((64, 6)));
    assert_eq!(run(70, 1000), Some((128, 64)));
    assert_eq!(run(192, 1), Some((999, 1)));
    assert_eq!((run(1000, 1), run(u64::MAX, 1)), (None, None));
    let mode = fs::metadata(&place.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn what_was_cleared_stays_so_for_whoever_opens_it_next() {
    let place = place_for_one();
    let owed = create(&place);
    assert_eq!(owed.clear(SMALL, PageRun { first: 62, count: 100 }).unwrap(), 8 + 34);
    assert_eq!(owed.clear(SMALL, PageRun { first: 62, count: 100 }).unwrap(), 0);
    assert_eq!(owed.clear(BIG, PageRun { first: 0, count: 70 }).unwrap(), 8);
    let left = owed.to_page_sets().unwrap();
    drop(owed);
    let owed = open(&place).unwrap();
    assert_eq!(owed.to_page_sets().unwrap(), left);
    assert_eq!((owed.pages(), owed.bytes()), (34, 34 * 4096));
    assert_eq!(owed.clear(SMALL, PageRun { first: 0, count: 1000 }).unwrap(), 34);
    assert!(owed.is_empty());
    owed.remove().unwrap();
    assert!(matches!(open(&place), Err(OwedError::Io { .. })));
}

#[test]
fn of_threads_that_race_for_a_page_one_counts_it() {
    let place = place_for_one();
    let mut sets = PageSets::new(&layout());
    sets.block_mut(SMALL).insert_run(PageRun { first: 0, count: 1000 });
    let owed = Owed::create(&place.path, "m-1", &layout(), &sets).unwrap();
    let barrier = Barrier::new(4);
    let cleared: u64 = thread::scope(|scope| {
        let work = |step: u64| {
            let (owed, barrier) = (&owed, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let starts = (0..1000).step_by(step as usize);
                starts
                    .map(|first| owed.clear(SMALL, PageRun { first, count: step.min(1000 - first) }).unwrap())
                    .sum::<u64>()
            })
        };
        let workers: Vec<_> = [1, 3, 64, 77].map(work).into();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    assert_eq!(cleared, 1000);
    assert!(owed.is_empty() && owed.to_page_sets().unwrap().is_empty());
}

#[test]
fn one_that_is_in_use_or_exists_is_not_replaced() {
    let place = place_for_one();
    let owed = create(&place);
    assert!(matches!(open(&place), Err(OwedError::Locked { .. })));
    let again = |place: &Place| Owed::create(&place.path, "m-1", &layout(), &some_pages());
    assert!(matches!(again(&place), Err(OwedError::Exists { .. })));
    drop(owed);
    assert!(matches!(again(&place), Err(OwedError::Exists { .. })));
    assert_eq!(open(&place).unwrap().to_page_sets().unwrap(), some_pages());
    let names = fs::read_dir(place.path.parent().unwrap()).unwrap().count();
    assert_eq!(names, 1);
}

#[test]
fn one_whose_making_was_interrupted_is_made_anew() {
    let place = place_for_one();
    fs::write(place.path.with_extension("new"), b"half of it").unwrap();
    drop(create(&place));
    assert_eq!(open(&place).unwrap().pages(), 84);
}

#[test]
fn files_that_are_not_what_was_made_are_refused() {
    let place = place_for_one();
    drop(create(&place));
    let good = fs::read(&place.path).unwrap();
    let with = |bytes: &[u8]| {
        fs::write(&place.path, bytes).unwrap();
        open(&place).map(|owed| owed.pages())
    };
    let damaged = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    assert!(matches!(with(b""), Err(OwedError::NotOwed { .. })));
    assert!(matches!(with(&good[..100]), Err(OwedError::Damaged { .. })));
    assert!(matches!(with(&good[..4096]), Err(OwedError::Damaged { .. })));
    assert!(matches!(with(&[&good[..], &[0; 4096]].concat()), Err(OwedError::Damaged { .. })));
    assert!(matches!(with(&damaged(0)), Err(OwedError::NotOwed { .. })));
    assert!(matches!(with(&damaged(8)), Err(OwedError::Version { version: 0, .. })));
    for at in 12..HEADER_BYTES as usize {
        assert!(matches!(with(&damaged(at)), Err(OwedError::Damaged { .. })), "{at}");
    }
    // Past the pages of the first block, of the second, and past both.
    for at in [4096 + 125, 4096 + 128 + 9, good.len() - 1] {
        assert!(matches!(with(&damaged(at)), Err(OwedError::Damaged { .. })), "{at}");
    }
    assert_eq!(with(&good).unwrap(), 84);
    let other = Owed::open(&place.path, "m-2", &layout());
    assert!(matches!(other, Err(OwedError::OtherMigration { found, .. }) if found == "m-1"));
    let mut blocks = layout().blocks().to_vec();
    blocks[1].name.push('x');
    let other = Owed::open(&place.path, "m-1", &Layout::new(blocks).unwrap());
    assert!(matches!(other, Err(OwedError::OtherLayout { .. })));
    let long = "m".repeat(2000);
    let long = Owed::create(&place.path, &long, &layout(), &some_pages());
    assert!(matches!(long, Err(OwedError::IdTooLong { .. })));
}

#[test]
fn a_file_truncated_in_use_is_an_error_and_never_reads_as_nothing_owed() {
    let place = place_for_one();
    let owed = create(&place);
    let file = File::options().write(true).open(&place.path).unwrap();
    file.set_len(4096).unwrap();
    assert!(matches!(owed.is_owed(SMALL, 128), Err(OwedError::Lost { .. })));
    assert!(matches!(owed.next_run(SMALL, 0, 10), Err(OwedError::Lost { .. })));
    assert!(matches!(owed.clear(SMALL, PageRun { first: 0, count: 1 }), Err(OwedError::Lost { .. })));
    assert!(matches!(owed.to_page_sets(), Err(OwedError::Lost { .. })));
    assert_eq!(owed.pages(), 84);
}

#[test]
fn what_is_cleared_is_in_the_file_at_once() {
    let place = place_for_one();
    let owed = create(&place);
    owed.clear(SMALL, PageRun { first: 0, count: 64 }).unwrap();
    let mut word = [0xff; 8];
    File::open(&place.path).unwrap().read_exact_at(&mut word, 4096).unwrap();
    assert_eq!(word, [0; 8]);
}
