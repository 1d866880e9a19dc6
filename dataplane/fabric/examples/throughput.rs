//! What the fabrics reach on this host: 1 GiB in writes of 1 MiB (or what the
//! arguments say: MiB to move, KiB a write), against what the host can do.
//!
//! fresh: the destination's memory was never touched before, and the references
//! allocate it as they go; fresh+reg: with the registration, in which a fabric
//! allocates it (one window after the other here; a migration overlaps it with the
//! copy); touched: the same once more, copy only. cpu: of all threads in that copy.
//! Ratios are of touched.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramferry_fabric::{
    Domain, Link, MappedDomain, OpId, Place, PostError, Region, Rights, SessionToken, limits, shm, tcp,
};
use ramferry_ram::{Access, Block, BlockIndex, BlockRange, Layout, Memory, RamFile};
use rustix::fs::MemfdFlags;

const WINDOW_BYTES: u64 = 64 << 20;
/// How often a link is polled while there is more to post, as a copying thread does.
const POLL_EVERY_BYTES: u64 = 1 << 20;
const REPEATS: usize = 3;

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[derive(Clone, Copy)]
struct Size {
    total: u64,
    chunk: u32,
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let total = arguments.next().map_or(Ok(1024), |mib| mib.parse::<u64>())? << 20;
    let chunk = arguments.next().map_or(Ok(1024), |kib| kib.parse::<u32>())? << 10;
    let size = Size { total, chunk };
    let cases: [(&str, Case); 10] = [
        ("memcpy, warm mapping", |memories, size| memcpy(memories, size, true, Copy::Memcpy)),
        ("plain stores, warm", |memories, size| memcpy(memories, size, true, Copy::Plain)),
        ("non-temporal stores, warm", |memories, size| memcpy(memories, size, true, Copy::NonTemporal)),
        ("memcpy, new mapping", |memories, size| memcpy(memories, size, false, Copy::Memcpy)),
        ("shm", |memories, size| fabric(memories, size, 1, true)),
        ("shm, 2 links", |memories, size| fabric(memories, size, 2, true)),
        ("raw sockets", |memories, size| raw_sockets(memories, size, 1)),
        ("tcp", |memories, size| fabric(memories, size, 1, false)),
        ("raw sockets, 2 streams", |memories, size| raw_sockets(memories, size, 2)),
        ("tcp, 2 links", |memories, size| fabric(memories, size, 2, false)),
    ];
    // In turns, so that whatever else this host does is in all of them.
    let mut best = [Best::default(); 10];
    for _ in 0..REPEATS {
        for (best, (_, case)) in best.iter_mut().zip(&cases) {
            best.run(*case, size)?;
        }
    }
    println!("{} MiB in writes of {} KiB, best of {REPEATS}, GB/s", total >> 20, chunk >> 10);
    println!(
        "{:<30}{:>10}{:>10}{:>10}{:>12}{:>14}",
        "", "fresh", "fresh+reg", "touched", "cpu ms/GiB", "register ms"
    );
    for ((name, _), best) in cases.iter().zip(&best) {
        let Best { fresh, with_registration, touched, registration, cpu } = best;
        let cpu = cpu.unwrap_or_default().as_secs_f64() * 1e3 * (1 << 30) as f64 / total as f64;
        let milliseconds = registration.unwrap_or_default().as_secs_f64() * 1e3;
        println!(
            "{name:<30}{fresh:>10.2}{with_registration:>10.2}{touched:>10.2}{cpu:>12.0}{milliseconds:>14.1}"
        );
    }
    println!();
    for (ours, reference) in [(4, 0), (5, 0), (4, 3), (7, 6), (9, 8)] {
        let names = format!("{} / {}", cases[ours].0, cases[reference].0);
        println!("{names:<50}{:>10.2}", best[ours].touched / best[reference].touched);
    }
    Ok(())
}

/// When a copy began, in time and in work.
struct Clocks(Instant, Duration);

impl Clocks {
    fn now() -> Self {
        Self(Instant::now(), Self::cpu())
    }

    fn cpu() -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }

    fn took(&self, registration: Duration) -> Took {
        Took { copy: self.0.elapsed(), cpu: Self::cpu() - self.1, registration }
    }
}

type Case = fn(&Memories, Size) -> Result<Took, Failure>;

