//! Every fault before every step of a migration that goes through post-copy, and in the midst of it.

use super::stage::{Course, Fault};
use super::table::{Rows, assert_complete, strike_all};

/// Its steps before the pause: those of any other, struck there.
const BEFORE: &[&str] = &[
    "source prepare",
    "source copy 1",
    "source fence 1",
    "source end_round 1",
    "source harvest 1",
    "destination prepare",
    "destination drain_round 1",
    "destination acknowledge_round 1",
];

/// Those from there on, of one that goes well.
const STRAIGHT: &[&str] = &[
    "source pause_guest 1",
    "source save_device_state last 1",
    "source harvest last 1",
    "source send_owed 1",
    "source move_device_state 1",
    "source write_handed_over 1",
    "source send_commit 1",
    "source release 1",
    "source finish 1",
    "destination start_incoming",
    "destination tell_incoming_ready",
    "destination hold_owed",
    "destination tell_owed_accepted",
    "destination tell_device_state_loaded",
    "destination write_committed",
    "destination resume_guest",
    "destination pull",
    "destination answer_running",
    "destination release",
    "destination finish",
];

/// Those of one whose destination loses its source, and finds it again.
const INTERRUPTED: &[&str] =
    &["source ask_outcome 1", "source reconnect 1", "destination pull", "destination answer_running"];

const TABLE: [Rows; 2] = [(Course::Postcopy, STRAIGHT), (Course::PostcopyInterrupted, INTERRUPTED)];

#[tokio::test(flavor = "multi_thread")]
async fn table_has_every_step_of_every_course_into_postcopy() {
    assert_complete(&TABLE, BEFORE).await;
}

#[test]
fn source_agent_killed_before_any_step_into_postcopy_leaves_one_guest_running() {
    strike_all(Fault::SourceAgentKilled, &TABLE);
}

#[test]
fn destination_agent_killed_before_any_step_into_postcopy_leaves_one_guest_running() {
    strike_all(Fault::DestinationAgentKilled, &TABLE);
}

#[test]
fn source_vmm_killed_before_any_step_into_postcopy_never_leaves_two_guests_running() {
    strike_all(Fault::SourceVmmKilled, &TABLE);
}

#[test]
fn destination_vmm_killed_before_any_step_into_postcopy_never_leaves_two_guests_running() {
    strike_all(Fault::DestinationVmmKilled, &TABLE);
}

#[test]
fn link_cut_before_any_step_into_postcopy_leaves_one_guest_running() {
    strike_all(Fault::LinkCut, &TABLE);
}
