use ramferry_engine::{
    BytesPerSecond, LateWrites, Parameters, Percent, Postcopy, Reason, SourceAction, SourceEvent,
};

use crate::source_harness::{
    Checked, LATE_STEPS, PAGES, POSTCOPY_STEPS, copied, cut_short, failure, fenced, good_path, harvested,
    late_path, milliseconds, pages, path_without_verify, postcopy_path, prepared, rechecked,
};

/// Every event, in every form that could make a difference.
fn events() -> Vec<SourceEvent> {
    let mut events = answers();
    events.extend([
        SourceEvent::Start,
        SourceEvent::Cancel,
        SourceEvent::ForceSwitchover,
        SourceEvent::PeerLost,
        SourceEvent::PeerBack,
        SourceEvent::DestinationRunning { memory_owed: false },
        SourceEvent::DestinationRunning { memory_owed: true },
        SourceEvent::DestinationLost(failure(Reason::MemoryLost)),
        SourceEvent::MemoryLost(failure(Reason::GuestFailed)),
        SourceEvent::DestinationAborted(failure(Reason::GuestFailed)),
        SourceEvent::GuestGone(failure(Reason::GuestFailed)),
        SourceEvent::SetParameters(Parameters::default()),
        SourceEvent::SetParameters(Parameters { max_downtime: milliseconds(0), ..Parameters::default() }),
        SourceEvent::SetParameters(Parameters {
            bandwidth_limit: Some(BytesPerSecond(1 << 20)),
            timeout: Some(milliseconds(20)),
            ..Parameters::default()
        }),
        SourceEvent::SetParameters(Parameters {
            postcopy: Postcopy::Allow,
            timeout: Some(milliseconds(1)),
            ..Parameters::default()
        }),
        SourceEvent::SetParameters(Parameters { throttle: Some(Percent(99)), ..Parameters::default() }),
        SourceEvent::ThrottleFailed(failure(Reason::ThrottleFailed)),
        SourceEvent::Tick,
        SourceEvent::LateWrites(LateWrites::Undrainable),
    ]);
    let reasons = [Reason::GuestFailed, Reason::JournalFailed, Reason::LinkLost];
    events.extend(reasons.map(|reason| SourceEvent::Failed(failure(reason))));
    events
}

/// Results of actions.
fn answers() -> Vec<SourceEvent> {
    vec![
        prepared(),
        harvested(0),
        harvested(PAGES),
        SourceEvent::Drained { complete: false },
        rechecked(PAGES),
        copied(PAGES),
        cut_short(3),
        fenced(),
        SourceEvent::RoundEnded { round: 1 },
        SourceEvent::RoundEnded { round: 2 },
        SourceEvent::GuestPaused,
        SourceEvent::Verified { equal: true },
        SourceEvent::Verified { equal: false },
        SourceEvent::OwedAccepted,
        SourceEvent::DeviceStateMoved,
        SourceEvent::HandedOverSynced,
        SourceEvent::StillOwed { bytes: 1 },
        SourceEvent::GuestResumed,
        SourceEvent::PeerAborted,
        SourceEvent::Throttled { percent: Percent(0) },
        SourceEvent::Throttled { percent: Percent(20) },
        SourceEvent::Released,
    ]
}

fn all_phases() -> Vec<&'static str> {
    good_path().iter().map(|(phase, _)| *phase).chain(LATE_STEPS).chain(POSTCOPY_STEPS).collect()
}

/// A step of the good path, and what leads on from there.
type Way = (String, fn(&str) -> Checked);

