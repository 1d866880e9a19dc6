//! Links over TCP streams.
//!
//! ```text
//!  link                                       receiver
//!    -- hello: magic, version, token ---------> |  (session.rs)
//!    <------------------------- reply: verdict  |
//!    -- write: key, offset, length, bytes ----> | checks, then receives into guest RAM
//!    -- read: key, offset, length ------------> |
//!    <----------------- read data: bytes -----  |
//!    -- fence --------------------------------> |
//!    <------------------------- fence ack ----  | everything before it is placed
//!    -- goodbye ------------------------------> |
//! ```
//!
//! Answers come in the order of the requests. A frame that is refused is
//! answered with an error frame that names the cause, and ends the connection.

mod link;
mod raw;
mod receiver;
mod socket;
mod wire;

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::session::{self, Acceptor, Service};
use crate::{FabricKind, Link, LinkError, MappedDomain, SessionToken};

pub use crate::session::Admission;
#[cfg(feature = "limits")]
pub(crate) use socket::send_buffer_bytes;

/// Accepts the links of all sessions of an agent. Sessions that were admitted
/// keep their links when it is dropped.
#[derive(Debug)]
pub struct Listener {
    acceptor: Acceptor,
    local_addr: SocketAddr,
}

impl Listener {
    /// Listens at `addr`; port 0 lets the kernel choose.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub fn bind(addr: SocketAddr) -> Result<Self, LinkError> {
        let socket = socket::listen(addr).map_err(failed("listen at the data address"))?;
        let listener = TcpListener::from(socket);
        let local_addr = listener.local_addr().map_err(|error| LinkError::System {
            what: "find the data address",
            source: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })?;
        let service = Service {
            kind: FabricKind::Tcp,
            screen: |socket| socket::configure(socket).map_err(failed("configure a connection")),
            serve: receiver::serve,
        };
        Ok(Self { acceptor: Acceptor::start(OwnedFd::from(listener), service)?, local_addr })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves connections that present `token` into `domain`, at most `links` at
    /// once, for as long as the admission lives.
    pub fn admit(&self, token: SessionToken, domain: Arc<MappedDomain>, links: u32) -> Admission {
        self.acceptor.admit(token, domain, links)
    }
}

/// Connects to the listener of a peer that admitted `token`. Local places of
/// operations are in `domain`.
///
/// # Errors
/// When the peer cannot be reached or refuses within `timeout`.
pub fn connect(
    addr: SocketAddr,
    token: &SessionToken,
    domain: Arc<MappedDomain>,
    timeout: Duration,
) -> Result<Box<dyn Link>, LinkError> {
    let deadline = Instant::now() + timeout;
    let socket = socket::connect(addr, deadline, timeout)?;
    session::greet(&socket, FabricKind::Tcp, token, deadline, timeout)?;
    Ok(Box::new(link::TcpLink::new(socket, domain)))
}

/// A link over a connected, non-blocking socket whose peer has welcomed it.
#[cfg(feature = "fuzzing")]
pub(crate) fn over(socket: OwnedFd, domain: Arc<MappedDomain>) -> Box<dyn Link> {
    Box::new(link::TcpLink::new(socket, domain))
}

#[cfg(feature = "fuzzing")]
pub(crate) use receiver::serve;

fn failed(what: &'static str) -> impl Fn(Errno) -> LinkError {
    move |source| LinkError::System { what, source }
}
