use ramferry_engine::{
    Destination, DestinationAction, DestinationEvent, DestinationOutcome, Reason, State, limits,
};

use crate::destination_cases::aborts;
use crate::destination_harness::{Checked, failed, failure, owed, postcopy_path};

const OWING: DestinationAction = DestinationAction::AnswerRunning { memory_owed: true };
const WHOLE: DestinationAction = DestinationAction::AnswerRunning { memory_owed: false };

fn at(phase: &str) -> Checked {
    Checked::on(postcopy_path(), phase)
}

fn held() -> Checked {
    let mut checked = at("hold");
    assert_eq!(checked.handle(DestinationEvent::OwedHeld), [DestinationAction::TellOwedAccepted]);
    checked
}

fn memory_lost() -> DestinationEvent {
    DestinationEvent::MemoryLost(failure(Reason::MemoryLost))
}

#[test]
fn a_migration_into_postcopy_takes_its_steps_in_order() {
    let mut checked = Checked::new();
    for (phase, event) in postcopy_path() {
        assert_eq!(checked.destination.phase(), phase);
        let state = checked.destination.state();
        assert_eq!(state == State::Postcopy, ["pull", "release"].contains(&phase), "{phase}");
        checked.handle(event);
    }
    let expected = vec![
        DestinationAction::Prepare,
        DestinationAction::StartIncoming { postcopy: true },
        DestinationAction::TellIncomingReady,
        DestinationAction::HoldOwed { pages: owed() },
        DestinationAction::TellOwedAccepted,
        DestinationAction::TellDeviceStateLoaded,
        DestinationAction::WriteCommitted,
        DestinationAction::ResumeGuest,
        DestinationAction::Pull,
        OWING,
        WHOLE,
        DestinationAction::Release,
        DestinationAction::Finish(DestinationOutcome::Running),
    ];
    assert_eq!(checked.actions, expected);
    assert_eq!(checked.destination.state(), State::Succeeded);
}

#[test]
fn a_guest_that_is_seen_to_run_once_it_has_everything_is_owed_nothing() {
    let mut checked = at("resume");
    assert!(checked.handle(DestinationEvent::Pulled).is_empty());
    let actions = checked.handle(DestinationEvent::GuestResumed);
    assert_eq!(actions, [WHOLE, DestinationAction::Release]);
}

#[test]
fn orders_out_of_order_are_a_breach_of_the_protocol() {
    let owed = || DestinationEvent::Owed { pages: owed() };
    let refused = |mut checked: Checked, order: DestinationEvent| {
        let actions = checked.handle(order.clone());
        assert!(aborts(&actions, Reason::PeerRefused), "{order:?}: {actions:?}");
        let Some(DestinationAction::WriteAborted(cause)) = actions.first() else { panic!("{actions:?}") };
        assert!(cause.message.len() < 200, "it does not list pages: {}", cause.message);
    };
    refused(Checked::at("receive_last"), owed());
    refused(Checked::at("receive"), owed());
    refused(at("incoming"), owed());
    refused(at("hold"), owed());
    refused(at("hold"), DestinationEvent::Commit);
    refused(at("loaded"), owed());
    for order in [owed(), DestinationEvent::EndRound { round: 1 }, DestinationEvent::Verify] {
        refused(held(), order);
    }
}

#[test]
fn device_state_is_not_taken_before_what_is_owed_is_held() {
    let mut checked = at("hold");
    assert!(checked.handle(DestinationEvent::DeviceStateLoaded).is_empty());
    assert_eq!(checked.destination.phase(), "hold");
}

#[test]
fn links_that_die_before_commit_abort() {
    for phase in ["hold", "loaded"] {
        assert!(aborts(&at(phase).handle(failed(Reason::LinkLost)), Reason::LinkLost), "{phase}");
    }
    assert!(aborts(&held().handle(DestinationEvent::PeerLost), Reason::PeerLost));
}

#[test]
fn a_list_that_cannot_be_held_in_time_aborts() {
    let mut checked = at("hold");
    assert!(checked.tick());
    assert_eq!(checked.destination.phase(), "abort");
    assert!(checked.now > limits::OWED);
}

