//! What the lab VM and its host say to each other on the one line between them.
//!
//! ```text
//! VM                                     host
//!  | Started ------------------------------>|   the command runs
//!  | Output(Stdout | Stderr, bytes) ------->|   any number
//!  | Exited(status) | Killed(signal) | NotStarted(why) -->|
//!  |<---------------------------- FAREWELL--|   all of it has arrived
//!  | powers off                             |
//! ```
//!
//! A frame is a kind, a length (32 bits, little endian) and that many bytes.

use std::io::{Read, Write};

use anyhow::{Context, Result, bail, ensure};

/// What the host answers to the last frame.
pub(crate) const FAREWELL: u8 = b'.';
/// The longest payload: what is read of a stream at once.
pub(crate) const LONGEST_BYTES: usize = 32 << 10;
const HEADER_BYTES: usize = 5;

/// Where the command wrote to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// One message of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    Started,
    Output(Stream, Vec<u8>),
    Exited(i32),
    Killed(i32),
    NotStarted(String),
}

impl Frame {
    fn parts(&self) -> (u8, Vec<u8>) {
        match self {
            Frame::Started => (0, Vec::new()),
            Frame::Output(Stream::Stdout, bytes) => (1, bytes.clone()),
            Frame::Output(Stream::Stderr, bytes) => (2, bytes.clone()),
            Frame::Exited(status) => (3, status.to_le_bytes().to_vec()),
            Frame::Killed(signal) => (4, signal.to_le_bytes().to_vec()),
            Frame::NotStarted(why) => (5, why.as_bytes().to_vec()),
        }
    }

    /// Writes the frame at once: a line of the VM's keeps no order between two writes.
    pub(crate) fn write(&self, to: &mut impl Write) -> Result<()> {
        let (kind, mut payload) = self.parts();
        payload.truncate(LONGEST_BYTES);
        let length = u32::try_from(payload.len()).expect("a payload is short");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        bytes.push(kind);
        bytes.extend(length.to_le_bytes());
        bytes.extend(payload);
        to.write_all(&bytes).context("cannot write to the line between the VM and its host")
    }

    /// Reads one frame; none where the line ends between two.
    pub(crate) fn read(from: &mut impl Read) -> Result<Option<Frame>> {
        let mut header = [0; HEADER_BYTES];
        if from.read(&mut header[..1])? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut header[1..])?;
        let length = u32::from_le_bytes(header[1..].try_into().expect("four bytes")) as usize;
        ensure!(length <= LONGEST_BYTES, "the VM sent a frame of {length} bytes, more than there may be");
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        let number = || -> Result<i32> {
            let bytes = payload.as_slice().try_into().context("the VM sent a number of another size")?;
            Ok(i32::from_le_bytes(bytes))
        };
        Ok(Some(match header[0] {
            0 => Frame::Started,
            1 => Frame::Output(Stream::Stdout, payload),
            2 => Frame::Output(Stream::Stderr, payload),
            3 => Frame::Exited(number()?),
            4 => Frame::Killed(number()?),
            5 => Frame::NotStarted(String::from_utf8_lossy(&payload).into_owned()),
            kind => bail!("the VM sent a frame of the unknown kind {kind}"),
        }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn every_frame_arrives_as_it_was_sent() {
        let frames = [
            Frame::Started,
            Frame::Output(Stream::Stdout, (0..=255).collect()),
            Frame::Output(Stream::Stderr, Vec::new()),
            Frame::Output(Stream::Stdout, vec![7; LONGEST_BYTES]),
            Frame::Exited(255),
            Frame::Killed(9),
            Frame::NotStarted("no such file".to_owned()),
        ];
        let mut line = Vec::new();
        frames.iter().for_each(|frame| frame.write(&mut line).unwrap());
        let mut rest = line.as_slice();
        for frame in frames {
            assert_eq!(Frame::read(&mut rest).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut rest).unwrap(), None);
    }

    #[test]
    fn a_line_that_ends_within_a_frame_or_holds_none_is_an_error() {
        let mut line = Vec::new();
        Frame::Exited(3).write(&mut line).unwrap();
        assert!(Frame::read(&mut &line[..line.len() - 1]).is_err());
        assert!(Frame::read(&mut &[9, 0, 0, 0, 0][..]).is_err());
        assert!(Frame::read(&mut &[1, 0, 0, 0, 1][..]).is_err());
        assert!(Frame::read(&mut &[3, 1, 0, 0, 0, 1][..]).is_err());
    }
}
