//! Cancelling, and changing what runs.

use std::time::{Duration, Instant};

use ramferry_proto::v1;

use crate::harness::{MIB, PATIENCE, Pair, assert_runs_untraced, boot, parameters, proof, quiet};

/// For so long more than before a guest may stand still when its migration is cancelled.
const LIMIT: Duration = Duration::from_millis(100);
/// The machine may keep a guest from running for a while at any time: the best of so many counts, and what the guest had
/// to bear before the first does not.
const TRIES: usize = 5;

fn slow() -> v1::MigrationParameters {
    v1::MigrationParameters {
        bandwidth_limit_bits_per_second: 8 * 20 * MIB,
        ..parameters(v1::FabricKind::Tcp)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_while_it_copies_leaves_the_guest_running_at_once() {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    let mut client = pair.source.client().await;
    let (mut added, mut undisturbed) = (Vec::new(), None);
    while added.iter().all(|added| *added >= LIMIT) {
        assert!(added.len() < TRIES, "the guest stood still, for so much longer than before: {added:?}");
        let id = format!("slow-{}", added.len());
        pair.create(&id, &guest, &destination, slow()).await.unwrap();
        let copies = |migration: &v1::Migration| {
            migration.progress.as_ref().is_some_and(|now| now.transferred_bytes > 0)
        };
        pair.source.wait(&id, copies).await;
        let cancelled = Instant::now();
        client.cancel_migration(v1::CancelMigrationRequest { id: id.clone() }).await.unwrap();
        guest.next_tick(PATIENCE).unwrap();
        let (before, after) = longest_gaps(&guest, cancelled);
        added.push(after.saturating_sub(*undisturbed.get_or_insert(before)));
        let ended = pair.source.wait_end(&id).await;
        assert_eq!(ended.state(), v1::MigrationState::Cancelled);
        assert_runs_untraced(&guest);
        // Idempotent.
        client.cancel_migration(v1::CancelMigrationRequest { id }).await.unwrap();
    }
    // The destination was not told to take device state in: it can be used again.
    let ended = pair.migrate("again", &guest, &destination, parameters(v1::FabricKind::Tcp)).await;
    assert_eq!(ended.verified, Some(true));
}

/// The longest times between two ticks of the guest that ended before and after `moment`.
fn longest_gaps(guest: &ramferry_lab::Qemu, moment: Instant) -> (Duration, Duration) {
    let ticks = guest.ticks();
    let longest = |after: bool| {
        let gaps = ticks.windows(2).filter(|pair| (pair[1].0 > moment) == after);
        gaps.map(|pair| pair[1].0 - pair[0].0).max().expect("the guest ticks before and after it")
    };
    let gaps = (longest(false), longest(true));
    eprintln!("longest time between ticks: {:?} before, {:?} after", gaps.0, gaps.1);
    gaps
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_change_while_it_copies() {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    let mut parameters = slow();
    parameters.bandwidth_limit_bits_per_second = 8 * MIB;
    pair.create("slow", &guest, &destination, parameters).await.unwrap();
    pair.source.wait("slow", |migration| migration.state() == v1::MigrationState::Precopy).await;
    let request = v1::UpdateMigrationParametersRequest {
        id: "slow".into(),
        parameters: Some(v1::MigrationParameters::default()),
        update_mask: Some(prost_types::FieldMask { paths: vec!["bandwidth_limit_bits_per_second".into()] }),
    };
    let changed = pair.source.client().await.update_migration_parameters(request).await.unwrap().into_inner();
    let spec = changed.migration.unwrap().spec.unwrap();
    assert_eq!(spec.parameters.unwrap().bandwidth_limit_bits_per_second, 0);
    // At 1 MiB/s it would take minutes.
    let ended = pair.source.wait_end("slow").await;
    assert_eq!(ended.state(), v1::MigrationState::Succeeded, "{:?}", ended.error);
}

#[tokio::test(flavor = "multi_thread")]
async fn forced_switchover_does_not_wait_for_convergence() {
    let pair = Pair::start();
    let workload = ramferry_lab::Workload { mib: 64, rate_mib: 0, ..quiet() };
    let guest = boot(proof(workload));
    let destination = guest.destination().start().unwrap();
    let parameters = v1::MigrationParameters {
        max_downtime: Some(Duration::from_millis(1).try_into().unwrap()),
        no_progress_timeout: Some(Duration::from_secs(3600).try_into().unwrap()),
        ..parameters(v1::FabricKind::Tcp)
    };
    pair.create("busy", &guest, &destination, parameters).await.unwrap();
    pair.source.wait("busy", |migration| migration.progress.as_ref().is_some_and(|now| now.round >= 3)).await;
    let mut client = pair.source.client().await;
    client.force_switchover(v1::ForceSwitchoverRequest { id: "busy".into() }).await.unwrap();
    let ended = pair.source.wait_end("busy").await;
    assert_eq!(ended.state(), v1::MigrationState::Succeeded, "{:?}", ended.error);
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_that_does_not_converge_stays_where_it_is() {
    let pair = Pair::start();
    let workload = ramferry_lab::Workload { mib: 64, rate_mib: 0, ..quiet() };
    let guest = boot(proof(workload));
    let destination = guest.destination().start().unwrap();
    let parameters = v1::MigrationParameters {
        max_downtime: Some(Duration::from_millis(1).try_into().unwrap()),
        timeout_action: v1::TimeoutAction::Cancel.into(),
        ..parameters(v1::FabricKind::Tcp)
    };
    let ended = pair.run("busy", &guest, &destination, parameters).await;
    assert_eq!(ended.state(), v1::MigrationState::Failed);
    let error = ended.error.unwrap();
    assert_eq!(error.reason, "NOT_CONVERGING", "{}", error.message);
    assert_runs_untraced(&guest);
}
