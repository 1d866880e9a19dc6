//! Files of huge pages: hugetlbfs, whose page is the granule, and tmpfs that is
//! mapped with transparent ones, whose granule stays 4 KiB.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

use ramferry_tracking::{SelfTestError, TrackError, TrackerKind, WriterError, arm, self_test};
use rustix::fs::MemfdFlags;

use crate::file::{PAGE, RamFile, Replica, members, sets};
use crate::helper::Helper;
use crate::kinds::works;

pub(crate) const HUGE: u64 = 2 << 20;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
static POOL_USER: Mutex<()> = Mutex::new(());

/// More huge pages than there were, until dropped.
pub(crate) struct Pool {
    before: String,
    _alone: std::sync::MutexGuard<'static, ()>,
}

impl Pool {
    pub(crate) fn grow(pages: u64) -> Result<Self, String> {
        let alone = POOL_USER.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = std::fs::read_to_string(POOL).map_err(|error| error.to_string())?;
        let pool = Self { before, _alone: alone };
        let had: u64 = pool.before.trim().parse().unwrap();
        std::fs::write(POOL, (had + pages).to_string()).map_err(|error| error.to_string())?;
        let has: u64 = std::fs::read_to_string(POOL).unwrap().trim().parse().unwrap();
        if has < had + pages { Err(format!("{has} huge pages instead of {}", had + pages)) } else { Ok(pool) }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = std::fs::write(POOL, self.before.trim());
    }
}

pub(crate) fn huge_file(pages: u64) -> RamFile {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB;
    RamFile::of(rustix::fs::memfd_create("huge", flags).unwrap().into(), pages, HUGE)
}

#[test]
fn a_mapping_of_huge_pages_that_comes_and_goes_between_two_looks_is_not_missed() {
    let pool = Pool::grow(4);
    if let Err(reason) = &pool {
        eprintln!("SKIPPED: {reason}");
        return;
    }
    if !works(TrackerKind::UffdWp) {
        return;
    }
    let file = huge_file(4);
    let (mut guest, mut other) = (Helper::spawn(), Helper::spawn());
    guest.map("a", &file, 0, 4);
    let mut tracker = arm(Some(TrackerKind::UffdWp), guest.pid(), &[file.tracked()]).unwrap();
    let mut written = sets(&[&file]);
    tracker.harvest(&mut written).unwrap();
    tracker.confirm().unwrap();
    other.map("b", &file, 2, 1);
    other.order("unmap b");
    assert!(matches!(tracker.harvest(&mut written), Err(TrackError::UnseenWriter { .. })));
}

#[test]
fn uffd_wp_sees_writes_to_hugetlbfs_by_huge_page() {
    let pool = Pool::grow(20);
    if let Err(reason) = &pool {
        eprintln!("SKIPPED: {reason}");
        return;
    }
    if !works(TrackerKind::UffdWp) {
        return;
    }
    let file = huge_file(20);
    let mut guest = Helper::spawn();
    guest.map("low", &file, 0, 8);
    guest.map("high", &file, 12, 8);
    let mut tracker = arm(Some(TrackerKind::UffdWp), guest.pid(), &[file.tracked()]).unwrap();
    let mut harvest = || {
        let mut written = sets(&[&file]);
        tracker.harvest(&mut written).unwrap();
        members(&written, 0)
    };
    assert_eq!(harvest(), [0; 0]);
    guest.write("low", &[0, 3], 2);
    guest.write("high", &[7], 2);
    assert_eq!(harvest(), [0, 3, 19]);
    assert_eq!(harvest(), [0; 0]);
    guest.order("kernel_write low 5 9");
    assert_eq!(harvest(), [5]);
    let mut replica = Replica::new(&file);
    guest.order("hammer low 1");
    for _ in 0..200 {
        replica.copy(&file, &harvest());
    }
    guest.order("rest");
    replica.copy(&file, &harvest());
    assert_eq!(replica.lost(&file), [0; 0]);
    guest.order("replace high");
    assert_eq!(harvest(), (12..20).collect::<Vec<_>>());
    guest.write("low", &[2, 6], 3);
    let mut last = sets(&[&file]);
    tracker.harvest_last(&mut last).unwrap();
    assert_eq!(members(&last, 0), [2, 6]);
    drop(tracker);
    assert_eq!(guest.order("write low 1 1 4"), "ok");
}

