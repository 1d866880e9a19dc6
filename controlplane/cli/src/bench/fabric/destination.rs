//! The side that is written to.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ramferry_fabric::{
    Admission, Domain, FabricKind, LinkError, MappedDomain, RegionKey, Rights, SessionToken, limits, shm, tcp,
};
use ramferry_ram::Memory;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tempfile::TempDir;

use super::control::{Answer, Channel, DataAddress, Hello, PROGRAM, VERSION, Welcome};
use super::way::FABRICS;
use super::{MOST_LINKS, random_token};
use crate::bench::memory::{range, touched};
use crate::bench::{BenchError, Bounds};
use crate::failure::chain;
use crate::output::bytes;

/// How long a client may take to say what it wants.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at whether to go on.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// What a client got.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) fabric: FabricKind,
    pub(super) memory_bytes: u64,
    /// Where this side takes part in placing.
    pub(super) placed_bytes: Option<u64>,
    /// Why a link ended other than by the client's leave.
    pub(super) failure: Option<LinkError>,
}

/// What a client may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Offer<'a> {
    /// This host's address that it connected to.
    pub(super) local: IpAddr,
    pub(super) most_bytes: u64,
    /// Where the address does not tell.
    #[cfg_attr(not(feature = "verbs"), allow(dead_code, reason = "only RDMA has devices"))]
    pub(super) rdma_device: Option<&'a str>,
}

/// Serves the client at the other end of `channel`; `begun` hears when it was let
/// in. `None` where that was no client.
pub(super) fn serve(
    channel: &mut Channel,
    offer: &Offer<'_>,
    bounds: &Bounds,
    begun: impl FnOnce(FabricKind),
) -> Result<Option<Served>, BenchError> {
    let hello = match channel.receive::<Hello>(HELLO_PATIENCE, bounds) {
        Ok(Some(hello)) => hello,
        Ok(None) | Err(BenchError::Foreign | BenchError::PeerEnded) => return Ok(None),
        Err(error) => return Err(error),
    };
    let prepared =
        judge(&hello, offer.most_bytes).and_then(|fabric| Destination::new(&hello, fabric, offer, bounds));
    let destination = match prepared {
        Ok(destination) => destination,
        Err(error) => {
            // The client may have gone; what is wrong is told here too.
            let told = match &error {
                BenchError::Refused(why) => why.clone(),
                other => chain(other),
            };
            let _ = channel.send(&Answer::Refused(told));
            return Err(error);
        }
    };
    channel.send(&Answer::Welcome(destination.welcome()))?;
    begun(destination.fabric);
    let result = channel.wait_for_end(bounds);
    let served = destination.served();
    result.map(|()| Some(served))
}

fn judge(hello: &Hello, most_bytes: u64) -> Result<FabricKind, BenchError> {
    let refused = |why: String| Err(BenchError::Refused(why));
    if hello.program != PROGRAM || hello.version != VERSION {
        return refused(format!("this side speaks version {VERSION}, the client {}", hello.version));
    }
    if hello.links == 0 || hello.links > MOST_LINKS {
        return refused(format!("{} links were asked for, {MOST_LINKS} are the most", hello.links));
    }
    if hello.memory_bytes == 0 || hello.memory_bytes > most_bytes {
        return refused(format!(
            "{} of memory were asked for, this side gives {}: give both sides the same --memory",
            bytes(hello.memory_bytes),
            bytes(most_bytes)
        ));
    }
    match FABRICS.iter().copied().find(|kind| kind.as_str() == hello.fabric) {
        Some(kind) => Ok(kind),
        None => refused(format!("this side has no fabric {:?}", hello.fabric)),
    }
}

/// Memory, all of it registered, and who is served there.
struct Destination {
    fabric: FabricKind,
    token: SessionToken,
    region_key: RegionKey,
    data: DataAddress,
    memory_bytes: u64,
    plain: PlainServer,
    serving: Serving,
}

/// In each, the links end before their listener.
enum Serving {
    Tcp {
        admission: Admission,
        _listener: tcp::Listener,
    },
    // The socket is removed before its directory.
    Shm {
        admission: Admission,
        _listener: shm::Listener,
        _directory: TempDir,
    },
    #[cfg(feature = "verbs")]
    Verbs {
        admission: ramferry_verbs::Admission,
        _listener: ramferry_verbs::Listener,
    },
}

impl Destination {
    fn new(
        hello: &Hello,
        fabric: FabricKind,
        offer: &Offer<'_>,
        bounds: &Bounds,
    ) -> Result<Self, BenchError> {
        let memory_bytes = hello.memory_bytes;
        let memory = touched(memory_bytes, bounds)?;
        let token = random_token()?;
        let plain = PlainServer::start(offer.local, token.clone(), Arc::clone(&memory), bounds.timeout())?;
        let (region_key, data, serving) = match fabric {
            FabricKind::Shm => serve_shm(memory, &token, hello.links)?,
            #[cfg(feature = "verbs")]
            FabricKind::Verbs => serve_verbs(memory, &token, hello.links, offer)?,
            _ => serve_tcp(memory, &token, hello.links, offer)?,
        };
        Ok(Self { fabric, token, region_key, data, memory_bytes, plain, serving })
    }

    fn welcome(&self) -> Welcome {
        Welcome::new(&self.token, self.region_key.0, self.data.clone(), self.plain.port)
    }

