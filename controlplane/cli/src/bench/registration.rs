//! What registering and deregistering memory costs.
//!
//! Every run maps the memory anew, as a migration does, and registers a part of
//! it in regions of one size, each once: what a first registration left in the
//! page tables would make a second one cheap.

use std::net::IpAddr;
#[cfg(feature = "verbs")]
use std::net::SocketAddr;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use ramferry_fabric::{Domain, FabricKind, MappedDomain, Rights};
use ramferry_ram::{Access, Memory, RamFile};
use serde::Serialize;

use super::memory::{self, BASE_PAGE_BYTES, HUGE_PAGE_BYTES, range};
use super::{BenchError, Bounds, Latency, Observer, Spread};
use crate::output::bytes;

/// Regions that one thread registers in one run, at most.
const MOST_REGIONS: u64 = 256;

/// What is measured.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) fabric: FabricKind,
    /// Of an RDMA device, over verbs.
    #[cfg_attr(not(feature = "verbs"), allow(dead_code, reason = "only RDMA has devices"))]
    pub(crate) address: IpAddr,
    #[cfg_attr(not(feature = "verbs"), allow(dead_code, reason = "only RDMA has devices"))]
    pub(crate) rdma_device: Option<String>,
    pub(crate) sizes: Vec<u64>,
    pub(crate) threads: Vec<u32>,
    pub(crate) runs: u32,
    /// After it no further run of a case begins.
    pub(crate) duration: Duration,
    pub(crate) memory_bytes: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct RegistrationReport {
    pub(crate) bench: &'static str,
    pub(crate) fabric: &'static str,
    /// Whether everything was measured that is not among the skipped.
    pub(crate) complete: bool,
    pub(crate) memory_bytes: u64,
    pub(crate) cases: Vec<Case>,
    pub(crate) skipped: Vec<Skipped>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Case {
    pub(crate) side: Side,
    /// Whether the memory was ever written.
    pub(crate) touched: bool,
    pub(crate) page_bytes: u64,
    pub(crate) size_bytes: u64,
    pub(crate) threads: u32,
    pub(crate) runs: usize,
    /// Single registrations.
    pub(crate) register: Latency,
    pub(crate) deregister: Latency,
    /// Of all threads together.
    pub(crate) bytes_per_second: Spread,
    pub(crate) deregister_bytes_per_second: Spread,
}

#[derive(Debug, Serialize)]
pub(crate) struct Skipped {
    pub(crate) page_bytes: u64,
    /// Null where it is all of them.
    pub(crate) size_bytes: Option<u64>,
    pub(crate) threads: Option<u32>,
    pub(crate) reason: String,
}

/// For whose operations memory is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Side {
    /// It reads.
    Source,
    /// The peer writes.
    Destination,
}

