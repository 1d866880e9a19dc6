//! Downtime and total time against the rate at which the guest writes, by every way that there is to move it. Of each move
//! the guest's pages are checked, and what it saw of post-copy itself is measured, too. The total is from the call to the
//! last page.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Error, Result};
use ramferry_lab::{PAGE_BYTES, Qemu, QemuBuilder, Tick, Workload, downtime_seen};
use ramferry_proto::v1;
use serde_json::json;

use super::agents::{Agent, migrate, order, seconds};
use super::lost::lost_pages;
use super::own::{self, Help, Pause, Way, between};
use super::report::{Report, quantile};
use super::takes_part;

const MIB: u64 = 1 << 20;
/// More than any link carries.
const UNLIMITED_BYTES_PER_SECOND: u64 = 1 << 40;
/// As far as QEMU's auto-converge goes.
const MOST_THROTTLE_PERCENT: u32 = 99;

/// A way to move a guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contestant {
    pub(crate) name: &'static str,
    pub(crate) mover: Mover,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mover {
    /// ramferry: by rounds alone unless something is allowed beside them.
    Ours { postcopy: bool, throttle: bool },
    /// QEMU itself, over `rdma` or `tcp`.
    Qemu { fabric: &'static str, help: QemuHelp },
}

/// What QEMU does about a guest that writes too fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QemuHelp {
    Nothing,
    AutoConverge,
    Postcopy,
}

impl Mover {
    pub(crate) const PRECOPY: Mover = Mover::Ours { postcopy: false, throttle: false };
    pub(crate) const THROTTLED: Mover = Mover::Ours { postcopy: false, throttle: true };
    pub(crate) const POSTCOPY: Mover = Mover::Ours { postcopy: true, throttle: false };

    fn is_ours(self) -> bool {
        matches!(self, Mover::Ours { .. })
    }
}

/// How much a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rate {
    /// Its working set is only checked.
    Nothing,
    MibPerSecond(u64),
    /// As fast as it goes.
    WithoutPause,
}

impl Rate {
    fn mib_per_second(self) -> Option<u64> {
        match self {
            Rate::Nothing => Some(0),
            Rate::MibPerSecond(mib) => Some(mib),
            Rate::WithoutPause => None,
        }
    }

    fn describe(self) -> String {
        let rate = self.mib_per_second();
        rate.map_or("written without pause".to_owned(), |mib| format!("{mib} MiB/s written"))
    }

    fn of(self, workload: &Workload) -> Workload {
        let workload = workload.clone();
        match self {
            Rate::Nothing => Workload { mib: 0, touch_mib: workload.mib + workload.touch_mib, ..workload },
            Rate::MibPerSecond(rate_mib) => Workload { rate_mib, ..workload },
            Rate::WithoutPause => Workload { rate_mib: 0, ..workload },
        }
    }
}

/// Who moves which guest over what.
pub(crate) struct Course<'a> {
    pub(crate) agents: (&'a Agent, &'a Agent),
    pub(crate) contestants: &'a [Contestant],
    pub(crate) rates: &'a [Rate],
    /// What rates are told as multiples of.
    pub(crate) link_mib_per_second: f64,
    /// What every mover is told to keep to while the guest runs at the source; none where the link holds them all.
    pub(crate) limit_mib_per_second: Option<u64>,
    /// Ours.
    pub(crate) fabric: &'static str,
    /// What QEMU's destination listens at, by fabric.
    pub(crate) listen: fn(&str) -> String,
    /// But for what it does.
    pub(crate) machine: QemuBuilder,
    pub(crate) guest_bytes: u64,
    /// But for its rate.
    pub(crate) workload: Workload,
    /// The downtime that everybody may have.
    pub(crate) aim: Duration,
    /// After so long without an end, an operator allows any downtime.
    pub(crate) operator_patience: Duration,
    /// The same, where throttling may still help.
    pub(crate) throttled_patience: Duration,
    /// Longest that a guest takes to boot, or to check its pages.
    pub(crate) guest_patience: Duration,
    /// Between two looks at an agent's memory.
    pub(crate) look_interval: Duration,
    /// Between two looks whether QEMU's own migration is done.
    pub(crate) own_interval: Duration,
}

/// What a move took.
struct Moved {
    called: SystemTime,
    /// From the call to the last page.
    total_seconds: f64,
    /// As its mover says it.
    reported_seconds: f64,
    /// Of the downtime, where its mover tells of any.
    parts: Vec<(String, f64)>,
    /// From the resume to the last page, of ours.
    postcopy_seconds: Option<f64>,
    throttle_peak_percent: Option<u32>,
}