    fn served(&self) -> Served {
        let (placed_bytes, failure) = match &self.serving {
            Serving::Tcp { admission, .. } => (Some(admission.placed_bytes()), admission.failure()),
            Serving::Shm { admission, .. } => (None, admission.failure()),
            #[cfg(feature = "verbs")]
            Serving::Verbs { admission, .. } => (None, admission.failure()),
        };
        Served { fabric: self.fabric, memory_bytes: self.memory_bytes, placed_bytes, failure }
    }
}

type Begun = (RegionKey, DataAddress, Serving);

fn serve_tcp(
    memory: Arc<Memory>,
    token: &SessionToken,
    links: u32,
    offer: &Offer<'_>,
) -> Result<Begun, BenchError> {
    let listener = tcp::Listener::bind(SocketAddr::new(offer.local, 0))?;
    let domain = Arc::new(MappedDomain::new(memory)?);
    let key = register_all(&*domain, domain.memory())?;
    let admission = listener.admit(token.clone(), domain, links);
    let data = DataAddress::Port(listener.local_addr().port());
    Ok((key, data, Serving::Tcp { admission, _listener: listener }))
}

fn serve_shm(memory: Arc<Memory>, token: &SessionToken, links: u32) -> Result<Begun, BenchError> {
    let directory = tempfile::Builder::new()
        .prefix("ramferry-bench")
        .tempdir()
        .map_err(BenchError::system("make a directory for a socket"))?;
    let listener = shm::Listener::bind(&directory.path().join("data"))?;
    let domain = Arc::new(MappedDomain::reached_by_peer(memory)?);
    let key = register_all(&*domain, domain.memory())?;
    let admission = listener.admit(token.clone(), domain, links);
    let data = DataAddress::Path(listener.path().to_owned());
    Ok((key, data, Serving::Shm { admission, _listener: listener, _directory: directory }))
}

#[cfg(feature = "verbs")]
fn serve_verbs(
    memory: Arc<Memory>,
    token: &SessionToken,
    links: u32,
    offer: &Offer<'_>,
) -> Result<Begun, BenchError> {
    let listener = ramferry_verbs::Listener::bind(SocketAddr::new(offer.local, 0), offer.rdma_device)?;
    let domain = listener.domain(memory)?;
    let key = register_all(&*domain, domain.memory())?;
    let admission = listener.admit(token.clone(), domain, links);
    let data = DataAddress::Port(listener.local_addr().port());
    Ok((key, data, Serving::Verbs { admission, _listener: listener }))
}

/// One region of all of the memory, for the client to write to.
fn register_all(domain: &dyn Domain, memory: &Memory) -> Result<RegionKey, BenchError> {
    Ok(domain.register(range(0, memory.layout().total_bytes()), Rights::REMOTE_WRITE)?.key)
}

/// Answers the plain sockets that fabrics are measured beside.
struct PlainServer {
    port: u16,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl PlainServer {
    fn start(
        local: IpAddr,
        token: SessionToken,
        memory: Arc<Memory>,
        patience: Duration,
    ) -> Result<Self, BenchError> {
        let failed = BenchError::system("listen for plain sockets");
        let listener = TcpListener::bind(SocketAddr::new(local, 0)).map_err(&failed)?;
        listener.set_nonblocking(true).map_err(&failed)?;
        let port = listener.local_addr().map_err(&failed)?.port();
        let ended = Arc::new(AtomicBool::new(false));
        let accepting = Arc::clone(&ended);
        let thread = thread::Builder::new()
            .name("bench-plain".into())
            .spawn(move || accept_plain(&listener, &token, &memory, patience, &accepting))
            .map_err(BenchError::system("start a thread"))?;
        Ok(Self { port, ended, thread: Some(thread) })
    }
}

impl Drop for PlainServer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say but that it panicked, which stderr has.
            let _ = thread.join();
        }
    }
}

fn accept_plain(
    listener: &TcpListener,
    token: &SessionToken,
    memory: &Memory,
    patience: Duration,
    ended: &AtomicBool,
) {
    thread::scope(|scope| {
        let mut served: Vec<(TcpStream, thread::ScopedJoinHandle<'_, ()>)> = Vec::new();
        while !ended.load(Ordering::Relaxed) {
            served.retain(|(_, thread)| !thread.is_finished());
            let Some((socket, _)) = accept(listener) else { continue };
            let Ok(again) = socket.try_clone() else { continue };
            if socket.set_nonblocking(false).is_err() || served.len() >= MOST_LINKS as usize {
                continue;
            }
            // What goes wrong, the client sees.
            let thread = scope.spawn(move || drop(limits::serve(socket, token, memory, patience)));
            served.push((again, thread));
        }
        for (socket, _) in &served {
            // Its thread sees an end, if it was not at one already.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    });
}

/// The next connection, if one comes soon.
pub(super) fn accept(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    let soon = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK_INTERVAL.subsec_nanos()) };
    match poll(&mut fds, Some(&soon)) {
        Ok(0) | Err(Errno::INTR) => None,
        Ok(_) => listener.accept().ok(),
        // Out of memory, say: it is tried again, a little later.
        Err(_) => {
            thread::sleep(LOOK_INTERVAL);
            None
        }
    }
}
