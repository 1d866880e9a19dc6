//! The side that is written to and read from. Every frame is hostile until it
//! was checked: its key is looked up in the domain of the session whose token
//! the connection presented, then bounds and rights. Bytes go from the socket
//! straight into guest RAM, by the kernel, which answers `EFAULT` where a page
//! is gone.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use ramferry_ram::BlockRange;
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{RecvFlags, Shutdown};

use super::raw::{self, Part};
use super::wire::{Cause, Frame, HEADER_BYTES, Header};
use crate::domain::RegionUse;
use crate::regions::Need;
use crate::session::Connection;
use crate::{AccessFault, LinkError, RegionKey};

/// How long a call on the socket may last before the receiver looks around:
/// has the session ended, was the region taken back?
const LOOK_AROUND: Duration = Duration::from_millis(100);
/// How long, and for how many bytes, a refused peer's data is thrown away so
/// that it reads the error frame before the connection's end.
const DRAIN_TIME: Duration = Duration::from_secs(1);
const DRAIN_BYTES: usize = 256 << 20;
/// Writes up to this length are received together with the next header, when
/// that is there already: one call a page instead of two.
const SHORT_BYTES: u64 = 64 << 10;

/// Serves one connection until the peer takes leave or something fails.
pub(crate) fn serve(connection: &Connection) -> Result<(), LinkError> {
    let socket = connection.socket.as_fd();
    let failed = |source| LinkError::System { what: "configure a connection", source };
    rustix::io::ioctl_fionbio(socket, false).map_err(failed)?;
    sockopt::set_socket_timeout(socket, Timeout::Recv, Some(LOOK_AROUND)).map_err(failed)?;
    sockopt::set_socket_timeout(socket, Timeout::Send, Some(LOOK_AROUND)).map_err(failed)?;
    let mut receiver = Receiver { connection, socket, header: [0; HEADER_BYTES], filled: 0 };
    receiver.run().map_err(|end| match end {
        End::Refused { sequence, cause } => {
            receiver.refuse(sequence, cause);
            cause.found()
        }
        End::Broken(error) => error,
    })
}

/// Why a connection ends.
enum End {
    /// By a frame that is answered with an error frame.
    Refused {
        sequence: u64,
        cause: Cause,
    },
    Broken(LinkError),
}

impl From<LinkError> for End {
    fn from(error: LinkError) -> Self {
        End::Broken(error)
    }
}

struct Receiver<'a> {
    connection: &'a Connection,
    socket: BorrowedFd<'a>,
    /// The next frame's header, and how much of it is there.
    header: Header,
    filled: usize,
}