#[test]
fn links_that_die_in_postcopy_are_made_again_for_as_long_as_that_takes() {
    let mut checked = at("pull");
    let since = checked.now;
    checked.handle(failed(Reason::LinkLost));
    for _ in 0..100 {
        let before = checked.now;
        checked.tick();
        checked.handle(failed(Reason::LinkLost));
        assert!(checked.now - before <= limits::RETRY_MOST);
    }
    assert_eq!(checked.times(&DestinationAction::Pull), 101);
    assert_eq!(checked.destination.trouble_since(), Some(since));
    assert_eq!(checked.destination.trouble().unwrap().reason, Reason::LinkLost);
    assert_eq!(checked.handle(DestinationEvent::AskOutcome), [OWING]);
    checked.handle(DestinationEvent::PullResumed);
    assert!(checked.destination.trouble().is_none() && checked.destination.deadline().is_none());
    assert_eq!(checked.handle(DestinationEvent::Pulled), [WHOLE, DestinationAction::Release]);
}

#[test]
fn a_source_that_is_back_is_pulled_from_soon() {
    let mut checked = at("pull");
    for _ in 0..10 {
        checked.handle(failed(Reason::LinkLost));
        checked.tick();
    }
    let pulled = checked.times(&DestinationAction::Pull);
    let before = checked.now;
    checked.handle(DestinationEvent::PeerBack);
    assert!(checked.tick());
    assert_eq!(checked.times(&DestinationAction::Pull), pulled + 1);
    assert!(checked.now - before <= limits::RETRY_FIRST);
}

#[test]
fn a_stream_that_comes_and_goes_does_not_make_it_spin() {
    let mut checked = at("pull");
    checked.handle(failed(Reason::LinkLost));
    for _ in 0..10_000 {
        checked.handle(DestinationEvent::PeerLost);
        checked.handle(DestinationEvent::PeerBack);
        checked.handle(DestinationEvent::Tick);
        checked.now += std::time::Duration::from_millis(1);
    }
    let pulled = checked.times(&DestinationAction::Pull);
    assert!((90..=102).contains(&pulled), "{pulled} in 10 s");
}

#[test]
fn a_lost_control_stream_in_postcopy_is_trouble_until_it_is_back() {
    let mut checked = at("pull");
    assert!(checked.handle(DestinationEvent::PeerLost).is_empty());
    assert_eq!(checked.destination.trouble().unwrap().reason, Reason::PeerLost);
    assert_eq!(checked.destination.deadline(), None, "pages come all the same");
    checked.handle(DestinationEvent::PeerBack);
    assert!(checked.destination.trouble().is_none());
}

#[test]
fn an_agent_restarted_in_postcopy_goes_on_pulling() {
    let mut checked = Checked::restarted_postcopy();
    let actions = checked.handle(DestinationEvent::Start);
    assert_eq!(actions, [DestinationAction::ResumeGuest, DestinationAction::Pull]);
    assert_eq!(checked.handle(DestinationEvent::GuestResumed), [OWING]);
    assert_eq!(checked.destination.state(), State::Postcopy);
    assert_eq!(checked.handle(DestinationEvent::Commit), [OWING]);
    checked.handle(DestinationEvent::Pulled);
    checked.handle(DestinationEvent::Released);
    assert_eq!(checked.destination.state(), State::Succeeded);
}

/// A VMM may answer only once a page has come, which needs a link.
#[test]
fn links_that_die_while_the_guest_resumes_are_made_again() {
    let mut checked = Checked::restarted_postcopy();
    checked.handle(DestinationEvent::Start);
    checked.handle(failed(Reason::LinkLost));
    checked.tick();
    assert_eq!(checked.times(&DestinationAction::Pull), 2);
    assert!(checked.destination.trouble().is_some());
}

