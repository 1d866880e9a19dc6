//! `ramferry-lab guest`.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use ramferry_lab::{Accel, Fill, Lost, PAGE_BYTES, Qemu, RamBlock, Tick, Workload};

use super::signals;

const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// Beside the ticks' own distance: a host with other work gives a guest its turns late.
const TICK_PATIENCE: Duration = Duration::from_secs(60);
const VERIFY_TIMEOUT: Duration = Duration::from_secs(300);
/// What the guest needs beside the memory that it works on.
const OWN_MIB: u64 = 32;
const MIB: u64 = 1 << 20;
/// The guest lost something.
const LOST: u8 = 1;

/// Boot the guest that proves itself, and show its ticks.
///
/// The guest writes a stamped pattern over its memory, pass after pass, and checks before it overwrites a page that the
/// page holds what the pass before left there. A page that was lost, torn or left behind is printed where it is found.
/// At the end it checks every page that it ever wrote.
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub(crate) struct GuestArgs {
    /// MiB that are written and checked, over and over
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    mib: u64,
    /// MiB that are written once, and then only checked
    #[arg(long, value_name = "MIB", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
    touch_mib: u64,
    /// MiB written a second; 0: as fast as it goes
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    rate_mib: u64,
    /// What the pages hold
    #[arg(long, value_name = "WHAT", default_value = "random")]
    fill: FillName,
    /// What runs the guest's instructions; KVM where there is KVM
    #[arg(long, value_name = "NAME")]
    accel: Option<AccelName>,
    /// Milliseconds between ticks
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(2..=60_000))]
    tick_ms: u64,
    /// Ticks to show before the end; without it, until Ctrl-C
    #[arg(long, value_name = "COUNT")]
    ticks: Option<u64>,
}

const AFTER: &str = "\
The exit status is 0 where nothing was lost, 1 where something was.

Examples:
  ramferry-lab guest --mib 256 --rate-mib 100
  ramferry-lab guest --ticks 10 --tick-ms 100 --accel tcg
  ramferry-lab run -- target/debug/ramferry-lab guest --ticks 5     in the lab VM, nested";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum AccelName {
    Kvm,
    Tcg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FillName {
    /// Words without any pattern to them
    Random,
    /// Words at a constant distance: cheaper
    Stamp,
    /// Half of the pages become zero in each pass
    Zero,
}

impl GuestArgs {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let stopped = Arc::new(AtomicI32::new(0));
        let stop = Arc::clone(&stopped);
        signals::on_first(move |signal| stop.store(signal, Ordering::Release))?;
        let memory_mib = (self.mib + self.touch_mib + OWN_MIB).next_multiple_of(2);
        let accel = match self.accel {
            Some(AccelName::Kvm) => Accel::Kvm,
            Some(AccelName::Tcg) => Accel::Tcg,
            None => Accel::best(),
        };
        ensure!(Accel::available().contains(&accel), "/dev/kvm cannot be used here: use --accel tcg");
        let workload = Workload {
            mib: self.mib,
            touch_mib: self.touch_mib,
            rate_mib: self.rate_mib,
            tick_ms: self.tick_ms,
            fill: match self.fill {
                FillName::Random => Fill::Random,
                FillName::Stamp => Fill::Stamp,
                FillName::Zero => Fill::Zero,
            },
            ..Workload::default()
        };
        let started = Instant::now();
        let qemu =
            Qemu::builder().accel(accel).block(RamBlock::node(memory_mib * MIB)).proof(workload).start()?;
        qemu.wait_ready(BOOT_TIMEOUT)?;
        println!(
            "guest of {memory_mib} MiB, by {accel:?}, ready after {:.2} s; QEMU is process {}, QMP at {}",
            started.elapsed().as_secs_f64(),
            qemu.pid(),
            qemu.qmp_path().display()
        );
        let followed = self.follow(&qemu, &stopped);
        match stopped.load(Ordering::Acquire) {
            0 => followed.and_then(|()| verdict(&qemu)),
            // Ctrl-C reaches QEMU, too: it may not be there to be asked.
            signal => Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(super::FAILED))),
        }
    }

    /// Shows each tick, and each page that was lost, as they come.
    fn follow(&self, qemu: &Qemu, stopped: &AtomicI32) -> Result<()> {
        let patience = Duration::from_millis(self.tick_ms) + TICK_PATIENCE;
        let (mut shown, mut last, mut from) = (0, None, 0);
        while self.ticks.is_none_or(|ticks| shown < ticks) && stopped.load(Ordering::Acquire) == 0 {
            let tick = qemu.wait_value(from, patience, |line| Tick::parse(&line.text))?;
            let lines = qemu.lines();
            let at = lines.iter().skip(from).position(|line| Tick::parse(&line.text) == Some(tick));
            let next = from + at.map_or(0, |at| at + 1);
            lines[from..next].iter().filter_map(|line| Lost::parse(&line.text)).for_each(|lost| tell(&lost));
            from = next;
            println!("{}", told(&tick, last.as_ref()));
            last = Some(tick);
            shown += 1;
        }
        Ok(())
    }
}

/// Has the guest check every page.
fn verdict(qemu: &Qemu) -> Result<ExitCode> {
    let verified = qemu.verify(VERIFY_TIMEOUT)?;
    let mib = verified.pages * PAGE_BYTES / MIB;
    println!("checked all {mib} MiB: {} of {} pages were lost", verified.errors, verified.pages);
    Ok(if verified.errors == 0 { ExitCode::SUCCESS } else { ExitCode::from(LOST) })
}

fn told(tick: &Tick, last: Option<&Tick>) -> String {
    let (pages, us) = last.map_or((tick.pages_checked, tick.us), |last| {
        (tick.pages_checked.saturating_sub(last.pages_checked), tick.us.saturating_sub(last.us))
    });
    let mib_per_second = (pages * PAGE_BYTES) as f64 / MIB as f64 / (us.max(1) as f64 / 1e6);
    format!(
        "{:9.3} s  pass {:<6} {mib_per_second:7.1} MiB/s written and checked  slowest page {:>8} us  {} lost",
        tick.us as f64 / 1e6,
        tick.pass,
        tick.worst_us,
        tick.errors
    )
}

fn tell(lost: &Lost) {
    let Lost { kind, set, words, .. } = lost;
    println!(
        "LOST: the page at {:#x} ({set}) is {kind}: {words} of 512 words are wrong",
        lost.guest_address()
    );
}