impl Receiver<'_> {
    fn run(&mut self) -> Result<(), End> {
        loop {
            let header = self.next_header()?;
            let frame = Frame::decode(&header).map_err(|error| refused(0, error.cause()))?;
            match frame {
                Frame::Write { sequence, key, offset, length } => {
                    let region = self.begin(sequence, key, Need::RemoteWrite, offset, length)?;
                    self.place(sequence, &region)?;
                    self.connection.count_placed(length);
                }
                Frame::Read { sequence, key, offset, length } => {
                    let region = self.begin(sequence, key, Need::RemoteRead, offset, length)?;
                    self.answer(sequence, Frame::ReadData { sequence, length }, Some(&region))?;
                }
                Frame::Fence { sequence } => self.answer(sequence, Frame::FenceAck { sequence }, None)?,
                Frame::Goodbye => return Ok(()),
                Frame::ReadData { sequence, .. }
                | Frame::FenceAck { sequence }
                | Frame::Error { sequence, .. } => return Err(refused(sequence, Cause::Unexpected)),
            }
        }
    }

    fn begin(&self, sequence: u64, key: u64, need: Need, offset: u64, length: u32) -> Result<RegionUse, End> {
        let begun = self.connection.domain.begin(RegionKey(key), need, offset, length);
        begun.map_err(|fault| refused(sequence, Cause::Access(fault)))
    }

    fn next_header(&mut self) -> Result<Header, End> {
        while self.filled < HEADER_BYTES {
            match rustix::net::recv(self.socket, &mut self.header[self.filled..], RecvFlags::WAITALL) {
                Ok((_, 0)) => return Err(self.ended()),
                Ok((_, received)) => self.filled += received,
                Err(errno) => self.look_around(errno)?,
            }
        }
        self.filled = 0;
        Ok(self.header)
    }

    /// Receives an operation's bytes into its region.
    fn place(&mut self, sequence: u64, region: &RegionUse) -> Result<(), End> {
        let mut rest = region.range();
        while rest.length > 0 {
            let span = self.connection.domain.memory().span(rest);
            let span = span.expect("a region lies within its block");
            let received = if rest.length <= SHORT_BYTES {
                // No waiting for all: what follows the last byte may never come.
                raw::receive(self.socket, span, &mut self.header, 0)
            } else {
                raw::receive(self.socket, span, &mut [], libc::MSG_WAITALL)
            };
            match received {
                Ok(0) => return Err(self.ended()),
                Ok(received) => {
                    self.filled = received.saturating_sub(rest.length as usize);
                    rest = after(rest, received);
                }
                Err(Errno::FAULT) => return Err(refused(sequence, Cause::Access(AccessFault::MemoryGone))),
                Err(errno) => self.look_around(errno)?,
            }
            if rest.length > 0 && region.must_end() {
                return Err(refused(sequence, Cause::Access(AccessFault::Revoked)));
            }
        }
        Ok(())
    }

    /// Sends a frame, and a region's bytes after it.
    fn answer(&self, sequence: u64, frame: Frame, region: Option<&RegionUse>) -> Result<(), End> {
        let header = frame.encode();
        let mut header = &header[..];
        let mut rest = region.map(RegionUse::range).filter(|range| range.length > 0);
        while !header.is_empty() || rest.is_some() {
            let span = rest.map(|rest| self.connection.domain.memory().span(rest));
            let span = span.transpose().expect("a region lies within its block");
            let body = span.map(Part::Ram);
            let sent = match body {
                Some(body) => raw::send(self.socket, &[Part::Bytes(header), body], 0),
                None => raw::send(self.socket, &[Part::Bytes(header)], 0),
            };
            match sent {
                Ok(sent) => {
                    let of_header = sent.min(header.len());
                    header = &header[of_header..];
                    rest = rest.map(|rest| after(rest, sent - of_header)).filter(|rest| rest.length > 0);
                }
                // The stream is out of step now: no error frame can follow.
                Err(Errno::FAULT) => return Err(LinkError::LocalMemory.into()),
                Err(errno) => self.look_around(errno)?,
            }
            if rest.is_some() && region.is_some_and(RegionUse::must_end) {
                tracing::debug!(sequence, "a region was deregistered while it was read");
                return Err(LinkError::RefusedPeer(AccessFault::Revoked).into());
            }
        }
        Ok(())
    }

    /// After a call on the socket that moved nothing: whether to make it again.
    fn look_around(&self, errno: Errno) -> Result<(), End> {
        match errno {
            _ if self.connection.is_stopped() => Err(LinkError::SessionEnded.into()),
            Errno::AGAIN | Errno::INTR => Ok(()),
            errno => Err(LinkError::Lost(errno).into()),
        }
    }

    fn ended(&self) -> End {
        End::Broken(if self.connection.is_stopped() {
            LinkError::SessionEnded
        } else {
            LinkError::PeerClosed
        })
    }

    /// Tells the peer why, then throws away what it still sends: an end with
    /// unread data would reset the connection, and the peer might never read why.
    fn refuse(&self, sequence: u64, cause: Cause) {
        let header = Frame::Error { sequence, cause }.encode();
        if raw::send(self.socket, &[Part::Bytes(&header)], 0) != Ok(HEADER_BYTES)
            || rustix::net::shutdown(self.socket, Shutdown::Write).is_err()
        {
            return;
        }
        let deadline = Instant::now() + DRAIN_TIME;
        let mut thrown_away = 0;
        let mut buffer = vec![0; 64 << 10];
        while thrown_away < DRAIN_BYTES && Instant::now() < deadline && !self.connection.is_stopped() {
            match rustix::net::recv(self.socket, &mut buffer[..], RecvFlags::empty()) {
                Ok((_, 0)) => return,
                Ok((_, received)) => thrown_away += received,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

fn refused(sequence: u64, cause: Cause) -> End {
    End::Refused { sequence, cause }
}

/// What is left of `range` after its first `bytes` bytes.
pub(super) fn after(range: BlockRange, bytes: usize) -> BlockRange {
    let bytes = (bytes as u64).min(range.length);
    BlockRange { offset: range.offset + bytes, length: range.length - bytes, ..range }
}
