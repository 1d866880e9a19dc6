//! `ramferry bench`

use std::io::{self, IsTerminal as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use ramferry_fabric::FabricKind;
use serde::Serialize;

use crate::args::bench::{Bench, BenchArgs, CommonArgs, FabricArgs, RegistrationArgs, ScanArgs};
use crate::args::connection::OutputFormat;
use crate::args::units::ByteCount;
use crate::bench::fabric::way::own_address;
use crate::bench::fabric::{FabricReport, Peer, ServerReport};
use crate::bench::registration::RegistrationReport;
use crate::bench::scan::{ScanReport, writer};
use crate::bench::{BenchError, Bounds, Observer, fabric, memory, registration, scan};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::follow::Interrupts;
use crate::output::bench::Table;
use crate::output::{print, print_json, printable};
use crate::progress::write_line;

const FABRIC_BYTES: u64 = 256 << 20;
const REGISTRATION_BYTES: u64 = 1 << 30;
const SCAN_BYTES: u64 = 1 << 30;
/// How long a measurement that was left may take to end.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);

pub(super) fn run(args: BenchArgs) -> Result<Exit, Failure> {
    match args.bench {
        Bench::Fabric(args) => run_fabric(&args),
        Bench::Registration(args) => run_registration(args),
        Bench::Scan(args) => run_scan(&args),
        Bench::ScanWriter { path, bytes } => {
            writer::write_on_command(&path, bytes)?;
            Ok(Exit::Done)
        }
    }
}

fn run_fabric(args: &FabricArgs) -> Result<Exit, Failure> {
    let given = args.memory.map(|ByteCount(bytes)| bytes);
    let allowance = |shares| memory::allowance(given, FABRIC_BYTES, shares);
    if let Some(address) = args.listen {
        let report = ServerReport::new(allowance(1)?);
        let device = args.way.rdma_device.clone();
        return carry_out(&args.common, report, move |bounds, observer, report| {
            fabric::serve(address, device.as_deref(), bounds, observer, report)
        });
    }
    let fabric = args.fabric.kind();
    let peer = match &args.connect {
        Some(address) => Peer::At(address.clone()),
        None => Peer::Here(own_address(fabric, args.way.address, args.way.rdma_device.as_deref())?),
    };
    // This side, the other, and where memcpy copies to.
    let shares = 1 + u64::from(args.connect.is_none()) + u64::from(fabric == FabricKind::Shm);
    let plan = fabric::Plan {
        fabric,
        sizes: args.sizes.clone(),
        links: args.links.clone(),
        runs: args.common.runs,
        duration: args.duration,
        memory_bytes: allowance(shares)?,
        rdma_device: args.way.rdma_device.clone(),
    };
    let report = FabricReport::new(&plan, &peer);
    carry_out(&args.common, report, move |bounds, observer, report| {
        fabric::measure(&plan, &peer, bounds, observer, report)
    })
}

fn run_registration(args: RegistrationArgs) -> Result<Exit, Failure> {
    let given = args.memory.map(|ByteCount(bytes)| bytes);
    let fabric = args.fabric.kind();
    let plan = registration::Plan {
        fabric,
        address: own_address(fabric, args.way.address, args.way.rdma_device.as_deref())?,
        rdma_device: args.way.rdma_device,
        sizes: args.sizes,
        threads: args.threads,
        runs: args.common.runs,
        duration: args.duration,
        memory_bytes: memory::allowance(given, REGISTRATION_BYTES, 1)?,
    };
    let report = RegistrationReport::new(&plan);
    carry_out(&args.common, report, move |bounds, observer, report| {
        registration::measure(&plan, bounds, observer, report)
    })
}

fn run_scan(args: &ScanArgs) -> Result<Exit, Failure> {
    let given = args.memory.map(|ByteCount(bytes)| bytes);
    let report = ScanReport::new(memory::allowance(given, SCAN_BYTES, 1)?, args.common.runs);
    carry_out(&args.common, report, scan::measure)
}

/// Measures until it is done or the caller leaves, and prints the report.
fn carry_out<R: Serialize + Table + Send + 'static>(
    common: &CommonArgs,
    report: R,
    measure: impl FnOnce(&Bounds, &mut dyn Observer, &mut R) -> Result<(), BenchError> + Send + 'static,
) -> Result<Exit, Failure> {
    let ended = super::block_on(until_end(common, report, measure))?;
    let Some((result, report)) = ended else { return Ok(Exit::Left) };
    let exit = match result {
        Ok(()) => Exit::Done,
        Err(BenchError::Left) => Exit::Left,
        Err(error) => {
            // As an object there is only the error.
            if common.output == OutputFormat::Text {
                print(&report.text())?;
            }
            return Err(error.into());
        }
    };
    match common.output {
        OutputFormat::Text => print(&report.text())?,
        OutputFormat::Json => print_json(&report)?,
    }
    Ok(exit)
}

/// How the measurement ended, which runs in a thread of its own; none where the caller pressed Ctrl-C and it did
/// not end soon.
async fn until_end<R: Send + 'static>(
    common: &CommonArgs,
    mut report: R,
    measure: impl FnOnce(&Bounds, &mut dyn Observer, &mut R) -> Result<(), BenchError> + Send + 'static,
) -> Result<Option<(Result<(), BenchError>, R)>, Failure> {
    let mut interrupts = Interrupts::new()?;
    let left = Arc::new(AtomicBool::new(false));
    let bounds = Bounds::new(Arc::clone(&left), common.timeout);
    let mut progress = Progress::new(common.quiet);
    let (sender, ended) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("bench".into()).spawn(move || {
        let result = measure(&bounds, &mut progress, &mut report);
        progress.finish();
        // Nobody listens where the caller left for good.
        let _ = sender.send((result, report));
    });
    thread.map_err(|source| Failure::System { what: "cannot start a thread", source })?;
    let panicked =
        |_| Failure::System { what: "the measurement panicked", source: io::ErrorKind::Other.into() };
    tokio::pin!(ended);
    tokio::select! {
        measured = &mut ended => return measured.map(Some).map_err(panicked),
        () = interrupts.next() => left.store(true, Ordering::Relaxed),
    }
    tokio::select! {
        measured = &mut ended => measured.map(Some).map_err(panicked),
        () = interrupts.next() => Ok(None),
        () = tokio::time::sleep(LEAVE_PATIENCE) => Ok(None),
    }
}

/// How far it is: a bar on a terminal. What has to be known is told anywhere.
struct Progress {
    bar: Option<ProgressBar>,
    is_quiet: bool,
}

impl Progress {
    fn new(is_quiet: bool) -> Self {
        let bar = (!is_quiet && io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{pos:>4} of {len} [{bar:16}] {wide_msg}")
                .expect("the template is a constant")
                .progress_chars("=> ");
            ProgressBar::new(1).with_style(style)
        });
        Self { bar, is_quiet }
    }

    fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Progress {
    fn step(&mut self, number: usize, of: usize, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(of as u64);
            bar.set_position(number as u64);
            bar.set_message(printable(what));
            bar.tick();
        }
    }

    fn note(&mut self, text: &str) {
        match &self.bar {
            _ if self.is_quiet => {}
            Some(bar) => bar.suspend(|| write_line(text)),
            None => write_line(text),
        }
    }
}
