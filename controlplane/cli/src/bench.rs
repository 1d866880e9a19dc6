//! What `ramferry bench` measures: fabrics, registration, and looking through
//! memory, each with the same code as in a migration and beside what the host
//! can do.
//!
//! A measurement fills its report as it goes, so that what was measured before
//! it was left can be shown.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ramferry_fabric::limits::LimitError;
use ramferry_fabric::{LinkError, OpError, PostError, RegisterError};
use ramferry_ram::RamError;
use ramferry_tracking::TrackError;
use serde::Serialize;

use crate::output::bytes;

pub(crate) mod fabric;
pub(crate) mod memory;
pub(crate) mod registration;
pub(crate) mod scan;

/// Why something could not be measured, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum BenchError {
    #[error("left by Ctrl-C")]
    Left,
    #[error("it took longer than {}: give a longer --timeout, or measure less", humantime::format_duration(*.0))]
    TimedOut(Duration),
    #[error("{} of memory are needed, and {} are free: give less --memory", bytes(*needed), bytes(*available))]
    Memory { needed: u64, available: u64 },
    #[error(
        "{links} links with writes of {} need more than {} of memory a side: give more --memory, or smaller --sizes",
        bytes(*size), bytes(*memory)
    )]
    Share { links: u32, size: u64, memory: u64 },
    #[error("cannot reach {address}: is `ramferry bench fabric --listen` waiting there?")]
    Unreachable { address: String, source: io::Error },
    #[error("nobody came within {}", humantime::format_duration(*.0))]
    NobodyCame(Duration),
    #[error("the other side refused: {0}")]
    Refused(String),
    #[error("the other side ended the measurement: it was left, or its --timeout is over")]
    PeerEnded,
    #[error("what speaks there is no `ramferry bench fabric` of this version")]
    Foreign,
    #[error("the link completed nothing for {}", humantime::format_duration(*.0))]
    Stalled(Duration),
    #[cfg(feature = "verbs")]
    #[error(transparent)]
    Devices(#[from] ramferry_verbs::DeviceError),
    #[error(
        "this host has no active RDMA device with an address: see `rdma link`, or name an address with --address"
    )]
    #[cfg(feature = "verbs")]
    NoDevice,
    #[error("the link failed")]
    Link(#[from] LinkError),
    #[error("the link took no more")]
    Post(#[from] PostError),
    #[error("a write was not carried out")]
    Operation(#[from] OpError),
    #[error("memory cannot be registered")]
    Register(#[from] RegisterError),
    #[error("memory cannot be used")]
    Ram(#[from] RamError),
    #[error("the limit cannot be measured")]
    Limit(#[from] LimitError),
    #[error("written pages cannot be told")]
    Track(#[from] TrackError),
    #[error("{seen} of {expected} {what}: what is measured does not work")]
    Wrong { what: &'static str, seen: u64, expected: u64 },
    #[error("cannot {what}")]
    System { what: &'static str, source: io::Error },
}

impl BenchError {
    fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}

/// When a measurement must end, whatever is missing.
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    left: Arc<AtomicBool>,
    deadline: Instant,
    timeout: Duration,
}

impl Bounds {
    /// From now on; `left` becomes true when the caller does not want to wait.
    pub(crate) fn new(left: Arc<AtomicBool>, timeout: Duration) -> Self {
        Self { left, deadline: Instant::now() + timeout, timeout }
    }

    /// Whether there is any use in going on.
    pub(crate) fn check(&self) -> Result<(), BenchError> {
        if self.left.load(Ordering::Relaxed) {
            return Err(BenchError::Left);
        }
        if Instant::now() >= self.deadline {
            return Err(BenchError::TimedOut(self.timeout));
        }
        Ok(())
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }
}

/// Who is told how far a measurement is.
pub(crate) trait Observer: Send {
    /// A step begins, of so many.
    fn step(&mut self, number: usize, of: usize, what: &str);
    /// Something that the caller has to know meanwhile.
    fn note(&mut self, text: &str);
}

/// What several runs gave.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// None of no runs.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let upper = values[values.len() / 2];
        let is_even = values.len().is_multiple_of(2);
        let median = if is_even { f64::midpoint(values[values.len() / 2 - 1], upper) } else { upper };
        Some(Self { median, min, max })
    }

    /// Every value so many times as large.
    pub(crate) fn times(self, factor: f64) -> Self {
        Self { median: self.median * factor, min: self.min * factor, max: self.max * factor }
    }
}

/// How long single operations took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Latency {
    pub(crate) count: usize,
    pub(crate) p50_seconds: f64,
    pub(crate) p99_seconds: f64,
    pub(crate) max_seconds: f64,
}

impl Latency {
    /// None of no operations.
    pub(crate) fn of(mut taken: Vec<Duration>) -> Option<Self> {
        taken.sort_unstable();
        // The value below which the share lies.
        let quantile = |percent: usize| taken[(taken.len() * percent).div_ceil(100).max(1) - 1].as_secs_f64();
        let max_seconds = taken.last()?.as_secs_f64();
        Some(Self { count: taken.len(), p50_seconds: quantile(50), p99_seconds: quantile(99), max_seconds })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_are_of_the_runs_in_any_order() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
    }

    #[test]
    fn quantiles_are_values_that_were_seen() {
        assert_eq!(Latency::of(Vec::new()), None);
        let latency = Latency::of((1..=200).rev().map(Duration::from_secs).collect());
        let expected = Latency { count: 200, p50_seconds: 100.0, p99_seconds: 198.0, max_seconds: 200.0 };
        assert_eq!(latency, Some(expected));
        assert_eq!(Latency::of(vec![Duration::from_secs(1)]).map(|latency| latency.p50_seconds), Some(1.0));
    }

    #[test]
    fn bounds_tell_leaving_from_being_late() {
        let left = Arc::new(AtomicBool::new(false));
        let bounds = |timeout| Bounds::new(Arc::clone(&left), timeout);
        assert!(bounds(Duration::from_secs(60)).check().is_ok());
        assert!(matches!(bounds(Duration::ZERO).check(), Err(BenchError::TimedOut(_))));
        left.store(true, Ordering::Relaxed);
        assert!(matches!(bounds(Duration::ZERO).check(), Err(BenchError::Left)));
    }
}