impl Moved {
    fn note(&self, report: &mut Report, name: &str) {
        report.add_time(name, self.total_seconds);
        report.sample(name, "downtime_reported_seconds", self.reported_seconds);
        for (part, seconds) in &self.parts {
            report.sample(name, &format!("part_{part}_seconds"), *seconds);
        }
        if let Some(percent) = self.throttle_peak_percent {
            report.sample(name, "throttle_peak_percent", percent.into());
        }
    }
}

/// Measures everything once, and says by `failure` what failed of ours; QEMU's failures are counted as what they are.
pub(crate) fn run(
    report: &mut Report,
    course: &Course<'_>,
    failure: impl Fn(&str, &Error) -> String,
) -> Vec<String> {
    let mut failures = Vec::new();
    for &rate in course.rates {
        for &contestant in course.contestants {
            let name = format!("{}, {}", contestant.name, rate.describe());
            if !takes_part(&name) {
                continue;
            }
            eprintln!("dirty rates: {name}");
            match measure(report, course, contestant, rate, &name) {
                Ok(()) => {}
                Err(error) if contestant.mover.is_ours() => failures.push(failure(&name, &error)),
                Err(error) => {
                    eprintln!("{name}: {error:#}");
                    report.note(&name, "failed", json!(format!("{error:#}")));
                }
            }
        }
    }
    failures
}

fn measure(
    report: &mut Report,
    course: &Course<'_>,
    contestant: Contestant,
    rate: Rate,
    name: &str,
) -> Result<()> {
    let mover = contestant.mover;
    let here = course.machine.clone().proof(rate.of(&course.workload)).start()?;
    here.wait_ready(course.guest_patience)?;
    // QEMU's own has nobody to tell it to run.
    let there = here.destination().paused(mover.is_ours()).start()?;
    here.qmp_events()?;
    let moved = match mover {
        Mover::Ours { postcopy, throttle } => ours(course, &here, &there, postcopy, throttle)?,
        Mover::Qemu { fabric, help } => qemus(course, &here, &there, fabric, help)?,
    };
    let pause = Pause::of(&here, &there, course.look_interval)?;
    let lost_pages = lost_pages(&there, mover.is_ours(), course.guest_bytes, course.guest_patience)?;
    report.sample(name, "lost_pages", lost_pages as f64);
    if let Some(seen) = downtime_seen(&here, &there) {
        report.sample(name, "downtime_seen_seconds", seen.as_secs_f64());
    }
    report.sample(name, "downtime_seconds", pause.seconds()?);
    moved.note(report, name);
    let told = ticks(&here, (moved.called, pause.stopped))?;
    if let Some(written) = written_mib_per_second(&told, course.workload.verify_rate_mib) {
        report.sample(name, "written_mib_per_second", written);
    }
    if let Some(mib) = rate.mib_per_second() {
        report.note(name, "rate_of_link", json!(mib as f64 / course.link_mib_per_second));
    }
    report.note(name, "way", json!(contestant.name));
    report.note(name, "fabric", json!(course.fabric));
    report.note(name, "tick_ms", json!(course.workload.tick_ms));
    let last_page = match mover {
        Mover::Qemu { help: QemuHelp::Postcopy, .. } => pause.completed,
        _ => moved.postcopy_seconds.map(|seconds| pause.resumed + Duration::from_secs_f64(seconds)),
    };
    if let Some(last_page) = last_page {
        report.sample(name, "postcopy_seconds", between(pause.resumed, last_page)?);
        stalls(report, name, &ticks(&there, (pause.resumed, last_page))?);
    }
    Ok(())
}

/// What the guest told there from a time on to the first time behind another: that tells of what was before it, too.
fn ticks(guest: &Qemu, (from, to): (SystemTime, SystemTime)) -> Result<Vec<Tick>> {
    let now = (Instant::now(), SystemTime::now());
    let at = |time: SystemTime| -> Result<Instant> {
        now.0.checked_sub(now.1.duration_since(time)?).context("the host has not run for so long")
    };
    let (from, to) = (at(from)?, at(to)?);
    let told = guest.ticks().into_iter().filter(|(at, _)| *at >= from).map(|(at, tick)| (at > to, tick));
    let mut ticks = Vec::new();
    for (is_behind, tick) in told {
        ticks.push(tick);
        if is_behind {
            break;
        }
    }
    Ok(ticks)
}

