//! A guest whose disk fills its RAM past the page tables.

use ramferry_lab::{Accel, HeldDisk, Qemu, RamBlock, skipped};
use ramferry_proto::v1;

use crate::harness::{MIB, PATIENCE, Pair, parameters};

/// The read was begun before the migration, and ends after its page was copied: nobody marks it written.
#[tokio::test(flavor = "multi_thread")]
async fn page_that_a_disk_fills_after_it_was_copied_arrives() {
    for fabric in [v1::FabricKind::Shm, v1::FabricKind::Tcp] {
        let disk = match HeldDisk::mount() {
            Ok(disk) => disk,
            Err(reason) => return skipped(reason),
        };
        let drive = format!("file={},format=raw,if=virtio,cache=none,readonly=on", disk.path().display());
        let guest =
            Qemu::builder().accel(Accel::Tcg).block(RamBlock::node(128 * MIB)).arg("-drive").arg(drive);
        let guest = guest.start().unwrap();
        assert!(disk.wait_held(PATIENCE), "the guest does not read its disk: {:?}", guest.lines());
        let destination = guest.destination().start().unwrap();

        let pair = Pair::start();
        let spec = pair.spec(&guest.qmp_path(), &destination.qmp_path(), parameters(fabric));
        let check = v1::CheckMigrationRequest { spec: Some(spec) };
        let checked = pair.source.client().await.check_migration(check).await.unwrap().into_inner();
        assert!(checked.recheck_reason.starts_with("direct I/O of "), "{checked:?}");

        pair.create("late", &guest, &destination, parameters(fabric)).await.unwrap();
        pair.source
            .wait("late", |migration| !migration.progress.clone().unwrap_or_default().rounds.is_empty())
            .await;
        disk.release();
        let ended = pair.source.wait_end("late").await;
        assert_eq!(ended.state(), v1::MigrationState::Succeeded, "{:?}\n{}", ended.error, pair.source.log());
        let progress = ended.progress.unwrap();
        assert!(progress.late_bytes >= 4096, "{progress:?}");
        assert!(progress.downtime_parts.iter().any(|part| part.name == "recheck"));
        assert_eq!((ended.verified, ended.recheck_reason), (Some(true), checked.recheck_reason));

        // What it says first may have begun at the source.
        destination.wait_line(|line| line == "DATA OK", PATIENCE).unwrap();
        assert!(
            destination.lines().iter().all(|line| !line.text.contains("LOST")),
            "{:?}",
            destination.lines()
        );
    }
}
