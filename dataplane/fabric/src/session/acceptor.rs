use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use super::{Admission, Service, Session, Sessions, timespec};
use crate::hello::{self, HELLO_BYTES, HelloError, Verdict};
use crate::{LinkError, MappedDomain, SessionToken};

/// Connections that have not presented a token yet, at most. One more ends the
/// oldest of them, so that idle strangers cannot keep a peer out.
const MAX_STRANGERS: usize = 64;
/// How long a connection may take to present its token.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections accepted before those already there get a turn.
const ACCEPTS_AT_ONCE: usize = 16;
/// Pause after the kernel refused to accept, as when there are too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listening socket and the one thread that accepts from it.
#[derive(Debug)]
pub(crate) struct Acceptor {
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    sessions: Arc<Sessions>,
}

impl Acceptor {
    /// Accepts from `listener`, which is listening and non-blocking.
    pub(crate) fn start(listener: OwnedFd, service: Service) -> Result<Self, LinkError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|source| LinkError::System { what: "make an event descriptor", source })?;
        let wake = Arc::new(wake);
        let sessions = Arc::new(Sessions::default());
        let accepting = Accepting {
            listener,
            wake: Arc::clone(&wake),
            sessions: Arc::clone(&sessions),
            service,
            strangers: Vec::new(),
        };
        let thread = thread::Builder::new()
            .name(format!("{}-acceptor", service.kind))
            .spawn(move || accepting.run())
            .map_err(|error| LinkError::System {
                what: "start the acceptor thread",
                source: Errno::from_io_error(&error).unwrap_or(Errno::AGAIN),
            })?;
        Ok(Self { wake, thread: Some(thread), sessions })
    }

    pub(crate) fn admit(&self, token: SessionToken, domain: Arc<MappedDomain>, links: u32) -> Admission {
        let session = Arc::new(Session::new(token, domain, links));
        self.sessions.lock().push(Arc::clone(&session));
        Admission { session, sessions: Arc::clone(&self.sessions) }
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        // An eventfd's counter takes a one always, short of 2^64 of them.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A connection that has not presented a token yet.
struct Stranger {
    socket: OwnedFd,
    deadline: Instant,
    hello: [u8; HELLO_BYTES],
    filled: usize,
}

enum Heard {
    More,
    Hello,
    End,
}

struct Accepting {
    listener: OwnedFd,
    wake: Arc<OwnedFd>,
    sessions: Arc<Sessions>,
    service: Service,
    /// The oldest first.
    strangers: Vec<Stranger>,
}

impl Accepting {
    fn run(mut self) {
        let mut paused_until: Option<Instant> = None;
        loop {
            let now = Instant::now();
            if paused_until.is_some_and(|until| until <= now) {
                paused_until = None;
            }
            let next = self.strangers.iter().map(|stranger| stranger.deadline).chain(paused_until).min();
            let timeout = next.map(|next| timespec(next.saturating_duration_since(now)));
            if self.wait(paused_until.is_some(), timeout.as_ref()) {
                return;
            }
            self.hear_strangers();
            if paused_until.is_none() && self.accept().is_err() {
                paused_until = Some(Instant::now() + ACCEPT_PAUSE);
            }
        }
    }

    /// Sleeps until there is something to do; whether that is to end.
    fn wait(&self, paused: bool, timeout: Option<&rustix::event::Timespec>) -> bool {
        let mut fds = Vec::with_capacity(self.strangers.len() + 2);
        fds.push(PollFd::new(&self.wake, PollFlags::IN));
        fds.extend(self.strangers.iter().map(|stranger| PollFd::new(&stranger.socket, PollFlags::IN)));
        if !paused {
            fds.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::INTR) => {}
            // Out of memory, say: everything is tried once more, a little later.
            Err(_) => thread::sleep(ACCEPT_PAUSE),
        }
        fds[0].revents().contains(PollFlags::IN)
    }

    fn accept(&mut self) -> Result<(), Errno> {
        for _ in 0..ACCEPTS_AT_ONCE {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR | Errno::CONNABORTED | Errno::PROTO) => continue,
                Err(errno) => {
                    tracing::warn!(fabric = self.service.kind.as_str(), %errno, "cannot accept a link");
                    return Err(errno);
                }
            };
            if let Err(error) = (self.service.screen)(socket.as_fd()) {
                tracing::warn!(fabric = self.service.kind.as_str(), %error, "a connection was refused");
                continue;
            }
            if self.strangers.len() == MAX_STRANGERS {
                self.strangers.remove(0);
            }
            let deadline = Instant::now() + HELLO_TIMEOUT;
            self.strangers.push(Stranger { socket, deadline, hello: [0; HELLO_BYTES], filled: 0 });
        }
        self.hear_strangers();
        Ok(())
    }

    /// Reads what strangers say, and judges those that have said all.
    fn hear_strangers(&mut self) {
        let now = Instant::now();
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.hear() {
                Heard::Hello => self.judge(stranger),
                Heard::More if stranger.deadline > now => self.strangers.push(stranger),
                Heard::More | Heard::End => {}
            }
        }
    }

    fn judge(&self, stranger: Stranger) {
        let refuse = |stranger: &Stranger, verdict| {
            reply(stranger.socket.as_fd(), verdict);
        };
        let token = match hello::decode_hello(&stranger.hello, self.service.kind) {
            Ok(token) => token,
            Err(HelloError::Foreign) => return,
            Err(HelloError::Version) => return refuse(&stranger, Verdict::Version),
        };
        let Some(session) = self.sessions.find(&token) else {
            return refuse(&stranger, Verdict::UnknownSession);
        };
        let Ok(spare) = stranger.socket.try_clone() else { return };
        let started = session.start(stranger.socket, self.service, |socket| reply(socket, Verdict::Welcome));
        match started {
            Ok(()) => {}
            Err(LinkError::TooManyLinks) => {
                reply(spare.as_fd(), Verdict::TooManyLinks);
            }
            Err(LinkError::UnknownSession) => {
                reply(spare.as_fd(), Verdict::UnknownSession);
            }
            Err(error) => {
                tracing::warn!(fabric = self.service.kind.as_str(), %error, "cannot serve a link");
            }
        }
    }
}

impl Stranger {
    fn hear(&mut self) -> Heard {
        while self.filled < HELLO_BYTES {
            match rustix::net::recv(&self.socket, &mut self.hello[self.filled..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Heard::End,
                Ok((_, received)) => self.filled += received,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Heard::More,
                Err(_) => return Heard::End,
            }
        }
        Heard::Hello
    }
}

/// Whether a socket that was never written to took a reply, which it does
/// unless the peer has left.
fn reply(socket: std::os::fd::BorrowedFd<'_>, verdict: Verdict) -> bool {
    let reply = hello::encode_reply(verdict);
    rustix::net::send(socket, &reply, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) == Ok(reply.len())
}
