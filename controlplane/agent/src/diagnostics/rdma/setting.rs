//! Whether devices are there, set up, and reached.

use super::super::verdict::Verdict;
use super::{NO_DEVICE, NOT_BUILT, Port, Rdma};
use crate::config::RdmaListen;
use crate::fabrics::PortMtu;

/// What RoCE's headers take of an Ethernet frame, at most.
const ROCE_HEADERS_BYTES: u64 = 96;

impl Rdma {
    /// Why there is nothing to judge; none where there is.
    pub(in crate::diagnostics) fn idle(&self) -> Option<Verdict> {
        if !self.is_built {
            return Some(Verdict::skip(NOT_BUILT));
        }
        self.ports.is_empty().then(|| Verdict::skip(NO_DEVICE))
    }

    /// Whether somebody said that RDMA is to be used.
    fn is_demanded(&self) -> bool {
        self.wanted.is_some() || matches!(self.listen, RdmaListen::At(_))
    }

    pub(in crate::diagnostics) fn judge_devices(&self) -> Verdict {
        if !self.is_built {
            return Verdict::skip(NOT_BUILT);
        }
        let evidence = match &self.devices[..] {
            [] => "/sys/class/infiniband has no device".to_owned(),
            devices => format!("{} in /sys/class/infiniband: {}", devices.len(), devices.join(", ")),
        };
        if let Some(wanted) = self.wanted.as_ref().filter(|wanted| !self.devices.contains(wanted)) {
            return Verdict::fail(
                format!("{evidence}; rdma_device is {wanted}, which is not there"),
                "load the adapter's driver (dmesg tells what it found), or set rdma_device to a device that is there",
            );
        }
        if self.devices.is_empty() {
            if self.listen == RdmaListen::Off {
                return Verdict::skip(format!("{evidence}, and rdma_listen is off"));
            }
            let remedy = "load the adapter's driver and ib_uverbs, rdma_ucm (dmesg; rdma link); where this host has no \
                          adapter, set rdma_listen = \"off\"";
            let evidence = format!("{evidence}: migrations go over shm and tcp");
            return match self.listen {
                RdmaListen::At(_) => Verdict::fail(evidence, remedy),
                _ => Verdict::warn(evidence, remedy),
            };
        }
        match &self.mtus {
            Ok(_) => Verdict::ok(evidence),
            Err(why) => Verdict::fail(
                format!("{evidence}; {why}"),
                "modprobe ib_uverbs rdma_ucm, and let the agent's user open /dev/infiniband/* (container: --device)",
            ),
        }
    }

    pub(in crate::diagnostics) fn judge_port(&self) -> Verdict {
        if let Some(idle) = self.idle() {
            return idle;
        }
        let some_active = self.ports.iter().any(Port::is_active);
        let verdicts = self.ports.iter().map(|port| {
            let interface = port.interface.as_ref().map(|interface| format!(" on {}", interface.name));
            let evidence = format!(
                "{}{} is {} ({})",
                port.name(),
                interface.unwrap_or_default(),
                number_less(&port.state),
                number_less(&port.physical_state)
            );
            if port.is_active() {
                return Verdict::ok(evidence);
            }
            let remedy = remedy_of_port(port);
            if !some_active && self.is_demanded() {
                return Verdict::fail(evidence, remedy);
            }
            Verdict::warn(evidence, remedy)
        });
        Verdict::of_all(verdicts.collect()).expect("there are ports")
    }

    pub(in crate::diagnostics) fn judge_mtu(&self) -> Verdict {
        if let Some(idle) = self.idle() {
            return idle;
        }
        let mtus = match &self.mtus {
            Ok(mtus) => mtus,
            Err(why) => return Verdict::skip(why.clone()),
        };
        let active = self.ports.iter().filter(|port| port.is_active());
        let judged = active.filter_map(|port| {
            let of = |mtu: &&PortMtu| mtu.device == port.device && u32::from(mtu.port) == port.number;
            Some(judge_mtu_of(port, mtus.iter().find(of)?))
        });
        Verdict::of_all(judged.collect()).unwrap_or_else(|| Verdict::skip("no port is active"))
    }

    pub(in crate::diagnostics) fn judge_gids(&self) -> Verdict {
        if let Some(idle) = self.idle() {
            return idle;
        }
        let judged = self.ports.iter().filter(|port| port.is_active() && port.is_ethernet).map(judge_gids_of);
        Verdict::of_all(judged.collect()).unwrap_or_else(|| {
            Verdict::skip("no active port is an Ethernet port: only RoCE has addresses of IP")
        })
    }

