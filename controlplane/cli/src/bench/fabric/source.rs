//! The side that writes, and the limit that it is measured beside.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use ramferry_fabric::limits::Sender;
use ramferry_fabric::{Domain, FabricKind, Link, MappedDomain, RegionKey, Rights, SessionToken, shm, tcp};
use ramferry_ram::{BlockRange, Memory};

use super::control::{Answer, Channel, DataAddress, Hello, PROGRAM, VERSION};
use super::drive::{self, Job, Keys, Share};
#[cfg(feature = "verbs")]
use super::way;
use super::way::Device;
use super::{PATIENCE, Plan};
use crate::bench::memory::{range, touched};
use crate::bench::{BenchError, Bounds};

/// Writes of the pass over all memory before anything is measured.
const WARM_BYTES: u32 = 1 << 20;

/// Links to the other side's memory.
pub(super) struct Source {
    memory: Arc<Memory>,
    keys: Keys,
    // They keep the registered memory.
    links: Vec<Box<dyn Link>>,
    device: Option<Device>,
    limit: Limit,
    // The other side ends with it.
    _control: Channel,
}

/// What the links are measured beside.
enum Limit {
    /// Plain connections, one for each link.
    Sockets(Vec<Sender>),
    /// In this process: from the same memory to another.
    Memcpy(Arc<Memory>),
}

/// One run of one case.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) messages: u64,
    pub(super) elapsed: Duration,
}

impl Source {
    /// Asks the other side, which is at `peer`, for memory, and connects to it.
    pub(super) fn connect(
        mut control: Channel,
        peer: IpAddr,
        plan: &Plan,
        bounds: &Bounds,
    ) -> Result<Self, BenchError> {
        let links = plan.links.iter().copied().max().unwrap_or(1);
        control.send(&Hello {
            program: PROGRAM.to_owned(),
            version: VERSION,
            fabric: plan.fabric.as_str().to_owned(),
            memory_bytes: plan.memory_bytes,
            links,
        })?;
        let memory = touched(plan.memory_bytes, bounds)?;
        // The other side touches as much meanwhile.
        let welcome = match control.receive(bounds.timeout(), bounds)? {
            Some(Answer::Welcome(welcome)) => welcome,
            Some(Answer::Refused(why)) => return Err(BenchError::Refused(why)),
            None => return Err(BenchError::PeerEnded),
        };
        let token = welcome.token().ok_or(BenchError::Foreign)?;
        // The plain connections first: they make the kernel find the way, if there is one.
        let limit = if plan.fabric == FabricKind::Shm {
            Limit::Memcpy(touched(plan.memory_bytes, bounds)?)
        } else {
            let address = SocketAddr::new(peer, welcome.plain_port);
            let senders = (0..links).map(|_| Sender::connect(address, &token, PATIENCE));
            Limit::Sockets(senders.collect::<Result<_, _>>()?)
        };
        let memory_range = range(0, plan.memory_bytes);
        let way = Way { data: &welcome.data, peer, token: &token, rdma_device: plan.rdma_device.as_deref() };
        let (local, links, device) = way.open(plan.fabric, &memory, memory_range, links)?;
        let keys = Keys { local, remote: RegionKey(welcome.region_key) };
        let mut source = Self { memory, keys, links, device, limit, _control: control };
        source.warm(plan, bounds)?;
        Ok(source)
    }

    /// What the limit is, in a word.
    pub(super) fn limit_name(&self) -> &'static str {
        match self.limit {
            Limit::Sockets(_) => "sockets",
            Limit::Memcpy(_) => "memcpy",
        }
    }

    /// Through which the links go, of verbs.
    pub(super) fn device(&self) -> Option<&Device> {
        self.device.as_ref()
    }

    /// Writes of `size` over so many links.
    pub(super) fn write(
        &mut self,
        links: u32,
        size: u32,
        plan: &Plan,
        bounds: &Bounds,
    ) -> Result<Run, BenchError> {
        let keys = self.keys;
        let threads = self.links.iter_mut().take(links as usize);
        at_once(threads, size, plan, bounds, |link, job| drive::write(link.as_mut(), keys, job))
    }

    /// The same of the limit.
    pub(super) fn limit(
        &mut self,
        links: u32,
        size: u32,
        plan: &Plan,
        bounds: &Bounds,
    ) -> Result<Run, BenchError> {
        let from = &*self.memory;
        match &mut self.limit {
            Limit::Sockets(senders) => {
                let threads = senders.iter_mut().take(links as usize);
                at_once(threads, size, plan, bounds, |sender, job| drive::send(sender, from, job))
            }
            Limit::Memcpy(to) => {
                let to = &**to;
                at_once(0..links, size, plan, bounds, |_, job| drive::copy(from, to, job))
            }
        }
    }

    /// Single fences on one link.
    pub(super) fn fences(
        &mut self,
        duration: Duration,
        bounds: &Bounds,
    ) -> Result<Vec<Duration>, BenchError> {
        match self.links.first_mut() {
            Some(link) => drive::fences(link.as_mut(), duration, bounds),
            None => Ok(Vec::new()),
        }
    }

    /// Round trips of a plain connection, where that is the limit.
    pub(super) fn plain_round_trips(
        &mut self,
        duration: Duration,
        bounds: &Bounds,
    ) -> Result<Vec<Duration>, BenchError> {
        match &mut self.limit {
            Limit::Sockets(senders) => match senders.first_mut() {
                Some(sender) => drive::plain_round_trips(sender, duration, bounds),
                None => Ok(Vec::new()),
            },
            Limit::Memcpy(_) => Ok(Vec::new()),
        }
    }

    /// Ends the links with a leave.
    pub(super) fn close(mut self) {
        self.links.drain(..).for_each(|link| link.close());
    }

    /// Maps on both sides what was not mapped yet.
    fn warm(&mut self, plan: &Plan, bounds: &Bounds) -> Result<(), BenchError> {
        let size = WARM_BYTES.min(u32::try_from(plan.memory_bytes).unwrap_or(u32::MAX));
        let Some(share) = Share::of(plan.memory_bytes, 0, 1, size) else { return Ok(()) };
        let job = Job { size, duration: Duration::ZERO, share, bounds };
        if let Some(link) = self.links.first_mut() {
            drive::warm(link.as_mut(), self.keys, job)?;
        }
        Ok(())
    }
}

