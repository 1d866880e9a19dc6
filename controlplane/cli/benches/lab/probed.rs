//! What eBPF probes on registration cost a migration, over RDMA and where nothing is registered with a device: the same still guest, with them and without, in pairs.
//!
//! Under a clock that counts instructions (`ramferry-lab run --steady-clock`): by the host's, copies over soft-RoCE differ by 8 %
//! from one to the next, which is more than the probes cost.

use anyhow::Result;
use tempfile::NamedTempFile;

use crate::contest::{Contestant, Move};
use crate::hosts::{Control, Hosts};
use crate::measuring::agents::Probes;
use crate::measuring::report::Report;
use crate::measuring::takes_part;
use crate::still::{measure, random_file, warm_up};

const CONTESTANTS: [Contestant; 4] =
    [Contestant::DYNAMIC, Contestant::PIN_ALL, Contestant::TCP, Contestant::SHM];

/// Measures everything, `runs` times in turns; what failed.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<Vec<String>> {
    let hosts = Hosts::start(Control::Loopback)?;
    let fill = random_file()?;
    warm_up(&hosts)?;
    let mut failures = Vec::new();
    for run in 1..=runs {
        for contestant in CONTESTANTS.into_iter().filter(|contestant| takes_part(&contestant.name())) {
            eprintln!("{}, with probes and without: run {run} of {runs}", contestant.name());
            let pair: Result<Vec<_>> = Probes::both(run)
                .into_iter()
                .map(|probes| Ok((probes, turn(&hosts, contestant, &fill, probes)?)))
                .collect();
            match pair {
                Ok(pair) => pair.iter().for_each(|(probes, moved)| {
                    report.add(&name(contestant, *probes), moved.transferred_bytes, moved.copy_seconds);
                }),
                Err(error) => {
                    let what = format!("{}, run {run}", contestant.name());
                    failures.push(hosts.failure(&what, &error));
                }
            }
        }
    }
    for contestant in CONTESTANTS {
        report.compare(&name(contestant, Probes::Attached), &name(contestant, Probes::Off));
    }
    Ok(failures)
}

fn turn(hosts: &Hosts, contestant: Contestant, fill: &NamedTempFile, probes: Probes) -> Result<Move> {
    let _bystander = probes.bystander()?;
    measure(hosts, contestant, fill, false)
}

fn name(contestant: Contestant, probes: Probes) -> String {
    format!("{}, copy, {}", contestant.name(), probes.as_str())
}
