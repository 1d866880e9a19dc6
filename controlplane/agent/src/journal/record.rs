//! What a log holds. Fields are only ever added, with a default.

use std::time::Duration;

use ramferry_proto::v1;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::MigrationRole;

/// How a migration began: the first record of its log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Created {
    /// The migration's.
    pub id: String,
    /// The caller's, to recognise a repeated call; may be empty.
    pub request_id: String,
    /// This agent's side.
    pub role: MigrationRole,
    /// What was asked for; at the destination, what it was told.
    pub spec: SpecRecord,
    /// The VMM of this side's guest.
    pub guest_pid: u32,
    /// When, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Whether the source's guest ran, and thus whether the destination's is to.
    pub guest_was_running: bool,
    /// A digest of the session's token, in hexadecimal; never the token.
    pub session: Option<String>,
}

/// What happened since.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// The source's guest may stand still from here on.
    SwitchingOver,
    /// COMMIT may have been sent: the source may not resume its guest.
    HandedOver,
    /// The destination's guest may run.
    Committed,
    /// This side's part ended without the guest having moved; at the destination
    /// it will never run there.
    Aborted {
        /// As in ErrorInfo.
        reason: String,
        /// What happened.
        message: String,
    },
    /// Nothing more will happen.
    Ended {
        /// SUCCEEDED, FAILED or CANCELLED, as named in `ramferry.v1.MigrationState`.
        state: String,
        /// As in ErrorInfo; empty when it succeeded.
        reason: String,
        /// What happened; empty when it succeeded.
        message: String,
        /// What to show of the migration from now on.
        summary: serde_json::Value,
    },
}

/// `ramferry.v1.MigrationSpec`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SpecRecord {
    /// Path of the source guest's QMP socket.
    pub source_qmp_path: String,
    /// Path of the destination guest's QMP socket.
    pub destination_qmp_path: String,
    /// "host:port" of the destination's agent.
    pub destination_agent: String,
    /// `None` where none were given.
    pub parameters: Option<ParametersRecord>,
}

/// `ramferry.v1.MigrationParameters`; enumerations as their numbers, which the
/// protocol never changes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs, reason = "documented in migration.proto, field by field")]
pub struct ParametersRecord {
    pub max_downtime: Option<Duration>,
    pub bandwidth_limit_bits_per_second: u64,
    pub timeout: Option<Duration>,
    pub timeout_action: i32,
    pub no_progress_timeout: Option<Duration>,
    pub registration_mode: i32,
    pub pin_budget_bytes: u64,
    pub fabric: i32,
    pub streams: u32,
    pub verify: bool,
    pub postcopy: i32,
    pub throttle_max_percent: u32,
}

/// A duration of a spec that is no time span.
#[derive(Debug, Error)]
#[error("{field} is negative or out of range; give a duration of at least 0")]
pub struct SpecError {
    /// Which field.
    pub field: &'static str,
    /// Why.
    #[source]
    pub source: prost_types::DurationError,
}

impl TryFrom<&v1::MigrationSpec> for SpecRecord {
    type Error = SpecError;

    fn try_from(spec: &v1::MigrationSpec) -> Result<Self, SpecError> {
        Ok(Self {
            source_qmp_path: spec.source_qmp_path.clone(),
            destination_qmp_path: spec.destination_qmp_path.clone(),
            destination_agent: spec.destination_agent.clone(),
            parameters: spec.parameters.as_ref().map(ParametersRecord::try_from).transpose()?,
        })
    }
}

impl From<&SpecRecord> for v1::MigrationSpec {
    fn from(spec: &SpecRecord) -> Self {
        Self {
            source_qmp_path: spec.source_qmp_path.clone(),
            destination_qmp_path: spec.destination_qmp_path.clone(),
            destination_agent: spec.destination_agent.clone(),
            parameters: spec.parameters.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<&v1::MigrationParameters> for ParametersRecord {
    type Error = SpecError;

    fn try_from(parameters: &v1::MigrationParameters) -> Result<Self, SpecError> {
        Ok(Self {
            max_downtime: duration("max_downtime", parameters.max_downtime)?,
            bandwidth_limit_bits_per_second: parameters.bandwidth_limit_bits_per_second,
            timeout: duration("timeout", parameters.timeout)?,
            timeout_action: parameters.timeout_action,
            no_progress_timeout: duration("no_progress_timeout", parameters.no_progress_timeout)?,
            registration_mode: parameters.registration_mode,
            pin_budget_bytes: parameters.pin_budget_bytes,
            fabric: parameters.fabric,
            streams: parameters.streams,
            verify: parameters.verify,
            postcopy: parameters.postcopy,
            throttle_max_percent: parameters.throttle_max_percent,
        })
    }
}

impl From<&ParametersRecord> for v1::MigrationParameters {
    fn from(parameters: &ParametersRecord) -> Self {
        let wire = |duration: Option<Duration>| duration.and_then(|duration| duration.try_into().ok());
        Self {
            max_downtime: wire(parameters.max_downtime),
            bandwidth_limit_bits_per_second: parameters.bandwidth_limit_bits_per_second,
            timeout: wire(parameters.timeout),
            timeout_action: parameters.timeout_action,
            no_progress_timeout: wire(parameters.no_progress_timeout),
            registration_mode: parameters.registration_mode,
            pin_budget_bytes: parameters.pin_budget_bytes,
            fabric: parameters.fabric,
            streams: parameters.streams,
            verify: parameters.verify,
            postcopy: parameters.postcopy,
            throttle_max_percent: parameters.throttle_max_percent,
        }
    }
}

fn duration(
    field: &'static str,
    value: Option<prost_types::Duration>,
) -> Result<Option<Duration>, SpecError> {
    value.map(|value| value.try_into().map_err(|source| SpecError { field, source })).transpose()
}
