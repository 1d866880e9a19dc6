//! Cancelling before every step.

use std::time::{Duration, Instant};

use ramferry_lab::Qemu;
use ramferry_proto::v1;
use ramferry_proto::v1::MigrationState::{Cancelled, Succeeded};

use super::stage::{Course, Stage, runs};
use super::table::STRAIGHT;
use crate::harness::{PATIENCE, assert_runs_untraced};

/// From here on it is too late to cancel.
const POINT_OF_NO_RETURN: &str = "source write_handed_over 3";
/// Longest from the cancel until the guest runs.
const LIMIT: Duration = Duration::from_millis(100);
/// Ticks that tell how a guest fares that nobody migrates.
const OWN_TICKS: usize = 20;
/// The machine may keep a guest from running for a while at any time: the best try counts,
/// and what the guest had to bear when nobody migrated it does not.
const TRIES: u32 = 20;

#[tokio::test(flavor = "multi_thread")]
async fn cancel_before_any_step_lets_the_guest_run_on_within_100_ms() {
    let mut stage = Stage::set().await;
    let mut late = Vec::new();
    let mut longest = Duration::ZERO;
    for step in STRAIGHT {
        let mut best = Duration::MAX;
        for attempt in 0..TRIES {
            stage.id = format!("{}-{attempt}", step.replace(' ', "-"));
            let (ended, waited) = cancel_before(&stage, step).await;
            best = best.min(waited);
            assert_eq!(ended == Cancelled, may_cancel(step), "{step}: {ended:?}");
            if ended != Cancelled {
                stage = Stage::set().await;
            } else if stage.receiver.status().is_err() || !stage.receiver.is_alive() {
                stage.receiver = stage.guest.destination().start().unwrap();
            }
            if best < LIMIT {
                break;
            }
        }
        eprintln!("{step}: the guest ran {best:?} after the cancel");
        longest = longest.max(best);
        if best >= LIMIT {
            late.push((step, best));
        }
    }
    eprintln!("longest: {longest:?}");
    assert!(late.is_empty(), "the guest stood still for too long: {late:?}");
    assert_runs_untraced(&stage.guest);
}

/// Whether a cancel before `step` still keeps the guest at the source.
fn may_cancel(step: &str) -> bool {
    let destinations = [
        "destination write_committed",
        "destination resume_guest",
        "destination answer_running",
        "destination release",
        "destination finish",
    ];
    let of_no_return = STRAIGHT.iter().position(|known| *known == POINT_OF_NO_RETURN);
    let position = STRAIGHT.iter().position(|known| *known == step);
    !destinations.contains(&step) && (step.starts_with("destination") || position < of_no_return)
}

/// How the migration ended, and how long after the cancel the guest ticked.
async fn cancel_before(stage: &Stage, step: &str) -> (v1::MigrationState, Duration) {
    let own = longest_gap(&stage.guest);
    stage.begin(v1::FabricKind::Tcp).await;
    let held = stage.hold(Course::Straight, |seen| seen.to_string() == step).await;
    let cancelled = Instant::now();
    let request = v1::CancelMigrationRequest { id: stage.id.clone() };
    // Refused where it has ended.
    let _ = stage.pair.source.client().await.cancel_migration(request).await;
    stage.let_end(held).await;
    let moved = stage.agree().await;
    assert_eq!((runs(&stage.guest), runs(&stage.receiver)), (!moved, moved), "{step}");
    let ended = stage.pair.source.wait_end(&stage.id).await;
    let runner = if moved { &stage.receiver } else { &stage.guest };
    let waited = first_tick_after(runner, cancelled) - cancelled;
    assert!(moved == (ended.state() == Succeeded));
    (ended.state(), waited.saturating_sub(own))
}

/// The longest time between two of the guest's next ticks.
fn longest_gap(guest: &Qemu) -> Duration {
    let from = guest.ticks().len();
    while guest.ticks().len() < from + OWN_TICKS {
        guest.next_tick(PATIENCE).unwrap();
    }
    let own = &guest.ticks()[from..];
    own.windows(2).map(|pair| pair[1].0 - pair[0].0).max().unwrap_or_default()
}

fn first_tick_after(guest: &Qemu, moment: Instant) -> Instant {
    // One that is printed from now on is after it for sure.
    guest.next_tick(PATIENCE).unwrap();
    let ticks = guest.ticks();
    ticks.iter().map(|(at, _)| *at).find(|at| *at > moment).expect("a tick after it")
}
