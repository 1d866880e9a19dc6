//! Through what a fabric goes: the device, and its port's rate.

use std::net::{IpAddr, Ipv4Addr};

use ramferry_fabric::FabricKind;
use serde::Serialize;

use crate::bench::BenchError;

/// An RDMA device, as far as a measurement is concerned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Device {
    pub(crate) name: String,
    /// The lowest of its active ports'.
    pub(crate) port_bits_per_second: Option<u64>,
}

/// The fabrics of this build.
pub(crate) const FABRICS: &[FabricKind] = &[
    FabricKind::Tcp,
    FabricKind::Shm,
    #[cfg(feature = "verbs")]
    FabricKind::Verbs,
];

/// The address that both sides use when they are in one process: what was given,
/// or one that the fabric works at.
#[cfg_attr(not(feature = "verbs"), allow(unused_variables, reason = "other fabrics work at any address"))]
pub(crate) fn own_address(
    fabric: FabricKind,
    given: Option<IpAddr>,
    device: Option<&str>,
) -> Result<IpAddr, BenchError> {
    match given {
        Some(address) => Ok(address),
        #[cfg(feature = "verbs")]
        None if fabric == FabricKind::Verbs => {
            let ports = ramferry_verbs::devices()?;
            let usable = ports
                .into_iter()
                .filter(|port| port.active && device.is_none_or(|device| *device == port.name));
            usable.flat_map(|port| port.addresses).next().ok_or(BenchError::NoDevice)
        }
        None => Ok(Ipv4Addr::LOCALHOST.into()),
    }
}

/// What is known of the device.
#[cfg(feature = "verbs")]
pub(super) fn device(name: &str) -> Device {
    // A device that works, and of which nothing can be told, is measured none the less.
    let ports = ramferry_verbs::devices().unwrap_or_default();
    let of_it = ports.iter().filter(|port| port.active && port.name == name);
    let port_bits_per_second = of_it.map(|port| port.rate_bits_per_second).filter(|rate| *rate > 0).min();
    Device { name: name.to_owned(), port_bits_per_second }
}
