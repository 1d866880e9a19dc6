//! A guest that is throttled where rounds bring no progress, and never left so.

use std::time::Duration;

use ramferry_engine::{
    Failure, Parameters, Percent, Postcopy, Reason, SourceAction, SourceEvent, State, TimeoutAction, limits,
};

use crate::source_cases::{after_first_round, end_round, reason};
use crate::source_harness::{Checked, PAGES, cut_short, failure, harvested, milliseconds, pages};

const LIFT: SourceAction = SourceAction::ThrottleGuest { percent: Percent(0) };

fn percent(percent: u8) -> SourceAction {
    SourceAction::ThrottleGuest { percent: Percent(percent) }
}

fn in_force(percent: u8) -> SourceEvent {
    SourceEvent::Throttled { percent: Percent(percent) }
}

/// A round of all pages does not fit.
fn allowed() -> Parameters {
    Parameters { max_downtime: milliseconds(1), throttle: Some(Percent(99)), ..Parameters::default() }
}

/// Rounds that bring no progress until something else than the next one is ordered; that.
fn stuck(checked: &mut Checked) -> Vec<SourceAction> {
    for _ in 0..10_000 {
        let actions = checked.handle(harvested(PAGES));
        if !matches!(actions[..], [SourceAction::Copy { .. }]) {
            return actions;
        }
        end_round(checked);
    }
    panic!("nothing but rounds");
}

fn let_all_but_the_lift_end(checked: &mut Checked) {
    for event in [cut_short(PAGES), SourceEvent::PeerAborted, SourceEvent::Released] {
        checked.handle(event);
    }
    assert_eq!(checked.source.state(), State::Cancelling);
}

/// A source in the round under its first step, which is in force.
pub(crate) fn throttled() -> Checked {
    let mut checked = after_first_round(allowed());
    let actions = stuck(&mut checked);
    assert!(
        matches!(&actions[..], [first, SourceAction::Copy { .. }] if *first == percent(20)),
        "{actions:?}"
    );
    checked.handle(in_force(20));
    checked
}

#[test]
fn without_consent_nobody_is_throttled() {
    for parameters in
        [Parameters { throttle: None, ..allowed() }, Parameters { postcopy: Postcopy::Allow, ..allowed() }]
    {
        let mut checked = after_first_round(parameters);
        stuck(&mut checked);
        assert!(!checked.actions.iter().any(|action| matches!(action, SourceAction::ThrottleGuest { .. })));
    }
}

#[test]
fn steps_go_to_the_most_that_is_allowed_and_then_it_does_not_converge() {
    let mut checked = after_first_round(allowed());
    let mut last = Duration::ZERO;
    for step in [20, 30, 40, 50, 60, 70, 80, 90, 99] {
        let actions = stuck(&mut checked);
        assert_eq!(actions[0], percent(step));
        assert!(step == 20 || checked.now - last >= limits::THROTTLE_INTERVAL);
        last = checked.now;
        checked.handle(in_force(step));
        assert_eq!(checked.source.progress().throttle, Percent(step));
        end_round(&mut checked);
    }
    let before = checked.now;
    let actions = stuck(&mut checked);
    assert!(matches!(&actions[..], [LIFT, SourceAction::AbortPeer(_), SourceAction::Release]), "{actions:?}");
    assert!(checked.now - before >= Parameters::default().no_progress_timeout - milliseconds(50));
    let_all_but_the_lift_end(&mut checked);
    assert_eq!(checked.source.state(), State::Cancelling, "it ends with its guest free, not before");
    checked.handle(in_force(0));
    assert_eq!(reason(&checked), Reason::NotConverging);
    assert_eq!(checked.source.progress().throttle_peak, Percent(99));
}

