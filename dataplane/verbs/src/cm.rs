//! Connection identifiers of librdmacm, and the channels that tell what becomes
//! of them.
#![allow(unsafe_code, reason = "owns identifiers and event channels of librdmacm")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramferry_fabric::LinkError;
use rdma_sys::{rdma_cm_event_type as cm, rdma_cm_id, rdma_conn_param, rdma_event_channel, rdma_port_space};
use rustix::io::Errno;

use crate::os::{self, last_errno};

/// Times that an unacknowledged packet is sent again. Of 7, the most there are, soft-RoCE makes
/// times without end (`rxe_comp.c`).
const RETRIES: u8 = 6;
/// Times that a message is sent again to a peer that was not ready, some 0.7 s
/// apart. With the credits that both sides keep it is not needed at all.
const NOT_READY_RETRIES: u8 = 3;
/// As many reads under way as the devices allow (`RDMA_MAX_RESP_RES`,
/// `RDMA_MAX_INIT_DEPTH` of `rdma/rdma_cma.h`).
const MAX_READS: u8 = 0xff;
/// How long a packet may go unacknowledged: 4.096 us * 2^17 = 0.54 s, to which the kernel adds the
/// devices' own delay. Sent 7 times in all, a path that is gone is found within 4 to 8 s (soft-RoCE:
/// 6.4 s), and soft-RoCE on a host without a processor to spare is not taken for gone. Without
/// it the kernel makes a packet's lifetime up for RoCE, and takes up to four times as long.
const ACK_TIMEOUT_EXPONENT: u8 = 17;
/// `RDMA_OPTION_ID` and `RDMA_OPTION_ID_ACK_TIMEOUT` of `rdma/rdma_cma.h`.
const OPTION_ID: i32 = 0;
const OPTION_ID_ACK_TIMEOUT: i32 = 3;
/// Private data that any event carries, at most.
const MAX_PRIVATE_DATA: usize = 255;

/// Where events of identifiers are told. Non-blocking.
#[derive(Debug)]
pub(crate) struct EventChannel {
    raw: NonNull<rdma_event_channel>,
}

// SAFETY: librdmacm keeps nothing of a thread in a channel; its descriptor may be used, and the
// channel destroyed, by any.
unsafe impl Send for EventChannel {}
// SAFETY: every use of a shared channel is a system call on its descriptor, which does not change.
unsafe impl Sync for EventChannel {}

/// What became of an identifier.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) kind: EventKind,
    /// What it says beside: a negative errno, or the fabric's own reason.
    pub(crate) status: i32,
    pub(crate) private_data: Vec<u8>,
    /// The connection that a peer asks for.
    pub(crate) request: Option<Identifier>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventKind {
    AddressResolved,
    RouteResolved,
    /// An address or a route was not found, or a connection failed.
    Failed,
    Unreachable,
    Rejected,
    ConnectRequest,
    Established,
    Disconnected,
    DeviceRemoval,
    Other(u32),
}

impl EventKind {
    fn from_raw(raw: cm::Type) -> Self {
        match raw {
            cm::RDMA_CM_EVENT_ADDR_RESOLVED => EventKind::AddressResolved,
            cm::RDMA_CM_EVENT_ROUTE_RESOLVED => EventKind::RouteResolved,
            cm::RDMA_CM_EVENT_ADDR_ERROR
            | cm::RDMA_CM_EVENT_ROUTE_ERROR
            | cm::RDMA_CM_EVENT_CONNECT_ERROR => EventKind::Failed,
            cm::RDMA_CM_EVENT_UNREACHABLE => EventKind::Unreachable,
            cm::RDMA_CM_EVENT_REJECTED => EventKind::Rejected,
            cm::RDMA_CM_EVENT_CONNECT_REQUEST => EventKind::ConnectRequest,
            cm::RDMA_CM_EVENT_ESTABLISHED => EventKind::Established,
            cm::RDMA_CM_EVENT_DISCONNECTED => EventKind::Disconnected,
            cm::RDMA_CM_EVENT_DEVICE_REMOVAL => EventKind::DeviceRemoval,
            other => EventKind::Other(other),
        }
    }

    /// Whether it tells that the peer ended a connection that was established here. A peer that ends while
    /// the confirmation of this side is still on its way takes its acceptance back, which is a rejection;
    /// librdmacm then fails the queue pair, before it tells.
    pub(crate) fn is_end_by_peer(self) -> bool {
        matches!(self, EventKind::Disconnected | EventKind::Rejected)
    }
}

