//! The fabrics of this agent: where they listen, which of them a session uses,
//! and both ends of a session's links.

use std::net::SocketAddr;
use std::sync::Arc;

use ramferry_engine::{Failure, Reason};
use ramferry_fabric::{Domain, FabricKind, Link, LinkError, MappedDomain, SessionToken, shm, tcp};
use ramferry_proto::v1;
use ramferry_ram::{Memory, RamError};
use tonic::Status;

use crate::config::Config;
use crate::core::{CoreError, EXCHANGE_TIMEOUT};
use crate::request::{fabric, fabric_on_the_wire};
use crate::sockets;
use crate::status::{causes, precondition};

#[cfg(feature = "verbs")]
mod verbs;
#[cfg(not(feature = "verbs"))]
#[path = "fabrics/without_verbs.rs"]
mod verbs;

use self::verbs::Verbs;
pub(crate) use self::verbs::{HAS_VERBS, port_mtus, rdma_listen_address};

/// Longest reason of a peer's that is passed on.
const REASON_BYTES: usize = 512;

/// The listeners of one agent, open as long as it runs.
#[derive(Debug)]
pub(crate) struct Fabrics {
    tcp: tcp::Listener,
    shm: shm::Listener,
    verbs: Verbs,
}

/// A session's end at the destination: the links of its source are served while `links` lives.
pub(crate) struct Admitted {
    pub(crate) domain: Arc<dyn Domain>,
    /// What broke a link, if something has.
    pub(crate) links: Box<dyn FnMut() -> Option<LinkError> + Send>,
}

/// A session's end at the source.
pub(crate) struct Connected {
    pub(crate) domain: Arc<dyn Domain>,
    pub(crate) links: Vec<Box<dyn Link>>,
    /// What the links register for themselves.
    pub(crate) links_bytes: u64,
}

/// How long packets of an RDMA port are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortMtu {
    pub(crate) device: String,
    pub(crate) port: u8,
    pub(crate) mtu_bytes: u32,
    pub(crate) max_mtu_bytes: u32,
}

/// What source and destination agreed on.
#[derive(Clone)]
pub(crate) struct Agreed {
    pub(crate) token: SessionToken,
    pub(crate) fabric: FabricKind,
    pub(crate) fabric_reason: String,
    pub(crate) address: String,
    pub(crate) streams: u32,
}

impl Fabrics {
    /// Opens the listeners.
    pub(crate) fn open(config: &Config) -> Result<Self, CoreError> {
        let listen = |address: String| move |source| CoreError::Listen { address, source };
        let path = config.run_dir.join(sockets::shm_name(std::process::id()));
        Ok(Self {
            shm: shm::Listener::bind(&path).map_err(listen(path.display().to_string()))?,
            tcp: tcp::Listener::bind(config.data_listen).map_err(listen(config.data_listen.to_string()))?,
            verbs: Verbs::open(config)?,
        })
    }

    /// What a source offers, and why verbs is not among it; empty where it is.
    pub(crate) fn offer(&self) -> (Vec<FabricKind>, String) {
        match self.verbs.reaches_peers() {
            Ok(_) => (vec![FabricKind::Shm, FabricKind::Verbs, FabricKind::Tcp], String::new()),
            Err(why) => (vec![FabricKind::Shm, FabricKind::Tcp], why),
        }
    }

    /// The fabric of a session whose destination is here, and why.
    pub(crate) fn choose(
        &self,
        request: &v1::NegotiateSessionRequest,
        same_host: bool,
    ) -> Result<(FabricKind, String), Status> {
        let asked = fabric(request.fabric)?;
        let verbs = match asked {
            None if same_host => Err("it was not looked for".into()),
            None | Some(FabricKind::Verbs) => self.verbs.is_reached_by_peers(),
            Some(_) => Err("it was not asked for".into()),
        };
        choose(asked, request, same_host, verbs)
    }

    /// Where this destination's end of a fabric is.
    pub(crate) fn address(&self, kind: FabricKind) -> String {
        match kind {
            FabricKind::Shm => self.shm.path().display().to_string(),
            FabricKind::Tcp => self.tcp.local_addr().to_string(),
            FabricKind::Verbs => self.verbs.address(),
        }
    }

    /// Where guests arrive over verbs, or why they cannot.
    pub(crate) fn verbs_address(&self) -> Result<String, String> {
        self.verbs.is_reached_by_peers().map(|_| self.verbs.address())
    }

