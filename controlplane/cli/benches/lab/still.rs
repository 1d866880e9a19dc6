//! A guest that stands still: 200 MiB of random data in it, the same bytes for
//! everybody, beside what the link can do.

use std::io::{BufWriter, Write as _};

use anyhow::{Context as _, Result};
use ramferry_lab::{Accel, Qemu, QemuBuilder, RamBlock};
use tempfile::NamedTempFile;

use crate::contest::{self, Contestant, Move, QUEUE_PAIRS, STREAMS};
use crate::hosts::Hosts;
use crate::link::{measure_perftest, measure_sockets, perftest_name, sockets_name};
use crate::measuring::report::Report;
use crate::measuring::takes_part;

const MIB: u64 = 1 << 20;
const GUEST_BYTES: u64 = 256 * MIB;
const FILL_BYTES: u64 = 200 * MIB;
const FILL_ADDRESS: u64 = 32 * MIB;
const ONE_QUEUE_PAIR: Contestant = Contestant::Ours {
    fabric: "verbs",
    registration: "dynamic",
    streams: 1,
    pin_budget_bytes: 0,
    postcopy: false,
};
const BUDGET: Contestant = Contestant::Ours {
    fabric: "verbs",
    registration: "dynamic",
    streams: QUEUE_PAIRS,
    pin_budget_bytes: 64 * MIB,
    postcopy: false,
};
/// One case. Those that are compared are next to one another: the machine does other things, too.
#[derive(Clone, Copy)]
enum Case {
    Perftest(usize),
    Sockets(usize),
    Move(Contestant),
    /// Into memory that was written before, as `ib_write_bw`'s is: nobody has to allocate it.
    Onto(Contestant),
}

const CASES: [Case; 14] = [
    Case::Move(Contestant::QEMU_DYNAMIC),
    Case::Move(Contestant::DYNAMIC),
    Case::Onto(Contestant::DYNAMIC),
    Case::Perftest(QUEUE_PAIRS),
    Case::Onto(Contestant::PIN_ALL),
    Case::Move(Contestant::PIN_ALL),
    Case::Move(Contestant::QEMU_PIN_ALL),
    Case::Move(ONE_QUEUE_PAIR),
    Case::Perftest(1),
    Case::Move(BUDGET),
    Case::Sockets(1),
    Case::Sockets(STREAMS),
    Case::Move(Contestant::TCP),
    Case::Move(Contestant::QEMU_TCP),
];

impl Case {
    fn name(self) -> String {
        match self {
            Case::Perftest(queue_pairs) => perftest_name(queue_pairs),
            Case::Sockets(streams) => sockets_name(streams),
            Case::Move(contestant) => contestant.name(),
            Case::Onto(contestant) => format!("{}, touched", contestant.name()),
        }
    }
}

/// Measures everything, `runs` times in turns; what failed.
pub(crate) fn run(report: &mut Report, hosts: &Hosts, runs: usize) -> Result<Vec<String>> {
    let fill = random_file()?;
    warm_up(hosts)?;
    let mut failures = Vec::new();
    for run in 1..=runs {
        for case in CASES.into_iter().filter(|case| takes_part(&case.name())) {
            let name = case.name();
            eprintln!("still guest, {name}: run {run} of {runs}");
            let measured = match case {
                Case::Perftest(queue_pairs) => measure_perftest(report, &name, FILL_BYTES, queue_pairs),
                Case::Sockets(streams) => measure_sockets(report, &name, fill.path(), FILL_BYTES, streams),
                Case::Move(contestant) | Case::Onto(contestant) => {
                    let touched = matches!(case, Case::Onto(_));
                    measure(hosts, contestant, &fill, touched).map(|moved| add(report, &name, &moved))
                }
            };
            if let Err(error) = measured {
                failures.push(hosts.failure(&format!("still guest, {name}, run {run}"), &error));
            }
        }
    }
    compare(report);
    Ok(failures)
}

/// Programs are read from the host's files the first time that they run.
pub(crate) fn warm_up(hosts: &Hosts) -> Result<()> {
    for contestant in [Contestant::QEMU_DYNAMIC, Contestant::DYNAMIC] {
        let empty = machine().paused(true).start()?;
        contest::run(hosts, contestant, &empty, &contestant.destination(machine())?)?;
    }
    Ok(())
}