impl EventChannel {
    /// # Errors
    /// [`LinkError::NoDevice`] where this host has none, or no connection manager.
    pub(crate) fn new() -> Result<Arc<Self>, LinkError> {
        // SAFETY: takes nothing; the result is checked.
        let raw = NonNull::new(unsafe { rdma_sys::rdma_create_event_channel() });
        let Some(raw) = raw else {
            return Err(match last_errno() {
                Errno::NODEV | Errno::NOENT | Errno::NXIO | Errno::NOSYS | Errno::PERM => LinkError::NoDevice,
                source => LinkError::System {
                    what: "open the RDMA connection manager (/dev/infiniband/rdma_cm)",
                    source,
                },
            });
        };
        let channel = Self { raw };
        os::set_nonblocking(channel.fd()).map_err(|source| LinkError::System {
            what: "set a descriptor of the connection manager",
            source,
        })?;
        Ok(Arc::new(channel))
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is alive, and its descriptor open until it is destroyed on drop.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).fd) }
    }

    /// The next event, if there is one.
    pub(crate) fn next(self: &Arc<Self>) -> Result<Option<Event>, Errno> {
        let mut raw = ptr::null_mut();
        // SAFETY: the channel is alive, and `raw` a place for a pointer.
        if unsafe { rdma_sys::rdma_get_cm_event(self.raw.as_ptr(), &mut raw) } != 0 {
            return match last_errno() {
                Errno::AGAIN | Errno::INTR => Ok(None),
                errno => Err(errno),
            };
        }
        // SAFETY: the call gave an event, which is ours until it is acknowledged below. Its
        // `param.conn` is what librdmacm fills for connected identifiers, the only ones made
        // here, and zero where it fills nothing.
        let event = unsafe {
            let event = &*raw;
            let kind = EventKind::from_raw(event.event);
            let conn = &event.param.conn;
            let length = usize::from(conn.private_data_len).min(MAX_PRIVATE_DATA);
            let private_data = match conn.private_data.is_null() {
                true => Vec::new(),
                false => std::slice::from_raw_parts(conn.private_data.cast::<u8>(), length).to_vec(),
            };
            let request = match kind {
                EventKind::ConnectRequest => NonNull::new(event.id),
                _ => None,
            };
            let request = request.map(|raw| Identifier { raw, channel: Arc::clone(self) });
            Event { kind, status: event.status, private_data, request }
        };
        // SAFETY: the event came from `rdma_get_cm_event`, and is acknowledged once.
        unsafe { rdma_sys::rdma_ack_cm_event(raw) };
        Ok(Some(event))
    }

    /// Waits for an event until `deadline`.
    pub(crate) fn wait(self: &Arc<Self>, deadline: Instant) -> Result<Option<Event>, Errno> {
        loop {
            if let Some(event) = self.next()? {
                return Ok(Some(event));
            }
            if !os::wait_readable(&[self.fd()], deadline.saturating_duration_since(Instant::now()))? {
                return Ok(None);
            }
        }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; every identifier on it holds the channel's `Arc`.
        unsafe { rdma_sys::rdma_destroy_event_channel(self.raw.as_ptr()) };
    }
}

/// One connection, or a listener, or an address bound to a device.
#[derive(Debug)]
pub(crate) struct Identifier {
    raw: NonNull<rdma_cm_id>,
    channel: Arc<EventChannel>,
}

// SAFETY: librdmacm keeps nothing of a thread in an identifier; its owner alone uses it.
unsafe impl Send for Identifier {}
// SAFETY: a shared identifier gives addresses and pointers that do not change once it is bound,
// and disconnects, which is one system call.
unsafe impl Sync for Identifier {}

impl Identifier {
    pub(crate) fn new(channel: &Arc<EventChannel>) -> Result<Self, Errno> {
        let mut raw = ptr::null_mut();
        // SAFETY: the channel is alive, and `raw` a place for a pointer.
        check(unsafe {
            rdma_sys::rdma_create_id(
                channel.raw.as_ptr(),
                &mut raw,
                ptr::null_mut(),
                rdma_port_space::RDMA_PS_TCP,
            )
        })?;
        let raw = NonNull::new(raw).ok_or(Errno::NOMEM)?;
        Ok(Self { raw, channel: Arc::clone(channel) })
    }

    pub(crate) fn raw(&self) -> *mut rdma_cm_id {
        self.raw.as_ptr()
    }

    pub(crate) fn channel(&self) -> &Arc<EventChannel> {
        &self.channel
    }

    pub(crate) fn bind(&self, addr: SocketAddr) -> Result<(), Errno> {
        let mut addr = RawAddress::from(addr);
        // SAFETY: the identifier is alive, and `addr` a socket address of its family's length.
        check(unsafe { rdma_sys::rdma_bind_addr(self.raw(), addr.as_mut_ptr()) })
    }

    pub(crate) fn listen(&self, backlog: i32) -> Result<(), Errno> {
        // SAFETY: the identifier is alive.
        check(unsafe { rdma_sys::rdma_listen(self.raw(), backlog) })
    }

