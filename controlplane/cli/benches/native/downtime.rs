//! Downtime under stress: a Debian guest whose `stress` rewrites 200 MB without pause goes to and fro. It never converges;
//! the policy moves it all the same, by post-copy.
//!
//! Measures 50 migrations over each fabric and, between the fabrics, 10 of each way that QEMU itself has to end such a
//! migration, over loopback without a limit of bandwidth:
//!
//! - `qemu pre-copy`: with the downtime of 300 ms that it allows unless told otherwise;
//! - `qemu auto-converge`: with the downtime that ramferry aims at, and the guest throttled until it fits;
//! - `qemu post-copy`: begun after the first pass.
//!
//! Where a move of QEMU's own does not end, or the guest hangs behind it, that is counted (`guests_hung`), and another is
//! booted.
//!
//! Of both, the time is that from the stop at the source to the resume at the destination, by the events of the two QEMUs.
//! Beside it is what else there is to tell it by: `reported_seconds` is what its mover says (ramferry's agent, until the word
//! that the guest runs has come back to it; QEMU, in post-copy, until the source has sent the device state), `seen_seconds`
//! what the guest's own ticks say.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use ramferry_lab::{Accel, DebianGuest, Guest, Qemu, RamBlock, joined_lines};
use ramferry_proto::v1;
use serde_json::json;

use crate::measuring::agents::{Agent, Probes, migrate, order};
use crate::measuring::own::{self, Help, Pause, Way};
use crate::measuring::report::{Report, quantile};
use crate::measuring::takes_part;
use crate::{LOOK_INTERVAL, OWN_INTERVAL};

const GUEST_BYTES: u64 = 1 << 30;
const MIGRATIONS: usize = 50;
const OWN_MIGRATIONS: usize = 10;
const PATIENCE: Duration = Duration::from_secs(120);
/// A guest ticks ten times a second.
const TICK_PATIENCE: Duration = Duration::from_secs(10);
/// At most so much is wanted; of ours, post-copy sees to it.
const AIM: Duration = Duration::from_millis(15);
/// QEMU's default.
const OWN_DOWNTIME_LIMIT: Duration = Duration::from_millis(300);
/// After so long an operator allows any downtime.
const OPERATOR_PATIENCE: Duration = Duration::from_secs(20);

/// How QEMU itself moves the guest.
#[derive(Clone, Copy)]
enum Own {
    Precopy,
    AutoConverge,
    Postcopy,
}

impl Own {
    const ALL: [Self; 3] = [Self::Precopy, Self::AutoConverge, Self::Postcopy];

    fn as_str(self) -> &'static str {
        match self {
            Self::Precopy => "qemu pre-copy",
            Self::AutoConverge => "qemu auto-converge",
            Self::Postcopy => "qemu post-copy",
        }
    }

    fn way(self) -> Way<'static> {
        let limit = if matches!(self, Self::AutoConverge) { AIM } else { OWN_DOWNTIME_LIMIT };
        Way {
            listen: "tcp:127.0.0.1:0",
            capability: match self {
                Self::Precopy => None,
                Self::AutoConverge => Some("auto-converge"),
                Self::Postcopy => Some("postcopy-ram"),
            },
            // Its default limit of bandwidth is not what is measured.
            parameters: json!({
                "max-bandwidth": 1_u64 << 40,
                "max-postcopy-bandwidth": 0,
                "downtime-limit": limit.as_millis() as u64,
                // In bigger steps than QEMU's own, so that it takes less long.
                "cpu-throttle-initial": 50,
                "cpu-throttle-increment": 20,
            }),
        }
    }

    fn help(self) -> Help {
        match self {
            Self::Postcopy => Help::BeginPostcopy,
            _ => Help::AllowDowntime(OPERATOR_PATIENCE),
        }
    }
}

/// The downtimes of one way: each as its mover says, by the events of both QEMUs, and by the guest's ticks.
#[derive(Default)]
struct Downtimes {
    reported: Vec<f64>,
    events: Vec<f64>,
    seen: Vec<f64>,
    /// Guests that did nothing more behind their move, or whose move did not end.
    hung: usize,
}

pub(crate) fn run(report: &mut Report) -> Result<()> {
    let debian = match DebianGuest::find() {
        Ok(debian) => debian,
        Err(reason) => {
            eprintln!("SKIPPED downtime under stress: {reason}");
            return Ok(());
        }
    };
    let agents = (Agent::start(Probes::Off)?, Agent::start(Probes::Off)?);
    ours(report, &agents, "shm", &debian)?;
    let best = qemus(report, &debian)?;
    ours(report, &agents, "tcp", &debian)?;
    let Some(best) = best else { return Ok(()) };
    for fabric in ["shm", "tcp"] {
        // The highest of 10 is as near to a p99 as they come.
        for (quantile, of) in [("p50", "p50"), ("p99", "max")] {
            report.compare(&name(&format!("over {fabric}"), quantile), &name(best.as_str(), of));
        }
    }
    Ok(())
}

