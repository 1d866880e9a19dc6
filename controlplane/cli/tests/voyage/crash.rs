//! Agents that die, and what becomes of the guest.

use std::time::Duration;

use ramferry_proto::v1;

use crate::harness::{
    MIB, PATIENCE, Pair, assert_proves_itself, assert_runs_untraced, boot, parameters, proof, quiet,
};

fn slow() -> v1::MigrationParameters {
    v1::MigrationParameters {
        bandwidth_limit_bits_per_second: 8 * 20 * MIB,
        ..parameters(v1::FabricKind::Tcp)
    }
}

async fn begin(pair: &Pair, guest: &ramferry_lab::Qemu, destination: &ramferry_lab::Qemu) {
    pair.create("first", guest, destination, slow()).await.unwrap();
    let copying = |migration: &v1::Migration| {
        migration.progress.as_ref().is_some_and(|progress| progress.transferred_bytes > 0)
    };
    pair.source.wait("first", copying).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn source_agent_killed_while_it_copies_leaves_the_guest_running_and_a_retry_succeeds() {
    let mut pair = Pair::start();
    let guest = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    begin(&pair, &guest, &destination).await;
    pair.source.kill();
    assert_runs_untraced(&guest);
    pair.source.restart();
    let ended = pair.source.wait_end("first").await;
    assert_eq!(ended.state(), v1::MigrationState::Failed);
    assert_eq!(ended.error.unwrap().reason, "AGENT_RESTARTED");
    pair.destination.wait_end("first").await;
    pair.migrate("second", &guest, &destination, parameters(v1::FabricKind::Tcp)).await;
    assert_proves_itself(&destination);
}

#[tokio::test(flavor = "multi_thread")]
async fn destination_agent_killed_while_it_copies_leaves_the_guest_running_and_a_retry_succeeds() {
    let mut pair = Pair::start();
    let guest = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    begin(&pair, &guest, &destination).await;
    pair.destination.kill();
    let ended = pair.source.wait_end("first").await;
    assert_eq!(ended.state(), v1::MigrationState::Failed);
    assert_runs_untraced(&guest);
    pair.destination.restart();
    pair.destination.wait_end("first").await;
    pair.migrate("second", &guest, &destination, parameters(v1::FabricKind::Tcp)).await;
    assert_proves_itself(&destination);
}

#[tokio::test(flavor = "multi_thread")]
async fn destination_guest_killed_while_it_copies_leaves_the_guest_running() {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    begin(&pair, &guest, &destination).await;
    destination.kill().unwrap();
    let ended = pair.source.wait_end("first").await;
    assert_eq!(ended.state(), v1::MigrationState::Failed);
    assert_runs_untraced(&guest);
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_that_is_told_to_stop_ends_its_migrations_first() {
    let Pair { source, destination } = Pair::start();
    let pair = Pair { source, destination };
    let guest = boot(proof(quiet()));
    let receiver = guest.destination().start().unwrap();
    begin(&pair, &guest, &receiver).await;
    let Pair { source, destination } = pair;
    let stopped = tokio::task::spawn_blocking(move || source.terminate());
    let status = tokio::time::timeout(PATIENCE, stopped).await.expect("it stops in time").unwrap();
    assert!(status.success(), "{status}");
    assert_runs_untraced(&guest);
    let ended = destination.wait_end("first").await;
    assert_eq!(ended.state(), v1::MigrationState::Cancelled, "{:?}", ended.error);
    tokio::time::timeout(
        Duration::from_secs(20),
        tokio::task::spawn_blocking(move || destination.terminate()),
    )
    .await
    .expect("it stops in time")
    .unwrap();
}

/// Which agent dies.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Source,
    Destination,
}

/// Whether the guest runs in this QEMU.
fn runs(guest: &ramferry_lab::Qemu) -> bool {
    guest.is_alive() && guest.status().is_ok_and(|status| status == "running")
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_killed_in_the_switchover_leaves_exactly_one_guest_running() {
    for victim in [Victim::Source, Victim::Destination] {
        let mut pair = Pair::start();
        let guest = boot(proof(quiet()));
        let destination = guest.destination().start().unwrap();
        pair.create("first", &guest, &destination, parameters(v1::FabricKind::Tcp)).await.unwrap();
        pair.source.wait("first", |migration| migration.state() >= v1::MigrationState::SwitchingOver).await;
        match victim {
            Victim::Source => {
                pair.source.kill();
                pair.source.restart();
            }
            Victim::Destination => {
                pair.destination.kill();
                pair.destination.restart();
            }
        }
        let at_source = pair.source.wait_end("first").await;
        let at_destination = pair.destination.wait_end("first").await;
        let moved = at_source.state() == v1::MigrationState::Succeeded;
        assert_eq!(moved, at_destination.state() == v1::MigrationState::Succeeded, "the agents agree");
        assert_eq!((runs(&guest), runs(&destination)), (!moved, moved), "{victim:?}: {:?}", at_source.error);
        if moved {
            assert_proves_itself(&destination);
        } else {
            assert_runs_untraced(&guest);
            let destination = guest.destination().start().unwrap();
            pair.migrate("second", &guest, &destination, parameters(v1::FabricKind::Tcp)).await;
            assert_proves_itself(&destination);
        }
    }
}
