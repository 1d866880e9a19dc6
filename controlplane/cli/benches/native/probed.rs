//! What eBPF probes cost a migration: the same still guest, with them and without, in pairs.

use anyhow::Result;

use crate::LOOK_INTERVAL;
use crate::measuring::agents::{Agent, Probes, migrate, order};
use crate::measuring::report::Report;
use crate::still::{State, destination, stand_still, still_guest};

/// Measures everything, `runs` times in turns.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let agents = (Agent::start(Probes::Off)?, Agent::start(Probes::Off)?);
    let guest = still_guest()?;
    let name = |fabric: &str, probes: Probes| format!("{fabric} dynamic, copy, {}", probes.as_str());
    let fabrics = ["shm", "tcp"];
    for run in 1..=runs {
        for fabric in fabrics {
            for probes in Probes::both(run) {
                let name = name(fabric, probes);
                eprintln!("{name}: run {run} of {runs}");
                let _attached = probes.attach()?;
                let to = destination(&guest, State::Touched)?;
                let agents = (&agents.0, &agents.1);
                let voyage = migrate(agents, (&guest, &to), order(fabric, "dynamic")?, LOOK_INTERVAL)?;
                report.add(&name, voyage.transferred_bytes(), voyage.copy_seconds()?);
                stand_still(&guest)?;
            }
        }
    }
    for fabric in fabrics {
        report.compare(&name(fabric, Probes::Attached), &name(fabric, Probes::Off));
    }
    Ok(())
}