    pub(in crate::diagnostics) fn judge_listen(&self) -> Verdict {
        if !self.is_built {
            return Verdict::skip(NOT_BUILT);
        }
        let is_down = !self.ports.is_empty() && !self.ports.iter().any(Port::is_active);
        match (self.listen, &self.listen_address) {
            (RdmaListen::Auto, Err(why)) if is_down => Verdict::warn(
                format!("guests cannot arrive over RDMA: {why}"),
                "set a port up first: see rdma_port in this list",
            ),
            (RdmaListen::At(address), Err(why)) if is_down => Verdict::fail(
                format!("rdma_listen is {address}: {why}"),
                "set a port up first: see rdma_port in this list",
            ),
            (RdmaListen::Off, _) => Verdict::skip("rdma_listen is off"),
            (_, Err(_)) if self.devices.is_empty() && !self.is_demanded() => Verdict::skip(NO_DEVICE),
            (_, Ok(address)) => Verdict::ok(format!("guests can arrive over RDMA at {}", address.ip())),
            (RdmaListen::At(address), Err(why)) => Verdict::fail(
                format!("rdma_listen is {address}: {why}"),
                "set rdma_listen to an address that an RDMA device has (rdma link; ip address), or to auto",
            ),
            (RdmaListen::Auto, Err(why)) => Verdict::warn(
                format!("guests cannot arrive over RDMA: {why}"),
                "set rdma_listen = \"ADDRESS:PORT\", with an address of the RDMA device's interface, or \"off\"",
            ),
        }
    }

    pub(in crate::diagnostics) fn judge_numa(&self) -> Verdict {
        if let Some(idle) = self.idle() {
            return idle;
        }
        if self.nodes.len() < 2 {
            return Verdict::skip(format!("this host has {} NUMA node", self.nodes.len()));
        }
        let of_node = self.ports.iter().filter_map(|port| Some((port, port.numa_node?)));
        let judged = of_node.map(|(port, number)| {
            let evidence = format!("{} is at NUMA node {number}", port.name());
            let Some(node) = self.nodes.iter().find(|node| node.number == number) else {
                return Verdict::ok(format!("{evidence}, which has no CPUs"));
            };
            let remedy = format!("set poller_cpus to CPUs of node {number}: {}", node.cpulist);
            match &self.poller_cpus {
                None => Verdict::warn(format!("{evidence}; the data plane's threads may run at any"), remedy),
                Some(cpus) => match cpus.iter().find(|cpu| !node.cpus.contains(cpu)) {
                    Some(cpu) => Verdict::warn(
                        format!("{evidence}; poller_cpus has CPU {cpu} of another node"),
                        remedy,
                    ),
                    None => Verdict::ok(format!("{evidence}, and so are poller_cpus")),
                },
            }
        });
        Verdict::of_all(judged.collect()).unwrap_or_else(|| Verdict::skip("no device tells its NUMA node"))
    }
}

fn remedy_of_port(port: &Port) -> String {
    match &port.interface {
        Some(interface) if port.is_ethernet && !interface.is_up => {
            format!("ip link set {} up", interface.name)
        }
        Some(interface) if port.is_ethernet => format!(
            "{0} is up and has no carrier: see its cable, and the port at the other end (ip link show {0}; ethtool {0})",
            interface.name
        ),
        _ if port.state.starts_with("2:") => {
            "the link is trained, and no subnet manager has set the port up: start one (opensm), or mend the one in the \
             switch"
                .to_owned()
        }
        _ => format!("see the cable and the switch's port (rdma link show {}; ibstat)", port.name()),
    }
}

fn judge_mtu_of(port: &Port, mtu: &PortMtu) -> Verdict {
    let interface_mtu = port.interface.as_ref().and_then(|interface| Some((interface, interface.mtu_bytes?)));
    let told = interface_mtu.map(|(interface, mtu)| format!("; {} has MTU {mtu}", interface.name));
    let evidence = format!(
        "{} carries {} bytes a packet of {} at most{}",
        port.name(),
        mtu.mtu_bytes,
        mtu.max_mtu_bytes,
        told.unwrap_or_default()
    );
    if mtu.mtu_bytes >= mtu.max_mtu_bytes {
        return Verdict::ok(evidence);
    }
    let needed = u64::from(mtu.max_mtu_bytes) + ROCE_HEADERS_BYTES;
    let remedy = match interface_mtu {
        Some((interface, mtu)) if port.is_ethernet && mtu < needed => format!(
            "ip link set dev {} mtu 9000 (at least {needed}), the same at the peer, and jumbo frames on every switch \
             between",
            interface.name
        ),
        Some((interface, _)) if port.is_ethernet => format!(
            "the interface would allow more, and the port has not followed: ip link set {0} down, then ip link set {0} up, \
             while no migration uses it",
            interface.name
        ),
        _ => {
            "raise the MTU of the partition in the subnet manager (opensm: partitions.conf, mtu=5)".to_owned()
        }
    };
    Verdict::warn(evidence, remedy)
}

