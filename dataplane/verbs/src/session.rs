//! Who is admitted, and the threads that serve them.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use ramferry_fabric::{LinkError, SessionToken};
use rustix::io::Errno;

use crate::cm::Identifier;
use crate::device::Signal;
use crate::domain::VerbsDomain;
use crate::served;

/// Peers that present a session's token are served while this lives. Dropping
/// it ends their connections and returns when nothing can be placed any more.
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
    pub(crate) fn admit(
        self: &Arc<Self>,
        token: SessionToken,
        domain: Arc<VerbsDomain>,
        links: u32,
    ) -> Admission {
        let session = Arc::new(Session { token, domain, links, state: Mutex::default() });
        self.lock().push(Arc::clone(&session));
        Admission { session, sessions: Arc::clone(self) }
    }

    /// Compares with every session's token, so that the time taken tells nothing.
    pub(crate) fn find(&self, token: &SessionToken) -> Option<Arc<Session>> {
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

pub(crate) struct Session {
    token: SessionToken,
    domain: Arc<VerbsDomain>,
    links: u32,
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
    /// Raised to end it.
    signal: Arc<Signal>,
    thread: JoinHandle<()>,
}

/// Why a connection is not served, and that connection.
pub(crate) struct NotServed(pub(crate) LinkError, pub(crate) Identifier);

impl Session {
    pub(crate) fn domain(&self) -> &Arc<VerbsDomain> {
        &self.domain
    }

    /// Serves a connection that was asked for on a thread of its own.
    pub(crate) fn start(self: &Arc<Self>, request: Identifier) -> Result<(), Box<NotServed>> {
        let mut state = self.state();
        let refused = |error, request| Err(Box::new(NotServed(error, request)));
        if state.ended {
            return refused(LinkError::UnknownSession, request);
        }
        state.served.retain(|served| !served.thread.is_finished());
        if state.served.len() >= self.links as usize {
            return refused(LinkError::TooManyLinks, request);
        }
        let signal = match Signal::new() {
            Ok(signal) => signal,
            Err(error) => return refused(error, request),
        };
        // What a thread that cannot be started was to have comes back this way.
        let handed = Arc::new(Mutex::new(Some(request)));
        let (session, taken, told) = (Arc::clone(self), Arc::clone(&handed), Arc::clone(&signal));
        let body = move || {
            let request = taken.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(request) = request {
                session.serve(request, &told);
            }
        };
        match thread::Builder::new().name("verbs-receiver".to_owned()).spawn(body) {
            Ok(thread) => state.served.push(Served { signal, thread }),
            Err(error) => {
                let source = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
                let error = LinkError::System { what: "start a receiver thread", source };
                if let Some(request) = handed.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    return refused(error, request);
                }
            }
        }
        Ok(())
    }

    fn serve(&self, request: Identifier, signal: &Arc<Signal>) {
        if let Err(error) = served::serve(request, &self.domain, signal)
            && error != LinkError::SessionEnded
        {
            tracing::warn!(fabric = "verbs", %error, "a link of a session failed");
            self.state().failure.get_or_insert(error);
        }
    }

    /// Ends every connection and waits for their threads, which look at once.
    fn end(&self) {
        let served = {
            let mut state = self.state();
            state.ended = true;
            std::mem::take(&mut state.served)
        };
        served.iter().for_each(|served| served.signal.raise(LinkError::SessionEnded));
        for Served { thread, .. } in served {
            // A receiver that panicked has ended its connection too.
            let _ = thread.join();
        }
    }

    fn state(&self) -> MutexGuard<'_, SessionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
