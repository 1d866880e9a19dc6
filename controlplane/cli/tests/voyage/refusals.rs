//! What cannot be migrated is refused with its reason, and nothing is changed.

use ramferry_lab::{Accel, Backing, DebianGuest, Guest, Machine, Qemu, RamBlock, skipped};
use ramferry_proto::v1;
use serde_json::{Value, json};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::{
    Agent, MIB, PATIENCE, Pair, assert_proves_itself, assert_refused, assert_runs_untraced, boot, parameters,
    proof, quiet,
};

/// What a migration could change of a VMM.
fn settings(guest: &Qemu) -> [Value; 3] {
    let ask = |command: &str| guest.qmp(&json!({ "execute": command })).unwrap();
    [ask("query-status"), ask("query-migrate-capabilities"), ask("query-migrate")]
}

async fn refused(pair: &Pair, source: &Qemu, destination: &Qemu, reason: &str, part: &str) {
    let before = (settings(source), settings(destination));
    let result = pair.create("refused", source, destination, parameters(v1::FabricKind::Unspecified)).await;
    assert_refused(result, Code::FailedPrecondition, reason, part);
    assert_eq!((settings(source), settings(destination)), before, "{reason} changed something");
    let missing = v1::GetMigrationRequest { id: "refused".into() };
    assert!(pair.source.client().await.get_migration(missing.clone()).await.is_err());
    assert!(pair.destination.client().await.get_migration(missing).await.is_err());
}

fn node() -> RamBlock {
    RamBlock::node(128 * MIB)
}

fn idle() -> ramferry_lab::QemuBuilder {
    Qemu::builder().guest(Guest::Nothing)
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_that_cannot_be_moved_are_refused_by_reason() {
    let pair = Pair::start();
    let good = boot(proof(quiet()));
    let waiting = good.destination().start().unwrap();

    let private = idle().block(node().on(Backing::Private)).start().unwrap();
    refused(&pair, &private, &waiting, "PRIVATE_MEMORY", "share=on").await;

    let running = proof(quiet()).start().unwrap();
    refused(&pair, &good, &running, "GUEST_STATE", "-incoming defer").await;

    let longer = idle().block(RamBlock::node(512 * MIB)).incoming(true).start().unwrap();
    refused(&pair, &good, &longer, "LAYOUT_DIFFERS", "memory options").await;

    let other = proof(quiet()).machine(Machine::Pc).incoming(true).start().unwrap();
    refused(&pair, &good, &other, "MACHINE_TYPE_DIFFERS", "-machine").await;

    let wider = proof(quiet()).vcpus(2).incoming(true).start().unwrap();
    refused(&pair, &good, &wider, "VCPUS_DIFFER", "-smp").await;

    assert_runs_untraced(&good);
}

/// A process that is ended and reaped when it is dropped.
struct Reaped(std::process::Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_whose_disk_is_another_process_is_refused() {
    let pair = Pair::start();
    let directory = tempfile::tempdir().unwrap();
    let (disk, socket) = (directory.path().join("disk"), directory.path().join("blk.sock"));
    std::fs::File::create(&disk).unwrap().set_len(MIB).unwrap();
    let server = std::process::Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={}", disk.display()))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on",
            socket.display()
        ))
        .spawn()
        .unwrap();
    let mut server = Reaped(server);
    let deadline = std::time::Instant::now() + PATIENCE;
    while !socket.exists() {
        assert!(server.0.try_wait().unwrap().is_none(), "qemu-storage-daemon ended");
        assert!(std::time::Instant::now() < deadline, "qemu-storage-daemon does not listen");
        std::thread::yield_now();
    }
    let source = idle()
        .block(node())
        .arg("-chardev")
        .arg(format!("socket,id=blk,path={}", socket.display()))
        .arg("-device")
        .arg("vhost-user-blk-pci,chardev=blk,id=disk0")
        .start()
        .unwrap();
    let receiver = idle().block(node()).incoming(true).start().unwrap();
    refused(&pair, &source, &receiver, "VHOST_USER", "disk0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn balloon_in_motion_is_refused() {
    let debian = match DebianGuest::find() {
        Ok(debian) => debian,
        Err(reason) => return skipped(reason),
    };
    let pair = Pair::start();
    let guest = Qemu::builder()
        .accel(Accel::Tcg)
        .block(RamBlock::node(1024 * MIB))
        .guest(Guest::Debian(DebianGuest { stress: String::new(), ..debian }))
        .arg("-device")
        .arg("virtio-balloon-pci");
    let guest = guest.start().unwrap();
    guest.wait_line(|line| line.starts_with("tick"), 3 * PATIENCE).unwrap();
    let spec = pair.spec(&guest.qmp_path(), "/nowhere".as_ref(), parameters(v1::FabricKind::Tcp));
    let mut client = pair.source.client().await;
    let mut reasons = Vec::new();
    for turn in 0..20 {
        let value = if turn % 2 == 0 { 256 * MIB } else { 1024 * MIB };
        guest.qmp(&json!({ "execute": "balloon", "arguments": { "value": value } })).unwrap();
        let request = v1::CheckMigrationRequest { spec: Some(spec.clone()) };
        let status = client.check_migration(request).await.expect_err("there is no destination");
        let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
        if reason == "BALLOON_MOVING" {
            assert_eq!(guest.status().unwrap(), "running");
            return;
        }
        reasons.push(reason);
    }
    panic!("a balloon in motion was not noticed: {reasons:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_make_no_sense_are_refused_by_field() {
    let pair = Pair::start();
    let mut client = pair.source.client().await;
    let spec =
        pair.spec("/nowhere/a.qmp".as_ref(), "/nowhere/b.qmp".as_ref(), parameters(v1::FabricKind::Tcp));
    let mut create = async |id: &str, spec: Option<v1::MigrationSpec>| {
        let request = v1::CreateMigrationRequest { id: id.into(), spec, ..Default::default() };
        client.create_migration(request).await.map(|response| response.into_inner().migration.unwrap())
    };
    let result = create("a", Some(spec.clone())).await;
    assert_refused(result, Code::FailedPrecondition, "GUEST_UNREACHABLE", "check that the guest runs");
    // A socket, but not one of QMP.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ssh");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let speaker = std::thread::spawn(move || {
        use std::io::Write as _;
        listener.accept().unwrap().0.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
    });
    let other = v1::MigrationSpec { source_qmp_path: path.display().to_string(), ..spec.clone() };
    let result = create("a", Some(other)).await;
    assert_refused(result, Code::FailedPrecondition, "QMP_LOST", "that the socket is a QMP socket");
    speaker.join().unwrap();
    assert_refused(create("a", None).await, Code::InvalidArgument, "FIELD_MISSING", "spec");
    let result = create("a b", Some(spec.clone())).await;
    assert_refused(result, Code::InvalidArgument, "MIGRATION_ID_INVALID", "a b");
    let nowhere = v1::MigrationSpec { destination_agent: "nowhere".into(), ..spec };
    assert_refused(create("a", Some(nowhere)).await, Code::InvalidArgument, "ADDRESS_INVALID", "nowhere");
}

