//! Hosts and containers where eBPF probes cannot be attached, or not all of them: an agent starts there and migrates, and
//! says which are absent, why, and what to do.

use std::collections::BTreeSet;

use ramferry_lab::{Qemu, RamBlock, Workload};
use ramferry_probes::Probe;
use ramferry_proto::v1::FabricKind::Tcp;

use crate::harness::{Agent, MIB, Pair, Site, assert_proves_itself, boot, parameters, settled_checks};

/// What is to be said of some probes.
pub(crate) struct Absent<'a> {
    pub(crate) probes: Vec<&'static str>,
    /// Part of the reason.
    pub(crate) reason: &'a str,
    /// Part of what to do.
    pub(crate) remedy: &'a str,
}

/// Probes on functions of libibverbs, in the order in which they are told.
pub(crate) fn library() -> Vec<&'static str> {
    told().filter(|name| name.starts_with("ibv_")).collect()
}

/// Probes on functions of the kernel, likewise.
pub(crate) fn kernel() -> Vec<&'static str> {
    told().filter(|name| !name.starts_with("ibv_")).collect()
}

fn told() -> impl Iterator<Item = &'static str> {
    BTreeSet::from(Probe::ALL).into_iter().map(Probe::as_str)
}

/// The kernel of the lab's VM, where this must run.
pub(crate) fn release() -> String {
    std::env::var("RAMFERRY_LAB").expect("this runs in the lab's VM only: make lab-test")
}

/// Root that may neither load programs nor attach them.
pub(crate) fn without_capabilities() -> Site {
    let enter = ["setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin", "--"];
    Site { enter: enter.map(str::to_owned).into(), ..Site::here() }
}

/// A mount namespace, as a container's, in which those directories are empty.
pub(crate) fn without(directories: &str) -> Site {
    const COVER: &str = r#"for path in $0; do
        [ ! -d "$path" ] || mount -t tmpfs empty "$path" || exit
    done
    exec "$@""#;
    let enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", COVER, directories];
    Site { enter: enter.map(str::to_owned).into(), ..Site::here() }
}

/// A guest that is to move from one such site to the next.
pub(crate) struct Traveller(Qemu);

impl Traveller {
    pub(crate) fn boot() -> Traveller {
        let workload = Workload { mib: 2, touch_mib: 4, rate_mib: 4, ..Workload::default() };
        Traveller(boot(Qemu::builder().block(RamBlock::node(32 * MIB)).proof(workload)))
    }

    /// An agent at `site` starts, says that these probes are attached and those absent, and sends the guest to another.
    pub(crate) async fn leaves(&mut self, site: Site, attached: &[&'static str], absent: &[Absent<'_>]) {
        let source = says(site.clone(), attached, absent);
        let pair = Pair { source, destination: Agent::start_at(site, &[]) };
        let receiver = self.0.destination().start().unwrap();
        pair.migrate("limited", &self.0, &receiver, parameters(Tcp)).await;
        assert_proves_itself(&receiver);
        self.0 = receiver;
    }
}

/// An agent at `site` starts, and says that these probes are attached and those absent.
pub(crate) fn says(site: Site, attached: &[&'static str], absent: &[Absent<'_>]) -> Agent {
    let agent = Agent::start_at(site, &["--probes", "auto"]);
    let checks = settled_checks(&agent.grpc.to_string());
    let check = checks.iter().find(|check| check["id"] == "ebpf_probes").unwrap();
    let text = check.to_string();
    let is_sound = attached.len() == Probe::ALL.len();
    assert_eq!(check["status"], if is_sound { "ok" } else { "warn" }, "{text}");
    for Absent { probes, reason, remedy } in absent {
        let told = check["evidence"].as_str().unwrap();
        assert!(told.contains(&format!("{}: ", probes.join(", "))), "{told} does not name {probes:?}");
        assert!(told.contains(reason), "{told} does not say {reason}");
        assert!(text.contains(remedy), "{text} does not say {remedy}");
    }
    let exposed = agent.scrape();
    for name in attached {
        assert!(exposed.contains(&series(name, true)), "{name} is not told to be attached: {exposed}");
    }
    for name in absent.iter().flat_map(|absent| &absent.probes) {
        assert!(exposed.contains(&series(name, false)), "{name} is not told to be absent: {exposed}");
    }
    let gauge = format!("ramferry_doctor_check_status{{check=\"ebpf_probes\"}} {}\n", u8::from(!is_sound));
    assert!(exposed.contains(&gauge), "{gauge} is not in {exposed}");
    agent
}

fn series(name: &str, is_attached: bool) -> String {
    format!("ramferry_ebpf_probe_attached{{probe=\"{name}\"}} {}\n", u8::from(is_attached))
}