/// Runs `work` in a thread for each of `with`, begun together.
fn at_once<T: Send>(
    with: impl ExactSizeIterator<Item = T>,
    size: u32,
    plan: &Plan,
    bounds: &Bounds,
    work: impl Fn(T, Job<'_>) -> Result<u64, BenchError> + Sync,
) -> Result<Run, BenchError> {
    let count = with.len() as u32;
    let too_small = || BenchError::Share { links: count, size: size.into(), memory: plan.memory_bytes };
    let shares = (0..count)
        .map(|index| Share::of(plan.memory_bytes, index, count, size).ok_or_else(too_small))
        .collect::<Result<Vec<_>, _>>()?;
    let (begin, work) = (&Barrier::new(with.len()), &work);
    thread::scope(|scope| {
        let threads: Vec<_> = with
            .zip(shares)
            .map(|(with, share)| {
                scope.spawn(move || {
                    let job = Job { size, duration: plan.duration, share, bounds };
                    begin.wait();
                    let started = Instant::now();
                    let messages = work(with, job)?;
                    Ok::<_, BenchError>((messages, started, Instant::now()))
                })
            })
            .collect();
        let mut ends: Vec<(u64, Instant, Instant)> = Vec::new();
        for thread in threads {
            ends.push(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        let started = ends.iter().map(|(_, started, _)| *started).min();
        let ended = ends.iter().map(|(_, _, ended)| *ended).max();
        let elapsed = started.zip(ended).map_or(Duration::ZERO, |(started, ended)| ended - started);
        Ok(Run { messages: ends.iter().map(|(messages, _, _)| messages).sum(), elapsed })
    })
}

/// Where links lead, and who may open them.
struct Way<'a> {
    data: &'a DataAddress,
    peer: IpAddr,
    token: &'a SessionToken,
    #[cfg_attr(not(feature = "verbs"), allow(dead_code, reason = "only RDMA has devices"))]
    rdma_device: Option<&'a str>,
}

type Opened = (RegionKey, Vec<Box<dyn Link>>, Option<Device>);

impl Way<'_> {
    /// Registers `whole`, which is all of `memory`, and opens so many links.
    fn open(
        &self,
        fabric: FabricKind,
        memory: &Arc<Memory>,
        whole: BlockRange,
        links: u32,
    ) -> Result<Opened, BenchError> {
        let memory = Arc::clone(memory);
        #[cfg(feature = "verbs")]
        if let (FabricKind::Verbs, DataAddress::Port(port)) = (fabric, self.data) {
            let address = SocketAddr::new(self.peer, *port);
            let domain = ramferry_verbs::domain_towards(address, self.rdma_device, memory, PATIENCE)?;
            let key = domain.register(whole, Rights::LOCAL)?.key;
            let open = |_| ramferry_verbs::connect(address, self.token, Arc::clone(&domain), PATIENCE);
            let links = (0..links).map(open).collect::<Result<_, _>>()?;
            return Ok((key, links, Some(way::device(domain.device_name()))));
        }
        let domain = Arc::new(MappedDomain::new(memory)?);
        let key = domain.register(whole, Rights::LOCAL)?.key;
        let open = |_| {
            let domain = Arc::clone(&domain);
            Ok(match (fabric, self.data) {
                (FabricKind::Tcp, DataAddress::Port(port)) => {
                    tcp::connect(SocketAddr::new(self.peer, *port), self.token, domain, PATIENCE)?
                }
                (FabricKind::Shm, DataAddress::Path(path)) if path.is_absolute() => {
                    shm::connect(path, self.token, domain, PATIENCE)?
                }
                _ => return Err(BenchError::Foreign),
            })
        };
        Ok((key, (0..links).map(open).collect::<Result<_, _>>()?, None))
    }
}
