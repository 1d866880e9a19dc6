//! A guest that writes faster than it may be copied is throttled until it converges, and has its time back whatever comes.

pub(crate) mod stage;

use ramferry_lab::skipped;
use ramferry_proto::v1;
use ramferry_proto::v1::MigrationState::{Cancelled, Failed, Succeeded};

use self::stage::{Stage, guards, has_controller, homes, is_throttled, slow, until};
use crate::harness::{assert_proves_itself, assert_runs_untraced};

#[tokio::test(flavor = "multi_thread")]
async fn guest_that_does_not_converge_does_so_once_it_is_throttled() {
    if !has_controller() {
        return skipped("no cgroup has the cpu controller here");
    }
    let stage = Stage::set();
    let ended = stage.pair.run("without", &stage.guest, &stage.receiver, slow(0)).await;
    assert_eq!(ended.error.as_ref().unwrap().reason, "NOT_CONVERGING", "{ended:?}");
    assert_eq!(ended.progress.unwrap().throttle_peak_percent, 0);

    stage.begin("throttled").await;
    let exposed = stage.pair.source.scrape();
    let gauge = "ramferry_migration_throttle_ratio{migration=\"throttled\",role=\"source\"} 0.";
    assert!(exposed.contains(gauge), "{exposed}");
    let ended = stage.pair.source.wait_end("throttled").await;
    assert_eq!(ended.state(), Succeeded, "{:?}\n{}", ended.error, stage.pair.source.log());
    assert_eq!(stage.guest.status().unwrap(), "postmigrate");
    let progress = ended.progress.unwrap();
    assert_eq!(progress.throttle_percent, 0);
    assert!(progress.throttle_peak_percent >= 20);
    eprintln!(
        "throttled by {} %, {} rounds, downtime {:?}",
        progress.throttle_peak_percent, progress.round, progress.downtime
    );
    stage.assert_freed("throttled");
    assert_proves_itself(&stage.receiver);
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_has_its_time_back_after_a_cancel_a_change_and_a_failure() {
    if !has_controller() {
        return skipped("no cgroup has the cpu controller here");
    }
    let stage = Stage::set();
    stage.begin("cancelled").await;
    let mut client = stage.pair.source.client().await;
    client.cancel_migration(v1::CancelMigrationRequest { id: "cancelled".into() }).await.unwrap();
    assert_eq!(stage.pair.source.wait_end("cancelled").await.state(), Cancelled);
    stage.assert_freed("cancelled");
    assert_runs_untraced(&stage.guest);

    stage.begin("failing").await;
    let request = v1::UpdateMigrationParametersRequest {
        id: "failing".into(),
        parameters: Some(v1::MigrationParameters::default()),
        update_mask: Some(prost_types::FieldMask { paths: vec!["throttle_max_percent".into()] }),
    };
    client.update_migration_parameters(request).await.unwrap();
    until("its quota's end", || !is_throttled(&stage.guest, "failing"));
    stage.receiver.kill().unwrap();
    assert_eq!(stage.pair.source.wait_end("failing").await.state(), Failed);
    stage.assert_freed("failing");
    assert_runs_untraced(&stage.guest);
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_has_its_time_back_after_kill_9_of_the_agent_at_once_or_at_its_restart() {
    if !has_controller() {
        return skipped("no cgroup has the cpu controller here");
    }
    let mut stage = Stage::set();
    stage.begin("first").await;
    assert_eq!(guards(&stage.pair.source).len(), 1);
    stage.pair.source.kill();
    until("the guard's work", || homes(&stage.guest) == stage.homes);
    assert_runs_untraced(&stage.guest);
    stage.pair.source.restart();
    assert_eq!(stage.pair.source.wait_end("first").await.error.unwrap().reason, "AGENT_RESTARTED");
    stage.assert_freed("first");
    stage.pair.destination.wait_end("first").await;

    stage.begin("second").await;
    for guard in guards(&stage.pair.source) {
        let guard = rustix::process::Pid::from_raw(guard.try_into().unwrap()).unwrap();
        rustix::process::kill_process(guard, rustix::process::Signal::KILL).unwrap();
    }
    stage.pair.source.kill();
    assert!(is_throttled(&stage.guest, "second"), "nobody is left to free it");
    stage.pair.source.restart();
    assert_eq!(homes(&stage.guest), stage.homes, "before the agent serves anybody");
    stage.pair.source.wait_end("second").await;
    stage.assert_freed("second");
    assert_runs_untraced(&stage.guest);
}
