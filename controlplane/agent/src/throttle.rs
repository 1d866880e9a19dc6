//! A source guest that gets less processor time, so that its migration converges; and its time back, whatever comes.
//!
//! What is to be changed is written down before it is, in a file of `state_dir`. Three undo it, each of them whole and
//! none in the way of another: the migration at its end, the agent at its start, and a guard: a process of this
//! program that waits for the agent's end, however that comes, at a pipe that nobody writes to. So a guest is not held
//! back longer than for the moment that the guard takes after a `kill -9`; where the guard was killed too, until the
//! agent's next start. The record outlives an agent, and need not outlive the host: cgroups do not.

mod cgroups;

use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{fs, mem};

use ramferry_engine::Percent;
use thiserror::Error;

pub use self::cgroups::CgroupError;
use self::cgroups::{Hold, Kernel};
use crate::config::Config;
use crate::keepsake::write_whole;
use crate::status::causes;

/// The command of this program that is a guard.
pub const GUARD_COMMAND: &str = "throttle-guard";

/// Why a guest cannot be throttled, or not be freed.
#[derive(Debug, Error)]
pub enum ThrottleError {
    /// Its cgroup is not fit for it.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// What is to be undone could not be kept, or not be read.
    #[error("the record {path} of a throttled guest cannot be used; see the disk of state_dir")]
    Record {
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody would free the guest of an agent that was killed.
    #[error("cannot start the guard that frees the guest after the agent's end; see the limits of processes")]
    Guard(#[source] io::Error),
    /// A VMM without threads of its own for vCPUs.
    #[error("the VMM names no thread of a vCPU; throttle its process from outside")]
    NoThreads,
}

/// The throttle of one migration's source guest.
#[derive(Debug)]
pub(crate) struct Throttle {
    id: String,
    record: PathBuf,
    /// By the latest order.
    ordered: AtomicU8,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    holds: Vec<Hold>,
    guard: Option<Child>,
    is_over: bool,
}

impl Throttle {
    pub(crate) fn new(config: &Config, id: &str) -> Self {
        let record = directory(config).join(format!("{id}.json"));
        Self { id: id.to_owned(), record, ordered: AtomicU8::new(0), held: Mutex::default() }
    }

    /// From now on [`Throttle::follow`] is for `percent`, also one that was called before.
    pub(crate) fn order(&self, percent: Percent) {
        self.ordered.store(percent.0, Ordering::Release);
    }

    /// Whether [`Throttle::follow`] has to be told the guest's threads.
    pub(crate) fn needs_threads(&self) -> bool {
        self.ordered.load(Ordering::Acquire) > 0 && self.held().holds.is_empty()
    }

    /// Does what was last ordered, and says what that is. `threads` of `pid` are the guest's vCPUs.
    pub(crate) fn follow(&self, pid: u32, threads: &[u32]) -> Result<Percent, ThrottleError> {
        let mut held = self.held();
        let percent = Percent(self.ordered.load(Ordering::Acquire));
        if held.is_over || (held.holds.is_empty() && percent == Percent(0)) {
            return Ok(Percent(0));
        }
        if held.holds.is_empty() {
            self.begin(&mut held, pid, threads, percent)?;
        } else {
            for hold in &held.holds {
                hold.set(&Kernel, percent)?;
            }
        }
        Ok(percent)
    }

    fn begin(
        &self,
        held: &mut Held,
        pid: u32,
        threads: &[u32],
        percent: Percent,
    ) -> Result<(), ThrottleError> {
        if threads.is_empty() {
            return Err(ThrottleError::NoThreads);
        }
        let holds = cgroups::plan(&Kernel, pid, threads, &self.id, &self.others())?;
        keep(&self.record, &holds)?;
        held.holds = holds;
        let begun = guard(&self.record).and_then(|guard| {
            held.guard = Some(guard);
            Ok(held.holds.iter().try_for_each(|hold| hold.begin(&Kernel, percent))?)
        });
        if begun.is_err()
            && let Err(error) = self.undo(held)
        {
            tracing::error!(id = self.id, error = causes(&error), "a guest may still be throttled");
        }
        begun
    }

    /// Puts everything back; nothing is done from then on.
    ///
    /// # Errors
    /// What was kept is kept on, and the guard and the agent's next start try again.
    pub(crate) fn end(&self) -> Result<(), ThrottleError> {
        let mut held = self.held();
        held.is_over = true;
        self.undo(&mut held)
    }

    fn undo(&self, held: &mut Held) -> Result<(), ThrottleError> {
        if held.holds.is_empty() {
            return Ok(());
        }
        let undone = undo(&self.record, &mem::take(&mut held.holds));
        if let Some(mut guard) = held.guard.take() {
            // Its pipe ends with it; it does what was not done.
            drop(guard.stdin.take());
            let _ = guard.wait();
        }
        undone
    }

    /// What this agent's other migrations hold. A record that cannot be read tells of nothing.
    fn others(&self) -> Vec<Hold> {
        let records = self.record.parent().map(records).unwrap_or_default();
        let others = records.into_iter().filter(|record| *record != self.record);
        others.filter_map(|record| read(&record).ok().flatten()).flatten().collect()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// At the agent's start: frees the guests that another agent's end left throttled.
pub(crate) fn undo_all(config: &Config) {
    for record in records(&directory(config)) {
        match undo_record(&record) {
            Ok(()) => tracing::warn!(record = %record.display(), "a guest was freed that was left throttled"),
            Err(error) => tracing::error!(error = causes(&error), "a guest may still be throttled"),
        }
    }
}

/// What a guard does: waits for the end of its standard input, which is the agent's, and frees the guest that `record`
/// tells of. There is none where the migration came to its end.
///
/// # Errors
/// When the guest may still be throttled; the agent's next start tries again.
pub fn stand_guard(record: &Path) -> Result<(), ThrottleError> {
    // An error is an end as well.
    let _ = io::stdin().lock().read_to_end(&mut Vec::new());
    undo_record(record)
}

fn undo_record(record: &Path) -> Result<(), ThrottleError> {
    read(record)?.map_or(Ok(()), |holds| undo(record, &holds))
}

/// What a record tells of, if there is one.
fn read(record: &Path) -> Result<Option<Vec<Hold>>, ThrottleError> {
    let unusable = |source| ThrottleError::Record { path: record.to_owned(), source };
    let text = match fs::read(record) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(unusable)?,
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| unusable(error.into()))
}

/// Frees first what can be, and forgets `holds` only once all are.
fn undo(record: &Path, holds: &[Hold]) -> Result<(), ThrottleError> {
    let undone: Vec<_> = holds.iter().map(|hold| hold.undo(&Kernel)).collect();
    undone.into_iter().collect::<Result<(), _>>()?;
    match fs::remove_file(record) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ThrottleError::Record { path: record.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn keep(record: &Path, holds: &[Hold]) -> Result<(), ThrottleError> {
    let kept = serde_json::to_vec(holds).map_err(io::Error::from).and_then(|text| write_whole(record, &text));
    kept.map_err(|source| ThrottleError::Record { path: record.to_owned(), source })
}

/// In a process group of its own: what interrupts the agent from a terminal does not end it.
fn guard(record: &Path) -> Result<Child, ThrottleError> {
    Command::new("/proc/self/exe")
        .arg(GUARD_COMMAND)
        .arg(record)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .map_err(ThrottleError::Guard)
}

fn records(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let is_record = |path: &PathBuf| path.extension().is_some_and(|end| end == "json");
    entries.map(|entry| entry.path()).filter(is_record).collect()
}

fn directory(config: &Config) -> PathBuf {
    config.state_dir.join("throttle")
}