impl Side {
    /// The word for it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// What is the same in all cases that are measured with one file.
#[derive(Debug, Clone, Copy)]
struct Kind {
    side: Side,
    touched: bool,
    page_bytes: u64,
}

/// A source registers no hole.
const STATES: [(Side, bool); 3] =
    [(Side::Source, true), (Side::Destination, true), (Side::Destination, false)];

impl RegistrationReport {
    /// Of nothing yet.
    pub(crate) fn new(plan: &Plan) -> Self {
        Self {
            bench: "registration",
            fabric: plan.fabric.as_str(),
            complete: false,
            memory_bytes: plan.memory_bytes,
            cases: Vec::new(),
            skipped: Vec::new(),
        }
    }
}

/// Measures what `plan` says, into `report`.
pub(crate) fn measure(
    plan: &Plan,
    bounds: &Bounds,
    observer: &mut dyn Observer,
    report: &mut RegistrationReport,
) -> Result<(), BenchError> {
    let domains = Domains::new(plan)?;
    let steps = 2 * STATES.len() * plan.sizes.len() * plan.threads.len();
    for (nth, page_bytes) in [BASE_PAGE_BYTES, HUGE_PAGE_BYTES].into_iter().enumerate() {
        let memory_bytes = match page_bytes {
            HUGE_PAGE_BYTES => {
                plan.memory_bytes.min(memory::free_huge_bytes()) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
            }
            _ => plan.memory_bytes,
        };
        let cases = fitting(plan, page_bytes, memory_bytes, report);
        if cases.is_empty() {
            continue;
        }
        let mut touched: Option<RamFile> = None;
        for (state, (side, is_touched)) in STATES.into_iter().enumerate() {
            let kind = Kind { side, touched: is_touched, page_bytes };
            // Of one file at a time there is as much as all of the memory.
            if !is_touched {
                touched = None;
            } else if touched.is_none() {
                observer.step(nth * steps / 2, steps, "touching memory");
                let file = memory::file(memory_bytes, page_bytes)?;
                memory::touch(&*memory::map(&file, memory_bytes, Access::ReadWrite)?, bounds)?;
                touched = Some(file);
            }
            for (index, (size, threads)) in cases.iter().enumerate() {
                let step = (nth * STATES.len() + state) * plan.sizes.len() * plan.threads.len() + index;
                observer.step(step, steps, &title(kind, *size, *threads));
                report.cases.extend(case(
                    plan,
                    &domains,
                    kind,
                    (*size, *threads),
                    memory_bytes,
                    touched.as_ref(),
                    bounds,
                )?);
            }
        }
    }
    report.complete = true;
    Ok(())
}

fn title(kind: Kind, size: u64, threads: u32) -> String {
    format!(
        "{} of {}, {} pages, {}",
        if kind.touched { "touched regions" } else { "untouched regions" },
        bytes(size),
        bytes(kind.page_bytes),
        super::fabric::counted(threads, "thread"),
    )
}

/// The sizes and threads for which there is memory; the others are noted as skipped.
fn fitting(
    plan: &Plan,
    page_bytes: u64,
    memory_bytes: u64,
    report: &mut RegistrationReport,
) -> Vec<(u64, u32)> {
    if memory_bytes == 0 {
        let reason = "the host has no free huge pages of 2 MiB: reserve some with sysctl vm.nr_hugepages=512";
        report.skipped.push(Skipped {
            page_bytes,
            size_bytes: None,
            threads: None,
            reason: reason.to_owned(),
        });
        return Vec::new();
    }
    let mut fitting = Vec::new();
    for size in &plan.sizes {
        if !size.is_multiple_of(page_bytes) {
            let reason = format!("it is not whole pages of {}", bytes(page_bytes));
            report.skipped.push(Skipped { page_bytes, size_bytes: Some(*size), threads: None, reason });
            continue;
        }
        for threads in &plan.threads {
            let needed = size.saturating_mul(u64::from(*threads));
            if needed <= memory_bytes {
                fitting.push((*size, *threads));
                continue;
            }
            let reason =
                format!("it needs {} of memory, and there are {}", bytes(needed), bytes(memory_bytes));
            report.skipped.push(Skipped {
                page_bytes,
                size_bytes: Some(*size),
                threads: Some(*threads),
                reason,
            });
        }
    }
    fitting
}

/// One thread's times, of one run.
struct Times {
    register: Vec<Duration>,
    deregister: Vec<Duration>,
    /// Begin and end of each phase.
    registering: (Instant, Instant),
    deregistering: (Instant, Instant),
}

fn case(
    plan: &Plan,
    domains: &Domains,
    kind: Kind,
    (size, threads): (u64, u32),
    memory_bytes: u64,
    touched: Option<&RamFile>,
    bounds: &Bounds,
) -> Result<Option<Case>, BenchError> {
    let each = (memory_bytes / size / u64::from(threads)).min(MOST_REGIONS);
    let run_bytes = each * size * u64::from(threads);
    let (mut register, mut deregister) = (Vec::new(), Vec::new());
    let (mut rates, mut deregister_rates) = (Vec::new(), Vec::new());
    let until = Instant::now() + plan.duration;
    for run in 0..plan.runs {
        bounds.check()?;
        if run > 0 && Instant::now() >= until {
            break;
        }
        let file = match touched {
            Some(file) => file.clone(),
            None => memory::file(run_bytes, kind.page_bytes)?,
        };
        let memory = memory::map(&file, run_bytes, Access::ReadWrite)?;
        let domain = domains.domain(kind.side, memory)?;
        let all = register_all(&*domain, kind.side, size, each, threads, bounds)?;
        let rate = |phase: fn(&Times) -> (Instant, Instant)| {
            let begin = all.iter().map(|times| phase(times).0).min();
            let end = all.iter().map(|times| phase(times).1).max();
            begin.zip(end).map(|(begin, end)| run_bytes as f64 / (end - begin).as_secs_f64())
        };
        rates.extend(rate(|times| times.registering));
        deregister_rates.extend(rate(|times| times.deregistering));
        for times in all {
            register.extend(times.register);
            deregister.extend(times.deregister);
        }
    }
    let runs = rates.len();
    let latencies = Latency::of(register).zip(Latency::of(deregister));
    let rates = Spread::of(rates).zip(Spread::of(deregister_rates));
    Ok(latencies.zip(rates).map(
        |((register, deregister), (bytes_per_second, deregister_bytes_per_second))| Case {
            side: kind.side,
            touched: kind.touched,
            page_bytes: kind.page_bytes,
            size_bytes: size,
            threads,
            runs,
            register,
            deregister,
            bytes_per_second,
            deregister_bytes_per_second,
        },
    ))
}

/// Makes domains, a new one for each mapping.
enum Domains {
    Tcp,
    Shm,
    #[cfg(feature = "verbs")]
    Verbs(ramferry_verbs::Listener),
}

impl Domains {
    fn new(plan: &Plan) -> Result<Self, BenchError> {
        Ok(match plan.fabric {
            FabricKind::Shm => Self::Shm,
            #[cfg(feature = "verbs")]
            FabricKind::Verbs => {
                let address = SocketAddr::new(plan.address, 0);
                Self::Verbs(ramferry_verbs::Listener::bind(address, plan.rdma_device.as_deref())?)
            }
            _ => Self::Tcp,
        })
    }

