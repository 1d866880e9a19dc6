//! RDMA: the agent's listener and its devices.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use ramferry_engine::{Failure, Reason};
use ramferry_fabric::SessionToken;
use ramferry_ram::Memory;
use ramferry_verbs::{DeviceInfo, Listener};

use super::{Admitted, Agreed, Connected, PortMtu, lost, open_links};
use crate::config::{Config, RdmaListen};
use crate::core::CoreError;
use crate::status::causes;

/// Whether this build has verbs.
pub(crate) const HAS_VERBS: bool = true;
/// For each link. The connection manager sends again what was lost, after 4.3 s on RoCE: a request and
/// its answer may both be.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(super) struct Verbs {
    listen: RdmaListen,
    /// Of the tcp fabric.
    data: IpAddr,
    /// The only device to be used, where one was named.
    device: Option<String>,
    /// For guests that arrive, once there is a device for them.
    listener: Mutex<Option<Arc<Listener>>>,
}

impl Verbs {
    /// An address that was asked for must be had. One that is looked for may come later.
    pub(super) fn open(config: &Config) -> Result<Self, CoreError> {
        let verbs = Self {
            listen: config.rdma_listen,
            data: config.data_listen.ip(),
            device: config.rdma_device.clone(),
            listener: Mutex::default(),
        };
        if let RdmaListen::At(address) = config.rdma_listen {
            let listener = Listener::bind(address, verbs.device.as_deref())
                .map_err(|source| CoreError::Listen { address: address.to_string(), source })?;
            *verbs.held() = Some(Arc::new(listener));
        }
        match verbs.listener() {
            Ok(listener) => {
                tracing::info!(address = %listener.local_addr(), device = listener.device(), "verbs listens");
            }
            Err(why) => tracing::info!(why, "guests cannot arrive over verbs"),
        }
        Ok(verbs)
    }

    /// The listener that is there, or another where its device came late or back.
    fn listener(&self) -> Result<Arc<Listener>, String> {
        let mut held = self.held();
        if let Some(listener) = held.as_ref().filter(|listener| listener.failure().is_none()) {
            return Ok(Arc::clone(listener));
        }
        *held = None;
        let device = self.device.as_deref();
        let address = match self.listen {
            RdmaListen::Off => return Err("rdma_listen is off".into()),
            RdmaListen::At(address) => address,
            RdmaListen::Auto => listen_address(self.data, device)?,
        };
        let listener = Listener::bind(address, device).map_err(|error| causes(&error))?;
        Ok(Arc::clone(held.insert(Arc::new(listener))))
    }

    fn held(&self) -> MutexGuard<'_, Option<Arc<Listener>>> {
        self.listener.lock().expect("no panic while it is held")
    }

    /// The device by which this host's guests may leave.
    pub(super) fn reaches_peers(&self) -> Result<String, String> {
        let active = active(self.device.as_deref())?;
        Ok(active.into_iter().map(|device| device.name).collect::<Vec<_>>().join(", "))
    }

    /// The device by which guests may arrive, while its port is active.
    pub(super) fn is_reached_by_peers(&self) -> Result<String, String> {
        let listener = self.listener()?;
        active(Some(listener.device()))?;
        Ok(listener.device().to_owned())
    }

    pub(super) fn describe(&self) -> Result<String, String> {
        self.is_reached_by_peers().map(|device| format!("{device} at {}", self.address()))
    }

    pub(super) fn address(&self) -> String {
        self.listener().map(|listener| listener.local_addr().to_string()).unwrap_or_default()
    }

    pub(super) fn admit(
        &self,
        token: SessionToken,
        memory: Arc<Memory>,
        links: u32,
    ) -> Result<Admitted, Failure> {
        let listener = self.listener().map_err(|why| Failure::new(Reason::LinkLost, why))?;
        let domain = listener.domain(memory).map_err(|error| lost(&error))?;
        let admission = listener.admit(token, Arc::clone(&domain), links);
        Ok(Admitted { domain, links: Box::new(move || admission.failure()) })
    }

    pub(super) fn connect(
        &self,
        address: SocketAddr,
        agreed: &Agreed,
        memory: &Arc<Memory>,
    ) -> Result<Connected, Failure> {
        let device = self.device.as_deref();
        let domain = ramferry_verbs::domain_towards(address, device, Arc::clone(memory), CONNECT_TIMEOUT)
            .map_err(|error| lost(&error))?;
        let connect =
            || ramferry_verbs::connect(address, &agreed.token, Arc::clone(&domain), CONNECT_TIMEOUT);
        let links = open_links(agreed.streams, connect)?;
        let links_bytes = links.len() as u64 * ramferry_verbs::MESSAGES_BYTES;
        Ok(Connected { links, domain, links_bytes })
    }
}

