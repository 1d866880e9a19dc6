use ramferry_engine::{LateWrites, Outcome, Parameters, Reason, SourceAction, SourceEvent, State};

use crate::source_cases::{end_round, let_end, reason, tight};
use crate::source_harness::{
    Checked, PAGE_BYTES, PAGES, harvested, late_path, milliseconds, pages, prepared, rechecked,
};

/// A migration of a guest whose disks fill pages late, as far as its first settle.
pub(crate) fn before_settle(parameters: Parameters, late: LateWrites) -> Checked {
    let mut checked = Checked::new(parameters);
    checked.handle(SourceEvent::Start);
    checked.handle(SourceEvent::LateWrites(late));
    checked.handle(prepared());
    end_round(&mut checked);
    checked
}

pub(crate) fn but(all: u64, without: u64) -> ramferry_ram::PageSets {
    let mut rest = pages(all);
    rest.subtract(&pages(without));
    rest
}

#[test]
fn a_guest_that_drains_settles_before_its_pause_and_has_nothing_left_to_recheck_in_it() {
    let mut checked = before_settle(Parameters::default(), LateWrites::Drainable);
    assert_eq!(checked.handle(harvested(3)), [SourceAction::DrainGuest]);
    assert_eq!(checked.source.state(), State::Precopy);
    let recheck = SourceAction::Recheck { pages: but(PAGES, 3) };
    assert_eq!(checked.handle(SourceEvent::Drained { complete: true }), [recheck]);
    let copy = SourceAction::Copy { round: 2, pages: pages(5) };
    assert_eq!(checked.handle(rechecked(5)), [copy]);
    assert_eq!(checked.source.progress().late_bytes, 5 * PAGE_BYTES);
    end_round(&mut checked);
    assert_eq!(checked.handle(harvested(1)), [SourceAction::PauseGuest { postcopy: false }]);
    checked.handle(SourceEvent::GuestPaused);
    assert_eq!(checked.handle(harvested(2)), [SourceAction::Copy { round: 3, pages: pages(2) }]);
    assert_eq!(checked.source.phase(), "last_copy");
}

#[test]
fn rounds_after_a_settle_are_rechecked_at_the_pause_and_no_others() {
    let settle = |checked: &mut Checked, elapsed| {
        assert_eq!(checked.handle(harvested(0)), [SourceAction::DrainGuest]);
        checked.handle(SourceEvent::Drained { complete: true });
        let checked_bytes = PAGES * PAGE_BYTES;
        checked.handle(SourceEvent::Rechecked { differing: pages(0), checked_bytes, elapsed });
        end_round(checked);
        let copy = checked.handle(harvested(PAGES));
        assert!(matches!(copy[..], [SourceAction::Copy { .. }]), "it does not fit the downtime: {copy:?}");
        end_round(checked);
    };
    let mut checked = before_settle(tight(), LateWrites::Drainable);
    settle(&mut checked, milliseconds(64));
    // To recheck what was sent since would take longer than the downtime: it settles once more.
    settle(&mut checked, milliseconds(1) / 10);
    assert_eq!(checked.handle(harvested(0)), [SourceAction::PauseGuest { postcopy: false }]);
    checked.handle(SourceEvent::GuestPaused);
    assert_eq!(checked.handle(harvested(2)), [SourceAction::Recheck { pages: but(PAGES, 2) }]);
}

#[test]
fn without_a_drain_everything_is_rechecked_at_the_pause_and_counted_in_the_downtime() {
    for (late, answer) in [
        (LateWrites::Undrainable, None),
        (LateWrites::Drainable, Some(SourceEvent::Drained { complete: false })),
    ] {
        let mut checked = before_settle(Parameters::default(), late);
        checked.handle(harvested(1));
        answer.into_iter().for_each(|answer| drop(checked.handle(answer)));
        assert_eq!(checked.source.phase(), "recheck");
        checked.handle(SourceEvent::Rechecked {
            differing: pages(0),
            checked_bytes: PAGES * PAGE_BYTES,
            elapsed: milliseconds(40),
        });
        end_round(&mut checked);
        assert_eq!(checked.handle(harvested(0)), [SourceAction::PauseGuest { postcopy: false }]);
        assert!(checked.source.progress().expected_downtime.unwrap() >= milliseconds(40));
        checked.handle(SourceEvent::GuestPaused);
        let actions = checked.handle(harvested(2));
        assert_eq!(actions, [SourceAction::Recheck { pages: but(PAGES, 2) }]);
        checked.now += milliseconds(9);
        assert_eq!(checked.handle(rechecked(4)), [SourceAction::Copy { round: 3, pages: pages(4) }]);
        assert_eq!(checked.source.progress().downtime_parts.recheck, milliseconds(9));
    }
}

#[test]
fn a_recheck_that_takes_longer_than_the_downtime_does_not_converge_and_says_so() {
    let parameters = Parameters {
        max_downtime: milliseconds(5),
        no_progress_timeout: milliseconds(1),
        ..Parameters::default()
    };
    let mut checked = before_settle(parameters, LateWrites::Undrainable);
    checked.handle(harvested(0));
    checked.handle(SourceEvent::Rechecked {
        differing: pages(0),
        checked_bytes: PAGES * PAGE_BYTES,
        elapsed: milliseconds(400),
    });
    for _ in 0..3 {
        end_round(&mut checked);
        checked.handle(harvested(0));
    }
    let_end(&mut checked);
    assert_eq!(reason(&checked), Reason::NotConverging);
    let Some(Outcome::Failed(failure)) = checked.ended() else { panic!("it failed") };
    assert!(failure.message.contains("recheck"), "{}", failure.message);
}

#[test]
fn a_forced_switchover_settles_first() {
    let mut checked = before_settle(tight(), LateWrites::Drainable);
    checked.handle(SourceEvent::ForceSwitchover);
    assert_eq!(checked.handle(harvested(PAGES)), [SourceAction::DrainGuest]);
    checked.handle(SourceEvent::Drained { complete: true });
    checked.handle(rechecked(0));
    end_round(&mut checked);
    assert_eq!(checked.handle(harvested(PAGES)), [SourceAction::PauseGuest { postcopy: false }]);
}

#[test]
fn a_writer_that_comes_up_after_a_settle_has_its_pages_rechecked() {
    let mut checked = before_settle(tight(), LateWrites::Drainable);
    checked.handle(harvested(0));
    checked.handle(SourceEvent::Drained { complete: true });
    let (differing, checked_bytes) = (pages(0), PAGES * PAGE_BYTES);
    checked.handle(SourceEvent::Rechecked { differing, checked_bytes, elapsed: milliseconds(1) / 10 });
    end_round(&mut checked);
    checked.handle(SourceEvent::LateWrites(LateWrites::Undrainable));
    checked.handle(harvested(PAGES));
    end_round(&mut checked);
    checked.handle(harvested(0));
    assert_eq!(checked.source.phase(), "pause");
    checked.handle(SourceEvent::GuestPaused);
    assert_eq!(checked.handle(harvested(0)), [SourceAction::Recheck { pages: pages(PAGES) }]);
}

#[test]
fn a_recheck_is_cut_short_by_a_cancel_and_waited_for() {
    for phase in ["recheck", "last_recheck"] {
        let mut checked = Checked::on(late_path(), phase);
        let actions = checked.handle(SourceEvent::Cancel);
        assert!(actions.contains(&SourceAction::StopCopy), "{actions:?}");
        checked.handle(SourceEvent::GuestResumed);
        assert_eq!(checked.times(&SourceAction::Release), 0);
        assert_eq!(checked.handle(rechecked(0)), [SourceAction::Release]);
    }
}