    /// Begins to find the device and the way to `to`, from `from` where that is given.
    pub(crate) fn resolve_address(
        &self,
        from: Option<IpAddr>,
        to: SocketAddr,
        timeout: Duration,
    ) -> Result<(), Errno> {
        let mut from = from.map(|from| RawAddress::from(SocketAddr::new(from, 0)));
        let from = from.as_mut().map_or(ptr::null_mut(), RawAddress::as_mut_ptr);
        let mut to = RawAddress::from(to);
        // SAFETY: the identifier is alive; the addresses are socket addresses of their families'
        // lengths, or null, which is allowed for the source.
        check(unsafe {
            rdma_sys::rdma_resolve_addr(self.raw(), from, to.as_mut_ptr(), milliseconds(timeout))
        })
    }

    pub(crate) fn resolve_route(&self, timeout: Duration) -> Result<(), Errno> {
        // SAFETY: the identifier is alive, and bound to a device: its address was resolved.
        check(unsafe { rdma_sys::rdma_resolve_route(self.raw(), milliseconds(timeout)) })
    }

    /// Has a path that is gone found sooner than by default. What the kernel or
    /// the fabric does not offer (before 5.1, iWARP) stays as it is.
    pub(crate) fn limit_ack_timeout(&self) {
        let mut exponent = ACK_TIMEOUT_EXPONENT;
        // SAFETY: the identifier is alive; the option takes one byte.
        let _ = unsafe {
            rdma_sys::rdma_set_option(
                self.raw(),
                OPTION_ID,
                OPTION_ID_ACK_TIMEOUT,
                (&raw mut exponent).cast(),
                size_of::<u8>(),
            )
        };
    }

    /// Asks for the connection, of the queue pair made for this identifier.
    pub(crate) fn connect(&self, private_data: &[u8]) -> Result<(), Errno> {
        let mut parameters = parameters(private_data);
        // SAFETY: the identifier is alive; the parameters' private data is copied by the call.
        check(unsafe { rdma_sys::rdma_connect(self.raw(), &mut parameters) })
    }

    /// Accepts the connection that the peer asked for.
    pub(crate) fn accept(&self, private_data: &[u8]) -> Result<(), Errno> {
        self.accept_with(parameters(private_data))
    }

    /// The same, and has the peer's messages wait for this side to be ready without end.
    #[cfg(feature = "testing")]
    pub(crate) fn accept_patiently(&self, private_data: &[u8]) -> Result<(), Errno> {
        self.accept_with(rdma_conn_param { rnr_retry_count: 7, ..parameters(private_data) })
    }

    fn accept_with(&self, mut parameters: rdma_conn_param) -> Result<(), Errno> {
        // SAFETY: as for `connect`.
        check(unsafe { rdma_sys::rdma_accept(self.raw(), &mut parameters) })
    }

    pub(crate) fn reject(&self, private_data: &[u8]) -> Result<(), Errno> {
        let length = u8::try_from(private_data.len()).map_err(|_| Errno::INVAL)?;
        // SAFETY: the identifier is alive; the private data is copied by the call.
        check(unsafe { rdma_sys::rdma_reject(self.raw(), private_data.as_ptr().cast(), length) })
    }

    /// Breaks the connection: its queue pair carries nothing more, and the peer is told.
    pub(crate) fn disconnect(&self) {
        // SAFETY: the identifier is alive. It fails only where there is no connection any more.
        let _ = unsafe { rdma_sys::rdma_disconnect(self.raw()) };
    }

    /// Has its events told on another channel. None may be unacknowledged, and none is: `next`
    /// acknowledges what it takes.
    pub(crate) fn migrate(mut self, channel: &Arc<EventChannel>) -> Result<Self, Errno> {
        // SAFETY: the identifier and both channels are alive.
        check(unsafe { rdma_sys::rdma_migrate_id(self.raw(), channel.raw.as_ptr()) })?;
        self.channel = Arc::clone(channel);
        Ok(self)
    }

    /// The device it is bound to, if it is.
    pub(crate) fn context(&self) -> Option<NonNull<rdma_sys::ibv_context>> {
        // SAFETY: the identifier is alive; librdmacm sets `verbs` within calls that its owner made.
        NonNull::new(unsafe { (*self.raw()).verbs })
    }

    /// The port of the device it is bound to.
    pub(crate) fn port(&self) -> u8 {
        // SAFETY: as for `context`.
        unsafe { (*self.raw()).port_num }
    }

    pub(crate) fn local_addr(&self) -> Option<SocketAddr> {
        // SAFETY: the identifier is alive; the union is as large as any socket address, and zero
        // (no family) where there is none.
        unsafe { from_storage(&(*self.raw()).route.addr.src_addr_union.src_storage) }
    }

