//! What a harvest, a zero scan and a page hash cost, for each GiB, as
//! `ramferry bench scan` measures it.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::measuring::report::Report;

const GIB: u64 = 1 << 30;

/// Measures each, `runs` times in turns, with the tracker that works here.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_ramferry"))
        .args(["bench", "scan", "--memory", "1GiB", "--output", "json", "--runs", &runs.to_string()])
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "`ramferry bench scan` ended with {}", output.status);
    let scan: Value = serde_json::from_slice(&output.stdout)?;
    if let Some(reason) = scan["harvest_skipped"].as_str() {
        bail!("no harvest could be measured: {reason}");
    }
    let list = |key: &str| scan[key].as_array().with_context(|| format!("the report has no {key}"));
    for pass in list("zero_scan")? {
        let pages = pass["pages"].as_str().context("a pass without its kind of pages")?;
        add(report, &format!("zero scan of {pages} pages, each GiB"), pass)?;
    }
    add(report, "page hash, each GiB", &scan["page_hash"])?;
    let tracker = scan["tracker"].as_str().context("the report names no tracker")?;
    for harvest in list("harvest")? {
        add(report, &format!("harvest {tracker}, {} % dirty, each GiB", harvest["dirty_percent"]), harvest)?;
    }
    Ok(())
}

fn add(report: &mut Report, name: &str, case: &Value) -> Result<()> {
    for seconds in case["seconds"].as_array().with_context(|| format!("{name}: no runs"))? {
        report.add(name, GIB, seconds.as_f64().context("a time that is no number")?);
    }
    Ok(())
}
