//! Downtime and total time against the rate at which the guest writes, from nothing to four times the link, by every way
//! there is: rounds alone, with the guest throttled, post-copy, and QEMU's own three. The link is a bandwidth limit that
//! all are held to while the guest runs at the source; none is in its pause, nor in post-copy, when the guest waits for it.

use std::time::Duration;

use anyhow::{Result, ensure};
use ramferry_lab::{Accel, Fill, Qemu, RamBlock, Workload};

use crate::measuring::agents::{Agent, Probes};
use crate::measuring::rates::{self, Contestant, Course, Mover, QemuHelp, Rate};
use crate::measuring::report::Report;
use crate::{LOOK_INTERVAL, OWN_INTERVAL};

const MIB: u64 = 1 << 20;
const GUEST_BYTES: u64 = 512 * MIB;
/// As much as a link of 1 Gbit/s carries.
const LINK_MIB_PER_SECOND: u64 = 119;
/// From nothing to four times the link.
const RATES: [Rate; 6] = [
    Rate::Nothing,
    Rate::MibPerSecond(LINK_MIB_PER_SECOND / 2),
    Rate::MibPerSecond(LINK_MIB_PER_SECOND),
    Rate::MibPerSecond(LINK_MIB_PER_SECOND * 3 / 2),
    Rate::MibPerSecond(LINK_MIB_PER_SECOND * 2),
    Rate::MibPerSecond(LINK_MIB_PER_SECOND * 4),
];
const CONTESTANTS: [Contestant; 6] = [
    Contestant { name: "pre-copy", mover: Mover::PRECOPY },
    Contestant { name: "throttled", mover: Mover::THROTTLED },
    Contestant { name: "post-copy", mover: Mover::POSTCOPY },
    Contestant { name: "qemu pre-copy", mover: Mover::Qemu { fabric: "tcp", help: QemuHelp::Nothing } },
    Contestant {
        name: "qemu auto-converge",
        mover: Mover::Qemu { fabric: "tcp", help: QemuHelp::AutoConverge },
    },
    Contestant { name: "qemu post-copy", mover: Mover::Qemu { fabric: "tcp", help: QemuHelp::Postcopy } },
];

pub(crate) fn run(report: &mut Report) -> Result<()> {
    let agents = (Agent::start(Probes::Off)?, Agent::start(Probes::Off)?);
    let course = Course {
        agents: (&agents.0, &agents.1),
        contestants: &CONTESTANTS,
        rates: &RATES,
        link_mib_per_second: LINK_MIB_PER_SECOND as f64,
        limit_mib_per_second: Some(LINK_MIB_PER_SECOND),
        fabric: "tcp",
        listen: |fabric| format!("{fabric}:127.0.0.1:0"),
        machine: Qemu::builder().block(RamBlock::node(GUEST_BYTES)).accel(Accel::best()),
        guest_bytes: GUEST_BYTES,
        workload: Workload {
            mib: 192,
            touch_mib: 192,
            tick_ms: 5,
            fill: Fill::Random,
            ..Workload::default()
        },
        aim: Duration::from_millis(100),
        operator_patience: Duration::from_secs(8),
        throttled_patience: Duration::from_secs(20),
        guest_patience: Duration::from_secs(120),
        look_interval: LOOK_INTERVAL,
        own_interval: OWN_INTERVAL,
    };
    let failures = rates::run(report, &course, |name, error| format!("{name}: {error:#}"));
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}
