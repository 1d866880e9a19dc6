use std::time::Duration;

use ramferry_engine::{
    BytesPerSecond, DowntimeParts, LateWrites, Outcome, Parameters, Reason, SourceAction, SourceEvent, State,
    TimeoutAction, limits,
};

use crate::source_harness::{
    Checked, PAGE_BYTES, PAGES, copied, cut_short, failure, fenced, good_path, harvested, milliseconds,
    pages, path_without_verify, postcopy_path, prepared, rechecked,
};
use crate::source_table::switchover_steps;

/// Tight enough that only an idle guest converges.
pub(crate) fn tight() -> Parameters {
    Parameters { max_downtime: milliseconds(1), ..Parameters::default() }
}

/// Begins a migration, and ends its first round.
pub(crate) fn after_first_round(parameters: Parameters) -> Checked {
    let mut checked = Checked::new(parameters);
    checked.handle(SourceEvent::Start);
    checked.handle(prepared());
    end_round(&mut checked);
    checked
}

/// Copies, fences and acknowledges the round under way, 20 ms after it began.
pub(crate) fn end_round(checked: &mut Checked) {
    let round = checked.source.progress().round;
    checked.now += milliseconds(20);
    checked.handle(copied(PAGES));
    checked.handle(fenced());
    checked.handle(SourceEvent::RoundEnded { round });
}

pub(crate) fn reason(checked: &Checked) -> Reason {
    match checked.ended() {
        Some(Outcome::Failed(failure) | Outcome::Lost(failure)) => failure.reason,
        other => panic!("{other:?}"),
    }
}

/// Answers everything that an ending waits for.
pub(crate) fn let_end(checked: &mut Checked) {
    for event in
        [cut_short(PAGES), SourceEvent::GuestResumed, SourceEvent::PeerAborted, SourceEvent::Released]
    {
        checked.handle(event);
    }
    assert!(checked.ended().is_some(), "{:?}", checked.actions);
}

#[test]
fn a_migration_that_goes_well_takes_its_steps_in_order() {
    let mut checked = Checked::at("release");
    checked.handle(SourceEvent::Released);
    let expected = vec![
        SourceAction::Prepare,
        SourceAction::Copy { round: 1, pages: pages(PAGES) },
        SourceAction::Fence,
        SourceAction::EndRound { round: 1 },
        SourceAction::Harvest,
        SourceAction::PauseGuest { postcopy: false },
        SourceAction::Harvest,
        SourceAction::Copy { round: 2, pages: pages(2) },
        SourceAction::Fence,
        SourceAction::EndRound { round: 2 },
        SourceAction::Verify,
        SourceAction::SaveDeviceState,
        SourceAction::MoveDeviceState,
        SourceAction::WriteHandedOver,
        SourceAction::SendCommit,
        SourceAction::Release,
        SourceAction::Finish(Outcome::Succeeded),
    ];
    assert_eq!(checked.actions, expected);
    assert_eq!(checked.source.state(), State::Succeeded);
}

#[test]
fn downtime_is_the_sum_of_its_parts() {
    let mut checked = Checked::new(Parameters { verify: true, ..Parameters::default() });
    for (index, (phase, event)) in good_path().into_iter().enumerate() {
        assert_eq!(checked.source.phase(), phase);
        let step = if phase == "wait" { limits::ROUND_INTERVAL } else { milliseconds(index as u64) / 10 };
        checked.now += step;
        checked.handle(event);
    }
    let progress = checked.source.progress();
    let sum: Duration = progress
        .downtime_parts
        .named()
        .iter()
        .filter(|(name, _)| *name != "pause")
        .map(|(_, part)| *part)
        .sum();
    assert_eq!(progress.downtime, Some(sum));
    assert_eq!(progress.downtime_parts.pause, milliseconds(7) / 10);
    assert_eq!(progress.downtime_parts.commit, milliseconds(15) / 10);
    assert!(DowntimeParts::default().named().iter().all(|(_, part)| part.is_zero()));
    assert!(progress.total_time > progress.downtime);
    assert_eq!(progress.verified, Some(true));
}