/// One source in each step that there is, endings by where they came from.
fn steps() -> Vec<Way> {
    fn ask(_: &str) -> Checked {
        after("commit", SourceEvent::PeerLost)
    }
    fn after(phase: &str, event: SourceEvent) -> Checked {
        let mut checked = Checked::at(phase);
        checked.handle(event);
        checked
    }
    fn aborted_after_commit(_: &str) -> Checked {
        after("commit", SourceEvent::DestinationAborted(failure(Reason::GuestFailed)))
    }
    fn ended(phase: &str) -> Checked {
        let mut checked = after(phase, SourceEvent::Cancel);
        while checked.tick() {}
        assert!(checked.ended().is_some());
        checked
    }
    fn ended_well(_: &str) -> Checked {
        after("release", SourceEvent::Released)
    }
    fn out_of_time(phase: &str) -> Checked {
        let (postcopy, timeout) = (Postcopy::Allow, Some(milliseconds(1)));
        let mut checked = after(
            phase,
            SourceEvent::SetParameters(Parameters { postcopy, timeout, ..Parameters::default() }),
        );
        checked.tick();
        assert_eq!(checked.actions.last(), Some(&SourceAction::StopCopy));
        checked
    }
    fn resumed(phase: &str) -> Checked {
        let mut checked = after(phase, SourceEvent::Cancel);
        checked.handle(SourceEvent::GuestResumed);
        checked
    }
    fn throttled(phase: &str) -> Checked {
        let mut checked = crate::source_throttle_cases::throttled();
        match phase {
            "harvest" => {
                crate::source_cases::end_round(&mut checked);
            }
            "pause" => {
                crate::source_cases::end_round(&mut checked);
                checked.handle(harvested(0));
            }
            _ => {}
        }
        checked
    }
    let mut steps: Vec<Way> = Vec::new();
    for phase in all_phases() {
        steps.push((phase.to_owned(), Checked::at));
    }
    for phase in ["pause", "last_copy"] {
        steps.push((phase.to_owned(), |phase| Checked::on(late_path(), phase)));
    }
    for phase in ["device_state", "last_acknowledge", "handover"] {
        steps.push((phase.to_owned(), |phase| Checked::on(path_without_verify(), phase)));
    }
    for phase in ["copy", "pause", "last_harvest", "device_state", "handover", "commit", "release"] {
        steps.push((phase.to_owned(), |phase| Checked::on(postcopy_path(), phase)));
    }
    for phase in ["copy", "harvest", "pause"] {
        steps.push((phase.to_owned(), throttled));
    }
    for phase in ["copy", "recheck"] {
        steps.push((phase.to_owned(), out_of_time));
    }
    steps.push(("serve".into(), |phase| after(phase, SourceEvent::PeerLost)));
    steps
        .push(("serve".into(), |phase| after(phase, SourceEvent::DestinationRunning { memory_owed: false })));
    steps.push(("ask".into(), |_| {
        let mut checked = ask("");
        checked.handle(SourceEvent::DestinationRunning { memory_owed: true });
        checked
    }));
    steps.push(("device_state".into(), |phase| {
        let mut checked = Checked::on(path_without_verify(), phase);
        checked.handle(SourceEvent::RoundEnded { round: 2 });
        checked
    }));
    for phase in ["copy", "harvest", "recheck", "pause", "last_recheck", "last_copy", "device_state"] {
        steps.push((phase.to_owned(), |phase| after(phase, SourceEvent::Cancel)));
        steps.push((phase.to_owned(), ended));
    }
    for phase in ["pause", "last_copy"] {
        steps.push((phase.to_owned(), resumed));
    }
    steps.push(("ask".into(), ask));
    steps.push(("aborted".into(), aborted_after_commit));
    steps.push(("ended".into(), ended_well));
    steps.push(("restarted".into(), |_| Checked::restarted_before_handover()));
    steps.push(("restarted".into(), |_| Checked::restarted_handed_over()));
    steps
}

#[test]
fn every_step_is_reached_by_the_table() {
    let mut reached: Vec<_> = steps().iter().map(|(name, make)| make(name).source.phase()).collect();
    reached.sort_unstable();
    reached.dedup();
    let mut all = all_phases();
    all.extend(["ask", "resume", "restarted", "ended"]);
    all.sort_unstable();
    assert_eq!(reached, all);
}

/// Any three events in any step. [`Checked`] has the rules.
#[test]
fn no_three_events_in_any_step_break_a_rule() {
    let events = events();
    for (name, make) in steps() {
        let begun = make(&name);
        for first in &events {
            let first = begun.then(first);
            for second in &events {
                let second = first.then(second);
                for third in &events {
                    second.then(third);
                }
            }
        }
    }
}

/// An event when a tick is overdue, and ticks alone from then on: it ends, or asks, or copies, or serves.
#[test]
fn silence_after_any_event_in_any_step_ends_or_asks() {
    for (name, make) in steps() {
        for event in events() {
            let mut checked = make(&name);
            checked.handle(event.clone());
            let actions = checked.actions.len();
            for _ in 0..1000 {
                checked.tick();
            }
            let asked = checked.actions.len() - actions;
            match checked.source.phase() {
                "ask" | "serve" | "memory_lost" => assert!(asked > 900, "{name}, {event:?}: {asked}"),
                phase => assert!(["ended", "pending", "copy"].contains(&phase), "{name}, {event:?}: {phase}"),
            }
        }
    }
}

