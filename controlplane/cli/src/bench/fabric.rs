//! Bandwidth, message rate and round trip of a fabric, beside the limit.
//!
//! ```text
//!  source                                      destination
//!    -- hello: fabric, memory, links -------->  |  (control.rs)
//!    <------ welcome: token, key, addresses --  |
//!    == writes and fences over links ========>  |  the fabric's listener
//!    == the same over plain sockets =========>  |  answered by limits::serve
//!    -- end --------------------------------->  |
//! ```
//!
//! Both sides may be in one process; they speak to each other the same way.

mod control;
mod destination;
mod drive;
mod source;
pub(crate) mod way;

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _};
use std::thread;
use std::time::Duration;

use ramferry_fabric::{FabricKind, SessionToken};
use serde::Serialize;

use self::control::Channel;
use self::destination::{Offer, Served};
use self::source::{Run, Source};
use self::way::Device;
use super::{BenchError, Bounds, Latency, Observer, Spread};
use crate::args::names::AgentAddress;

/// Links of one client.
const MOST_LINKS: u32 = 64;
/// How long a connection may take to be made, or to carry nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is measured.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) fabric: FabricKind,
    pub(crate) sizes: Vec<u32>,
    pub(crate) links: Vec<u32>,
    pub(crate) runs: u32,
    pub(crate) duration: Duration,
    /// Of each side.
    pub(crate) memory_bytes: u64,
    pub(crate) rdma_device: Option<String>,
}

/// Where the side that is written to is.
#[derive(Debug, Clone)]
pub(crate) enum Peer {
    /// In this process, at this address.
    Here(IpAddr),
    /// Where it listens.
    At(AgentAddress),
}

/// What the writing side measured.
#[derive(Debug, Serialize)]
pub(crate) struct FabricReport {
    pub(crate) bench: &'static str,
    pub(crate) fabric: &'static str,
    /// Whether all of it was measured.
    pub(crate) complete: bool,
    /// The side that is written to; null where it is in this process.
    pub(crate) server: Option<String>,
    pub(crate) address: Option<IpAddr>,
    /// Of this side, over verbs.
    pub(crate) rdma_device: Option<Device>,
    pub(crate) memory_bytes: u64,
    pub(crate) runs: u32,
    pub(crate) duration_seconds: f64,
    pub(crate) limit: &'static str,
    pub(crate) cases: Vec<Case>,
    pub(crate) fence: Option<Latency>,
    /// Of the limit, where it has any.
    pub(crate) limit_round_trip: Option<Latency>,
}

/// Writes of one size over a number of links.
#[derive(Debug, Serialize)]
pub(crate) struct Case {
    pub(crate) size_bytes: u32,
    pub(crate) links: u32,
    pub(crate) bytes_per_second: Spread,
    pub(crate) bits_per_second: Spread,
    pub(crate) messages_per_second: Spread,
    pub(crate) limit_bytes_per_second: Spread,
    pub(crate) limit_bits_per_second: Spread,
    /// Median of the runs' ratios.
    pub(crate) of_limit: f64,
}

/// What the side that was written to says at its end.
#[derive(Debug, Serialize)]
pub(crate) struct ServerReport {
    pub(crate) bench: &'static str,
    pub(crate) side: &'static str,
    pub(crate) client: Option<SocketAddr>,
    pub(crate) fabric: Option<&'static str>,
    pub(crate) memory_bytes: u64,
    /// Null where the fabric does not tell this side.
    pub(crate) placed_bytes: Option<u64>,
}

impl FabricReport {
    /// Of nothing yet.
    pub(crate) fn new(plan: &Plan, peer: &Peer) -> Self {
        let (server, address) = match peer {
            Peer::Here(address) => (None, Some(*address)),
            Peer::At(address) => (Some(address.to_string()), None),
        };
        Self {
            bench: "fabric",
            fabric: plan.fabric.as_str(),
            complete: false,
            server,
            address,
            rdma_device: None,
            memory_bytes: plan.memory_bytes,
            runs: plan.runs,
            duration_seconds: plan.duration.as_secs_f64(),
            limit: "",
            cases: Vec::new(),
            fence: None,
            limit_round_trip: None,
        }
    }
}

impl ServerReport {
    /// Of nobody yet.
    pub(crate) fn new(memory_bytes: u64) -> Self {
        Self { bench: "fabric", side: "server", client: None, fabric: None, memory_bytes, placed_bytes: None }
    }
}

/// Measures what `plan` says, into `report`.
pub(crate) fn measure(
    plan: &Plan,
    peer: &Peer,
    bounds: &Bounds,
    observer: &mut dyn Observer,
    report: &mut FabricReport,
) -> Result<(), BenchError> {
    check(plan)?;
    match peer {
        Peer::At(address) => {
            let stream = reach(address)?;
            let failed = BenchError::system("use the connection");
            let peer = stream.peer_addr().map_err(&failed)?.ip();
            report.address = Some(peer);
            let control = Channel::over_tcp(stream).map_err(failed)?;
            measure_from(control, peer, plan, bounds, observer, report)
        }
        Peer::Here(address) => {
            let pair = Channel::pair().map_err(BenchError::system("make a pair of sockets"))?;
            let [ours, mut theirs] = pair;
            thread::scope(|scope| {
                let (local, most_bytes) = (*address, plan.memory_bytes);
                let offer = Offer { local, most_bytes, rdma_device: plan.rdma_device.as_deref() };
                let server = scope.spawn(move || destination::serve(&mut theirs, &offer, bounds, |_| ()));
                let measured = measure_from(ours, *address, plan, bounds, observer, report);
                let served = server.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                // Where one side ended because the other had, the other says why.
                match (measured, served) {
                    (Err(BenchError::PeerEnded | BenchError::Refused(_)), Err(error)) => Err(error),
                    (measured, _) => measured,
                }
            })
        }
    }
}

