//! A client of QMP, QEMU's control socket.
//!
//! One task reads the socket and sorts what arrives into replies and events,
//! another writes it, so that a caller that goes away leaves neither half a
//! command nor a reply that is taken for another command's.
//!
//! QEMU serves one client of a QMP socket at a time. The next one is accepted
//! by the kernel and hears nothing, which [`QmpClient::connect`] reports as
//! [`QmpError::Silent`].

mod socket;
mod wire;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub use socket::QmpSocket;
use wire::{Band, Message};

/// Longest line that is read. `query-named-block-nodes` of a guest with a
/// thousand disks has some hundred KiB.
const LINE_LIMIT_BYTES: u64 = 16 << 20;

/// Commands that wait to be written. QEMU stops reading when 8 are in its queue.
const COMMAND_QUEUE: usize = 32;

/// Lines that QEMU may still have for an earlier client.
const LEFTOVER_LINES: usize = 1000;

/// Events kept for a receiver that is late.
const EVENT_QUEUE: usize = 256;

/// An event that QEMU reported.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// E.g. `STOP`.
    pub name: String,
    /// Its data; `Null` where it has none.
    pub data: Value,
    /// When QEMU saw it, by the host's clock.
    pub timestamp: SystemTime,
}

/// The version of a QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version {
    /// 7 of 7.2.22.
    pub major: u32,
    /// 2 of 7.2.22.
    pub minor: u32,
    /// 22 of 7.2.22.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Why a QMP connection has ended.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum Ended {
    /// QEMU closed it: it has exited, or is about to.
    #[error("QEMU closed the connection")]
    Closed,
    /// The socket failed.
    #[error("the socket failed")]
    Io(#[source] Arc<io::Error>),
    /// A line was longer than any that QEMU sends.
    #[error("a line longer than {LINE_LIMIT_BYTES} bytes arrived")]
    TooLong,
    /// What arrived was not QMP.
    #[error("what arrived was not QMP: {excerpt:?}")]
    Garbage {
        /// Its first characters.
        excerpt: String,
    },
}

/// Why a QMP command has no result.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QmpError {
    /// There is nobody at the socket.
    #[error("cannot connect to QMP socket {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The connection was accepted and nothing was said.
    #[error("QMP socket {} did not greet within {after:?}", path.display())]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        after: Duration,
    },
    /// The connection has ended.
    #[error("the QMP connection has ended")]
    Ended(#[source] Ended),
    /// The command was not answered in time. QEMU may still carry it out.
    #[error("QEMU did not answer {command} within {after:?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of error, e.g. `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// The reply is not of the form that the command's replies have.
    #[error("QEMU's answer to {command} is not understood")]
    Reply {
        /// The command.
        command: String,
        /// What was expected and what was found.
        #[source]
        source: serde_json::Error,
    },
}

impl QmpError {
    /// Whether the connection is of no use any more.
    pub fn has_ended(&self) -> bool {
        matches!(self, QmpError::Ended(_))
    }

    /// Whether QEMU refused with this class of error.
    pub(crate) fn is_class(&self, wanted: &str) -> bool {
        matches!(self, QmpError::Refused { class, .. } if class == wanted)
    }
}

/// A connection to a QMP socket. Closed when dropped.
#[derive(Debug)]
pub struct QmpClient {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Vec<u8>>,
    version: Version,
    peer_pid: Option<u32>,
    command_timeout: Duration,
    tasks: [JoinHandle<()>; 2],
}

impl QmpClient {
    /// Connects to `socket`, hears its greeting and negotiates, all within
    /// `limit`, which becomes the time limit of each command too.
    ///
    /// # Errors
    /// When nobody listens, another client is being served, or what answers is
    /// not QEMU.
    pub async fn connect(socket: impl Into<QmpSocket>, limit: Duration) -> Result<Self, QmpError> {
        let socket = socket.into();
        let path = socket.path();
        let silent = || QmpError::Silent { path: path.to_owned(), after: limit };
        let stream = match timeout(limit, UnixStream::connect(socket.address())).await {
            Ok(Ok(stream)) => stream,
            // The backlog is full of clients that wait for their turn.
            Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => return Err(silent()),
            Ok(Err(source)) => return Err(QmpError::Connect { path: path.to_owned(), source }),
            Err(_) => return Err(silent()),
        };
        match timeout(limit, Self::negotiate(stream, limit)).await {
            Ok(client) => client,
            Err(_) => Err(silent()),
        }
    }

