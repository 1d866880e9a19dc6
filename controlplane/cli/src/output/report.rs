//! Migrations as a person reads them.

use ramferry_proto::v1;

use super::summary::{fabric_name, postcopy_name, registration_name, role_name, state_name};
use super::table::{columns, pairs};
use super::{bit_rate, bytes, duration, proto_duration, time};

/// A migration that has ended: what it took.
pub(crate) fn ending(migration: &v1::Migration) -> String {
    let progress = migration.progress.clone().unwrap_or_default();
    let mut text = format!("migration {} {}\n", migration.id, state_name(migration.state()));
    let mut rows = vec![
        ("  error", error(migration)),
        ("  total time", total_time(&progress)),
        ("  downtime", downtime(&progress)),
        ("  throttled", throttled(&progress)),
        ("  throughput", throughput(migration, &progress)),
        ("  memory", memory(&progress)),
        ("  registration", registration(migration, &progress)),
        ("  verified", verified(migration)),
    ];
    if progress.rounds.is_empty() {
        rows.push(("  rounds", "none".to_owned()));
    }
    text.push_str(&pairs(&rows));
    text.push_str(&rounds(&progress));
    text
}

/// All about a migration.
pub(crate) fn details(migration: &v1::Migration) -> String {
    let progress = migration.progress.clone().unwrap_or_default();
    let spec = migration.spec.clone().unwrap_or_default();
    let parameters = spec.parameters.unwrap_or_default();
    let mut text = pairs(&[
        ("id", migration.id.clone()),
        ("state", state_name(migration.state()).to_owned()),
        ("error", error(migration)),
        ("trouble", migration.trouble.clone()),
        ("role", role_name(migration.role()).to_owned()),
        ("source", spec.source_qmp_path),
        (
            "destination",
            format!("{} {}", spec.destination_agent, spec.destination_qmp_path).trim().to_owned(),
        ),
        ("fabric", fabric(migration)),
        ("tracker", migration.tracker.clone()),
        ("rechecks", migration.recheck_reason.clone()),
        ("parameters", parameter_list(&parameters)),
        ("created", time(migration.create_time.as_ref()).unwrap_or_default()),
        ("ended", time(migration.end_time.as_ref()).unwrap_or_default()),
        ("round", progress.round.to_string()),
        ("remaining", bytes(progress.remaining_bytes)),
        ("dirty rate", format!("{}/s", bytes(progress.dirty_rate_bytes_per_second))),
        ("expected", expected_downtime(&progress)),
        ("total time", total_time(&progress)),
        ("downtime", downtime(&progress)),
        ("throttled", throttled(&progress)),
        ("trouble", migration.trouble.clone()),
        ("throughput", throughput(migration, &progress)),
        ("memory", memory(&progress)),
        ("registration", registration(migration, &progress)),
        ("verified", verified(migration)),
    ]);
    text.push_str(&rounds(&progress));
    text.push_str(&state_changes(migration));
    text
}

/// What a check found.
pub(crate) fn check(answer: &v1::CheckMigrationResponse) -> String {
    let fabric = match fabric_name(answer.fabric()) {
        Some(name) => with_reason(name, &answer.fabric_reason),
        None => String::new(),
    };
    let memory = format!("{}, {} present", bytes(answer.ram_bytes), bytes(answer.present_bytes));
    let rows = [
        ("  source", answer.source_vmm.clone()),
        ("  destination", answer.destination_vmm.clone()),
        ("  fabric", fabric),
        ("  tracker", answer.tracker.clone()),
        ("  memory", memory),
        ("  rechecks", answer.recheck_reason.clone()),
    ];
    format!("the guest can be migrated\n{}", pairs(&rows))
}

/// One line a migration.
pub(crate) fn list(migrations: &[v1::Migration]) -> String {
    let row = |migration: &v1::Migration| {
        let progress = migration.progress.clone().unwrap_or_default();
        let spec = migration.spec.clone().unwrap_or_default();
        vec![
            migration.id.clone(),
            state_name(migration.state()).to_owned(),
            role_name(migration.role()).to_owned(),
            fabric_name(migration.fabric()).unwrap_or("-").to_owned(),
            progress.round.to_string(),
            bytes(progress.remaining_bytes),
            bit_rate(progress.throughput_bits_per_second),
            time(migration.create_time.as_ref()).unwrap_or_else(|| "-".to_owned()),
            spec.destination_agent,
        ]
    };
    let rows: Vec<_> = migrations.iter().map(row).collect();
    let heading =
        ["ID", "STATE", "ROLE", "FABRIC", "ROUND", "REMAINING", "THROUGHPUT", "CREATED", "DESTINATION"];
    columns(&heading, &rows)
}

