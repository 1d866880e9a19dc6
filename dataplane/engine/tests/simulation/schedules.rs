//! Faults, one at a time and several, everywhere.

use std::time::Duration;

use ramferry_engine::{LateWrites, Outcome, Percent, Postcopy};

use crate::checker::Violation;
use crate::faults::{Fault, Injection, Random, Sabotage};
use crate::journal::Record;
use crate::world::World;

/// Seeds of the migrations that single faults are put into: different guests' writes, delays and coincidences.
const SEEDS: [u64; 5] = [1, 2, 3, 4, 9];
/// Runs with several random faults; more with RAMFERRY_SIMULATION_RUNS, from RAMFERRY_SIMULATION_SEED on.
pub(crate) const RANDOM_RUNS: u64 = 10_000;
/// Of all pairs of faults around the commit, one in so many is tried; each with RAMFERRY_SIMULATION_PAIRS=all.
const PAIRS_STRIDE: usize = 13;

/// How to see a failure again where every schedule of a test is the same in each run.
const THIS_TEST: &str = "run this test again; it tries the same schedules in the same order";

/// Runs with one seed that failed once.
const SAVED_SEEDS: [u64; 0] = [];

/// Guests of two in three seeds have disks that fill pages late.
fn late_writes(seed: u64) -> LateWrites {
    match seed % 3 {
        0 => LateWrites::Drainable,
        1 => LateWrites::None,
        _ => LateWrites::Undrainable,
    }
}

/// Of five seeds two may lead into post-copy, or are to.
fn postcopy(seed: u64) -> Postcopy {
    match seed % 5 {
        3 => Postcopy::Allow,
        4 => Postcopy::Always,
        _ => Postcopy::Never,
    }
}

/// Of five seeds two never lead into post-copy, and may have their guest throttled.
fn is_throttled(seed: u64) -> bool {
    matches!(seed % 5, 1 | 2)
}

/// A migration as its seed has it.
pub(crate) fn world(seed: u64, injections: Vec<Injection>, sabotage: Sabotage) -> World {
    let verify = seed.is_multiple_of(2);
    let world = World::new(seed, verify, injections, sabotage);
    let mut world = if is_throttled(seed) {
        world.with_throttle(seed, verify)
    } else {
        world.with_postcopy(seed, verify, postcopy(seed))
    };
    world.late = late_writes(seed);
    world
}

fn run(seed: u64, injections: Vec<Injection>) -> World {
    let mut world = world(seed, injections, Sabotage::None);
    world.run();
    world
}

/// All faults at `step` of a migration of this seed.
fn injections_at(seed: u64, step: u32) -> impl Iterator<Item = Injection> {
    let in_postcopy = Injection::in_postcopy_at(step).filter(move |_| postcopy(seed) != Postcopy::Never);
    Injection::all_at(step).chain(in_postcopy)
}

fn require_sound(world: &World, seed: u64, replay: &str) {
    let violations = &world.checker.violations;
    let trace = || world.checker.trace.join("\n");
    assert!(
        violations.is_empty(),
        "seed {seed}, {:?}:\n{}\n{violations:?}\nreplay: {replay}",
        world.injections,
        trace()
    );
}

/// Actions of a migration without faults.
fn steps(seed: u64) -> u32 {
    run(seed, vec![]).steps
}

#[test]
fn without_faults_the_guest_moves() {
    let (mut long_ones, mut postcopies, mut waited, mut throttled) = (0, 0, 0, 0);
    for seed in 0..200 {
        let world = run(seed, vec![]);
        require_sound(&world, seed, THIS_TEST);
        assert_eq!(world.source.outcome, Some(Outcome::Succeeded));
        assert!(world.destination_vmm.running);
        long_ones += u32::from(world.steps > 30);
        postcopies += u32::from(world.source.progress().postcopy);
        waited += world.owed.waited;
        throttled += u32::from(world.source.progress().throttle_peak > Percent(0));
    }
    assert!(long_ones > 50, "{long_ones} of several rounds");
    eprintln!("{throttled} with their guest throttled");
    assert!(throttled > 20, "{throttled} with their guest throttled");
    eprintln!("{postcopies} into post-copy, in which guests waited {waited} times");
    assert!(postcopies > 60 && waited > postcopies, "{postcopies} into post-copy, waited {waited} times");
}

/// Every fault at every action, before, early and late in it. Where the guest stays, the next migration moves it.
#[test]
fn any_single_fault_leaves_one_guest_and_a_retry_succeeds() {
    let (mut runs, mut moved, mut stayed, mut lost) = (0, 0, 0, 0);
    for seed in SEEDS {
        for step in 0..steps(seed) + 4 {
            for injection in injections_at(seed, step) {
                let mut world = run(seed, vec![injection]);
                require_sound(&world, seed, THIS_TEST);
                runs += 1;
                if !world.source_vmm.running {
                    moved += 1;
                    lost += u32::from(world.source.says_lost());
                    continue;
                }
                stayed += 1;
                world.again(seed.is_multiple_of(2));
                world.run();
                require_sound(&world, seed, THIS_TEST);
                assert_eq!(world.source.outcome, Some(Outcome::Succeeded), "retry of {injection:?}");
            }
        }
    }
    eprintln!("{runs} runs: the guest moved in {moved}, stayed in {stayed} and moved on the retry");
    eprintln!("{lost} of those that moved lost their memory on their way");
    assert!(lost > 10);
    assert!(runs > 5000 && moved > 1000 && stayed > 1000);
}

