use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::remaining;
use crate::hello::{HELLO_BYTES, REPLY_BYTES, encode_hello, judge_reply};
use crate::{FabricKind, LinkError, SessionToken};

/// Presents `token` on a connected, non-blocking socket and reads the verdict.
pub(crate) fn greet(
    socket: &OwnedFd,
    kind: FabricKind,
    token: &SessionToken,
    deadline: Instant,
    timeout: Duration,
) -> Result<(), LinkError> {
    // A fresh socket takes so few bytes whole.
    let sent = rustix::net::send(socket, &encode_hello(kind, token), SendFlags::NOSIGNAL);
    if sent.map_err(LinkError::Lost)? != HELLO_BYTES {
        return Err(LinkError::Lost(Errno::AGAIN));
    }
    let mut reply = [0; REPLY_BYTES];
    let mut filled = 0;
    while filled < REPLY_BYTES {
        match rustix::net::recv(socket, &mut reply[filled..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(LinkError::PeerClosed),
            Ok((_, received)) => filled += received,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_readable(socket.as_fd(), deadline, timeout)?,
            Err(errno) => return Err(LinkError::Lost(errno)),
        }
    }
    judge_reply(&reply)
}

/// Waits until `socket` has something to read, or its end.
pub(crate) fn wait_readable(
    socket: BorrowedFd<'_>,
    deadline: Instant,
    timeout: Duration,
) -> Result<(), LinkError> {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    match poll(&mut fds, Some(&remaining(deadline))) {
        Ok(0) => Err(LinkError::TimedOut { what: "the peer's answer to the hello", after: timeout }),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(LinkError::Lost(errno)),
    }
}
