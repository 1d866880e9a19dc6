//! A peer that accepts a link and then takes no part in it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramferry_fabric::{LinkError, hello};
use ramferry_ram::Memory;

use crate::cm::{EventChannel, EventKind, Identifier};
use crate::device::Device;
use crate::domain::VerbsDomain;
use crate::queue_pair::QueuePair;
use crate::served::SERVED_DEPTHS;

/// How long a link may take to come.
const LIMIT: Duration = Duration::from_secs(20);

/// Listens for one link.
pub struct SilentPeer {
    // The identifier is dropped before its channel's last owner, whichever that is.
    listening: Identifier,
    channel: Arc<EventChannel>,
    local_addr: SocketAddr,
    domain: Arc<VerbsDomain>,
}

/// The link that came. No message of it is received: what it sends waits for that.
pub struct SilentLink {
    _queue_pair: QueuePair,
    _domain: Arc<VerbsDomain>,
}

impl SilentPeer {
    /// Listens at an address of an RDMA interface.
    ///
    /// # Errors
    /// As a listener's.
    pub fn bind(addr: SocketAddr, memory: Arc<Memory>) -> Result<Self, LinkError> {
        let system = |what| move |source| LinkError::System { what, source };
        let channel = EventChannel::new()?;
        let listening = Identifier::new(&channel).map_err(system("make an identifier"))?;
        listening.bind(addr).map_err(system("bind"))?;
        let domain = VerbsDomain::new(Device::of(&listening, addr.ip())?, addr.ip(), memory)?;
        listening.listen(1).map_err(system("listen"))?;
        let local_addr = listening.local_addr().ok_or(LinkError::NoDevice)?;
        Ok(Self { listening, channel, local_addr, domain })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Accepts the link, with a welcome.
    ///
    /// # Errors
    /// When none comes.
    pub fn accept(self) -> Result<SilentLink, LinkError> {
        let system = |what| move |source| LinkError::System { what, source };
        let deadline = Instant::now() + LIMIT;
        let timed_out = || LinkError::TimedOut { what: "a link", after: LIMIT };
        let request = loop {
            let event = self.channel.wait(deadline).map_err(LinkError::Lost)?.ok_or_else(timed_out)?;
            if let Some(request) = event.request {
                break request;
            }
        };
        let queue_pair = QueuePair::new(request, self.domain.protection(), SERVED_DEPTHS)?;
        let welcome = hello::encode_reply(hello::Verdict::Welcome);
        queue_pair.identifier().accept_patiently(&welcome).map_err(system("accept"))?;
        loop {
            let event = self.channel.wait(deadline).map_err(LinkError::Lost)?.ok_or_else(timed_out)?;
            if event.kind == EventKind::Established {
                break;
            }
        }
        drop(self.listening);
        Ok(SilentLink { _queue_pair: queue_pair, _domain: self.domain })
    }
}
