//! What the two sides of a measurement tell each other, as JSON, a line each:
//! the client says what it wants, the server where that is. When the client
//! ends the connection, the server ends too.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ramferry_fabric::SessionToken;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::bench::{BenchError, Bounds};

pub(super) const PROGRAM: &str = "ramferry-bench";
pub(super) const VERSION: u32 = 1;
/// Longest line.
const LINE_BYTES: usize = 8192;
/// Between two looks at the bounds.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The client's only line.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) program: String,
    pub(super) version: u32,
    pub(super) fabric: String,
    pub(super) memory_bytes: u64,
    pub(super) links: u32,
}

/// What it is answered with.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    Welcome(Welcome),
    Refused(String),
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Welcome {
    /// In hexadecimal.
    token: String,
    /// All of the memory.
    pub(super) region_key: u64,
    pub(super) data: DataAddress,
    /// Where plain sockets are answered.
    pub(super) plain_port: u16,
}

/// Where the fabric's listener is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DataAddress {
    /// At the address that the control connection leads to.
    Port(u16),
    Path(PathBuf),
}

impl Welcome {
    pub(super) fn new(token: &SessionToken, region_key: u64, data: DataAddress, plain_port: u16) -> Self {
        let token = token.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        Self { token, region_key, data, plain_port }
    }

    /// None where it is none.
    pub(super) fn token(&self) -> Option<SessionToken> {
        let mut bytes = [0; SessionToken::BYTES];
        if self.token.len() != 2 * bytes.len() || !self.token.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(self.token.get(2 * index..2 * index + 2)?, 16).ok()?;
        }
        Some(SessionToken::from_bytes(bytes))
    }
}

/// A connection that carries lines.
pub(super) struct Channel {
    stream: Box<dyn Stream>,
    /// Read, and not yet taken.
    read: Vec<u8>,
}

trait Stream: Read + Write + Send {}
impl Stream for TcpStream {}
impl Stream for UnixStream {}

impl Channel {
    pub(super) fn over_tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(LOOK_INTERVAL))?;
        stream.set_write_timeout(Some(LOOK_INTERVAL))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: Box::new(stream), read: Vec::new() })
    }

    /// Both ends, in this process.
    pub(super) fn pair() -> io::Result<[Self; 2]> {
        let (a, b) = UnixStream::pair()?;
        for end in [&a, &b] {
            end.set_read_timeout(Some(LOOK_INTERVAL))?;
            end.set_write_timeout(Some(LOOK_INTERVAL))?;
        }
        Ok([a, b].map(|end| Self { stream: Box::new(end), read: Vec::new() }))
    }

    /// Sends a line; it is short enough that a connection takes it whole.
    pub(super) fn send(&mut self, line: &impl Serialize) -> Result<(), BenchError> {
        let mut text = serde_json::to_vec(line).map_err(io::Error::from).map_err(ended)?;
        text.push(b'\n');
        self.stream.write_all(&text).map_err(ended)
    }

    /// The next line, within `patience`; none where the peer ended the connection.
    pub(super) fn receive<T: DeserializeOwned>(
        &mut self,
        patience: Duration,
        bounds: &Bounds,
    ) -> Result<Option<T>, BenchError> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return serde_json::from_slice(&line).map(Some).map_err(|_| BenchError::Foreign);
            }
            bounds.check()?;
            if self.read.len() > LINE_BYTES || Instant::now() >= deadline {
                return Err(BenchError::Foreign);
            }
            if !self.read_some().map_err(ended)? {
                return Ok(None);
            }
        }
    }

    /// Returns once the peer ended the connection. It has nothing more to say.
    pub(super) fn wait_for_end(&mut self, bounds: &Bounds) -> Result<(), BenchError> {
        loop {
            bounds.check()?;
            if !self.read.is_empty() {
                return Err(BenchError::Foreign);
            }
            // A reset is an end too: the client was killed.
            match self.read_some() {
                Ok(true) => {}
                Ok(false) | Err(_) => return Ok(()),
            }
        }
    }

    /// Whether the connection goes on.
    fn read_some(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 512];
        match self.stream.read(&mut bytes) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.read.extend_from_slice(&bytes[..count]);
                Ok(true)
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => Ok(true),
                _ => Err(error),
            },
        }
    }
}

fn ended(_: io::Error) -> BenchError {
    BenchError::PeerEnded
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn bounds() -> Bounds {
        Bounds::new(Arc::new(AtomicBool::new(false)), Duration::from_secs(60))
    }

    fn hello() -> Hello {
        Hello {
            program: PROGRAM.into(),
            version: VERSION,
            fabric: "tcp".into(),
            memory_bytes: 4096,
            links: 1,
        }
    }

    #[test]
    fn lines_arrive_as_they_were_sent_until_the_end() {
        let [mut client, mut server] = Channel::pair().expect("sockets");
        let token = SessionToken::from_bytes(std::array::from_fn(|index| index as u8 * 7));
        let welcome = Welcome::new(&token, u64::MAX, DataAddress::Path("/tmp/socket".into()), 9);
        client.send(&hello()).expect("it is open");
        assert_eq!(server.receive(PATIENCE, &bounds()).expect("a line"), Some(hello()));
        server.send(&Answer::Welcome(welcome)).expect("it is open");
        let answer = client.receive(PATIENCE, &bounds()).expect("a line");
        let Some(Answer::Welcome(welcome)) = answer else { panic!("{answer:?}") };
        assert_eq!((welcome.token(), welcome.region_key), (Some(token), u64::MAX));
        drop(client);
        server.wait_for_end(&bounds()).expect("an end");
        assert!(matches!(server.receive::<Hello>(PATIENCE, &bounds()), Ok(None)));
    }

    #[test]
    fn what_is_no_line_of_ours_is_foreign() {
        for text in ["GET / HTTP/1.1\r\n", "{}\n", "\n", &"x".repeat(2 * LINE_BYTES)] {
            let [mut client, mut server] = Channel::pair().expect("sockets");
            client.stream.write_all(text.as_bytes()).expect("it is open");
            let heard = server.receive::<Hello>(PATIENCE, &bounds());
            assert!(matches!(heard, Err(BenchError::Foreign)), "{text:?}: {heard:?}");
        }
        let [_client, mut server] = Channel::pair().expect("sockets");
        let silent = server.receive::<Hello>(Duration::from_millis(1), &bounds());
        assert!(matches!(silent, Err(BenchError::Foreign)), "{silent:?}");
    }

    #[test]
    fn tokens_that_are_none_are_seen() {
        let welcome = |token: &str| Welcome {
            token: token.to_owned(),
            region_key: 1,
            data: DataAddress::Port(1),
            plain_port: 1,
        };
        for token in [String::new(), "0".repeat(63), "g".repeat(64), "+1".repeat(32), "é".repeat(32)] {
            assert_eq!(welcome(&token).token(), None, "{token}");
        }
        assert_eq!(welcome(&"0f".repeat(32)).token(), Some(SessionToken::from_bytes([15; 32])));
    }
}
