//! A guest of 256 GiB of which 1 GiB was ever touched, beside one of 1 GiB.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result};
use ramferry_lab::{Qemu, RamBlock};

use crate::LOOK_INTERVAL;
use crate::measuring::agents::{Agent, Probes, migrate, order};
use crate::measuring::report::Report;

const GIB: u64 = 1 << 30;
const PIECE_BYTES: u64 = 1 << 20;
/// In pieces that are spread evenly over the guest, as a used guest's are.
const TOUCHED_BYTES: u64 = GIB;
const SIZES_GIB: [u64; 2] = [1, 256];

/// Measures both, `runs` times in turns, and what the agents' page sets take.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let agents = (Agent::start(Probes::Off)?, Agent::start(Probes::Off)?);
    for run in 1..=runs {
        for size_gib in SIZES_GIB {
            eprintln!("guest of {size_gib} GiB, 1 GiB touched: run {run} of {runs}");
            let bytes = size_gib * GIB;
            let guest = Qemu::builder().block(RamBlock::node(bytes)).paused(true).start()?;
            touch(&guest, bytes)?;
            let destination = guest.destination().start()?;
            let parameters = order("shm", "dynamic")?;
            let voyage = migrate((&agents.0, &agents.1), (&guest, &destination), parameters, LOOK_INTERVAL)?;
            let name = |what: &str| format!("{what}, guest of {size_gib} GiB with 1 GiB touched");
            let (bytes_moved, seconds) = (voyage.transferred_bytes(), voyage.total_seconds()?);
            let qemu_seconds =
                voyage.downtime_part_seconds("pause")? + voyage.downtime_part_seconds("device_state")?;
            report.add(&name("whole"), bytes_moved, seconds);
            report.add_time(&name("QEMU's own"), qemu_seconds);
            report.add(&name("but for QEMU's own"), bytes_moved, seconds - qemu_seconds);
            for (side, cost) in [("source", voyage.source), ("destination", voyage.destination)] {
                report.add_share(&name(&format!("{side} memory")), cost.memory_bytes, "guest RAM", bytes);
            }
        }
    }
    for what in ["whole", "but for QEMU's own"] {
        let [small, large] =
            SIZES_GIB.map(|size_gib| format!("{what}, guest of {size_gib} GiB with 1 GiB touched"));
        report.compare(&large, &small);
    }
    Ok(())
}

fn touch(guest: &Qemu, bytes: u64) -> Result<()> {
    let path = guest.ram_files()[0].as_deref().context("the guest's RAM has no name")?;
    let file = OpenOptions::new().write(true).open(path)?;
    let piece = vec![0xa5; PIECE_BYTES as usize];
    let pieces = TOUCHED_BYTES / PIECE_BYTES;
    for index in 0..pieces {
        file.write_all_at(&piece, index * (bytes / pieces))?;
    }
    Ok(())
}
