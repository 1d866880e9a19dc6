//! What may be asked of a migration in post-copy, and what is shown of it.

use std::time::Duration;

use ramferry_proto::v1;
use ramferry_proto::v1::FabricKind::{Shm, Tcp};
use ramferry_proto::v1::MigrationState::{Postcopy, Precopy, Succeeded};
use tonic::Code;

use super::hot;
use crate::faults::cut::cut_data;
use crate::faults::stage::{Course, Stage};
use crate::faults::steps::Held;
use crate::harness::{Agent, Pair, assert_proves_itself, assert_refused, boot, parameters, proof, ramferry};

/// In post-copy; the links are lost, and the source is held before it offers others.
async fn held_in_postcopy() -> (Stage, Held) {
    let stage = Stage::set_course(Course::Postcopy).await;
    stage.begin_course(Course::Postcopy, Tcp).await;
    let held = stage.hold(Course::Postcopy, |step| step.to_string() == "destination pull").await;
    assert!(cut_data(&stage.pair.source, stage.proxy.address) > 0);
    drop(held);
    let held = stage.hold(Course::Postcopy, |step| step.to_string() == "source reconnect 1").await;
    (stage, held)
}

fn call(agent: &Agent, arguments: &[&str]) -> String {
    let output = ramferry().args(arguments).args(["--agent", &agent.grpc.to_string()]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn migration_in_postcopy_is_shown_and_refuses_what_it_cannot_do() {
    let (stage, held) = held_in_postcopy().await;
    let source = &stage.pair.source;
    let seen = source.wait(&stage.id, |migration| migration.state() == Postcopy).await;
    let owed = seen.progress.as_ref().unwrap().remaining_bytes;
    assert!(owed > 0, "{seen:?}");

    let mut client = source.client().await;
    let cancel = v1::CancelMigrationRequest { id: stage.id.clone() };
    let refused = client.cancel_migration(cancel).await.map(|_| v1::Migration::default());
    assert_refused(refused, Code::FailedPrecondition, "IN_POSTCOPY", "cannot be cancelled");
    let force = v1::ForceSwitchoverRequest { id: stage.id.clone() };
    let refused = client.force_switchover(force).await.map(|_| v1::Migration::default());
    assert_refused(refused, Code::FailedPrecondition, "IN_POSTCOPY", "has switched over already");
    let other = stage.guest.destination().start().unwrap();
    let result = stage.pair.create("again", &stage.guest, &other, parameters(Tcp)).await;
    assert_refused(result, Code::FailedPrecondition, "GUEST_BUSY", &stage.id);
    // Nor can it be moved on before it is whole.
    let back = Pair { source: Agent::start(), destination: Agent::start() };
    let result = back.create("on", &stage.receiver, &other, parameters(Tcp)).await;
    eprintln!("moving on: {result:?}");
    assert!(result.is_err());

    for (agent, id) in [(source, &stage.id), (&stage.pair.destination, &stage.id)] {
        let shown = call(agent, &["get", id]);
        eprintln!("{shown}");
        assert!(shown.contains("POSTCOPY") && shown.contains("remaining"), "{shown}");
        let listed = call(agent, &["list"]);
        eprintln!("{listed}");
        assert!(listed.contains("POSTCOPY"), "{listed}");
    }
    drop(held);
    stage.steps.open();
    let watched = call(source, &["watch", &stage.id]);
    eprintln!("{watched}");
    stage.assert_one_runs(None, Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postcopy_that_is_allowed_while_a_migration_does_not_converge_ends_it() {
    let pair = Pair::start();
    let guest = boot(proof(hot()));
    let destination = guest.destination().start().unwrap();
    let endless = v1::MigrationParameters {
        verify: false,
        max_downtime: Some(Duration::from_millis(1).try_into().unwrap()),
        no_progress_timeout: Some(Duration::from_secs(3600).try_into().unwrap()),
        ..parameters(Shm)
    };
    pair.create("busy", &guest, &destination, endless).await.unwrap();
    let rounds = |migration: &v1::Migration| migration.progress.as_ref().is_some_and(|now| now.round >= 3);
    let seen = pair.source.wait("busy", rounds).await;
    assert_eq!(seen.state(), Precopy);
    let change = v1::MigrationParameters {
        postcopy: v1::Postcopy::Allow.into(),
        no_progress_timeout: Some(Duration::from_millis(100).try_into().unwrap()),
        ..Default::default()
    };
    let paths = vec!["postcopy".into(), "no_progress_timeout".into()];
    let request = v1::UpdateMigrationParametersRequest {
        id: "busy".into(),
        parameters: Some(change),
        update_mask: Some(prost_types::FieldMask { paths }),
    };
    let changed = pair.source.client().await.update_migration_parameters(request).await.unwrap();
    let spec = changed.into_inner().migration.unwrap().spec.unwrap();
    assert_eq!(spec.parameters.unwrap().postcopy(), v1::Postcopy::Allow);
    let ended = pair.source.wait_end("busy").await;
    assert_eq!(ended.state(), Succeeded, "{:?}", ended.error);
    assert!(ended.progress.unwrap().postcopy);
    assert_proves_itself(&destination);
}

/// The guest runs before its memory is whole: there is no moment at which both sides could be compared.
#[tokio::test(flavor = "multi_thread")]
async fn verify_says_nothing_after_postcopy() {
    let pair = Pair::start();
    let guest = boot(proof(hot()));
    let destination = guest.destination().start().unwrap();
    let parameters =
        v1::MigrationParameters { verify: true, ..super::into_postcopy(Tcp, v1::Postcopy::Always) };
    let ended = pair.migrate("unverified", &guest, &destination, parameters).await;
    assert!(ended.progress.unwrap().postcopy);
    assert_eq!(ended.verified, None);
    assert_proves_itself(&destination);
    let help = ramferry().args(["migrate", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(help.contains("Not after post-copy"), "{help}");
}