/// Ends a migration that does not compare RAM, 2 ms a step from the last fence on, with `steps` in between.
fn parts_of(steps: [SourceEvent; 2]) -> DowntimeParts {
    let mut checked = Checked::on(path_without_verify(), "last_fence");
    let actions = checked.handle(fenced());
    assert_eq!(actions, [SourceAction::EndRound { round: 2 }, SourceAction::MoveDeviceState]);
    let [first, second] = steps;
    checked.now += milliseconds(2);
    assert!(checked.handle(first).is_empty(), "HANDED_OVER before both are there");
    checked.now += milliseconds(2);
    assert_eq!(checked.handle(second), [SourceAction::WriteHandedOver]);
    for event in [SourceEvent::HandedOverSynced, SourceEvent::DestinationRunning { memory_owed: false }] {
        checked.now += milliseconds(2);
        checked.handle(event);
    }
    let progress = checked.source.progress();
    assert_eq!(progress.downtime, Some(milliseconds(8)));
    let sum: Duration = progress.downtime_parts.named().iter().map(|(_, part)| *part).sum();
    assert_eq!(sum, milliseconds(8), "no time is in two parts, none in no part");
    progress.downtime_parts
}

#[test]
fn the_acknowledgement_goes_beside_the_device_state_and_counts_what_it_took_longer() {
    let (acknowledged, moved) = (SourceEvent::RoundEnded { round: 2 }, SourceEvent::DeviceStateMoved);
    let parts = parts_of([acknowledged.clone(), moved.clone()]);
    assert_eq!((parts.device_state, parts.acknowledge), (milliseconds(4), Duration::ZERO));
    let parts = parts_of([moved, acknowledged]);
    assert_eq!((parts.device_state, parts.acknowledge), (milliseconds(2), milliseconds(2)));
}

#[test]
fn an_acknowledgement_of_an_earlier_round_does_not_hand_over() {
    let mut checked = Checked::on(path_without_verify(), "device_state");
    checked.handle(SourceEvent::RoundEnded { round: 1 });
    assert!(checked.handle(SourceEvent::DeviceStateMoved).is_empty());
    assert!(checked.handle(SourceEvent::RoundEnded { round: 1 }).is_empty());
    assert_eq!(checked.handle(SourceEvent::RoundEnded { round: 2 }), [SourceAction::WriteHandedOver]);
}

#[test]
fn rounds_go_on_while_the_guest_dirties_too_much_and_end_when_it_calms_down() {
    let mut checked = after_first_round(tight());
    for round in 2..5 {
        let actions = checked.handle(harvested(PAGES));
        assert_eq!(actions, [SourceAction::Copy { round, pages: pages(PAGES) }]);
        assert_eq!(checked.source.state(), State::Precopy);
        end_round(&mut checked);
    }
    assert_eq!(checked.handle(harvested(1)), [SourceAction::PauseGuest { postcopy: false }]);
    let progress = checked.source.progress();
    assert_eq!(progress.rounds.len(), 4);
    assert_eq!(progress.rounds[0].dirtied_bytes, PAGES * PAGE_BYTES);
    assert_eq!(progress.redirtied_bytes, (3 * PAGES + 1) * PAGE_BYTES);
    assert!(progress.dirty_rate.is_some() && progress.throughput.is_some());
    assert!(progress.expected_downtime.unwrap() <= milliseconds(1));
}

#[test]
fn pages_of_a_round_cut_short_are_owed_to_the_next() {
    let mut checked = Checked::new(tight());
    checked.handle(SourceEvent::Start);
    checked.handle(prepared());
    checked.now += milliseconds(20);
    checked.handle(cut_short(PAGES));
    checked.handle(fenced());
    checked.handle(SourceEvent::RoundEnded { round: 1 });
    let actions = checked.handle(harvested(3));
    assert_eq!(actions, [SourceAction::Copy { round: 2, pages: pages(PAGES) }]);
}

