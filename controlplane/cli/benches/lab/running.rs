//! A guest that runs, writes all the time and checks what it wrote: its
//! downtime as it goes from host to host.

use std::time::Duration;

use anyhow::Result;
use ramferry_lab::{Accel, Fill, Qemu, RamBlock, Workload, downtime_seen};

use crate::contest::{self, Contestant, Move};
use crate::hosts::Hosts;
use crate::measuring::lost::lost_pages;
use crate::measuring::report::Report;
use crate::measuring::takes_part;

const MIB: u64 = 1 << 20;
const GUEST_BYTES: u64 = 128 * MIB;
/// What QEMU's own migration over RDMA still carries.
const WORKLOAD: Workload = Workload {
    mib: 8,
    touch_mib: 32,
    rate_mib: 2,
    verify_rate_mib: 1,
    tick_ms: 20,
    seed: 0,
    fill: Fill::Random,
    place: ramferry_lab::Place::Spread,
};
const PATIENCE: Duration = Duration::from_secs(60);
const CONTESTANTS: [Contestant; 7] = [
    Contestant::QEMU_DYNAMIC,
    Contestant::DYNAMIC,
    Contestant::POSTCOPY,
    Contestant::QEMU_PIN_ALL,
    Contestant::PIN_ALL,
    Contestant::QEMU_TCP,
    Contestant::TCP,
];

/// Measures everything, `runs` times in turns; what failed.
pub(crate) fn run(report: &mut Report, hosts: &Hosts, runs: usize) -> Result<Vec<String>> {
    let mut failures = Vec::new();
    // It goes on from where it came to; after a failure another is booted.
    let mut guest = None;
    for run in 1..=runs {
        for contestant in CONTESTANTS.into_iter().filter(|contestant| takes_part(&contestant.name())) {
            let name = contestant.name();
            eprintln!("running guest, {name}: run {run} of {runs}");
            let here = match guest.take() {
                Some(guest) => guest,
                None => boot()?,
            };
            match measure(hosts, contestant, &here) {
                Ok(arrived) => {
                    add(report, &name, &arrived);
                    // What one lost is not held against the next.
                    guest = (arrived.lost_pages == 0).then_some(arrived.guest);
                }
                Err(error) => {
                    failures.push(hosts.failure(&format!("running guest, {name}, run {run}"), &error));
                }
            }
        }
    }
    compare(report);
    Ok(failures)
}

fn boot() -> Result<Qemu> {
    let block = RamBlock::node(GUEST_BYTES);
    let guest = Qemu::builder().block(block).accel(Accel::Tcg).proof(WORKLOAD).start()?;
    guest.wait_ready(PATIENCE)?;
    Ok(guest)
}

/// A guest that was moved.
struct Arrived {
    guest: Qemu,
    moved: Move,
    /// How long it was seen to stand still.
    seen: Duration,
    /// Pages that do not hold what the guest wrote.
    lost_pages: u64,
}

fn measure(hosts: &Hosts, contestant: Contestant, here: &Qemu) -> Result<Arrived> {
    let there = contestant.destination(here.destination())?;
    let moved = contest::run(hosts, contestant, here, &there)?;
    let is_ours = matches!(contestant, Contestant::Ours { .. });
    let lost_pages = lost_pages(&there, is_ours, GUEST_BYTES, PATIENCE)?;
    let seen = downtime_seen(here, &there).unwrap_or_default();
    Ok(Arrived { guest: there, moved, seen, lost_pages })
}

fn add(report: &mut Report, name: &str, arrived: &Arrived) {
    let moved = &arrived.moved;
    let whole = format!("running, {name}, whole");
    report.add_time(&whole, moved.whole_seconds);
    moved.note(report, &whole);
    report.sample(&whole, "downtime_seen_seconds", arrived.seen.as_secs_f64());
    report.sample(&whole, "lost_pages", arrived.lost_pages as f64);
    let downtime = format!("running, {name}, downtime");
    report.add_time(&downtime, moved.downtime_seconds.unwrap_or_default());
    moved.note_downtime(report, &downtime);
}

fn compare(report: &mut Report) {
    for (ours, its) in [
        (Contestant::DYNAMIC, Contestant::QEMU_DYNAMIC),
        (Contestant::POSTCOPY, Contestant::QEMU_DYNAMIC),
        (Contestant::PIN_ALL, Contestant::QEMU_PIN_ALL),
        (Contestant::TCP, Contestant::QEMU_TCP),
    ] {
        for what in ["whole", "downtime"] {
            let name = |contestant: Contestant| format!("running, {}, {what}", contestant.name());
            report.compare(&name(ours), &name(its));
        }
    }
}