    /// Speaks QMP on a stream that is already connected, as [`QmpClient::connect`] does.
    ///
    /// # Errors
    /// When what answers is not QEMU, or the connection ends.
    pub(crate) async fn negotiate(stream: UnixStream, command_timeout: Duration) -> Result<Self, QmpError> {
        let peer_pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
        let (read, write) = stream.into_split();
        let mut reader = BufReader::new(read);
        let (version, out_of_band) = hear_greeting(&mut reader).await.map_err(QmpError::Ended)?;
        let (commands, queue) = mpsc::channel(COMMAND_QUEUE);
        let shared = Arc::new(Shared::new());
        let tasks = [
            tokio::spawn(read_all(reader, Arc::clone(&shared))),
            tokio::spawn(write_all(write, queue, Arc::clone(&shared))),
        ];
        let peer_pid = peer_pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
        let client = Self { shared, commands, version, peer_pid, command_timeout, tasks };
        let enable = if out_of_band { json!({ "enable": ["oob"] }) } else { json!({}) };
        client.run("qmp_capabilities", enable).await?;
        Ok(client)
    }

    /// The version in QEMU's greeting.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The process that opened the socket, if it is in sight of this one.
    pub fn peer_pid(&self) -> Option<u32> {
        self.peer_pid
    }

    /// Every event from now on. A receiver that lags loses the oldest.
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        self.shared.events.subscribe()
    }

    /// Runs `command` and returns its result.
    ///
    /// When this is dropped before it ends, QEMU carries the command out or
    /// never sees it.
    ///
    /// # Errors
    /// When QEMU refuses it or does not answer in time, or the connection ends.
    pub async fn execute<T: DeserializeOwned>(&self, command: &str, arguments: Value) -> Result<T, QmpError> {
        let reply = self.call(Band::In, self.command_timeout, command, arguments).await?;
        T::deserialize(reply).map_err(|source| QmpError::Reply { command: command.to_owned(), source })
    }

    /// Runs a `command` that has no result.
    ///
    /// # Errors
    /// As [`QmpClient::execute`].
    pub async fn run(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.call(Band::In, self.command_timeout, command, arguments).await.map(drop)
    }

    /// Runs a `command` that has no result, and may take as long as `limit`.
    ///
    /// # Errors
    /// As [`QmpClient::execute`].
    pub async fn run_within(&self, limit: Duration, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.call(Band::In, limit, command, arguments).await.map(drop)
    }

    /// Runs a `command` that has no result at once, even while QEMU's main loop
    /// hangs. QEMU takes few commands so, among them `yank`.
    ///
    /// # Errors
    /// As [`QmpClient::execute`].
    pub async fn run_out_of_band(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.call(Band::OutOf, self.command_timeout, command, arguments).await.map(drop)
    }

    /// Resolves when the connection has ended.
    pub async fn ended(&self) -> Ended {
        let mut ended = self.shared.ended.subscribe();
        match ended.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or(Ended::Closed),
            Err(_) => Ended::Closed,
        }
    }

    /// Whether the connection has ended.
    pub fn has_ended(&self) -> bool {
        self.shared.ended.borrow().is_some()
    }

    async fn call(
        &self,
        band: Band,
        limit: Duration,
        command: &str,
        arguments: Value,
    ) -> Result<Value, QmpError> {
        let (mut slot, reply) = self.shared.expect_reply().map_err(QmpError::Ended)?;
        let line = wire::command(slot.id, band, command, &arguments);
        let outcome = timeout(limit, async {
            // A writer that is gone has said why to every pending reply.
            let _ = self.commands.send(line).await;
            reply.await
        })
        .await;
        let ended = || QmpError::Ended(self.shared.why_ended());
        match outcome {
            Err(_) => Err(QmpError::Timeout { command: command.to_owned(), after: limit }),
            Ok(Err(_)) => Err(ended()),
            Ok(Ok(reply)) => {
                slot.answered = true;
                reply.map_err(|refusal| QmpError::Refused {
                    command: command.to_owned(),
                    class: refusal.class,
                    description: refusal.desc,
                })
            }
        }
    }
}

impl Drop for QmpClient {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

type Reply = Result<Value, wire::Refusal>;

#[derive(Debug)]
struct Shared {
    pending: Mutex<Pending>,
    events: broadcast::Sender<QmpEvent>,
    ended: watch::Sender<Option<Ended>>,
}

#[derive(Debug)]
struct Pending {
    last_id: u64,
    replies: HashMap<u64, oneshot::Sender<Reply>>,
}

/// A reply that is waited for; forgotten when dropped without an answer.
struct Slot<'a> {
    id: u64,
    answered: bool,
    shared: &'a Shared,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.shared.pending().replies.remove(&self.id);
        }
    }
}

