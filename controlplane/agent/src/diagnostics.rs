//! Whether this host is fit to migrate guests: what `ramferry doctor` and
//! `NodeService.RunDiagnostics` tell.
//!
//! Each check reads facts, from files below a root or by asking the kernel, and judges them in a pure function, so that
//! every verdict can be had in a test without a host that deserves it. The list of them is [`Check`], of which
//! docs/doctor.md is made. Limits and rights are those of the process that runs the checks: of an agent they are
//! what counts, of a shell they may be others.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::task::JoinError;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::probes::States;

use certificate::Certificates;
use host::Host;
use kernel::{Btf, Capabilities, Kernel, Parts, PtraceScope, Trackers};
use memory::{CgroupMemory, HugePages, Memlock, OpenFiles};
use peer::Peer;
use probes::ProbeStates;
use processor::{ForkSafety, Governors};
use rdma::Rdma;
use state::{JournalState, StateDir};

pub use checks::{Check, CheckInfo};
pub use docs::table;
pub use verdict::{Status, Verdict};

mod certificate;
mod checks;
mod docs;
mod host;
mod kernel;
mod memory;
mod peer;
mod probes;
mod processor;
mod rdma;
mod state;
mod verdict;

/// How often an agent makes the checks by itself.
const INTERVAL: Duration = Duration::from_secs(180);

/// A check and what it found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which.
    pub check: Check,
    /// What it found.
    pub verdict: Verdict,
}

/// Makes the checks for a configuration, in this process.
#[derive(Clone, Debug)]
pub struct Doctor {
    config: Config,
    /// What the self-tests said last: they start children and stop them, which is not to be done every few minutes.
    trackers: Arc<Mutex<Option<Trackers>>>,
    /// What became of the agent's probes; without an agent they are attached for a moment, to see.
    probes: Option<watch::Receiver<States>>,
}

impl Doctor {
    /// For the configuration of an agent that does not run.
    pub fn new(config: Config) -> Self {
        Self { config, trackers: Arc::default(), probes: None }
    }

    /// For a running agent.
    pub(crate) fn of_agent(config: Config, probes: watch::Receiver<States>) -> Self {
        Self { probes: Some(probes), ..Self::new(config) }
    }

    /// Makes every check, those of `peer` ("host:port") where one is given.
    ///
    /// # Errors
    /// When a check panicked.
    pub async fn examine(&self, peer: Option<&str>) -> Result<Vec<Finding>, JoinError> {
        let doctor = self.clone();
        let probes = self.agents_probes().await;
        let here = tokio::task::spawn_blocking(move || doctor.examine_host(Trackers::read(), probes));
        let peer = async {
            match peer {
                Some(address) => Some(Peer::ask(address, self.config.tls.as_ref()).await),
                None => None,
            }
        };
        let (here, peer) = tokio::join!(here, peer);
        let mut findings = here?;
        findings.extend(judge_peer(peer.as_ref()));
        Ok(findings)
    }

    /// Makes the checks of this host at once and every few minutes, for as long as it is polled.
    pub(crate) async fn watch(self, metrics: Metrics) -> std::convert::Infallible {
        let mut ticks = tokio::time::interval(INTERVAL);
        loop {
            ticks.tick().await;
            let doctor = self.clone();
            let probes = self.agents_probes().await;
            let findings = tokio::task::spawn_blocking(move || {
                let known = doctor.trackers.lock().unwrap_or_else(PoisonError::into_inner).clone();
                doctor.examine_host(known.unwrap_or_else(Trackers::read), probes)
            });
            match findings.await {
                Ok(mut findings) => {
                    findings.extend(judge_peer(None));
                    metrics.diagnosed(&findings);
                }
                Err(error) => {
                    tracing::warn!(%error, "the checks of this host panicked; report it with the log");
                }
            }
        }
    }

    async fn agents_probes(&self) -> Option<ProbeStates> {
        match &self.probes {
            Some(states) => Some(ProbeStates::of_agent(states.clone()).await),
            None => None,
        }
    }

    fn examine_host(&self, trackers: Trackers, probes: Option<ProbeStates>) -> Vec<Finding> {
        let probes = probes.unwrap_or_else(|| ProbeStates::tried(self.config.probes));
        let judged = judge_host(&Host::here(), &self.config, (&trackers, &probes), SystemTime::now());
        *self.trackers.lock().unwrap_or_else(PoisonError::into_inner) = Some(trackers);
        judged
    }
}

