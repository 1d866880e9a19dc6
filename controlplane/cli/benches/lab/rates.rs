//! Downtime and total time against the rate at which the guest writes, from nothing to four times the link and without any
//! pause, by every way there is: over RDMA ours by rounds alone, with the guest throttled, and post-copy, and QEMU's own
//! pre-copy and auto-converge; QEMU's own post-copy is over tcp, for over RDMA it has none.
//!
//! QEMU does not keep its RDMA to a limit of bandwidth. So the link itself is slow here (`tc`, a token bucket at the source's
//! device), for all that the source sends: pages, device state and what the agents say to each other, in the guest's pause
//! and in post-copy, too. What the slow link carries is measured in the same run, and the guest's rates are told as multiples
//! of that.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use ramferry_lab::{Accel, Fill, Qemu, RamBlock, Workload};

use crate::contest::listen;
use crate::hosts::{Control, Hosts};
use crate::link::{measure_perftest, measure_sockets, perftest_name, sockets_name};
use crate::measuring::ram::fresh_file;
use crate::measuring::rates::{self, Contestant, Course, Mover, QemuHelp, Rate};
use crate::measuring::report::Report;
use crate::shaped::{Shaped, keep_a_quota};

const MIB: u64 = 1 << 20;
const GUEST_BYTES: u64 = 64 * MIB;
/// So little that a guest of an emulated machine can write four times of it.
const LINK_MIB_PER_SECOND: u64 = 4;
const RATES: [Rate; 4] = [
    Rate::Nothing,
    Rate::MibPerSecond(LINK_MIB_PER_SECOND),
    Rate::MibPerSecond(LINK_MIB_PER_SECOND * 4),
    Rate::WithoutPause,
];
const CONTESTANTS: [Contestant; 6] = [
    Contestant { name: "pre-copy", mover: Mover::PRECOPY },
    Contestant { name: "throttled", mover: Mover::THROTTLED },
    Contestant { name: "post-copy", mover: Mover::POSTCOPY },
    Contestant { name: "qemu rdma pre-copy", mover: Mover::Qemu { fabric: "rdma", help: QemuHelp::Nothing } },
    Contestant {
        name: "qemu rdma auto-converge",
        mover: Mover::Qemu { fabric: "rdma", help: QemuHelp::AutoConverge },
    },
    Contestant { name: "qemu tcp post-copy", mover: Mover::Qemu { fabric: "tcp", help: QemuHelp::Postcopy } },
];
/// Enough for some seconds, in which what the bucket held at first does not count.
const PROBE_BYTES: u64 = 12 * MIB;

/// Measures everything, `runs` times in turns; what failed of ours.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<Vec<String>> {
    keep_a_quota()?;
    let hosts = Hosts::start(Control::Link)?;
    let link = Shaped::to(LINK_MIB_PER_SECOND)?;
    let course = Course {
        agents: (&hosts.source, &hosts.destination),
        contestants: &CONTESTANTS,
        rates: &RATES,
        link_mib_per_second: measure_link(report)?,
        limit_mib_per_second: None,
        fabric: "verbs",
        listen,
        machine: Qemu::builder().block(RamBlock::node(GUEST_BYTES)).accel(Accel::Tcg),
        guest_bytes: GUEST_BYTES,
        workload: Workload {
            mib: 4,
            touch_mib: 8,
            verify_rate_mib: 1,
            tick_ms: 20,
            fill: Fill::Random,
            ..Workload::default()
        },
        // QEMU's default.
        aim: Duration::from_millis(300),
        operator_patience: Duration::from_secs(6),
        throttled_patience: Duration::from_secs(20),
        guest_patience: Duration::from_secs(20),
        look_interval: Duration::from_millis(100),
        own_interval: Duration::from_millis(100),
    };
    let mut failures = Vec::new();
    for run in 1..=runs {
        eprintln!("dirty rates: run {run} of {runs}");
        failures.extend(rates::run(report, &course, |name, error| hosts.failure(name, error)));
    }
    report.sample(&link_name(&perftest_name(1)), "dropped_packets", link.dropped_packets()? as f64);
    Ok(failures)
}

fn link_name(of: &str) -> String {
    format!("slow link, {of}")
}

/// What the link carries, in MiB a second: of RDMA writes. Plain sockets are beside it.
fn measure_link(report: &mut Report) -> Result<f64> {
    let name = link_name(&perftest_name(1));
    measure_perftest(report, &name, PROBE_BYTES, 1)?;
    let file = fresh_file(PROBE_BYTES)?;
    fs::write(file.path(), vec![0xa5; PROBE_BYTES as usize])?;
    measure_sockets(report, &link_name(&sockets_name(1)), file.path(), PROBE_BYTES, 1)?;
    let bytes_per_second = report.bytes_per_second(&name).context("the link was not measured")?;
    Ok(bytes_per_second / MIB as f64)
}