/// The ports of this host's devices, or why they cannot be asked.
pub(crate) fn port_mtus() -> Result<Vec<PortMtu>, String> {
    let devices = ramferry_verbs::devices().map_err(|error| causes(&error))?;
    let mtu = |info: DeviceInfo| PortMtu {
        device: info.name,
        port: info.port,
        mtu_bytes: info.mtu_bytes,
        max_mtu_bytes: info.max_mtu_bytes,
    };
    Ok(devices.into_iter().map(mtu).collect())
}

/// Where guests would arrive by a configuration, or why they could not; nothing is listened at.
pub(crate) fn rdma_listen_address(config: &Config) -> Result<SocketAddr, String> {
    let device = config.rdma_device.as_deref();
    match config.rdma_listen {
        RdmaListen::Off => Err("rdma_listen is off".into()),
        RdmaListen::Auto => listen_address(config.data_listen.ip(), device),
        RdmaListen::At(address) => listen_address_at(address, device),
    }
}

fn listen_address_at(address: SocketAddr, device: Option<&str>) -> Result<SocketAddr, String> {
    let active = active(device)?;
    let has = |info: &DeviceInfo| address.ip().is_unspecified() || info.addresses.contains(&address.ip());
    if active.iter().any(has) {
        return Ok(address);
    }
    let names: Vec<_> = active.iter().map(|info| info.name.as_str()).collect();
    Err(format!("{} is no address of {}", address.ip(), names.join(", ")))
}

/// The devices with an active port; of the one that is named, if one is.
fn active(device: Option<&str>) -> Result<Vec<DeviceInfo>, String> {
    let all = ramferry_verbs::devices().map_err(|error| causes(&error))?;
    if all.is_empty() {
        return Err("there is no RDMA device".into());
    }
    let named: Vec<_> =
        all.into_iter().filter(|info| device.is_none_or(|device| device == info.name)).collect();
    if named.is_empty() {
        return Err(format!("there is no RDMA device {}", device.unwrap_or_default()));
    }
    let names: Vec<_> = named.iter().map(|info| info.name.clone()).collect();
    let active: Vec<_> = named.into_iter().filter(|info| info.active).collect();
    if active.is_empty() {
        return Err(format!("no port of {} is active: is its link up?", names.join(", ")));
    }
    Ok(active)
}

/// Where to listen when no address was given: the data address, where that is a
/// device's; any device's, where the data address is any.
fn listen_address(data: IpAddr, device: Option<&str>) -> Result<SocketAddr, String> {
    let active = active(device)?;
    let mut addresses = active.iter().flat_map(|info| info.addresses.iter().copied());
    let found = if data.is_unspecified() {
        addresses.next()
    } else if data.is_loopback() {
        return Err(
            "data_listen is a loopback address: set rdma_listen to the address of an RDMA device".into()
        );
    } else {
        addresses.find(|address| *address == data)
    };
    let names: Vec<_> = active.iter().map(|info| info.name.clone()).collect();
    let names = names.join(", ");
    match found {
        Some(address) => Ok(SocketAddr::new(address, 0)),
        None if data.is_unspecified() => {
            Err(format!("{names} has no IP address: give its interface one, or set rdma_listen"))
        }
        None => Err(format!("{data} is no address of {names}: set rdma_listen to one that is")),
    }
}
