use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ramferry_fabric::hello::{self, HELLO_BYTES, HelloError, Verdict};
use ramferry_fabric::{FabricKind, HardwareFault, LinkError, SessionToken};
use ramferry_ram::Memory;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::cm::{Event, EventChannel, EventKind, Identifier};
use crate::device::Device;
use crate::domain::VerbsDomain;
use crate::os;
use crate::session::{Admission, NotServed, Sessions};

/// Connections that the kernel holds until they are judged.
const BACKLOG: i32 = 128;
/// How often the accepting thread looks around where nothing wakes it.
const LOOK_AROUND: Duration = Duration::from_secs(60);
/// Pause after the kernel refused to tell of connections.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts the links of all sessions of an agent, over one device. Sessions that
/// were admitted keep their links when it is dropped.
#[derive(Debug)]
pub struct Listener {
    sessions: Arc<Sessions>,
    device: Arc<Held>,
    device_name: String,
    local_addr: SocketAddr,
    failure: Arc<Mutex<Option<LinkError>>>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// The device, until it is removed: whoever removes it waits until nobody has it open.
type Held = Mutex<Option<Arc<Device>>>;

impl Listener {
    /// Listens at `addr`, which is of an RDMA interface; port 0 lets the connection
    /// manager choose. With `device`, it must be that device's.
    ///
    /// # Errors
    /// When this host has no RDMA device, the address is of none or of another, or
    /// cannot be had.
    pub fn bind(addr: SocketAddr, device: Option<&str>) -> Result<Self, LinkError> {
        let system = |what| move |source| LinkError::System { what, source };
        let channel = EventChannel::new()?;
        let listening =
            Identifier::new(&channel).map_err(system("make an identifier of the connection manager"))?;
        let not_reached = || LinkError::NotReached { address: addr.to_string() };
        listening.bind(addr).map_err(|errno| match errno {
            Errno::NODEV | Errno::ADDRNOTAVAIL => not_reached(),
            source => LinkError::System { what: "listen at the RDMA data address", source },
        })?;
        // One bound to every address is bound to no device, and has no domain.
        let local_addr = listening.local_addr().filter(|_| listening.context().is_some());
        let local_addr = local_addr.ok_or_else(not_reached)?;
        let found = Device::of(&listening, local_addr.ip())?;
        if let Some(asked) = device.filter(|asked| *asked != found.name()) {
            let (asked, address, found) = (asked.to_owned(), addr.to_string(), found.name().to_owned());
            return Err(LinkError::OtherDevice { asked, address, found });
        }
        listening.listen(BACKLOG).map_err(system("listen at the RDMA data address"))?;
        let local_addr = listening.local_addr().unwrap_or(local_addr);
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(system("make an event descriptor"))?;
        let (wake, sessions, failure) = (Arc::new(wake), Arc::new(Sessions::default()), Arc::default());
        let device_name = found.name().to_owned();
        let device = Arc::new(Mutex::new(Some(found)));
        let accepting = Accepting {
            _listening: listening,
            channel,
            wake: Arc::clone(&wake),
            sessions: Arc::clone(&sessions),
            device: Arc::clone(&device),
            device_name: device_name.clone(),
            failure: Arc::clone(&failure),
        };
        let builder = thread::Builder::new().name("verbs-acceptor".to_owned());
        let thread = builder.spawn(move || accepting.run()).map_err(|error| LinkError::System {
            what: "start the acceptor thread",
            source: Errno::from_io_error(&error).unwrap_or(Errno::AGAIN),
        })?;
        Ok(Self { sessions, device, device_name, local_addr, failure, wake, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Name of the device.
    pub fn device(&self) -> &str {
        &self.device_name
    }

    /// Why it accepts nothing any more, if so: its device was removed. Then another is to be bound.
    pub fn failure(&self) -> Option<LinkError> {
        lock(&self.failure).clone()
    }

    /// Registered memory of one session, in a protection domain of its own.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn domain(&self, memory: Arc<Memory>) -> Result<Arc<VerbsDomain>, LinkError> {
        let device = lock(&self.device).clone();
        let device = device.ok_or_else(|| self.failure().unwrap_or(LinkError::SessionEnded))?;
        VerbsDomain::new(device, self.local_addr.ip(), memory)
    }

    /// Serves connections that present `token` into `domain`, at most `links` at
    /// once, for as long as the admission lives.
    pub fn admit(&self, token: SessionToken, domain: Arc<VerbsDomain>, links: u32) -> Admission {
        self.sessions.admit(token, domain, links)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // An eventfd's counter takes a one always, short of 2^64 of them.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Accepting {
    _listening: Identifier,
    channel: Arc<EventChannel>,
    wake: Arc<OwnedFd>,
    sessions: Arc<Sessions>,
    device: Arc<Held>,
    device_name: String,
    failure: Arc<Mutex<Option<LinkError>>>,
}

impl Accepting {
    fn run(self) {
        loop {
            match self.channel.next() {
                Ok(Some(event)) if event.kind == EventKind::DeviceRemoval && event.request.is_none() => {
                    let error = LinkError::Hardware {
                        device: self.device_name.clone(),
                        fault: HardwareFault::DeviceRemoved,
                    };
                    tracing::error!(%error, "no more links are accepted");
                    *lock(&self.failure) = Some(error);
                    lock(&self.device).take();
                    return;
                }
                Ok(Some(event)) => self.judge(event),
                Ok(None) => {
                    if os::wait_readable(&[self.channel.fd(), self.wake.as_fd()], LOOK_AROUND).is_err() {
                        thread::sleep(PAUSE);
                    }
                }
                Err(errno) => {
                    tracing::warn!(fabric = "verbs", %errno, "cannot accept a link");
                    thread::sleep(PAUSE);
                }
            }
            if rustix::io::read(&*self.wake, &mut [0; 8]).is_ok() {
                return;
            }
        }
    }

    fn judge(&self, event: Event) {
        let Event { private_data, request: Some(request), .. } = event else { return };
        // The fabric may have filled it up with zeros.
        let hello: Option<&[u8; HELLO_BYTES]> = private_data.first_chunk();
        let token = hello.map(|hello| hello::decode_hello(hello, FabricKind::Verbs));
        let token = match token {
            Some(Ok(token)) => token,
            Some(Err(HelloError::Version)) => return refuse(&request, Some(Verdict::Version)),
            Some(Err(HelloError::Foreign)) | None => return refuse(&request, None),
        };
        let Some(session) = self.sessions.find(&token) else {
            return refuse(&request, Some(Verdict::UnknownSession));
        };
        if !session.domain().device().context().is_of(&request) {
            tracing::warn!(peer = ?request.peer_addr(), "a link came over another device than its session's");
            return refuse(&request, None);
        }
        if let Err(refused) = session.start(request) {
            let NotServed(error, request) = *refused;
            let verdict = match &error {
                LinkError::UnknownSession => Some(Verdict::UnknownSession),
                LinkError::TooManyLinks => Some(Verdict::TooManyLinks),
                _ => {
                    tracing::warn!(fabric = "verbs", %error, "cannot serve a link");
                    None
                }
            };
            refuse(&request, verdict);
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rejects a connection, with the reason where the peer is one of ours.
fn refuse(request: &Identifier, verdict: Option<Verdict>) {
    let reply = verdict.map(hello::encode_reply);
    let reply = reply.as_ref().map_or(&[][..], |reply| reply);
    if let Err(errno) = request.reject(reply) {
        tracing::debug!(%errno, "a connection could not be rejected");
    }
}
