//! Frames of a log: `length u32, crc32 u32, body`, little-endian. The checksum
//! covers the length too.
//!
//! A reader must tell a torn tail (the last append was under way when the host
//! died: cut it off) from damage (an acknowledged record is unreadable: refuse to
//! start). A tail is torn only when no whole frame follows the broken one.

/// Bytes before a frame's body.
pub(super) const HEADER_BYTES: usize = 8;
/// Longest body.
pub(super) const BODY_LIMIT_BYTES: usize = 256 * 1024;

const _: () = assert!(HEADER_BYTES == size_of::<u32>() * 2);

/// A frame around `body`, or `None` when it is too long.
pub(super) fn encode(body: &[u8]) -> Option<Vec<u8>> {
    let length = u32::try_from(body.len()).ok().filter(|_| (1..=BODY_LIMIT_BYTES).contains(&body.len()))?;
    let mut frame = Vec::with_capacity(HEADER_BYTES + body.len());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&checksum(length, body).to_le_bytes());
    frame.extend_from_slice(body);
    Some(frame)
}

/// What a log's bytes hold.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frames<'a> {
    /// Start and body of each whole frame.
    pub(super) bodies: Vec<(usize, &'a [u8])>,
    /// Where they end; what follows is torn.
    pub(super) end: usize,
}

/// A whole frame follows one that is broken.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Damage {
    /// Where the broken frame starts.
    pub(super) offset: usize,
}

/// Every whole frame from the start, or where acknowledged ones are damaged.
pub(super) fn decode(bytes: &[u8]) -> Result<Frames<'_>, Damage> {
    let mut bodies = Vec::new();
    let mut end = 0;
    while let Some(body) = frame_at(bytes, end) {
        bodies.push((end, body));
        end += HEADER_BYTES + body.len();
    }
    let torn = bytes.len() - end;
    // More than one append was under way only when appends were buffered; even
    // then a tail is no more than a few of them.
    let follows =
        torn > 4 * BODY_LIMIT_BYTES || (end + 1..bytes.len()).any(|at| frame_at(bytes, at).is_some());
    if follows { Err(Damage { offset: end }) } else { Ok(Frames { bodies, end }) }
}

fn frame_at(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let (header, rest) = bytes.get(at..)?.split_at_checked(HEADER_BYTES)?;
    let word = |from: usize| {
        u32::from_le_bytes([header[from], header[from + 1], header[from + 2], header[from + 3]])
    };
    let length = word(0);
    let body = rest.get(..usize::try_from(length).ok()?)?;
    let whole = (1..=BODY_LIMIT_BYTES).contains(&body.len()) && checksum(length, body) == word(4);
    whole.then_some(body)
}

fn checksum(length: u32, body: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&length.to_le_bytes());
    crc.update(body);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn log(bodies: &[Vec<u8>]) -> Vec<u8> {
        bodies.iter().flat_map(|body| encode(body).expect("short")).collect()
    }

    #[test]
    fn body_that_is_empty_or_too_long_is_not_encoded() {
        assert_eq!(encode(b""), None);
        assert_eq!(encode(&vec![0; BODY_LIMIT_BYTES + 1]), None);
        assert!(encode(&vec![0; BODY_LIMIT_BYTES]).is_some());
    }

    #[test]
    fn zeros_behind_the_last_frame_are_a_torn_tail() {
        let mut bytes = log(&[b"one".to_vec()]);
        let end = bytes.len();
        bytes.resize(end + 4096, 0);
        assert_eq!(decode(&bytes).unwrap().end, end);
    }

    #[test]
    fn damaged_length_of_an_early_frame_is_not_taken_for_a_torn_tail() {
        let mut bytes = log(&[b"created".to_vec(), b"handed over".to_vec()]);
        bytes[2] = 0xff;
        assert_eq!(decode(&bytes), Err(Damage { offset: 0 }));
    }

    proptest! {
        #[test]
        fn cut_log_reads_as_its_whole_frames(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 1..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let bytes = log(&bodies);
            let cut = cut.index(bytes.len() + 1);
            let frames = decode(&bytes[..cut]).unwrap();
            prop_assert!(frames.end <= cut);
            let read: Vec<_> = frames.bodies.iter().map(|(_, body)| body.to_vec()).collect();
            prop_assert_eq!(&bodies[..read.len()], &read[..]);
            let next = bodies.get(read.len());
            prop_assert!(next.is_none_or(|body| frames.end + HEADER_BYTES + body.len() > cut));
        }

        #[test]
        fn flipped_bit_never_hides_a_later_frame(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 2..6),
            at in any::<prop::sample::Index>(),
            bit in 0..8u32,
        ) {
            let mut bytes = log(&bodies);
            let last = bytes.len() - HEADER_BYTES - bodies[bodies.len() - 1].len();
            let at = at.index(last);
            bytes[at] ^= 1 << bit;
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
        }
    }
}