#[test]
fn soft_dirty_refuses_hugetlbfs() {
    let pool = Pool::grow(2);
    if let Err(reason) = &pool {
        eprintln!("SKIPPED: {reason}");
        return;
    }
    let file = huge_file(2);
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 2);
    if !works(TrackerKind::SoftDirty) {
        return;
    }
    match arm(Some(TrackerKind::SoftDirty), guest.pid(), &[file.tracked()]).err() {
        Some(TrackError::Writer { source: WriterError::HugePages, .. }) => {}
        other => panic!("{other:?}"),
    }
}

/// A tmpfs with transparent huge pages, until dropped.
struct HugeTmpfs(PathBuf);

impl HugeTmpfs {
    fn mount() -> Result<Self, String> {
        let directory = tempfile::tempdir().unwrap().keep();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "huge=always,size=256m", "ramferry-test"])
            .arg(&directory)
            .output()
            .map_err(|error| error.to_string())?;
        if mount.status.success() {
            return Ok(Self(directory));
        }
        std::fs::remove_dir(&directory).unwrap();
        Err(String::from_utf8_lossy(&mount.stderr).into_owned())
    }

    fn file(&self) -> File {
        tempfile::tempfile_in(&self.0).unwrap()
    }
}

impl Drop for HugeTmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn uffd_wp_sees_single_pages_of_transparent_huge_ones() {
    sees_single_pages_of_transparent_huge_ones(TrackerKind::UffdWp);
}

#[test]
fn soft_dirty_sees_single_pages_of_transparent_huge_ones() {
    sees_single_pages_of_transparent_huge_ones(TrackerKind::SoftDirty);
}

fn sees_single_pages_of_transparent_huge_ones(kind: TrackerKind) {
    if !works(kind) {
        return;
    }
    let tmpfs = match HugeTmpfs::mount() {
        Ok(tmpfs) => tmpfs,
        Err(reason) => {
            eprintln!("SKIPPED: {reason}");
            return;
        }
    };
    let pages = 16 * HUGE / PAGE;
    let file = RamFile::of(tmpfs.file(), pages, PAGE);
    let mut guest = Helper::spawn();
    guest.map_as("rw", "a", &file, 0, pages);
    guest.order(&format!("write a 0 {} 1", pages / 2));
    let mut tracker = arm(Some(kind), guest.pid(), &[file.tracked()]).unwrap();
    let mut replica = Replica::new(&file);
    let mut harvest = || {
        let mut written = sets(&[&file]);
        tracker.harvest(&mut written).unwrap();
        members(&written, 0)
    };
    if kind == TrackerKind::UffdWp {
        guest.write("a", &[3, 700], 2);
        let pages = harvest();
        assert_eq!(pages, [3, 700]);
        replica.copy(&file, &pages);
    }
    // Written through a new huge mapping, which is then dropped.
    let fresh = pages / 2 + 512;
    guest.write("a", &[fresh + 5], 3);
    guest.order(&format!("forget a {fresh} 512"));
    let reported = harvest();
    assert!(reported.contains(&(fresh + 5)));
    replica.copy(&file, &reported);
    guest.order("hammer a 1");
    for _ in 0..50 {
        replica.copy(&file, &harvest());
    }
    guest.order("rest");
    let mut last = sets(&[&file]);
    tracker.harvest_last(&mut last).unwrap();
    replica.copy(&file, &members(&last, 0));
    assert_eq!(replica.lost(&file), [0; 0]);
}

#[test]
fn a_tracker_that_cannot_see_is_found_out() {
    let soft_dirty_built = std::fs::read("/proc/config.gz").is_ok_and(|packed| {
        let unpacked =
            Command::new("zgrep").args(["-q", "^CONFIG_MEM_SOFT_DIRTY=y", "/proc/config.gz"]).status();
        !packed.is_empty() && unpacked.is_ok_and(|status| status.success())
    });
    match self_test(TrackerKind::SoftDirty) {
        Ok(()) => {}
        Err(error) if soft_dirty_built || ramferry_lab::inside::is_here() => panic!("{error}"),
        Err(SelfTestError::Missed { missed, written, .. }) => assert_eq!(missed, written),
        Err(error) => panic!("{error}"),
    }
}
