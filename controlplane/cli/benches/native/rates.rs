//! Downtime and total time against the rate at which the guest writes, from nothing to four times the link, by every way
//! there is: rounds alone, post-copy, and QEMU's own. The link is a bandwidth limit that all are held to while the guest
//! runs; none is in its pause. What the guest itself sees of post-copy is measured, too.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ramferry_lab::{Accel, Fill, Qemu, RamBlock, Workload, downtime_seen};
use ramferry_proto::v1;
use serde_json::{Value, json};

use crate::LOOK_INTERVAL;
use crate::measuring::agents::{Agent, Probes, migrate, order, seconds};
use crate::measuring::own::{self, Way};
use crate::measuring::report::{Report, quantile};

const MIB: u64 = 1 << 20;
const GUEST_BYTES: u64 = 512 * MIB;
/// As much as a link of 1 Gbit/s carries.
const LINK_MIB_PER_SECOND: u64 = 119;
const WORKING_SET_MIB: u64 = 192;
/// Written a second, of what the link carries, in quarters.
const QUARTERS: [u64; 6] = [0, 2, 4, 6, 8, 16];
const TICK_MS: u64 = 5;
const PATIENCE: Duration = Duration::from_secs(120);
/// After so long without an end, an operator allows any downtime, or begins post-copy.
const OPERATOR_PATIENCE: Duration = Duration::from_secs(8);
const AIM: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contestant {
    Precopy,
    Postcopy,
    QemuPrecopy,
    QemuAutoConverge,
    QemuPostcopy,
}

impl Contestant {
    const ALL: [Self; 5] =
        [Self::Precopy, Self::Postcopy, Self::QemuPrecopy, Self::QemuAutoConverge, Self::QemuPostcopy];

    fn as_str(self) -> &'static str {
        match self {
            Self::Precopy => "pre-copy",
            Self::Postcopy => "post-copy",
            Self::QemuPrecopy => "qemu pre-copy",
            Self::QemuAutoConverge => "qemu auto-converge",
            Self::QemuPostcopy => "qemu post-copy",
        }
    }
}

/// What a move took.
struct Moved {
    total_seconds: f64,
    downtime_seconds: f64,
    /// From the resume to the last page.
    postcopy_seconds: Option<f64>,
}

pub(crate) fn run(report: &mut Report) -> Result<()> {
    let agents = (Agent::start(Probes::Off)?, Agent::start(Probes::Off)?);
    for quarters in QUARTERS {
        let rate_mib = (LINK_MIB_PER_SECOND * quarters / 4).max(1);
        for contestant in Contestant::ALL {
            let name = format!("{}, {rate_mib} MiB/s written", contestant.as_str());
            eprintln!("dirty rates: {name}");
            if let Err(error) = measure(report, &agents, contestant, &name, quarters, rate_mib) {
                ensure!(
                    !matches!(contestant, Contestant::Precopy | Contestant::Postcopy),
                    "{name}: {error:#}"
                );
                eprintln!("{name}: {error:#}");
                report.note(&name, "failed", json!(format!("{error:#}")));
            }
        }
    }
    Ok(())
}

fn measure(
    report: &mut Report,
    agents: &(Agent, Agent),
    contestant: Contestant,
    name: &str,
    quarters: u64,
    rate_mib: u64,
) -> Result<()> {
    let workload = Workload {
        mib: WORKING_SET_MIB,
        touch_mib: 192,
        rate_mib,
        tick_ms: TICK_MS,
        fill: Fill::Random,
        ..Workload::default()
    };
    let here =
        Qemu::builder().block(RamBlock::node(GUEST_BYTES)).accel(Accel::best()).proof(workload).start()?;
    here.wait_ready(PATIENCE)?;
    // QEMU's own has nobody to tell it to run.
    let is_ours = matches!(contestant, Contestant::Precopy | Contestant::Postcopy);
    let there = here.destination().incoming(true).paused(is_ours).start()?;
    let moved = match contestant {
        Contestant::Precopy => ours(agents, &here, &there, v1::Postcopy::Never)?,
        Contestant::Postcopy => ours(agents, &here, &there, v1::Postcopy::Allow)?,
        Contestant::QemuPrecopy => qemus(&here, &there, None)?,
        Contestant::QemuAutoConverge => qemus(&here, &there, Some("auto-converge"))?,
        Contestant::QemuPostcopy => qemus(&here, &there, Some("postcopy-ram"))?,
    };
    let lost = there.next_tick(PATIENCE)?.errors + there.verify(PATIENCE)?.errors;
    ensure!(lost == 0, "{lost} pages do not hold what the guest wrote");
    report.add_time(name, moved.total_seconds);
    report.sample(name, "downtime_seconds", moved.downtime_seconds);
    if let Some(seen) = downtime_seen(&here, &there) {
        report.sample(name, "downtime_seen_seconds", seen.as_secs_f64());
    }
    report.note(name, "rate_of_link", json!(quarters as f64 / 4.0));
    report.note(name, "way", json!(contestant.as_str()));
    if let Some(seconds) = moved.postcopy_seconds {
        report.sample(name, "postcopy_seconds", seconds);
        stalls(report, name, &there);
    }
    Ok(())
}