fn judge_host(
    host: &Host,
    config: &Config,
    (trackers, probes): (&Trackers, &ProbeStates),
    now: SystemTime,
) -> Vec<Finding> {
    let capabilities = Capabilities::read(host);
    let kernel = Kernel::read(host);
    let parts = Parts::read();
    let rdma = Rdma::read(host, config);
    let state_dir: &PathBuf = &config.state_dir;
    [
        (Check::Memlock, Memlock::read(host, &capabilities, rdma.nothing_pins()).judge()),
        (Check::OpenFiles, OpenFiles::read().judge()),
        (Check::Capabilities, capabilities.judge()),
        (Check::Kernel, kernel.judge()),
        (Check::Userfaultfd, parts.judge_userfaultfd()),
        (Check::PagemapScan, parts.judge_pagemap_scan()),
        (Check::PidfdGetfd, parts.judge_pidfd_getfd()),
        (Check::PtraceScope, PtraceScope::read(host, &capabilities).judge()),
        (Check::TrackerUffdWp, trackers.judge_uffd_wp()),
        (Check::TrackerSoftDirty, trackers.judge_soft_dirty()),
        (Check::Btf, Btf::read(host).judge()),
        (Check::EbpfProbes, probes.judge()),
        (Check::Hugepages, HugePages::read(host).judge()),
        (Check::CgroupMemory, CgroupMemory::read(host).judge()),
        (Check::CpuGovernor, Governors::read(host).judge()),
        (Check::ForkSafety, ForkSafety::read(kernel.version()).judge()),
        (Check::RdmaDevices, rdma.judge_devices()),
        (Check::RdmaPort, rdma.judge_port()),
        (Check::RdmaRate, rdma.judge_rate()),
        (Check::RdmaPcie, rdma.judge_pcie()),
        (Check::RdmaMtu, rdma.judge_mtu()),
        (Check::RdmaGid, rdma.judge_gids()),
        (Check::RdmaListen, rdma.judge_listen()),
        (Check::RdmaNuma, rdma.judge_numa()),
        (Check::RdmaFlowControl, rdma.judge_flow_control()),
        (Check::RdmaErrors, rdma.judge_errors()),
        (Check::StateDir, StateDir::read(state_dir).judge()),
        (Check::Journal, JournalState::read(host, state_dir, now).judge()),
        (Check::Certificate, Certificates::read(config.tls.as_ref(), now).judge()),
    ]
    .map(|(check, verdict)| Finding { check, verdict })
    .into()
}

fn judge_peer(peer: Option<&Peer>) -> Vec<Finding> {
    type Judge = fn(&Peer) -> Verdict;
    let judges: [(Check, Judge); 5] = [
        (Check::PeerAgent, Peer::judge_agent),
        (Check::PeerCertificate, Peer::judge_certificate),
        (Check::PeerVersion, Peer::judge_version),
        (Check::PeerClock, Peer::judge_clock),
        (Check::PeerData, Peer::judge_data),
    ];
    let judged = judges.map(|(check, judge)| {
        let verdict = peer.map_or_else(|| Verdict::skip("no peer was named (--peer HOST:PORT)"), judge);
        Finding { check, verdict }
    });
    judged.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Options;

    #[tokio::test]
    async fn every_check_of_the_list_is_made_once_in_its_order() {
        let directory = tempfile::tempdir().unwrap();
        // Detaching probes would take a second.
        let probes = Some("off".to_owned());
        let options = Options { state_dir: Some(directory.path().into()), probes, ..Options::default() };
        let findings = Doctor::new(Config::check(&options).unwrap()).examine(None).await.unwrap();
        let made: Vec<Check> = findings.iter().map(|finding| finding.check).collect();
        assert_eq!(made, Check::ALL);
        for Finding { check, verdict } in &findings {
            let wants_remedy = matches!(verdict.status, Status::Warn | Status::Fail);
            assert_eq!(wants_remedy, !verdict.remedy.is_empty(), "{check:?}: {verdict:?}");
            assert!(!verdict.evidence.is_empty(), "{check:?}: {verdict:?}");
        }
    }
}
