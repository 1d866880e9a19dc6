//! One migration's log.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use tracing::{debug, warn};

use super::frame::{self, BODY_LIMIT_BYTES};
use super::{Created, JournalError, Record, Recovered};

/// Longest log that is read back: more than a migration can write.
pub(super) const LOG_LIMIT_BYTES: u64 = 8 * 1024 * 1024;

/// Whether a record must be on the disk before `append` returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It is: a crash of the host cannot take it back.
    Synced,
    /// It survives the agent, and perhaps not the host.
    Buffered,
}

/// The log of one migration, at its end.
#[derive(Debug)]
pub struct MigrationLog {
    path: PathBuf,
    /// `None` of a migration that ended: the files of those an agent keeps are many.
    file: Option<File>,
    length: u64,
    poisoned: bool,
}

impl MigrationLog {
    /// Adds a record. On [`JournalError::Append`] and [`JournalError::TooLarge`]
    /// the log is as it was; on [`JournalError::Uncertain`] nobody knows, and every
    /// later append fails.
    pub fn append(&mut self, record: &Record, durability: Durability) -> Result<(), JournalError> {
        let frame = encode(record)?;
        self.write(&frame, durability)
    }

    /// Has the disk write, on another thread, what waits in its caches: of a record that must be synced soon, and of
    /// everybody else. Such a record then finds little before it, which may be the greater part of what its sync takes.
    pub(super) fn sync_ahead(&self) -> impl FnOnce() + Send + use<> {
        let path = self.path.clone();
        move || {
            // Opened anew: of a write that failed the kernel tells each opener once, and `append` must be told.
            let synced = File::open(&path).and_then(|file| file.sync_data());
            if let Err(error) = synced {
                debug!(path = %path.display(), %error, "journal: was not synced ahead");
            }
        }
    }

    /// Writes the first record of a log that will be renamed from `written_at` to `path`.
    pub(super) fn begin(written_at: &Path, path: &Path, created: &Created) -> Result<Self, JournalError> {
        let frame = encode(created)?;
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(written_at)
            .map_err(|source| JournalError::Io { path: written_at.to_owned(), source })?;
        let mut log = Self { path: path.to_owned(), file: Some(file), length: 0, poisoned: false };
        log.write(&frame, Durability::Synced)?;
        Ok(log)
    }

    /// Reads a log back and cuts a torn tail off.
    pub(super) fn recover(path: &Path) -> Result<Recovered, JournalError> {
        let at = |source| JournalError::Io { path: path.to_owned(), source };
        let file = fs::OpenOptions::new().read(true).write(true).open(path).map_err(at)?;
        let length = file.metadata().map_err(at)?.len();
        if length > LOG_LIMIT_BYTES {
            return Err(corrupt(path, LOG_LIMIT_BYTES, "it is longer than any log"));
        }
        let mut bytes = vec![0; usize::try_from(length).expect("LOG_LIMIT_BYTES fits")];
        file.read_exact_at(&mut bytes, 0).map_err(at)?;

        let Contents { created, records, end } = read(path, &bytes)?;
        let whole = end as u64;
        if whole < length {
            warn!(path = %path.display(), bytes = length - whole, "journal: cutting off a record not finished");
            file.set_len(whole).map_err(at)?;
        }
        // An earlier agent may have buffered what is about to be acted upon.
        file.sync_all().map_err(at)?;
        let ended = records.iter().any(|record| matches!(record, Record::Ended { .. }));
        let file = (!ended).then_some(file);
        let log = Self { path: path.to_owned(), file, length: whole, poisoned: false };
        Ok(Recovered { created, records, log })
    }

    fn write(&mut self, frame: &[u8], durability: Durability) -> Result<(), JournalError> {
        let Some(file) = self.file.as_ref().filter(|_| !self.poisoned) else {
            return Err(JournalError::Poisoned { path: self.path.clone() });
        };
        let room = LOG_LIMIT_BYTES - self.length;
        if frame.len() as u64 > room {
            return Err(JournalError::TooLarge { length_bytes: frame.len(), limit_bytes: room });
        }
        if let Err(source) = file.write_all_at(frame, self.length) {
            let cut = file.set_len(self.length);
            return Err(self.taken_back(source, cut));
        }
        if durability == Durability::Synced {
            // After a failed fsync the kernel may have dropped the pages or
            // written them: no later call can tell.
            if let Err(source) = file.sync_data() {
                self.poisoned = true;
                return Err(JournalError::Uncertain { path: self.path.clone(), source });
            }
        }
        self.length += frame.len() as u64;
        Ok(())
    }

    /// What a failed write means, after `cut`: cutting off what it may have written.
    fn taken_back(&mut self, source: io::Error, cut: io::Result<()>) -> JournalError {
        match cut {
            Ok(()) => JournalError::Append { path: self.path.clone(), source },
            Err(cut) => {
                warn!(path = %self.path.display(), error = %cut, "journal: cannot cut off half a record");
                self.poisoned = true;
                JournalError::Uncertain { path: self.path.clone(), source }
            }
        }
    }
}

/// What a log's bytes hold.
pub(super) struct Contents {
    pub(super) created: Created,
    pub(super) records: Vec<Record>,
    /// Where its whole records end; what follows is torn.
    pub(super) end: usize,
}

/// Reads the bytes of the log at `path`.
pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<Contents, JournalError> {
    let frames = frame::decode(bytes).map_err(|damage| {
        corrupt(path, damage.offset as u64, "a record is broken and whole ones follow it")
    })?;
    let (first, rest) =
        frames.bodies.split_first().ok_or_else(|| corrupt(path, 0, "its first record is not whole"))?;
    let unknown = |offset: usize| {
        move |source| JournalError::Unknown { path: path.to_owned(), offset: offset as u64, source }
    };
    let created = serde_json::from_slice(first.1).map_err(unknown(first.0))?;
    let records = rest
        .iter()
        .map(|&(offset, body)| serde_json::from_slice(body).map_err(unknown(offset)))
        .collect::<Result<_, _>>()?;
    Ok(Contents { created, records, end: frames.end })
}

fn corrupt(path: &Path, offset: u64, why: &'static str) -> JournalError {
    JournalError::Corrupt { path: path.to_owned(), offset, why }
}

pub(super) fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>, JournalError> {
    let body =
        serde_json::to_vec(record).expect("records hold only what JSON can: string keys, numbers, text");
    frame::encode(&body)
        .ok_or(JournalError::TooLarge { length_bytes: body.len(), limit_bytes: BODY_LIMIT_BYTES as u64 })
}

#[cfg(test)]
impl MigrationLog {
    /// A log over any file, to make its writes fail.
    pub(super) fn over(path: &Path, file: File) -> Self {
        Self { path: path.to_owned(), file: Some(file), length: 0, poisoned: false }
    }
}
