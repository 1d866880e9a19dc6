//! The side that writes, and the limit that it is measured beside.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use ramferry_fabric::limits::Sender;
use ramferry_fabric::{Domain, FabricKind, Link, MappedDomain, RegionKey, Rights, SessionToken, shm, tcp};
use ramferry_ram::Memory;

use super::control::{Answer, Channel, DataAddress, Hello, PROGRAM, VERSION};
use super::drive::{self, Job, Keys, Share};
use super::{PATIENCE, Plan};
use crate::bench::memory::{range, touched};
use crate::bench::{BenchError, Bounds};

/// Writes of the pass over all memory before anything is measured.
const WARM_BYTES: u32 = 1 << 20;

/// Links to the other side's memory.
pub(super) struct Source {
    memory: Arc<Memory>,
    keys: Keys,
    links: Vec<Box<dyn Link>>,
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
        let domain = Arc::new(MappedDomain::new(Arc::clone(&memory))?);
        let local = domain.register(range(0, plan.memory_bytes), Rights::LOCAL)?;
        let keys = Keys { local: local.key, remote: RegionKey(welcome.region_key) };
        let count = 0..links;
        let links = count
            .clone()
            .map(|_| connect(plan.fabric, &welcome.data, peer, &token, &domain))
            .collect::<Result<Vec<_>, _>>()?;
        let limit = if plan.fabric == FabricKind::Shm {
            Limit::Memcpy(touched(plan.memory_bytes, bounds)?)
        } else {
            let address = SocketAddr::new(peer, welcome.plain_port);
            let senders = count.map(|_| Sender::connect(address, &token, PATIENCE));
            Limit::Sockets(senders.collect::<Result<_, _>>()?)
        };
        let mut source = Self { memory, keys, links, limit, _control: control };
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

fn connect(
    fabric: FabricKind,
    data: &DataAddress,
    peer: IpAddr,
    token: &SessionToken,
    domain: &Arc<MappedDomain>,
) -> Result<Box<dyn Link>, BenchError> {
    let domain = Arc::clone(domain);
    let link = match (fabric, data) {
        (FabricKind::Tcp, DataAddress::Port(port)) => {
            tcp::connect(SocketAddr::new(peer, *port), token, domain, PATIENCE)
        }
        (FabricKind::Shm, DataAddress::Path(path)) if is_socket_path(path) => {
            shm::connect(path, token, domain, PATIENCE)
        }
        _ => return Err(BenchError::Foreign),
    };
    Ok(link?)
}

/// Whether what the other side named can be a socket's path.
fn is_socket_path(path: &Path) -> bool {
    path.is_absolute()
}
