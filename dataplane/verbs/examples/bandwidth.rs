//! What a bare loop over links reaches, to be held beside `ib_write_bw`: MiB to
//! move, KiB a write, and links, by argument (256, 1024 and 1).
//!
//! Both sides are in this process; a write leaves one RDMA device and arrives at
//! another, or the same where this host has one. Prints one line, and the time of each step.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramferry_fabric::{Domain, Link, OpId, Place, PostError, Region, Rights, SessionToken, Transfer};
use ramferry_ram::{Access, Block, BlockIndex, BlockRange, Layout, Memory, RamFile};
use ramferry_verbs::{Listener, connect, devices, domain_towards};
use rustix::fs::MemfdFlags;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const TIMEOUT: Duration = Duration::from_secs(60);
/// How long a link that has nothing to tell is polled before it sleeps, as a copying thread does.
const SPIN: Duration = Duration::from_micros(50);
const NAP: Duration = Duration::from_millis(2);
/// Memory that is written from, over and over: as much as stays in no cache.
const REGION_BYTES: u64 = 64 << 20;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let total = arguments.next().map_or(Ok(256), |mib| mib.parse::<u64>())? << 20;
    let chunk = arguments.next().map_or(Ok(1024), |kib| kib.parse::<u32>())? << 10;
    let links = arguments.next().map_or(Ok(1), |links| links.parse::<u32>())?;
    let mut addresses: Vec<_> = devices()?
        .iter()
        .filter(|device| device.active)
        .flat_map(|device| device.addresses.clone())
        .collect();
    addresses.sort_unstable();
    let address = addresses.into_iter().rfind(|address| address.is_ipv4()).ok_or("no active RDMA device")?;

    let mut step = Step(Instant::now());
    let listener = Listener::bind(SocketAddr::new(address, 0), None)?;
    step.took("listen");
    let destination = listener.domain(memory()?)?;
    let source = domain_towards(listener.local_addr(), None, memory()?, TIMEOUT)?;
    step.took("domains");
    let remote = destination.register(range(), Rights::REMOTE_WRITE)?;
    let local = source.register(range(), Rights::LOCAL)?;
    step.took("registration of 64 MiB, twice");
    let token = SessionToken::random()?;
    let admission = listener.admit(token.clone(), destination.clone(), links);
    let open: Result<Vec<_>, _> =
        (0..links).map(|_| connect(listener.local_addr(), &token, source.clone(), TIMEOUT)).collect();
    let open = open?;
    step.took("connections");

    let start = Instant::now();
    let done = std::thread::scope(|scope| {
        let threads: Vec<_> = open
            .into_iter()
            .map(|link| scope.spawn(move || drive(link, total / u64::from(links), chunk, local, remote)))
            .collect();
        let done = threads.into_iter().map(|thread| thread.join().map_err(|_| "a thread panicked")?);
        done.collect::<Result<Vec<_>, Failure>>()
    })?;
    let seconds = start.elapsed().as_secs_f64();
    step.took("copy");
    done.into_iter().for_each(|link| link.close());
    step.took("close");
    drop(admission);
    step.took("end of the session");
    source.deregister(local.key)?;
    destination.deregister(remote.key)?;
    step.took("deregistration");
    let (device, megabytes) = (source.device_name().to_owned(), total as f64 / 1e6);
    println!(
        "{device} to {}: {megabytes:.0} MB in writes of {} KiB over {links} links: {:.1} MB/s",
        listener.device(),
        chunk >> 10,
        megabytes / seconds
    );
    Ok(())
}

/// Writes, each to the next place, then fences.
fn drive(
    mut link: Box<dyn Link>,
    total: u64,
    chunk: u32,
    local: Region,
    remote: Region,
) -> Result<Box<dyn Link>, Failure> {
    let mut completions = Vec::new();
    let mut under_way = 0;
    let mut idle_since = None;
    let pieces = total / u64::from(chunk);
    for piece in 0..=pieces {
        loop {
            let offset = piece * u64::from(chunk) % REGION_BYTES;
            let posted = match piece == pieces {
                false => link.post_write(Transfer {
                    id: OpId(piece),
                    local: Place { key: local.key, offset },
                    remote: Place { key: remote.key, offset },
                    length: chunk,
                }),
                true => link.post_fence(OpId(piece)),
            };
            match posted {
                Ok(()) => break,
                Err(PostError::Full) => under_way -= wait(&mut *link, &mut completions, &mut idle_since)?,
                Err(error) => return Err(error.into()),
            }
        }
        under_way += 1;
        under_way -= reap(&mut *link, &mut completions)?;
    }
    while under_way > 0 {
        under_way -= wait(&mut *link, &mut completions, &mut idle_since)?;
    }
    Ok(link)
}

/// Polls; sleeps when nothing has come for a while.
fn wait(
    link: &mut dyn Link,
    completions: &mut Vec<ramferry_fabric::Completion>,
    idle_since: &mut Option<Instant>,
) -> Result<usize, Failure> {
    let count = reap(link, completions)?;
    if count > 0 {
        *idle_since = None;
    } else if idle_since.get_or_insert_with(Instant::now).elapsed() > SPIN {
        link.wait(NAP)?;
    }
    Ok(count)
}

fn reap(link: &mut dyn Link, completions: &mut Vec<ramferry_fabric::Completion>) -> Result<usize, Failure> {
    let count = link.poll(completions);
    for completion in completions.drain(..) {
        completion.result?;
    }
    Ok(count)
}

fn range() -> BlockRange {
    BlockRange { block: BlockIndex(0), offset: 0, length: REGION_BYTES }
}

fn memory() -> Result<Arc<Memory>, Failure> {
    let fd = rustix::fs::memfd_create("ramferry-bandwidth", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, REGION_BYTES)?;
    let file = RamFile::from_fd(fd, Access::ReadWrite)?;
    let block = Block { name: "ram".into(), guest_address: 0, length_bytes: REGION_BYTES, page_bytes: 4096 };
    Ok(Arc::new(Memory::new(Layout::new(vec![block])?, vec![file], Access::ReadWrite)?))
}

struct Step(Instant);

impl Step {
    fn took(&mut self, what: &str) {
        eprintln!("{what}: {:.1} ms", self.0.elapsed().as_secs_f64() * 1e3);
        self.0 = Instant::now();
    }
}
