//! `ramferry probe`

use std::future;
use std::io::{self, IsTerminal as _};
use std::time::{Duration, Instant};

use ramferry_probes::{Filter, Options, ProbeState, Probes, Snapshot};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::connection::OutputFormat;
use crate::args::probe::ProbeArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::follow::Interrupts;
use crate::output::probe::View;
use crate::output::{Printed, print_while_read, to_json_line};
use crate::progress::write_line;

/// Home, and nothing below.
const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

pub(super) async fn run(args: ProbeArgs) -> Result<Exit, Failure> {
    let mut interrupts = Interrupts::new()?;
    let mut terminate = signal(SignalKind::terminate())
        .map_err(|source| Failure::System { what: "cannot listen for SIGTERM", source })?;
    let filter = Filter { pid: args.pid, name: args.comm.clone() };
    let mut probes = Probes::attach(Options { libraries: args.library.clone(), filter });
    let mut live = Live::new(&args);
    if !probes.states().values().any(ProbeState::is_attached) {
        live.show(&mut probes, true)?;
        write_line("error: no probe could be attached");
        return Ok(Exit::Failed);
    }
    let started = Instant::now();
    loop {
        let left = args.duration.map(|duration| duration.saturating_sub(started.elapsed()));
        let ended = async {
            match left {
                Some(left) => tokio::time::sleep(left).await,
                None => future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = interrupts.next() => break,
            _ = terminate.recv() => break,
            () = ended => break,
            () = tokio::time::sleep(args.interval) => {
                if live.show(&mut probes, false)? == Printed::NobodyReads {
                    return Ok(Exit::Done);
                }
            }
        }
    }
    live.show(&mut probes, true)?;
    Ok(Exit::Done)
}

/// What is shown again and again.
struct Live {
    output: OutputFormat,
    is_terminal: bool,
    started: Instant,
    before: (Instant, Snapshot),
}

impl Live {
    fn new(args: &ProbeArgs) -> Self {
        let now = Instant::now();
        Self {
            output: args.output,
            is_terminal: io::stdout().is_terminal(),
            started: now,
            before: (now, Snapshot::default()),
        }
    }

    fn show(&mut self, probes: &mut Probes, is_final: bool) -> Result<Printed, Failure> {
        let (now, snapshot) = (Instant::now(), probes.read());
        let elapsed = now - self.started;
        // The last one is of all the time.
        let (since, earlier) = match is_final {
            true => (elapsed, &Snapshot::default()),
            false => (now - self.before.0, &self.before.1),
        };
        let view = View {
            probes: probes.states(),
            libraries: probes.libraries(),
            snapshot: &snapshot,
            elapsed,
            interval: since.max(Duration::from_micros(1)),
            earlier,
            is_final,
        };
        let text = match self.output {
            OutputFormat::Json => to_json_line(&view.object())?,
            OutputFormat::Text if self.is_terminal => format!("{CLEAR}{}", view.text()),
            OutputFormat::Text => format!("{}\n", view.text()),
        };
        let printed = print_while_read(&text)?;
        self.before = (now, snapshot);
        Ok(printed)
    }
}