/// The action of a run without faults at which the source is told to write HANDED_OVER.
fn handover(seed: u64) -> u32 {
    let world = run(seed, vec![]);
    let line = world.checker.trace.iter().find(|line| line.contains("WriteHandedOver")).unwrap();
    let number = line.split('#').nth(1).unwrap().split(' ').next().unwrap();
    number.parse().unwrap()
}

/// Pairs of faults, of those that bear on it, from just before HANDED_OVER to the end.
#[test]
fn any_two_faults_around_the_commit_leave_one_guest() {
    let all = std::env::var("RAMFERRY_SIMULATION_PAIRS").is_ok_and(|pairs| pairs == "all");
    let stride = if all { 1 } else { PAIRS_STRIDE };
    let (mut pairs, mut runs) = (0, 0);
    for seed in [1, 2, 4] {
        let first = handover(seed) - 2;
        let injections: Vec<_> = (first..first + 18).flat_map(|step| injections_at(seed, step)).collect();
        let bears = |injection: &&Injection| !matches!(injection.fault, Fault::Force | Fault::CutLinks);
        for one in injections.iter().filter(bears).filter(|one| one.step < first + 9) {
            for two in injections.iter().filter(bears).filter(|two| two.step >= one.step) {
                pairs += 1;
                if pairs % stride == 0 {
                    require_sound(&run(seed, vec![*one, *two]), seed, THIS_TEST);
                    runs += 1;
                }
            }
        }
    }
    eprintln!("{runs} of {pairs} pairs");
}

/// From 2 to 6 faults: anywhere, or, in every other schedule, from just before HANDED_OVER on. Most of those
/// that come earlier end the migration before it is there.
pub(crate) fn random_injections(seed: u64) -> Vec<Injection> {
    let mut random = Random(seed ^ 0x5eed);
    let count = 2 + random.below(5);
    let (first, steps) = if random.chance(2) { (handover(seed) - 3, 16) } else { (0, 20 + random.below(60)) };
    (0..count)
        .map(|_| {
            let step = first + random.below(steps) as u32;
            let mut all: Vec<_> = injections_at(seed, step).collect();
            all.swap_remove(random.below(all.len() as u64) as usize)
        })
        .collect()
}

fn number(variable: &str) -> Option<u64> {
    let given = std::env::var(variable).ok()?;
    Some(given.parse().unwrap_or_else(|_| panic!("{variable} is {given:?}: give a number")))
}

#[test]
fn random_faults_leave_one_guest() {
    let asked_for = number("RAMFERRY_SIMULATION_SEED");
    let first = asked_for.unwrap_or(0);
    let runs =
        number("RAMFERRY_SIMULATION_RUNS").unwrap_or(if asked_for.is_some() { 1 } else { RANDOM_RUNS });
    let (mut moved, mut steps) = (0, 0);
    for seed in SAVED_SEEDS.into_iter().chain(first..first + runs) {
        let world = run(seed, random_injections(seed));
        let replay = format!(
            "RAMFERRY_SIMULATION_SEED={seed} cargo test -p ramferry-engine --test simulation random_faults"
        );
        require_sound(&world, seed, &replay);
        moved += u32::from(!world.source_vmm.running);
        steps += u64::from(world.steps);
    }
    eprintln!("{runs} schedules from seed {first}, {steps} steps: the guest moved in {moved}");
    let stayed = runs - u64::from(moved);
    assert!(
        runs < RANDOM_RUNS || (u64::from(moved) > runs / 10 && stayed > runs / 10),
        "both ends are tried"
    );
}

/// COMMIT was not sent: the guest runs on at the source, although its journal says HANDED_OVER.
#[test]
fn peer_lost_between_handed_over_and_commit_resumes_the_source_and_a_restart_keeps_it_there() {
    let step = handover(1);
    let slow = Injection::before(step, Fault::Slow);
    let lost = Injection::before(step, Fault::LongCrashDestination);
    let world = run(1, vec![slow, lost]);
    require_sound(&world, 1, THIS_TEST);
    assert!(world.source_vmm.running && !world.commit_sent);
    assert!(
        world.now < Duration::from_secs(400) && world.source.journal.records.contains(&Record::HandedOver)
    );

    // ResumeGuest, AbortPeer, Release and Finish follow.
    for later in step + 1..step + 5 {
        let crash = Injection::before(later, Fault::CrashSource { record_survives: true });
        let world = run(1, vec![slow, lost, crash]);
        require_sound(&world, 1, THIS_TEST);
        assert!(world.source.life == 1 && world.source_vmm.running && !world.commit_sent);
        assert_eq!(world.source.journal.records[0], Record::HandedOver);
        let asked = world.checker.trace.iter().filter(|line| line.contains("AskOutcome")).count();
        assert!(asked > 0, "{later}");
    }
}

#[test]
fn violations_name_what_was_broken() {
    let mut world = World::new(1, false, vec![], Sabotage::None);
    world.resume_destination();
    assert_eq!(world.checker.violations[0], Violation::BothRun);
}
