//! The VM is a machine as programs expect it.

use std::fs;
use std::path::Path;
use std::process::Command;

use ramferry_lab::inside::{LAB_VARIABLE, is_here};
use ramferry_lab::{Accel, HugePages, Qemu, Workload};

#[test]
fn it_says_which_kernel_it_runs() {
    assert!(is_here(), "these tests run in the lab VM: scripts/lab-test");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(std::env::var(LAB_VARIABLE).unwrap(), release.trim());
}

#[test]
fn memory_may_be_locked_without_limit() {
    let limits = fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max locked memory")).unwrap();
    assert_eq!(line.split_whitespace().filter(|word| *word == "unlimited").count(), 2, "{line}");
}

#[test]
fn every_directory_that_programs_write_to_takes_a_file() {
    for directory in ["/tmp", "/dev/shm", "/run", "/var/lib", "/etc", env!("CARGO_MANIFEST_DIR")] {
        let path = Path::new(directory).join("ramferry-lab-was-here");
        fs::write(&path, "x").unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn what_a_machine_has_mounted_is_mounted() {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    for kind in [
        "proc",
        "sysfs",
        "devtmpfs",
        "devpts",
        "hugetlbfs",
        "debugfs",
        "tracefs",
        "bpf",
        "cgroup2",
        "overlay",
    ] {
        let found = mounts.lines().any(|line| line.split(' ').nth(2) == Some(kind));
        assert!(found, "no {kind} in\n{mounts}");
    }
    let pool = HugePages::reserve(4 << 20).unwrap();
    drop(pool);
}

#[test]
fn modules_are_loaded_when_they_are_asked_for() {
    let output = Command::new("modprobe").arg("sch_netem").output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn the_guest_that_proves_itself_runs_nested() -> anyhow::Result<()> {
    let timeout = std::time::Duration::from_secs(120);
    let workload = Workload { mib: 16, tick_ms: 100, ..Workload::default() };
    let qemu = Qemu::builder().accel(Accel::Tcg).proof(workload).start()?;
    qemu.wait_ready(timeout)?;
    let before = qemu.next_tick(timeout)?;
    let after = qemu.next_tick(timeout)?;
    assert!(after.pages_checked > before.pages_checked);
    assert_eq!(qemu.verify(timeout)?.errors, 0);
    Ok(())
}
