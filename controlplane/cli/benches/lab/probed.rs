//! What eBPF probes on registration cost a migration over RDMA: the same still guest, with them and without, in pairs.
//!
//! Copies over soft-RoCE differ by more than the probes cost. So that is counted, too: how much longer one registration takes
//! with them, times those of a migration.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::NamedTempFile;

use crate::contest::{Contestant, Move};
use crate::hosts::{Control, Hosts};
use crate::measuring::agents::Probes;
use crate::measuring::report::Report;
use crate::measuring::scraped::count;
use crate::measuring::takes_part;
use crate::still::{measure, random_file, warm_up};

const FABRIC: &str = "verbs";
const REGISTRATIONS: &str = "ramferry_registration_duration_seconds";
const CONTESTANTS: [Contestant; 2] = [Contestant::DYNAMIC, Contestant::PIN_ALL];

/// One move of a pair, and what a registration took at that time.
struct Turn {
    moved: Move,
    /// By both agents.
    registrations: f64,
    registration_seconds: f64,
}

/// Measures everything, `runs` times in turns; what failed.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<Vec<String>> {
    let hosts = Hosts::start(Control::Loopback)?;
    let fill = random_file()?;
    warm_up(&hosts)?;
    let mut failures = Vec::new();
    for run in 1..=runs {
        for contestant in CONTESTANTS.into_iter().filter(|contestant| takes_part(&contestant.name())) {
            eprintln!("{}, with probes and without: run {run} of {runs}", contestant.name());
            let turns: Result<Vec<_>> = Probes::both(run)
                .into_iter()
                .map(|probes| Ok((probes, turn(&hosts, contestant, &fill, probes)?)))
                .collect();
            match turns {
                Ok(turns) => add(report, contestant, &turns),
                Err(error) => {
                    let what = format!("{}, run {run}", contestant.name());
                    failures.push(hosts.failure(&what, &error));
                }
            }
        }
    }
    for name in [copy_name, registration_name] {
        for contestant in CONTESTANTS {
            report.compare(&name(contestant, Probes::Attached), &name(contestant, Probes::Off));
        }
    }
    Ok(failures)
}

fn turn(hosts: &Hosts, contestant: Contestant, fill: &NamedTempFile, probes: Probes) -> Result<Turn> {
    let _attached = probes.attach()?;
    let registrations = || {
        anyhow::Ok(
            count(&hosts.source, REGISTRATIONS, FABRIC)? + count(&hosts.destination, REGISTRATIONS, FABRIC)?,
        )
    };
    let before = registrations()?;
    let moved = measure(hosts, contestant, fill, false)?;
    let registrations = registrations()? - before;
    ensure!(registrations > 0.0, "the agents tell of no registration");
    Ok(Turn { moved, registrations, registration_seconds: registration_seconds()? })
}

fn add(report: &mut Report, contestant: Contestant, turns: &[(Probes, Turn)]) {
    for (probes, turn) in turns {
        let copy = copy_name(contestant, *probes);
        report.add(&copy, turn.moved.transferred_bytes, turn.moved.copy_seconds);
        report.add_time(&registration_name(contestant, *probes), turn.registration_seconds);
    }
    let of = |wanted: Probes| turns.iter().find(|(probes, _)| *probes == wanted).map(|(_, turn)| turn);
    if let (Some(with), Some(without)) = (of(Probes::Attached), of(Probes::Off)) {
        let copy = copy_name(contestant, Probes::Attached);
        let added = with.registrations * (with.registration_seconds - without.registration_seconds);
        report.sample(&copy, "registrations", with.registrations);
        report.sample(&copy, "registering_longer_seconds", added);
        report.sample(&copy, "of_the_copy", added / without.moved.copy_seconds);
    }
}

fn copy_name(contestant: Contestant, probes: Probes) -> String {
    format!("{}, copy, {}", contestant.name(), probes.as_str())
}

fn registration_name(contestant: Contestant, probes: Probes) -> String {
    format!("{}, one registration, {}", contestant.name(), probes.as_str())
}

/// The median of registrations of a page: what probes add is the same for any length.
fn registration_seconds() -> Result<f64> {
    let output = Command::new(env!("CARGO_BIN_EXE_ramferry"))
        .args(["bench", "registration", "--fabric", FABRIC, "--sizes", "4KiB", "--threads", "1"])
        .args(["--memory", "1MiB", "--runs", "1", "--quiet", "--output", "json"])
        .output()
        .context("cannot run ramferry")?;
    let told = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "bench registration failed: {told}");
    let report: Value = serde_json::from_str(&told)?;
    let cases = report["cases"].as_array().context("bench registration tells no cases")?;
    let source = cases.iter().find(|case| case["side"] == "source");
    source
        .and_then(|case| case["register"]["p50_seconds"].as_f64())
        .context("no median of a source's registrations")
}
