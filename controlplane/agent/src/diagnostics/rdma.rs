//! RDMA devices and their ports, as /sys tells of them, and as libibverbs does.

use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use super::host::Host;
use crate::config::{Config, RdmaListen};
use crate::fabrics::{self, PortMtu};
use flow::Flow;

mod flow;
mod health;
mod setting;

const DEVICES: &str = "/sys/class/infiniband";
/// Said where there is no device.
pub(super) const NO_DEVICE: &str = "there is no RDMA device";
/// Said where nothing was asked for.
pub(super) const NOT_BUILT: &str = "this program was built without verbs (cargo feature \"verbs\")";
/// Most entries of a port's address table that are read.
const GIDS: usize = 1024;

/// What was read of this host's RDMA.
#[derive(Clone, Debug)]
pub(super) struct Rdma {
    /// Whether this program can use RDMA at all.
    pub(super) is_built: bool,
    /// The only device to be used, where one is named.
    pub(super) wanted: Option<String>,
    pub(super) listen: RdmaListen,
    /// Where guests would arrive over verbs, or why they cannot.
    pub(super) listen_address: Result<std::net::SocketAddr, String>,
    /// Every device of the host.
    pub(super) devices: Vec<String>,
    /// The ports of those that are used.
    pub(super) ports: Vec<Port>,
    /// What libibverbs says of every port, or why it does not.
    pub(super) mtus: Result<Vec<PortMtu>, String>,
    pub(super) nodes: Vec<Node>,
    /// CPUs that the data plane is pinned to.
    pub(super) poller_cpus: Option<Vec<usize>>,
}

/// A port of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) device: String,
    pub(super) number: u32,
    /// As the kernel writes it: "4: ACTIVE".
    pub(super) state: String,
    pub(super) physical_state: String,
    /// "100 Gb/sec (4X EDR)".
    pub(super) rate: String,
    pub(super) is_ethernet: bool,
    /// Whether the device is on a bus, and no software.
    pub(super) is_hardware: bool,
    pub(super) interface: Option<Interface>,
    pub(super) gids: Vec<Gid>,
    /// Those that count errors, or tell of congestion, and are not zero.
    pub(super) counters: Vec<(String, u64)>,
    /// Sent and received; `None` where they are not counted.
    pub(super) packets: Option<u64>,
    pub(super) numa_node: Option<u32>,
    pub(super) pcie: Option<Pcie>,
}

/// The network interface of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) mtu_bytes: Option<u64>,
    pub(super) speed_megabits: Option<u64>,
    /// Whether it was set up (`ip link set up`).
    pub(super) is_up: bool,
    /// Priorities for which the port answers marks of congestion (RoCE's ECN), where the driver says.
    pub(super) ecn_priorities: Option<Vec<u32>>,
    /// Asked for where the port is a RoCE adapter's.
    pub(super) flow: Flow,
}

/// An entry of a RoCE port's address table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gid {
    pub(super) index: usize,
    pub(super) address: Ipv6Addr,
    /// "RoCE v2", "IB/RoCE v1".
    pub(super) kind: String,
}

/// How a device is connected, now and at best.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pcie {
    pub(super) speed: String,
    pub(super) max_speed: String,
    pub(super) width: u32,
    pub(super) max_width: u32,
}

/// A NUMA node with its CPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) number: u32,
    pub(super) cpus: Vec<usize>,
    /// As the kernel writes them: "0-7,16".
    pub(super) cpulist: String,
}

impl Rdma {
    pub(super) fn read(host: &Host, config: &Config) -> Self {
        let devices = host.names(DEVICES);
        let used =
            devices.iter().filter(|device| config.rdma_device.as_ref().is_none_or(|name| name == *device));
        Self {
            is_built: fabrics::HAS_VERBS,
            wanted: config.rdma_device.clone(),
            listen: config.rdma_listen,
            listen_address: fabrics::rdma_listen_address(config),
            ports: used.flat_map(|device| ports(host, device)).collect(),
            devices,
            mtus: fabrics::port_mtus(),
            nodes: nodes(host),
            poller_cpus: config.poller_cpus.clone(),
        }
    }

    /// Why nothing of this host pins memory; none where something may.
    pub(super) fn nothing_pins(&self) -> Option<&'static str> {
        match (self.is_built, self.devices.is_empty()) {
            (false, _) => Some(NOT_BUILT),
            (true, true) => Some(NO_DEVICE),
            (true, false) => None,
        }
    }
}

impl Port {
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.device, self.number)
    }

    pub(super) fn is_active(&self) -> bool {
        self.state.starts_with("4:")
    }

    fn counter(&self, name: &str) -> Option<u64> {
        self.counters.iter().find(|(counted, _)| counted == name).map(|(_, count)| *count)
    }
}

