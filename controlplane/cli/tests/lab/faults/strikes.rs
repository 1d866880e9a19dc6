//! What is struck, and when.

use std::process::Command;
use std::time::{Duration, Instant};

use ramferry_lab::inside::hosts::{Host, Hosts};
use ramferry_proto::v1::{FabricKind, MigrationState};

use super::leftovers::assert_unharmed;
use super::stage::{Course, Fault, Stage, runs};
use crate::authority::Authority;
use crate::harness::{PATIENCE, assert_proves_itself};
use crate::rdma::{DESTINATION, pair, system, verbs};

/// Where the way of RAM is cut: in each phase, and in each part of the switchover that uses it or follows it.
const CUTS: &[&str] = &[
    "source prepare",
    "source copy 1",
    "source fence 1",
    "source pause_guest 2",
    "source copy last 3",
    "source fence last 3",
    "source move_device_state 3",
    "source send_commit 3",
];

/// Where an agent is killed: as writes begin, as those do that the paused guest waits for, and around the commit.
const KILLS: &[&str] = &["source copy 1", "source copy last 3", "source send_commit 3"];

struct Strike {
    stage: Stage,
    /// Its files are read as long as agents start.
    _authority: Authority,
}

async fn held_at(step: &str) -> (Strike, super::steps::Held) {
    let authority = Authority::new();
    let stage = Stage::set_with(|socket| pair(&authority, &["--step-socket", socket])).await;
    stage.begin(FabricKind::Verbs).await;
    let held = stage.hold(Course::Straight, |seen| seen.to_string() == step).await;
    (Strike { stage, _authority: authority }, held)
}

async fn kill_at(fault: Fault, step: &str) {
    let started = Instant::now();
    let (Strike { mut stage, _authority }, held) = held_at(step).await;
    stage.strike(fault, held).await;
    stage.assert_one_runs(Some(fault), FabricKind::Verbs).await;
    eprintln!("ok: {fault:?} before {step} in {:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn source_agent_killed_leaves_one_guest_running_and_a_retry_succeeds() {
    for step in KILLS {
        kill_at(Fault::SourceAgentKilled, step).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn destination_agent_killed_leaves_one_guest_running_and_a_retry_succeeds() {
    for step in KILLS {
        kill_at(Fault::DestinationAgentKilled, step).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn vmm_killed_never_leaves_two_guests_running() {
    for fault in [Fault::SourceVmmKilled, Fault::DestinationVmmKilled] {
        for step in ["source copy 1", "source copy last 3"] {
            kill_at(fault, step).await;
        }
    }
}

/// Takes the destination's interface down while `step` is held, and up again when
/// the migration has ended.
async fn cut_at(step: &str) {
    let started = Instant::now();
    let (Strike { stage, _authority }, held) = held_at(step).await;
    let down = Down::cut();
    drop(held);
    stage.steps.open();
    let moved = stage.agree().await;
    let error = stage.pair.source.wait_end(&stage.id).await.error;
    if let Some(error) = &error {
        assert!(["LINK_LOST", "DESTINATION_ABORTED"].contains(&&*error.reason), "{error:?}");
    }
    stage.assert_settled(None).await;
    drop(down);
    let tries = retry(stage, moved).await;
    eprintln!(
        "ok: link down before {step}: moved {moved}, {error:?}, retried {tries} times, {:?}",
        started.elapsed()
    );
}

/// Moves the guest again, now that the link is back: how many tries that took. What soft-RoCE sends in the moment
/// in which its port comes up may be lost.
async fn retry(stage: Stage, moved: bool) -> usize {
    const MOST: usize = 3;
    let Stage { pair, guest, receiver, .. } = stage;
    let (pair, runner, _other) = if moved { (pair.swap(), receiver, guest) } else { (pair, guest, receiver) };
    for attempt in 1..=MOST {
        let again = runner.destination().start().unwrap();
        let ended = pair.run(&format!("again-{attempt}"), &runner, &again, verbs()).await;
        if ended.state() == MigrationState::Succeeded {
            assert_proves_itself(&again);
            return attempt;
        }
        eprintln!("try {attempt}: {:?}", ended.error);
        pair.destination.wait_end(&format!("again-{attempt}")).await;
    }
    panic!("no try of {MOST} succeeded");
}

/// The destination's interface is down; up again when this is dropped.
struct Down;

impl Down {
    fn cut() -> Down {
        Hosts::here().unwrap().cut(Host::B).unwrap();
        Down
    }
}

impl Drop for Down {
    fn drop(&mut self) {
        let hosts = Hosts::here().unwrap();
        hosts.mend().unwrap();
        // The agents let go of a device that goes, and listen again.
        eprintln!("made anew: {:?}", hosts.revive().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn link_taken_down_in_any_phase_leaves_one_guest_running_and_a_retry_succeeds() {
    for step in CUTS {
        cut_at(step).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn device_removed_while_it_copies_fails_the_migration_and_a_retry_succeeds_once_it_is_back() {
    let (Strike { stage, _authority }, held) = held_at("source copy 2").await;
    // The kernel waits until nobody has the device open.
    let mut deletion = Command::new("rdma").args(["link", "delete", DESTINATION.device]).spawn().unwrap();
    let asked = Instant::now();
    while !stage.pair.destination.log().contains("no more links are accepted") {
        assert!(asked.elapsed() < PATIENCE, "the destination hears that its device goes");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(held);
    stage.steps.open();
    let moved = stage.agree().await;
    let error = stage.pair.source.wait_end(&stage.id).await.error;
    let deleted = deletion.wait().unwrap();
    assert!(deleted.success(), "{deleted}");
    let back = ["link", "add", DESTINATION.device, "type", "rxe", "netdev", DESTINATION.interface];
    system("rdma", &back);
    assert!(!moved);
    let error = error.unwrap();
    assert!(["LINK_LOST", "DESTINATION_ABORTED"].contains(&&*error.reason), "{error:?}");
    // The source may hear of the connection's end before it hears why.
    let cause = stage.pair.destination.wait_end(&stage.id).await.error.unwrap();
    let named = [&error, &cause].iter().any(|error| error.message.contains(DESTINATION.device));
    assert!(named, "{error:?}; at the destination {cause:?}");
    // What the agents hold of the device is less now, until they use it again.
    assert!(runs(&stage.guest) && !runs(&stage.receiver));
    assert_unharmed(&stage.guest);
    let tries = retry(stage, moved).await;
    eprintln!("ok: {error:?}, retried {tries} times");
}