#[test]
fn pages_harvested_before_the_pause_are_in_the_last_round() {
    let mut checked = after_first_round(Parameters::default());
    assert_eq!(checked.handle(harvested(PAGES)), [SourceAction::PauseGuest { postcopy: false }]);
    checked.handle(SourceEvent::GuestPaused);
    let actions = checked.handle(harvested(0));
    assert_eq!(actions, [SourceAction::Copy { round: 2, pages: pages(PAGES) }]);
}

/// All pages were copied in 20 ms, and the harvest is due that tells what was written in 300 ms.
fn after_a_slow_first_round(late_writes: LateWrites) -> Checked {
    let mut checked = Checked::new(Parameters { max_downtime: milliseconds(100), ..Parameters::default() });
    checked.handle(SourceEvent::Start);
    if late_writes != LateWrites::None {
        checked.handle(SourceEvent::LateWrites(late_writes));
    }
    checked.handle(prepared());
    checked.now += milliseconds(300);
    checked.handle(SourceEvent::Copied {
        data_bytes: PAGES * PAGE_BYTES,
        zero_bytes: 0,
        elapsed: milliseconds(20),
        complete: true,
        unsent: pages(0),
    });
    checked.handle(fenced());
    checked.handle(SourceEvent::RoundEnded { round: 1 });
    checked
}

#[test]
fn a_round_more_is_made_for_a_shorter_pause_and_none_where_the_switchover_is_forced() {
    let pause = [SourceAction::PauseGuest { postcopy: false }];
    let mut checked = after_a_slow_first_round(LateWrites::None);
    assert_eq!(checked.then(&SourceEvent::ForceSwitchover).handle(harvested(60)), pause);
    assert_eq!(checked.handle(harvested(60)), [SourceAction::Copy { round: 2, pages: pages(60) }]);
    assert_eq!(checked.source.state(), State::Precopy);
    end_round(&mut checked);
    assert_eq!(checked.handle(harvested(1)), pause);
}

#[test]
fn no_round_more_is_made_whose_pages_would_have_to_be_rechecked() {
    let mut checked = after_a_slow_first_round(LateWrites::Undrainable);
    checked.handle(harvested(1));
    checked.handle(rechecked(0));
    checked.now += milliseconds(300);
    end_round(&mut checked);
    assert_eq!(checked.handle(harvested(60)), [SourceAction::PauseGuest { postcopy: false }]);
}

#[test]
fn a_last_round_cut_short_is_a_failure() {
    let mut checked = Checked::at("last_copy");
    assert_eq!(checked.handle(cut_short(1))[0], SourceAction::ResumeGuest);
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::Internal);
}

#[test]
fn harvests_of_a_quiet_guest_are_spaced_out() {
    let mut checked = Checked::at("wait");
    assert_eq!(checked.source.deadline(), Some(milliseconds(1) + limits::ROUND_INTERVAL));
    assert!(checked.handle(SourceEvent::Tick).is_empty());
    assert_eq!(checked.handle(SourceEvent::ForceSwitchover), [SourceAction::Harvest]);
}

#[test]
fn a_guest_that_never_calms_down_does_not_converge() {
    let mut checked = after_first_round(tight());
    let mut rounds = 0;
    while checked.source.state() == State::Precopy {
        checked.handle(harvested(PAGES));
        if checked.source.state() == State::Precopy {
            end_round(&mut checked);
        }
        rounds += 1;
        assert!(rounds < 1000);
    }
    assert_eq!(checked.source.state(), State::Cancelling);
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::NotConverging);
    assert_eq!(checked.times(&SourceAction::ResumeGuest), 0, "it was never paused");
}

#[test]
fn a_guest_that_never_calms_down_is_switched_over_where_that_was_asked_for() {
    let mut checked = after_first_round(Parameters { timeout_action: TimeoutAction::Force, ..tight() });
    for _ in 0..1000 {
        if checked.handle(harvested(PAGES)) == [SourceAction::PauseGuest { postcopy: false }] {
            return;
        }
        end_round(&mut checked);
    }
    panic!("it never switched over");
}

