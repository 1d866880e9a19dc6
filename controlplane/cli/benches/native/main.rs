//! What ramferry does on this host, beside what the host can do: `make bench`.
//!
//! Everything is measured several times in turns; the table shows medians, and
//! each ratio is the median of the ratios of the runs.

mod agents;
mod downtime;
mod report;
mod sizes;
mod still;
mod tracking;

use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use crate::report::Report;

const DEFAULT_RUNS: usize = 5;
const PARTS: [&str; 4] = ["tracking", "still", "sizes", "downtime"];

fn main() -> Result<()> {
    // Cargo says that this is a benchmark, not what to do.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let runs = std::env::var("BENCH_RUNS").map_or(Ok(DEFAULT_RUNS), |runs| {
        runs.parse().with_context(|| format!("BENCH_RUNS is a number, not {runs:?}"))
    })?;
    for argument in &arguments {
        ensure!(PARTS.contains(&argument.as_str()), "{argument:?} is none of {}", PARTS.join(", "));
    }
    let wanted = |part: &str| arguments.is_empty() || arguments.iter().any(|argument| argument == part);
    let mut report = Report::default();
    for part in PARTS.into_iter().filter(|part| wanted(part)) {
        match part {
            "tracking" => tracking::run(&mut report, runs),
            "still" => still::run(&mut report, runs),
            "sizes" => sizes::run(&mut report, runs),
            _ => downtime::run(&mut report),
        }
        .with_context(|| format!("the part {part:?} could not be measured"))?;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/bench/native.json");
    report.publish(&path)
}