fn ports(host: &Host, device: &str) -> Vec<Port> {
    let directory = Path::new(DEVICES).join(device);
    let bus = directory.join("device");
    let text = |path: PathBuf| host.text(path).unwrap_or_default();
    let pcie = || {
        Some(Pcie {
            speed: host.text(bus.join("current_link_speed"))?,
            max_speed: host.text(bus.join("max_link_speed"))?,
            width: host.value(bus.join("current_link_width"))?,
            max_width: host.value(bus.join("max_link_width"))?,
        })
    };
    let port = |name: String| {
        let at = directory.join("ports").join(&name);
        let (gids, interface) = address_table(host, &at);
        let interface = interface.or_else(|| host.text(directory.join("parent")));
        let interface = interface.or_else(|| host.names(bus.join("net")).into_iter().next());
        let (counters, packets) = counters(host, &at);
        let is_ethernet = text(at.join("link_layer")) == "Ethernet";
        let is_hardware = host.has(&bus);
        let is_adapter = is_ethernet && is_hardware;
        Some(Port {
            device: device.to_owned(),
            number: name.parse().ok()?,
            state: text(at.join("state")),
            physical_state: text(at.join("phys_state")),
            rate: text(at.join("rate")),
            is_ethernet,
            is_hardware,
            interface: interface.map(|name| read_interface(host, name, is_adapter)),
            gids,
            counters,
            packets,
            numa_node: host.value(bus.join("numa_node")),
            pcie: pcie(),
        })
    };
    host.names(directory.join("ports")).into_iter().filter_map(port).collect()
}

/// The entries that hold something, and the interface that the first of them names.
fn address_table(host: &Host, port: &Path) -> (Vec<Gid>, Option<String>) {
    let mut interface = None;
    let mut gids = Vec::new();
    for name in host.names(port.join("gids")).into_iter().take(GIDS) {
        let address: Option<Ipv6Addr> = host.value(port.join("gids").join(&name));
        let (Some(address), Ok(index)) = (address, name.parse()) else { continue };
        if address.is_unspecified() {
            continue;
        }
        interface = interface.or_else(|| host.text(port.join("gid_attrs/ndevs").join(&name)));
        let kind = host.text(port.join("gid_attrs/types").join(&name)).unwrap_or_default();
        gids.push(Gid { index, address, kind });
    }
    (gids, interface)
}

fn read_interface(host: &Host, name: String, is_adapter: bool) -> Interface {
    let at = Path::new("/sys/class/net").join(&name);
    let flags = host.text(at.join("flags")).unwrap_or_default();
    let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).unwrap_or(0);
    let ecn = at.join("ecn/roce_np/enable");
    let ecn_priorities = host.has(&ecn).then(|| {
        let is_on = |name: &String| host.value::<u32>(ecn.join(name)).is_some_and(|value| value != 0);
        host.names(&ecn).iter().filter(|name| is_on(name)).filter_map(|name| name.parse().ok()).collect()
    });
    Interface {
        mtu_bytes: host.value(at.join("mtu")),
        speed_megabits: host.value(at.join("speed")),
        is_up: flags & 1 != 0,
        ecn_priorities,
        flow: if is_adapter { Flow::ask(&name) } else { Flow::default() },
        name,
    }
}

/// Counters that are not zero and of interest, and how many packets there were.
fn counters(host: &Host, port: &Path) -> (Vec<(String, u64)>, Option<u64>) {
    let mut found = Vec::new();
    let mut packets = None;
    for directory in ["counters", "hw_counters"].map(|name| port.join(name)) {
        for name in host.names(&directory) {
            let Some(count) = host.value::<u64>(directory.join(&name)) else { continue };
            if health::PACKETS.contains(&name.as_str()) {
                packets = Some(packets.unwrap_or(0_u64).saturating_add(count));
            } else if count > 0 && health::is_of_interest(&name) {
                found.push((name, count));
            }
        }
    }
    (found, packets)
}

fn nodes(host: &Host) -> Vec<Node> {
    const NODES: &str = "/sys/devices/system/node";
    let node = |name: String| {
        let number = name.strip_prefix("node")?.parse().ok()?;
        let cpulist = host.text(Path::new(NODES).join(&name).join("cpulist"))?;
        Some(Node { number, cpus: cpus(&cpulist), cpulist })
    };
    host.names(NODES).into_iter().filter_map(node).collect()
}

