//! What the journal keeps of a migration that ended, and what is shown of one
//! after a restart.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use prost::Message as _;
use ramferry_proto::v1;
use serde_json::json;

use crate::journal::{Created, Record, Recovered};

/// The record of `ended`, whose state is final.
pub(crate) fn ended_record(ended: &v1::Migration) -> Record {
    let error = ended.error.clone().unwrap_or_default();
    let mut migration = String::new();
    for byte in ended.encode_to_vec() {
        write!(migration, "{byte:02x}").expect("a string takes whatever is written to it");
    }
    Record::Ended {
        state: name(ended.state()).into(),
        reason: error.reason,
        message: error.message,
        // ramferry.v1.Migration, in hexadecimal.
        summary: json!({ "migration": migration }),
    }
}

/// What is known of a migration that the journal holds.
pub(crate) fn restored(found: &Recovered) -> v1::Migration {
    shown(&found.created, &found.records)
}

/// What is shown of a migration with these records.
pub(crate) fn shown(created: &Created, records: &[Record]) -> v1::Migration {
    let create_time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(created.created_unix_ms));
    let mut view = v1::Migration {
        id: created.id.clone(),
        spec: Some((&created.spec).into()),
        create_time: create_time.map(Into::into),
        ..Default::default()
    };
    let ended = records.iter().rev().find_map(|record| match record {
        Record::Ended { state, reason, message, summary } => Some((state, reason, message, summary)),
        _ => None,
    });
    if let Some((state, reason, message, summary)) = ended {
        if let Some(kept) = summary["migration"].as_str().and_then(decode) {
            view = kept;
        }
        let state = v1::MigrationState::from_str_name(&format!("MIGRATION_STATE_{state}"));
        view.set_state(state.unwrap_or(v1::MigrationState::Failed));
        if !reason.is_empty() {
            view.error = Some(v1::MigrationError { reason: reason.clone(), message: message.clone() });
        }
    }
    view
}

fn decode(hexadecimal: &str) -> Option<v1::Migration> {
    let digits = hexadecimal.as_bytes().chunks_exact(2);
    let bytes: Option<Vec<u8>> = digits
        .map(|pair| std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok()))
        .collect();
    v1::Migration::decode(&*bytes?).ok()
}

fn name(state: v1::MigrationState) -> &'static str {
    state.as_str_name().trim_start_matches("MIGRATION_STATE_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_of_a_migration_is_read_back() {
        let mut view = v1::Migration { id: "a".into(), tracker: "uffd_wp".into(), ..Default::default() };
        view.set_state(v1::MigrationState::Succeeded);
        let Record::Ended { state, summary, .. } = ended_record(&view) else { panic!("it ended") };
        assert_eq!(state, "SUCCEEDED");
        assert_eq!(summary["migration"].as_str().and_then(decode), Some(view));
        assert_eq!(decode("zz"), None);
    }
}
