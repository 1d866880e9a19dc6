//! What would let the guest, or somebody else, see RAM that has not come is refused by name.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramferry_ram::{Access, BlockIndex, Memory, PageRun};
use ramferry_tracking::TrackError;
use ramferry_tracking::postcopy::{FaultsError, Reach, RemoteFaults, check};

use super::{RAM, Scene, kernel_has_it, next_fault, read, run, userfaultfds_of};
use crate::destination;
use crate::file::RamFile;
use crate::helper::{Helper, state};

/// Of `linux/magic.h`.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const OVERLAYFS_MAGIC: i64 = 0x794c_7630;

fn scene() -> Option<Scene> {
    kernel_has_it().then(|| Scene::new(RamFile::new(64)))
}

/// What arming and looking say, which is the same.
fn refusal(scene: &Scene, partners: &[u32]) -> FaultsError {
    let pid = scene.vmm.pid();
    let error = RemoteFaults::arm(pid, Arc::clone(&scene.memory), partners).err().unwrap();
    let looked = check(pid, &[scene.file.tracked()], partners).unwrap_err();
    assert_eq!(std::mem::discriminant(&error), std::mem::discriminant(&looked), "{error} and {looked}");
    error
}

fn is_accepted(scene: &Scene, partners: &[u32]) {
    check(scene.vmm.pid(), &[scene.file.tracked()], partners).unwrap();
    let memory = Arc::clone(&scene.memory);
    RemoteFaults::arm(scene.vmm.pid(), memory, partners).unwrap().end().unwrap();
    assert_eq!(userfaultfds_of(scene.vmm.pid()), 0);
}

#[test]
fn a_process_that_reaches_the_ram_in_whatever_way_is_refused_by_name() {
    let Some(scene) = scene() else { return };
    for mode in ["rw", "ro", "read", "private"] {
        let mut other = Helper::spawn();
        other.map_as(mode, "b", &scene.file, 8, 4);
        let error = refusal(&scene, &[]);
        let pid = other.pid();
        assert!(
            matches!(&error, FaultsError::OtherProcess { pid: named, comm, reach: Reach::Maps }
                if *named == pid && !comm.is_empty()),
            "{error}"
        );
        assert!(error.to_string().contains(&pid.to_string()));
        is_accepted(&scene, &[pid]);
        drop(other);
        is_accepted(&scene, &[]);
    }
    let mut other = Helper::spawn();
    for open in ["open", "open_to_read"] {
        other.order(&format!("{open} f {}", scene.file.path()));
        let error = refusal(&scene, &[]);
        assert!(matches!(error, FaultsError::OtherProcess { reach: Reach::Holds { .. }, .. }), "{error}");
        other.order("close f");
        is_accepted(&scene, &[]);
    }
}

#[test]
fn what_is_mapped_while_it_is_served_is_found_by_the_next_look() {
    let Some(mut scene) = scene() else { return };
    let faults = scene.arm();
    faults.recheck().unwrap();
    let mut other = Helper::spawn();
    faults.confirm().unwrap();
    other.map_as("read", "b", &scene.file, 8, 4);
    assert!(matches!(faults.recheck(), Err(FaultsError::OtherProcess { .. })));
    assert!(matches!(faults.confirm(), Err(FaultsError::OtherProcess { .. })));
    other.order("unmap b");
    faults.recheck().unwrap();
    faults.confirm().unwrap();
    scene.vmm.map_as("rw", "late", &scene.file, 0, 4);
    assert!(matches!(faults.recheck(), Err(FaultsError::MappingChanged { .. })));
    assert!(matches!(faults.confirm(), Err(FaultsError::MappingChanged { .. })));
    scene.vmm.order("unmap late");
    scene.vmm.map_as("private", "late", &scene.file, 0, 4);
    assert!(matches!(faults.recheck(), Err(FaultsError::Private { .. })));
    scene.vmm.order("unmap late");
    faults.recheck().unwrap();
    scene.vmm.order("move a");
    assert!(matches!(faults.recheck(), Err(FaultsError::MappingChanged { .. })));
    faults.end().unwrap();
    scene.is_as_before();
}

#[test]
fn a_mapping_that_was_replaced_is_not_let_in() {
    let Some(mut scene) = scene() else { return };
    let faults = scene.arm();
    scene.vmm.order("replace a");
    let refused = faults.let_in(RAM, run(0, 4));
    assert!(matches!(refused, Err(FaultsError::MappingChanged { .. })), "{refused:?}");
    // Of what is not there at all, nobody waits for a page.
    scene.vmm.map_as("rw", "b", &scene.file, 0, 64);
    scene.vmm.order("unmap a");
    assert_eq!(faults.let_in(RAM, run(0, 4)).unwrap().mapped_pages, 0);
    assert!(matches!(faults.recheck(), Err(FaultsError::MappingChanged { .. })));
    faults.end().unwrap();
}

#[test]
fn a_private_mapping_of_the_vmm_is_refused() {
    let Some(mut scene) = scene() else { return };
    scene.vmm.map_as("private", "b", &scene.file, 0, 1);
    let error = refusal(&scene, &[]);
    assert!(matches!(error, FaultsError::Private { block: RAM, .. }), "{error}");
    scene.vmm.order("unmap b");
    is_accepted(&scene, &[]);
}

#[test]
fn a_mapping_that_may_never_be_written_is_refused_and_the_others_are_let_go() {
    let Some(mut scene) = scene() else { return };
    scene.vmm.map_as("read", "b", &scene.file, 0, 1);
    let armed = RemoteFaults::arm(scene.vmm.pid(), Arc::clone(&scene.memory), &[]);
    assert!(matches!(armed, Err(FaultsError::CannotRegister { .. })));
    scene.vmm.order("unmap b");
    scene.is_as_before();
    is_accepted(&scene, &[]);
}

