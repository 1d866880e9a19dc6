//! A tracker that is killed leaves the guest running, untraced and unprotected.

use std::time::{Duration, Instant};

use ramferry_tracking::TrackerKind;

use crate::file::RamFile;
use crate::helper::{Helper, protected, state};
use crate::kinds::works;

#[test]
fn a_guest_outlives_a_killed_uffd_wp_tracker() {
    outlives_a_killed_tracker(TrackerKind::UffdWp);
}

#[test]
fn a_guest_outlives_a_killed_soft_dirty_tracker() {
    outlives_a_killed_tracker(TrackerKind::SoftDirty);
}

#[test]
fn a_guest_outlives_an_agent_killed_while_it_borrows_a_thread() {
    if !works(TrackerKind::UffdWp) {
        return;
    }
    let mut guest = Helper::spawn();
    guest.order("spin");
    for round in 0..60u64 {
        let mut agent = Helper::spawn();
        assert_eq!(agent.order(&format!("borrow {}", guest.pid())), "ok");
        // The agent borrows without a pause: any moment is as good as another.
        std::thread::sleep(Duration::from_micros(200 + round * 137 % 4000));
        agent.kill();
        assert_eq!(guest.order("hello"), "ok", "round {round}");
    }
    // What acted for the last agent may still be under way.
    let deadline = Instant::now() + Duration::from_secs(5);
    while guest.status("TracerPid") != "0" {
        assert!(Instant::now() < deadline, "still traced by {}", guest.status("TracerPid"));
    }
    let spun = guest.order("spun");
    assert!(spun.starts_with("ok ") && spun != "ok 0", "{spun}");
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", guest.pid())).unwrap().flatten();
    let targets = descriptors.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let left = targets.filter(|target| target.to_string_lossy().contains("userfaultfd")).count();
    assert_eq!(left, 0);
}

fn outlives_a_killed_tracker(kind: TrackerKind) {
    if !works(kind) {
        return;
    }
    let file = RamFile::new(4096);
    let tracked = file.tracked();
    let mut guest = Helper::spawn();
    guest.map("a", &file, 0, 4096);
    for round in 0..10u64 {
        guest.order(&format!("hammer a {}", round + 1));
        let mut agent = Helper::spawn();
        let (device, inode) = (tracked.identity.device, tracked.identity.inode);
        let order =
            format!("track {kind} {} {device} {inode} {} {}", guest.pid(), file.pages, file.page_bytes);
        assert_eq!(agent.order(&order), "ok");
        // The tracker harvests without a pause: any moment is as good as another.
        std::thread::sleep(Duration::from_micros(100 + round * 1733));
        agent.kill();
        assert_eq!(guest.status("TracerPid"), "0");
        let deadline = Instant::now() + Duration::from_secs(5);
        while protected(guest.pid()) || !matches!(state(guest.pid()), 'S' | 'R') {
            assert!(Instant::now() < deadline, "state {}", state(guest.pid()));
        }
        let before = stamps(&file);
        while stamps(&file) == before {
            assert!(Instant::now() < deadline, "the guest writes no more");
        }
        guest.order("rest");
    }
}

fn stamps(file: &RamFile) -> Vec<[u8; 64]> {
    (0..100).map(|page| file.stamp(page)).collect()
}
