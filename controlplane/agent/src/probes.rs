//! The eBPF probes of an agent: attached, read and detached by a thread of their own, for each of these may take
//! longer than a migration can wait. Nothing that goes wrong with them is an error of the agent.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use ramferry_probes::{Options, Probes};
use tracing::{info, warn};

use crate::config::ProbesMode;
use crate::metrics::Metrics;

/// How old what is scraped may be.
const INTERVAL: Duration = Duration::from_secs(1);

/// Probes that are attached, or are being attached; detached some time after it is dropped.
pub(crate) struct Watch {
    _stop: mpsc::Sender<()>,
}

/// Attaches the probes that can be, and publishes what they see. Returns at once; none where they are off.
pub(crate) fn watch(mode: ProbesMode, metrics: &Metrics) -> Option<Watch> {
    if mode == ProbesMode::Off {
        return None;
    }
    let (stop, stopped) = mpsc::channel();
    let metrics = metrics.clone();
    let started = thread::Builder::new().name("probes".into()).spawn(move || publish(&metrics, &stopped));
    match started {
        Ok(_) => Some(Watch { _stop: stop }),
        Err(error) => {
            warn!(%error, "no thread for eBPF probes: none is attached");
            None
        }
    }
}

fn publish(metrics: &Metrics, stopped: &mpsc::Receiver<()>) {
    let mut probes = Probes::attach(Options::default());
    let attached = probes.states().values().filter(|state| state.is_attached()).count();
    let libraries: Vec<_> = probes.libraries().iter().map(|path| path.display().to_string()).collect();
    info!(attached, of = probes.states().len(), libraries = libraries.join(", "), "eBPF probes");
    for (reason, absent) in ramferry_probes::absences(probes.states()) {
        info!(probes = absent.join(", "), reason, "eBPF probes are absent");
    }
    loop {
        let snapshot = probes.read();
        metrics.set_ebpf(probes.states(), snapshot);
        match stopped.recv_timeout(INTERVAL) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
