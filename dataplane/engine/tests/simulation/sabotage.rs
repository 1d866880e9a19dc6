//! The checks find what they are for: each rule of who may run the guest, broken on purpose, is seen to matter in
//! some schedule.

use ramferry_engine::{LateWrites, Postcopy};

use crate::checker::Violation;
use crate::faults::{Fault, Injection, Sabotage};
use crate::schedules::{RANDOM_RUNS, random_injections, world};
use crate::world::World;

fn run(seed: u64, injections: Vec<Injection>, sabotage: Sabotage) -> Option<Violation> {
    let mut world = World::new(seed, false, injections, sabotage);
    world.run();
    world.checker.violations.first().copied()
}

/// Whether some schedule of at most one fault shows `violation`.
fn one_fault_shows(sabotage: Sabotage, violation: Violation) -> bool {
    (0..200).any(|step| Injection::all_at(step).any(|one| run(1, vec![one], sabotage) == Some(violation)))
}

/// The same, of a migration into post-copy.
fn one_fault_in_postcopy_shows(sabotage: Sabotage, violation: Violation) -> bool {
    let shows = |one| {
        let world = World::new(4, false, vec![one], sabotage);
        let mut world = world.with_postcopy(4, false, Postcopy::Always);
        world.run();
        world.checker.violations.first() == Some(&violation)
    };
    (0..200).any(|step| Injection::all_at(step).any(shows))
}

#[test]
fn a_restarted_destination_that_forgets_what_is_owed_is_caught() {
    assert!(one_fault_in_postcopy_shows(Sabotage::ForgetOwed, Violation::Differs));
}

#[test]
fn a_page_that_counts_as_in_place_before_it_is_there_is_caught() {
    assert!(one_fault_in_postcopy_shows(Sabotage::ClearBeforeBytes, Violation::Differs));
}

#[test]
fn a_throttle_that_is_not_lifted_is_caught() {
    let shows = |seed: u64| {
        let world = World::new(seed, false, vec![], Sabotage::ForgetThrottle);
        let mut world = world.with_throttle(seed, false);
        world.run();
        world.checker.violations.first() == Some(&Violation::LeftThrottled)
    };
    assert!((0..200).any(shows));
}

/// Also by the search over random schedules.
#[test]
fn random_schedules_catch_a_destination_that_forgets_what_is_owed() {
    let shows =
        |seed| run_as(seed, random_injections(seed), Sabotage::ForgetOwed) == Some(Violation::Differs);
    let seed = (0..RANDOM_RUNS).find(|seed| shows(*seed));
    eprintln!("it is seen with seed {}", seed.expect("it is seen"));
}

/// As the schedules run it.
fn run_as(seed: u64, injections: Vec<Injection>, sabotage: Sabotage) -> Option<Violation> {
    let mut world = world(seed, injections, sabotage);
    world.run();
    world.checker.violations.first().copied()
}

#[test]
fn a_destination_that_resumes_before_committed_is_durable_is_caught() {
    assert!(one_fault_shows(Sabotage::ResumeBeforeCommitted, Violation::BothRun));
}

#[test]
fn a_source_that_resumes_when_its_peer_is_lost_after_commit_is_caught() {
    assert!(one_fault_shows(Sabotage::ResumeOnPeerLost, Violation::BothRun));
}

#[test]
fn a_commit_without_handed_over_is_caught() {
    assert!(one_fault_shows(Sabotage::CommitWithoutHandedOver, Violation::BothRun));
}

#[test]
fn a_handed_over_that_is_not_synced_is_caught() {
    assert!(one_fault_shows(Sabotage::UnsyncedHandedOver, Violation::BothRun));
}

#[test]
fn a_committed_that_is_not_synced_is_caught() {
    assert!(one_fault_shows(Sabotage::UnsyncedCommitted, Violation::GuestLost));
}

/// Not only by trying everything: the search over random schedules comes upon each breach of the commit rule, too.
#[test]
fn random_schedules_catch_a_broken_commit_rule() {
    for sabotage in [
        Sabotage::CommitWithoutHandedOver,
        Sabotage::UnsyncedHandedOver,
        Sabotage::ResumeOnPeerLost,
        Sabotage::ResumeBeforeCommitted,
    ] {
        let caught = (0..RANDOM_RUNS).find(|seed| {
            let shown = run(*seed, random_injections(*seed), sabotage);
            shown == Some(Violation::BothRun)
        });
        let seed = caught.unwrap_or_else(|| panic!("{sabotage:?} is not seen"));
        eprintln!("{sabotage:?} is seen with seed {seed}");
    }
}

#[test]
fn a_source_that_never_asks_is_caught() {
    assert!(
        one_fault_shows(Sabotage::NeverAsk, Violation::Unfinished)
            || one_fault_shows(Sabotage::NeverAsk, Violation::NeitherRuns)
    );
}

#[test]
fn a_last_harvest_that_is_skipped_is_caught() {
    assert!((0..50).any(|seed| run(seed, vec![], Sabotage::SkipLastHarvest) == Some(Violation::Differs)));
}

#[test]
fn a_fence_that_is_skipped_is_caught() {
    assert!((0..500).any(|seed| run(seed, vec![], Sabotage::SkipFence) == Some(Violation::Differs)));
}

#[test]
fn device_state_that_is_loaded_before_zero_pages_are_applied_is_caught() {
    let shows = |seed| run(seed, vec![], Sabotage::LoadBeforeZeroPages) == Some(Violation::Differs);
    assert!((0..200).any(shows));
}

fn late_differs(late: LateWrites, sabotage: Sabotage) -> bool {
    (0..200).any(|seed| {
        let mut world = World::new(seed, false, vec![], sabotage);
        world.late = late;
        world.run();
        world.checker.violations.first() == Some(&Violation::Differs)
    })
}

#[test]
fn a_recheck_that_is_skipped_is_caught() {
    for late in [LateWrites::Drainable, LateWrites::Undrainable] {
        assert!(late_differs(late, Sabotage::SkipRecheck));
        assert!(!late_differs(late, Sabotage::None));
    }
}

#[test]
fn a_drain_that_did_not_wait_is_caught() {
    assert!(late_differs(LateWrites::Drainable, Sabotage::LieAboutDrain));
}

/// Takes two faults: COMMITTED is durable although its write failed, then the agent restarts.
#[test]
fn a_destination_that_says_aborted_before_that_is_durable_is_caught() {
    let fails = |step| Injection::before(step, Fault::Fail { had_effect: true });
    let crashes = |step| Injection::before(step, Fault::CrashDestination { record_survives: true });
    let shows = |seed, step, later| {
        let faults = vec![fails(step), crashes(later)];
        run(seed, faults, Sabotage::AbortWithoutRecord) == Some(Violation::BothRun)
    };
    assert!((0..10).any(|seed| (0..60).any(|step| (step..step + 8).any(|later| shows(seed, step, later)))));
}
