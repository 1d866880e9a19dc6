//! A guest that stands still, moved by ramferry and by QEMU itself, beside
//! `memcpy` and plain sockets: the same bytes each time.

use std::fs::OpenOptions;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use ramferry_fabric::limits;
use ramferry_lab::{Accel, Fill, Qemu, RamBlock, Workload};
use ramferry_ram::{Access, Memory, PageSets};
use serde_json::json;

use crate::measuring::agents::{Agent, Probes, migrate, order};
use crate::measuring::own::{self, Way};
use crate::measuring::ram::{fresh_file, memory};
use crate::measuring::report::Report;
use crate::{LOOK_INTERVAL, OWN_INTERVAL};

const MIB: u64 = 1 << 20;
const GUEST_BYTES: u64 = 1 << 30;
/// What a guest's firmware and program have of its memory: the rest it writes, with words that have no pattern.
const UNTOUCHED_BYTES: u64 = 64 * MIB;
const PIECE_BYTES: u64 = MIB;
const STREAMS: usize = 2;
const PATIENCE: Duration = Duration::from_secs(120);

/// The destination's memory before the copy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Never touched: the copy allocates it.
    Fresh,
    /// Written before.
    Touched,
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            State::Fresh => "fresh",
            State::Touched => "touched",
        }
    }
}

/// Measures everything, `runs` times in turns.
pub(crate) fn run(report: &mut Report, runs: usize) -> Result<()> {
    let guest = still_guest(GUEST_BYTES)?;
    let agents = (Agent::start(Probes::Off)?, Agent::start(Probes::Off)?);
    for run in 1..=runs {
        for state in [State::Fresh, State::Touched] {
            eprintln!("still guest, {} destination: run {run} of {runs}", state.as_str());
            measure_limits(report, &guest, state)?;
            for way in ["unix", "tcp", "multifd"] {
                measure_qemu(report, &guest, state, way)?;
            }
            for fabric in ["shm", "tcp"] {
                for registration in ["dynamic", "pin-all"] {
                    measure_ramferry(report, (&agents.0, &agents.1), &guest, state, fabric, registration)?;
                }
            }
        }
    }
    compare(report);
    Ok(())
}

/// A guest that has written its memory, and stands still.
pub(crate) fn still_guest(bytes: u64) -> Result<Qemu> {
    let touch_mib = (bytes - UNTOUCHED_BYTES) / MIB;
    let workload = Workload { mib: 16, touch_mib, rate_mib: 16, fill: Fill::Random, ..Workload::default() };
    let guest = Qemu::builder().block(RamBlock::node(bytes)).accel(Accel::best()).proof(workload).start()?;
    guest.wait_ready(PATIENCE)?;
    guest.stop()?;
    Ok(guest)
}

fn compare(report: &mut Report) {
    for state in ["fresh", "touched"] {
        let name = |what: &str| format!("{what}, {state}");
        let sockets = [name("sockets, 1 stream"), name(&format!("sockets, {STREAMS} streams"))];
        let sockets = report.fastest(&sockets.each_ref().map(String::as_str)).map(str::to_owned);
        let qemus = ["unix", "tcp", "multifd"].map(|way| name(&format!("qemu {way}, whole")));
        let qemu = report.fastest(&qemus.each_ref().map(String::as_str)).map(str::to_owned);
        for registration in ["dynamic", "pin-all"] {
            let memcpy = name(if state == "fresh" { "memcpy" } else { "memcpy, warm mapping" });
            report.compare(&name(&format!("shm {registration}, copy")), &memcpy);
            if let Some(sockets) = &sockets {
                report.compare(&name(&format!("tcp {registration}, copy")), sockets);
            }
            for fabric in ["shm", "tcp"] {
                if let Some(qemu) = &qemu {
                    report.compare(&name(&format!("{fabric} {registration}, whole")), qemu);
                }
            }
        }
        for fabric in ["shm", "tcp"] {
            let dynamic = name(&format!("{fabric} dynamic, copy beside pin-all"));
            report.compare(&dynamic, &name(&format!("{fabric} pin-all, copy")));
        }
    }
}