/// The best of a case's runs.
#[derive(Clone, Copy, Default)]
struct Best {
    fresh: f64,
    with_registration: f64,
    touched: f64,
    cpu: Option<Duration>,
    registration: Option<Duration>,
}

impl Best {
    fn run(&mut self, case: Case, size: Size) -> Result<(), Failure> {
        let memories =
            Memories { source: memory(size.total, true)?, destination: memory(size.total, false)? };
        let rate = |duration: Duration| size.total as f64 / duration.as_secs_f64() / 1e9;
        let took = case(&memories, size)?;
        check(&memories, size)?;
        self.fresh = self.fresh.max(rate(took.copy));
        self.with_registration = self.with_registration.max(rate(took.copy + took.registration));
        self.registration =
            Some(self.registration.map_or(took.registration, |best| best.min(took.registration)));
        let took = case(&memories, size)?;
        check(&memories, size)?;
        self.touched = self.touched.max(rate(took.copy));
        self.cpu = Some(self.cpu.map_or(took.cpu, |best| best.min(took.cpu)));
        Ok(())
    }
}

/// A guest's memory on both sides.
struct Memories {
    source: Arc<Memory>,
    destination: Arc<Memory>,
}

/// How long a copy took, and the registration before it.
struct Took {
    copy: Duration,
    /// Of all threads, in the copy.
    cpu: Duration,
    registration: Duration,
}