fn judge_gids_of(port: &Port) -> Verdict {
    let addresses: Vec<String> = port
        .gids
        .iter()
        .filter(|gid| !gid.address.is_unicast_link_local())
        .map(|gid| {
            let address = gid.address.to_ipv4_mapped().map_or(gid.address.to_string(), |v4| v4.to_string());
            format!("{address} ({}, GID {})", gid.kind, gid.index)
        })
        .collect();
    let interface = port.interface.as_ref().map_or("its interface", |interface| interface.name.as_str());
    if addresses.is_empty() {
        return Verdict::warn(
            format!(
                "{} has {} GIDs and none of an IP address: no peer can reach it",
                port.name(),
                port.gids.len()
            ),
            format!("ip address add ADDRESS/PREFIX dev {interface}"),
        );
    }
    let evidence = format!("{}: {}", port.name(), addresses.join(", "));
    if port.gids.iter().any(|gid| gid.kind == "RoCE v2" && !gid.address.is_unicast_link_local()) {
        return Verdict::ok(evidence);
    }
    Verdict::warn(
        format!("{evidence}: RoCE v1 only, which no router passes on"),
        format!("cma_roce_mode -d {} -p {} -m 2, where the adapter has RoCE v2", port.device, port.number),
    )
}

/// "ACTIVE" of "4: ACTIVE".
fn number_less(state: &str) -> &str {
    state.split_once(':').map_or(state, |(_, name)| name.trim())
}

#[cfg(test)]
mod tests {
    use super::super::super::verdict::Status;
    use super::super::tests::{read, soft_roce};
    use super::super::{Gid, Node};
    use super::*;

    fn rdma() -> Rdma {
        read(&soft_roce())
    }

    #[test]
    fn a_sound_port_passes_every_check() {
        let rdma = rdma();
        for verdict in [
            rdma.judge_devices(),
            rdma.judge_port(),
            rdma.judge_mtu(),
            rdma.judge_gids(),
            rdma.judge_listen(),
        ] {
            assert_eq!(verdict.status, Status::Ok, "{verdict:?}");
        }
        assert_eq!(rdma.judge_port().evidence, "rxe0/1 on v0 is ACTIVE (LinkUp)");
        assert_eq!(rdma.judge_gids().evidence, "rxe0/1: 10.77.0.1 (RoCE v2, GID 1)");
        assert_eq!(rdma.judge_numa().status, Status::Skip);
    }

    #[test]
    fn without_verbs_everything_is_skipped_with_the_reason() {
        let rdma = Rdma { is_built: false, ..rdma() };
        for verdict in [
            rdma.judge_devices(),
            rdma.judge_port(),
            rdma.judge_mtu(),
            rdma.judge_gids(),
            rdma.judge_listen(),
        ] {
            assert_eq!(verdict, Verdict::skip(NOT_BUILT));
        }
    }

    #[test]
    fn a_host_without_devices_warns_and_fails_only_where_one_is_named() {
        let none = Rdma { devices: vec![], ports: vec![], listen_address: Err(NO_DEVICE.into()), ..rdma() };
        assert_eq!(none.judge_devices().status, Status::Warn);
        assert_eq!((none.judge_port().status, none.judge_listen().status), (Status::Skip, Status::Skip));
        assert_eq!(Rdma { listen: RdmaListen::Off, ..none.clone() }.judge_devices().status, Status::Skip);
        let named = Rdma { wanted: Some("mlx5_0".into()), ..none };
        let verdict = named.judge_devices();
        assert!(verdict.status == Status::Fail && verdict.evidence.contains("mlx5_0"), "{verdict:?}");
    }

    #[test]
    fn devices_that_may_not_be_opened_fail() {
        let verdict = Rdma { mtus: Err("cannot open RDMA device rxe0".into()), ..rdma() }.judge_devices();
        assert!(verdict.status == Status::Fail && verdict.remedy.contains("/dev/infiniband"), "{verdict:?}");
    }

    #[test]
    fn a_port_that_is_down_warns_and_fails_where_it_is_asked_for() {
        let mut rdma = rdma();
        rdma.ports[0].state = "1: DOWN".into();
        rdma.ports[0].physical_state = "3: Disabled".into();
        let verdict = rdma.judge_port();
        assert_eq!(verdict.status, Status::Warn);
        assert_eq!(verdict.evidence, "rxe0/1 on v0 is DOWN (Disabled)");
        assert!(verdict.remedy.contains("has no carrier"), "{verdict:?}");
        rdma.ports[0].interface.as_mut().unwrap().is_up = false;
        assert_eq!(rdma.judge_port().remedy, "ip link set v0 up");
        assert_eq!(rdma.judge_mtu(), Verdict::skip("no port is active"));
        rdma.wanted = Some("rxe0".into());
        assert_eq!(rdma.judge_port().status, Status::Fail);
    }