/// How long single pages kept the guest waiting behind its resume, as it says itself: the longest of each tick.
fn stalls(report: &mut Report, name: &str, there: &Qemu) {
    let mut worst: Vec<f64> = there.ticks().iter().map(|(_, tick)| tick.worst_us as f64 / 1e6).collect();
    // The first counts the pause.
    worst.drain(..worst.len().min(1));
    worst.sort_by(f64::total_cmp);
    for (key, share) in [("stall_p50_seconds", 0.5), ("stall_p99_seconds", 0.99), ("stall_max_seconds", 1.0)]
    {
        if let Some(value) = quantile(&worst, share) {
            report.sample(name, key, value);
        }
    }
}

fn ours(agents: &(Agent, Agent), here: &Qemu, there: &Qemu, postcopy: v1::Postcopy) -> Result<Moved> {
    let parameters = v1::MigrationParameters {
        max_downtime: Some(AIM.try_into()?),
        bandwidth_limit_bits_per_second: LINK_MIB_PER_SECOND * MIB * 8,
        timeout: Some(OPERATOR_PATIENCE.try_into()?),
        timeout_action: v1::TimeoutAction::Force.into(),
        no_progress_timeout: Some(Duration::from_secs(1).try_into()?),
        postcopy: postcopy.into(),
        ..order("tcp", "dynamic")?
    };
    let voyage = migrate((&agents.0, &agents.1), (here, there), parameters, LOOK_INTERVAL)?;
    let postcopy_seconds = voyage.progress.postcopy.then(|| seconds(voyage.progress.postcopy_time));
    Ok(Moved {
        total_seconds: voyage.total_seconds()?,
        downtime_seconds: voyage.downtime_seconds()?,
        postcopy_seconds: postcopy_seconds.transpose()?,
    })
}

fn qemus(here: &Qemu, there: &Qemu, capability: Option<&str>) -> Result<Moved> {
    let way = Way {
        listen: "tcp:127.0.0.1:0",
        capability,
        parameters: json!({
            "max-bandwidth": LINK_MIB_PER_SECOND * MIB,
            "max-postcopy-bandwidth": LINK_MIB_PER_SECOND * MIB,
            "downtime-limit": u64::try_from(AIM.as_millis())?,
        }),
    };
    own::begin(here, there, &way)?;
    let status = operate(here, capability == Some("postcopy-ram"))?;
    let milliseconds = |key: &str| status[key].as_u64().with_context(|| format!("no {key}: {status}"));
    let downtime_seconds = milliseconds("downtime")? as f64 / 1e3;
    let total_seconds = milliseconds("total-time")? as f64 / 1e3;
    Ok(Moved {
        total_seconds,
        downtime_seconds,
        postcopy_seconds: (capability == Some("postcopy-ram")).then_some(0.0),
    })
}

/// Does what an operator does with a migration that does not converge.
fn operate(here: &Qemu, postcopy: bool) -> Result<Value> {
    let started = Instant::now();
    let mut helped = false;
    loop {
        let status = here.qmp(&json!({ "execute": "query-migrate" }))?;
        match status["status"].as_str() {
            Some("completed") if status["total-time"] != 0 => return Ok(status),
            Some("failed" | "cancelled") => bail!("QEMU's own migration failed: {status}"),
            _ if started.elapsed() > PATIENCE => bail!("QEMU's own migration does not end: {status}"),
            _ => {}
        }
        let first_pass_done = status["ram"]["dirty-sync-count"].as_u64() > Some(1);
        if !helped && (postcopy && first_pass_done || started.elapsed() > OPERATOR_PATIENCE) {
            helped = true;
            here.qmp(&if postcopy {
                json!({ "execute": "migrate-start-postcopy" })
            } else {
                json!({ "execute": "migrate-set-parameters", "arguments": { "downtime-limit": 60_000 } })
            })?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