/// What the guest did write by its own clock, but for the memory that it only checks.
fn written_mib_per_second(ticks: &[Tick], verify_rate_mib: u64) -> Option<f64> {
    let (first, last) = (ticks.first()?, ticks.last()?);
    let checked_bytes = (last.pages_checked - first.pages_checked) * PAGE_BYTES;
    let seconds = (last.us - first.us) as f64 / 1e6;
    let checked_mib_per_second = checked_bytes as f64 / MIB as f64 / seconds;
    (seconds > 0.0).then_some((checked_mib_per_second - verify_rate_mib as f64).max(0.0))
}

/// How long single pages kept the guest waiting in post-copy, as it says itself: the longest of each tick.
fn stalls(report: &mut Report, name: &str, ticks: &[Tick]) {
    let mut worst: Vec<f64> = ticks.iter().map(|tick| tick.worst_us as f64 / 1e6).collect();
    worst.sort_by(f64::total_cmp);
    report.sample(name, "postcopy_ticks", worst.len() as f64);
    for (key, share) in [("stall_p50_seconds", 0.5), ("stall_p99_seconds", 0.99), ("stall_max_seconds", 1.0)]
    {
        if let Some(value) = quantile(&worst, share) {
            report.sample(name, key, value);
        }
    }
}

fn ours(course: &Course<'_>, here: &Qemu, there: &Qemu, postcopy: bool, throttle: bool) -> Result<Moved> {
    let patience = if throttle { course.throttled_patience } else { course.operator_patience };
    let parameters = v1::MigrationParameters {
        max_downtime: Some(course.aim.try_into()?),
        // None unless there is one.
        bandwidth_limit_bits_per_second: course.limit_mib_per_second.unwrap_or_default() * MIB * 8,
        timeout: Some(patience.try_into()?),
        timeout_action: v1::TimeoutAction::Force.into(),
        no_progress_timeout: Some(Duration::from_secs(1).try_into()?),
        postcopy: if postcopy { v1::Postcopy::Allow } else { v1::Postcopy::Never }.into(),
        throttle_max_percent: if throttle { MOST_THROTTLE_PERCENT } else { 0 },
        ..order(course.fabric, "dynamic")?
    };
    let voyage = migrate(course.agents, (here, there), parameters, course.look_interval)?;
    let progress = &voyage.progress;
    let total_seconds = voyage.total_seconds()?;
    let postcopy_seconds = progress.postcopy.then(|| seconds(progress.postcopy_time)).transpose()?;
    Ok(Moved {
        called: voyage.called,
        total_seconds: total_seconds + postcopy_seconds.unwrap_or_default(),
        reported_seconds: voyage.downtime_seconds()?,
        parts: voyage.downtime_parts()?,
        postcopy_seconds,
        throttle_peak_percent: throttle.then_some(progress.throttle_peak_percent),
    })
}

fn qemus(course: &Course<'_>, here: &Qemu, there: &Qemu, fabric: &str, help: QemuHelp) -> Result<Moved> {
    let limit = course.limit_mib_per_second.map_or(UNLIMITED_BYTES_PER_SECOND, |mib| mib * MIB);
    let way = Way {
        listen: &(course.listen)(fabric),
        capability: match help {
            QemuHelp::Nothing => None,
            QemuHelp::AutoConverge => Some("auto-converge"),
            QemuHelp::Postcopy => Some("postcopy-ram"),
        },
        parameters: json!({
            "max-bandwidth": limit,
            // None, as ours.
            "max-postcopy-bandwidth": 0,
            "downtime-limit": u64::try_from(course.aim.as_millis())?,
            "max-cpu-throttle": MOST_THROTTLE_PERCENT,
        }),
    };
    let help = match help {
        QemuHelp::Postcopy => Help::BeginPostcopy,
        QemuHelp::AutoConverge => Help::AllowDowntime(course.throttled_patience),
        QemuHelp::Nothing => Help::AllowDowntime(course.operator_patience),
    };
    let moved = own::migrate_helped(here, there, &way, help, course.own_interval)?;
    Ok(Moved {
        called: moved.called,
        total_seconds: moved.seconds("total-time")?,
        reported_seconds: moved.seconds("downtime")?,
        parts: Vec::new(),
        postcopy_seconds: None,
        throttle_peak_percent: None,
    })
}
