//! Links between two agents of one host: the destination passes the
//! descriptors of its RAM files, and the source stores into its own mapping of
//! them. The destination's CPU takes no part.
//!
//! ```text
//!  link                                        destination agent
//!    -- hello: magic, version, token ----------> | (session.rs; same user, by SO_PEERCRED)
//!    <-------------------------- reply: verdict  |
//!    <-- grant: block lengths, RAM files, table  |
//!    == loads and stores in the RAM files ======>|
//!    -- goodbye -------------------------------> |
//! ```
//!
//! The table is a page of memory that both share: the destination's live
//! regions with their keys, bounds and rights, and how many operations are under
//! way in each. The link checks every operation against it, and the destination
//! waits for the operations under way before it deregisters. The check guards
//! against mistakes, not against the peer: that is of the same user, and has the
//! RAM files in its hands anyway.

pub mod copy;
mod grant;
mod link;
mod peer;
mod table;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::domain::Mirror;
use crate::session::{self, Acceptor, Connection, Service};
use crate::{FabricKind, Link, LinkError, MappedDomain, SessionToken};
use grant::Granted;
pub(crate) use peer::PeerMemory;
use table::Table;

pub use crate::session::Admission;

const BACKLOG: i32 = 32;
/// How often a session's end is looked for where nothing else wakes.
const LOOK_AROUND: Duration = Duration::from_millis(100);
/// How long the end of a session waits for operations under way.
const END_WAIT: Duration = Duration::from_secs(3);
/// What a link says when it takes leave.
const GOODBYE: [u8; 1] = *b"G";

/// Accepts the links of all sessions of an agent. Sessions that were admitted
/// keep their links when it is dropped. The socket is removed then.
#[derive(Debug)]
pub struct Listener {
    // Accepting ends before the path is removed: fields are dropped in this order.
    acceptor: Acceptor,
    path: SocketPath,
}

impl Listener {
    /// Listens on a unix socket at `path`, in place of one that nobody listens
    /// on any more.
    ///
    /// # Errors
    /// When somebody listens there, or the socket cannot be made.
    pub fn bind(path: &Path) -> Result<Self, LinkError> {
        let address = SocketAddrUnix::new(path).map_err(failed("use the socket path (is it too long?)"))?;
        let socket = socket().map_err(failed("make a socket"))?;
        match rustix::net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) if is_abandoned(&address) => {
                std::fs::remove_file(path).map_err(system("remove an abandoned socket"))?;
                rustix::net::bind(&socket, &address).map_err(failed("bind the socket"))?;
            }
            bound => bound.map_err(failed("bind the socket (does another agent run?)"))?,
        }
        let path = SocketPath(path.to_owned());
        rustix::fs::chmod(&path.0, Mode::RUSR | Mode::WUSR)
            .map_err(failed("restrict the socket to its user"))?;
        rustix::net::listen(&socket, BACKLOG).map_err(failed("listen on the socket"))?;
        let service = Service { kind: FabricKind::Shm, screen: check_user, serve };
        Ok(Self { acceptor: Acceptor::start(socket, service)?, path })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path.0
    }

    /// Serves connections that present `token` into `domain`, at most `links` at
    /// once, for as long as the admission lives.
    pub fn admit(&self, token: SessionToken, domain: Arc<MappedDomain>, links: u32) -> Admission {
        self.acceptor.admit(token, domain, links)
    }
}

/// Connects to the listener of a peer that admitted `token`. Local places of
/// operations are in `domain`, whose blocks must be the peer's.
///
/// # Errors
/// When the peer cannot be reached or refuses within `timeout`, or is of
/// another user.
pub fn connect(
    path: &Path,
    token: &SessionToken,
    domain: Arc<MappedDomain>,
    timeout: Duration,
) -> Result<Box<dyn Link>, LinkError> {
    let deadline = Instant::now() + timeout;
    let refused = |source| LinkError::Connect { address: path.display().to_string(), source };
    let address = SocketAddrUnix::new(path).map_err(refused)?;
    let socket = socket().map_err(failed("make a socket"))?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::INTR) => {}
            // The listener's backlog is full.
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            Err(errno) => return Err(refused(errno)),
        }
    }
    check_user(socket.as_fd())?;
    session::greet(&socket, FabricKind::Shm, token, deadline, timeout)?;
    let memory = Arc::clone(domain.memory());
    let layout = memory.layout();
    let Granted { table, files } = grant::receive(&socket, layout, deadline, timeout)?;
    let peer = domain.peer_memory(|earlier| PeerMemory::map(layout, files, earlier))?;
    Ok(Box::new(link::ShmLink::new(socket, domain, table, peer)))
}

/// Serves one connection: grants the memory, then waits for its end.
fn serve(connection: &Connection) -> Result<(), LinkError> {
    let table = Arc::new(Table::create().map_err(failed("make a table of regions"))?);
    let mirror: Arc<dyn Mirror> = Arc::clone(&table) as Arc<dyn Mirror>;
    connection.domain.attach(Arc::clone(&mirror)).map_err(|_| LinkError::TooManyLinks)?;
    let result = grant::send(&connection.socket, connection.domain.memory(), &table)
        .and_then(|()| wait_for_end(connection));
    connection.domain.detach(&mirror);
    table.close(END_WAIT);
    result
}

fn wait_for_end(connection: &Connection) -> Result<(), LinkError> {
    let socket = &*connection.socket;
    loop {
        let deadline = Instant::now() + LOOK_AROUND;
        let readable = session::wait_readable(socket.as_fd(), deadline, LOOK_AROUND);
        if connection.is_stopped() {
            return Err(LinkError::SessionEnded);
        }
        if let Err(LinkError::TimedOut { .. }) = readable {
            continue;
        }
        let mut said = [0; GOODBYE.len()];
        match rustix::net::recv(socket, &mut said[..], rustix::net::RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(LinkError::PeerClosed),
            Ok(_) if said == GOODBYE => return Ok(()),
            Ok(_) => return Err(LinkError::PeerProtocol("unknown message")),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => return Err(LinkError::Lost(errno)),
        }
    }
}

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// Whether a socket was left behind by a process that has ended.
fn is_abandoned(address: &SocketAddrUnix) -> bool {
    socket().is_ok_and(|socket| rustix::net::connect(&socket, address) == Err(Errno::CONNREFUSED))
}

fn check_user(socket: BorrowedFd<'_>) -> Result<(), LinkError> {
    let peer = sockopt::socket_peercred(socket).map_err(failed("find the peer's user"))?.uid;
    if peer.is_root() || peer == rustix::process::geteuid() {
        Ok(())
    } else {
        Err(LinkError::OtherUser { uid: peer.as_raw() })
    }
}

fn failed(what: &'static str) -> impl Fn(Errno) -> LinkError {
    move |source| LinkError::System { what, source }
}

fn system(what: &'static str) -> impl Fn(std::io::Error) -> LinkError {
    move |error| LinkError::System { what, source: Errno::from_io_error(&error).unwrap_or(Errno::IO) }
}

/// A path that is removed on drop.
#[derive(Debug)]
struct SocketPath(PathBuf);

impl Drop for SocketPath {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