fn measure_ramferry(
    report: &mut Report,
    agents: (&Agent, &Agent),
    guest: &Qemu,
    state: State,
    fabric: &str,
    registration: &str,
) -> Result<()> {
    let destination = destination(guest, state)?;
    let parameters = order(fabric, registration)?;
    let voyage = migrate(agents, (guest, &destination), parameters, LOOK_INTERVAL)?;
    let bytes = voyage.transferred_bytes();
    let name = |what: &str| format!("{fabric} {registration}, {what}, {}", state.as_str());
    report.add(&name("copy"), bytes, voyage.copy_seconds()?);
    if registration == "dynamic" {
        report.add(&name("copy beside pin-all"), bytes, voyage.copy_seconds()?);
    }
    report.add(&name("whole"), bytes, voyage.total_seconds()?);
    report.sample(&name("copy"), "registration_seconds", voyage.registration_seconds()?);
    for (side, cost) in [("source", voyage.source), ("destination", voyage.destination)] {
        report.add(&name(&format!("{side} cpu")), bytes, cost.cpu_seconds);
        let memory = name(&format!("{side} memory"));
        report.add_share(&memory, cost.memory_bytes, "guest RAM", GUEST_BYTES);
    }
    stand_still(guest)
}

fn measure_qemu(report: &mut Report, guest: &Qemu, state: State, way: &str) -> Result<()> {
    let destination = destination(guest, state)?;
    let unix = format!("unix:{}", destination.directory().join("migration").display());
    let way_of_qemu = Way {
        listen: if way == "unix" { &unix } else { "tcp:127.0.0.1:0" },
        capability: (way == "multifd").then_some(way),
        // Its default limit of bandwidth is not what is measured.
        parameters: json!({ "max-bandwidth": 1_u64 << 40, "multifd-channels": STREAMS }),
    };
    let moved = own::migrate(guest, &destination, &way_of_qemu, OWN_INTERVAL)?;
    let name = format!("qemu {way}, whole, {}", state.as_str());
    report.add(&name, moved.transferred_bytes()?, moved.seconds("total-time")?);
    stand_still(guest)
}

/// After its move the source is left in `postmigrate`: it runs a moment, and stands still again.
pub(crate) fn stand_still(guest: &Qemu) -> Result<()> {
    guest.cont()?;
    guest.stop()
}

pub(crate) fn destination(guest: &Qemu, state: State) -> Result<Qemu> {
    let destination = guest.destination().start()?;
    if state == State::Touched {
        let file = destination.ram_files()[0].as_deref().context("the guest's RAM has no name")?;
        touch(file, GUEST_BYTES)?;
    }
    Ok(destination)
}

/// Writes all of a RAM file.
pub(crate) fn touch(path: &Path, bytes: u64) -> Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.seek(SeekFrom::Start(0))?;
    let piece = vec![0x5a; MIB as usize];
    for _ in 0..bytes / MIB {
        file.write_all(&piece)?;
    }
    Ok(())
}

fn measure_limits(report: &mut Report, guest: &Qemu, state: State) -> Result<()> {
    let file = guest.ram_files()[0].as_deref().context("the guest's RAM has no name")?;
    let source = memory(file, GUEST_BYTES, Access::Read)?;
    let pages = source.presence()?;
    let name = |what: &str| format!("{what}, {}", state.as_str());
    let mut add =
        |what: &str, seconds: Duration| report.add(&name(what), pages.bytes(), seconds.as_secs_f64());
    // Each on memory of its own, in the same state.
    let to = limit_destination(state)?;
    add("memcpy", limits::memcpy(&source, &to, &pages, PIECE_BYTES)?);
    if state == State::Touched {
        add("memcpy, warm mapping", limits::memcpy(&source, &to, &pages, PIECE_BYTES)?);
    }
    drop(to);
    for (streams, what) in
        [(1, "sockets, 1 stream".to_owned()), (STREAMS, format!("sockets, {STREAMS} streams"))]
    {
        let to = limit_destination(state)?;
        add(&what, sockets(&source, &to, &pages, streams, state)?);
    }
    Ok(())
}

fn sockets(source: &Memory, to: &Memory, pages: &PageSets, streams: usize, state: State) -> Result<Duration> {
    if state == State::Touched {
        // Into a mapping that is warm, as memcpy's.
        limits::memcpy(source, to, pages, PIECE_BYTES)?;
    }
    Ok(limits::sockets(source, to, pages, PIECE_BYTES, Ipv4Addr::LOCALHOST.into(), streams)?)
}

fn limit_destination(state: State) -> Result<Memory> {
    let file = fresh_file(GUEST_BYTES)?;
    if state == State::Touched {
        touch(file.path(), GUEST_BYTES)?;
    }
    memory(file.path(), GUEST_BYTES, Access::ReadWrite)
}
