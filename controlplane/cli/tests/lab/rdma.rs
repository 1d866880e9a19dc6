//! The two RDMA hosts of the lab's VM, and an agent on each.

use std::pin::pin;
use std::process::Command;
use std::time::Duration;

use ramferry_proto::v1;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::authority::Authority;
use crate::harness::{Agent, Pair, Site, parameters};

/// Between two looks at what is pinned.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// One of the two hosts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    pub(crate) name: &'static str,
    pub(crate) address: &'static str,
    pub(crate) interface: &'static str,
    pub(crate) device: &'static str,
}

pub(crate) const SOURCE: Host =
    Host { name: "source", address: "10.77.0.1", interface: "v0", device: "rxe0" };
pub(crate) const DESTINATION: Host =
    Host { name: "destination", address: "10.77.0.2", interface: "v1", device: "rxe1" };

/// Two agents that know one another by certificate.
pub(crate) struct Rdma {
    pub(crate) pair: Pair,
    authority: Authority,
}

impl Rdma {
    pub(crate) fn start() -> Rdma {
        Rdma::start_with(&[])
    }

    pub(crate) fn start_with(options: &[&str]) -> Rdma {
        let authority = Authority::new();
        let pair = pair(&authority, options);
        Rdma { pair, authority }
    }

    /// Options with which the command line calls these agents.
    pub(crate) fn caller(&self) -> Vec<String> {
        self.authority.options("caller", &["orchestrator"])
    }

    /// Another agent of `host`, in the place of the one that is there.
    pub(crate) fn agent(&self, host: Host, site: Site, options: &[&str]) -> Agent {
        agent(&self.authority, host, site, options)
    }
}

pub(crate) fn pair(authority: &Authority, options: &[&str]) -> Pair {
    let start = |host| agent(authority, host, Site::here(), options);
    Pair { source: start(SOURCE), destination: start(DESTINATION) }
}

/// An agent of a host. Its services are on loopback: what is cut is the way of RAM alone.
fn agent(authority: &Authority, host: Host, site: Site, more: &[&str]) -> Agent {
    let release = std::env::var("RAMFERRY_LAB");
    assert!(release.is_ok(), "this runs in the lab's VM only: make lab-test");
    let mut options = authority.options(host.name, &["peer"]);
    let guests = format!("{},/dev/shm,/dev/hugepages", std::env::temp_dir().display());
    let mut own = vec!["--rdma-device", host.device, "--guest-dirs", &guests];
    let listen = format!("{}:0", host.address);
    if !more.contains(&"--rdma-listen") {
        own.extend(["--rdma-listen", &listen]);
    }
    options.extend(own.into_iter().chain(more.iter().copied()).map(str::to_owned));
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut agent = Agent::start_at(site, &options);
    agent.caller = Some(caller(authority));
    agent
}

/// What a caller with the role of an orchestrator shows.
fn caller(authority: &Authority) -> ClientTlsConfig {
    authority.options("caller", &["orchestrator"]);
    let pem = |name: &str| std::fs::read_to_string(authority.path(name)).unwrap();
    ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(pem("ca.pem")))
        .identity(Identity::from_pem(pem("caller.pem"), pem("caller.key")))
}

/// Parameters that verify, over verbs.
pub(crate) fn verbs() -> v1::MigrationParameters {
    parameters(v1::FabricKind::Verbs)
}

/// Runs a program of the system that must succeed.
pub(crate) fn system(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Objects of RDMA that `pid` holds, a line each.
pub(crate) fn resources(pid: u32) -> Vec<String> {
    ["qp", "mr", "cq", "pd", "cm_id"]
        .into_iter()
        .flat_map(|kind| {
            let shown = system("rdma", &["resource", "show", kind]);
            let ours = format!("pid {pid} ");
            let lines = shown.lines().filter(|line| format!("{line} ").contains(&ours));
            lines.map(|line| format!("{kind}: {line}")).collect::<Vec<_>>()
        })
        .collect()
}

/// Bytes that a process has pinned, in kB.
pub(crate) fn pinned_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The most that each agent of a pair has pinned while something runs, in bytes.
pub(crate) async fn pinned_peaks<T>(pair: &Pair, run: impl Future<Output = T>) -> (T, [u64; 2]) {
    let (mut run, mut peaks) = (pin!(run), [0; 2]);
    loop {
        tokio::select! {
            done = &mut run => return (done, peaks),
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        for (agent, peak) in [&pair.source, &pair.destination].into_iter().zip(&mut peaks) {
            *peak = (*peak).max(pinned_kib(agent.pid()) << 10);
        }
    }
}