/// The CPUs of a list such as "0-3,8".
fn cpus(list: &str) -> Vec<usize> {
    const HIGHEST: usize = 8191;
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (last <= HIGHEST).then_some(first..=last)
    };
    list.split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::host::fake::Fake;
    use super::*;

    const PORT: &str = "/sys/class/infiniband/rxe0/ports/1";

    /// A host with one soft-RoCE device.
    pub(in crate::diagnostics) fn soft_roce() -> Fake {
        let file = |name: &str| format!("{PORT}/{name}");
        Fake::new(&[
            (&file("state"), "4: ACTIVE\n"),
            (&file("phys_state"), "5: LinkUp\n"),
            (&file("rate"), "2.5 Gb/sec (1X SDR)\n"),
            (&file("link_layer"), "Ethernet\n"),
            (&file("gids/0"), "fe80:0000:0000:0000:0202:c9ff:fe00:0001\n"),
            (&file("gid_attrs/types/0"), "RoCE v2\n"),
            (&file("gid_attrs/ndevs/0"), "v0\n"),
            (&file("gids/1"), "0000:0000:0000:0000:0000:ffff:0a4d:0001\n"),
            (&file("gid_attrs/types/1"), "RoCE v2\n"),
            (&file("gid_attrs/ndevs/1"), "v0\n"),
            (&file("gids/2"), "0000:0000:0000:0000:0000:0000:0000:0000\n"),
            (&file("hw_counters/sent_pkts"), "600\n"),
            (&file("hw_counters/rcvd_pkts"), "400\n"),
            (&file("hw_counters/retry_exceeded_err"), "0\n"),
            (&file("hw_counters/rdma_sends"), "9\n"),
            ("/sys/class/net/v0/mtu", "9000\n"),
            ("/sys/class/net/v0/speed", "10000\n"),
            ("/sys/class/net/v0/flags", "0x1003\n"),
            ("/sys/devices/system/node/node0/cpulist", "0-1\n"),
        ])
    }

    /// What is read of a host, with nothing configured.
    pub(in crate::diagnostics) fn read(fake: &Fake) -> Rdma {
        let config = Config::check(&crate::config::Options::default()).unwrap();
        let mut rdma = Rdma::read(&fake.host(), &config);
        // Of the host that the test runs on.
        rdma.is_built = true;
        rdma.mtus =
            Ok(vec![PortMtu { device: "rxe0".into(), port: 1, mtu_bytes: 4096, max_mtu_bytes: 4096 }]);
        rdma.listen_address = Ok("10.77.0.1:0".parse().unwrap());
        rdma
    }

    #[test]
    fn a_port_is_read_with_its_addresses_interface_and_counters() {
        let fake = soft_roce();
        let rdma = read(&fake);
        assert_eq!(rdma.devices, ["rxe0"]);
        let [port] = &rdma.ports[..] else { panic!("{:?}", rdma.ports) };
        assert!(port.is_active() && port.is_ethernet && !port.is_hardware);
        assert_eq!((port.name().as_str(), port.packets), ("rxe0/1", Some(1000)));
        assert_eq!(port.counters, []);
        let kinds: Vec<_> = port.gids.iter().map(|gid| (gid.index, gid.kind.as_str())).collect();
        assert_eq!(kinds, [(0, "RoCE v2"), (1, "RoCE v2")]);
        let interface = port.interface.as_ref().unwrap();
        assert_eq!((interface.name.as_str(), interface.mtu_bytes, interface.is_up), ("v0", Some(9000), true));
        assert_eq!(rdma.nothing_pins(), None);
        fake.write(&format!("{PORT}/hw_counters/retry_exceeded_err"), "3");
        assert_eq!(read(&fake).ports[0].counters, [("retry_exceeded_err".to_owned(), 3)]);
    }

    #[test]
    fn only_the_ports_of_the_named_device_are_looked_at() {
        let fake = soft_roce();
        fake.write("/sys/class/infiniband/rxe1/ports/1/state", "1: DOWN");
        let options =
            crate::config::Options { rdma_device: Some("rxe1".into()), ..crate::config::Options::default() };
        let rdma = Rdma::read(&fake.host(), &Config::check(&options).unwrap());
        assert_eq!(rdma.devices.len(), 2);
        assert_eq!(rdma.ports.iter().map(Port::name).collect::<Vec<_>>(), ["rxe1/1"]);
    }

    #[test]
    fn lists_of_cpus_are_those_of_the_kernel() {
        assert_eq!(cpus("0-3,8"), [0, 1, 2, 3, 8]);
        assert_eq!(cpus("0-9999999999"), [] as [usize; 0]);
        assert_eq!(cpus(""), [] as [usize; 0]);
    }
}
