use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::RamError;

/// Why it cannot be told what is owed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OwedError {
    /// There is one already.
    #[error("{} exists already: another migration's, or one that has not ended", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Another process, or another part of this one, goes by it.
    #[error("{} is in use: is another agent running?", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// An operation on it failed.
    #[error("cannot {operation} {}, which tells what the guest is owed", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// It is some other file.
    #[error("{} is not a list of what a guest is owed", path.display())]
    NotOwed {
        /// The file.
        path: PathBuf,
    },
    /// It was made by another version of the agent.
    #[error(
        "{} has version {version}, which this agent does not know: run the one that made it", path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// It is not as it was made.
    #[error("{} is damaged: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It tells of another migration.
    #[error("{} tells of migration {found:?}", path.display())]
    OtherMigration {
        /// The file.
        path: PathBuf,
        /// The migration it tells of.
        found: String,
    },
    /// It tells of a guest with other RAM blocks.
    #[error("{} tells of a guest with other RAM blocks", path.display())]
    OtherLayout {
        /// The file.
        path: PathBuf,
    },
    /// A migration's id does not fit into it.
    #[error("a migration's id of {id_bytes} bytes is too long: {max_bytes} may be kept")]
    IdTooLong {
        /// Its length.
        id_bytes: usize,
        /// The longest that may be.
        max_bytes: usize,
    },
    /// It cannot be mapped, or lost a page while it was in use: what is owed is not known any more.
    #[error("{}, which tells what the guest is owed, cannot be used or was damaged in use", path.display())]
    Lost {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: RamError,
    },
}