#[test]
fn a_vmm_that_has_a_userfaultfd_already_is_refused() {
    let Some(mut scene) = scene() else { return };
    let faults = scene.arm();
    let error = refusal(&scene, &[]);
    assert!(matches!(error, FaultsError::AlreadyRegistered { .. }), "{error}");
    // The one that was there serves on.
    assert_eq!(userfaultfds_of(scene.vmm.pid()), 1);
    scene.vmm.send(&read(1));
    assert_eq!(next_fault(&faults).page, 1);
    faults.let_in(RAM, run(0, 64)).unwrap();
    assert_eq!(scene.vmm.answer(), "1 0");
    faults.end().unwrap();
    is_accepted(&scene, &[]);
}

#[test]
fn a_vmm_without_privilege_is_refused_with_the_remedy() {
    let Some(mut scene) = scene() else { return };
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    scene.vmm.order("drop_privileges");
    if allowed.trim() != "0" {
        is_accepted(&scene, &[]);
        return;
    }
    let error = refusal(&scene, &[]);
    assert!(matches!(error, FaultsError::KernelFaultsDenied { .. }), "{error}");
    assert!(error.to_string().contains("vm.unprivileged_userfaultfd=1"));
    assert_eq!(scene.vmm.order(&read(1)), "1 0");
}

#[test]
fn a_sandboxed_vmm_is_served_too() {
    let Some(mut scene) = scene() else { return };
    scene.vmm.order("forbid_userfaultfd");
    let faults = scene.arm();
    scene.vmm.send(&read(1));
    assert_eq!(next_fault(&faults).page, 1);
    faults.let_in(RAM, run(1, 1)).unwrap();
    assert_eq!(scene.vmm.answer(), "1 0");
    faults.end().unwrap();
    assert_eq!(scene.vmm.status("Seccomp"), "2");
}

#[test]
fn files_on_disk_are_refused() {
    if !kernel_has_it() {
        return;
    }
    let file = tempfile::tempfile().unwrap();
    if [TMPFS_MAGIC, OVERLAYFS_MAGIC].contains(&rustix::fs::fstatfs(&file).unwrap().f_type) {
        eprintln!("SKIPPED: temporary files are not on a disk");
        return;
    }
    let file = RamFile::of(file, 16, 4096);
    let mut vmm = Helper::spawn();
    vmm.map("a", &file, 0, 16);
    let layout = destination::layout(&[(16, 4096)]);
    let memory = destination::memory(&layout, &[Path::new(&file.path())]);
    let refused = RemoteFaults::arm(vmm.pid(), memory, &[]).err().unwrap();
    assert!(matches!(refused, FaultsError::CannotRegister { .. }), "{refused}");
    assert_eq!(vmm.order(&read(1)), "1 0");
    assert_eq!(userfaultfds_of(vmm.pid()), 0);
}

#[test]
fn memory_that_is_not_the_vmms_or_not_writable_is_refused() {
    let Some(scene) = scene() else { return };
    let other = RamFile::new(64);
    let memory = destination::memory(&scene.layout, &[Path::new(&other.path())]);
    let refused = RemoteFaults::arm(scene.vmm.pid(), memory, &[]).err().unwrap();
    assert!(matches!(refused, FaultsError::Files(TrackError::NotMapped { .. })), "{refused}");
    let file = ramferry_ram::RamFile::open(Path::new(&scene.file.path()), Access::Read).unwrap();
    let read_only = Memory::new(scene.layout.clone(), vec![file], Access::Read).unwrap();
    let refused = RemoteFaults::arm(scene.vmm.pid(), Arc::new(read_only), &[]).err().unwrap();
    assert!(matches!(refused, FaultsError::ReadOnly), "{refused}");
    let faults = scene.arm();
    for (block, first, count) in [(0, 0, 0), (0, 63, 2), (1, 0, 1), (0, u64::MAX, 1)] {
        let refused = faults.let_in(BlockIndex(block), PageRun { first, count });
        assert!(matches!(refused, Err(FaultsError::OutOfBlock { .. })));
    }
    faults.end().unwrap();
}

#[test]
fn a_vmm_that_ends_is_noticed_at_once_by_whoever_waits() {
    let Some(mut scene) = scene() else { return };
    let faults = scene.arm();
    scene.vmm.send(&read(1));
    assert_eq!(next_fault(&faults).page, 1);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| faults.wait(Duration::from_secs(60), &mut Vec::new()));
        scene.vmm.kill();
        let waited = waits.join().unwrap();
        assert!(waited.is_err_and(|error| error.vmm_ended()));
    });
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    assert!(faults.let_in(RAM, run(1, 1)).is_err_and(|error| error.vmm_ended()));
    assert!(faults.recheck().is_err_and(|error| error.vmm_ended()));
    assert!(faults.end().is_err_and(|error| error.vmm_ended()));
    let pid = scene.vmm.pid();
    assert!(RemoteFaults::arm(pid, Arc::clone(&scene.memory), &[]).is_err_and(|error| error.vmm_ended()));
}

#[test]
fn a_vmm_that_waits_can_be_killed_without_an_agent() {
    let Some(mut scene) = scene() else { return };
    drop(scene.arm());
    scene.vmm.send(&read(1));
    let pid = scene.vmm.pid();
    // SAFETY: takes numbers; the helper is alive, and is ours.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
    let deadline = Instant::now() + Duration::from_secs(10);
    while state(pid) != 'Z' {
        assert!(Instant::now() < deadline, "state {}", state(pid));
    }
}
