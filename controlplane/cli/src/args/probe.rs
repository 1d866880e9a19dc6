//! Options of `ramferry probe`: whose registrations are watched, and how long.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::connection::OutputFormat;
use super::units::duration;

/// The kernel keeps no more of a process' name.
const LONGEST_NAME: usize = 15;

const EXAMPLES: &str = "\
Examples:
  ramferry probe                                        until Ctrl-C
  ramferry probe --comm qemu-system-x86 --duration 30s
  ramferry probe --pid 4711 --interval 5s
  ramferry probe --duration 10s --output json | tail -n 1 | jq '.processes[] | [.process, .pin_share]'
  ramferry probe --library /var/lib/containers/mpi/usr/lib64/libibverbs.so.1

Counts every call of libibverbs' registration functions on this host, from the moment it is started, and needs no
agent. A size stands for all sizes from it to below its double. PER SECOND is of the last interval, the rest since the
start; IN KERNEL is the share of the calls' time that the kernel took, PINNING that of pinning the pages. Quantiles are
right to within a factor of two, counts, sums and the longest exact. What cannot be seen on this host is said below the
table, with the reason. With --output json each interval is one line, and the last line, which has \"final\": true, the
whole.

Needs root, or CAP_SYS_ADMIN.

Exit codes:
  0    done; also when ended by Ctrl-C or SIGTERM, or when nobody reads any more
  1    no probe could be attached; the reasons are told
  2    the command line is not usable";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ProbeArgs {
    /// Watch this process only.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pid: Option<u32>,
    /// Watch processes of this name only, as `ps -o comm` shows it.
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub(crate) comm: Option<String>,
    /// End after this time [default: at Ctrl-C].
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) duration: Option<Duration>,
    /// Time between two views.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = duration)]
    pub(crate) interval: Duration,
    /// A libibverbs to watch, of a container for example; may be repeated [default: the host's own].
    #[arg(long, value_name = "FILE")]
    pub(crate) library: Vec<PathBuf>,
    /// What is printed on stdout.
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: OutputFormat,
}

/// Longer ones are cut, as the kernel does.
fn name(text: &str) -> Result<String, &'static str> {
    if text.is_empty() {
        return Err("give the name of a program");
    }
    let end = (0..=LONGEST_NAME.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    Ok(text[..end.unwrap_or(0)].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_as_the_kernel_cuts_them() {
        assert_eq!(name("qemu-system-x86_64").as_deref(), Ok("qemu-system-x86"));
        assert_eq!(name("ib_write_bw").as_deref(), Ok("ib_write_bw"));
        assert!(name("").is_err());
    }
}
