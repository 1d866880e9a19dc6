//! What reads a peer's bytes, for those who make such bytes up: `lab/fuzz`.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::hello::{self, HELLO_BYTES};
use crate::session::Connection;
use crate::{FabricKind, Link, LinkError, MappedDomain, SessionToken, tcp};

/// Serves a connected stream as the tcp fabric does, until it ends. Beside the
/// result: how many bytes were placed.
///
/// # Panics
/// When the kernel gives no randomness.
pub fn serve_tcp(socket: OwnedFd, domain: Arc<MappedDomain>) -> (Result<(), LinkError>, u64) {
    let connection = Connection::alone(socket, domain).expect("the kernel gives randomness");
    let result = tcp::serve(&connection);
    (result, connection.placed_bytes())
}

/// A link of the tcp fabric over a connected, non-blocking stream.
pub fn tcp_link(socket: OwnedFd, domain: Arc<MappedDomain>) -> Box<dyn Link> {
    tcp::over(socket, domain)
}

/// The token of a hello to the tcp fabric, if it is one.
pub fn hello(bytes: &[u8]) -> Option<SessionToken> {
    let hello: &[u8; HELLO_BYTES] = bytes.get(..HELLO_BYTES)?.try_into().ok()?;
    hello::decode_hello(hello, FabricKind::Tcp).ok()
}