fn memory(bytes: u64, filled: bool) -> Result<Arc<Memory>, Failure> {
    let fd = rustix::fs::memfd_create("ramferry-throughput", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    let file = RamFile::from_fd(fd, Access::ReadWrite)?;
    let block = Block { name: "ram".into(), guest_address: 0, length_bytes: bytes, page_bytes: 4096 };
    let memory = Memory::new(Layout::new(vec![block])?, vec![file], Access::ReadWrite)?;
    if filled {
        for offset in (0..bytes).step_by(4096) {
            let page = [(offset >> 12) as u8 | 1; 4096];
            memory.span(range(offset, 4096))?.write_from(&page);
        }
    }
    Ok(Arc::new(memory))
}

fn range(offset: u64, length: u64) -> BlockRange {
    BlockRange { block: BlockIndex(0), offset, length }
}

fn check(memories: &Memories, size: Size) -> Result<(), Failure> {
    for offset in (0..size.total).step_by(1 << 20) {
        let mut bytes = [[0; 64]; 2];
        memories.source.span(range(offset, 64))?.read_into(&mut bytes[0]);
        memories.destination.span(range(offset, 64))?.read_into(&mut bytes[1]);
        if bytes[0] != bytes[1] {
            return Err(format!("the bytes at {offset:#x} were not moved").into());
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Copy {
    Memcpy,
    Plain,
    NonTemporal,
}

/// Copies through a mapping of its own, as a link has; `warm`: the second time.
fn memcpy(memories: &Memories, size: Size, warm: bool, copy: Copy) -> Result<Took, Failure> {
    let file = memories.destination.file(BlockIndex(0));
    let mapping = ramferry_ram::Mapping::new(file, size.total, Access::ReadWrite)?;
    let mut start = Clocks::now();
    for _ in 0..if warm { 2 } else { 1 } {
        start = Clocks::now();
        for offset in (0..size.total).step_by(size.chunk as usize) {
            let length = u64::from(size.chunk).min(size.total - offset);
            let (to, from) = (mapping.span(offset, length)?, memories.source.span(range(offset, length))?);
            match copy {
                Copy::Memcpy => to.copy_from(from),
                Copy::Plain => shm::copy::plain(to, from)?,
                Copy::NonTemporal => shm::copy::non_temporal(to, from)?,
            }
        }
    }
    Ok(start.took(Duration::ZERO))
}

fn register(domain: &MappedDomain, total: u64, rights: Rights) -> Result<Vec<Region>, Failure> {
    let windows = (0..total).step_by(WINDOW_BYTES as usize);
    windows
        .map(|offset| Ok(domain.register(range(offset, WINDOW_BYTES.min(total - offset)), rights)?))
        .collect()
}

fn fabric(memories: &Memories, size: Size, links: usize, is_shm: bool) -> Result<Took, Failure> {
    let source = Arc::new(MappedDomain::new(Arc::clone(&memories.source))?);
    let destination = Arc::clone(&memories.destination);
    let destination = Arc::new(match is_shm {
        true => MappedDomain::reached_by_peer(destination)?,
        false => MappedDomain::new(destination)?,
    });
    let start = Instant::now();
    let local = register(&source, size.total, Rights::LOCAL)?;
    let remote = register(&destination, size.total, Rights::REMOTE_WRITE)?;
    let registration = start.elapsed();
    let token = SessionToken::random()?;
    let timeout = Duration::from_secs(5);
    let mut open: Vec<Box<dyn Link>> = Vec::new();
    let path = std::env::temp_dir().join(format!("ramferry-throughput-{}.sock", std::process::id()));
    let (_admission, _listeners) = if is_shm {
        let listener = shm::Listener::bind(&path)?;
        let admission = listener.admit(token.clone(), destination, links as u32);
        for _ in 0..links {
            open.push(shm::connect(&path, &token, Arc::clone(&source), timeout)?);
        }
        (admission, (Some(listener), None))
    } else {
        let listener = tcp::Listener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let admission = listener.admit(token.clone(), destination, links as u32);
        for _ in 0..links {
            open.push(tcp::connect(listener.local_addr(), &token, Arc::clone(&source), timeout)?);
        }
        (admission, (None, Some(listener)))
    };
    let start = Clocks::now();
    let links = std::thread::scope(|scope| {
        let (local, remote) = (&local, &remote);
        let threads: Vec<_> = open
            .into_iter()
            .enumerate()
            .map(|(index, link)| scope.spawn(move || drive(link, index, links, size, local, remote)))
            .collect();
        let links = threads.into_iter().map(|thread| thread.join().map_err(|_| "a thread panicked")?);
        links.collect::<Result<Vec<_>, Failure>>()
    })?;
    let took = start.took(registration);
    links.into_iter().for_each(|link| link.close());
    Ok(took)
}

/// Writes every `links`th chunk, then fences.
fn drive(
    mut link: Box<dyn Link>,
    index: usize,
    links: usize,
    size: Size,
    local: &[Region],
    remote: &[Region],
) -> Result<Box<dyn Link>, Failure> {
    let (mut under_way, mut unpolled) = (0_usize, 0);
    let mut completions = Vec::new();
    let chunks = (0..size.total).step_by(size.chunk as usize).skip(index).step_by(links);
    let posts = chunks.map(Some).chain([None]);
    for offset in posts {
        loop {
            let posted = match offset {
                Some(offset) => link.post_write(transfer(offset, size, local, remote)),
                None => link.post_fence(OpId(u64::MAX)),
            };
            match posted {
                Ok(()) => break,
                Err(PostError::Full) => match reap(&mut *link, &mut completions)? {
                    0 => link.wait(Duration::from_millis(100))?,
                    completed => under_way -= completed,
                },
                Err(error) => return Err(error.into()),
            }
        }
        under_way += 1;
        unpolled += u64::from(size.chunk);
        if unpolled >= POLL_EVERY_BYTES {
            unpolled = 0;
            under_way -= reap(&mut *link, &mut completions)?;
        }
    }
    while under_way > 0 {
        link.wait(Duration::from_millis(100))?;
        under_way -= reap(&mut *link, &mut completions)?;
    }
    Ok(link)
}

fn transfer(offset: u64, size: Size, local: &[Region], remote: &[Region]) -> ramferry_fabric::Transfer {
    let window = (offset / WINDOW_BYTES) as usize;
    let place = |regions: &[Region]| Place { key: regions[window].key, offset };
    let length = u64::from(size.chunk).min(size.total - offset) as u32;
    ramferry_fabric::Transfer { id: OpId(offset), local: place(local), remote: place(remote), length }
}

fn reap(link: &mut dyn Link, completions: &mut Vec<ramferry_fabric::Completion>) -> Result<usize, Failure> {
    let count = link.poll(completions);
    for completion in completions.drain(..) {
        completion.result?;
    }
    Ok(count)
}

/// Plain `send` from the source's mapping and `recv` into the destination's.
fn raw_sockets(memories: &Memories, size: Size, streams: usize) -> Result<Took, Failure> {
    let pages = memories.source.presence()?;
    let start = Clocks::now();
    limits::sockets(&memories.source, &memories.destination, &pages, u64::from(size.chunk), streams)?;
    Ok(start.took(Duration::ZERO))
}
