//! The eBPF probes of an agent: attached, read and detached by a thread of their own, for each of these may take
//! longer than a migration can wait. Nothing that goes wrong with them is an error of the agent.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use ramferry_probes::{Absence, Options, Probe, ProbeState, Probes, Snapshot};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::config::ProbesMode;
use crate::metrics::Metrics;

/// How old what is scraped may be.
const INTERVAL: Duration = Duration::from_secs(1);

/// Each probe, and whether it is attached; none until that is known.
pub(crate) type States = Option<BTreeMap<Probe, ProbeState>>;

/// Probes that are attached, or are being attached; detached some time after it is dropped.
pub(crate) struct Watch {
    _stop: Option<mpsc::Sender<()>>,
    states: watch::Receiver<States>,
}

impl Watch {
    /// What has become of them; it changes once.
    pub(crate) fn states(&self) -> watch::Receiver<States> {
        self.states.clone()
    }
}

/// Attaches the probes that can be, and publishes what they see. Returns at once.
pub(crate) fn watch(mode: ProbesMode, metrics: &Metrics) -> Watch {
    let (attached, states) = watch::channel(None);
    if mode == ProbesMode::Off {
        attached.send_replace(Some(all_absent(&Absence::Off)));
        return Watch { _stop: None, states };
    }
    let (stop, stopped) = mpsc::channel();
    let (metrics, failed) = (metrics.clone(), metrics);
    let told = attached.clone();
    let started =
        thread::Builder::new().name("probes".into()).spawn(move || publish(&metrics, &told, &stopped));
    if let Err(error) = started {
        warn!(%error, "no thread for eBPF probes: none is attached");
        let absence = Absence::Failed { step: "starting a thread", reason: error.to_string() };
        let states = all_absent(&absence);
        failed.set_ebpf(&states, Snapshot::default());
        attached.send_replace(Some(states));
    }
    Watch { _stop: Some(stop), states }
}

/// Every probe, absent for one reason.
pub(crate) fn all_absent(absence: &Absence) -> BTreeMap<Probe, ProbeState> {
    Probe::ALL.into_iter().map(|probe| (probe, ProbeState::Absent(absence.clone()))).collect()
}

fn publish(metrics: &Metrics, told: &watch::Sender<States>, stopped: &mpsc::Receiver<()>) {
    let mut probes = Probes::attach(Options::default());
    let snapshot = probes.read();
    metrics.set_ebpf(probes.states(), snapshot);
    // Who is told of them finds them in the metrics.
    told.send_replace(Some(probes.states().clone()));
    let attached = probes.states().values().filter(|state| state.is_attached()).count();
    let libraries: Vec<_> = probes.libraries().iter().map(|path| path.display().to_string()).collect();
    info!(attached, of = probes.states().len(), libraries = libraries.join(", "), "eBPF probes");
    for absent in ramferry_probes::absences(probes.states()) {
        let (reason, remedy) = (absent.absence.to_string(), absent.absence.remedy());
        info!(probes = absent.probes.join(", "), reason, remedy, "eBPF probes are absent");
    }
    while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(INTERVAL) {
        let snapshot = probes.read();
        metrics.set_ebpf(probes.states(), snapshot);
    }
}
