//! What ramferry does on this host, beside what the host can do: `make bench`.
//!
//! Everything is measured several times in turns; the table shows medians, and
//! each ratio is the median of the ratios of the runs.

mod downtime;
mod faults;
#[path = "../measuring/measuring.rs"]
#[allow(dead_code, reason = "each benchmark uses a part")]
mod measuring;
mod probed;
mod rates;
mod sizes;
mod still;
mod tracking;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::measuring::report::Report;

const DEFAULT_RUNS: usize = 5;
/// Between two looks at an agent's memory.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);
/// Between two looks whether QEMU's own migration is done.
const OWN_INTERVAL: Duration = Duration::from_millis(20);
const PARTS: [&str; 7] = ["tracking", "still", "probes", "sizes", "downtime", "rates", "faults"];

fn main() -> Result<()> {
    // Cargo says that this is a benchmark, not what to do.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let (runs, parts) = measuring::asked(&arguments, &PARTS, DEFAULT_RUNS)?;
    let mut report = Report::default();
    for part in parts {
        match part {
            "tracking" => tracking::run(&mut report, runs),
            "still" => still::run(&mut report, runs),
            "probes" => probed::run(&mut report, runs),
            "sizes" => sizes::run(&mut report, runs),
            "rates" => rates::run(&mut report),
            "faults" => faults::run(&mut report),
            _ => downtime::run(&mut report),
        }
        .with_context(|| format!("the part {part:?} could not be measured"))?;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/bench/native.json");
    report.publish(&path)
}