/// Waits for one client at `address`, and serves it with at most the report's memory.
pub(crate) fn serve(
    address: SocketAddr,
    rdma_device: Option<&str>,
    bounds: &Bounds,
    observer: &mut dyn Observer,
    report: &mut ServerReport,
) -> Result<(), BenchError> {
    let failed = BenchError::system("listen for a client");
    let listener = TcpListener::bind(address).map_err(&failed)?;
    listener.set_nonblocking(true).map_err(&failed)?;
    let timeout = humantime::format_duration(bounds.timeout());
    observer.note(&format!(
        "listening at {}, for one client, until it is done, and no longer than {timeout}",
        listener.local_addr().map_err(&failed)?
    ));
    loop {
        bounds.check().map_err(|error| match error {
            BenchError::TimedOut(after) => BenchError::NobodyCame(after),
            other => other,
        })?;
        let Some((stream, client)) = destination::accept(&listener) else { continue };
        let accepted = stream.set_nonblocking(false).and_then(|()| {
            let local = stream.local_addr()?.ip();
            Ok((Channel::over_tcp(stream)?, local))
        });
        let Ok((mut control, local)) = accepted else { continue };
        let offer = Offer { local, most_bytes: report.memory_bytes, rdma_device };
        let begun =
            |fabric: FabricKind| observer.note(&format!("serving a client from {client} over {fabric}"));
        match destination::serve(&mut control, &offer, bounds, begun) {
            Ok(Some(served)) => return end(served, client, observer, report),
            Ok(None) => observer.note(&format!("what connected from {client} is no client; still listening")),
            Err(BenchError::Refused(why)) => {
                observer.note(&format!("refused a client from {client}: {why}; still listening"));
            }
            Err(error) => return Err(error),
        }
    }
}

fn end(
    served: Served,
    client: SocketAddr,
    observer: &mut dyn Observer,
    report: &mut ServerReport,
) -> Result<(), BenchError> {
    report.client = Some(client);
    report.fabric = Some(served.fabric.as_str());
    report.memory_bytes = served.memory_bytes;
    report.placed_bytes = served.placed_bytes;
    if let Some(failure) = served.failure {
        observer.note(&format!("a link of the client did not end by its leave: {failure}"));
    }
    Ok(())
}

/// Before anything is asked of anybody.
fn check(plan: &Plan) -> Result<(), BenchError> {
    for links in &plan.links {
        for size in &plan.sizes {
            if drive::Share::of(plan.memory_bytes, 0, *links, *size).is_none() {
                let size = u64::from(*size);
                return Err(BenchError::Share { links: *links, size, memory: plan.memory_bytes });
            }
        }
    }
    Ok(())
}

fn reach(address: &AgentAddress) -> Result<TcpStream, BenchError> {
    let failed = |source| BenchError::Unreachable { address: address.to_string(), source };
    let mut last = io::ErrorKind::AddrNotAvailable.into();
    for resolved in address.to_string().to_socket_addrs().map_err(failed)? {
        match TcpStream::connect_timeout(&resolved, PATIENCE) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

fn measure_from(
    control: Channel,
    peer: IpAddr,
    plan: &Plan,
    bounds: &Bounds,
    observer: &mut dyn Observer,
    report: &mut FabricReport,
) -> Result<(), BenchError> {
    let steps = plan.sizes.len() * plan.links.len() + 1;
    observer.step(0, steps, "connecting, and touching memory");
    let mut source = Source::connect(control, peer, plan, bounds)?;
    report.limit = source.limit_name();
    report.rdma_device = source.device().cloned();
    observer.step(0, steps, "fences");
    report.fence = Latency::of(source.fences(plan.duration, bounds)?);
    report.limit_round_trip = Latency::of(source.plain_round_trips(plan.duration, bounds)?);
    let cases = plan.links.iter().flat_map(|links| plan.sizes.iter().map(move |size| (*links, *size)));
    for (index, (links, size)) in cases.enumerate() {
        let text = format!("writes of {} over {}", crate::output::bytes(size.into()), counted(links, "link"));
        observer.step(index + 1, steps, &text);
        let (mut ours, mut limits) = (Vec::new(), Vec::new());
        // In turns, so that whatever else the host does is in both.
        for _ in 0..plan.runs {
            ours.push(source.write(links, size, plan, bounds)?);
            limits.push(source.limit(links, size, plan, bounds)?);
        }
        report.cases.extend(case(size, links, &ours, &limits));
    }
    source.close();
    report.complete = true;
    Ok(())
}

fn case(size: u32, links: u32, ours: &[Run], limits: &[Run]) -> Option<Case> {
    let messages = |run: &Run| run.messages as f64 / run.elapsed.as_secs_f64();
    let rate = |run: &Run| messages(run) * f64::from(size);
    let bytes_per_second = Spread::of(ours.iter().map(rate))?;
    let limit_bytes_per_second = Spread::of(limits.iter().map(rate))?;
    let ratios = ours.iter().zip(limits).map(|(ours, limit)| rate(ours) / rate(limit));
    Some(Case {
        size_bytes: size,
        links,
        bytes_per_second,
        bits_per_second: bytes_per_second.times(8.0),
        messages_per_second: Spread::of(ours.iter().map(messages))?,
        limit_bytes_per_second,
        limit_bits_per_second: limit_bytes_per_second.times(8.0),
        of_limit: Spread::of(ratios)?.median,
    })
}

/// `1 link`, `2 links`.
pub(crate) fn counted(count: u32, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn random_token() -> Result<SessionToken, BenchError> {
    SessionToken::random().map_err(|error| {
        BenchError::system("get random numbers for a token")(io::Error::other(error.to_string()))
    })
}
