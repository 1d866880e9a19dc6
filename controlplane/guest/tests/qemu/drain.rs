//! A guest whose disk has pinned its memory, and does not answer before the test lets it.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use ramferry_guest::{GuestError, QmpError, Side, Timeouts};
use ramferry_lab::HeldDisk;

use crate::harness::{Vm, qemus, skipped};

const PATIENCE: Duration = Duration::from_secs(60);
/// How long a drain that waits is watched.
const WATCHED: Duration = Duration::from_millis(300);
/// Where the guest reads its disk to.
const FILLED: u64 = 0x10000;

/// A guest that waits for its disk.
async fn waiting(binary: &Path) -> Option<(HeldDisk, Vm)> {
    let disk = match HeldDisk::mount() {
        Ok(disk) => disk,
        Err(reason) => {
            skipped(reason);
            return None;
        }
    };
    let drive = format!("-drive file={},format=raw,if=virtio,cache=none,readonly=on", disk.path().display());
    let vm = Vm::guest(binary, &drive).await;
    assert!(disk.wait_held(PATIENCE), "the guest does not read its disk: {}", vm.log());
    Some((disk, vm))
}

fn word(vm: &Vm) -> u16 {
    let mut word = [0; 2];
    std::fs::File::open(vm.path("ram")).unwrap().read_exact_at(&mut word, FILLED).unwrap();
    u16::from_le_bytes(word)
}

#[tokio::test]
async fn a_drain_returns_when_what_had_begun_is_in_memory_and_the_guest_runs_on() {
    for binary in qemus() {
        let Some((disk, vm)) = waiting(&binary).await else { return };
        let (qemu, info, _) = vm.inspect(Side::Source).await.unwrap();
        assert_eq!(info.direct_io_disks.len(), 2, "the disk's format and its file: {info:?}");
        let drain = qemu.drain_io();
        tokio::pin!(drain);
        assert!(tokio::time::timeout(WATCHED, &mut drain).await.is_err(), "it did not wait");
        assert_eq!(word(&vm), 0);
        disk.release();
        drain.await.unwrap();
        assert_eq!(word(&vm), 0xa55a);
        assert_eq!(vm.run_state().await, "running");
        qemu.drain_io().await.unwrap();
    }
}

#[tokio::test]
async fn a_disk_that_does_not_answer_ends_a_drain_in_time_and_leaves_the_guest_as_it_was() {
    for binary in qemus() {
        let Some((disk, vm)) = waiting(&binary).await else { return };
        let (qemu, _, _) = vm.inspect(Side::Source).await.unwrap();
        let qemu = qemu.with_timeouts(Timeouts { drain: WATCHED, ..Timeouts::default() });
        let error = qemu.drain_io().await.unwrap_err();
        assert!(matches!(error, GuestError::Qmp(QmpError::Timeout { .. })), "{error}");
        disk.release();
        assert_eq!(vm.run_state().await, "running");
        assert_eq!(qemu.status().await.unwrap().run_state, "running");
    }
}