    pub(crate) fn peer_addr(&self) -> Option<SocketAddr> {
        // SAFETY: as for `local_addr`.
        unsafe { from_storage(&(*self.raw()).route.addr.dst_addr_union.dst_storage) }
    }
}

impl Drop for Identifier {
    fn drop(&mut self) {
        // SAFETY: made by `rdma_create_id` or given with a request, destroyed once. Its queue pair
        // was destroyed before: whoever made that owns this identifier and drops it afterwards.
        // All its events were acknowledged, so that this does not wait.
        let _ = unsafe { rdma_sys::rdma_destroy_id(self.raw()) };
    }
}

/// Has librdmacm let go of devices that were removed. It keeps them open otherwise,
/// and the kernel waits for that where their driver cannot take them back (soft-RoCE).
pub(crate) fn forget_removed_devices() {
    // SAFETY: the list that the one call gives is handed back by the other.
    unsafe {
        let devices = rdma_sys::rdma_get_devices(ptr::null_mut());
        if !devices.is_null() {
            rdma_sys::rdma_free_devices(devices);
        }
    }
}

fn parameters(private_data: &[u8]) -> rdma_conn_param {
    rdma_conn_param {
        private_data: private_data.as_ptr().cast(),
        private_data_len: u8::try_from(private_data.len()).expect("a hello or its answer"),
        responder_resources: MAX_READS,
        initiator_depth: MAX_READS,
        flow_control: 1,
        retry_count: RETRIES,
        rnr_retry_count: NOT_READY_RETRIES,
        srq: 0,
        qp_num: 0,
    }
}

fn check(result: i32) -> Result<(), Errno> {
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

fn milliseconds(timeout: Duration) -> i32 {
    i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX).max(1)
}

/// A socket address as C has it.
#[repr(C)]
union RawAddress {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl RawAddress {
    fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        (&raw mut *self).cast()
    }
}

impl From<SocketAddr> for RawAddress {
    fn from(addr: SocketAddr) -> Self {
        match addr {
            SocketAddr::V4(addr) => RawAddress {
                v4: libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: addr.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
                    sin_zero: [0; 8],
                },
            },
            SocketAddr::V6(addr) => RawAddress {
                v6: libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: addr.port().to_be(),
                    sin6_flowinfo: addr.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: addr.ip().octets() },
                    sin6_scope_id: addr.scope_id(),
                },
            },
        }
    }
}

/// # Safety
/// `storage` must be zero or hold a socket address of the family that it names.
unsafe fn from_storage(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let start = std::ptr::from_ref(storage);
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that this is a `sockaddr_in`, which is no longer nor more
            // aligned than the storage.
            let addr = unsafe { &*start.cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(addr.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddr::new(ip.into(), u16::from_be(addr.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: as above, of a `sockaddr_in6`.
            let addr = unsafe { &*start.cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(addr.sin6_addr.s6_addr);
            Some(std::net::SocketAddrV6::new(ip, u16::from_be(addr.sin6_port), 0, addr.sin6_scope_id).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_through_c() {
        for addr in ["10.1.2.3:4791", "[fe80::1%7]:18515", "[2001:db8::5]:1"] {
            let addr: SocketAddr = addr.parse().unwrap();
            // SAFETY: zero is a valid `sockaddr_storage`.
            let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
            let raw = RawAddress::from(addr);
            // SAFETY: the storage is longer than the address, and neither overlaps the other.
            unsafe {
                ptr::copy_nonoverlapping(
                    (&raw const raw).cast::<u8>(),
                    (&raw mut storage).cast::<u8>(),
                    size_of::<RawAddress>(),
                );
                assert_eq!(from_storage(&storage), Some(addr));
            }
        }
        // SAFETY: zero is a valid `sockaddr_storage`, of no family.
        assert_eq!(unsafe { from_storage(&std::mem::zeroed()) }, None);
    }

    #[test]
    fn every_event_has_a_meaning() {
        let meanings: Vec<_> = (0..=15).map(EventKind::from_raw).collect();
        assert_eq!(meanings[cm::RDMA_CM_EVENT_CONNECT_ERROR as usize], EventKind::Failed);
        let others: Vec<_> = meanings.iter().filter(|kind| matches!(kind, EventKind::Other(_))).collect();
        // A response is told only to identifiers without a queue pair; multicast is not used.
        assert_eq!(others.len(), 5, "{others:?}");
        assert_eq!(EventKind::from_raw(99), EventKind::Other(99));
        let ends: Vec<_> = meanings.iter().filter(|kind| kind.is_end_by_peer()).collect();
        assert_eq!(ends, [&EventKind::Rejected, &EventKind::Disconnected]);
    }
}
