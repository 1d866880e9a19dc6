//! What eBPF probes cost a migration: the same still guest, with them and without, in pairs.

use anyhow::Result;

use crate::LOOK_INTERVAL;
use crate::measuring::agents::{Agent, MOVES, Probes, migrate, order};
use crate::measuring::report::Report;
use crate::still::{State, destination, stand_still, still_guest};

/// Measures everything, `runs` times in turns.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let guest = still_guest()?;
    let name = |fabric: &str, probes: Probes| format!("{fabric} dynamic, copy, {}", probes.as_str());
    let fabrics = ["shm", "tcp"];
    for run in 1..=runs {
        for fabric in fabrics {
            for probes in Probes::both(run) {
                let name = name(fabric, probes);
                eprintln!("{name}: run {run} of {runs}");
                // Started anew: an agent's probes see every process, the other agents' too.
                let agents = (Agent::start(probes)?, Agent::start(probes)?);
                let agents = (&agents.0, &agents.1);
                let (mut bytes, mut seconds) = (0, 0.0);
                for _ in 0..MOVES {
                    let to = destination(&guest, State::Touched)?;
                    let voyage = migrate(agents, (&guest, &to), order(fabric, "dynamic")?, LOOK_INTERVAL)?;
                    bytes += voyage.transferred_bytes();
                    seconds += voyage.copy_seconds()?;
                    stand_still(&guest)?;
                }
                report.add(&name, bytes, seconds);
            }
        }
    }
    for fabric in fabrics {
        report.compare(&name(fabric, Probes::Attached), &name(fabric, Probes::Off));
    }
    Ok(())
}