/// `TIMEOUT: did not converge`; empty without an error.
pub(crate) fn error(migration: &v1::Migration) -> String {
    migration.error.as_ref().map_or_else(String::new, |error| format!("{}: {}", error.reason, error.message))
}

/// `~12.3 ms downtime`; empty before there is an estimate.
pub(crate) fn expected_downtime(progress: &v1::MigrationProgress) -> String {
    proto_duration(progress.expected_downtime.as_ref())
        .map_or_else(String::new, |expected| format!("~{} downtime", duration(expected)))
}

fn fabric(migration: &v1::Migration) -> String {
    fabric_name(migration.fabric())
        .map_or_else(String::new, |name| with_reason(name, &migration.fabric_reason))
}

fn with_reason(name: &str, reason: &str) -> String {
    if reason.is_empty() { name.to_owned() } else { format!("{name} ({reason})") }
}

fn total_time(progress: &v1::MigrationProgress) -> String {
    let setup = proto_duration(progress.setup_time.as_ref());
    match (proto_duration(progress.total_time.as_ref()), setup) {
        (Some(total), Some(setup)) => format!("{} ({} of it setup)", duration(total), duration(setup)),
        (Some(total), None) => duration(total),
        (None, Some(setup)) => format!("- ({} setup)", duration(setup)),
        (None, None) => String::new(),
    }
}

fn downtime(progress: &v1::MigrationProgress) -> String {
    let Some(downtime) = proto_duration(progress.downtime.as_ref()) else { return String::new() };
    let part = |part: &v1::DowntimePart| {
        let spent = proto_duration(part.duration.as_ref()).filter(|spent| !spent.is_zero())?;
        Some(format!("{} {}", part.name, duration(spent)))
    };
    let parts: Vec<_> = progress.downtime_parts.iter().filter_map(part).collect();
    with_reason(&duration(downtime), &parts.join(", "))
}

fn throttled(progress: &v1::MigrationProgress) -> String {
    match (progress.throttle_percent, progress.throttle_peak_percent) {
        (_, 0) => String::new(),
        (0, peak) => format!("no longer, by {peak} % at most"),
        (now, peak) => format!("by {now} %, {peak} % at most"),
    }
}

fn throughput(migration: &v1::Migration, progress: &v1::MigrationProgress) -> String {
    let over = fabric_name(migration.fabric()).map_or_else(String::new, |fabric| format!(" over {fabric}"));
    format!("{}{over}", bit_rate(progress.throughput_bits_per_second))
}

fn memory(progress: &v1::MigrationProgress) -> String {
    format!(
        "{}, {} present, {} zero, {} transferred",
        bytes(progress.ram_bytes),
        bytes(progress.present_bytes),
        bytes(progress.zero_bytes),
        bytes(progress.transferred_bytes),
    )
}

fn registration(migration: &v1::Migration, progress: &v1::MigrationProgress) -> String {
    let parameters = migration.spec.as_ref().and_then(|spec| spec.parameters.as_ref());
    let mode = parameters.and_then(|parameters| registration_name(parameters.registration_mode()));
    let spent = proto_duration(progress.registration_time.as_ref()).unwrap_or_default();
    let mode = mode.map_or_else(String::new, |mode| format!("{mode}, "));
    format!(
        "{mode}{} in {}, at most {} at once",
        bytes(progress.registered_bytes),
        duration(spent),
        bytes(progress.pinned_peak_bytes),
    )
}

fn verified(migration: &v1::Migration) -> String {
    match migration.verified {
        Some(true) => "yes: memory is equal on both sides".to_owned(),
        Some(false) => "NO: memory differs".to_owned(),
        None => String::new(),
    }
}

