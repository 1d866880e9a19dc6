use ramferry_engine::{DestinationAction, DestinationEvent, DestinationOutcome, Reason, State, limits};

use crate::destination_harness::{Checked, failed, failure, good_path, path_without_verify};

pub(crate) fn aborts(actions: &[DestinationAction], reason: Reason) -> bool {
    matches!(actions, [DestinationAction::WriteAborted(cause), DestinationAction::Release] if cause.reason == reason)
}

fn says_aborted(actions: &[DestinationAction]) -> bool {
    matches!(actions, [DestinationAction::AnswerAborted(_), DestinationAction::DiscardGuest])
}

#[test]
fn a_migration_that_goes_well_takes_its_steps_in_order() {
    let checked = Checked::after(good_path().len());
    let expected = vec![
        DestinationAction::Prepare,
        DestinationAction::DrainRound { round: 1 },
        DestinationAction::AcknowledgeRound { round: 1 },
        DestinationAction::StartIncoming { postcopy: false },
        DestinationAction::TellIncomingReady,
        DestinationAction::DrainRound { round: 2 },
        DestinationAction::AcknowledgeRound { round: 2 },
        DestinationAction::Digest,
        DestinationAction::TellDeviceStateLoaded,
        DestinationAction::WriteCommitted,
        DestinationAction::ResumeGuest,
        DestinationAction::AnswerRunning { memory_owed: false },
        DestinationAction::Release,
        DestinationAction::Finish(DestinationOutcome::Running),
    ];
    assert_eq!(checked.actions, expected);
}

#[test]
fn device_state_that_is_loaded_before_the_last_round_is_drained_is_told_of_at_once() {
    let mut checked = Checked::new();
    for (phase, event) in path_without_verify() {
        assert_eq!(checked.destination.phase(), phase);
        checked.handle(event);
    }
    let expected = [
        DestinationAction::DrainRound { round: 2 },
        DestinationAction::TellDeviceStateLoaded,
        DestinationAction::AcknowledgeRound { round: 2 },
        DestinationAction::WriteCommitted,
    ];
    assert_eq!(checked.actions[5..9], expected);
}

#[test]
fn commit_before_the_last_round_is_drained_is_a_breach_of_the_protocol() {
    let mut checked = Checked::at("receive_last");
    checked.handle(DestinationEvent::EndRound { round: 2 });
    checked.handle(DestinationEvent::DeviceStateLoaded);
    assert_eq!(checked.destination.phase(), "drain");
    assert!(aborts(&checked.handle(DestinationEvent::Commit), Reason::PeerRefused));
}

#[test]
fn peer_lost_before_commit_aborts_durably_and_a_late_commit_is_refused() {
    let mut checked = Checked::at("loaded");
    assert!(aborts(&checked.handle(DestinationEvent::PeerLost), Reason::PeerLost));
    assert!(checked.handle(DestinationEvent::Commit).is_empty(), "not before the record is durable");
    assert!(says_aborted(&checked.handle(DestinationEvent::AbortedSynced)));
    let late = checked.handle(DestinationEvent::Commit);
    assert!(matches!(&late[..], [DestinationAction::AnswerAborted(_)]));
    checked.handle(DestinationEvent::Released);
    checked.handle(DestinationEvent::GuestDiscarded);
    assert_eq!(checked.destination.state(), State::Failed);
    let later = checked.handle(DestinationEvent::AskOutcome);
    assert!(matches!(&later[..], [DestinationAction::AnswerAborted(_)]));
}

#[test]
fn asked_before_commit_it_never_commits() {
    let mut checked = Checked::at("loaded");
    assert!(aborts(&checked.handle(DestinationEvent::AskOutcome), Reason::PeerLost));
    assert!(says_aborted(&checked.handle(DestinationEvent::AbortedSynced)));
    checked.handle(DestinationEvent::Commit);
    assert_eq!(checked.times(&DestinationAction::WriteCommitted), 0);
}

#[test]
fn peer_lost_while_committing_changes_nothing() {
    let mut checked = Checked::at("commit");
    assert!(checked.handle(DestinationEvent::PeerLost).is_empty());
    assert!(checked.handle(DestinationEvent::AskOutcome).is_empty());
    assert!(checked.handle(failed(Reason::LinkLost)).is_empty());
    assert_eq!(checked.handle(DestinationEvent::CommittedSynced), [DestinationAction::ResumeGuest]);
    assert_eq!(
        checked.handle(DestinationEvent::GuestResumed)[0],
        DestinationAction::AnswerRunning { memory_owed: false }
    );
    assert_eq!(
        checked.handle(DestinationEvent::AskOutcome),
        [DestinationAction::AnswerRunning { memory_owed: false }]
    );
}

#[test]
fn committed_that_fails_to_be_written_is_followed_by_aborted_before_any_answer() {
    let mut checked = Checked::at("commit");
    assert!(aborts(&checked.handle(failed(Reason::JournalFailed)), Reason::JournalFailed));
    assert!(checked.handle(DestinationEvent::CommittedSynced).is_empty(), "an answer that is too late");
    assert!(checked.handle(DestinationEvent::AskOutcome).is_empty());
    assert!(says_aborted(&checked.handle(DestinationEvent::AbortedSynced)));
}

