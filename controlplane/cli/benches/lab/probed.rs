//! What eBPF probes on registration cost a migration over RDMA: the same still guest, with them and without, in pairs.

use anyhow::Result;

use crate::contest::{Contestant, Move};
use crate::hosts::{Control, Hosts};
use crate::measuring::agents::{MOVES, Probes};
use crate::measuring::report::Report;
use crate::measuring::takes_part;
use crate::still::{measure, random_file};

/// Measures everything, `runs` times in turns; what failed.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<Vec<String>> {
    let fill = random_file()?;
    let name =
        |contestant: Contestant, probes: Probes| format!("{}, copy, {}", contestant.name(), probes.as_str());
    let contestants = [Contestant::DYNAMIC, Contestant::PIN_ALL];
    let mut failures = Vec::new();
    for run in 1..=runs {
        for contestant in contestants.into_iter().filter(|contestant| takes_part(&contestant.name())) {
            for probes in Probes::both(run) {
                let name = name(contestant, probes);
                eprintln!("{name}: run {run} of {runs}");
                // Started anew: an agent's probes see every process, the other agents' too.
                let hosts = Hosts::start(probes, Control::Loopback)?;
                let moves: Result<Vec<Move>> =
                    (0..MOVES).map(|_| measure(&hosts, contestant, &fill, false)).collect();
                match moves {
                    Ok(moves) => report.add(
                        &name,
                        moves.iter().map(|moved| moved.transferred_bytes).sum(),
                        moves.iter().map(|moved| moved.copy_seconds).sum(),
                    ),
                    Err(error) => failures.push(hosts.failure(&format!("{name}, run {run}"), &error)),
                }
            }
        }
    }
    for contestant in contestants {
        report.compare(&name(contestant, Probes::Attached), &name(contestant, Probes::Off));
    }
    Ok(failures)
}
