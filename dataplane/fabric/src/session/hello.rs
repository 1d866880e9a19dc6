use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::remaining;
use crate::{FabricKind, LinkError, SessionToken};

/// First bytes of every connection, in both directions.
const MAGIC: [u8; 8] = *b"ramferry";
/// Version of everything that is said on a data connection.
const VERSION: u16 = 1;

/// Magic, version, fabric, 5 zero bytes, token.
pub(crate) const HELLO_BYTES: usize = 48;
/// Magic, version, verdict, 5 zero bytes.
const REPLY_BYTES: usize = 16;

const _: () = assert!(HELLO_BYTES == MAGIC.len() + size_of::<u16>() + 1 + 5 + SessionToken::BYTES);
const _: () = assert!(REPLY_BYTES == MAGIC.len() + size_of::<u16>() + 1 + 5);

/// What a hello is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Welcome,
    UnknownSession,
    TooManyLinks,
    Version,
}

/// Why bytes are not a hello that can be answered with a welcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HelloError {
    /// Of something else altogether; not to be answered.
    Foreign,
    Version,
}

fn fabric_code(kind: FabricKind) -> u8 {
    match kind {
        FabricKind::Verbs => 1,
        FabricKind::Shm => 2,
        FabricKind::Tcp => 3,
    }
}

pub(super) fn encode_hello(kind: FabricKind, token: &SessionToken) -> [u8; HELLO_BYTES] {
    let mut hello = [0; HELLO_BYTES];
    hello[..8].copy_from_slice(&MAGIC);
    hello[8..10].copy_from_slice(&VERSION.to_le_bytes());
    hello[10] = fabric_code(kind);
    hello[16..].copy_from_slice(token.as_bytes());
    hello
}

pub(crate) fn decode_hello(hello: &[u8; HELLO_BYTES], kind: FabricKind) -> Result<SessionToken, HelloError> {
    if hello[..8] != MAGIC || hello[10] != fabric_code(kind) {
        return Err(HelloError::Foreign);
    }
    if u16::from_le_bytes([hello[8], hello[9]]) != VERSION || hello[11..16] != [0; 5] {
        return Err(HelloError::Version);
    }
    let mut token = [0; SessionToken::BYTES];
    token.copy_from_slice(&hello[16..]);
    Ok(SessionToken::from_bytes(token))
}

pub(super) fn encode_reply(verdict: Verdict) -> [u8; REPLY_BYTES] {
    let mut reply = [0; REPLY_BYTES];
    reply[..8].copy_from_slice(&MAGIC);
    reply[8..10].copy_from_slice(&VERSION.to_le_bytes());
    reply[10] = match verdict {
        Verdict::Welcome => 0,
        Verdict::UnknownSession => 1,
        Verdict::TooManyLinks => 2,
        Verdict::Version => 3,
    };
    reply
}

fn judge_reply(reply: &[u8; REPLY_BYTES]) -> Result<(), LinkError> {
    if reply[..8] != MAGIC {
        return Err(LinkError::PeerProtocol("what listens there is not a ramferry agent"));
    }
    let theirs = u16::from_le_bytes([reply[8], reply[9]]);
    match reply[10] {
        0 if theirs == VERSION => Ok(()),
        1 => Err(LinkError::UnknownSession),
        2 => Err(LinkError::TooManyLinks),
        0 | 3 => Err(LinkError::Version { ours: VERSION, theirs }),
        _ => Err(LinkError::PeerProtocol("unknown verdict in the reply to the hello")),
    }
}

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_hello_carries_its_token() {
        let token = SessionToken::from_bytes([9; 32]);
        let hello = encode_hello(FabricKind::Tcp, &token);
        assert_eq!(decode_hello(&hello, FabricKind::Tcp), Ok(token));
        assert_eq!(decode_hello(&hello, FabricKind::Shm), Err(HelloError::Foreign));
    }

    #[test]
    fn a_hello_of_another_version_is_told_so() {
        let mut hello = encode_hello(FabricKind::Tcp, &SessionToken::from_bytes([9; 32]));
        hello[8] = 99;
        assert_eq!(decode_hello(&hello, FabricKind::Tcp), Err(HelloError::Version));
        let mut reply = encode_reply(Verdict::Version);
        reply[8] = 2;
        assert_eq!(judge_reply(&reply), Err(LinkError::Version { ours: VERSION, theirs: 2 }));
    }

    #[test]
    fn every_verdict_is_understood() {
        assert_eq!(judge_reply(&encode_reply(Verdict::Welcome)), Ok(()));
        assert_eq!(judge_reply(&encode_reply(Verdict::UnknownSession)), Err(LinkError::UnknownSession));
        assert_eq!(judge_reply(&encode_reply(Verdict::TooManyLinks)), Err(LinkError::TooManyLinks));
    }

    proptest! {
        #[test]
        fn random_hellos_and_replies_never_panic(hello in any::<[u8; HELLO_BYTES]>(), reply in any::<[u8; REPLY_BYTES]>()) {
            prop_assert!(decode_hello(&hello, FabricKind::Tcp).is_err());
            prop_assert!(judge_reply(&reply).is_err());
        }
    }
}