#[test]
fn a_journal_that_goes_on_failing_is_tried_until_it_works() {
    let mut checked = Checked::at("commit");
    checked.handle(failed(Reason::JournalFailed));
    for _ in 0..20 {
        checked.handle(failed(Reason::JournalFailed));
        assert_eq!(checked.destination.trouble().unwrap().reason, Reason::JournalFailed);
        let before = checked.now;
        assert!(checked.tick());
        assert!(checked.now - before <= limits::RETRY_MOST);
    }
    let cause = failure(Reason::JournalFailed);
    assert_eq!(checked.times(&DestinationAction::WriteAborted(cause)), 21);
    assert!(says_aborted(&checked.handle(DestinationEvent::AbortedSynced)));
}

#[test]
fn a_vmm_that_ends_while_committing_gives_the_guest_back() {
    let mut checked = Checked::at("commit");
    assert!(checked.handle(failed(Reason::GuestFailed)).is_empty());
    assert!(aborts(&checked.handle(DestinationEvent::CommittedSynced), Reason::GuestFailed));
    assert_eq!(checked.times(&DestinationAction::ResumeGuest), 0);
}

#[test]
fn a_guest_that_was_ordered_to_resume_is_resumed_until_it_runs() {
    let mut checked = Checked::at("resume");
    for _ in 0..20 {
        assert!(checked.handle(failed(Reason::GuestFailed)).is_empty());
        assert_eq!(checked.destination.trouble().unwrap().reason, Reason::GuestFailed);
        let before = checked.now;
        assert!(checked.tick());
        assert!(checked.now - before <= limits::RETRY_MOST);
    }
    assert!(checked.handle(DestinationEvent::Abort(failure(Reason::Cancelled))).is_empty());
    assert_eq!(checked.times(&DestinationAction::ResumeGuest), 21);
    assert_eq!(
        checked.handle(DestinationEvent::GuestResumed)[0],
        DestinationAction::AnswerRunning { memory_owed: false }
    );
    assert!(checked.destination.trouble().is_none());
}

#[test]
fn orders_out_of_order_are_a_breach_of_the_protocol() {
    for (phase, order) in [
        ("prepare", DestinationEvent::EndRound { round: 1 }),
        ("receive", DestinationEvent::EndRound { round: 2 }),
        ("receive", DestinationEvent::Commit),
        ("drain", DestinationEvent::EndRound { round: 2 }),
        ("drain", DestinationEvent::Commit),
        ("receive_last", DestinationEvent::PrepareIncoming { postcopy: false }),
        ("receive_last", DestinationEvent::Commit),
        ("loaded", DestinationEvent::EndRound { round: 3 }),
        ("loaded", DestinationEvent::Verify),
    ] {
        let mut checked = Checked::at(phase);
        assert!(aborts(&checked.handle(order.clone()), Reason::PeerRefused), "{order:?} in {phase}");
    }
}

#[test]
fn steps_that_take_too_long_abort() {
    for phase in ["prepare", "drain", "incoming", "verify"] {
        let mut checked = Checked::at(phase);
        assert!(checked.handle(DestinationEvent::Tick).is_empty());
        assert!(checked.tick());
        assert_eq!(checked.destination.phase(), "abort", "{phase}");
    }
}

#[test]
fn a_guest_that_cannot_be_discarded_does_not_keep_it_for_ever() {
    let mut checked = Checked::at("loaded");
    checked.handle(DestinationEvent::Abort(failure(Reason::Cancelled)));
    checked.handle(DestinationEvent::AbortedSynced);
    checked.handle(failed(Reason::GuestFailed));
    checked.tick();
    assert_eq!(checked.times(&DestinationAction::DiscardGuest), 2);
    while checked.tick() {}
    assert_eq!(checked.destination.state(), State::Cancelled);
    assert_eq!(checked.now, limits::DISCARD + std::time::Duration::from_millis(1));
}

#[test]
fn restarts_follow_the_last_record() {
    let mut prepared = Checked::restarted_prepared();
    assert!(aborts(&prepared.handle(DestinationEvent::Start), Reason::AgentRestarted));
    let mut committed = Checked::restarted_committed();
    assert_eq!(committed.handle(DestinationEvent::AskOutcome), [DestinationAction::ResumeGuest]);
    assert_eq!(
        committed.handle(DestinationEvent::GuestResumed)[0],
        DestinationAction::AnswerRunning { memory_owed: false }
    );
    let mut aborted = Checked::restarted_aborted();
    let actions = aborted.handle(DestinationEvent::Start);
    assert_eq!(actions[0], DestinationAction::Release);
    assert!(says_aborted(&actions[1..]));
}

#[test]
fn a_guest_whose_vmm_ended_after_the_order_to_resume_is_answered_for_and_never_aborted() {
    for mut checked in [Checked::at("resume"), restarted_committed()] {
        let actions = checked.handle(DestinationEvent::GuestGone(failure(Reason::GuestFailed)));
        assert_eq!(
            actions,
            [DestinationAction::AnswerRunning { memory_owed: false }, DestinationAction::Release]
        );
        checked.handle(DestinationEvent::Released);
        assert_eq!(checked.destination.state(), State::Succeeded);
    }
}

fn restarted_committed() -> Checked {
    let mut checked = Checked::restarted_committed();
    checked.handle(DestinationEvent::Start);
    checked
}
