//! RAM files that are cut off while they are migrated: the migration fails and
//! says so, and the agents live on.

use std::fs::OpenOptions;

use ramferry_lab::Qemu;
use ramferry_proto::v1;

use crate::harness::{MIB, Pair, assert_proves_itself, assert_runs_untraced, boot, parameters, proof, quiet};

fn slow(fabric: v1::FabricKind) -> v1::MigrationParameters {
    v1::MigrationParameters { bandwidth_limit_bits_per_second: 8 * 10 * MIB, ..parameters(fabric) }
}

fn truncate(guest: &Qemu) {
    let path = guest.ram_files()[0].as_ref().unwrap();
    OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap();
}

async fn begin(pair: &Pair, guest: &Qemu, destination: &Qemu, fabric: v1::FabricKind) {
    pair.create("cut", guest, destination, slow(fabric)).await.unwrap();
    let copying = |migration: &v1::Migration| {
        migration.progress.as_ref().is_some_and(|progress| progress.transferred_bytes > MIB)
    };
    pair.source.wait("cut", copying).await;
}

/// The guest stands still in these tests where its own RAM goes: it would die of that itself.
async fn source_truncated(fabric: v1::FabricKind) {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let other = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    guest.stop().unwrap();
    begin(&pair, &guest, &destination, fabric).await;
    truncate(&guest);
    let ended = pair.source.wait_end("cut").await;
    let error = ended.error.unwrap();
    assert_eq!(ended.state, v1::MigrationState::Failed as i32);
    assert!(["GUEST_FAILED", "LINK_LOST", "REGISTRATION_FAILED"].contains(&&*error.reason), "{error:?}");
    assert!(error.message.contains("truncated") || error.message.contains("RAM file"), "{error:?}");
    pair.destination.wait_end("cut").await;
    // Both agents serve another guest.
    let receiver = other.destination().start().unwrap();
    pair.migrate("other", &other, &receiver, parameters(fabric)).await;
    assert_proves_itself(&receiver);
}

async fn destination_truncated(fabric: v1::FabricKind) {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    begin(&pair, &guest, &destination, fabric).await;
    truncate(&destination);
    let ended = pair.source.wait_end("cut").await;
    let error = ended.error.unwrap();
    assert_eq!(ended.state, v1::MigrationState::Failed as i32);
    assert!(error.message.contains("truncated") || error.message.contains("RAM file"), "{error:?}");
    pair.destination.wait_end("cut").await;
    assert_runs_untraced(&guest);
    let again = guest.destination().start().unwrap();
    pair.migrate("again", &guest, &again, parameters(fabric)).await;
    assert_proves_itself(&again);
}

#[tokio::test(flavor = "multi_thread")]
async fn source_file_truncated_over_tcp_fails_the_migration_and_not_the_agents() {
    source_truncated(v1::FabricKind::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn source_file_truncated_over_shm_fails_the_migration_and_not_the_agents() {
    source_truncated(v1::FabricKind::Shm).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn destination_file_truncated_over_tcp_leaves_the_guest_running_and_a_retry_succeeds() {
    destination_truncated(v1::FabricKind::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn destination_file_truncated_over_shm_leaves_the_guest_running_and_a_retry_succeeds() {
    destination_truncated(v1::FabricKind::Shm).await;
}
