use ramferry_engine::{DestinationAction, DestinationEvent, Reason, State};

use crate::destination_harness::{
    Checked, failed, failure, good_path, owed, path_without_verify, postcopy_path,
};

/// Every event, in every form that could make a difference.
fn events() -> Vec<DestinationEvent> {
    let mut events = vec![
        DestinationEvent::Start,
        DestinationEvent::Prepared,
        DestinationEvent::EndRound { round: 1 },
        DestinationEvent::EndRound { round: 2 },
        DestinationEvent::EndRound { round: 3 },
        DestinationEvent::RoundDrained { round: 1 },
        DestinationEvent::RoundDrained { round: 2 },
        DestinationEvent::PrepareIncoming { postcopy: false },
        DestinationEvent::PrepareIncoming { postcopy: true },
        DestinationEvent::IncomingReady,
        DestinationEvent::Owed { pages: owed() },
        DestinationEvent::OwedHeld,
        DestinationEvent::Verify,
        DestinationEvent::Verified,
        DestinationEvent::DeviceStateLoaded,
        DestinationEvent::Commit,
        DestinationEvent::AskOutcome,
        DestinationEvent::Abort(failure(Reason::Cancelled)),
        DestinationEvent::PeerLost,
        DestinationEvent::PeerBack,
        DestinationEvent::CommittedSynced,
        DestinationEvent::AbortedSynced,
        DestinationEvent::GuestResumed,
        DestinationEvent::GuestGone(failure(Reason::GuestFailed)),
        DestinationEvent::PullResumed,
        DestinationEvent::Pulled,
        DestinationEvent::MemoryLost(failure(Reason::MemoryLost)),
        DestinationEvent::GuestStopped,
        DestinationEvent::GuestDiscarded,
        DestinationEvent::Released,
        DestinationEvent::Tick,
    ];
    let reasons = [Reason::GuestFailed, Reason::JournalFailed, Reason::LinkLost];
    events.extend(reasons.map(failed));
    events
}

/// Where to begin, and what to go on with.
type Way = (fn() -> Checked, Vec<DestinationEvent>);

/// How to come to each step that there is.
fn steps() -> Vec<Way> {
    let mut steps: Vec<Way> = Vec::new();
    let path: Vec<_> = good_path().into_iter().map(|(_, event)| event).collect();
    steps.extend((0..=path.len()).map(|count| (Checked::new as fn() -> Checked, path[..count].to_vec())));

    let path: Vec<_> = path_without_verify().into_iter().map(|(_, event)| event).collect();
    steps.extend((8..=path.len()).map(|count| (Checked::new as fn() -> Checked, path[..count].to_vec())));

    let path: Vec<_> = postcopy_path().into_iter().map(|(_, event)| event).collect();
    steps.extend((3..=path.len()).map(|count| (Checked::new as fn() -> Checked, path[..count].to_vec())));
    let memory_lost = DestinationEvent::MemoryLost(failure(Reason::MemoryLost));
    let stopped = DestinationEvent::GuestStopped;
    for begin in [pulling as fn() -> Checked, resuming, Checked::restarted_postcopy] {
        steps.push((begin, vec![failed(Reason::LinkLost), DestinationEvent::PeerLost]));
        steps.push((begin, vec![DestinationEvent::Start, memory_lost.clone()]));
        steps.push((begin, vec![DestinationEvent::Pulled]));
    }
    steps.push((pulling, vec![memory_lost.clone(), stopped.clone()]));
    steps.push((pulling, vec![memory_lost, stopped, DestinationEvent::Released]));
    steps.push((unstoppable, vec![]));

    let lost = vec![DestinationEvent::PeerLost];
    let synced = [lost.clone(), vec![DestinationEvent::AbortedSynced]].concat();
    let ended = [synced.clone(), vec![DestinationEvent::GuestDiscarded, DestinationEvent::Released]].concat();
    steps.extend([lost, synced, ended].map(|events| (loaded as fn() -> Checked, events)));

    for veto in [DestinationEvent::Abort(failure(Reason::Cancelled)), failed(Reason::GuestFailed)] {
        steps.push((committing, vec![veto.clone()]));
        steps.push((committing, vec![veto, DestinationEvent::CommittedSynced]));
    }
    steps.push((committing, vec![failed(Reason::JournalFailed)]));
    steps.push((committing, vec![failed(Reason::JournalFailed); 2]));
    steps.push((committing, vec![DestinationEvent::CommittedSynced, failed(Reason::GuestFailed)]));
    steps.push((Checked::restarted_prepared, vec![]));
    steps.push((Checked::restarted_committed, vec![]));
    steps.push((Checked::restarted_aborted, vec![]));
    steps
}

