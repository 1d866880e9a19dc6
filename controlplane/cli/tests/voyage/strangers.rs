//! Processes that write to guest RAM beside its VMM. This test's own is one.

use ramferry_lab::{Qemu, Workload};
use ramferry_proto::v1;
use ramferry_ram::{Access, Mapping, RamFile};
use tonic::Code;

use crate::harness::{
    MIB, Pair, assert_proves_itself, assert_refused, assert_runs_untraced, boot, parameters, proof,
};

const PAGE: u64 = 4096;
/// A page that the guest itself does not use.
const PLACE: u64 = 0x50000;

/// So slow that there is time to write between two looks.
fn slow() -> v1::MigrationParameters {
    v1::MigrationParameters {
        bandwidth_limit_bits_per_second: 200_000_000,
        ..parameters(v1::FabricKind::Tcp)
    }
}

fn guest() -> Qemu {
    boot(proof(Workload { mib: 16, touch_mib: 32, rate_mib: 4, ..Workload::default() }))
}

/// The guest's RAM, as another process would map it.
fn map(guest: &Qemu) -> Mapping {
    let path = guest.ram_files()[0].as_ref().unwrap();
    let file = RamFile::open(path, Access::ReadWrite).unwrap();
    Mapping::new(&file, 256 * MIB, Access::ReadWrite).unwrap()
}

fn write(mapping: &Mapping, byte: u8) {
    mapping.span(PLACE, PAGE).unwrap().write_from(&[byte; PAGE as usize]);
}

async fn precopy(pair: &Pair, id: &str) {
    pair.source.wait(id, |migration| migration.state() == v1::MigrationState::Precopy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_of_a_process_that_came_and_went_fail_the_migration_and_a_retry_carries_them() {
    let pair = Pair::start();
    let guest = guest();
    let destination = guest.destination().start().unwrap();
    pair.create("stranger", &guest, &destination, slow()).await.unwrap();
    precopy(&pair, "stranger").await;
    write(&map(&guest), 7);
    let ended = pair.source.wait_end("stranger").await;
    let error = ended.error.clone().unwrap_or_default();
    assert_eq!(
        (ended.state(), error.reason.as_str()),
        (v1::MigrationState::Failed, "TRACKER_FAILED"),
        "{error:?}"
    );
    assert!(error.message.contains("open for writing"), "{}", error.message);
    assert_runs_untraced(&guest);

    pair.migrate("retry", &guest, &destination, parameters(v1::FabricKind::Tcp)).await;
    assert_eq!(destination.read_page(PLACE).unwrap(), [7; PAGE as usize]);
    assert_proves_itself(&destination);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_of_a_process_that_keeps_its_mapping_arrive() {
    let pair = Pair::start();
    let guest = guest();
    let destination = guest.destination().start().unwrap();
    let mapping = map(&guest);
    pair.create("second", &guest, &destination, slow()).await.unwrap();
    precopy(&pair, "second").await;
    write(&mapping, 9);
    let ended = pair.source.wait_end("second").await;
    assert_eq!(ended.state(), v1::MigrationState::Succeeded, "{:?}", ended.error);
    assert_eq!(ended.verified, Some(true));
    let ours = format!("process {} (", std::process::id());
    assert!(ended.recheck_reason.contains(&ours), "{}", ended.recheck_reason);
    assert_eq!(destination.read_page(PLACE).unwrap(), [9; PAGE as usize]);
    assert_proves_itself(&destination);
}

#[tokio::test(flavor = "multi_thread")]
async fn process_that_could_write_at_any_time_is_refused_by_name() {
    let pair = Pair::start();
    let guest = guest();
    let destination = guest.destination().start().unwrap();
    let path = guest.ram_files()[0].as_ref().unwrap();
    let held = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let result = pair.create("held", &guest, &destination, parameters(v1::FabricKind::Tcp)).await;
    let ours = format!("process {} (", std::process::id());
    assert_refused(result, Code::FailedPrecondition, "TRACKING_UNAVAILABLE", &ours);
    drop(held);
    pair.migrate("held", &guest, &destination, parameters(v1::FabricKind::Tcp)).await;
    assert_proves_itself(&destination);
}
