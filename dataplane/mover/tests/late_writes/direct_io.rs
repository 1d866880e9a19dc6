//! A real QEMU whose disk fills guest RAM when the test lets it, and the tracker that a migration uses.

use std::fs::File;
use std::time::{Duration, Instant};

use ramferry_engine::Outcome;
use ramferry_lab::{Accel, HeldDisk, Qemu, RamBlock, skipped};
use ramferry_ram::{Access, Block, Layout, RamFile};
use ramferry_tracking::{TrackedFile, TrackerKind, arm, self_test};

use crate::migration::{Ended, LateWrites, Moment, Plan, migrate};

const RAM_BYTES: u64 = 64 << 20;
const PAGE: u64 = 4096;
/// Where the guest reads its disk to.
const FILLED: u64 = 0x10000;
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether this machine has what the tests need.
fn disk() -> Option<HeldDisk> {
    let missing = match (self_test(TrackerKind::UffdWp), HeldDisk::mount()) {
        (Ok(()), Ok(disk)) => return Some(disk),
        (Err(error), _) => error.to_string(),
        (_, Err(reason)) => reason,
    };
    skipped(missing);
    None
}

/// What `FILLED` holds in a RAM file.
fn page(file: &File) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; PAGE as usize];
    file.read_exact_at(&mut bytes, FILLED).unwrap();
    bytes
}

/// Moves the RAM of a guest whose disk has pinned a page before the migration, and fills it after round 1 was copied.
/// Whether the page arrived as it is here.
fn moves(disk: &HeldDisk, late_writes: LateWrites) -> (bool, Ended) {
    let drive = format!("file={},format=raw,if=virtio,cache=none,readonly=on", disk.path().display());
    let builder = Qemu::builder().accel(Accel::Tcg).block(RamBlock::node(RAM_BYTES)).arg("-drive").arg(drive);
    let guest = builder.start().unwrap();
    guest.wait_line(|line| line.contains("READING"), PATIENCE).unwrap();
    assert!(disk.wait_held(PATIENCE), "the guest does not read its disk");

    let path = guest.ram_files()[0].clone().unwrap();
    let (pages, page_bytes) = (RAM_BYTES / PAGE, PAGE);
    let block = Block { name: "ram".into(), guest_address: 0, length_bytes: RAM_BYTES, page_bytes };
    let source = RamFile::open(&path, Access::Read).unwrap();
    let tracked = TrackedFile { identity: source.identity(), pages, page_bytes };
    let tracker = arm(Some(TrackerKind::UffdWp), guest.pid(), &[tracked]).unwrap();
    let far = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    far.as_file().set_len(RAM_BYTES).unwrap();
    let destination = RamFile::open(far.path(), Access::ReadWrite).unwrap();
    let layout = Layout::new(vec![block]).unwrap();
    let plan = Plan { layout, source, destination, tracker, late_writes, drains: true };
    let (here, releaser) = (File::open(&path).unwrap(), disk.releaser());
    let filled = here.try_clone().unwrap();
    let ended = migrate(
        plan,
        Box::new(move |moment| match moment {
            Moment::RoundEnded(1) => {
                assert!(page(&filled).iter().all(|byte| *byte == 0), "filled too early");
                releaser.release();
                let deadline = Instant::now() + PATIENCE;
                while page(&filled)[0] == 0 {
                    assert!(Instant::now() < deadline, "the page is not filled");
                    std::thread::yield_now();
                }
            }
            // The guest says on and on what it found: its stack is written to.
            Moment::Pause => guest.stop().unwrap(),
            _ => {}
        }),
    );
    assert_eq!(ended.outcome, Outcome::Succeeded);
    (page(&here) == page(far.as_file()), ended)
}

#[test]
fn a_page_that_a_disk_fills_late_is_lost_without_a_recheck() {
    let Some(disk) = disk() else { return };
    let (arrived, _) = moves(&disk, LateWrites::None);
    assert!(!arrived);
}

#[test]
fn a_page_that_a_disk_fills_late_arrives_with_a_recheck() {
    for late_writes in [LateWrites::Drainable, LateWrites::Undrainable] {
        let Some(disk) = disk() else { return };
        let (arrived, ended) = moves(&disk, late_writes);
        assert!(arrived, "{late_writes:?}");
        assert!(ended.progress.late_bytes >= PAGE);
    }
}
