//! What the two sides of a link say to each other beside reading and writing memory.

/// Length of every message. Little endian: kind, 7 zero bytes, number.
pub(crate) const MESSAGE_BYTES: usize = 16;

pub(crate) type RawMessage = [u8; MESSAGE_BYTES];

/// Fences of a link that are not answered yet, at most: so many messages each side
/// has memory posted for, and one more for the goodbye.
pub(crate) const FENCES: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// To be answered when it is received: everything sent before it is placed by then.
    Fence {
        number: u64,
    },
    FenceAnswer {
        number: u64,
    },
    /// The link takes leave.
    Goodbye,
}

impl Message {
    pub(crate) fn encode(self) -> RawMessage {
        let (kind, number) = match self {
            Message::Fence { number } => (1, number),
            Message::FenceAnswer { number } => (2, number),
            Message::Goodbye => (3, 0),
        };
        let mut raw = [0; MESSAGE_BYTES];
        raw[0] = kind;
        raw[8..].copy_from_slice(&u64::to_le_bytes(number));
        raw
    }

    /// `None` when the bytes are no message.
    pub(crate) fn decode(raw: &RawMessage) -> Option<Self> {
        let mut number = [0; 8];
        number.copy_from_slice(&raw[8..]);
        let number = u64::from_le_bytes(number);
        let message = match raw[0] {
            1 => Message::Fence { number },
            2 => Message::FenceAnswer { number },
            3 => Message::Goodbye,
            _ => return None,
        };
        // One form for each message.
        (message.encode() == *raw).then_some(message)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_message_survives_the_wire(number in any::<u64>()) {
            for message in [Message::Fence { number }, Message::FenceAnswer { number }, Message::Goodbye] {
                prop_assert_eq!(Message::decode(&message.encode()), Some(message));
            }
        }

        #[test]
        fn random_bytes_never_panic_and_have_one_form(kind in 0_u8..6, zero in any::<bool>(), mut raw in any::<RawMessage>()) {
            raw[0] = kind;
            if zero {
                raw[1..8].fill(0);
            }
            if let Some(message) = Message::decode(&raw) {
                prop_assert_eq!(message.encode(), raw);
            }
        }
    }
}
