//! Directories that go away with the fixture that made them, and with the next
//! fixture when the process that made them was killed.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

const PREFIX: &str = "ramferry-lab-";
const LOCK: &str = "lock";
/// A directory this young may not be locked yet by the process that makes it.
const YOUNG: Duration = Duration::from_secs(60);

/// A directory under `/dev/shm` or another parent. Fields are dropped in order:
/// the directory goes before its lock does.
#[derive(Debug)]
pub(crate) struct Scratch {
    directory: TempDir,
    _lock: Option<File>,
}

impl Scratch {
    pub(crate) fn new(parent: &Path) -> Result<Scratch> {
        sweep(parent);
        let directory = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(parent)
            .with_context(|| format!("cannot make a directory in {}", parent.display()))?;
        // Not every file system (hugetlbfs) takes an ordinary file; nothing is swept there.
        let lock = File::create(directory.path().join(LOCK)).ok();
        if let Some(lock) = &lock {
            lock.lock().context("cannot lock a file just made")?;
        }
        Ok(Scratch { directory, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Removes what killed processes left.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) && is_abandoned(&entry.path()) {
            // Another process may be sweeping it too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn is_abandoned(directory: &Path) -> bool {
    let young = fs::metadata(directory)
        .and_then(|metadata| metadata.modified())
        .map(|at| at.elapsed().is_ok_and(|age| age < YOUNG))
        .unwrap_or(true);
    let Ok(lock) = File::open(directory.join(LOCK)) else { return false };
    !young && !matches!(lock.try_lock(), Err(TryLockError::WouldBlock | TryLockError::Error(_)))
}
