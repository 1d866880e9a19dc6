//! What reads a log's bytes, for those who make such bytes up: `lab/fuzz`.

use std::path::Path;

use super::{Created, JournalError, Record, frame, log};

/// What a log's bytes hold: its first record, the others, and where they end.
pub fn read(bytes: &[u8]) -> Result<(Created, Vec<Record>, usize), JournalError> {
    log::read(Path::new("fuzzed"), bytes).map(|found| (found.created, found.records, found.end))
}

/// The frame of a record.
pub fn encode(record: &Record) -> Result<Vec<u8>, JournalError> {
    log::encode(record)
}

/// A frame around any bytes; `None` when they are none, or too many.
pub fn frame(body: &[u8]) -> Option<Vec<u8>> {
    frame::encode(body)
}