    #[test]
    fn an_infiniband_port_without_subnet_manager_is_told_of_it() {
        let mut rdma = rdma();
        rdma.ports[0].is_ethernet = false;
        rdma.ports[0].state = "2: INIT".into();
        assert!(rdma.judge_port().remedy.contains("opensm"));
    }

    #[test]
    fn an_mtu_below_the_ports_best_warns_with_the_command_that_raises_it() {
        let mut rdma = rdma();
        rdma.mtus.as_mut().unwrap()[0].mtu_bytes = 1024;
        rdma.ports[0].interface.as_mut().unwrap().mtu_bytes = Some(1500);
        let verdict = rdma.judge_mtu();
        assert_eq!(verdict.status, Status::Warn);
        assert_eq!(verdict.evidence, "rxe0/1 carries 1024 bytes a packet of 4096 at most; v0 has MTU 1500");
        assert!(verdict.remedy.starts_with("ip link set dev v0 mtu 9000 (at least 4192)"), "{verdict:?}");
        rdma.ports[0].interface.as_mut().unwrap().mtu_bytes = Some(9000);
        assert!(rdma.judge_mtu().remedy.contains("down"));
        rdma.ports[0].is_ethernet = false;
        assert!(rdma.judge_mtu().remedy.contains("partitions.conf"));
        rdma.mtus = Err("cannot list".into());
        assert_eq!(rdma.judge_mtu().status, Status::Skip);
    }

    #[test]
    fn an_address_table_without_ip_or_without_roce_2_warns() {
        let mut rdma = rdma();
        rdma.ports[0].gids[1].kind = "IB/RoCE v1".into();
        let verdict = rdma.judge_gids();
        assert!(verdict.status == Status::Warn && verdict.remedy.contains("cma_roce_mode"), "{verdict:?}");
        rdma.ports[0].gids.pop();
        let verdict = rdma.judge_gids();
        assert!(verdict.status == Status::Warn && verdict.remedy.ends_with("dev v0"), "{verdict:?}");
        rdma.ports[0].gids =
            vec![Gid { index: 3, address: "2001:db8::5".parse().unwrap(), kind: "RoCE v2".into() }];
        assert_eq!(rdma.judge_gids().status, Status::Ok);
        rdma.ports[0].is_ethernet = false;
        assert_eq!(rdma.judge_gids().status, Status::Skip);
    }

    #[test]
    fn an_address_that_no_device_has_fails_where_it_is_set_and_warns_where_it_is_looked_for() {
        let mut rdma = Rdma { listen_address: Err("10.0.0.9 is no address of rxe0".into()), ..rdma() };
        assert_eq!(rdma.judge_listen().status, Status::Warn);
        rdma.listen = RdmaListen::At("10.0.0.9:7052".parse().unwrap());
        assert_eq!(rdma.judge_listen().status, Status::Fail);
        rdma.ports[0].state = "1: DOWN".into();
        let down = rdma.judge_listen();
        assert!(down.status == Status::Fail && down.remedy.contains("rdma_port"), "{down:?}");
        rdma.listen = RdmaListen::Auto;
        assert_eq!(rdma.judge_listen().status, Status::Warn);
        rdma.listen = RdmaListen::Off;
        assert_eq!(rdma.judge_listen().status, Status::Skip);
    }

    #[test]
    fn threads_at_another_node_than_the_device_warn_with_the_cpus_to_use() {
        let node = |number, cpulist: &str| Node {
            number,
            cpus: super::super::cpus(cpulist),
            cpulist: cpulist.into(),
        };
        let mut rdma = Rdma { nodes: vec![node(0, "0-3"), node(1, "4-7")], ..rdma() };
        assert_eq!(rdma.judge_numa().status, Status::Skip);
        rdma.ports[0].numa_node = Some(1);
        assert_eq!(rdma.judge_numa().status, Status::Warn);
        rdma.poller_cpus = Some(vec![4, 2]);
        let verdict = rdma.judge_numa();
        assert!(verdict.status == Status::Warn && verdict.remedy.ends_with("4-7"), "{verdict:?}");
        assert!(verdict.evidence.contains("CPU 2"), "{verdict:?}");
        rdma.poller_cpus = Some(vec![4, 5]);
        assert_eq!(rdma.judge_numa().status, Status::Ok);
    }
}