impl Shared {
    fn new() -> Self {
        // Numbers that no earlier connection used, by any process: QEMU may
        // still answer one of its commands.
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let last_id = u64::try_from(since_epoch.as_micros()).unwrap_or(0);
        Self {
            pending: Mutex::new(Pending { last_id, replies: HashMap::new() }),
            events: broadcast::channel(EVENT_QUEUE).0,
            ended: watch::channel(None).0,
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn why_ended(&self) -> Ended {
        self.ended.borrow().clone().unwrap_or(Ended::Closed)
    }

    fn expect_reply(&self) -> Result<(Slot<'_>, oneshot::Receiver<Reply>), Ended> {
        let mut pending = self.pending();
        // Under the lock: `end` drains the replies after it has said why.
        if let Some(why) = self.ended.borrow().clone() {
            return Err(why);
        }
        pending.last_id += 1;
        let (id, (sender, receiver)) = (pending.last_id, oneshot::channel());
        pending.replies.insert(id, sender);
        Ok((Slot { id, answered: false, shared: self }, receiver))
    }

    fn end(&self, why: Ended) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(why);
            first
        });
        self.pending().replies.clear();
    }

    fn accept(&self, line: &[u8]) -> Result<(), Ended> {
        match wire::parse(line).ok_or_else(|| Ended::Garbage { excerpt: wire::excerpt(line) })? {
            // Nobody listening is no error.
            Message::Event(event) => drop(self.events.send(event)),
            Message::Reply { id, reply } => match self.pending().replies.remove(&id) {
                Some(waiting) => drop(waiting.send(reply)),
                None => tracing::debug!(id, "reply to a command that is not waited for any more"),
            },
        }
        Ok(())
    }
}

/// What a line of a monitor is taken for: a reply's result, if it is one.
#[cfg(feature = "fuzzing")]
pub(crate) fn result_in(line: &[u8]) -> Option<Value> {
    let _ = (wire::greeting(line), wire::excerpt(line));
    match wire::parse(line)? {
        Message::Reply { reply, .. } => reply.ok(),
        Message::Event(event) => Some(event.data),
    }
}

async fn read_all(mut reader: BufReader<OwnedReadHalf>, shared: Arc<Shared>) {
    let why = loop {
        match read_line(&mut reader).await.and_then(|line| shared.accept(&line)) {
            Ok(()) => {}
            Err(why) => break why,
        }
    };
    shared.end(why);
}

async fn write_all(mut writer: OwnedWriteHalf, mut queue: mpsc::Receiver<Vec<u8>>, shared: Arc<Shared>) {
    while let Some(line) = queue.recv().await {
        if let Err(error) = writer.write_all(&line).await {
            shared.end(Ended::Io(Arc::new(error)));
            return;
        }
    }
}

/// Before it greets, QEMU may finish what it had to say to an earlier client,
/// in the middle of a line.
async fn hear_greeting(reader: &mut BufReader<OwnedReadHalf>) -> Result<(Version, bool), Ended> {
    let mut other = None;
    for _ in 0..=LEFTOVER_LINES {
        let line = match (read_line(reader).await, other.take()) {
            (Ok(line), _) => line,
            (Err(Ended::Closed), Some(excerpt)) => return Err(Ended::Garbage { excerpt }),
            (Err(why), _) => return Err(why),
        };
        match wire::greeting(&line) {
            Some(greeting) => return Ok(greeting),
            None => other = Some(wire::excerpt(&line)),
        }
    }
    Err(Ended::Garbage { excerpt: other.unwrap_or_default() })
}

async fn read_line(reader: &mut BufReader<OwnedReadHalf>) -> Result<Vec<u8>, Ended> {
    let mut line = Vec::new();
    let mut limited = reader.take(LINE_LIMIT_BYTES);
    match limited.read_until(b'\n', &mut line).await {
        Ok(_) if line.ends_with(b"\n") => Ok(line),
        Ok(length) if length as u64 == LINE_LIMIT_BYTES => Err(Ended::TooLong),
        Ok(_) => Err(Ended::Closed),
        Err(error) => Err(Ended::Io(Arc::new(error))),
    }
}

#[cfg(test)]
mod tests;