/// Each answer moves on the step that waits for it; in any other it changes nothing.
#[test]
fn answers_that_are_not_waited_for_change_nothing() {
    for phase in all_phases() {
        for answer in answers() {
            let mut checked = Checked::at(phase);
            let actions = checked.handle(answer.clone());
            let moved = checked.source.phase() != phase || !actions.is_empty();
            assert_eq!(moved, is_waited_for(phase, &answer), "{answer:?} in {phase}: {actions:?}");
        }
    }
}

fn is_waited_for(phase: &str, answer: &SourceEvent) -> bool {
    match answer {
        SourceEvent::Prepared { .. } => phase == "prepare",
        SourceEvent::Harvested { .. } => ["harvest", "last_harvest"].contains(&phase),
        SourceEvent::Copied { .. } => ["copy", "last_copy"].contains(&phase),
        SourceEvent::Drained { .. } => phase == "drain",
        SourceEvent::Rechecked { .. } => ["recheck", "last_recheck"].contains(&phase),
        SourceEvent::Fenced { .. } => ["fence", "last_fence"].contains(&phase),
        SourceEvent::RoundEnded { round: 1 } => phase == "acknowledge",
        SourceEvent::RoundEnded { .. } => phase == "last_acknowledge",
        SourceEvent::GuestPaused => phase == "pause",
        SourceEvent::Verified { .. } => phase == "verify",
        SourceEvent::OwedAccepted => phase == "send_owed",
        SourceEvent::DeviceStateMoved => phase == "device_state",
        SourceEvent::HandedOverSynced => phase == "handover",
        SourceEvent::Released => phase == "release",
        _ => false,
    }
}

/// From the order to pause until COMMIT is sent.
pub(crate) fn switchover_steps(
    paths: &[Vec<(&'static str, SourceEvent)>],
) -> Vec<(Vec<(&'static str, SourceEvent)>, &'static str)> {
    let steps = paths.iter().flat_map(|path| {
        let switchover = path.iter().skip_while(|(phase, _)| *phase != "pause");
        let switchover = switchover.take_while(|(phase, _)| *phase != "commit");
        switchover.map(|(phase, _)| (path.clone(), *phase))
    });
    steps.collect()
}

/// Whatever goes wrong before COMMIT is sent, in any step: the guest runs here, before anything else is done.
#[test]
fn any_failure_before_commit_resumes_the_guest_first() {
    let mut faults: Vec<_> =
        Reason::ALL.into_iter().map(|reason| SourceEvent::Failed(failure(reason))).collect();
    faults.extend([
        SourceEvent::PeerLost,
        SourceEvent::DestinationAborted(failure(Reason::GuestFailed)),
        SourceEvent::DestinationRunning { memory_owed: false },
        SourceEvent::GuestGone(failure(Reason::GuestFailed)),
        SourceEvent::Cancel,
    ]);
    for (path, phase) in switchover_steps(&[late_path(), path_without_verify(), postcopy_path()]) {
        for fault in &faults {
            let mut checked = Checked::on(path.clone(), phase);
            let actions = checked.handle(fault.clone());
            if phase == "handover" && *fault == SourceEvent::Cancel {
                assert!(actions.is_empty() && !checked.source.can_cancel());
                continue;
            }
            assert_eq!(actions[0], SourceAction::ResumeGuest, "{fault:?} in {phase}");
            let tells = matches!(actions.last(), Some(SourceAction::AbortPeer(_)));
            assert_eq!(tells, !matches!(fault, SourceEvent::DestinationAborted(_)), "{fault:?} in {phase}");
        }
    }
}

#[test]
fn the_time_may_stand_still_or_jump() {
    for now in [milliseconds(0), std::time::Duration::MAX] {
        for (name, make) in steps() {
            for event in events() {
                let mut checked = make(&name);
                checked.now = now;
                checked.handle(event);
                checked.handle(SourceEvent::Tick);
            }
        }
    }
    assert_eq!(pages(3).count(), 3);
}