pub(crate) fn measure(
    hosts: &Hosts,
    contestant: Contestant,
    fill: &NamedTempFile,
    touched: bool,
) -> Result<Move> {
    let loader = format!("loader,file={},addr={FILL_ADDRESS:#x},force-raw=on", fill.path().display());
    let from = machine().paused(true).arg("-device").arg(loader).start()?;
    let to = contestant.destination(machine())?;
    if touched {
        let piece = vec![0x5a; MIB as usize];
        for offset in (0..FILL_BYTES).step_by(MIB as usize) {
            to.write_ram(FILL_ADDRESS + offset, &piece)?;
        }
    }
    let moved = contest::run(hosts, contestant, &from, &to)?;
    anyhow::ensure!(is_there(&to, fill)?, "the guest's data did not arrive");
    Ok(moved)
}

fn machine() -> QemuBuilder {
    Qemu::builder().block(RamBlock::node(GUEST_BYTES)).accel(Accel::Tcg)
}

fn add(report: &mut Report, name: &str, moved: &Move) {
    let whole = format!("{name}, whole");
    report.add(&whole, FILL_BYTES, moved.whole_seconds);
    moved.note(report, &whole);
    report.add(&format!("{name}, copy"), moved.transferred_bytes, moved.copy_seconds);
    if name == Contestant::DYNAMIC.name() {
        let beside = format!("{name}, copy beside pin-all");
        report.add(&beside, moved.transferred_bytes, moved.copy_seconds);
    }
    if let Some(seconds) = moved.first_byte_seconds {
        report.add_time(&format!("{name}, first bytes"), seconds);
    }
}

fn compare(report: &mut Report) {
    let of = |contestant: Contestant, what: &str| format!("{}, {what}", contestant.name());
    let pair = perftest_name(QUEUE_PAIRS);
    for ours in [Contestant::DYNAMIC, Contestant::PIN_ALL, BUDGET] {
        report.compare(&of(ours, "copy"), &pair);
    }
    for ours in [Contestant::DYNAMIC, Contestant::PIN_ALL] {
        report.compare(&of(ours, "touched, copy"), &pair);
    }
    report.compare(&of(ONE_QUEUE_PAIR, "copy"), &perftest_name(1));
    let sockets = [1, STREAMS].map(sockets_name);
    if let Some(sockets) = report.fastest(&sockets.each_ref().map(String::as_str)).map(str::to_owned) {
        report.compare(&of(Contestant::TCP, "copy"), &sockets);
    }
    for (ours, its) in [
        (Contestant::DYNAMIC, Contestant::QEMU_DYNAMIC),
        (ONE_QUEUE_PAIR, Contestant::QEMU_DYNAMIC),
        (BUDGET, Contestant::QEMU_DYNAMIC),
        (Contestant::PIN_ALL, Contestant::QEMU_PIN_ALL),
        (Contestant::TCP, Contestant::QEMU_TCP),
    ] {
        report.compare(&of(ours, "whole"), &of(its, "whole"));
    }
    for its in [Contestant::QEMU_DYNAMIC, Contestant::QEMU_PIN_ALL] {
        report.compare(&of(its, "copy"), &perftest_name(1));
    }
    report.compare(&of(Contestant::DYNAMIC, "copy beside pin-all"), &of(Contestant::PIN_ALL, "copy"));
    report.compare(&of(Contestant::PIN_ALL, "first bytes"), &of(Contestant::DYNAMIC, "first bytes"));
}

/// A file of words without any pattern to them.
pub(crate) fn random_file() -> Result<NamedTempFile> {
    let file = tempfile::Builder::new().prefix("ramferry-bench").tempfile_in("/dev/shm")?;
    let mut writer = BufWriter::with_capacity(MIB as usize, file.as_file());
    let mut state = 0_u64;
    for _ in 0..FILL_BYTES / 8 {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        writer.write_all(&(mixed ^ (mixed >> 31)).to_le_bytes())?;
    }
    writer.flush()?;
    drop(writer);
    Ok(file)
}

/// Whether the data is where it was at the source.
fn is_there(to: &Qemu, fill: &NamedTempFile) -> Result<bool> {
    use std::os::unix::fs::FileExt as _;
    let ram = to.ram_files()[0].as_deref().context("the guest's RAM has no name")?;
    let ram = std::fs::File::open(ram)?;
    let (mut here, mut there) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for offset in (0..FILL_BYTES).step_by(MIB as usize) {
        fill.as_file().read_exact_at(&mut here, offset)?;
        ram.read_exact_at(&mut there, FILL_ADDRESS + offset)?;
        if here != there {
            return Ok(false);
        }
    }
    Ok(true)
}
