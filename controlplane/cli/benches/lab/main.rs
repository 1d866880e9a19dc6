//! What ramferry does over RDMA beside QEMU's own migration and beside what the
//! device can do, in the lab's VM: `make lab-bench`.
//!
//! The contestants take turns; the tables show medians, and each ratio is the
//! median of the ratios of the runs. Under emulation only ratios mean anything.

mod contest;
mod hosts;
mod link;
#[path = "../measuring/measuring.rs"]
#[allow(dead_code, reason = "each benchmark uses a part")]
mod measuring;
mod probed;
mod rates;
mod running;
mod shaped;
mod still;

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::hosts::{Control, Hosts};
use crate::measuring::report::Report;

const DEFAULT_RUNS: usize = 3;
const PARTS: [&str; 4] = ["still", "running", "probes", "rates"];

fn main() -> Result<()> {
    // Cargo says that this is a benchmark, not what to do.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let (runs, parts) = measuring::asked(&arguments, &PARTS, DEFAULT_RUNS)?;
    ensure!(
        std::env::var_os("RAMFERRY_LAB").is_some(),
        "this runs in the lab's VM: `make lab-bench` boots it"
    );
    let mut report = Report::default();
    let mut failures = Vec::new();
    for part in parts {
        let failed = match part {
            "still" => still::run(&mut report, &Hosts::start(Control::Loopback)?, runs),
            "running" => running::run(&mut report, &Hosts::start(Control::Loopback)?, runs),
            "probes" => probed::run(&mut report, runs),
            _ => rates::run(&mut report, runs),
        };
        failures.extend(failed.with_context(|| format!("the part {part:?} could not be measured"))?);
    }
    report.publish(&report_path())?;
    ensure!(failures.is_empty(), "{} turns failed:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

/// The VM shows the host's files, but what is written among them stays in the VM.
fn report_path() -> PathBuf {
    let directory = std::env::var_os("RAMFERRY_LAB_OUT").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/bench")),
        PathBuf::from,
    );
    directory.join("lab.json")
}