#[test]
fn a_guest_that_calms_down_keeps_its_throttle_until_its_pause() {
    let mut checked = throttled();
    end_round(&mut checked);
    assert_eq!(checked.handle(harvested(0)), [SourceAction::PauseGuest { postcopy: false }]);
    let last = [SourceAction::SaveDeviceState, SourceAction::Harvest, LIFT];
    assert_eq!(checked.handle(SourceEvent::GuestPaused), last);
    checked.handle(in_force(0));
    checked.handle(SourceEvent::Cancel);
    assert_eq!(checked.times(&LIFT), 1, "it is lifted");
}

#[test]
fn any_end_gives_the_guest_its_time_back_behind_its_resume() {
    let mut checked = throttled();
    let actions = checked.handle(SourceEvent::Cancel);
    assert!(
        matches!(&actions[..], [LIFT, SourceAction::StopCopy, SourceAction::AbortPeer(_)]),
        "{actions:?}"
    );

    let mut checked = throttled();
    end_round(&mut checked);
    checked.handle(harvested(0));
    let actions = checked.handle(SourceEvent::PeerLost);
    assert!(
        matches!(&actions[..], [SourceAction::ResumeGuest, LIFT, SourceAction::AbortPeer(_)]),
        "{actions:?}"
    );
}

#[test]
fn a_lift_that_fails_is_ordered_again_and_holds_the_end_up_for_a_while_only() {
    let mut checked = throttled();
    checked.handle(SourceEvent::Cancel);
    let_all_but_the_lift_end(&mut checked);
    let began_at = checked.now;
    while checked.ended().is_none() {
        checked.handle(SourceEvent::ThrottleFailed(failure(Reason::ThrottleFailed)));
        assert!(checked.tick());
    }
    assert!(checked.times(&LIFT) > 3);
    assert_eq!(checked.now - began_at, limits::UNDO);
}

#[test]
fn a_guest_that_cannot_be_throttled_does_not_converge_as_ever_and_the_failure_says_why() {
    let mut checked = after_first_round(allowed());
    stuck(&mut checked);
    let refused = Failure::new(Reason::ThrottleFailed, "no cpu controller");
    checked.handle(SourceEvent::ThrottleFailed(refused));
    assert_eq!(checked.source.trouble().unwrap().reason, Reason::ThrottleFailed);
    end_round(&mut checked);
    let actions = stuck(&mut checked);
    let [LIFT, SourceAction::AbortPeer(told), ..] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(told.reason, Reason::NotConverging);
    assert!(told.message.contains("no cpu controller"), "{told}");

    let forced = Parameters { timeout_action: TimeoutAction::Force, ..allowed() };
    let mut checked = after_first_round(forced);
    stuck(&mut checked);
    checked.handle(SourceEvent::ThrottleFailed(failure(Reason::ThrottleFailed)));
    end_round(&mut checked);
    assert_eq!(stuck(&mut checked), [SourceAction::PauseGuest { postcopy: false }]);
}

#[test]
fn new_parameters_loosen_the_throttle_at_once() {
    let mut checked = throttled();
    let less = Parameters { throttle: Some(Percent(10)), ..allowed() };
    assert_eq!(checked.handle(SourceEvent::SetParameters(less)), [percent(10)]);
    let postcopy = Parameters { postcopy: Postcopy::Allow, ..allowed() };
    assert_eq!(checked.handle(SourceEvent::SetParameters(postcopy)), [LIFT]);
    checked.handle(in_force(0));
    assert!(checked.handle(SourceEvent::SetParameters(Parameters::default())).is_empty());
}

#[test]
fn throttling_is_left_where_the_pause_alone_takes_too_long() {
    let mut checked = after_first_round(Parameters { max_downtime: Duration::from_millis(1), ..allowed() });
    for _ in 0..1000 {
        let slow = SourceEvent::Harvested { written: pages(PAGES), elapsed: milliseconds(9) };
        checked.handle(slow);
        if checked.source.state() != State::Precopy {
            break;
        }
        end_round(&mut checked);
    }
    assert_eq!(checked.source.state(), State::Cancelling);
    assert!(!checked.actions.iter().any(|action| matches!(action, SourceAction::ThrottleGuest { .. })));
}