#[tokio::test(flavor = "multi_thread")]
async fn second_migration_of_one_guest_is_refused() {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let (first, second) = (guest.destination().start().unwrap(), guest.destination().start().unwrap());
    let slow = v1::MigrationParameters {
        bandwidth_limit_bits_per_second: 8 * MIB,
        ..parameters(v1::FabricKind::Tcp)
    };
    pair.create("first", &guest, &first, slow).await.unwrap();
    let result = pair.create("second", &guest, &second, slow).await;
    let status = result.expect_err("the guest is busy");
    assert_eq!(status.code(), Code::FailedPrecondition, "{}", status.message());
    let result = pair.create("first", &guest, &second, slow).await;
    assert_refused(result, Code::AlreadyExists, "MIGRATION_EXISTS", "first");
    let request = v1::CancelMigrationRequest { id: "first".into() };
    pair.source.client().await.cancel_migration(request).await.unwrap();
    pair.source.wait_end("first").await;
    assert_runs_untraced(&guest);
}

#[tokio::test(flavor = "multi_thread")]
async fn ram_outside_the_allowed_directories_is_refused_at_either_side() {
    let sockets = std::env::temp_dir().display().to_string();
    let both = format!("{sockets},/dev/shm");
    let start = |dirs: &str| Agent::start_with(&["--guest-dirs", dirs]);
    for backing in [Backing::Tmpfs, Backing::TmpfsUnlinked] {
        let builder = || Qemu::builder().block(RamBlock::node(256 * MIB).on(backing.clone())).proof(quiet());
        let guest = boot(builder());
        let receiver = builder().incoming(true).start().unwrap();
        for (source, destination, side) in [(&sockets, &both, "source"), (&both, &sockets, "destination")] {
            let pair = Pair { source: start(source), destination: start(destination) };
            let part = format!("guest_dirs ({sockets}); start the VMM with its mem-path in one of them");
            refused(&pair, &guest, &receiver, "RAM_FILE_NOT_ALLOWED", &part).await;
            refused(&pair, &guest, &receiver, "RAM_FILE_NOT_ALLOWED", &format!("the {side} guest")).await;
        }
        let pair = Pair { source: start("/nowhere"), destination: start(&both) };
        refused(&pair, &guest, &receiver, "GUEST_PATH_NOT_ALLOWED", "guest_dirs (/nowhere); move the socket")
            .await;

        let pair = Pair { source: start(&both), destination: start(&both) };
        pair.migrate("allowed", &guest, &receiver, parameters(v1::FabricKind::Unspecified)).await;
        assert_proves_itself(&receiver);
    }
}
