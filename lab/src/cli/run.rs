//! `ramferry-lab run`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use ramferry_lab::vm::{Death, Interrupt, Kernel, Outcome, Vm};

use super::{FAILED, signals};

/// As of `timeout` of coreutils.
const TIMED_OUT: u8 = 124;
/// As of a shell.
const NOT_STARTED: u8 = 127;
/// A shell adds the number of the signal to it.
const KILLED: i32 = 128;

/// Run a command in a VM with a real RDMA stack, over this machine's files.
///
/// The VM boots Debian's kernel (made by `scripts/lab-kernel`), sees this machine's file system and runs COMMAND as
/// root in this directory, with PATH, HOME and what begins with CARGO, RUST or RAMFERRY of the environment. What it
/// writes goes to memory and ends with the VM; what is to be kept goes to the directory of --out, `$RAMFERRY_LAB_OUT` in
/// there. `$RAMFERRY_LAB` is the kernel's release.
///
/// In the VM there are two RDMA hosts, 10.77.0.1 (v0, rxe0) and 10.77.0.2 (v1, rxe1), joined by a cable.
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub(crate) struct RunArgs {
    /// Debian's kernel to boot: 6.1 or 6.12
    #[arg(long, value_name = "VERSION", default_value = "6.12")]
    kernel: Kernel,
    /// How long all of it may take, the boot included
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// The VM's memory: what is written to files there takes some of it
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_mib)]
    memory: u64,
    /// Virtual processors
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    processors: u32,
    /// Time in the VM is counted in instructions, a nanosecond each, so that the same work always takes the same time, whatever else
    /// this machine does: for measuring small differences. Processors take turns, and all of it takes some four times as long
    #[arg(long)]
    steady_clock: bool,
    /// A directory that the VM may write to; made if it is not there
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// One more variable for the command
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = parse_variable)]
    environment: Vec<(OsString, OsString)>,
    /// Show what the VM's kernel says, on stderr
    #[arg(long)]
    console: bool,
    /// What to run, and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

const AFTER: &str = "\
The exit status is the command's. Besides: 124 it was not done in time, 125 the VM failed (its kernel panicked, \
QEMU cannot be started, ...), 127 the command cannot be started, 128 and a signal's number that killed the command, \
or ended this. Which of them, it says on stderr.

Examples:
  ramferry-lab run -- ibv_devinfo
  ramferry-lab run --kernel 6.1 -- target/debug/deps/tracking-0123 --test-threads=1
  ramferry-lab run --steady-clock --processors 1 -- ramferry bench registration --fabric verbs
  ramferry-lab run --out /tmp/found --timeout 2m -- sh -c 'dmesg >$RAMFERRY_LAB_OUT/dmesg'
  ramferry-lab run -- sh -c 'ib_write_bw -R >/dev/null & sleep 1; ib_write_bw -R 10.77.0.2'";

impl RunArgs {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let vm = Vm {
            kernel: self.kernel,
            binary: std::env::current_exe().context("this program's own file cannot be told")?,
            processors: self.processors,
            steady_clock: self.steady_clock,
            memory_mib: self.memory,
            timeout: self.timeout,
            out: self.out,
            shows_console: self.console,
        };
        let interrupt = Interrupt::default();
        let raised = interrupt.clone();
        signals::on_first(move |signal| raised.raise(signal))?;
        let (mut stdout, mut stderr) = (std::io::stdout(), std::io::stderr());
        let mut run = || vm.run(&self.command, &self.environment, &interrupt, &mut stdout, &mut stderr);
        let mut outcome = run()?;
        // A kernel that patches its own code as it boots panics under TCG now and then (docs/lab.md).
        if let Outcome::Died(death) = &outcome
            && death.is_panic()
            && !death.booted
        {
            eprintln!("ramferry-lab: {}\nramferry-lab: it is booted once more", obituary(death));
            outcome = run()?;
        }
        Ok(told(outcome, self.timeout))
    }
}

/// Says how a run ended where its status alone does not, and with which status this ends.
fn told(outcome: Outcome, timeout: Duration) -> ExitCode {
    let (status, message) = match outcome {
        Outcome::Exited(status) => (status, None),
        Outcome::Killed(signal) => {
            (KILLED + signal, Some(format!("the command was killed by signal {signal}")))
        }
        Outcome::NotStarted(why) => {
            (NOT_STARTED.into(), Some(format!("the command cannot be started: {why}")))
        }
        Outcome::TimedOut => {
            let timeout = humantime::format_duration(timeout);
            (TIMED_OUT.into(), Some(format!("not done in {timeout}; --timeout gives it more")))
        }
        Outcome::Interrupted(signal) => (KILLED + signal, Some(format!("ended by signal {signal}"))),
        Outcome::Died(death) => (FAILED.into(), Some(obituary(&death))),
    };
    if let Some(message) = message {
        eprintln!("ramferry-lab: {message}");
    }
    ExitCode::from(u8::try_from(status & 0xff).expect("eight bits"))
}

fn obituary(death: &Death) -> String {
    let when = if death.booted { "while the command ran" } else { "before the command was started" };
    let what = if death.is_panic() { "the VM's kernel panicked" } else { "the VM ended" };
    let mut text = format!("{what} {when}");
    for (who, said) in [("QEMU", &death.qemu), ("the kernel", &death.console)] {
        if !said.is_empty() {
            text += &format!("; {who} said:\n{said}");
        }
    }
    text
}

/// MiB of `512M` or `4G`.
fn parse_mib(text: &str) -> Result<u64, String> {
    let mib = match text.strip_suffix(['G', 'g']) {
        Some(count) => count.parse::<u64>().ok().and_then(|count| count.checked_mul(1024)),
        None => text.strip_suffix(['M', 'm']).and_then(|count| count.parse().ok()),
    };
    mib.filter(|mib| *mib >= 256).ok_or_else(|| format!("{text:?}: give 256M or more, such as 512M or 4G"))
}

fn parse_variable(text: &str) -> Result<(OsString, OsString), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?}: give NAME=VALUE"))?;
    Ok((name.into(), value.into()))
}