#[test]
fn a_forced_switchover_comes_after_the_round_under_way() {
    let mut checked = Checked::new(tight());
    checked.handle(SourceEvent::Start);
    checked.handle(SourceEvent::ForceSwitchover);
    checked.handle(prepared());
    assert!(checked.handle(SourceEvent::ForceSwitchover).is_empty());
    checked.handle(copied(PAGES));
    checked.handle(fenced());
    assert_eq!(checked.handle(SourceEvent::RoundEnded { round: 1 }), [SourceAction::Harvest]);
    assert_eq!(checked.handle(harvested(PAGES)), [SourceAction::PauseGuest { postcopy: false }]);
}

#[test]
fn the_timeout_ends_a_round_that_takes_too_long() {
    let parameters = Parameters { timeout: Some(milliseconds(500)), ..tight() };
    let mut checked = Checked::new(parameters);
    checked.handle(SourceEvent::Start);
    checked.handle(prepared());
    assert_eq!(checked.source.deadline(), Some(milliseconds(501)));
    checked.now = milliseconds(501);
    let actions = checked.handle(SourceEvent::Tick);
    assert!(matches!(&actions[..], [SourceAction::StopCopy, SourceAction::AbortPeer(_)]), "{actions:?}");
    assert_eq!(checked.handle(cut_short(PAGES)), [SourceAction::Release]);
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::Timeout);
}

#[test]
fn the_timeout_forces_a_switchover_where_that_was_asked_for() {
    let parameters =
        Parameters { timeout: Some(milliseconds(500)), timeout_action: TimeoutAction::Force, ..tight() };
    let mut checked = Checked::new(parameters);
    checked.handle(SourceEvent::Start);
    checked.handle(prepared());
    checked.now = milliseconds(501);
    assert!(checked.handle(SourceEvent::Tick).is_empty());
    assert_eq!(checked.source.deadline(), None);
    end_round(&mut checked);
    assert_eq!(checked.handle(harvested(PAGES)), [SourceAction::PauseGuest { postcopy: false }]);
}

#[test]
fn the_last_round_is_not_held_to_the_bandwidth_limit() {
    let limit = Some(BytesPerSecond(1 << 30));
    let mut checked = Checked::new(Parameters { bandwidth_limit: limit, ..Parameters::default() });
    checked.handle(SourceEvent::Start);
    assert_eq!(checked.handle(prepared())[0], SourceAction::SetBandwidthLimit(limit));
    end_round(&mut checked);
    checked.handle(harvested(1));
    checked.handle(SourceEvent::GuestPaused);
    let actions = checked.handle(harvested(1));
    assert!(matches!(&actions[..], [SourceAction::SetBandwidthLimit(None), SourceAction::Copy { .. }]));
}

#[test]
fn new_parameters_count_from_the_next_decision_and_bad_ones_never() {
    let mut checked = after_first_round(tight());
    let limit = Some(BytesPerSecond(1 << 30));
    let limited = Parameters { bandwidth_limit: limit, ..Parameters::default() };
    let actions = checked.handle(SourceEvent::SetParameters(limited.clone()));
    assert_eq!(actions, [SourceAction::SetBandwidthLimit(limit)]);
    assert!(checked.handle(SourceEvent::SetParameters(limited)).is_empty());
    let bad = Parameters { max_downtime: Duration::ZERO, ..Parameters::default() };
    assert!(checked.handle(SourceEvent::SetParameters(bad)).is_empty());
    assert_eq!(checked.handle(harvested(PAGES)), [SourceAction::PauseGuest { postcopy: false }]);
}

#[test]
fn cancel_while_the_guest_is_being_paused_resumes_it_at_once() {
    let mut checked = Checked::at("pause");
    let actions = checked.handle(SourceEvent::Cancel);
    assert!(matches!(&actions[..], [SourceAction::ResumeGuest, SourceAction::AbortPeer(_)]), "{actions:?}");
    assert_eq!(checked.source.state(), State::Cancelling);
    let again = checked.handle(SourceEvent::GuestPaused);
    assert_eq!(again, [SourceAction::ResumeGuest], "the pause may have come after the resume");
    let_end(&mut checked);
    assert_eq!(checked.ended(), Some(&Outcome::Cancelled));
}