fn parameter_list(parameters: &v1::MigrationParameters) -> String {
    let time = |name: &str, value: Option<&prost_types::Duration>| {
        proto_duration(value).map(|value| format!("{name} {}", duration(value)))
    };
    let limit = |name: &str, value: u64, text: fn(u64) -> String| {
        (value != 0).then(|| format!("{name} {}", text(value)))
    };
    let action = match parameters.timeout_action() {
        v1::TimeoutAction::Unspecified => None,
        v1::TimeoutAction::Cancel => Some("on timeout cancel".to_owned()),
        v1::TimeoutAction::Force => Some("on timeout force".to_owned()),
    };
    let given = [
        time("max downtime", parameters.max_downtime.as_ref()),
        limit("bandwidth limit", parameters.bandwidth_limit_bits_per_second, bit_rate),
        time("timeout", parameters.timeout.as_ref()),
        action,
        time("no progress", parameters.no_progress_timeout.as_ref()),
        limit("pin budget", parameters.pin_budget_bytes, bytes),
        (parameters.streams != 0).then(|| format!("streams {}", parameters.streams)),
        parameters.verify.then(|| "verify".to_owned()),
        Some(postcopy_name(parameters.postcopy()))
            .filter(|name| *name != "never")
            .map(|name| format!("post-copy {name}")),
        (parameters.throttle_max_percent != 0)
            .then(|| format!("throttle {} %", parameters.throttle_max_percent)),
    ];
    given.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn rounds(progress: &v1::MigrationProgress) -> String {
    if progress.rounds.is_empty() {
        return String::new();
    }
    let row = |(index, round): (usize, &v1::Round)| {
        let spent = proto_duration(round.duration.as_ref()).unwrap_or_default();
        vec![
            format!("  {}", index + 1),
            bytes(round.transferred_bytes),
            duration(spent),
            bytes(round.dirtied_bytes),
        ]
    };
    let rows: Vec<_> = progress.rounds.iter().enumerate().map(row).collect();
    columns(&["  ROUND", "SENT", "TIME", "DIRTIED"], &rows)
}

fn state_changes(migration: &v1::Migration) -> String {
    if migration.state_changes.is_empty() {
        return String::new();
    }
    let row = |change: &v1::StateChange| {
        let entered = time(change.time.as_ref()).unwrap_or_default();
        vec![format!("  {}", state_name(change.state())), entered]
    };
    let rows: Vec<_> = migration.state_changes.iter().map(row).collect();
    columns(&["  STATE", "ENTERED"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nanos(nanos: i32) -> Option<prost_types::Duration> {
        Some(prost_types::Duration { seconds: 0, nanos })
    }

    #[test]
    fn ending_shows_times_parts_and_rounds() {
        let progress = v1::MigrationProgress {
            ram_bytes: 4 << 30,
            present_bytes: 1 << 30,
            total_time: nanos(900_000_000),
            setup_time: nanos(50_000_000),
            downtime: nanos(12_000_000),
            downtime_parts: vec![v1::DowntimePart { name: "copy".into(), duration: nanos(3_000_000) }],
            throughput_bits_per_second: 38_100_000_000,
            rounds: vec![v1::Round {
                transferred_bytes: 1 << 30,
                duration: nanos(220_000_000),
                dirtied_bytes: 4096,
            }],
            ..Default::default()
        };
        let migration = v1::Migration {
            id: "vm-1".into(),
            state: v1::MigrationState::Succeeded.into(),
            fabric: v1::FabricKind::Shm.into(),
            progress: Some(progress),
            verified: Some(true),
            ..Default::default()
        };
        assert_eq!(
            ending(&migration),
            "migration vm-1 SUCCEEDED\n  \
               total time    900 ms (50.0 ms of it setup)\n  \
               downtime      12.0 ms (copy 3.00 ms)\n  \
               throughput    38.1 Gbit/s over shm\n  \
               memory        4.00 GiB, 1.00 GiB present, 0 B zero, 0 B transferred\n  \
               registration  0 B in 0 s, at most 0 B at once\n  \
               verified      yes: memory is equal on both sides\n  \
               ROUND  SENT      TIME    DIRTIED\n  \
               1      1.00 GiB  220 ms  4.00 KiB\n"
        );
    }

    #[test]
    fn failure_without_progress_shows_its_error() {
        let error = v1::MigrationError { reason: "LINK_LOST".into(), message: "peer went away".into() };
        let migration = v1::Migration {
            id: "vm-1".into(),
            state: v1::MigrationState::Failed.into(),
            error: Some(error),
            ..Default::default()
        };
        let text = ending(&migration);
        assert!(
            text.starts_with("migration vm-1 FAILED\n  error         LINK_LOST: peer went away\n"),
            "{text}"
        );
        assert!(!text.contains("downtime"), "{text}");
    }
}
