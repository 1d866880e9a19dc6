//! Downtime and total time against the rate at which the guest writes, from nothing to four times the link, by every way
//! there is: rounds alone, with the guest throttled, post-copy, and QEMU's own three. The link is a bandwidth limit that
//! all are held to while the guest runs at the source; none is in its pause, nor in post-copy, when the guest waits for it.
//! What the guest itself sees of post-copy is measured, too. The total is from the call to the last page.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use ramferry_lab::{Accel, Fill, Qemu, RamBlock, Workload, downtime_seen};
use ramferry_proto::v1;
use serde_json::json;

use crate::measuring::agents::{Agent, Probes, migrate, order, seconds};
use crate::measuring::own::{self, Help, Pause, Way, between};
use crate::measuring::report::{Report, quantile};
use crate::measuring::takes_part;
use crate::{LOOK_INTERVAL, OWN_INTERVAL};

const MIB: u64 = 1 << 20;
const GUEST_BYTES: u64 = 512 * MIB;
/// As much as a link of 1 Gbit/s carries.
const LINK_MIB_PER_SECOND: u64 = 119;
const WORKING_SET_MIB: u64 = 192;
/// Written a second, of what the link carries, in quarters.
const QUARTERS: [u64; 6] = [0, 2, 4, 6, 8, 16];
const TICK_MS: u64 = 5;
const PATIENCE: Duration = Duration::from_secs(120);
/// After so long without an end, an operator allows any downtime.
const OPERATOR_PATIENCE: Duration = Duration::from_secs(8);
/// The same, where throttling may still help.
const THROTTLED_PATIENCE: Duration = Duration::from_secs(20);
/// As far as QEMU's auto-converge goes.
const MOST_THROTTLE_PERCENT: u32 = 99;
const AIM: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contestant {
    Precopy,
    Throttled,
    Postcopy,
    QemuPrecopy,
    QemuAutoConverge,
    QemuPostcopy,
}

impl Contestant {
    const ALL: [Self; 6] = [
        Self::Precopy,
        Self::Throttled,
        Self::Postcopy,
        Self::QemuPrecopy,
        Self::QemuAutoConverge,
        Self::QemuPostcopy,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Precopy => "pre-copy",
            Self::Throttled => "throttled",
            Self::Postcopy => "post-copy",
            Self::QemuPrecopy => "qemu pre-copy",
            Self::QemuAutoConverge => "qemu auto-converge",
            Self::QemuPostcopy => "qemu post-copy",
        }
    }

    fn is_ours(self) -> bool {
        matches!(self, Self::Precopy | Self::Throttled | Self::Postcopy)
    }

    fn patience(self) -> Duration {
        match self {
            Self::Throttled | Self::QemuAutoConverge => THROTTLED_PATIENCE,
            _ => OPERATOR_PATIENCE,
        }
    }
}

/// What a move took.
struct Moved {
    /// From the call to the last page.
    total_seconds: f64,
    /// As its mover says it.
    reported_seconds: f64,
    /// From the resume to the last page, of ours.
    postcopy_seconds: Option<f64>,
    throttle_peak_percent: Option<u32>,
}

