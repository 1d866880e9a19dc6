//! A tracker that sees nothing, and pages that are filled at every moment there is.

use std::time::Duration;

use ramferry_engine::{Outcome, Reason};
use ramferry_ram::{Access, Block, BlockIndex, BlockRange, Layout, Mapping, Memory, PageSets, RamFile};
use ramferry_tracking::{Harvest, TrackError, Tracker, TrackerKind};

use crate::migration::{Ended, LateWrites, Moment, Plan, migrate};

const PAGES: u64 = 3000;
const PAGE: u64 = 4096;

/// Reports nothing.
struct Blind {
    others_write: bool,
    confirms: bool,
}

impl Tracker for Blind {
    fn kind(&self) -> TrackerKind {
        TrackerKind::UffdWp
    }

    fn harvest(&mut self, _: &mut PageSets) -> Result<Harvest, TrackError> {
        Ok(Harvest { written_pages: 0, elapsed: Duration::ZERO })
    }

    fn has_other_writers(&self) -> bool {
        self.others_write
    }

    fn recheck(&mut self, _: &mut PageSets) -> Result<(), TrackError> {
        Ok(())
    }

    fn confirm(&mut self) -> Result<(), TrackError> {
        if self.confirms { Ok(()) } else { Err(TrackError::Modified { block: BlockIndex(0) }) }
    }
}

fn layout() -> Layout {
    let (guest_address, length_bytes, page_bytes) = (0, PAGES * PAGE, PAGE);
    Layout::new(vec![Block { name: "ram".into(), guest_address, length_bytes, page_bytes }]).unwrap()
}

fn file() -> RamFile {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(PAGES * PAGE).unwrap();
    RamFile::from_fd(file.into(), Access::ReadWrite).unwrap()
}

fn write(mapping: &Mapping, page: u64, byte: u8) {
    mapping.span(page * PAGE, PAGE).unwrap().write_from(&[byte; PAGE as usize]);
}

/// A page that differs at the destination after a migration in which `page` is filled with `byte` at `moment`.
fn lost(
    late_writes: LateWrites,
    drains: bool,
    others_write: bool,
    (page, byte): (u64, u8),
    moment: Moment,
) -> (Vec<u64>, Ended) {
    let (source, destination) = (file(), file());
    let ours = Mapping::new(&source, PAGES * PAGE, Access::ReadWrite).unwrap();
    (0..PAGES).filter(|page| page % 5 != 0).for_each(|page| write(&ours, page, 1 + page as u8 % 200));
    (0..PAGES).step_by(50).for_each(|page| write(&ours, page, 0));
    let both = [source.clone(), destination.clone()];
    let tracker = Box::new(Blind { others_write, confirms: true });
    let plan = Plan { layout: layout(), source, destination, tracker, late_writes, drains };
    let fill = move |now| {
        if now == moment {
            write(&ours, page, byte);
        }
    };
    let ended = migrate(plan, Box::new(fill));
    assert_eq!(ended.outcome, Outcome::Succeeded);
    let [source, destination] =
        both.map(|file| Memory::new(layout(), vec![file], Access::ReadWrite).unwrap());
    let read = |memory: &Memory, page| {
        let mut bytes = vec![0; PAGE as usize];
        let range = BlockRange { block: BlockIndex(0), offset: page * PAGE, length: PAGE };
        memory.span(range).unwrap().read_into(&mut bytes);
        bytes
    };
    let differing = (0..PAGES).filter(|page| read(&source, *page) != read(&destination, *page));
    (differing.collect(), ended)
}

/// Data over data, data over a page of zeros, and zeros over data.
const FILLS: [(u64, u8); 3] = [(7, 250), (50, 250), (PAGES - 1, 0)];

#[test]
fn a_late_fill_is_lost_where_none_is_expected() {
    for fill in FILLS {
        let (lost, ended) = lost(LateWrites::None, true, false, fill, Moment::RoundEnded(1));
        assert_eq!(lost, [fill.0]);
        assert_eq!((ended.progress.late_bytes, ended.late_writes), (0, LateWrites::None));
    }
}

#[test]
fn a_late_fill_is_found_by_the_settle() {
    for fill in FILLS {
        for moment in [Moment::RoundEnded(1), Moment::Drain] {
            let (lost, ended) = lost(LateWrites::Drainable, true, false, fill, moment);
            assert_eq!(lost, [0; 0], "{fill:?} at {moment:?}");
            assert_eq!(ended.progress.late_bytes, PAGE);
            assert!(ended.moments.contains(&Moment::Drain));
            assert_eq!(ended.progress.downtime_parts.recheck, Duration::ZERO, "nothing was left to recheck");
        }
    }
}

#[test]
fn a_late_fill_is_found_at_the_pause_where_nobody_can_drain() {
    for fill in FILLS {
        for moment in [Moment::RoundEnded(1), Moment::RoundEnded(2), Moment::Pause] {
            let (lost, ended) = lost(LateWrites::Undrainable, true, false, fill, moment);
            assert_eq!(lost, [0; 0], "{fill:?} at {moment:?}");
            assert!(!ended.moments.contains(&Moment::Drain));
            assert!(ended.progress.downtime_parts.recheck > Duration::ZERO);
        }
    }
}

#[test]
fn a_drain_that_fails_proves_nothing() {
    let (lost, ended) = lost(LateWrites::Drainable, false, false, FILLS[0], Moment::Pause);
    assert_eq!(lost, [0; 0]);
    assert!(ended.progress.downtime_parts.recheck > Duration::ZERO);
}

#[test]
fn another_process_that_writes_makes_everything_be_rechecked() {
    let (lost, ended) = lost(LateWrites::None, true, true, FILLS[0], Moment::Pause);
    assert_eq!(lost, [0; 0]);
    assert_eq!(ended.late_writes, LateWrites::Undrainable);
}

#[test]
fn memory_that_was_never_touched_is_not_allocated_by_a_recheck() {
    let (source, destination) = (file(), file());
    let ours = Mapping::new(&source, PAGES * PAGE, Access::ReadWrite).unwrap();
    let theirs = Mapping::new(&destination, PAGES * PAGE, Access::ReadWrite).unwrap();
    write(&ours, 3, 3);
    // A hole here that is not one there: it is made zero, and never read.
    write(&theirs, 9, 9);
    let plan = Plan {
        layout: layout(),
        source: source.clone(),
        destination,
        tracker: Box::new(Blind { others_write: false, confirms: true }),
        late_writes: LateWrites::Undrainable,
        drains: true,
    };
    assert_eq!(migrate(plan, Box::new(|_| ())).outcome, Outcome::Succeeded);
    assert!(theirs.span(9 * PAGE, PAGE).unwrap().is_zero());
    assert_eq!(source.presence(PAGES).unwrap().count(), 1);
}

#[test]
fn somebody_who_writes_behind_the_last_copy_keeps_the_guest_here() {
    let plan = Plan {
        layout: layout(),
        source: file(),
        destination: file(),
        tracker: Box::new(Blind { others_write: false, confirms: false }),
        late_writes: LateWrites::None,
        drains: true,
    };
    let Outcome::Failed(failure) = migrate(plan, Box::new(|_| ())).outcome else { panic!("it moved") };
    assert_eq!(failure.reason, Reason::TrackerFailed);
}
