//! The first words on every data connection: who connects presents the
//! session's token, and is told whether it is admitted.

use crate::{FabricKind, LinkError, SessionToken};

/// First bytes of every connection, in both directions.
const MAGIC: [u8; 8] = *b"ramferry";
/// Version of everything that is said on a data connection.
const VERSION: u16 = 1;

/// Length of a hello: magic, version, fabric, 5 zero bytes, token.
pub const HELLO_BYTES: usize = 48;
/// Length of its answer: magic, version, verdict, 5 zero bytes.
pub const REPLY_BYTES: usize = 16;

const _: () = assert!(HELLO_BYTES == MAGIC.len() + size_of::<u16>() + 1 + 5 + SessionToken::BYTES);
const _: () = assert!(REPLY_BYTES == MAGIC.len() + size_of::<u16>() + 1 + 5);

/// What a hello is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The link is the session's.
    Welcome,
    /// No session has the token.
    UnknownSession,
    /// The session has its links already.
    TooManyLinks,
    /// The versions differ.
    Version,
}

/// Why bytes are not a hello that can be answered with a welcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HelloError {
    /// Of something else altogether; not to be answered.
    Foreign,
    /// Another version's; to be told so.
    Version,
}

fn fabric_code(kind: FabricKind) -> u8 {
    match kind {
        FabricKind::Verbs => 1,
        FabricKind::Shm => 2,
        FabricKind::Tcp => 3,
    }
}

/// What who connects says first.
pub fn encode_hello(kind: FabricKind, token: &SessionToken) -> [u8; HELLO_BYTES] {
    let mut hello = [0; HELLO_BYTES];
    hello[..8].copy_from_slice(&MAGIC);
    hello[8..10].copy_from_slice(&VERSION.to_le_bytes());
    hello[10] = fabric_code(kind);
    hello[16..].copy_from_slice(token.as_bytes());
    hello
}

/// The token that who connects presents to a listener of `kind`.
///
/// # Errors
/// When the bytes are not a hello of this version and fabric.
pub fn decode_hello(hello: &[u8; HELLO_BYTES], kind: FabricKind) -> Result<SessionToken, HelloError> {
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

/// What a hello is answered with.
pub fn encode_reply(verdict: Verdict) -> [u8; REPLY_BYTES] {
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

/// What an answer to a hello means.
///
/// # Errors
/// Unless it is a welcome.
pub fn judge_reply(reply: &[u8; REPLY_BYTES]) -> Result<(), LinkError> {
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