fn loaded() -> Checked {
    Checked::at("loaded")
}

fn pulling() -> Checked {
    Checked::on(postcopy_path(), "pull")
}

fn resuming() -> Checked {
    Checked::on(postcopy_path(), "resume")
}

/// Its VMM is being ended, because it did not stop.
fn unstoppable() -> Checked {
    let mut checked = pulling();
    checked.handle(DestinationEvent::MemoryLost(failure(Reason::MemoryLost)));
    while checked.times(&DestinationAction::DiscardGuest) == 0 {
        assert!(checked.tick());
    }
    checked
}

fn committing() -> Checked {
    Checked::at("commit")
}

fn reach((begin, events): &Way) -> Checked {
    let mut checked = begin();
    for event in events {
        checked.handle(event.clone());
    }
    checked
}

#[test]
fn every_step_is_reached_by_the_table() {
    let mut reached: Vec<_> = steps().iter().map(|step| reach(step).destination.phase()).collect();
    reached.sort_unstable();
    reached.dedup();
    let mut all: Vec<_> = good_path().iter().map(|(phase, _)| *phase).collect();
    all.extend(["abort", "discard", "restarted", "ended", "hold", "pull", "stop"]);
    all.sort_unstable();
    all.dedup();
    assert_eq!(reached, all);
}

/// Any three events in any step. [`Checked`] has the rules.
#[test]
fn no_three_events_in_any_step_break_a_rule() {
    let events = events();
    for step in &steps() {
        let begun = reach(step);
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

/// From any step, after any event, ticks alone: it ends, or waits for the source, or for a record, or for memory.
#[test]
fn silence_after_any_event_in_any_step_leaves_nothing_undecided() {
    for step in &steps() {
        for event in events() {
            let mut checked = reach(step);
            checked.handle(event.clone());
            for _ in 0..1000 {
                checked.tick();
            }
            let phase = checked.destination.phase();
            let rests = [
                "pending",
                "receive",
                "receive_last",
                "loaded",
                "commit",
                "abort",
                "resume",
                "pull",
                "ended",
            ];
            assert!(rests.contains(&phase), "{event:?}: {phase}");
            let links =
                checked.destination.trouble().is_some_and(|trouble| trouble.reason != Reason::PeerLost);
            if phase == "pull" && links {
                assert!(checked.times(&DestinationAction::Pull) > 900);
            }
            if phase == "resume" {
                // Where links are down as well, one tick in two is theirs.
                let resumed = checked.times(&DestinationAction::ResumeGuest);
                assert!(resumed > 400 && resumed + checked.times(&DestinationAction::Pull) > 900);
            }
        }
    }
}

/// The source's question and COMMIT are answered in any step, once what they wait for is there.
#[test]
fn commit_and_ask_are_always_answered_in_the_end() {
    for step in &steps() {
        for question in [DestinationEvent::Commit, DestinationEvent::AskOutcome] {
            let mut checked = reach(step);
            checked.actions.clear();
            checked.handle(question.clone());
            for answer in [
                DestinationEvent::CommittedSynced,
                DestinationEvent::AbortedSynced,
                DestinationEvent::GuestResumed,
                DestinationEvent::GuestStopped,
                DestinationEvent::Released,
            ] {
                checked.handle(answer);
            }
            checked.tick();
            checked.handle(DestinationEvent::AbortedSynced);
            let answered = checked.actions.iter().any(|action| {
                matches!(
                    action,
                    DestinationAction::AnswerRunning { .. }
                        | DestinationAction::AnswerAborted(_)
                        | DestinationAction::AnswerLost(_)
                )
            });
            assert!(answered, "{question:?}: {:?}", checked.actions);
        }
    }
}

#[test]
fn states_follow_the_steps() {
    let states: Vec<_> =
        (0..=good_path().len()).map(|steps| Checked::after(steps).destination.state()).collect();
    assert_eq!(states[0], State::Pending);
    assert_eq!(states[1], State::Preparing);
    assert!(states[2..5].iter().all(|state| *state == State::Precopy));
    assert!(states[5..15].iter().all(|state| *state == State::SwitchingOver));
    assert_eq!(states[15], State::Succeeded);
}
