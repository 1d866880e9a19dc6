use thiserror::Error;

use crate::link::{AccessFault, LinkError, MAX_TRANSFER_BYTES};

/// Length of every frame's header. Little endian:
///
/// | bytes | field |
/// |---|---|
/// | 0 | opcode |
/// | 1 | zero |
/// | 2-3 | cause (error), else zero |
/// | 4-7 | length (write, read, read data), else zero |
/// | 8-15 | sequence |
/// | 16-23 | key (write, read), else zero |
/// | 24-31 | offset (write, read), else zero |
///
/// A write and read data are followed by `length` bytes.
pub(super) const HEADER_BYTES: usize = 32;

pub(super) type Header = [u8; HEADER_BYTES];

/// What one side says to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    Write { sequence: u64, key: u64, offset: u64, length: u32 },
    Read { sequence: u64, key: u64, offset: u64, length: u32 },
    Fence { sequence: u64 },
    Goodbye,
    ReadData { sequence: u64, length: u32 },
    FenceAck { sequence: u64 },
    Error { sequence: u64, cause: Cause },
}

/// Why a receiver ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    Access(AccessFault),
    Malformed,
    UnknownOpcode,
    Unexpected,
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(super) enum DecodeError {
    #[error("a frame has an unknown opcode")]
    UnknownOpcode,
    #[error("a frame is malformed")]
    Malformed,
    #[error("a frame carries no bytes, or more than a transfer may")]
    Length,
}

mod opcode {
    pub(super) const WRITE: u8 = 1;
    pub(super) const READ: u8 = 2;
    pub(super) const FENCE: u8 = 3;
    pub(super) const GOODBYE: u8 = 4;
    pub(super) const READ_DATA: u8 = 0x81;
    pub(super) const FENCE_ACK: u8 = 0x82;
    pub(super) const ERROR: u8 = 0x83;
}

/// A header's fields, not yet judged.
#[derive(Clone, Copy, Default)]
struct Fields {
    opcode: u8,
    zero: u8,
    cause: u16,
    length: u32,
    sequence: u64,
    key: u64,
    offset: u64,
}

const _: () =
    assert!(HEADER_BYTES == size_of::<u8>() * 2 + size_of::<u16>() + size_of::<u32>() + size_of::<u64>() * 3);

impl Fields {
    fn read(header: &Header) -> Self {
        Self {
            opcode: header[0],
            zero: header[1],
            cause: u16::from_le_bytes(part(header, 2)),
            length: u32::from_le_bytes(part(header, 4)),
            sequence: u64::from_le_bytes(part(header, 8)),
            key: u64::from_le_bytes(part(header, 16)),
            offset: u64::from_le_bytes(part(header, 24)),
        }
    }

    fn write(self) -> Header {
        let mut header = [0; HEADER_BYTES];
        header[0] = self.opcode;
        header[2..4].copy_from_slice(&self.cause.to_le_bytes());
        header[4..8].copy_from_slice(&self.length.to_le_bytes());
        header[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        header[16..24].copy_from_slice(&self.key.to_le_bytes());
        header[24..32].copy_from_slice(&self.offset.to_le_bytes());
        header
    }
}

fn part<const N: usize>(header: &Header, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[at..at + N]);
    bytes
}

impl Frame {
    pub(super) fn encode(self) -> Header {
        let fields = match self {
            Frame::Write { sequence, key, offset, length } => {
                Fields { opcode: opcode::WRITE, sequence, key, offset, length, ..Fields::default() }
            }
            Frame::Read { sequence, key, offset, length } => {
                Fields { opcode: opcode::READ, sequence, key, offset, length, ..Fields::default() }
            }
            Frame::Fence { sequence } => Fields { opcode: opcode::FENCE, sequence, ..Fields::default() },
            Frame::Goodbye => Fields { opcode: opcode::GOODBYE, ..Fields::default() },
            Frame::ReadData { sequence, length } => {
                Fields { opcode: opcode::READ_DATA, sequence, length, ..Fields::default() }
            }
            Frame::FenceAck { sequence } => {
                Fields { opcode: opcode::FENCE_ACK, sequence, ..Fields::default() }
            }
            Frame::Error { sequence, cause } => {
                Fields { opcode: opcode::ERROR, sequence, cause: cause.code(), ..Fields::default() }
            }
        };
        fields.write()
    }

    pub(super) fn decode(header: &Header) -> Result<Self, DecodeError> {
        let fields = Fields::read(header);
        let Fields { sequence, key, offset, length, .. } = fields;
        let frame = match fields.opcode {
            opcode::WRITE => Frame::Write { sequence, key, offset, length },
            opcode::READ => Frame::Read { sequence, key, offset, length },
            opcode::FENCE => Frame::Fence { sequence },
            opcode::GOODBYE => Frame::Goodbye,
            opcode::READ_DATA => Frame::ReadData { sequence, length },
            opcode::FENCE_ACK => Frame::FenceAck { sequence },
            opcode::ERROR => Frame::Error {
                sequence,
                cause: Cause::from_code(fields.cause).ok_or(DecodeError::Malformed)?,
            },
            _ => return Err(DecodeError::UnknownOpcode),
        };
        // Fields that the frame does not have must be zero: one form for each frame.
        if fields.zero != 0 || frame.encode() != *header {
            return Err(DecodeError::Malformed);
        }
        let carries = matches!(fields.opcode, opcode::WRITE | opcode::READ | opcode::READ_DATA);
        if carries && (length == 0 || length > MAX_TRANSFER_BYTES) {
            return Err(DecodeError::Length);
        }
        Ok(frame)
    }
}

