//! The side that connects: finding the device that leads to the peer, and the link.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramferry_fabric::{FabricKind, HardwareFault, Link, LinkError, MAX_TRANSFER_BYTES, SessionToken, hello};
use ramferry_ram::Memory;
use rustix::io::Errno;

use crate::cm::{Event, EventChannel, EventKind, Identifier};
use crate::device::{Device, Signal};
use crate::domain::VerbsDomain;
use crate::info;
use crate::link::{LINK_DEPTHS, VerbsLink};
use crate::queue_pair::QueuePair;

/// How long the kernel may take at first to find the way to a peer.
const FIRST_PATIENCE: Duration = Duration::from_millis(200);
/// `IB_CM_REJ_INVALID_SERVICE_ID` of `rdma/ib_cm.h`: nobody listens there.
const REJECTED_NO_LISTENER: i32 = 8;

/// Registered memory of the side that connects to `addr`. The device, its port and
/// its address are those that the way to the peer leads through; `device` forces one.
///
/// # Errors
/// When no device leads there, or not this one, within `timeout`.
pub fn domain_towards(
    addr: SocketAddr,
    device: Option<&str>,
    memory: Arc<Memory>,
    timeout: Duration,
) -> Result<Arc<VerbsDomain>, LinkError> {
    let deadline = Instant::now() + timeout;
    let Some(asked) = device else {
        let identifier = resolve(addr, None, deadline, timeout)?;
        return domain(&identifier, addr, memory);
    };
    let mut last = None;
    for from in info::addresses_of(asked).into_iter().filter(|from| from.is_ipv4() == addr.is_ipv4()) {
        match resolve(addr, Some(from), deadline, timeout).and_then(|identifier| {
            check_device(&identifier, asked, addr)?;
            domain(&identifier, addr, Arc::clone(&memory))
        }) {
            Ok(domain) => return Ok(domain),
            Err(error) => last = Some(error),
        }
    }
    if let Some(error) = last {
        return Err(error);
    }
    // The device has no address of that kind: the way leads elsewhere, or nowhere.
    let identifier = resolve(addr, None, deadline, timeout)?;
    check_device(&identifier, asked, addr)?;
    domain(&identifier, addr, memory)
}

/// Connects to the listener of a peer that admitted `token`. Local places of
/// operations are in `domain`.
///
/// # Errors
/// When the peer cannot be reached or refuses within `timeout`.
pub fn connect(
    addr: SocketAddr,
    token: &SessionToken,
    domain: Arc<VerbsDomain>,
    timeout: Duration,
) -> Result<Box<dyn Link>, LinkError> {
    let deadline = Instant::now() + timeout;
    let system = |what| move |source| LinkError::System { what, source };
    let identifier = resolve(addr, Some(domain.address()), deadline, timeout)?;
    if !domain.device().context().is_of(&identifier) {
        check_device(&identifier, domain.device_name(), addr)?;
    }
    let port = identifier.port();
    let state = domain.device().context().port(port).map_err(system("ask for the state of an RDMA port"))?;
    let mut queue_pair = QueuePair::new(identifier, domain.protection(), LINK_DEPTHS)?;
    let slots = VerbsLink::slots(&domain).map_err(system("register memory for messages"))?;
    VerbsLink::prepare(&mut queue_pair, &slots).map_err(system("post to a queue pair"))?;
    let signal = Signal::new()?;
    domain.device().subscribe(queue_pair.number(), port, &signal);
    greet(queue_pair.identifier(), addr, token, deadline, timeout)?;
    // A port that says nothing of it takes any.
    let max_request_bytes =
        if state.max_message_bytes == 0 { MAX_TRANSFER_BYTES } else { state.max_message_bytes };
    Ok(Box::new(VerbsLink::new(queue_pair, slots, domain, signal, max_request_bytes)))
}

/// An identifier bound to the device that leads to `to`, the route known.
///
/// The kernel is asked for a little time at first, then for more: where the answer of the peer's
/// host to ARP comes before the kernel's resolver listens for it, that looks again only when its
/// time is over, and has it then.
fn resolve(
    to: SocketAddr,
    from: Option<IpAddr>,
    deadline: Instant,
    timeout: Duration,
) -> Result<Identifier, LinkError> {
    let mut patience = FIRST_PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match resolve_once(to, from, patience.min(left), deadline, timeout) {
            Err(LinkError::Connect { source: Errno::TIMEDOUT, .. }) if patience < left => patience *= 2,
            Err(error) => return Err(port_down(from).unwrap_or(error)),
            resolved => return resolved,
        }
    }
}

/// The device that leads nowhere for want of a port: of `from`, or any where all are down.
fn port_down(from: Option<IpAddr>) -> Option<LinkError> {
    let devices = info::devices().ok()?;
    let mut own = devices.iter().filter(|info| from.is_none_or(|from| info.addresses.contains(&from)));
    let device = own.clone().next()?.name.clone();
    own.all(|info| !info.active).then_some(LinkError::Hardware { device, fault: HardwareFault::PortDown })
}

fn resolve_once(
    to: SocketAddr,
    from: Option<IpAddr>,
    patience: Duration,
    deadline: Instant,
    timeout: Duration,
) -> Result<Identifier, LinkError> {
    let channel = EventChannel::new()?;
    let identifier = Identifier::new(&channel).map_err(|source| LinkError::System {
        what: "make an identifier of the connection manager",
        source,
    })?;
    let failed = |errno| unreachable(errno, to);
    identifier.resolve_address(from, to, patience).map_err(failed)?;
    let event = next_event(&channel, deadline, "finding the way to the peer", timeout)?;
    if event.kind != EventKind::AddressResolved {
        return Err(failed(status_errno(event.status, Errno::HOSTUNREACH)));
    }
    if identifier.context().is_none() {
        return Err(LinkError::NotReached { address: to.to_string() });
    }
    identifier.limit_ack_timeout();
    identifier.resolve_route(deadline.saturating_duration_since(Instant::now())).map_err(failed)?;
    let event = next_event(&channel, deadline, "finding the way to the peer", timeout)?;
    match event.kind {
        EventKind::RouteResolved => Ok(identifier),
        _ => Err(failed(status_errno(event.status, Errno::NETUNREACH))),
    }
}