    /// Opens a destination's end of a session.
    pub(crate) fn admit(
        &self,
        kind: FabricKind,
        token: SessionToken,
        memory: &Arc<Memory>,
        links: u32,
    ) -> Result<Admitted, Failure> {
        let memory = Arc::clone(memory);
        match kind {
            FabricKind::Verbs => self.verbs.admit(token, memory, links),
            FabricKind::Shm => {
                let domain =
                    Arc::new(MappedDomain::reached_by_peer(memory).map_err(|error| ram_failure(&error))?);
                let admission = self.shm.admit(token, Arc::clone(&domain), links);
                Ok(Admitted { domain, links: Box::new(move || admission.failure()) })
            }
            FabricKind::Tcp => {
                let domain = Arc::new(MappedDomain::new(memory).map_err(|error| ram_failure(&error))?);
                let admission = self.tcp.admit(token, Arc::clone(&domain), links);
                Ok(Admitted { domain, links: Box::new(move || admission.failure()) })
            }
        }
    }

    /// Opens a source's end of a session with the destination's `agent`.
    pub(crate) fn connect(
        &self,
        agreed: &Agreed,
        memory: &Arc<Memory>,
        agent: &str,
    ) -> Result<Connected, Failure> {
        let address = || data_address(&agreed.address, agent).map_err(|error| lost(&error));
        let memory = Arc::clone(memory);
        match agreed.fabric {
            FabricKind::Verbs => self.verbs.connect(address()?, agreed, &memory),
            FabricKind::Shm => {
                let domain = Arc::new(MappedDomain::new(memory).map_err(|error| ram_failure(&error))?);
                let path = agreed.address.as_ref();
                let connect = || shm::connect(path, &agreed.token, Arc::clone(&domain), EXCHANGE_TIMEOUT);
                let links = open_links(agreed.streams, connect)?;
                Ok(Connected { links, domain, links_bytes: 0 })
            }
            FabricKind::Tcp => {
                let domain = Arc::new(MappedDomain::new(memory).map_err(|error| ram_failure(&error))?);
                let address = address()?;
                let connect = || tcp::connect(address, &agreed.token, Arc::clone(&domain), EXCHANGE_TIMEOUT);
                let links = open_links(agreed.streams, connect)?;
                Ok(Connected { links, domain, links_bytes: 0 })
            }
        }
    }

    /// What this host can use.
    pub(crate) fn info(&self) -> Vec<v1::FabricInfo> {
        let info = |kind: v1::FabricKind, available: Result<String, String>| v1::FabricInfo {
            kind: kind.into(),
            available: available.is_ok(),
            detail: available.unwrap_or_else(|why| why),
        };
        vec![
            info(v1::FabricKind::Verbs, self.verbs.describe()),
            info(v1::FabricKind::Shm, Ok(format!("unix socket {}", self.shm.path().display()))),
            info(v1::FabricKind::Tcp, Ok(self.tcp.local_addr().to_string())),
        ]
    }
}

/// `verbs` is the device at this side, or why there is none.
fn choose(
    asked: Option<FabricKind>,
    request: &v1::NegotiateSessionRequest,
    same_host: bool,
    verbs: Result<String, String>,
) -> Result<(FabricKind, String), Status> {
    let offers = |kind: FabricKind| request.fabrics.contains(&i32::from(fabric_on_the_wire(kind)));
    let unavailable = |message: String| Err(precondition("FABRIC_UNAVAILABLE", message, [], []));
    let verbs = match verbs {
        Err(why) => Err(format!("at the destination {why}")),
        Ok(_) if !offers(FabricKind::Verbs) => Err(match &*request.verbs_unavailable {
            "" => "the source's agent does not offer it".to_owned(),
            why => format!("at the source {}", &why[..why.floor_char_boundary(REASON_BYTES)]),
        }),
        Ok(device) => Ok(device),
    };
    match asked {
        Some(FabricKind::Verbs) => match verbs {
            Ok(device) => Ok((FabricKind::Verbs, format!("asked for; the destination's device is {device}"))),
            Err(why) => unavailable(format!(
                "fabric verbs was asked for, and cannot be used: {why}; mend that, or ask for tcp or auto"
            )),
        },
        Some(FabricKind::Shm) if !same_host => unavailable(
            "fabric shm was asked for, and the agents are on different hosts; ask for verbs, tcp or auto"
                .into(),
        ),
        Some(kind) if !offers(kind) => {
            unavailable("the source's agent does not have the fabric that was asked for; ask for auto".into())
        }
        Some(kind) => Ok((kind, "asked for".into())),
        None if same_host && offers(FabricKind::Shm) => {
            Ok((FabricKind::Shm, "both agents are on one host".into()))
        }
        None => match verbs {
            Ok(device) => {
                let reason = format!("both hosts have an active RDMA device; the destination's is {device}");
                Ok((FabricKind::Verbs, reason))
            }
            Err(why) if offers(FabricKind::Tcp) => {
                Ok((FabricKind::Tcp, format!("verbs cannot be used: {why}")))
            }
            Err(_) => {
                unavailable("source and destination have no fabric in common; upgrade the older agent".into())
            }
        },
    }
}

