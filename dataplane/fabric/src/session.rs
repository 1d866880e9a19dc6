//! Who may connect: the hello with the session's token, and what is served to
//! those who presented one that is admitted.

mod acceptor;
mod greeting;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::net::Shutdown;

use crate::{FabricKind, LinkError, MappedDomain, SessionToken};

pub(crate) use acceptor::Acceptor;
pub(crate) use greeting::{greet, wait_readable};

/// How one fabric serves its connections.
#[derive(Clone, Copy)]
pub(crate) struct Service {
    pub(crate) kind: FabricKind,
    /// Judges and configures a connection before it has said anything.
    pub(crate) screen: fn(BorrowedFd<'_>) -> Result<(), LinkError>,
    /// Serves a connection until it ends. Well when the peer took leave.
    pub(crate) serve: fn(&Connection) -> Result<(), LinkError>,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Service({})", self.kind)
    }
}

/// A connection of an admitted peer.
pub(crate) struct Connection {
    pub(crate) socket: Arc<OwnedFd>,
    pub(crate) domain: Arc<MappedDomain>,
    session: Arc<Session>,
}

impl Connection {
    /// The one connection of a session that nobody else knows.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn alone(socket: OwnedFd, domain: Arc<MappedDomain>) -> Result<Self, getrandom::Error> {
        let session = Arc::new(Session::new(SessionToken::random()?, Arc::clone(&domain), 1));
        Ok(Self { socket: Arc::new(socket), domain, session })
    }

    #[cfg(feature = "fuzzing")]
    pub(crate) fn placed_bytes(&self) -> u64 {
        self.session.placed_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.session.stopped.load(Ordering::Relaxed)
    }

    pub(crate) fn count_placed(&self, bytes: u32) {
        self.session.placed_bytes.fetch_add(u64::from(bytes), Ordering::Relaxed);
    }
}

/// Peers that present a session's token are served while this lives. Dropping
/// it ends their connections and returns when nothing is placed any more.
pub struct Admission {
    session: Arc<Session>,
    sessions: Arc<Sessions>,
}

impl Admission {
    /// The first failure of one of the session's connections: a peer that
    /// vanished, broke the protocol, or asked for what it may not have.
    pub fn failure(&self) -> Option<LinkError> {
        self.session.state().failure.clone()
    }

    /// Connections being served now.
    pub fn connections(&self) -> usize {
        self.session.state().served.iter().filter(|served| !served.thread.is_finished()).count()
    }

    /// Bytes that peers wrote and that are placed, as far as this side takes
    /// part in placing them (shm: never).
    pub fn placed_bytes(&self) -> u64 {
        self.session.placed_bytes.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission").field("links", &self.session.links).finish_non_exhaustive()
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.sessions.remove(&self.session);
        self.session.end();
    }
}

/// The sessions admitted at one listener.
#[derive(Default)]
pub(crate) struct Sessions(Mutex<Vec<Arc<Session>>>);

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sessions({})", self.lock().len())
    }
}

impl Sessions {
    /// Compares with every session's token, so that the time taken tells nothing.
    fn find(&self, token: &SessionToken) -> Option<Arc<Session>> {
        let mut found = None;
        for session in self.lock().iter() {
            if session.token == *token {
                found = Some(Arc::clone(session));
            }
        }
        found
    }

    fn remove(&self, session: &Arc<Session>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, session));
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Session>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Session {
    token: SessionToken,
    domain: Arc<MappedDomain>,
    links: u32,
    stopped: AtomicBool,
    placed_bytes: AtomicU64,
    state: Mutex<SessionState>,
}

#[derive(Default)]
struct SessionState {
    /// Nothing is served any more.
    ended: bool,
    served: Vec<Served>,
    failure: Option<LinkError>,
}

struct Served {
    socket: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

impl Session {
    fn new(token: SessionToken, domain: Arc<MappedDomain>, links: u32) -> Self {
        Self {
            token,
            domain,
            links,
            stopped: AtomicBool::new(false),
            placed_bytes: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, SessionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a connection on a thread of its own. `welcome` is called once it is
    /// certain that it will be.
    fn start(
        self: &Arc<Self>,
        socket: OwnedFd,
        service: Service,
        welcome: impl FnOnce(BorrowedFd<'_>) -> bool,
    ) -> Result<(), LinkError> {
        let mut state = self.state();
        if state.ended {
            return Err(LinkError::UnknownSession);
        }
        state.served.retain(|served| !served.thread.is_finished());
        if state.served.len() >= self.links as usize {
            return Err(LinkError::TooManyLinks);
        }
        let socket = Arc::new(socket);
        let connection = Connection {
            socket: Arc::clone(&socket),
            domain: Arc::clone(&self.domain),
            session: Arc::clone(self),
        };
        if !welcome(socket.as_fd()) {
            return Err(LinkError::PeerClosed);
        }
        let thread = thread::Builder::new()
            .name(format!("{}-receiver", service.kind))
            .spawn(move || connection.run(service))
            .map_err(|error| LinkError::System {
                what: "start a receiver thread",
                source: rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::AGAIN),
            })?;
        state.served.push(Served { socket, thread });
        Ok(())
    }

    /// Ends every connection and waits for their threads, which see a socket
    /// that was shut down at once.
    fn end(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        let served = {
            let mut state = self.state();
            state.ended = true;
            std::mem::take(&mut state.served)
        };
        for Served { socket, .. } in &served {
            // Fails only when the peer has closed it already.
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        }
        for Served { thread, .. } in served {
            // A receiver that panicked has ended its connection too.
            let _ = thread.join();
        }
    }
}

impl Connection {
    fn run(self, service: Service) {
        let result = (service.serve)(&self);
        // The peer sees the end before this side reports it.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        if let Err(error) = result
            && !self.is_stopped()
        {
            tracing::warn!(fabric = service.kind.as_str(), error = %error, "a link of a session failed");
            self.session.state().failure.get_or_insert(error);
        }
    }
}

/// What is left until `deadline`, for a call of the kernel.
pub(crate) fn remaining(deadline: Instant) -> Timespec {
    timespec(deadline.saturating_duration_since(Instant::now()))
}

pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