pub(crate) fn run(report: &mut Report) -> Result<()> {
    let agents = (Agent::start(Probes::Off)?, Agent::start(Probes::Off)?);
    for quarters in QUARTERS {
        let rate_mib = (LINK_MIB_PER_SECOND * quarters / 4).max(1);
        for contestant in Contestant::ALL {
            let name = format!("{}, {rate_mib} MiB/s written", contestant.as_str());
            if !takes_part(&name) {
                continue;
            }
            eprintln!("dirty rates: {name}");
            if let Err(error) = measure(report, &agents, contestant, &name, quarters, rate_mib) {
                ensure!(!contestant.is_ours(), "{name}: {error:#}");
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
    let there = here.destination().paused(contestant.is_ours()).start()?;
    here.qmp_events()?;
    let moved = if contestant.is_ours() {
        ours(agents, &here, &there, contestant)?
    } else {
        qemus(&here, &there, contestant)?
    };
    let pause = Pause::of(&here, &there, LOOK_INTERVAL)?;
    let lost = there.next_tick(PATIENCE)?.errors + there.verify(PATIENCE)?.errors;
    ensure!(lost == 0, "{lost} pages do not hold what the guest wrote");
    report.add_time(name, moved.total_seconds);
    report.sample(name, "downtime_seconds", pause.seconds()?);
    report.sample(name, "downtime_reported_seconds", moved.reported_seconds);
    if let Some(seen) = downtime_seen(&here, &there) {
        report.sample(name, "downtime_seen_seconds", seen.as_secs_f64());
    }
    if let Some(percent) = moved.throttle_peak_percent {
        report.sample(name, "throttle_peak_percent", percent.into());
    }
    report.note(name, "rate_of_link", json!(quarters as f64 / 4.0));
    report.note(name, "way", json!(contestant.as_str()));
    let last_page = match contestant {
        Contestant::QemuPostcopy => pause.completed,
        _ => moved.postcopy_seconds.map(|seconds| pause.resumed + Duration::from_secs_f64(seconds)),
    };
    if let Some(last_page) = last_page {
        report.sample(name, "postcopy_seconds", between(pause.resumed, last_page)?);
        stalls(report, name, &there, (pause.resumed, last_page))?;
    }
    Ok(())
}

/// How long single pages kept the guest waiting in post-copy, as it says itself: the longest of each tick.
fn stalls(report: &mut Report, name: &str, there: &Qemu, span: (SystemTime, SystemTime)) -> Result<()> {
    let now = (Instant::now(), SystemTime::now());
    let at = |time: SystemTime| -> Result<Instant> {
        now.0.checked_sub(now.1.duration_since(time)?).context("the host has not run for so long")
    };
    // A tick tells of what was before it: the first behind the last page counts, too.
    let (from, to) = (at(span.0)?, at(span.1)? + Duration::from_millis(TICK_MS));
    let ticks = there.ticks();
    let in_postcopy = ticks.iter().filter(|(at, _)| *at >= from && *at <= to);
    let mut worst: Vec<f64> = in_postcopy.map(|(_, tick)| tick.worst_us as f64 / 1e6).collect();
    worst.sort_by(f64::total_cmp);
    report.sample(name, "postcopy_ticks", worst.len() as f64);
    for (key, share) in [("stall_p50_seconds", 0.5), ("stall_p99_seconds", 0.99), ("stall_max_seconds", 1.0)]
    {
        if let Some(value) = quantile(&worst, share) {
            report.sample(name, key, value);
        }
    }
    Ok(())
}

fn ours(agents: &(Agent, Agent), here: &Qemu, there: &Qemu, contestant: Contestant) -> Result<Moved> {
    let postcopy = if contestant == Contestant::Postcopy { v1::Postcopy::Allow } else { v1::Postcopy::Never };
    let throttle = contestant == Contestant::Throttled;
    let parameters = v1::MigrationParameters {
        max_downtime: Some(AIM.try_into()?),
        bandwidth_limit_bits_per_second: LINK_MIB_PER_SECOND * MIB * 8,
        timeout: Some(contestant.patience().try_into()?),
        timeout_action: v1::TimeoutAction::Force.into(),
        no_progress_timeout: Some(Duration::from_secs(1).try_into()?),
        postcopy: postcopy.into(),
        throttle_max_percent: if throttle { MOST_THROTTLE_PERCENT } else { 0 },
        ..order("tcp", "dynamic")?
    };
    let voyage = migrate((&agents.0, &agents.1), (here, there), parameters, LOOK_INTERVAL)?;
    let progress = &voyage.progress;
    let total_seconds = voyage.total_seconds()?;
    let postcopy_seconds = progress.postcopy.then(|| seconds(progress.postcopy_time)).transpose()?;
    Ok(Moved {
        total_seconds: total_seconds + postcopy_seconds.unwrap_or_default(),
        reported_seconds: voyage.downtime_seconds()?,
        postcopy_seconds,
        throttle_peak_percent: throttle.then_some(progress.throttle_peak_percent),
    })
}

fn qemus(here: &Qemu, there: &Qemu, contestant: Contestant) -> Result<Moved> {
    let way = Way {
        listen: "tcp:127.0.0.1:0",
        capability: match contestant {
            Contestant::QemuAutoConverge => Some("auto-converge"),
            Contestant::QemuPostcopy => Some("postcopy-ram"),
            _ => None,
        },
        parameters: json!({
            "max-bandwidth": LINK_MIB_PER_SECOND * MIB,
            // None, as ours.
            "max-postcopy-bandwidth": 0,
            "downtime-limit": u64::try_from(AIM.as_millis())?,
            "max-cpu-throttle": MOST_THROTTLE_PERCENT,
        }),
    };
    let is_postcopy = contestant == Contestant::QemuPostcopy;
    let help = if is_postcopy { Help::BeginPostcopy } else { Help::AllowDowntime(contestant.patience()) };
    let moved = own::migrate_helped(here, there, &way, help, OWN_INTERVAL)?;
    Ok(Moved {
        total_seconds: moved.seconds("total-time")?,
        reported_seconds: moved.seconds("downtime")?,
        postcopy_seconds: None,
        throttle_peak_percent: None,
    })
}