#[test]
fn a_guest_whose_memory_is_lost_is_stopped_and_the_source_hears_of_it_once_that_is_recorded() {
    for phase in ["resume", "pull"] {
        let mut checked = at(phase);
        assert_eq!(checked.handle(memory_lost()), [DestinationAction::StopGuest]);
        assert_eq!(checked.destination.state(), State::Postcopy);
        assert!(checked.handle(DestinationEvent::AskOutcome).is_empty(), "neither answer would be true");
        assert!(checked.handle(DestinationEvent::GuestResumed).is_empty(), "it is stopped all the same");
        assert_eq!(checked.handle(DestinationEvent::GuestStopped), [DestinationAction::Release]);
        let ends = checked.handle(DestinationEvent::Released);
        let [DestinationAction::Finish(DestinationOutcome::Lost(cause)), answer] = &ends[..] else {
            panic!("{ends:?}")
        };
        assert_eq!(cause.reason, Reason::MemoryLost);
        assert!(matches!(answer, DestinationAction::AnswerLost(_)));
        assert_eq!(checked.destination.state(), State::Failed);
        for question in [memory_lost(), DestinationEvent::AskOutcome, DestinationEvent::Commit] {
            assert_eq!(&checked.handle(question)[..], &ends[1..]);
        }
    }
}

#[test]
fn a_guest_that_does_not_stop_has_its_vmm_ended() {
    let mut checked = at("pull");
    checked.handle(memory_lost());
    checked.handle(failed(Reason::GuestFailed));
    assert_eq!(checked.destination.trouble().unwrap().reason, Reason::GuestFailed);
    while checked.times(&DestinationAction::DiscardGuest) == 0 {
        assert!(checked.tick());
    }
    assert!(checked.times(&DestinationAction::StopGuest) > 3 && checked.now >= limits::STOP);
    let mut discarded = checked.then(&DestinationEvent::GuestDiscarded);
    discarded.handle(DestinationEvent::Released);
    assert_eq!(discarded.destination.state(), State::Failed);

    while checked.tick() {}
    assert_eq!(checked.destination.state(), State::Failed, "it is not tried for ever");
    let last = checked.actions.last();
    let by_hand = |action: &DestinationAction| match action {
        DestinationAction::AnswerLost(cause) => cause.message.contains("by hand"),
        _ => false,
    };
    assert!(last.is_some_and(by_hand), "{last:?}");
}

#[test]
fn a_guest_whose_vmm_ends_in_postcopy_is_lost_with_it_and_the_source_lets_go() {
    for phase in ["resume", "pull"] {
        let mut checked = at(phase);
        let actions = checked.handle(DestinationEvent::GuestGone(failure(Reason::GuestFailed)));
        assert_eq!(actions, [WHOLE, DestinationAction::Release], "{phase}");
    }
    let mut checked = at("pull");
    checked.handle(memory_lost());
    let actions = checked.handle(DestinationEvent::GuestGone(failure(Reason::GuestFailed)));
    assert_eq!(actions, [DestinationAction::Release], "it was told what that was");
}

#[test]
fn memory_that_is_lost_before_it_is_bound_aborts_and_after_the_last_page_hurts_nobody() {
    assert!(aborts(&held().handle(memory_lost()), Reason::MemoryLost));
    let mut checked = at("commit");
    assert!(checked.handle(memory_lost()).is_empty());
    assert!(aborts(&checked.handle(DestinationEvent::CommittedSynced), Reason::MemoryLost));

    let mut checked = at("release");
    assert_eq!(checked.handle(memory_lost()), [WHOLE]);
    checked.handle(DestinationEvent::Released);
    assert_eq!(checked.handle(memory_lost()), [WHOLE]);
}

#[test]
fn a_failure_of_the_vmm_in_postcopy_is_no_reason_to_give_its_guest_up() {
    let mut checked = at("pull");
    assert!(checked.handle(failed(Reason::GuestFailed)).is_empty());
    checked.handle(DestinationEvent::Abort(failure(Reason::Cancelled)));
    assert_eq!(checked.destination.phase(), "pull");
    assert!(Destination::recover_postcopy().trouble().is_none());
}
