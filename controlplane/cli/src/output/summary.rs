//! A migration as a program reads it. The keys and their order are part of the
//! command line's contract.

use std::time::Duration;

use ramferry_proto::v1;
use serde::ser::{Serialize, SerializeMap as _, Serializer};

use super::{proto_duration, time};

/// What `migrate --output json` prints.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Summary {
    id: String,
    state: &'static str,
    fabric: Option<&'static str>,
    registration: Option<&'static str>,
    postcopy: &'static str,
    ram_bytes: u64,
    present_bytes: u64,
    zero_bytes: u64,
    transferred_bytes: u64,
    rounds: Vec<Round>,
    setup_seconds: Option<f64>,
    total_seconds: Option<f64>,
    /// From the destination's resume to the last page.
    postcopy_seconds: Option<f64>,
    downtime_seconds: Option<f64>,
    downtime_parts: Parts,
    /// The most processor time that was taken from the guest.
    throttle_peak_percent: u32,
    throughput_bits_per_second: u64,
    registration_seconds: f64,
    registered_bytes: u64,
    pinned_peak_bytes: u64,
    verified: Option<bool>,
    error: Option<EndError>,
}

/// What `get`, `watch` and `list` print of a migration: a summary, then where it stands.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Details {
    #[serde(flatten)]
    summary: Summary,
    role: &'static str,
    source_qmp: String,
    destination_qmp: String,
    destination_agent: String,
    fabric_reason: String,
    tracker: Option<String>,
    /// What holds the migration up, where it can neither go on nor end.
    trouble: Option<String>,
    recheck_reason: Option<String>,
    late_bytes: u64,
    round: u32,
    remaining_bytes: u64,
    redirtied_bytes: u64,
    dirty_rate_bytes_per_second: u64,
    expected_downtime_seconds: Option<f64>,
    throttle_percent: u32,
    first_write_seconds: Option<f64>,
    pinned_bytes: u64,
    parameters: Option<Parameters>,
    create_time: Option<String>,
    end_time: Option<String>,
    state_changes: Vec<StateChange>,
}

#[derive(Debug, serde::Serialize)]
struct Round {
    bytes: u64,
    seconds: f64,
    dirtied_bytes: u64,
}

#[derive(Debug, serde::Serialize)]
struct EndError {
    reason: String,
    message: String,
}

#[derive(Debug, serde::Serialize)]
struct Parameters {
    max_downtime_seconds: Option<f64>,
    bandwidth_limit_bits_per_second: Option<u64>,
    timeout_seconds: Option<f64>,
    on_timeout: Option<&'static str>,
    no_progress_timeout_seconds: Option<f64>,
    pin_budget_bytes: Option<u64>,
    streams: Option<u32>,
    verify: bool,
    throttle_max_percent: Option<u32>,
}

#[derive(Debug, serde::Serialize)]
struct StateChange {
    state: &'static str,
    time: Option<String>,
}

/// Seconds by name, in the order of their making.
#[derive(Debug)]
struct Parts(Vec<(String, f64)>);

impl Serialize for Parts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, seconds) in &self.0 {
            map.serialize_entry(name, seconds)?;
        }
        map.end()
    }
}

