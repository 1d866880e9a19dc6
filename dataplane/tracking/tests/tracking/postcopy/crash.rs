//! An agent that is killed in post-copy leaves a guest that waits, and another one goes on where it was.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramferry_ram::{Owed, OwedError, PageSets};
use ramferry_tracking::postcopy::{FaultsError, LetIn, RemoteFaults, release};

use super::{RAM, Scene, kernel_has_it, read, scenes, userfaultfds_of, whole};
use crate::destination::{self, MIGRATION, arrived, next_fault, run};
use crate::file::RamFile;
use crate::helper::Helper;
use crate::huge::{Pool, huge_file};

const KILLS: u64 = 12;

#[test]
fn a_guest_on_small_pages_outlives_agents_that_are_killed() {
    outlives_killed_agents(&RamFile::new(20_000));
}

#[test]
fn a_guest_on_huge_pages_outlives_agents_that_are_killed() {
    match Pool::grow(64) {
        Ok(_pool) => outlives_killed_agents(&huge_file(64)),
        Err(reason) => eprintln!("SKIPPED: {reason}"),
    }
}

fn outlives_killed_agents(file: &RamFile) {
    if !kernel_has_it() {
        return;
    }
    let mut vmm = Helper::spawn();
    vmm.map("a", file, 0, file.pages);
    let pid = vmm.pid();
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("owed");
    let layout = destination::layout(&[(file.pages, file.page_bytes)]);
    let mut pages = PageSets::new(&layout);
    pages.block_mut(RAM).insert_run(run(0, file.pages));
    drop(Owed::create(&path, MIGRATION, &layout, &pages).unwrap());
    let had_pages = file.pages / (KILLS + 1);
    let mut agent = serve("arm", pid, file, had_pages, &path);
    vmm.order("exercise a 3 1");
    let mut left = file.pages;
    for kill in 0..KILLS {
        // It serves without a pause: any moment is as good as another.
        std::thread::sleep(Duration::from_micros(500 + kill * 2311 % 9000));
        agent.kill();
        assert_eq!(userfaultfds_of(pid), 1, "after kill {kill}");
        match Owed::open(&path, MIGRATION, &layout) {
            Ok(owed) => {
                assert!(owed.pages() <= left);
                left = owed.pages();
            }
            Err(OwedError::Locked { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        let had_pages = if kill + 1 < KILLS { had_pages } else { file.pages };
        agent = serve("retake", pid, file, had_pages, &path);
    }
    assert!(left > 0, "nothing was left for the last agent");
    let deadline = Instant::now() + Duration::from_secs(60);
    while path.exists() {
        assert!(Instant::now() < deadline, "{left} pages are still owed");
        std::thread::sleep(Duration::from_millis(5));
    }
    let exercised = vmm.order("exercised");
    assert!(exercised.starts_with("ok "), "{exercised}");
    for page in 0..file.pages {
        assert_eq!(file.stamp(page)[..8], arrived(page).to_ne_bytes(), "page {page}");
    }
    assert_eq!(userfaultfds_of(pid), 0);
}

fn serve(how: &str, vmm: u32, file: &RamFile, had_pages: u64, owed: &Path) -> Helper {
    let mut agent = Helper::spawn();
    let (path, pages, page_bytes) = (file.path(), file.pages, file.page_bytes);
    let order = format!("serve {how} {vmm} {path} {pages} {page_bytes} {had_pages} {}", owed.display());
    assert_eq!(agent.order(&order), "ok");
    agent
}

fn retake(scene: &Scene) -> Result<RemoteFaults, FaultsError> {
    RemoteFaults::retake(scene.vmm.pid(), Arc::clone(&scene.memory), &[])
}

#[test]
fn an_access_that_a_lost_agent_was_told_of_is_told_of_again() {
    if !kernel_has_it() {
        return;
    }
    for mut scene in scenes(64, 8) {
        let faults = scene.arm();
        scene.vmm.send(&read(3));
        assert_eq!(next_fault(&faults).page, 3);
        drop(faults);
        assert_eq!(userfaultfds_of(scene.vmm.pid()), 1);
        let faults = retake(&scene).unwrap();
        assert_eq!(next_fault(&faults).page, 3);
        // One that waits while there is no agent at all.
        scene.arrive(3);
        faults.let_in(RAM, run(3, 1)).unwrap();
        drop(faults);
        assert_eq!(scene.vmm.answer(), whole(3));
        scene.vmm.send(&read(4));
        let faults = retake(&scene).unwrap();
        assert_eq!(next_fault(&faults).page, 4);
        scene.arrive(4);
        let let_in = LetIn { mapped_pages: 1, ..LetIn::default() };
        assert_eq!(faults.let_in(RAM, run(4, 1)).unwrap(), let_in);
        assert_eq!(scene.vmm.answer(), whole(4));
        faults.end().unwrap();
        scene.is_as_before();
    }
}

#[test]
fn what_a_lost_agent_left_is_released_once_nothing_is_owed() {
    if !kernel_has_it() {
        return;
    }
    for mut scene in scenes(64, 8) {
        assert!(!release(scene.vmm.pid(), &scene.memory).unwrap());
        drop(scene.arm());
        scene.vmm.send(&read(3));
        assert!(release(scene.vmm.pid(), &scene.memory).unwrap());
        assert_eq!(scene.vmm.answer(), "1 0");
        assert!(!release(scene.vmm.pid(), &scene.memory).unwrap());
        scene.is_as_before();
    }
}

#[test]
fn what_was_never_armed_or_was_ended_is_not_taken_over() {
    if !kernel_has_it() {
        return;
    }
    for mut scene in scenes(64, 8) {
        let refused = |scene: &Scene| matches!(retake(scene), Err(FaultsError::NotArmed { .. }));
        assert!(refused(&scene));
        scene.arm().end().unwrap();
        assert!(refused(&scene));
        // A mapping that was made since does not wait.
        drop(scene.arm());
        scene.vmm.map_as("ro", "late", &scene.file, 0, 4);
        assert!(refused(&scene));
        scene.vmm.order("unmap late");
        retake(&scene).unwrap().end().unwrap();
        scene.is_as_before();
    }
}
