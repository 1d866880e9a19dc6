//! Options of `ramferry bench`: what is measured, how long, and with how much memory.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use ramferry_fabric::{FabricKind, MAX_TRANSFER_BYTES};

use super::connection::OutputFormat;
use super::names::AgentAddress;
use super::units::{ByteCount, UnitError, duration};

/// Links, and threads, at once.
const MOST_AT_ONCE: i64 = 64;
const LONGEST_RUN: Duration = Duration::from_secs(60);
const SMALLEST_PAGE_BYTES: u64 = 4096;

const EXIT_CODES: &str = "\
Exit codes:
  0    measured
  1    it could not be measured, or not within --timeout
  2    the command line is not usable
  4    the other side cannot be reached
  5    the other side refused; its reason is on stderr
  130  left by Ctrl-C; what was measured until then is printed";

const FABRIC_EXAMPLES: &str = "\
Examples:
  Both sides in this process, over loopback:
    ramferry bench fabric
    ramferry bench fabric --fabric shm --sizes 64KiB,1MiB --links 1,2

  Between two hosts:
    ramferry bench fabric --listen 10.0.0.2:7060           on one
    ramferry bench fabric --connect 10.0.0.2:7060          on the other, which shows the figures

  As ib_write_bw measures (one buffer again and again, in the cache; give it the same size):
    ramferry bench fabric --fabric verbs --sizes 1MiB --links 1 --memory 2MiB --duration 5s

  For a program:
    ramferry bench fabric --output json --quiet | jq '.cases[] | [.size_bytes, .links, .of_limit]'

Writes go one after the other through all of --memory. Each run is followed by one of the limit: plain
sockets between the same addresses with as many connections, or (of shm) memcpy in as many threads; a
ratio is the median of the ratios of the runs. Of verbs, the rate of the device's port is shown too. A run ends with a fence on
every link, so that what is counted has arrived.

--listen is for networks that are trusted, and for the time of the measurement: it encrypts nothing, and
the first client that comes may write to the memory that is measured with, and to nothing else. It ends
after that client, or at --timeout. Beside its own port it uses two that the kernel chooses.";

const REGISTRATION_EXAMPLES: &str = "\
Examples:
  ramferry bench registration
  ramferry bench registration --fabric shm --sizes 64MiB --threads 1,2,4
  ramferry bench registration --sizes 1GiB --memory 4GiB --output json --quiet | jq '.cases[].bytes_per_second'

Each region is registered and deregistered once in memory that was newly mapped, as in a migration. The
source registers for its own reading what was touched; the destination registers for the peer's writes
what was touched, and what never was, which allocates it. Where a fabric moves bytes by the CPU
(tcp, shm), nothing is pinned: registering maps and allocates; over verbs the device is told of every
page, and it stays pinned. Pages of 2 MiB are taken from the host's
huge pages (vm.nr_hugepages), as far as they are free.";

const SCAN_EXAMPLES: &str = "\
Examples:
  ramferry bench scan
  ramferry bench scan --memory 4GiB --runs 5 --output json

A second process writes to the memory between harvests, and is tracked as a VMM is: that needs root, or
CAP_SYS_PTRACE and CAP_SYS_ADMIN, and a kernel with one of the trackers; elsewhere it is said why the
harvest was skipped.";

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) bench: Bench,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Bandwidth, message rate and round trip of a fabric, beside the host's or network's own.
    Fabric(FabricArgs),
    /// What it costs to register and deregister memory.
    Registration(RegistrationArgs),
    /// How fast pages are looked through, and what a harvest of written pages costs.
    Scan(ScanArgs),
    /// What the second process of `scan` does.
    #[command(hide = true)]
    ScanWriter {
        /// Of the memory.
        path: PathBuf,
        /// Of the memory.
        bytes: u64,
    },
}

/// Over what is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchFabric {
    /// TCP streams.
    Tcp,
    /// Shared memory of one host.
    Shm,
    /// RDMA.
    #[cfg(feature = "verbs")]
    Verbs,
}

#[derive(Debug, Args)]
#[command(after_help = format!("{FABRIC_EXAMPLES}\n\n{EXIT_CODES}"))]
pub(crate) struct FabricArgs {
    /// What is measured.
    #[arg(long, value_enum, value_name = "FABRIC", default_value = "tcp")]
    pub(crate) fabric: BenchFabric,
    /// Bytes of one write, at most 16MiB; several are measured one after the other.
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = transfer_bytes,
          default_value = "4KiB,16KiB,64KiB,256KiB,1MiB,4MiB,16MiB")]
    pub(crate) sizes: Vec<u32>,
    /// Links (over verbs: queue pairs), each with a thread of its own; at most 64.
    #[arg(long, value_name = "NUMBER", value_delimiter = ',', default_value = "1,2,4",
          value_parser = clap::value_parser!(u32).range(1..=MOST_AT_ONCE))]
    pub(crate) links: Vec<u32>,
    /// How long each run lasts, at most 60s.
    #[arg(long, value_name = "DURATION", default_value = "200ms", value_parser = run_duration)]
    pub(crate) duration: Duration,
    /// Memory of each side [default: 256MiB, or what of it fits].
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<ByteCount>,
    /// Be the side that is written to, for one client that connects here; 0 lets the kernel choose the port.
    #[arg(long, value_name = "IP:PORT", help_heading = "Two hosts",
          conflicts_with_all = ["connect", "fabric", "sizes", "links", "duration", "runs", "address"])]
    pub(crate) listen: Option<SocketAddr>,
    /// Write to the side that listens there.
    #[arg(long, value_name = "HOST:PORT", help_heading = "Two hosts", conflicts_with = "address")]
    pub(crate) connect: Option<AgentAddress>,
    #[command(flatten)]
    pub(crate) way: WayArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
