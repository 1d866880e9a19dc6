//! What must outlive the agent: who may run each guest (docs/architecture.md,
//! "Who may run the guest").
//!
//! One append-only file a migration and role, `<id>.<role>.journal`, in a
//! directory that one agent holds. The file begins with a [`Created`] and goes on
//! with [`Record`]s:
//!
//! ```text
//! source       Created  SwitchingOver  HandedOver   Ended
//!                                      (fsync before COMMIT is sent)
//! destination  Created  Committed | Aborted         Ended
//!                       (fsync before the guest is resumed, or ABORTED is answered)
//! ```
//!
//! An agent that is killed at any instant finds, when it starts again, every
//! record whose `append` had returned with [`Durability::Synced`]. Everything here
//! blocks; call it off the async threads.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use ramferry_ram::LockedFile;
use thiserror::Error;
use tracing::{info, warn};

use crate::MigrationRole;

pub(crate) use ahead::SyncedAhead;
pub use log::{Durability, MigrationLog};
pub use record::{Created, ParametersRecord, Record, SpecError, SpecRecord};
pub(crate) use survey::{Surveyed, survey};

mod ahead;
mod frame;
mod log;
mod record;
mod survey;

const SUFFIX: &str = ".journal";
const UNFINISHED_SUFFIX: &str = ".journal.unfinished";
const LOCK: &str = "lock";

/// A directory of migration logs, held by this agent alone.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    directory_file: File,
    /// Serialises creation and removal.
    naming: Mutex<()>,
    _lock: LockedFile,
}

/// A migration that an earlier agent left in the journal.
#[derive(Debug)]
pub struct Recovered {
    /// How it began.
    pub created: Created,
    /// What was recorded since, oldest first.
    pub records: Vec<Record>,
    /// Goes on behind them.
    pub log: MigrationLog,
}

impl Journal {
    /// Opens a directory, making it when it is not there; locks it against a
    /// second agent; reads what an earlier one left.
    pub fn open(directory: &Path) -> Result<(Self, Vec<Recovered>), JournalError> {
        let at = |source| JournalError::Io { path: directory.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(at)?;
        check_private(directory)?;
        if let Some(above) = directory.parent() {
            check_private(above)?;
        }
        let lock = lock(directory)?;
        let directory_file = File::open(directory).map_err(at)?;

        let mut recovered = Vec::new();
        for entry in fs::read_dir(directory).map_err(at)? {
            let path = entry.map_err(at)?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if name.ends_with(UNFINISHED_SUFFIX) {
                info!(path = %path.display(), "journal: removing a log whose creation was not finished");
                fs::remove_file(&path).map_err(|source| JournalError::Io { path: path.clone(), source })?;
            } else if name.ends_with(SUFFIX) {
                recovered.push(recover(&path, name)?);
            }
        }
        directory_file.sync_all().map_err(at)?;
        recovered.sort_by_key(|found| (found.created.created_unix_ms, found.created.role));
        let journal =
            Self { directory: directory.to_owned(), directory_file, naming: Mutex::new(()), _lock: lock };
        Ok((journal, recovered))
    }

    /// Begins the log of a migration. When this returns, the log survives a crash.
    pub fn create(
        &self,
        role: MigrationRole,
        id: &str,
        created: &Created,
    ) -> Result<MigrationLog, JournalError> {
        assert!(created.role == role && created.id == id, "a log's name is that of its migration");
        let path = self.path(role, id)?;
        let unfinished = path.with_extension(UNFINISHED_SUFFIX.trim_start_matches('.'));
        let _naming = self.naming.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if path.try_exists().map_err(|source| JournalError::Io { path: path.clone(), source })? {
            return Err(JournalError::Exists { path });
        }
        // Under its own name only once it is whole: a log without a whole
        // `Created` is then always damage, never a crash.
        let begin = || -> Result<MigrationLog, JournalError> {
            let log = MigrationLog::begin(&unfinished, &path, created)?;
            fs::rename(&unfinished, &path)
                .and_then(|()| self.directory_file.sync_all())
                .map_err(|source| JournalError::Io { path: path.clone(), source })?;
            Ok(log)
        };
        begin().inspect_err(|_| {
            for leftover in [&unfinished, &path] {
                match fs::remove_file(leftover) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        warn!(path = %leftover.display(), %error, "journal: cannot remove a log not begun");
                    }
                    _ => {}
                }
            }
        })
    }

    /// Forgets a migration; it need not be there.
    pub fn remove(&self, role: MigrationRole, id: &str) -> Result<(), JournalError> {
        let path = self.path(role, id)?;
        let _naming = self.naming.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match fs::remove_file(&path) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result
                .and_then(|()| self.directory_file.sync_all())
                .map_err(|source| JournalError::Io { path, source }),
        }
    }

    fn path(&self, role: MigrationRole, id: &str) -> Result<PathBuf, JournalError> {
        if !is_migration_id(id) {
            return Err(JournalError::Id { id: id.chars().take(80).collect() });
        }
        Ok(self.directory.join(format!("{id}.{role}{SUFFIX}")))
    }
}

