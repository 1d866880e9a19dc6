//! Faults of other kinds: drivers that panic, journals that take no record,
//! calls that come at the wrong time.

use std::time::{Duration, Instant};

use ramferry_proto::v1;
use ramferry_proto::v1::FabricKind::{Shm, Tcp};
use ramferry_proto::v1::MigrationState::Failed;
use rustix::process::{Pid, Resource, Rlimit};
use tonic::Code;

use super::leftovers::assert_unharmed;
use super::stage::{Course, Stage, runs};
use crate::harness::{Agent, assert_proves_itself, assert_refused, assert_runs_untraced, parameters};

/// The agent may write this much to a file from now on.
fn limit_files(agent: &Agent, bytes: Option<u64>) {
    let pid = Pid::from_raw(agent.pid().cast_signed());
    let limit = Rlimit { current: bytes, maximum: None };
    rustix::process::prlimit(pid, Resource::Fsize, limit).unwrap();
}

async fn refused_as_busy(stage: &Stage) {
    let again = stage.guest.destination().start().unwrap();
    let result = stage.pair.create("again", &stage.guest, &again, parameters(Tcp)).await;
    assert_refused(result, Code::FailedPrecondition, "GUEST_BUSY", &stage.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn second_migration_of_a_busy_guest_is_refused_and_the_first_goes_on() {
    let stage = Stage::set().await;
    stage.begin(Tcp).await;
    let held = stage.hold(Course::Straight, |step| step.step == "fence").await;
    refused_as_busy(&stage).await;
    drop(held);
    stage.hold(Course::Straight, |step| step.step == "finish").await;
    stage.assert_one_runs(None, Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn source_driver_that_panics_leaves_the_guest_running_and_busy_until_a_restart() {
    for (wanted, fabric) in [("source copy 1", Tcp), ("source verify 3", Shm)] {
        let mut stage = Stage::set().await;
        stage.begin(fabric).await;
        stage.hold(Course::Straight, |step| step.to_string() == wanted).await.panic();
        stage.steps.open();
        let ended = stage.pair.source.wait_end(&stage.id).await;
        assert_eq!((ended.state(), ended.error.unwrap().reason.as_str()), (Failed, "INTERNAL"));
        assert_runs_untraced(&stage.guest);
        refused_as_busy(&stage).await;
        stage.pair.source.restart();
        stage.assert_one_runs(None, fabric).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn source_driver_that_panics_before_it_sends_commit_is_settled_by_a_restart() {
    let mut stage = Stage::set().await;
    stage.begin(Tcp).await;
    stage.hold(Course::Straight, |step| step.step == "send_commit").await.panic();
    stage.steps.open();
    stage.pair.source.restart();
    assert!(!stage.agree().await);
    stage.assert_one_runs(None, Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn destination_driver_that_panics_never_leaves_two_guests_running() {
    for (wanted, fabric) in [
        ("destination drain_round 1", Tcp),
        ("destination tell_incoming_ready", Shm),
        ("destination write_committed", Tcp),
        ("destination answer_running", Shm),
    ] {
        let mut stage = Stage::set().await;
        stage.begin(fabric).await;
        stage.hold(Course::Straight, |step| step.to_string() == wanted).await.panic();
        stage.steps.open();
        assert!(!(runs(&stage.guest) && runs(&stage.receiver)), "{wanted}");
        let before_commit = !["destination write_committed", "destination answer_running"].contains(&wanted);
        if before_commit {
            stage.pair.source.wait_end(&stage.id).await;
            assert_runs_untraced(&stage.guest);
        }
        stage.pair.destination.restart();
        stage.assert_one_runs(None, fabric).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn journal_that_takes_no_committed_aborts_once_it_takes_records_again() {
    let stage = Stage::set().await;
    stage.begin(Tcp).await;
    let held = stage.hold(Course::Straight, |step| step.step == "write_committed").await;
    limit_files(&stage.pair.destination, Some(0));
    drop(held);
    let held = stage.hold(Course::Straight, |step| step.step == "write_aborted").await;
    assert!(!runs(&stage.guest) && !runs(&stage.receiver), "nobody knows yet");
    limit_files(&stage.pair.destination, None);
    drop(held);
    stage.steps.open();
    assert!(!stage.agree().await);
    stage.assert_one_runs(None, Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn journal_that_takes_no_handed_over_leaves_the_guest_at_the_source() {
    let stage = Stage::set().await;
    stage.begin(Shm).await;
    let held = stage.hold(Course::Straight, |step| step.step == "write_handed_over").await;
    limit_files(&stage.pair.source, Some(0));
    drop(held);
    let held = stage.hold(Course::Straight, |step| step.step == "resume_guest").await;
    limit_files(&stage.pair.source, None);
    drop(held);
    stage.steps.open();
    let ended = stage.pair.source.wait_end(&stage.id).await;
    assert_eq!((ended.state(), ended.error.unwrap().reason.as_str()), (Failed, "JOURNAL_FAILED"));
    stage.assert_one_runs(None, Shm).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_whose_last_record_was_refused_is_busy_until_a_restart() {
    let mut stage = Stage::set().await;
    stage.begin(Tcp).await;
    let last = |step: &super::steps::Step| step.role == "source" && step.step == "finish";
    let held = stage.hold(Course::CancelledInRound, last).await;
    limit_files(&stage.pair.source, Some(0));
    drop(held);
    stage.steps.open();
    stage.pair.source.wait_end(&stage.id).await;
    limit_files(&stage.pair.source, None);
    assert_runs_untraced(&stage.guest);
    refused_as_busy(&stage).await;
    stage.pair.source.restart();
    stage.assert_one_runs(None, Tcp).await;
}

/// Every connection that carries RAM ends, and the control stream stays.
#[tokio::test(flavor = "multi_thread")]
async fn data_links_cut_while_the_control_stream_stays_leave_the_guest_at_the_source() {
    for (wanted, fabric) in [
        ("source copy 1", Tcp),
        ("source copy 2", Shm),
        ("source copy last 3", Tcp),
        ("source copy last 3", Shm),
    ] {
        let stage = Stage::set().await;
        stage.begin(fabric).await;
        let held = stage.hold(Course::Straight, |step| step.to_string() == wanted).await;
        let cut = super::cut::cut_data(&stage.pair.source, stage.proxy.address);
        assert_eq!(cut, 2, "links of {fabric:?}");
        drop(held);
        stage.steps.open();
        let ended = stage.pair.source.wait_end(&stage.id).await;
        assert_eq!((ended.state(), ended.error.unwrap().reason.as_str()), (Failed, "LINK_LOST"), "{wanted}");
        stage.assert_one_runs(None, fabric).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_guests_move_at_once() {
    for fabric in [Shm, Tcp] {
        let pair = crate::harness::Pair::start();
        let mut guests = Vec::new();
        for number in 0..8 {
            let guest = super::stage::small_guest();
            let destination = guest.destination().start().unwrap();
            guests.push((format!("guest-{number}"), guest, destination));
        }
        for (id, guest, destination) in &guests {
            pair.create(id, guest, destination, parameters(fabric)).await.unwrap();
        }
        for (id, guest, destination) in &guests {
            let ended = pair.source.wait_end(id).await;
            assert_eq!(ended.state(), v1::MigrationState::Succeeded, "{id}: {:?}", ended.error);
            assert_eq!(ended.verified, Some(true), "{id}");
            assert_proves_itself(destination);
            assert!(!runs(guest), "{id}");
        }
    }
}

/// Between the order to prepare and the first copy the agent stops a thread of the VMM, has it make a
/// userfaultfd, and takes that over: it is killed at moments spread over all of this.
#[tokio::test(flavor = "multi_thread")]
async fn source_agent_killed_at_any_moment_of_arming_leaves_the_vmm_unharmed() {
    const MOMENTS: u32 = 20;
    let mut stage = Stage::set().await;
    let mut arming = Duration::ZERO;
    for moment in 0..=MOMENTS {
        stage.id = format!("moment-{moment}");
        stage.begin(Shm).await;
        let held = stage.hold(Course::Straight, |step| step.to_string() == "source prepare").await;
        let began = Instant::now();
        if moment == 0 {
            drop(held);
            drop(stage.hold(Course::Straight, |step| step.step == "copy").await);
            arming = began.elapsed();
            stage.cancel().await;
        } else {
            drop(held);
            std::thread::sleep(arming * moment / MOMENTS);
            stage.pair.source.restart();
        }
        stage.let_all_end().await;
        assert_unharmed(&stage.guest);
        assert_runs_untraced(&stage.guest);
    }
    eprintln!("arming took {arming:?}");
    stage.steps.open();
    stage.assert_one_runs(None, Shm).await;
}