#[test]
fn a_pause_that_fails_half_way_resumes_the_guest() {
    let mut checked = Checked::at("pause");
    assert_eq!(
        checked.handle(SourceEvent::Failed(failure(Reason::GuestFailed)))[0],
        SourceAction::ResumeGuest
    );
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::GuestFailed);
}

#[test]
fn a_guest_that_does_not_resume_is_resumed_until_it_does() {
    let mut checked = Checked::at("last_copy");
    checked.handle(SourceEvent::Failed(failure(Reason::LinkLost)));
    checked.handle(cut_short(1));
    for _ in 0..5 {
        checked.handle(SourceEvent::Failed(failure(Reason::GuestFailed)));
        assert!(checked.source.trouble().is_some());
        let ordered = checked.times(&SourceAction::ResumeGuest);
        while checked.times(&SourceAction::ResumeGuest) == ordered {
            assert!(checked.tick());
        }
    }
    assert_eq!(checked.times(&SourceAction::Release), 0, "nothing is let go before the guest runs");
    assert_eq!(checked.handle(SourceEvent::GuestResumed), [SourceAction::Release]);
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::LinkLost);
}

#[test]
fn a_guest_that_never_resumes_is_named_in_the_end() {
    let mut checked = Checked::at("last_copy");
    checked.handle(SourceEvent::Cancel);
    while checked.tick() {}
    assert_eq!(reason(&checked), Reason::GuestFailed);
    assert!(checked.now >= limits::RESUME && checked.now < limits::RESUME * 2);
}

#[test]
fn differing_ram_resumes_the_source() {
    let mut checked = Checked::at("verify");
    assert_eq!(checked.handle(SourceEvent::Verified { equal: false })[0], SourceAction::ResumeGuest);
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::VerifyFailed);
    assert_eq!(checked.source.progress().verified, Some(false));
}

#[test]
fn each_step_of_the_switchover_has_a_limit() {
    for (path, phase) in switchover_steps(&[good_path(), path_without_verify(), postcopy_path()]) {
        let mut checked = Checked::on(path, phase);
        checked.tick();
        assert_eq!(checked.source.phase(), "resume", "{phase}");
        let_end(&mut checked);
        assert_eq!(reason(&checked), Reason::StepTimeout, "{phase}");
    }
}

#[test]
fn peer_lost_after_pause_resumes_guest() {
    let mut checked = Checked::at("device_state");
    assert_eq!(checked.handle(SourceEvent::PeerLost)[0], SourceAction::ResumeGuest);
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::PeerLost);
}

#[test]
fn a_journal_that_fails_before_commit_resumes_guest_and_commit_is_never_sent() {
    let mut checked = Checked::at("handover");
    assert_eq!(
        checked.handle(SourceEvent::Failed(failure(Reason::JournalFailed)))[0],
        SourceAction::ResumeGuest
    );
    assert!(checked.handle(SourceEvent::HandedOverSynced).is_empty(), "an answer that is too late");
    let_end(&mut checked);
    assert_eq!(checked.times(&SourceAction::SendCommit), 0);
}

#[test]
fn peer_lost_after_commit_asks_until_it_is_answered() {
    let mut checked = Checked::at("commit");
    assert!(checked.handle(SourceEvent::PeerLost).is_empty());
    for _ in 0..100 {
        let before = checked.now;
        checked.tick();
        assert!(checked.now - before <= limits::RETRY_MOST);
    }
    assert_eq!(checked.times(&SourceAction::AskOutcome), 100);
    checked.now += limits::RETRY_FIRST;
    assert_eq!(checked.handle(SourceEvent::PeerBack), [SourceAction::AskOutcome]);
    assert!(checked.handle(SourceEvent::Cancel).is_empty());
    assert_eq!(checked.source.trouble().unwrap().reason, Reason::PeerLost);
    assert_eq!(
        checked.handle(SourceEvent::DestinationRunning { memory_owed: false }),
        [SourceAction::Release]
    );
    let_end(&mut checked);
    assert_eq!(checked.ended(), Some(&Outcome::Succeeded));
}

