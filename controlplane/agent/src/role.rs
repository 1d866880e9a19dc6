//! Which side of a migration this agent is.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which side of a migration this agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationRole {
    /// Its guest's RAM moves away.
    Source,
    /// RAM moves to its guest.
    Destination,
}

impl MigrationRole {
    /// The name in metrics, journals and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl fmt::Display for MigrationRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<MigrationRole> for ramferry_proto::v1::MigrationRole {
    fn from(role: MigrationRole) -> Self {
        match role {
            MigrationRole::Source => Self::Source,
            MigrationRole::Destination => Self::Destination,
        }
    }
}