fn open_links(
    count: u32,
    connect: impl Fn() -> Result<Box<dyn Link>, LinkError>,
) -> Result<Vec<Box<dyn Link>>, Failure> {
    (0..count).map(|_| connect().map_err(|error| lost(&error))).collect()
}

fn lost(error: &dyn std::error::Error) -> Failure {
    Failure::new(Reason::LinkLost, causes(error))
}

fn ram_failure(error: &RamError) -> Failure {
    Failure::new(Reason::GuestFailed, causes(error))
}

/// Where the destination's data port is: an unspecified address is its agent's.
fn data_address(address: &str, agent: &str) -> std::io::Result<SocketAddr> {
    use std::net::ToSocketAddrs as _;
    let invalid = |what: String| std::io::Error::new(std::io::ErrorKind::InvalidInput, what);
    let mut parsed: SocketAddr = address
        .parse()
        .map_err(|_| invalid(format!("the destination's data address {address:?} is not one")))?;
    if parsed.ip().is_unspecified() {
        let resolved = agent.to_socket_addrs()?.next();
        parsed.set_ip(resolved.ok_or_else(|| invalid(format!("{agent:?} has no address")))?.ip());
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [FabricKind; 3] = [FabricKind::Shm, FabricKind::Verbs, FabricKind::Tcp];

    fn request(offered: &[FabricKind], verbs_unavailable: &str) -> v1::NegotiateSessionRequest {
        v1::NegotiateSessionRequest {
            fabrics: offered.iter().map(|kind| fabric_on_the_wire(*kind).into()).collect(),
            verbs_unavailable: verbs_unavailable.into(),
            ..Default::default()
        }
    }

    fn device() -> Result<String, String> {
        Ok("rxe0".into())
    }

    fn none() -> Result<String, String> {
        Err("there is no RDMA device".into())
    }

    #[test]
    fn agents_of_one_host_use_shm() {
        let (kind, _) = choose(None, &request(&ALL, ""), true, device()).unwrap();
        assert_eq!(kind, FabricKind::Shm);
    }

    #[test]
    fn hosts_that_both_have_a_device_use_verbs_and_name_it() {
        let (kind, reason) = choose(None, &request(&ALL, ""), false, device()).unwrap();
        assert_eq!(kind, FabricKind::Verbs);
        assert!(reason.contains("rxe0"), "{reason}");
    }

    #[test]
    fn tcp_is_chosen_with_the_reason_why_verbs_is_not() {
        let without = [FabricKind::Shm, FabricKind::Tcp];
        let (kind, reason) = choose(None, &request(&ALL, ""), false, none()).unwrap();
        assert_eq!(kind, FabricKind::Tcp);
        assert!(reason.contains("at the destination there is no RDMA device"), "{reason}");
        let at_source = request(&without, "no port is active");
        let (kind, reason) = choose(None, &at_source, false, device()).unwrap();
        assert_eq!(kind, FabricKind::Tcp);
        assert!(reason.contains("at the source no port is active"), "{reason}");
    }

    #[test]
    fn verbs_that_was_asked_for_and_cannot_be_used_is_refused_with_the_reason() {
        let refused = choose(Some(FabricKind::Verbs), &request(&ALL, ""), false, none()).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains("there is no RDMA device"), "{}", refused.message());
        let older = request(&[FabricKind::Shm, FabricKind::Tcp], "");
        let refused = choose(Some(FabricKind::Verbs), &older, false, device()).unwrap_err();
        assert!(refused.message().contains("does not offer it"), "{}", refused.message());
        let chosen = choose(Some(FabricKind::Verbs), &request(&ALL, ""), true, device()).unwrap();
        assert_eq!(chosen.0, FabricKind::Verbs);
    }
}