/// A driver may report PeerBack when its question opened a stream: that must not be a reason to ask again at once.
#[test]
fn a_stream_that_comes_back_again_and_again_is_asked_at_intervals() {
    let mut checked = Checked::at("commit");
    checked.handle(SourceEvent::PeerLost);
    for _ in 0..10_000 {
        checked.handle(SourceEvent::PeerBack);
        checked.handle(SourceEvent::Tick);
        checked.now += milliseconds(1);
    }
    let asked = checked.times(&SourceAction::AskOutcome);
    assert!((90..=101).contains(&asked), "{asked} in 10 s");
}

#[test]
fn a_destination_that_aborted_after_commit_gives_the_guest_back() {
    let mut checked = Checked::at("commit");
    let actions = checked.handle(SourceEvent::DestinationAborted(failure(Reason::JournalFailed)));
    assert_eq!(actions, [SourceAction::ResumeGuest]);
    assert_eq!(checked.handle(SourceEvent::GuestResumed), [SourceAction::Release]);
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::DestinationAborted);
    assert_eq!(checked.source.progress().downtime, None);
}

#[test]
fn a_commit_that_is_not_answered_is_asked_about() {
    let mut checked = Checked::at("commit");
    assert!(checked.handle(SourceEvent::Tick).is_empty());
    checked.now += limits::COMMIT_ANSWER;
    assert_eq!(checked.handle(SourceEvent::Tick), [SourceAction::AskOutcome]);
}

#[test]
fn an_agent_restarted_after_handover_asks_and_leaves_the_guest_alone() {
    let mut checked = Checked::restarted_handed_over();
    assert_eq!(checked.handle(SourceEvent::Start), [SourceAction::AskOutcome]);
    assert!(checked.handle(SourceEvent::PeerLost).is_empty());
    assert!(checked.handle(SourceEvent::Failed(failure(Reason::Internal))).is_empty());
    assert_eq!(
        checked.handle(SourceEvent::DestinationRunning { memory_owed: false }),
        [SourceAction::Release]
    );
}

#[test]
fn an_agent_restarted_before_handover_resumes_guest() {
    let mut checked = Checked::restarted_before_handover();
    let actions = checked.handle(SourceEvent::Start);
    assert!(matches!(&actions[..], [SourceAction::ResumeGuest, SourceAction::AbortPeer(_)]));
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::AgentRestarted);
}

#[test]
fn cancel_before_the_start_needs_nothing_undone() {
    let mut checked = Checked::new(Parameters::default());
    assert_eq!(checked.handle(SourceEvent::Cancel), [SourceAction::Finish(Outcome::Cancelled)]);
}

#[test]
fn parameters_are_checked() {
    assert!(ramferry_engine::Source::new(Parameters { max_downtime: Duration::ZERO, ..tight() }).is_err());
}

#[test]
fn a_guest_whose_vmm_ended_in_the_switchover_is_not_resumed_for_ever() {
    let mut checked = Checked::at("last_copy");
    checked.handle(SourceEvent::Failed(failure(Reason::GuestFailed)));
    checked.handle(SourceEvent::GuestGone(failure(Reason::GuestFailed)));
    for event in [cut_short(PAGES), SourceEvent::PeerAborted, SourceEvent::Released] {
        checked.handle(event);
    }
    assert_eq!(reason(&checked), Reason::GuestFailed);
    assert_eq!(checked.times(&SourceAction::ResumeGuest), 1);
}

#[test]
fn a_cancel_that_finds_the_vmm_ended_does_not_say_that_the_guest_runs_on() {
    let mut checked = Checked::at("pause");
    checked.handle(SourceEvent::Cancel);
    checked.handle(SourceEvent::GuestGone(failure(Reason::GuestFailed)));
    for event in [SourceEvent::PeerAborted, SourceEvent::Released] {
        checked.handle(event);
    }
    assert_eq!(reason(&checked), Reason::GuestFailed);
}
