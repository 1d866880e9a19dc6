//! Migrations to this host that have no session any more, or never had one: what the journal says of them, and what their source
//! is answered.

use std::path::Path;
use std::sync::Arc;

use ramferry_engine::{Destination, Failure, Reason};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_response::Answer;
use tonic::Status;

use super::{Start, start};
use crate::MigrationRole;
use crate::core::Agent;
use crate::guest_cell::GuestCell;
use crate::journal::{Durability, Record, Recovered};
use crate::keepsake::{self, Keepsake};
use crate::migrations::Entry;
use crate::publish::Publisher;
use crate::status::causes;

/// In the journal, the VMM's process of a migration that never ran here.
const NO_GUEST: u32 = 0;

/// Takes up a migration that the journal holds.
pub(crate) fn recover(agent: &Arc<Agent>, found: Recovered) {
    let mut view = crate::summary::restored(&found);
    let ended = found.records.iter().any(|record| matches!(record, Record::Ended { .. }));
    let entry = |view| match found.created.guest_pid {
        NO_GUEST => Entry::never_ran(view),
        _ => Entry::new(found.created.request_id.clone(), MigrationRole::Destination, view),
    };
    if ended {
        // Recorded, and killed before it was all tidied up.
        keepsake::remove(&agent.config, &found.created.id, MigrationRole::Destination);
        return agent.registry.insert(&entry(view));
    }
    let is_owed = keepsake::owed_path(&agent.config, &found.created.id).exists();
    // The last of the two counts: docs/architecture.md, "Who may run the guest".
    let decided = found.records.iter().rev().find_map(|record| match record {
        Record::Committed if is_owed => Some(Destination::recover_postcopy()),
        Record::Committed => Some(Destination::recover_committed()),
        Record::Aborted { reason, message } => {
            Some(Destination::recover_aborted(crate::source::failure_of(reason, message.clone())))
        }
        _ => None,
    });
    view.set_state(v1::MigrationState::SwitchingOver);
    let entry = entry(view);
    agent.registry.insert(&entry);
    let (id, created) = (&found.created.id, &found.created);
    let socket = created.spec.destination_qmp_path.as_ref();
    let claim = agent.registry.reclaim(MigrationRole::Destination, id, created.guest_pid, socket);
    drop(agent.device_state_room(&found.created.id));
    tracing::warn!(
        id = found.created.id,
        decided = decided.is_some(),
        "taking up a migration that a restart interrupted"
    );
    let engine = decided.unwrap_or_else(Destination::recover_prepared);
    let (qmp, dirs) = (&created.spec.destination_qmp_path, &agent.config.guest_dirs);
    let guest = GuestCell::lost(qmp.clone(), dirs.clone(), created);
    let fabric = kept_fabric(&keepsake::path(&agent.config, id, MigrationRole::Destination));
    let publisher = Publisher::new(&agent.metrics, MigrationRole::Destination, id, "unknown", fabric);
    let run_guest = found.created.guest_was_running;
    let parts = Start {
        engine,
        token: None,
        token_digest: found.created.session,
        guest,
        run_guest,
        plan: None,
        publisher,
        log: found.log,
        claim,
    };
    start(agent, entry, parts);
}

/// Over which a migration to this host reads, for its metrics: known where post-copy was prepared.
fn kept_fabric(path: &Path) -> &'static str {
    // What cannot be read is told to whoever takes the guest up with it.
    Keepsake::read(path).ok().flatten().map_or("unknown", |kept| kept.terms().fabric.as_str())
}

/// The final answer about a migration that has no driver, if it is known.
pub(crate) fn outcome(entry: &Entry) -> Option<Answer> {
    let view = entry.view();
    match view.state() {
        v1::MigrationState::Succeeded => Some(Answer::Running(v1::DestinationRunning::default())),
        v1::MigrationState::Failed
            if view.error.as_ref().is_some_and(|error| error.reason == Reason::MemoryLost.as_str()) =>
        {
            Some(Answer::Lost(v1::MemoryLost { message: view.error.unwrap_or_default().message }))
        }
        v1::MigrationState::Failed | v1::MigrationState::Cancelled => {
            let error = view.error.unwrap_or_default();
            Some(Answer::Aborted(v1::DestinationAborted { reason: error.reason, message: error.message }))
        }
        _ => None,
    }
}

/// Answers for a migration that was never heard of: durably that it never will run here.
pub(crate) async fn abort_unknown(agent: &Arc<Agent>, id: &str) -> Result<Answer, Status> {
    // One at a time: whoever makes ids up takes one thread, and no more records than are his.
    let _turn = agent.recording_never_ran.lock().await;
    if let Some(entry) = agent.registry.get(MigrationRole::Destination, id) {
        return outcome(&entry).ok_or_else(undecided);
    }
    agent.registry.has_room_for_never_ran().map_err(|refusal| crate::source::refused(&refusal))?;
    let (agent, id) = (Arc::clone(agent), id.to_owned());
    crate::source::blocking(move || record_never_ran(&agent, &id)).await?
}

/// The driver of a migration is about to start or has just ended.
pub(crate) fn undecided() -> Status {
    Status::unavailable("the outcome is not decided yet; ask again")
}

fn record_never_ran(agent: &Agent, id: &str) -> Result<Answer, Status> {
    let failure = Failure::new(
        Reason::DestinationAborted,
        "this agent's journal knows no such migration: it never ran here",
    );
    let created = crate::journal::Created {
        id: id.to_owned(),
        request_id: String::new(),
        role: MigrationRole::Destination,
        spec: crate::journal::SpecRecord::default(),
        guest_pid: NO_GUEST,
        created_unix_ms: crate::source::unix_milliseconds(),
        guest_was_running: false,
        session: None,
    };
    let unrecorded = |error: crate::journal::JournalError| {
        crate::status::status(tonic::Code::Unavailable, error.reason(), causes(&error), [])
    };
    let mut log = agent.journal.create(MigrationRole::Destination, id, &created).map_err(unrecorded)?;
    let record = Record::Aborted { reason: failure.reason.as_str().into(), message: failure.message.clone() };
    log.append(&record, Durability::Synced).map_err(unrecorded)?;
    let mut view = v1::Migration {
        id: id.to_owned(),
        error: Some(v1::MigrationError {
            reason: failure.reason.as_str().into(),
            message: failure.message.clone(),
        }),
        ..Default::default()
    };
    view.set_state(v1::MigrationState::Failed);
    log.append(&crate::summary::ended_record(&view), Durability::Buffered).map_err(unrecorded)?;
    agent.registry.insert(&Entry::never_ran(view));
    Ok(Answer::Aborted(aborted(&failure)))
}

pub(super) fn aborted(failure: &Failure) -> v1::DestinationAborted {
    v1::DestinationAborted { reason: failure.reason.as_str().into(), message: failure.message.clone() }
}
