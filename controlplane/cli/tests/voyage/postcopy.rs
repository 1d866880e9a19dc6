//! The guest is resumed before all of its memory is there, and nothing is lost, torn or read too early.

mod account;
pub(crate) mod lost;
mod orders;
mod refused;

use std::time::Duration;

use ramferry_lab::{Accel, Backing, Fill, HugePages, Qemu, RamBlock, Workload, downtime_seen, skipped};
use ramferry_proto::v1::FabricKind::{Shm, Tcp};
use ramferry_proto::v1::{self, Postcopy, RegistrationMode};

use crate::faults::leftovers::assert_unharmed;
use crate::harness::{MIB, Pair, assert_proves_itself, boot, parameters, proof, quiet, seconds};

/// Rewritten without pause: no round leaves less than the one before.
fn hot() -> Workload {
    Workload { mib: 64, touch_mib: 128, rate_mib: 0, fill: Fill::Stamp, ..Workload::default() }
}

fn into_postcopy(fabric: v1::FabricKind, postcopy: Postcopy) -> v1::MigrationParameters {
    v1::MigrationParameters {
        postcopy: postcopy.into(),
        verify: false,
        max_downtime: Some(Duration::from_millis(1).try_into().unwrap()),
        ..parameters(fabric)
    }
}

async fn move_once(
    pair: &Pair,
    id: &str,
    guest: &Qemu,
    parameters: v1::MigrationParameters,
) -> (Qemu, v1::Migration) {
    let destination = guest.destination().start().unwrap();
    let ended = pair.migrate(id, guest, &destination, parameters).await;
    let progress = ended.progress.as_ref().unwrap();
    assert!(progress.postcopy && progress.postcopy_time.is_some(), "{progress:?}");
    assert_eq!(ended.verified, None);
    assert_eq!(guest.status().unwrap(), "postmigrate");
    assert_eq!(destination.status().unwrap(), "running");
    (destination, ended)
}

async fn there_and_back(fabric: v1::FabricKind, accel: Accel) {
    let mut pair = Pair::start();
    let mut guest = boot(proof(hot()).accel(accel));
    for turn in 0..3 {
        for way in ["there", "back"] {
            let postcopy = if turn == 0 { Postcopy::Allow } else { Postcopy::Always };
            let id = format!("{way}-{turn}");
            let (arrived, ended) = move_once(&pair, &id, &guest, into_postcopy(fabric, postcopy)).await;
            assert_proves_itself(&arrived);
            assert!(downtime_seen(&guest, &arrived).is_some());
            let progress = ended.progress.unwrap();
            eprintln!(
                "{fabric:?} {accel:?} {id}: downtime {:.1} ms, post-copy {:.1} ms",
                seconds(progress.downtime) * 1e3,
                seconds(progress.postcopy_time) * 1e3
            );
            guest = arrived;
            pair = pair.swap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_that_rewrites_its_memory_moves_there_and_back_over_shm() {
    for accel in Accel::available() {
        there_and_back(Shm, accel).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_that_rewrites_its_memory_moves_there_and_back_over_tcp() {
    for accel in Accel::available() {
        there_and_back(Tcp, accel).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_backends_and_a_small_pin_budget_move_in_postcopy() {
    let pair = Pair::start();
    let guest = Qemu::builder()
        .block(RamBlock::node(128 * MIB))
        .block(RamBlock::node(64 * MIB).on(Backing::TmpfsUnlinked))
        .block(RamBlock::dimm(128 * MIB))
        .proof(Workload { touch_mib: 64, ..hot() });
    let guest = boot(guest);
    for (index, mode) in [RegistrationMode::Dynamic, RegistrationMode::PinAll].into_iter().enumerate() {
        let parameters = v1::MigrationParameters {
            registration_mode: mode.into(),
            pin_budget_bytes: if mode == RegistrationMode::Dynamic { 16 * MIB } else { 0 },
            ..into_postcopy(Tcp, Postcopy::Always)
        };
        let (arrived, _) = move_once(&pair, &format!("backends-{index}"), &guest, parameters).await;
        assert_proves_itself(&arrived);
        drop(arrived);
        guest.cont().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_pages_move_in_postcopy() {
    let pages = match HugePages::reserve(2 * 128 * MIB) {
        Ok(pages) => pages,
        Err(reason) => return skipped(reason),
    };
    let pair = Pair::start();
    let block = RamBlock::node(128 * MIB).on(Backing::HugeTlbfs(pages.mount().to_owned()));
    let workload = Workload { mib: 16, touch_mib: 48, rate_mib: 0, ..quiet() };
    let guest = boot(Qemu::builder().block(block).proof(workload));
    for fabric in [Shm, Tcp] {
        let parameters = into_postcopy(fabric, Postcopy::Always);
        let (arrived, _) = move_once(&pair, fabric.as_str_name(), &guest, parameters).await;
        assert_proves_itself(&arrived);
        drop(arrived);
        guest.cont().unwrap();
    }
}

/// Nothing is owed in the end, although the destination was made ready for it.
#[tokio::test(flavor = "multi_thread")]
async fn guest_that_stands_still_moves_where_postcopy_is_always_wanted() {
    let pair = Pair::start();
    for fabric in [Shm, Tcp] {
        let guest = boot(proof(quiet()));
        guest.stop().unwrap();
        let destination = guest.destination().start().unwrap();
        let parameters = into_postcopy(fabric, Postcopy::Always);
        pair.migrate(fabric.as_str_name(), &guest, &destination, parameters).await;
        assert_eq!(destination.status().unwrap(), "paused");
        destination.cont().unwrap();
        assert_proves_itself(&destination);
        assert_unharmed(&destination);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn quiet_guest_needs_no_postcopy_where_it_is_only_allowed() {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    let parameters = v1::MigrationParameters { postcopy: Postcopy::Allow.into(), ..parameters(Shm) };
    let ended = pair.migrate("quiet", &guest, &destination, parameters).await;
    assert!(!ended.progress.unwrap().postcopy);
    assert_proves_itself(&destination);
}
