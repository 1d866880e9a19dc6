//! Downtime under stress: a Debian guest whose `stress` rewrites 200 MB without
//! pause goes to and fro. It never converges; the policy moves it all the same.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use ramferry_lab::{Accel, DebianGuest, Guest, Qemu, RamBlock};
use ramferry_proto::v1;
use serde_json::json;

use crate::LOOK_INTERVAL;
use crate::measuring::agents::{Agent, Probes, migrate, order, seconds};
use crate::measuring::report::{Report, quantile};

const GUEST_BYTES: u64 = 1 << 30;
const MIGRATIONS: usize = 50;
const PATIENCE: Duration = Duration::from_secs(120);

/// Measures 20 migrations over each fabric.
pub(crate) fn run(report: &mut Report) -> Result<()> {
    let debian = match DebianGuest::find() {
        Ok(debian) => debian,
        Err(reason) => {
            eprintln!("SKIPPED downtime under stress: {reason}");
            return Ok(());
        }
    };
    let agents = (Agent::start(Probes::Off)?, Agent::start(Probes::Off)?);
    for fabric in ["shm", "tcp"] {
        let guest = Guest::Debian(debian.clone());
        let mut here =
            Qemu::builder().block(RamBlock::node(GUEST_BYTES)).accel(Accel::Tcg).guest(guest).start()?;
        here.wait_line(|line| line.starts_with("tick "), PATIENCE)?;
        // Until stress has filled its memory: it says nothing itself.
        let ticks = here.line_count();
        here.wait_line_from(ticks, |line| line.starts_with("tick 50 "), PATIENCE)?;
        let (mut downtimes, mut parts) = (Vec::new(), BTreeMap::<String, Vec<f64>>::new());
        for migration in 1..=MIGRATIONS {
            eprintln!("downtime over {fabric}: migration {migration} of {MIGRATIONS}");
            let there = here.destination().start()?;
            let parameters = v1::MigrationParameters {
                max_downtime: Some(Duration::from_millis(1).try_into()?),
                timeout_action: v1::TimeoutAction::Force.into(),
                no_progress_timeout: Some(Duration::from_millis(500).try_into()?),
                postcopy: v1::Postcopy::Allow.into(),
                ..order(fabric, "dynamic")?
            };
            let voyage = migrate((&agents.0, &agents.1), (&here, &there), parameters, LOOK_INTERVAL)?;
            downtimes.push(voyage.downtime_seconds()?);
            for part in &voyage.progress.downtime_parts {
                parts.entry(part.name.clone()).or_default().push(seconds(part.duration)?);
            }
            here = there;
        }
        publish(report, fabric, downtimes, parts);
    }
    Ok(())
}

fn publish(report: &mut Report, fabric: &str, mut downtimes: Vec<f64>, parts: BTreeMap<String, Vec<f64>>) {
    downtimes.sort_by(f64::total_cmp);
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        let name = format!("downtime under stress over {fabric}, {name}");
        report.add_time(&name, quantile(&downtimes, share).unwrap_or_default());
        report.note(&name, "migrations", json!(downtimes.len()));
    }
    for (part, mut seconds) in parts {
        seconds.sort_by(f64::total_cmp);
        let name = format!("downtime under stress over {fabric}, part {part}, p50");
        report.add_time(&name, quantile(&seconds, 0.5).unwrap_or_default());
    }
}
