//! What the process tells its caller.

use std::process::ExitCode;

use ramferry_proto::v1::{Migration, MigrationState};

/// How a command ended. The numbers are documented in every `--help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done; of a followed migration: it succeeded.
    Done = 0,
    /// The migration failed, or the command could not do its work.
    Failed = 1,
    /// The command line, or a file that it names, is not usable.
    Usage = 2,
    /// The migration was cancelled.
    Cancelled = 3,
    /// The agent cannot be reached.
    Unreachable = 4,
    /// The agent answered with an error.
    Refused = 5,
    /// A check of doctor failed.
    Unfit = 6,
    /// Left by Ctrl-C, as a shell tells it: 128 + SIGINT.
    Left = 130,
}

impl Exit {
    /// What a migration that has ended means to the caller; none while it has not.
    pub(crate) fn of(migration: &Migration) -> Option<Self> {
        match migration.state() {
            MigrationState::Succeeded => Some(Self::Done),
            MigrationState::Failed => Some(Self::Failed),
            MigrationState::Cancelled => Some(Self::Cancelled),
            MigrationState::Unspecified
            | MigrationState::Pending
            | MigrationState::Preparing
            | MigrationState::Precopy
            | MigrationState::SwitchingOver
            | MigrationState::Postcopy
            | MigrationState::Cancelling => None,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
