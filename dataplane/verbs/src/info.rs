//! What RDMA devices this host has, without using any.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use thiserror::Error;

use crate::context::{Context, DeviceList};
use crate::interfaces;

/// What an RDMA port is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// Ethernet: RoCE or iWARP.
    Ethernet,
    /// InfiniBand.
    InfiniBand,
    /// The device does not say.
    Unknown,
}

impl LinkLayer {
    /// From `link_layer` of `struct ibv_port_attr`.
    pub(crate) fn from_raw(raw: u8) -> Self {
        match raw {
            1 => LinkLayer::InfiniBand,
            2 => LinkLayer::Ethernet,
            _ => LinkLayer::Unknown,
        }
    }

    /// The name in outputs.
    pub fn as_str(self) -> &'static str {
        match self {
            LinkLayer::Ethernet => "ethernet",
            LinkLayer::InfiniBand => "infiniband",
            LinkLayer::Unknown => "unknown",
        }
    }
}

/// Which protocol a device speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// InfiniBand's, over InfiniBand or Ethernet (RoCE).
    InfiniBand,
    /// iWARP.
    Iwarp,
    /// One that ramferry does not use.
    Other,
}

impl Transport {
    /// The name in outputs.
    pub fn as_str(self) -> &'static str {
        match self {
            Transport::InfiniBand => "infiniband",
            Transport::Iwarp => "iwarp",
            Transport::Other => "other",
        }
    }
}

/// One port of an RDMA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Name of the device.
    pub name: String,
    /// The port, from 1.
    pub port: u8,
    /// Whether it carries traffic now.
    pub active: bool,
    /// What the port is connected to.
    pub link_layer: LinkLayer,
    /// Which protocol the device speaks.
    pub transport: Transport,
    /// What the port says it carries; 0 where that is not known.
    pub rate_bits_per_second: u64,
    /// Longest packet's payload now.
    pub mtu_bytes: u32,
    /// Longest packet's payload that the port can be set to.
    pub max_mtu_bytes: u32,
    /// Longest message.
    pub max_message_bytes: u32,
    /// Whether connected queue pairs reach memory that is not pinned.
    pub on_demand_paging: bool,
    /// Regions that there may be at once.
    pub max_regions: u32,
    /// Queue pairs that there may be at once.
    pub max_queue_pairs: u32,
    /// Addresses that a peer can connect to.
    pub addresses: Vec<IpAddr>,
    /// Version of the firmware; empty where there is none.
    pub firmware: String,
}

/// Why the devices of this host cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The list cannot be had.
    #[error("cannot list RDMA devices: is rdma-core's configuration sound, and may this user read /sys?")]
    List(#[source] Errno),
    /// A device cannot be opened.
    #[error(
        "cannot open RDMA device {device}: may this user open /dev/infiniband/uverbs*? (container: --device)"
    )]
    Open {
        /// The device.
        device: String,
        /// The kernel's reason.
        #[source]
        source: Errno,
    },
    /// A device does not answer.
    #[error("RDMA device {device} does not say what it can do: see the kernel's log")]
    Query {
        /// The device.
        device: String,
        /// The kernel's reason.
        #[source]
        source: Errno,
    },
    /// The connection manager cannot be used.
    #[error(
        "cannot open /dev/infiniband/rdma_cm: load its module (modprobe rdma_ucm), and let this user open it \
         (container: --device)"
    )]
    ConnectionManager(#[source] std::io::Error),
}

