//! Writers that no look at the mappings finds.

use ramferry_tracking::{TrackError, Tracker, WriterError, arm, check};

use crate::file::{RamFile, members, sets};
use crate::helper::Helper;
use crate::kinds::best;

const PAGES: u64 = 100;

/// A guest that is tracked, and somebody else; none where this machine cannot track.
fn tracked() -> Option<(RamFile, Helper, Helper, Box<dyn Tracker>)> {
    let kind = best()?;
    let file = RamFile::new(PAGES);
    let (mut guest, other) = (Helper::spawn(), Helper::spawn());
    guest.map("a", &file, 0, PAGES);
    let tracker = arm(Some(kind), guest.pid(), &[file.tracked()]).unwrap();
    Some((file, guest, other, tracker))
}

fn harvest(tracker: &mut dyn Tracker, file: &RamFile) -> Result<Vec<u64>, TrackError> {
    let mut written = sets(&[file]);
    tracker.harvest(&mut written)?;
    Ok(members(&written, 0))
}

fn recheck(tracker: &mut dyn Tracker, file: &RamFile) -> Result<Vec<u64>, TrackError> {
    let mut written = sets(&[file]);
    tracker.recheck(&mut written)?;
    Ok(members(&written, 0))
}

fn is_holder(error: &TrackError, helper: &Helper) -> bool {
    matches!(error, TrackError::Writer { pid, source: WriterError::HoldsDescriptor { .. }, comm }
        if *pid == helper.pid() && !comm.is_empty())
}

#[test]
fn a_mapping_that_comes_and_goes_between_two_looks_is_not_missed() {
    let Some((file, _guest, mut other, mut tracker)) = tracked() else { return };
    assert_eq!(recheck(&mut *tracker, &file).unwrap(), [0; 0]);
    other.map("b", &file, 40, 2);
    other.order("unmap b");
    let error = harvest(&mut *tracker, &file).unwrap_err();
    assert!(matches!(error, TrackError::UnseenWriter { .. }), "{error}");
}

#[test]
fn a_mapping_that_comes_and_goes_after_the_last_harvest_is_not_missed() {
    let Some((file, _guest, mut other, mut tracker)) = tracked() else { return };
    harvest(&mut *tracker, &file).unwrap();
    tracker.confirm().unwrap();
    other.map("b", &file, 40, 2);
    other.order("unmap b");
    assert!(matches!(tracker.confirm(), Err(TrackError::UnseenWriter { .. })));
}

#[test]
fn a_mapping_made_after_the_last_look_is_named_by_the_confirmation() {
    let Some((file, _guest, mut other, mut tracker)) = tracked() else { return };
    recheck(&mut *tracker, &file).unwrap();
    other.map("b", &file, 40, 2);
    harvest(&mut *tracker, &file).unwrap();
    let error = tracker.confirm().unwrap_err();
    assert!(matches!(&error, TrackError::WroteLate { pid, .. } if *pid == other.pid()), "{error}");
    assert!(error.to_string().contains(&other.pid().to_string()));
}

#[test]
fn a_tracked_process_that_writes_or_ends_after_the_last_harvest_is_named() {
    for ends in [false, true] {
        let Some((file, _guest, mut other, mut tracker)) = tracked() else { return };
        other.map("b", &file, 40, 2);
        assert!(!tracker.has_other_writers());
        recheck(&mut *tracker, &file).unwrap();
        assert!(tracker.has_other_writers());
        harvest(&mut *tracker, &file).unwrap();
        tracker.confirm().unwrap();
        if ends {
            other.kill();
        } else {
            other.write("b", &[1], 9);
        }
        let error = tracker.confirm().unwrap_err();
        assert!(matches!(error, TrackError::WroteLate { pid, .. } if pid == other.pid()), "{error}");
    }
}

#[test]
fn what_a_tracked_process_wrote_before_it_unmapped_or_ended_is_reported() {
    for ends in [false, true] {
        let Some((file, mut guest, mut other, mut tracker)) = tracked() else { return };
        other.map("b", &file, 40, 20);
        recheck(&mut *tracker, &file).unwrap();
        harvest(&mut *tracker, &file).unwrap();
        other.write("b", &[3], 9);
        if ends {
            other.kill();
        } else {
            other.order("unmap b");
        }
        let reported = harvest(&mut *tracker, &file).unwrap();
        assert!((40..60).all(|page| reported.contains(&page)), "{reported:?}");
        guest.write("a", &[5], 2);
        assert_eq!(harvest(&mut *tracker, &file).unwrap(), [5]);
        tracker.confirm().unwrap();
    }
}

/// Nobody can tell such a process' closing from that of one that was never seen.
#[test]
fn a_stranger_s_writes_are_not_hidden_behind_a_tracked_process_that_ends() {
    let Some((file, _guest, mut other, mut tracker)) = tracked() else { return };
    let mut stranger = Helper::spawn();
    other.map("b", &file, 40, 20);
    recheck(&mut *tracker, &file).unwrap();
    harvest(&mut *tracker, &file).unwrap();
    stranger.map("c", &file, 80, 2);
    stranger.order("unmap c");
    other.order("unmap b");
    assert_eq!(harvest(&mut *tracker, &file).unwrap(), (0..PAGES).collect::<Vec<_>>());
}

#[test]
fn writes_by_system_calls_to_the_file_are_not_missed() {
    let Some((file, _guest, mut other, mut tracker)) = tracked() else { return };
    other.order(&format!("open f {}", file.path()));
    other.order("write_file f 8192");
    let error = harvest(&mut *tracker, &file).unwrap_err();
    assert!(matches!(error, TrackError::Modified { .. }), "{error}");
}

#[test]
fn a_process_that_has_the_file_open_for_writing_is_refused_by_name() {
    let Some((file, guest, mut other, mut tracker)) = tracked() else { return };
    other.order(&format!("open f {}", file.path()));
    assert!(is_holder(&recheck(&mut *tracker, &file).unwrap_err(), &other));

    drop(tracker);
    let error = arm(None, guest.pid(), &[file.tracked()]).err().unwrap();
    assert!(is_holder(&error, &other), "{error}");
    let writers = check(guest.pid(), &[file.tracked()]).unwrap();
    let named = writers.iter().find(|writer| writer.pid == other.pid()).unwrap();
    assert!(matches!(named.obstacle, Some(WriterError::HoldsDescriptor { .. })));

    other.order("close f");
    let writers = check(guest.pid(), &[file.tracked()]).unwrap();
    assert!(writers.len() == 1 && writers[0].obstacle.is_none(), "{writers:?}");
    arm(None, guest.pid(), &[file.tracked()]).unwrap();
}

#[test]
fn processes_that_only_read_the_file_are_no_writers() {
    let Some((file, _guest, mut other, mut tracker)) = tracked() else { return };
    let read = std::fs::read(file.path()).unwrap();
    assert_eq!(read.len() as u64, PAGES * file.page_bytes);
    other.map_as("private", "b", &file, 0, PAGES);
    assert_eq!(recheck(&mut *tracker, &file).unwrap(), [0; 0]);
    assert_eq!(harvest(&mut *tracker, &file).unwrap(), [0; 0]);
    other.order("unmap b");
    tracker.confirm().unwrap();
}