impl Summary {
    /// The summary of a migration, ended or not.
    pub(crate) fn new(migration: &v1::Migration) -> Self {
        let nothing = v1::MigrationProgress::default();
        let progress = migration.progress.as_ref().unwrap_or(&nothing);
        let parameters = migration.spec.as_ref().and_then(|spec| spec.parameters.as_ref());
        let rounds = progress.rounds.iter().map(|round| Round {
            bytes: round.transferred_bytes,
            seconds: seconds(round.duration.as_ref()).unwrap_or(0.0),
            dirtied_bytes: round.dirtied_bytes,
        });
        let parts = progress
            .downtime_parts
            .iter()
            .map(|part| (part.name.clone(), seconds(part.duration.as_ref()).unwrap_or(0.0)));
        let error = migration
            .error
            .as_ref()
            .map(|error| EndError { reason: error.reason.clone(), message: error.message.clone() });
        Self {
            id: migration.id.clone(),
            state: state_name(migration.state()),
            fabric: fabric_name(migration.fabric()),
            registration: parameters.and_then(|parameters| registration_name(parameters.registration_mode())),
            postcopy: parameters.map_or("never", |parameters| postcopy_name(parameters.postcopy())),
            ram_bytes: progress.ram_bytes,
            present_bytes: progress.present_bytes,
            zero_bytes: progress.zero_bytes,
            transferred_bytes: progress.transferred_bytes,
            rounds: rounds.collect(),
            setup_seconds: seconds(progress.setup_time.as_ref()),
            total_seconds: seconds(progress.total_time.as_ref()),
            postcopy_seconds: seconds(progress.postcopy_time.as_ref()),
            downtime_seconds: seconds(progress.downtime.as_ref()),
            downtime_parts: Parts(parts.collect()),
            throttle_peak_percent: progress.throttle_peak_percent,
            throughput_bits_per_second: progress.throughput_bits_per_second,
            registration_seconds: seconds(progress.registration_time.as_ref()).unwrap_or(0.0),
            registered_bytes: progress.registered_bytes,
            pinned_peak_bytes: progress.pinned_peak_bytes,
            verified: migration.verified,
            error,
        }
    }
}

impl Details {
    /// All about a migration.
    pub(crate) fn new(migration: &v1::Migration) -> Self {
        let nothing = v1::MigrationProgress::default();
        let progress = migration.progress.as_ref().unwrap_or(&nothing);
        let spec = migration.spec.clone().unwrap_or_default();
        let changes = migration.state_changes.iter();
        Self {
            summary: Summary::new(migration),
            role: role_name(migration.role()),
            source_qmp: spec.source_qmp_path,
            destination_qmp: spec.destination_qmp_path,
            destination_agent: spec.destination_agent,
            fabric_reason: migration.fabric_reason.clone(),
            tracker: Some(migration.tracker.clone()).filter(|tracker| !tracker.is_empty()),
            trouble: Some(migration.trouble.clone()).filter(|trouble| !trouble.is_empty()),
            recheck_reason: Some(migration.recheck_reason.clone()).filter(|reason| !reason.is_empty()),
            late_bytes: progress.late_bytes,
            round: progress.round,
            remaining_bytes: progress.remaining_bytes,
            redirtied_bytes: progress.redirtied_bytes,
            dirty_rate_bytes_per_second: progress.dirty_rate_bytes_per_second,
            expected_downtime_seconds: seconds(progress.expected_downtime.as_ref()),
            throttle_percent: progress.throttle_percent,
            first_write_seconds: seconds(progress.first_write_time.as_ref()),
            pinned_bytes: progress.pinned_bytes,
            parameters: spec.parameters.as_ref().map(Parameters::new),
            create_time: time(migration.create_time.as_ref()),
            end_time: time(migration.end_time.as_ref()),
            state_changes: changes
                .map(|change| StateChange {
                    state: state_name(change.state()),
                    time: time(change.time.as_ref()),
                })
                .collect(),
        }
    }
}

impl Parameters {
    fn new(parameters: &v1::MigrationParameters) -> Self {
        Self {
            max_downtime_seconds: seconds(parameters.max_downtime.as_ref()),
            bandwidth_limit_bits_per_second: limit(parameters.bandwidth_limit_bits_per_second),
            timeout_seconds: seconds(parameters.timeout.as_ref()),
            on_timeout: match parameters.timeout_action() {
                v1::TimeoutAction::Unspecified => None,
                v1::TimeoutAction::Cancel => Some("cancel"),
                v1::TimeoutAction::Force => Some("force"),
            },
            no_progress_timeout_seconds: seconds(parameters.no_progress_timeout.as_ref()),
            pin_budget_bytes: limit(parameters.pin_budget_bytes),
            streams: Some(parameters.streams).filter(|streams| *streams != 0),
            verify: parameters.verify,
            throttle_max_percent: Some(parameters.throttle_max_percent).filter(|percent| *percent != 0),
        }
    }
}

/// The name of a state, as it is in the protocol without its prefix.
pub(crate) fn state_name(state: v1::MigrationState) -> &'static str {
    state.as_str_name().trim_start_matches("MIGRATION_STATE_")
}