/// The ports of this host's RDMA devices; none where it has no device.
///
/// # Errors
/// When there are devices that this process cannot use.
pub fn devices() -> Result<Vec<DeviceInfo>, DeviceError> {
    let list = DeviceList::new().map_err(DeviceError::List)?;
    let mut found = Vec::new();
    for listed in list.iter() {
        let device = listed.name();
        let context =
            Context::open(&listed).map_err(|source| DeviceError::Open { device: device.clone(), source })?;
        let query = |source| DeviceError::Query { device: device.clone(), source };
        let capabilities = context.capabilities().map_err(query)?;
        let table = context.address_table().map_err(query)?;
        for port in 1..=capabilities.ports {
            let state = context.port(port).map_err(query)?;
            found.push(DeviceInfo {
                name: device.clone(),
                port,
                active: state.active,
                link_layer: state.link_layer,
                transport: context.transport(),
                rate_bits_per_second: state.rate_bits_per_second,
                mtu_bytes: state.mtu_bytes,
                max_mtu_bytes: state.max_mtu_bytes,
                max_message_bytes: state.max_message_bytes,
                on_demand_paging: capabilities.on_demand_paging,
                max_regions: capabilities.max_regions,
                max_queue_pairs: capabilities.max_queue_pairs,
                addresses: addresses_of_port(&device, &table, port),
                firmware: capabilities.firmware.clone(),
            });
        }
    }
    if !found.is_empty() {
        let options = fs::File::options().read(true).write(true).open("/dev/infiniband/rdma_cm");
        options.map_err(DeviceError::ConnectionManager)?;
    }
    Ok(found)
}

/// Addresses of a device's interfaces; none where it cannot be asked.
pub(crate) fn addresses_of(device: &str) -> Vec<IpAddr> {
    let asked = || {
        let list = DeviceList::new().ok()?;
        let listed = list.iter().find(|listed| listed.name() == device)?;
        Context::open(&listed).ok()?.address_table().ok()
    };
    let table = asked().unwrap_or_default();
    let mut ports: Vec<u8> = table.iter().map(|(port, _)| *port).collect();
    ports.dedup();
    let mut addresses: Vec<_> =
        ports.into_iter().flat_map(|port| addresses_of_port(device, &table, port)).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// The addresses in a port's table, of RoCE; and those of the network interfaces of its
/// device (IPoIB, iWARP).
fn addresses_of_port(device: &str, table: &[(u8, Ipv6Addr)], port: u8) -> Vec<IpAddr> {
    let entries = table.iter().filter(|(of, _)| *of == port);
    let mut addresses: Vec<IpAddr> = entries.filter_map(|(_, entry)| address_in_table(*entry)).collect();
    if addresses.is_empty() {
        let interfaces = fs::read_dir(sysfs(device).join("device/net")).into_iter().flatten().flatten();
        let names: Vec<_> = interfaces.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        addresses = interfaces::addresses(&names);
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

fn sysfs(device: &str) -> PathBuf {
    // A name from outside must not lead elsewhere.
    let name = Path::new(device).file_name().unwrap_or_default();
    Path::new("/sys/class/infiniband").join(name)
}

/// The IP address that an entry of a RoCE port's table is. Zero, those of the link alone and those of
/// InfiniBand's own kind are none.
fn address_in_table(entry: Ipv6Addr) -> Option<IpAddr> {
    if let Some(v4) = entry.to_ipv4_mapped() {
        return Some(v4.into());
    }
    let is_local = entry.is_unspecified() || entry.is_unicast_link_local() || entry.is_loopback();
    (!is_local && !entry.is_multicast()).then_some(entry.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_a_roce_port_are_in_its_table() {
        let table = ["fe80::202:c9ff:fe00:1", "::ffff:10.77.0.1", "2001:db8::5", "::ffff:10.0.0.9"];
        let ports = [1, 1, 1, 2];
        let table: Vec<_> = ports.into_iter().zip(table.map(|entry| entry.parse().unwrap())).collect();
        let addresses: Vec<_> =
            addresses_of_port("none", &table, 1).iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.77.0.1", "2001:db8::5"]);
        assert!(addresses_of_port("none", &table[..1], 1).is_empty());
    }

    #[test]
    fn a_name_leads_nowhere_but_to_its_device() {
        assert_eq!(sysfs("../../net/lo"), Path::new("/sys/class/infiniband/lo"));
        assert_eq!(sysfs(".."), Path::new("/sys/class/infiniband"));
        assert!(addresses_of("no-such-device").is_empty());
    }

    #[test]
    fn a_host_without_devices_has_an_empty_list() {
        if Path::new("/sys/class/infiniband").exists() {
            return;
        }
        assert_eq!(devices().unwrap(), []);
    }
}
