//! A look at a journal that changes nothing, and that the agent which holds it does not notice.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use super::log::{self, LOG_LIMIT_BYTES};
use super::{JournalError, Record, SUFFIX};
use crate::MigrationRole;
use crate::status::causes;

/// A migration in a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Surveyed {
    /// The migration's; of a damaged log, its file's name.
    pub(crate) id: String,
    pub(crate) role: MigrationRole,
    pub(crate) created_unix_ms: u64,
    pub(crate) has_ended: bool,
    pub(crate) is_handed_over: bool,
    /// What is wrong with its log.
    pub(crate) damage: Option<String>,
}

/// The migrations in a directory; none where it was never made.
pub(crate) fn survey(directory: &Path) -> Result<Vec<Surveyed>, JournalError> {
    let at = |source| JournalError::Io { path: directory.to_owned(), source };
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.map_err(at)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(at)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !name.ends_with(SUFFIX) {
            continue;
        }
        match look_at(&path) {
            Ok(surveyed) => found.push(surveyed),
            // Its migration was deleted meanwhile.
            Err(JournalError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error @ (JournalError::Corrupt { .. } | JournalError::Unknown { .. })) => {
                found.push(Surveyed {
                    id: name.to_owned(),
                    role: MigrationRole::Source,
                    created_unix_ms: 0,
                    has_ended: false,
                    is_handed_over: false,
                    damage: Some(causes(&error)),
                });
            }
            Err(error) => return Err(error),
        }
    }
    found.sort_by(|one, other| (one.created_unix_ms, &one.id).cmp(&(other.created_unix_ms, &other.id)));
    Ok(found)
}

fn look_at(path: &Path) -> Result<Surveyed, JournalError> {
    let at = |source| JournalError::Io { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(at)?.take(LOG_LIMIT_BYTES).read_to_end(&mut bytes).map_err(at)?;
    let log::Contents { created, records, .. } = log::read(path, &bytes)?;
    Ok(Surveyed {
        id: created.id,
        role: created.role,
        created_unix_ms: created.created_unix_ms,
        has_ended: records.iter().any(|record| matches!(record, Record::Ended { .. })),
        is_handed_over: records.iter().any(|record| matches!(record, Record::HandedOver)),
        damage: None,
    })
}