/// The name of a fabric, as `--fabric` takes it; none before one was chosen.
pub(crate) fn fabric_name(fabric: v1::FabricKind) -> Option<&'static str> {
    match fabric {
        v1::FabricKind::Unspecified => None,
        v1::FabricKind::Verbs => Some("verbs"),
        v1::FabricKind::Shm => Some("shm"),
        v1::FabricKind::Tcp => Some("tcp"),
    }
}

/// The name of a mode of post-copy, as `--postcopy` takes it.
pub(crate) fn postcopy_name(postcopy: v1::Postcopy) -> &'static str {
    match postcopy {
        v1::Postcopy::Unspecified | v1::Postcopy::Never => "never",
        v1::Postcopy::Allow => "allow",
        v1::Postcopy::Always => "always",
    }
}

/// The name of a registration mode, as `--registration` takes it.
pub(crate) fn registration_name(mode: v1::RegistrationMode) -> Option<&'static str> {
    match mode {
        v1::RegistrationMode::Unspecified => None,
        v1::RegistrationMode::Dynamic => Some("dynamic"),
        v1::RegistrationMode::PinAll => Some("pin-all"),
    }
}

/// Which side of a migration the agent is.
pub(crate) fn role_name(role: v1::MigrationRole) -> &'static str {
    match role {
        v1::MigrationRole::Unspecified => "unknown",
        v1::MigrationRole::Source => "source",
        v1::MigrationRole::Destination => "destination",
    }
}

fn limit(limit: u64) -> Option<u64> {
    Some(limit).filter(|limit| *limit != 0)
}

fn seconds(duration: Option<&prost_types::Duration>) -> Option<f64> {
    proto_duration(duration).map(exact_seconds)
}

/// Divided once, so that 12 s and 345 ms print as 12.345.
fn exact_seconds(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_their_order_are_kept() {
        let text = serde_json::to_string(&Summary::new(&v1::Migration::default())).expect("plain data");
        assert_eq!(
            text,
            "{\"id\":\"\",\"state\":\"UNSPECIFIED\",\"fabric\":null,\"registration\":null,\"postcopy\":\"never\",\
             \"ram_bytes\":0,\"present_bytes\":0,\"zero_bytes\":0,\"transferred_bytes\":0,\"rounds\":[],\
             \"setup_seconds\":null,\"total_seconds\":null,\"postcopy_seconds\":null,\"downtime_seconds\":null,\"downtime_parts\":{},\"throttle_peak_percent\":0,\
             \"throughput_bits_per_second\":0,\"registration_seconds\":0.0,\"registered_bytes\":0,\
             \"pinned_peak_bytes\":0,\"verified\":null,\"error\":null}"
        );
    }

    #[test]
    fn details_begin_with_the_summary() {
        let migration = v1::Migration { id: "vm-1".into(), ..Default::default() };
        let summary = serde_json::to_string(&Summary::new(&migration)).expect("plain data");
        let details = serde_json::to_string(&Details::new(&migration)).expect("plain data");
        assert!(details.starts_with(summary.trim_end_matches('}')), "{details}");
    }

    #[test]
    fn seconds_print_as_they_were_given() {
        for (seconds_part, nanos, text) in
            [(12, 345_000_000, "12.345"), (0, 12_300_000, "0.0123"), (1, 1, "1.000000001")]
        {
            let duration = prost_types::Duration { seconds: seconds_part, nanos };
            assert_eq!(serde_json::to_string(&seconds(Some(&duration))).expect("a number"), text);
        }
    }

    #[test]
    fn downtime_parts_keep_the_agents_order() {
        let part = |name: &str, nanos| v1::DowntimePart {
            name: name.into(),
            duration: Some(prost_types::Duration { seconds: 0, nanos }),
        };
        let progress = v1::MigrationProgress {
            downtime_parts: vec![part("pause", 2_000_000), part("harvest", 1_000_000)],
            ..Default::default()
        };
        let migration = v1::Migration { progress: Some(progress), ..Default::default() };
        let text = serde_json::to_string(&Summary::new(&migration)).expect("plain data");
        assert!(text.contains("\"downtime_parts\":{\"pause\":0.002,\"harvest\":0.001}"), "{text}");
    }
}
