use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::LinkError;
use crate::session::remaining;

/// Bytes on their way: what 40 Gb/s carry in 0.8 ms. The kernel gives at most
/// `net.core.wmem_max`; the receiving side's buffer it tunes itself, up to more
/// than could be asked for.
const BUFFER_BYTES: usize = 4 << 20;
/// Within a host nothing is on its way for long, and what is stays in the cache:
/// a fifth less work for the CPU than with the larger buffer.
const LOOPBACK_BUFFER_BYTES: usize = 512 << 10;
/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 128;
/// A peer that does not acknowledge what was sent for so long is gone.
const USER_TIMEOUT: Duration = Duration::from_secs(30);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 4;

/// What a connection to `addr` asks for.
pub(crate) fn send_buffer_bytes(addr: SocketAddr) -> usize {
    if addr.ip().is_loopback() { LOOPBACK_BUFFER_BYTES } else { BUFFER_BYTES }
}

fn stream(addr: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // What the kernel refuses leaves its default.
    let _ = sockopt::set_socket_send_buffer_size(&socket, send_buffer_bytes(addr));
    Ok(socket)
}

/// A listening socket, non-blocking.
pub(super) fn listen(addr: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = stream(addr)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &addr)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Options of a connection, on either side.
pub(super) fn configure(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(socket, USER_TIMEOUT.as_millis() as u32)
}

/// A connected socket, non-blocking.
pub(super) fn connect(addr: SocketAddr, deadline: Instant, timeout: Duration) -> Result<OwnedFd, LinkError> {
    let failed = |source| LinkError::Connect { address: addr.to_string(), source };
    let socket = stream(addr).map_err(failed)?;
    configure(socket.as_fd()).map_err(failed)?;
    match rustix::net::connect(&socket, &addr) {
        Ok(()) => return Ok(socket),
        Err(Errno::INPROGRESS | Errno::INTR) => {}
        Err(errno) => return Err(failed(errno)),
    }
    loop {
        let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
        let left = remaining(deadline);
        match poll(&mut fds, Some(&left)) {
            Ok(0) => return Err(LinkError::TimedOut { what: "the connection to the peer", after: timeout }),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
            Ok(_) => break,
        }
    }
    match sockopt::socket_error(&socket) {
        Ok(Ok(())) => Ok(socket),
        Ok(Err(errno)) | Err(errno) => Err(failed(errno)),
    }
}
