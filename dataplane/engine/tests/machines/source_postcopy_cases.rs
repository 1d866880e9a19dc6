use std::time::Duration;

use ramferry_engine::{
    LateWrites, Outcome, Parameters, Postcopy, Reason, SourceAction, SourceEvent, State, TimeoutAction,
    limits,
};

use crate::source_cases::{after_first_round, end_round, let_end, reason, tight};
use crate::source_harness::{
    Checked, PAGE_BYTES, PAGES, copied, cut_short, failure, fenced, harvested, late_path, milliseconds,
    pages, postcopy_path, prepared, rechecked,
};
use crate::source_late_cases::{before_settle, but};

const PAUSE: SourceAction = SourceAction::PauseGuest { postcopy: true };
const OWING: SourceEvent = SourceEvent::DestinationRunning { memory_owed: true };
const WHOLE: SourceEvent = SourceEvent::DestinationRunning { memory_owed: false };

/// Only an idle guest converges, and any other leaves by post-copy.
fn allowed() -> Parameters {
    Parameters { postcopy: Postcopy::Allow, ..tight() }
}

fn out_of_time() -> Parameters {
    Parameters { timeout: Some(milliseconds(500)), ..allowed() }
}

/// Pauses the guest, which wrote `written` pages since; what the destination is owed.
fn owed(checked: &mut Checked, written: u64) -> ramferry_ram::PageSets {
    checked.handle(SourceEvent::GuestPaused);
    match &checked.handle(harvested(written))[..] {
        [SourceAction::SendOwed { pages }] => pages.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_migration_into_postcopy_takes_its_steps_in_order() {
    let mut checked = Checked::new(Parameters { postcopy: Postcopy::Always, verify: true, ..tight() });
    let mut states = Vec::new();
    let path = postcopy_path().into_iter().filter(|(_, event)| !matches!(event, SourceEvent::LateWrites(_)));
    for (index, (phase, event)) in path.take_while(|(phase, _)| *phase != "serve").enumerate() {
        assert_eq!(checked.source.phase(), phase);
        states.push(checked.source.state());
        let step = if phase == "wait" { limits::ROUND_INTERVAL } else { milliseconds(index as u64) };
        checked.now += step;
        checked.handle(event);
    }
    assert_eq!(checked.source.state(), State::Postcopy);
    checked.handle(SourceEvent::StillOwed { bytes: PAGE_BYTES });
    assert_eq!(checked.source.progress().remaining_bytes, PAGE_BYTES);
    checked.now += milliseconds(250);
    assert_eq!(checked.handle(WHOLE), [SourceAction::Release]);
    assert_eq!(checked.source.state(), State::Postcopy);
    checked.handle(SourceEvent::Released);
    let expected = vec![
        SourceAction::Prepare,
        SourceAction::Copy { round: 1, pages: pages(PAGES) },
        SourceAction::Fence,
        SourceAction::EndRound { round: 1 },
        SourceAction::Harvest,
        PAUSE,
        SourceAction::Harvest,
        SourceAction::SendOwed { pages: pages(2) },
        SourceAction::SaveDeviceState,
        SourceAction::MoveDeviceState,
        SourceAction::WriteHandedOver,
        SourceAction::SendCommit,
        SourceAction::Release,
        SourceAction::Finish(Outcome::Succeeded),
    ];
    assert_eq!(checked.actions, expected);

    let progress = checked.source.progress();
    assert!(progress.postcopy && progress.remaining_bytes == 0);
    assert_eq!(progress.postcopy_time, Some(milliseconds(250)));
    assert_eq!(progress.verified, None);
    let parts = progress.downtime_parts;
    let sum: Duration = parts.named().iter().map(|(_, part)| *part).sum();
    assert_eq!(progress.downtime, Some(sum - parts.pause));
    assert_eq!(
        (parts.harvest, parts.owed, parts.device_state),
        (milliseconds(8), milliseconds(9), milliseconds(10))
    );
    assert!(progress.total_time.unwrap() + milliseconds(250) < checked.now);
}

#[test]
fn a_guest_that_never_calms_down_leaves_by_postcopy_where_that_is_allowed() {
    for timeout_action in [TimeoutAction::Cancel, TimeoutAction::Force] {
        let mut checked = after_first_round(Parameters { timeout_action, ..allowed() });
        let mut rounds = 0;
        while checked.handle(harvested(PAGES)) != [PAUSE] {
            end_round(&mut checked);
            rounds += 1;
            assert!(rounds < 1000);
        }
        assert_eq!(rounds, 1, "one round that brought no progress is enough");
        assert_eq!(owed(&mut checked, 2), pages(PAGES));
    }
}

#[test]
fn a_guest_that_calms_down_needs_no_postcopy() {
    let mut checked = after_first_round(allowed());
    checked.handle(harvested(PAGES));
    end_round(&mut checked);
    assert_eq!(checked.handle(harvested(1)), [SourceAction::PauseGuest { postcopy: false }]);
}

#[test]
fn a_forced_switchover_leads_into_postcopy_only_where_it_would_take_too_long() {
    for (written, postcopy) in [(1, false), (PAGES, true)] {
        let mut checked = after_first_round(allowed());
        checked.handle(SourceEvent::ForceSwitchover);
        assert_eq!(checked.handle(harvested(written)), [SourceAction::PauseGuest { postcopy }]);
    }
}

#[test]
fn the_timeout_cuts_the_round_short_and_what_it_did_not_send_is_owed() {
    let mut checked = Checked::new(out_of_time());
    checked.handle(SourceEvent::Start);
    checked.handle(prepared());
    checked.now = milliseconds(501);
    assert_eq!(checked.handle(SourceEvent::Tick), [SourceAction::StopCopy]);
    assert_eq!(checked.source.deadline(), None, "it is told once");
    assert_eq!(checked.handle(cut_short(9)), [SourceAction::Fence], "what it sent must be placed");
    checked.handle(fenced());
    assert_eq!(checked.handle(SourceEvent::RoundEnded { round: 1 }), [SourceAction::Harvest], "at once");
    assert_eq!(checked.handle(harvested(3)), [PAUSE]);
    assert_eq!(owed(&mut checked, 12), pages(12));
}

#[test]
fn the_timeout_ends_a_forced_round_that_takes_too_long() {
    let mut checked = Checked::new(out_of_time());
    checked.handle(SourceEvent::Start);
    checked.handle(prepared());
    checked.handle(SourceEvent::ForceSwitchover);
    checked.now = milliseconds(501);
    assert_eq!(checked.handle(SourceEvent::Tick), [SourceAction::StopCopy]);
}

#[test]
fn a_timeout_before_the_first_round_leaves_without_one() {
    let mut checked = Checked::new(out_of_time());
    checked.handle(SourceEvent::Start);
    checked.now = milliseconds(501);
    assert!(checked.handle(SourceEvent::Tick).is_empty());
    assert_eq!(checked.handle(prepared()), [PAUSE]);
    assert_eq!(owed(&mut checked, 0), pages(PAGES));
}

#[test]
fn consent_that_is_withdrawn_after_the_timeout_leaves_the_timeout_action() {
    let mut checked = Checked::new(out_of_time());
    checked.handle(SourceEvent::Start);
    checked.handle(prepared());
    checked.now = milliseconds(501);
    checked.handle(SourceEvent::Tick);
    let postcopy = Postcopy::Never;
    checked.handle(SourceEvent::SetParameters(Parameters { postcopy, ..out_of_time() }));
    checked.tick();
    assert_eq!(checked.source.state(), State::Cancelling);
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::Timeout);
}

#[test]
fn what_is_not_settled_is_owed_and_nothing_is_settled_for_it() {
    let mut checked = before_settle(allowed(), LateWrites::Drainable);
    checked.handle(SourceEvent::ForceSwitchover);
    assert_eq!(checked.handle(harvested(3)), [PAUSE]);
    assert_eq!(owed(&mut checked, 0), pages(PAGES), "all that was sent");

    let mut checked = before_settle(allowed(), LateWrites::Drainable);
    assert_eq!(checked.handle(harvested(0)), [SourceAction::DrainGuest]);
    checked.handle(SourceEvent::Drained { complete: true });
    checked.handle(rechecked(0));
    end_round(&mut checked);
    checked.handle(SourceEvent::ForceSwitchover);
    assert_eq!(checked.handle(harvested(60)), [PAUSE]);
    assert_eq!(owed(&mut checked, 0), pages(60), "the rest is settled");

    let always = Parameters { postcopy: Postcopy::Always, ..tight() };
    let mut checked = before_settle(always, LateWrites::Undrainable);
    assert_eq!(checked.handle(harvested(0)), [PAUSE]);
}

#[test]
fn the_timeout_cuts_a_settle_short_and_all_it_was_to_settle_is_owed() {
    let settling = || {
        let mut checked = before_settle(out_of_time(), LateWrites::Drainable);
        assert_eq!(checked.handle(harvested(0)), [SourceAction::DrainGuest]);
        checked
    };
    let mut checked = settling();
    checked.now = milliseconds(501);
    assert!(checked.handle(SourceEvent::Tick).is_empty());
    assert_eq!(checked.handle(SourceEvent::Drained { complete: true }), [PAUSE]);
    assert_eq!(owed(&mut checked, 2), pages(PAGES));

    let mut checked = settling();
    assert_eq!(
        checked.handle(SourceEvent::Drained { complete: true }),
        [SourceAction::Recheck { pages: but(PAGES, 0) }]
    );
    checked.now = milliseconds(501);
    assert_eq!(checked.handle(SourceEvent::Tick), [SourceAction::StopCopy]);
    assert_eq!(checked.handle(rechecked(1)), [PAUSE]);
    assert_eq!(owed(&mut checked, 0), pages(PAGES));
}

#[test]
fn where_nothing_is_owed_in_the_end_the_switchover_is_an_ordinary_one() {
    let mut checked = after_first_round(Parameters { postcopy: Postcopy::Always, ..tight() });
    assert_eq!(checked.handle(harvested(0)), [PAUSE]);
    checked.handle(SourceEvent::GuestPaused);
    assert_eq!(checked.handle(harvested(0)), [SourceAction::Copy { round: 2, pages: pages(0) }]);
    checked.handle(copied(0));
    checked.handle(fenced());
    checked.handle(SourceEvent::RoundEnded { round: 2 });
    assert_eq!(checked.handle(SourceEvent::DeviceStateMoved), [SourceAction::WriteHandedOver]);
    assert!(!checked.source.progress().postcopy);
}

fn serving() -> Checked {
    Checked::at("serve")
}

#[test]
fn a_stream_that_ends_in_postcopy_is_made_again_for_as_long_as_that_takes() {
    let mut checked = serving();
    let since = checked.now;
    assert!(checked.handle(SourceEvent::PeerLost).is_empty());
    for _ in 0..100 {
        let before = checked.now;
        checked.tick();
        assert!(checked.now - before <= limits::RETRY_MOST);
    }
    assert_eq!(checked.times(&SourceAction::Reconnect), 100);
    assert_eq!(checked.source.state(), State::Postcopy);
    assert_eq!(checked.source.trouble().unwrap().reason, Reason::PeerLost);
    assert_eq!(checked.source.trouble_since(), Some(since), "not since the last of the failures");
    checked.handle(SourceEvent::Failed(failure(Reason::LinkLost)));
    assert_eq!(checked.source.trouble_since(), Some(since));
    checked.now += limits::RETRY_FIRST;
    assert_eq!(checked.handle(SourceEvent::PeerBack), [SourceAction::Reconnect]);
    checked.handle(OWING);
    assert!(checked.source.trouble().is_none() && checked.source.trouble_since().is_none());
    assert_eq!(checked.handle(WHOLE), [SourceAction::Release]);
    let_end(&mut checked);
    assert_eq!(checked.ended(), Some(&Outcome::Succeeded));
}

#[test]
fn a_destination_that_falls_silent_in_postcopy_is_asked_how_far_it_is() {
    let mut checked = serving();
    checked.now += limits::SERVE_SILENCE - milliseconds(1);
    checked.handle(SourceEvent::StillOwed { bytes: 1 });
    assert!(checked.handle(SourceEvent::Tick).is_empty());
    checked.now += limits::SERVE_SILENCE;
    assert_eq!(checked.handle(SourceEvent::Tick), [SourceAction::Reconnect]);
}

#[test]
fn in_postcopy_nothing_brings_the_guest_back() {
    for event in [
        SourceEvent::Cancel,
        SourceEvent::GuestGone(failure(Reason::GuestFailed)),
        SourceEvent::DestinationAborted(failure(Reason::GuestFailed)),
        SourceEvent::GuestPaused,
        SourceEvent::ForceSwitchover,
    ] {
        let mut checked = serving();
        assert!(!checked.source.can_cancel());
        assert!(checked.handle(event.clone()).is_empty(), "{event:?}");
        assert_eq!(checked.source.phase(), "serve", "{event:?}");
    }
}

#[test]
fn memory_that_is_lost_is_told_until_the_destination_has_stopped_its_guest() {
    let mut checked = serving();
    let told = checked.handle(SourceEvent::MemoryLost(failure(Reason::Internal)));
    assert!(matches!(&told[..], [SourceAction::TellMemoryLost(lost)] if lost.reason == Reason::MemoryLost));
    for _ in 0..100 {
        checked.handle(SourceEvent::PeerLost);
        checked.handle(OWING);
        checked.tick();
    }
    assert!(checked.times(&told[0]) > 50);
    assert_eq!(checked.source.trouble().unwrap().reason, Reason::MemoryLost);
    let stopped = SourceEvent::DestinationLost(failure(Reason::MemoryLost));
    assert_eq!(checked.handle(stopped), [SourceAction::Release]);
    assert!(checked.handle(SourceEvent::GuestPaused).is_empty(), "it is not resumed here");
    assert!(!checked.source.can_cancel());
    checked.handle(SourceEvent::Released);
    assert!(matches!(checked.ended(), Some(Outcome::Lost(lost)) if lost.reason == Reason::MemoryLost));
    assert_eq!(checked.times(&SourceAction::ResumeGuest), 0);
}

#[test]
fn memory_that_is_lost_after_the_last_page_arrived_hurts_nobody() {
    let mut checked = serving();
    checked.handle(SourceEvent::MemoryLost(failure(Reason::Internal)));
    checked.handle(WHOLE);
    let_end(&mut checked);
    assert_eq!(checked.ended(), Some(&Outcome::Succeeded));
}

#[test]
fn memory_that_is_lost_in_doubt_is_told_once_the_guest_runs_there() {
    let mut checked = Checked::on(postcopy_path(), "commit");
    assert!(checked.handle(SourceEvent::MemoryLost(failure(Reason::Internal))).is_empty());
    assert!(matches!(&checked.handle(OWING)[..], [SourceAction::TellMemoryLost(_)]));
}

#[test]
fn an_agent_restarted_in_postcopy_serves_again() {
    let mut checked = Checked::restarted_handed_over();
    checked.handle(SourceEvent::Start);
    assert_eq!(checked.handle(OWING), [SourceAction::Reconnect]);
    assert_eq!(checked.source.state(), State::Postcopy);
    checked.handle(OWING);
    assert!(checked.source.trouble().is_none());
    let gone = checked.handle(SourceEvent::MemoryLost(failure(Reason::GuestFailed)));
    assert!(matches!(&gone[..], [SourceAction::TellMemoryLost(_)]), "{gone:?}");
}

#[test]
fn an_agent_restarted_after_the_guest_was_stopped_learns_of_it() {
    let mut checked = Checked::restarted_handed_over();
    checked.handle(SourceEvent::Start);
    checked.handle(SourceEvent::DestinationLost(failure(Reason::MemoryLost)));
    checked.handle(SourceEvent::Released);
    assert_eq!(reason(&checked), Reason::MemoryLost);
}

#[test]
fn a_list_that_is_not_accepted_resumes_the_guest() {
    let mut checked = Checked::at("send_owed");
    checked.tick();
    assert_eq!(checked.source.phase(), "resume");
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::StepTimeout);
}

/// Late writes or not, a guest that must not go into post-copy does what it did.
#[test]
fn without_consent_nothing_leads_into_postcopy() {
    let mut checked = Checked::on(late_path(), "release");
    checked.handle(SourceEvent::Released);
    let into = checked.actions.iter().find(|action| ["send_owed", "reconnect"].contains(&action.name()));
    assert_eq!(into, None);
    assert!(!checked.source.progress().postcopy && checked.source.progress().postcopy_time.is_none());
}
