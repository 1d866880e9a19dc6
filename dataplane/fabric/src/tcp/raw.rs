//! Socket calls on guest RAM. rustix takes slices here, and a slice of guest
//! RAM must not exist: the guest writes to it at any time. So these two calls
//! are made with raw pointers.
#![allow(unsafe_code, reason = "sends from and receives into guest RAM, of which no reference may be made")]

use std::os::fd::{AsRawFd, BorrowedFd};

use ramferry_ram::Span;
use rustix::io::Errno;

/// Most parts that one call sends.
pub(super) const MAX_PARTS: usize = 64;

/// Something to be sent.
#[derive(Clone, Copy)]
pub(super) enum Part<'a> {
    Bytes(&'a [u8]),
    Ram(Span<'a>),
}

/// Sends `parts` one after the other, at most [`MAX_PARTS`] of them; returns how
/// many bytes the socket took.
pub(super) fn send(socket: BorrowedFd<'_>, parts: &[Part<'_>], flags: i32) -> Result<usize, Errno> {
    let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_PARTS];
    let count = parts.len().min(MAX_PARTS);
    for (vector, part) in vectors.iter_mut().zip(parts) {
        let (start, length) = match part {
            Part::Bytes(bytes) => (bytes.as_ptr(), bytes.len()),
            Part::Ram(span) => (span.as_ptr(), span.len()),
        };
        *vector = libc::iovec { iov_base: start.cast_mut().cast(), iov_len: length };
    }
    // SAFETY: `msghdr` is plain data for which all zeros is a valid value (no name, no control).
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = count;
    // SAFETY: the descriptor is borrowed, thus open. The first `count` vectors were filled
    // above from slices and spans that are borrowed for this call, and the kernel only reads
    // through them; a page that is gone makes it answer EFAULT.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags | libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| last_errno())
}

/// Receives into `span`, and what follows into `beyond`; returns how many bytes
/// came, 0 at the stream's end.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    span: Span<'_>,
    beyond: &mut [u8],
    flags: i32,
) -> Result<usize, Errno> {
    let start = span.as_mut_ptr().map_err(|_| Errno::FAULT)?;
    let mut vectors = [
        libc::iovec { iov_base: start.cast(), iov_len: span.len() },
        libc::iovec { iov_base: beyond.as_mut_ptr().cast(), iov_len: beyond.len() },
    ];
    // SAFETY: `msghdr` is plain data for which all zeros is a valid value (no name, no control).
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    // SAFETY: the descriptor is borrowed, thus open. The first vector is `len` bytes of a
    // mapping that is borrowed for this call and mapped writable (`as_mut_ptr` checked); it is
    // guest RAM, of which no reference exists. The second is borrowed mutably for this call.
    // The kernel stores the bytes, and answers EFAULT for a page that is gone.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    usize::try_from(received).map_err(|_| last_errno())
}

fn last_errno() -> Errno {
    let error = std::io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