/// Whether `id` can be a migration's: 1 to 64 of `[A-Za-z0-9._-]`.
pub fn is_migration_id(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Keeps a second agent out while it lives.
fn lock(directory: &Path) -> Result<LockedFile, JournalError> {
    let path = directory.join(LOCK);
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|source| JournalError::Io { path: path.clone(), source })?;
    match LockedFile::new(file) {
        Ok(Some(file)) => Ok(file),
        Ok(None) => Err(JournalError::Locked { path: directory.to_owned() }),
        Err(source) => Err(JournalError::Io { path, source }),
    }
}

/// Who can put a file into the journal decides which host runs a guest.
fn check_private(directory: &Path) -> Result<(), JournalError> {
    let stat = rustix::fs::stat(directory)
        .map_err(|errno| JournalError::Io { path: directory.to_owned(), source: errno.into() })?;
    match exposure_of(&stat) {
        None => Ok(()),
        Some((mode, owner)) => Err(JournalError::Exposed { path: directory.to_owned(), mode, owner }),
    }
}

/// Mode and owner of a directory that others than this user could change, where it is one.
pub(crate) fn exposure(directory: &Path) -> Option<(u32, u32)> {
    exposure_of(&rustix::fs::stat(directory).ok()?)
}

fn exposure_of(stat: &rustix::fs::Stat) -> Option<(u32, u32)> {
    let ours = stat.st_uid == 0 || stat.st_uid == rustix::process::geteuid().as_raw();
    // Of a directory such as /tmp nobody can take another's entries away.
    let (others, sticky) = (stat.st_mode & 0o022 != 0, stat.st_mode & 0o1000 != 0);
    (!ours || (others && !sticky)).then_some((stat.st_mode & 0o7777, stat.st_uid))
}

fn recover(path: &Path, name: &str) -> Result<Recovered, JournalError> {
    let recovered = MigrationLog::recover(path)?;
    let created = &recovered.created;
    if name != format!("{}.{}{SUFFIX}", created.id, created.role) {
        return Err(JournalError::Corrupt {
            path: path.to_owned(),
            offset: 0,
            why: "its first record is that of another migration",
        });
    }
    Ok(recovered)
}

impl Recovered {
    /// The record with which the migration ended, when it did.
    pub fn ended(&self) -> Option<&Record> {
        self.records.iter().find(|record| matches!(record, Record::Ended { .. }))
    }
}

/// Why the journal cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The file system refused.
    #[error("journal: {} cannot be used; check its disk, and that the agent may read and write it", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others may change it.
    #[error(
        "journal: other users may change {} (mode {mode:04o}, owner {owner}); \
         make it the agent's own, and writable by nobody else: chmod go-w",
        path.display()
    )]
    Exposed {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The user that owns it.
        owner: u32,
    },
    /// Another agent holds it.
    #[error(
        "journal: {} is held by another agent; stop that agent, or give this one its own state_dir",
        path.display()
    )]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// Not what an agent wrote.
    #[error(
        "journal: {} is damaged at byte {offset}: {why}; it may hold the only record of which host runs the guest. \
         Find out on which host the guest runs, let it run there only, then move the file away and start the agent",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// First byte that is not understood.
        offset: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// A whole record that this version does not know.
    #[error(
        "journal: {} has a record at byte {offset} that this version of the agent does not know; \
         start the version that wrote it",
        path.display()
    )]
    Unknown {
        /// The file.
        path: PathBuf,
        /// Where the record starts.
        offset: u64,
        /// What was not understood.
        #[source]
        source: serde_json::Error,
    },
    /// A log of that migration and role is there.
    #[error("journal: {} exists; delete that migration first, or give another id", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Not an id.
    #[error("journal: {id:?} is not a migration id; give 1 to 64 of A-Z a-z 0-9 . _ -")]
    Id {
        /// As given, cut.
        id: String,
    },
    /// A record or log larger than a reader would accept; nothing was written.
    #[error(
        "journal: a record of {length_bytes} bytes is more than the {limit_bytes} that fit; record less of it"
    )]
    TooLarge {
        /// Its length.
        length_bytes: usize,
        /// The most.
        limit_bytes: u64,
    },
    /// The record is certainly not in the log, which is as it was before.
    #[error("journal: {} took no record; free space on its disk", path.display())]
    Append {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The record may or may not be found at the next start; the log takes no more.
    ///
    /// Nothing may be done or said that presumes either.
    #[error(
        "journal: {} may or may not hold its last record; replace the disk if it fails, and restart the agent",
        path.display()
    )]
    Uncertain {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An earlier append left the log uncertain.
    #[error("journal: {} takes no record since a write to it failed; restart the agent", path.display())]
    Poisoned {
        /// The file.
        path: PathBuf,
    },
}

impl JournalError {
    /// The reason, as in ErrorInfo.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Exists { .. } => "MIGRATION_EXISTS",
            Self::Id { .. } => "MIGRATION_ID_INVALID",
            Self::Uncertain { .. } | Self::Poisoned { .. } => "JOURNAL_UNCERTAIN",
            _ => "JOURNAL_UNUSABLE",
        }
    }
}

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
mod tests;
