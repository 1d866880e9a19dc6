//! Every fault before every step.

use std::collections::BTreeSet;
use std::time::Instant;

use ramferry_proto::v1::FabricKind;

use super::stage::{Course, Fault, Stage};

/// The steps of a migration that goes well. A source's harvest is of the round before it.
pub(crate) const STRAIGHT: &[&str] = &[
    "source prepare",
    "source copy 1",
    "source fence 1",
    "source end_round 1",
    "source harvest 1",
    "source copy 2",
    "source fence 2",
    "source end_round 2",
    "source harvest 2",
    "source pause_guest 2",
    "source harvest last 2",
    "source copy last 3",
    "source fence last 3",
    "source end_round last 3",
    "source verify 3",
    "source save_device_state 3",
    "source move_device_state 3",
    "source write_handed_over 3",
    "source send_commit 3",
    "source release 3",
    "source finish 3",
    "destination prepare",
    "destination drain_round 1",
    "destination acknowledge_round 1",
    "destination drain_round 2",
    "destination acknowledge_round 2",
    "destination start_incoming",
    "destination tell_incoming_ready",
    "destination drain_round 3",
    "destination acknowledge_round 3",
    "destination digest",
    "destination tell_device_state_loaded",
    "destination write_committed",
    "destination resume_guest",
    "destination answer_running",
    "destination release",
    "destination finish",
];

/// Steps of a migration that is cancelled while its guest runs, which are not those above.
const CANCELLED_IN_ROUND: &[&str] = &[
    "source stop_copy 1",
    "source abort_peer 1",
    "source release 1",
    "source finish 1",
    "destination write_aborted",
    "destination answer_aborted",
    "destination discard_guest",
];

/// The same, while its guest is paused.
const CANCELLED_IN_SWITCHOVER: &[&str] = &[
    "source resume_guest 3",
    "source stop_copy 3",
    "source abort_peer 3",
    "destination write_aborted",
    "destination answer_aborted",
    "destination discard_guest",
];

/// A step of a source whose destination's answer to COMMIT was lost.
const ANSWER_LOST: &[&str] = &["source ask_outcome 3"];

/// A course and the steps of it that are struck.
pub(crate) type Rows = (Course, &'static [&'static str]);

const TABLE: [Rows; 4] = [
    (Course::Straight, STRAIGHT),
    (Course::CancelledInRound, CANCELLED_IN_ROUND),
    (Course::CancelledInSwitchover, CANCELLED_IN_SWITCHOVER),
    (Course::AnswerLost, ANSWER_LOST),
];

/// Parts into which the table is cut for RAMFERRY_FAULTS.
const PARTS: u64 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn table_has_every_step_of_every_course() {
    assert_complete(&TABLE, &[]).await;
}

/// Every step that a course takes is in its rows or in those before, or is `known`.
pub(crate) async fn assert_complete(table: &[Rows], known: &[&str]) {
    let mut known: BTreeSet<String> = known.iter().map(|step| (*step).to_owned()).collect();
    for (course, steps) in table.iter().copied() {
        let stage = Stage::set_course(course).await;
        stage.begin_course(course, FabricKind::Tcp).await;
        let seen = stage.collect(course).await;
        let seen: BTreeSet<String> = seen.iter().map(ToString::to_string).collect();
        known.extend(steps.iter().map(|step| (*step).to_owned()));
        let unknown: Vec<_> = seen.difference(&known).collect();
        assert!(unknown.is_empty(), "{course:?} takes steps that the table lacks: {unknown:?}");
        let missed: Vec<_> = steps.iter().filter(|step| !seen.contains(**step)).collect();
        assert!(missed.is_empty(), "{course:?} does not take the table's steps {missed:?}");
        stage.assert_one_runs(None, FabricKind::Tcp).await;
    }
}

#[test]
fn source_agent_killed_before_any_step_leaves_one_guest_running() {
    strike_everywhere(Fault::SourceAgentKilled);
}

#[test]
fn destination_agent_killed_before_any_step_leaves_one_guest_running() {
    strike_everywhere(Fault::DestinationAgentKilled);
}

#[test]
fn source_vmm_killed_before_any_step_never_leaves_two_guests_running() {
    strike_everywhere(Fault::SourceVmmKilled);
}

#[test]
fn destination_vmm_killed_before_any_step_never_leaves_two_guests_running() {
    strike_everywhere(Fault::DestinationVmmKilled);
}

#[test]
fn link_cut_before_any_step_leaves_one_guest_running() {
    strike_everywhere(Fault::LinkCut);
}

fn strike_everywhere(fault: Fault) {
    strike_all(fault, &TABLE);
}

/// Goes through the whole table, or the part of it that is due, before it says what failed.
pub(crate) fn strike_all(fault: Fault, table: &[Rows]) {
    let (part, only) = (part(), std::env::var("RAMFERRY_FAULTS_STEP").ok());
    let mut failed = Vec::new();
    let mut rows = 0;
    let table = table.iter().flat_map(|(course, steps)| steps.iter().map(move |step| (*course, *step)));
    for (index, (course, step)) in (0..).zip(table) {
        if part.is_some_and(|part| index % PARTS != part) || only.as_ref().is_some_and(|only| only != step) {
            continue;
        }
        rows += 1;
        let fabric = if index % 2 == 0 { FabricKind::Tcp } else { FabricKind::Shm };
        let started = Instant::now();
        let case = move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.unwrap().block_on(strike(fault, course, step, fabric));
        };
        let result = std::thread::spawn(case).join();
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        eprintln!("{word}: {fault:?} before {step} ({course:?}, {fabric:?}) in {:?}", started.elapsed());
        if result.is_err() {
            failed.push((course, step));
        }
    }
    assert!(failed.is_empty(), "{fault:?}, {} of {rows} failed: {failed:?}", failed.len());
}

/// The part of the table that was asked for; all of it for none.
fn part() -> Option<u64> {
    let part = std::env::var("RAMFERRY_FAULTS").ok()?;
    Some(part.parse::<u64>().expect("RAMFERRY_FAULTS is 0, 1 or 2") % PARTS)
}

async fn strike(fault: Fault, course: Course, step: &str, fabric: FabricKind) {
    let mut stage = Stage::set_course(course).await;
    stage.begin_course(course, fabric).await;
    let held = stage.hold(course, |seen| seen.to_string() == step).await;
    stage.strike(fault, held).await;
    stage.assert_one_runs(Some(fault), fabric).await;
}
