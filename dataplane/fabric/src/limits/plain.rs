use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use ramferry_ram::{BlockIndex, BlockRange, Memory};

use super::{LimitError, receive_range, send_range};
use crate::{MAX_TRANSFER_BYTES, SessionToken, tcp};

/// Offset and length of what follows, and the most that is received at once.
const HEADER_BYTES: usize = 8 + 8 + 4;
/// How long a stranger may take to present a token.
const TOKEN_PATIENCE: Duration = Duration::from_secs(5);
/// The most that one header announces, so that the receiver looks up now and then.
const MAX_BURST_BYTES: u64 = 1 << 30;

/// The end of a plain connection that sends.
#[derive(Debug)]
pub struct Sender {
    socket: TcpStream,
}

impl Sender {
    /// Connects to where [`serve`] answers for `token`. A call that takes longer
    /// than `patience` fails.
    ///
    /// # Errors
    /// When nobody is there.
    pub fn connect(addr: SocketAddr, token: &SessionToken, patience: Duration) -> Result<Self, LimitError> {
        let mut socket = TcpStream::connect_timeout(&addr, patience)?;
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, tcp::send_buffer_bytes(addr));
        configure(&socket, patience)?;
        socket.write_all(token.as_bytes())?;
        let mut sender = Self { socket };
        sender.settle()?;
        Ok(sender)
    }

    /// Sends `length` bytes at `offset` of the first block to the same place of the
    /// receiver's, in pieces of `piece_bytes`.
    ///
    /// # Errors
    /// When the connection breaks, or the memory cannot be read.
    pub fn send(
        &mut self,
        from: &Memory,
        offset: u64,
        length: u64,
        piece_bytes: u32,
    ) -> Result<(), LimitError> {
        self.socket.write_all(&encode(offset, length, piece_bytes))?;
        pieces(offset, length, piece_bytes).try_for_each(|piece| send_range(&self.socket, from, piece))
    }

    /// Returns once all that was sent has been received: a round trip.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn settle(&mut self) -> Result<(), LimitError> {
        self.socket.write_all(&encode(0, 0, 1))?;
        self.socket.read_exact(&mut [0])?;
        Ok(())
    }
}

/// Receives into the first block of `to` what the one who knows `token` sends,
/// until that one is done or silent for `patience`.
///
/// # Errors
/// When the connection breaks, its peer is a stranger or sends to a place that is
/// not there, or the memory cannot be written.
pub fn serve(
    mut socket: TcpStream,
    token: &SessionToken,
    to: &Memory,
    patience: Duration,
) -> Result<(), LimitError> {
    configure(&socket, patience.min(TOKEN_PATIENCE))?;
    let mut presented = [0; SessionToken::BYTES];
    socket.read_exact(&mut presented)?;
    if SessionToken::from_bytes(presented) != *token {
        return Err(LimitError::Stranger);
    }
    configure(&socket, patience)?;
    let mut header = [0; HEADER_BYTES];
    loop {
        match socket.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        let (offset, length, piece_bytes) = decode(&header).ok_or(LimitError::Stranger)?;
        if length == 0 {
            socket.write_all(&[1])?;
        }
        pieces(offset, length, piece_bytes).try_for_each(|piece| receive_range(&socket, to, piece))?;
    }
}

fn configure(socket: &TcpStream, patience: Duration) -> Result<(), io::Error> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(patience))?;
    socket.set_write_timeout(Some(patience))
}

fn encode(offset: u64, length: u64, piece_bytes: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&offset.to_le_bytes());
    header[8..16].copy_from_slice(&length.to_le_bytes());
    header[16..].copy_from_slice(&piece_bytes.to_le_bytes());
    header
}

/// None of what no [`Sender`] sends. Whether the place is there, the memory tells.
fn decode(header: &[u8; HEADER_BYTES]) -> Option<(u64, u64, u32)> {
    let (offset, rest) = header.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let (offset, length) = (u64::from_le_bytes(*offset), u64::from_le_bytes(*length));
    let piece_bytes = u32::from_le_bytes(*rest.first_chunk()?);
    let is_sound = length <= MAX_BURST_BYTES
        && offset.checked_add(length).is_some()
        && (1..=MAX_TRANSFER_BYTES).contains(&piece_bytes);
    is_sound.then_some((offset, length, piece_bytes))
}

fn pieces(offset: u64, length: u64, piece_bytes: u32) -> impl Iterator<Item = BlockRange> {
    (0..length).step_by(piece_bytes as usize).map(move |done| BlockRange {
        block: BlockIndex(0),
        offset: offset + done,
        length: u64::from(piece_bytes).min(length - done),
    })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread;

    use super::super::tests::{PAGES, memory};
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn range(offset: u64, length: u64) -> BlockRange {
        BlockRange { block: BlockIndex(0), offset, length }
    }

    fn served(token: &SessionToken, to: &Memory, talk: impl FnOnce(SocketAddr)) -> Result<(), LimitError> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::scope(|scope| {
            let server = scope.spawn(|| serve(listener.accept().unwrap().0, token, to, PATIENCE));
            talk(address);
            server.join().unwrap()
        })
    }

    #[test]
    fn what_was_sent_has_been_received_once_it_is_settled() {
        let (from, to, token) = (memory(), memory(), SessionToken::random().unwrap());
        from.span(range(4096, 50_000)).unwrap().write_from(&[7; 50_000]);
        served(&token, &to, |address| {
            let mut sender = Sender::connect(address, &token, PATIENCE).unwrap();
            sender.send(&from, 4096, 50_000, 3000).unwrap();
            sender.settle().unwrap();
            let mut bytes = [0; 50_002];
            to.span(range(4095, 50_002)).unwrap().read_into(&mut bytes);
            assert_eq!((bytes[0], bytes[50_001]), (0, 0));
            assert!(bytes[1..50_001].iter().all(|byte| *byte == 7));
            sender.settle().unwrap();
        })
        .unwrap();
    }

    #[test]
    fn strangers_write_nothing() {
        let (from, to) = (memory(), memory());
        let [token, other] = [(); 2].map(|()| SessionToken::random().unwrap());
        let result = served(&token, &to, |address| {
            let sender = Sender::connect(address, &other, PATIENCE);
            assert!(matches!(sender, Err(LimitError::Socket(_))));
        });
        assert!(matches!(result, Err(LimitError::Stranger)));
        let outside = PAGES * 4096 - 10;
        let result = served(&token, &to, |address| {
            let mut sender = Sender::connect(address, &token, PATIENCE).unwrap();
            sender.socket.write_all(&encode(outside, 20, 20)).unwrap();
            let _ = sender.send(&from, 0, 20, 20);
            assert!(sender.settle().is_err());
        });
        assert!(matches!(result, Err(LimitError::Ram(_))));
        assert!(to.presence().unwrap().is_empty());
    }

    #[test]
    fn headers_that_no_sender_makes_are_refused() {
        assert_eq!(decode(&encode(8, 16, 4)), Some((8, 16, 4)));
        for (offset, length, piece_bytes) in
            [(0, 16, 0), (u64::MAX, 1, 1), (0, MAX_BURST_BYTES + 1, 1), (0, 1, MAX_TRANSFER_BYTES + 1)]
        {
            assert_eq!(decode(&encode(offset, length, piece_bytes)), None);
        }
    }
}