    fn domain(&self, side: Side, memory: Arc<Memory>) -> Result<Arc<dyn Domain>, BenchError> {
        Ok(match (self, side) {
            (Self::Shm, Side::Destination) => Arc::new(MappedDomain::reached_by_peer(memory)?),
            (Self::Tcp | Self::Shm, _) => Arc::new(MappedDomain::new(memory)?),
            #[cfg(feature = "verbs")]
            (Self::Verbs(listener), _) => listener.domain(memory)?,
        })
    }
}

/// Registers `each` regions in each thread, all at once, then deregisters them.
fn register_all(
    domain: &dyn Domain,
    side: Side,
    size: u64,
    each: u64,
    threads: u32,
    bounds: &Bounds,
) -> Result<Vec<Times>, BenchError> {
    let rights = match side {
        Side::Source => Rights::LOCAL,
        Side::Destination => Rights::REMOTE_WRITE,
    };
    let turn = &Barrier::new(threads as usize);
    thread::scope(|scope| {
        let thread = |index: u64| {
            scope.spawn(move || {
                turn.wait();
                let begin = Instant::now();
                let (mut keys, mut register) = (Vec::new(), Vec::new());
                let registered = (0..each).try_for_each(|nth| {
                    bounds.check()?;
                    let started = Instant::now();
                    let region = domain.register(range((index * each + nth) * size, size), rights)?;
                    register.push(started.elapsed());
                    keys.push(region.key);
                    Ok(())
                });
                let registering = (begin, Instant::now());
                // Also after an error: the others wait.
                turn.wait();
                let begin = Instant::now();
                let mut deregister = Vec::new();
                for key in keys {
                    let started = Instant::now();
                    domain.deregister(key)?;
                    deregister.push(started.elapsed());
                }
                let deregistering = (begin, Instant::now());
                registered.map(|()| Times { register, deregister, registering, deregistering })
            })
        };
        let threads: Vec<_> = (0..u64::from(threads)).map(thread).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|times| times.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(memory_bytes: u64) -> Plan {
        Plan {
            fabric: FabricKind::Tcp,
            address: [127, 0, 0, 1].into(),
            rdma_device: None,
            sizes: vec![4096, 2 << 20, 4 << 20],
            threads: vec![1, 2],
            runs: 1,
            duration: Duration::ZERO,
            memory_bytes,
        }
    }

    #[test]
    fn what_does_not_fit_is_skipped_with_its_reason() {
        let plan = plan(4 << 20);
        let mut report = RegistrationReport::new(&plan);
        let fits = fitting(&plan, BASE_PAGE_BYTES, plan.memory_bytes, &mut report);
        assert_eq!(fits, [(4096, 1), (4096, 2), (2 << 20, 1), (2 << 20, 2), (4 << 20, 1)]);
        let [skipped] = &report.skipped[..] else { panic!("{report:?}") };
        assert_eq!((skipped.size_bytes, skipped.threads), (Some(4 << 20), Some(2)));
        assert_eq!(skipped.reason, "it needs 8.00 MiB of memory, and there are 4.00 MiB");

        let fits = fitting(&plan, HUGE_PAGE_BYTES, plan.memory_bytes, &mut report);
        assert_eq!(fits, [(2 << 20, 1), (2 << 20, 2), (4 << 20, 1)]);
        assert!(fitting(&plan, HUGE_PAGE_BYTES, 0, &mut report).is_empty());
        let last = report.skipped.last().expect("the last is about all sizes");
        assert!(last.size_bytes.is_none() && last.reason.contains("nr_hugepages"), "{last:?}");
    }
}
