//! What eBPF probes on registration cost a migration over RDMA: the same still guest, with them and without, in pairs.

use anyhow::Result;

use crate::contest::{Contestant, Move};
use crate::hosts::{Control, Hosts};
use crate::measuring::agents::Probes;
use crate::measuring::report::Report;
use crate::measuring::takes_part;
use crate::still::{measure, random_file, warm_up};

/// Measures everything, `runs` times in turns; what failed.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<Vec<String>> {
    let hosts = Hosts::start(Probes::Off, Control::Loopback)?;
    let fill = random_file()?;
    warm_up(&hosts)?;
    let name =
        |contestant: Contestant, probes: Probes| format!("{}, copy, {}", contestant.name(), probes.as_str());
    let contestants = [Contestant::DYNAMIC, Contestant::PIN_ALL];
    let mut failures = Vec::new();
    for run in 1..=runs {
        for contestant in contestants.into_iter().filter(|contestant| takes_part(&contestant.name())) {
            let pair: Result<Vec<(String, Move)>> = Probes::both(run)
                .into_iter()
                .map(|probes| {
                    let name = name(contestant, probes);
                    eprintln!("{name}: run {run} of {runs}");
                    let _attached = probes.attach()?;
                    Ok((name, measure(&hosts, contestant, &fill, false)?))
                })
                .collect();
            match pair {
                Ok(pair) => pair
                    .iter()
                    .for_each(|(name, moved)| report.add(name, moved.transferred_bytes, moved.copy_seconds)),
                Err(error) => {
                    failures.push(hosts.failure(&format!("{}, run {run}", contestant.name()), &error))
                }
            }
        }
    }
    for contestant in contestants {
        report.compare(&name(contestant, Probes::Attached), &name(contestant, Probes::Off));
    }
    Ok(failures)
}
