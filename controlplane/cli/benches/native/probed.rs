//! What eBPF probes cost a migration: the same still guest, with them and without, in pairs.
//!
//! This host's memory is not always as fast, for what else uses it. So the two moves of a pair are short, and soon after one
//! another, and there have to be hundreds of them.

use anyhow::Result;

use crate::LOOK_INTERVAL;
use crate::measuring::agents::{Agent, Probes, migrate, order};
use crate::measuring::report::Report;
use crate::still::{State, destination, stand_still, still_guest};

const GUEST_BYTES: u64 = 256 << 20;
const FABRICS: [&str; 2] = ["shm", "tcp"];

/// Measures everything, `runs` times in turns.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let agents = (Agent::start(Probes::Off)?, Agent::start(Probes::Off)?);
    let guest = still_guest(GUEST_BYTES)?;
    let name = |fabric: &str, probes: Probes| {
        format!("{fabric} dynamic, copy of {} MiB, {}", GUEST_BYTES >> 20, probes.as_str())
    };
    for run in 1..=runs {
        for probes in Probes::both(run) {
            eprintln!("{}: run {run} of {runs}", probes.as_str());
            let _bystander = probes.bystander()?;
            for fabric in FABRICS {
                let to = destination(&guest, State::Fresh)?;
                let parameters = order(fabric, "dynamic")?;
                let voyage = migrate((&agents.0, &agents.1), (&guest, &to), parameters, LOOK_INTERVAL)?;
                report.add(&name(fabric, probes), voyage.transferred_bytes(), voyage.copy_seconds()?);
                stand_still(&guest)?;
            }
        }
    }
    for fabric in FABRICS {
        report.compare(&name(fabric, Probes::Attached), &name(fabric, Probes::Off));
    }
    Ok(())
}