fn domain(
    identifier: &Identifier,
    to: SocketAddr,
    memory: Arc<Memory>,
) -> Result<Arc<VerbsDomain>, LinkError> {
    let local = identifier.local_addr().ok_or_else(|| LinkError::NotReached { address: to.to_string() })?;
    VerbsDomain::new(Device::of(identifier, local.ip())?, local.ip(), memory)
}

/// Whether the way leads through the device that was asked for.
fn check_device(identifier: &Identifier, asked: &str, to: SocketAddr) -> Result<(), LinkError> {
    let not_reached = || LinkError::NotReached { address: to.to_string() };
    let local = identifier.local_addr().ok_or_else(not_reached)?;
    let found = Device::of(identifier, local.ip())?;
    if found.name() == asked {
        return Ok(());
    }
    let (asked, address, found) = (asked.to_owned(), to.to_string(), found.name().to_owned());
    Err(LinkError::OtherDevice { asked, address, found })
}

/// Presents the token and hears the verdict.
fn greet(
    identifier: &Identifier,
    addr: SocketAddr,
    token: &SessionToken,
    deadline: Instant,
    timeout: Duration,
) -> Result<(), LinkError> {
    let refused = |source| LinkError::Connect { address: addr.to_string(), source };
    identifier.connect(&hello::encode_hello(FabricKind::Verbs, token)).map_err(refused)?;
    let event = next_event(identifier.channel(), deadline, "the connection to the peer", timeout)?;
    match event.kind {
        EventKind::Established => judge(&event),
        EventKind::Rejected if event.status == REJECTED_NO_LISTENER => Err(refused(Errno::CONNREFUSED)),
        EventKind::Rejected => match judge(&event) {
            // Rejected without a word: by the kernel, or by something else that listens there.
            Ok(()) | Err(LinkError::PeerProtocol(_)) => Err(refused(Errno::CONNREFUSED)),
            Err(verdict) => Err(verdict),
        },
        EventKind::Unreachable => Err(refused(Errno::HOSTUNREACH)),
        _ => Err(refused(status_errno(event.status, Errno::CONNRESET))),
    }
}

/// The verdict in what an answer carries, which some fabrics fill up with zeros.
fn judge(event: &Event) -> Result<(), LinkError> {
    match event.private_data.first_chunk() {
        Some(reply) => hello::judge_reply(reply),
        None => Err(LinkError::PeerProtocol("what listens there is not a ramferry agent")),
    }
}

fn next_event(
    channel: &Arc<EventChannel>,
    deadline: Instant,
    what: &'static str,
    timeout: Duration,
) -> Result<Event, LinkError> {
    match channel.wait(deadline) {
        Ok(Some(event)) => Ok(event),
        Ok(None) => Err(LinkError::TimedOut { what, after: timeout }),
        Err(source) => Err(LinkError::System { what: "hear from the RDMA connection manager", source }),
    }
}

/// Why an address cannot be reached.
fn unreachable(errno: Errno, to: SocketAddr) -> LinkError {
    match errno {
        Errno::NODEV => LinkError::NotReached { address: to.to_string() },
        source => LinkError::Connect { address: to.to_string(), source },
    }
}

/// Events carry a negative errno, where they carry one.
fn status_errno(status: i32, otherwise: Errno) -> Errno {
    match status {
        status if (-4095..0).contains(&status) => Errno::from_raw_os_error(-status),
        _ => otherwise,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(verdict: hello::Verdict, padding: usize) -> Event {
        let mut private_data = hello::encode_reply(verdict).to_vec();
        private_data.extend(vec![0; padding]);
        Event { kind: EventKind::Rejected, status: 28, private_data, request: None }
    }

    #[test]
    fn a_verdict_is_understood_with_and_without_padding() {
        for padding in [0, 132] {
            assert_eq!(judge(&answer(hello::Verdict::Welcome, padding)), Ok(()));
            let unknown = judge(&answer(hello::Verdict::UnknownSession, padding));
            assert_eq!(unknown, Err(LinkError::UnknownSession));
            assert_eq!(judge(&answer(hello::Verdict::TooManyLinks, padding)), Err(LinkError::TooManyLinks));
        }
        let silent = Event { private_data: vec![0; 148], ..answer(hello::Verdict::Welcome, 0) };
        assert!(matches!(judge(&silent), Err(LinkError::PeerProtocol(_))));
        let short = Event { private_data: vec![0; 3], ..silent };
        assert!(matches!(judge(&short), Err(LinkError::PeerProtocol(_))));
    }

    #[test]
    fn statuses_that_are_no_errno_say_nothing() {
        assert_eq!(status_errno(-110, Errno::IO), Errno::TIMEDOUT);
        for status in [0, 28, i32::MIN, i32::MAX] {
            assert_eq!(status_errno(status, Errno::CONNRESET), Errno::CONNRESET);
        }
    }

    #[test]
    fn a_host_without_devices_says_so() {
        let Err(error) = EventChannel::new().map(drop) else { return };
        assert_eq!(error, LinkError::NoDevice);
        assert!(error.to_string().contains("rdma link"), "{error}");
    }
}