impl DecodeError {
    /// What the peer is told.
    pub(super) fn cause(self) -> Cause {
        match self {
            DecodeError::UnknownOpcode => Cause::UnknownOpcode,
            DecodeError::Malformed => Cause::Malformed,
            DecodeError::Length => Cause::Access(AccessFault::Length),
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            DecodeError::UnknownOpcode => "unknown opcode",
            DecodeError::Malformed => "malformed frame",
            DecodeError::Length => "frame of a forbidden length",
        }
    }
}

impl Cause {
    const ALL: [(u16, Cause); 9] = [
        (1, Cause::Access(AccessFault::UnknownKey)),
        (2, Cause::Access(AccessFault::OutOfBounds)),
        (3, Cause::Access(AccessFault::Rights)),
        (4, Cause::Access(AccessFault::Length)),
        (5, Cause::Access(AccessFault::MemoryGone)),
        (6, Cause::Access(AccessFault::Revoked)),
        (16, Cause::Malformed),
        (17, Cause::UnknownOpcode),
        (18, Cause::Unexpected),
    ];
    /// The code of causes that have none of their own.
    const OTHER: u16 = 7;

    fn code(self) -> u16 {
        Self::ALL.iter().find(|(_, cause)| *cause == self).map_or(Self::OTHER, |(code, _)| *code)
    }

    fn from_code(code: u16) -> Option<Self> {
        if code == Self::OTHER {
            return Some(Cause::Access(AccessFault::Unspecified));
        }
        Self::ALL.iter().find(|(other, _)| *other == code).map(|(_, cause)| *cause)
    }

    /// What the side that is told makes of it.
    pub(super) fn told(self) -> LinkError {
        match self {
            Cause::Access(fault) => LinkError::RemoteAccess(fault),
            Cause::Malformed => LinkError::OwnProtocol("malformed frame"),
            Cause::UnknownOpcode => LinkError::OwnProtocol("unknown opcode"),
            Cause::Unexpected => LinkError::OwnProtocol("frame out of place"),
        }
    }

    /// What the side that tells makes of it.
    pub(super) fn found(self) -> LinkError {
        match self {
            Cause::Access(fault) => LinkError::RefusedPeer(fault),
            Cause::Malformed => LinkError::PeerProtocol("malformed frame"),
            Cause::UnknownOpcode => LinkError::PeerProtocol("unknown opcode"),
            Cause::Unexpected => LinkError::PeerProtocol("frame out of place"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_cause() -> impl Strategy<Value = Cause> {
        prop_oneof![
            proptest::sample::select(Cause::ALL.map(|(_, cause)| cause).to_vec()),
            Just(Cause::Access(AccessFault::Unspecified)),
        ]
    }

    fn any_frame() -> impl Strategy<Value = Frame> {
        let transfer = (any::<u64>(), any::<u64>(), any::<u64>(), 1..=MAX_TRANSFER_BYTES);
        prop_oneof![
            transfer.clone().prop_map(|(sequence, key, offset, length)| Frame::Write {
                sequence,
                key,
                offset,
                length
            }),
            transfer.prop_map(|(sequence, key, offset, length)| Frame::Read {
                sequence,
                key,
                offset,
                length
            }),
            any::<u64>().prop_map(|sequence| Frame::Fence { sequence }),
            Just(Frame::Goodbye),
            (any::<u64>(), 1..=MAX_TRANSFER_BYTES)
                .prop_map(|(sequence, length)| Frame::ReadData { sequence, length }),
            any::<u64>().prop_map(|sequence| Frame::FenceAck { sequence }),
            (any::<u64>(), any_cause()).prop_map(|(sequence, cause)| Frame::Error { sequence, cause }),
        ]
    }

    proptest! {
        #[test]
        fn every_frame_survives_the_wire(frame in any_frame()) {
            prop_assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
        }

        #[test]
        fn random_headers_never_panic_and_have_one_form(header in any::<Header>()) {
            if let Ok(frame) = Frame::decode(&header) {
                prop_assert_eq!(frame.encode(), header);
            }
        }

        #[test]
        fn headers_of_known_opcodes_never_panic(
            opcode in proptest::sample::select(vec![1_u8, 2, 3, 4, 0x81, 0x82, 0x83]),
            rest in any::<[u8; HEADER_BYTES - 2]>(),
        ) {
            let mut header = [0; HEADER_BYTES];
            header[0] = opcode;
            header[2..].copy_from_slice(&rest);
            if let Ok(frame) = Frame::decode(&header) {
                prop_assert_eq!(frame.encode(), header);
            }
        }
    }

    #[test]
    fn lengths_beyond_the_limit_are_refused() {
        for length in [0, MAX_TRANSFER_BYTES + 1, u32::MAX] {
            let header = Frame::Write { sequence: 1, key: 2, offset: 3, length }.encode();
            assert_eq!(Frame::decode(&header), Err(DecodeError::Length));
        }
    }
}