fn ours(report: &mut Report, agents: &(Agent, Agent), fabric: &str, debian: &DebianGuest) -> Result<()> {
    if !takes_part(&name(&format!("over {fabric}"), "")) {
        return Ok(());
    }
    let mut here = under_stress(debian)?;
    let (mut downtimes, mut parts) = (Downtimes::default(), BTreeMap::<String, Vec<f64>>::new());
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
        here.qmp_events()?;
        let voyage = migrate((&agents.0, &agents.1), (&here, &there), parameters, LOOK_INTERVAL)?;
        let alive = downtimes.add(voyage.downtime_seconds()?, &here, &there)?;
        ensure!(alive, "the guest says nothing behind its migration");
        for (part, seconds) in voyage.downtime_parts()? {
            parts.entry(part).or_default().push(seconds);
        }
        here = there;
    }
    let who = format!("over {fabric}");
    downtimes.publish(report, &who, [("p50", 0.5), ("p99", 0.99)]);
    for (part, seconds) in parts {
        for (quantile, share_of_all) in [("p50", 0.5), ("p99", 0.99)] {
            let name = name(&who, &format!("part {part}, {quantile}"));
            report.add_time(&name, share(&seconds, share_of_all));
        }
        report.note(&name(&who, &format!("part {part}, p99")), "each_seconds", json!(seconds));
    }
    Ok(())
}

/// Moves a guest by each of QEMU's own ways in turns; which had the least downtime.
fn qemus(report: &mut Report, debian: &DebianGuest) -> Result<Option<Own>> {
    let ways = Own::ALL.into_iter().filter(|own| takes_part(&name(own.as_str(), "")));
    let mut taken: Vec<(Own, Downtimes)> = ways.map(|own| (own, Downtimes::default())).collect();
    if taken.is_empty() {
        return Ok(None);
    }
    let mut here = under_stress(debian)?;
    let mut last: Option<usize> = None;
    for migration in 1..=OWN_MIGRATIONS {
        for index in 0..taken.len() {
            if let Err(error) = here.qmp_events() {
                eprintln!("the guest's QEMU has ended behind its move: {error:#}; on with a new one");
                if let Some(last) = last {
                    taken[last].1.hung += 1;
                }
                here = under_stress(debian)?;
                here.qmp_events()?;
            }
            last = Some(index);
            let (own, downtimes) = &mut taken[index];
            eprintln!("downtime of {}: migration {migration} of {OWN_MIGRATIONS}", own.as_str());
            // Nobody tells it to run.
            let there = here.destination().paused(false).start()?;
            let goes_on = own::migrate_helped(&here, &there, &own.way(), own.help(), OWN_INTERVAL)
                .and_then(|moved| downtimes.add(moved.seconds("downtime")?, &here, &there));
            here = match goes_on {
                Ok(true) => there,
                hung => {
                    let why =
                        hung.map_or_else(|error| format!("{error:#}"), |_| "the guest hangs".to_owned());
                    eprintln!("{}: {why}; on with a new guest", own.as_str());
                    downtimes.hung += 1;
                    under_stress(debian)?
                }
            };
        }
    }
    let measured = || taken.iter().filter(|(_, downtimes)| !downtimes.events.is_empty());
    for (own, downtimes) in measured() {
        downtimes.publish(report, own.as_str(), [("p50", 0.5), ("max", 1.0)]);
    }
    let median = |(_, downtimes): &&(Own, Downtimes)| share(&downtimes.events, 0.5);
    Ok(measured().min_by(|a, b| median(a).total_cmp(&median(b))).map(|(own, _)| *own))
}

impl Downtimes {
    /// Whether the guest goes on.
    fn add(&mut self, reported: f64, from: &Qemu, to: &Qemu) -> Result<bool> {
        self.reported.push(reported);
        self.events.push(Pause::of(from, to, LOOK_INTERVAL)?.seconds()?);
        // A whole one: the first line may be the end of one that was cut.
        let ticks = to.wait_line(|line| tick(line).is_some(), TICK_PATIENCE).is_ok();
        self.seen.extend(silence(from, to));
        Ok(ticks)
    }

    fn publish(&self, report: &mut Report, who: &str, shares: [(&str, f64); 2]) {
        for (called, share_of_all) in shares {
            let name = name(who, called);
            report.add_time(&name, share(&self.events, share_of_all));
            report.note(&name, "migrations", json!(self.events.len()));
            report.note(&name, "guests_hung", json!(self.hung));
            for (key, values) in [("reported_seconds", &self.reported), ("seen_seconds", &self.seen)] {
                report.sample(&name, key, share(values, share_of_all));
            }
        }
    }
}

/// A guest whose stress has filled its memory.
pub(crate) fn under_stress(debian: &DebianGuest) -> Result<Qemu> {
    let guest = Guest::Debian(debian.clone());
    let qemu = Qemu::builder().block(RamBlock::node(GUEST_BYTES)).accel(Accel::Tcg).guest(guest).start()?;
    qemu.wait_line(|line| tick(line).is_some(), PATIENCE)?;
    // stress itself says nothing.
    let ticks = qemu.line_count();
    qemu.wait_line_from(ticks, |line| line.starts_with("tick 50 "), PATIENCE)?;
    Ok(qemu)
}

fn name(who: &str, what: &str) -> String {
    format!("downtime under stress {who}, {what}")
}

fn share(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, share).unwrap_or_default()
}

/// The number of a tick, and the guest's clock at it.
fn tick(line: &str) -> Option<(u64, f64)> {
    let (number, clock) = line.strip_prefix("tick ")?.split_once(' ')?;
    Some((number.parse().ok()?, clock.trim().parse().ok()?))
}

/// How long the guest was silent across its move, less its own time between those two ticks.
fn silence(from: &Qemu, to: &Qemu) -> Option<f64> {
    let ticks = |lines: Vec<ramferry_lab::Line>| {
        lines.into_iter().filter_map(|line| Some((line.at, tick(&line.text)?))).collect::<Vec<_>>()
    };
    let before = *ticks(from.lines()).last()?;
    let after = ticks(joined_lines(from, to)).into_iter().find(|(_, (number, _))| *number > before.1.0)?;
    Some((after.0 - before.0).as_secs_f64() - (after.1.1 - before.1.1))
}