#[command(after_help = format!("{REGISTRATION_EXAMPLES}\n\n{EXIT_CODES}"))]
pub(crate) struct RegistrationArgs {
    /// What is measured.
    #[arg(long, value_enum, value_name = "FABRIC", default_value = "tcp")]
    pub(crate) fabric: BenchFabric,
    /// Bytes of one region, whole pages of 4KiB.
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = region_bytes,
          default_value = "4KiB,64KiB,1MiB,16MiB,64MiB,256MiB,1GiB")]
    pub(crate) sizes: Vec<u64>,
    /// Threads that register at once, at most 64.
    #[arg(long, value_name = "NUMBER", value_delimiter = ',', default_value = "1,2,4",
          value_parser = clap::value_parser!(u32).range(1..=MOST_AT_ONCE))]
    pub(crate) threads: Vec<u32>,
    /// After this time no further run of a case begins; at most 60s.
    #[arg(long, value_name = "DURATION", default_value = "300ms", value_parser = run_duration)]
    pub(crate) duration: Duration,
    /// Memory that is registered at once, at most [default: 1GiB, or what of it fits].
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<ByteCount>,
    #[command(flatten)]
    pub(crate) way: WayArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
#[command(after_help = format!("{SCAN_EXAMPLES}\n\n{EXIT_CODES}"))]
pub(crate) struct ScanArgs {
    /// Memory that is looked through [default: 1GiB, or what of it fits].
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<ByteCount>,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// Through what a fabric goes.
#[derive(Debug, Args)]
pub(crate) struct WayArgs {
    /// The address of this host that both sides use, where both are in this process [default: 127.0.0.1; of
    /// verbs: the first of an RDMA device].
    #[arg(long, value_name = "IP")]
    pub(crate) address: Option<IpAddr>,
    /// The RDMA device of this side, where it is not to be found by the address.
    #[arg(long, value_name = "NAME")]
    pub(crate) rdma_device: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct CommonArgs {
    /// Runs of each case; the median is shown, with the lowest and the highest.
    #[arg(long, value_name = "NUMBER", default_value = "3",
          value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) runs: u32,
    /// Longest time for all of it.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    pub(crate) timeout: Duration,
    /// Show no progress on stderr.
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// What is printed on stdout.
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: OutputFormat,
}

impl BenchArgs {
    /// How the caller wants to be answered; none for the second process of `scan`.
    pub(crate) fn output(&self) -> Option<OutputFormat> {
        match &self.bench {
            Bench::Fabric(args) => Some(args.common.output),
            Bench::Registration(args) => Some(args.common.output),
            Bench::Scan(args) => Some(args.common.output),
            Bench::ScanWriter { .. } => None,
        }
    }
}

impl BenchFabric {
    /// As the data plane names it.
    pub(crate) fn kind(self) -> FabricKind {
        match self {
            Self::Tcp => FabricKind::Tcp,
            Self::Shm => FabricKind::Shm,
            #[cfg(feature = "verbs")]
            Self::Verbs => FabricKind::Verbs,
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum AmountError {
    #[error(transparent)]
    Unit(#[from] UnitError),
    #[error("a write is at most 16 MiB")]
    Transfer,
    #[error("a region is whole pages of 4KiB")]
    Region,
    #[error("a run is at most 60s long")]
    Run,
}

fn transfer_bytes(value: &str) -> Result<u32, AmountError> {
    let ByteCount(bytes) = value.parse()?;
    u32::try_from(bytes).ok().filter(|bytes| *bytes <= MAX_TRANSFER_BYTES).ok_or(AmountError::Transfer)
}

fn region_bytes(value: &str) -> Result<u64, AmountError> {
    let ByteCount(bytes) = value.parse()?;
    if bytes.is_multiple_of(SMALLEST_PAGE_BYTES) { Ok(bytes) } else { Err(AmountError::Region) }
}

fn run_duration(value: &str) -> Result<Duration, AmountError> {
    let duration = duration(value)?;
    if duration <= LONGEST_RUN { Ok(duration) } else { Err(AmountError::Run) }
}
