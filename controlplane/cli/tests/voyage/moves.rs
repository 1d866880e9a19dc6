//! A guest moves, and nothing is lost.

use std::time::Duration;

use ramferry_lab::{
    Accel, Backing, DebianGuest, Guest, HugePages, Machine, Qemu, QemuVersion, RamBlock, Workload,
    downtime_seen, qemu_binary, skipped,
};
use ramferry_proto::v1::FabricKind::{Shm, Tcp};
use ramferry_proto::v1::{self, RegistrationMode};

use crate::harness::{MIB, PATIENCE, Pair, assert_proves_itself, boot, parameters, proof, quiet};

/// Moves `guest` once; what arrives is returned.
async fn move_once(pair: &Pair, id: &str, guest: &Qemu, parameters: v1::MigrationParameters) -> Qemu {
    let destination = guest.destination().start().unwrap();
    let ended = pair.migrate(id, guest, &destination, parameters).await;
    assert_eq!(ended.verified, parameters.verify.then_some(true));
    assert_eq!(guest.status().unwrap(), "postmigrate");
    assert_eq!(destination.status().unwrap(), "running");
    destination
}

async fn there_and_back(fabric: v1::FabricKind) {
    let mut pair = Pair::start();
    let mut guest = boot(proof(quiet()));
    for turn in 0..5 {
        for way in ["there", "back"] {
            let arrived = move_once(&pair, &format!("{way}-{turn}"), &guest, parameters(fabric)).await;
            assert_proves_itself(&arrived);
            assert!(downtime_seen(&guest, &arrived).is_some());
            guest = arrived;
            pair = pair.swap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_moves_there_and_back_five_times_over_shm() {
    there_and_back(Shm).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_moves_there_and_back_five_times_over_tcp() {
    there_and_back(Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_machine_accelerator_and_registration_mode_moves() {
    let pair = Pair::start();
    let modes = [RegistrationMode::Dynamic, RegistrationMode::PinAll];
    for accel in Accel::available() {
        for (index, machine) in [Machine::Q35, Machine::Pc].into_iter().enumerate() {
            for (mode, fabric) in modes.into_iter().zip([[Shm, Tcp][index], [Tcp, Shm][index]]) {
                let workload = Workload { rate_mib: 8, touch_mib: 32, ..quiet() };
                let guest = boot(proof(workload).accel(accel).machine(machine).vcpus(2));
                let parameters =
                    v1::MigrationParameters { registration_mode: mode.into(), ..parameters(fabric) };
                let id = format!("{accel:?}-{machine:?}-{mode:?}");
                assert_proves_itself(&move_once(&pair, &id, &guest, parameters).await);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_backends_move() {
    let pair = Pair::start();
    let guest = Qemu::builder()
        .block(RamBlock::node(128 * MIB))
        .block(RamBlock::node(64 * MIB).on(Backing::TmpfsUnlinked))
        .block(RamBlock::dimm(128 * MIB))
        .proof(quiet());
    let guest = boot(guest);
    assert_proves_itself(&move_once(&pair, "backends", &guest, parameters(Tcp)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_pages_move() {
    let pages = match HugePages::reserve(2 * 128 * MIB) {
        Ok(pages) => pages,
        Err(reason) => return skipped(reason),
    };
    let pair = Pair::start();
    let block = RamBlock::node(128 * MIB).on(Backing::HugeTlbfs(pages.mount().to_owned()));
    let workload = Workload { mib: 16, touch_mib: 48, ..quiet() };
    let guest = boot(Qemu::builder().block(block).proof(workload));
    for fabric in [Shm, Tcp] {
        let arrived = move_once(&pair, fabric.as_str_name(), &guest, parameters(fabric)).await;
        assert_proves_itself(&arrived);
        drop(arrived);
        guest.cont().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn newer_qemu_moves() {
    let Some(binary) = qemu_binary(QemuVersion::V10_0) else {
        return skipped("QEMU 10.0 was not to be had (see scripts/setup)");
    };
    let pair = Pair::start();
    let guest = boot(proof(quiet()).binary(binary));
    assert_proves_itself(&move_once(&pair, "newer", &guest, parameters(Tcp)).await);
}

async fn debian_there_and_back(fabric: v1::FabricKind) {
    let debian = match DebianGuest::find() {
        Ok(debian) => debian,
        Err(reason) => return skipped(reason),
    };
    let mut pair = Pair::start();
    let builder =
        Qemu::builder().accel(Accel::Tcg).block(RamBlock::node(1024 * MIB)).guest(Guest::Debian(debian));
    let mut guest = builder.start().unwrap();
    guest.wait_line(|line| line.starts_with("tick"), 3 * PATIENCE).unwrap();
    for turn in 0..5 {
        for way in ["there", "back"] {
            let arrived = move_once(&pair, &format!("{way}-{turn}"), &guest, parameters(fabric)).await;
            arrived.wait_line(|line| line.starts_with("tick"), PATIENCE).unwrap();
            guest = arrived;
            pair = pair.swap();
        }
    }
    let panicked =
        guest.lines().into_iter().find(|line| line.text.contains("Oops") || line.text.contains("panic"));
    assert!(panicked.is_none(), "{panicked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn debian_guest_under_stress_moves_there_and_back_five_times_over_shm() {
    debian_there_and_back(Shm).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn debian_guest_under_stress_moves_there_and_back_five_times_over_tcp() {
    debian_there_and_back(Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn paused_guest_arrives_paused_whatever_the_downtime_it_may_have() {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    guest.stop().unwrap();
    let destination = guest.destination().start().unwrap();
    let parameters = v1::MigrationParameters {
        max_downtime: Some(Duration::from_millis(1).try_into().unwrap()),
        timeout_action: v1::TimeoutAction::Cancel.into(),
        ..parameters(Shm)
    };
    pair.migrate("paused", &guest, &destination, parameters).await;
    assert_eq!(destination.status().unwrap(), "paused");
    destination.cont().unwrap();
    assert_proves_itself(&destination);
}

#[tokio::test(flavor = "multi_thread")]
async fn pin_budget_bounds_what_is_registered() {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let parameters = v1::MigrationParameters { pin_budget_bytes: 16 * MIB, ..parameters(Tcp) };
    let destination = guest.destination().start().unwrap();
    let ended = pair.migrate("budget", &guest, &destination, parameters).await;
    let progress = ended.progress.unwrap();
    assert!(progress.pinned_peak_bytes > 0 && progress.pinned_peak_bytes <= 16 * MIB, "{progress:?}");
    assert_proves_itself(&destination);
}
