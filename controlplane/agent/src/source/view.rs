//! A migration as the API shows it, from what its driver knows.

use std::time::{Duration, Instant};

use ramferry_engine::{Failure, LateWrites, State};
use ramferry_mover::SourceSnapshot;
use ramferry_proto::v1;

pub(crate) fn state(state: State) -> v1::MigrationState {
    match state {
        State::Pending => v1::MigrationState::Pending,
        State::Preparing => v1::MigrationState::Preparing,
        State::Precopy => v1::MigrationState::Precopy,
        State::SwitchingOver => v1::MigrationState::SwitchingOver,
        State::Postcopy => v1::MigrationState::Postcopy,
        State::Cancelling => v1::MigrationState::Cancelling,
        State::Succeeded => v1::MigrationState::Succeeded,
        State::Failed => v1::MigrationState::Failed,
        State::Cancelled => v1::MigrationState::Cancelled,
    }
}

/// What holds a migration up, and for how long.
pub(crate) fn trouble(failure: Option<&Failure>, lasts: Option<Duration>) -> String {
    let lasts = lasts.unwrap_or_default().as_secs();
    failure.map_or_else(String::new, |failure| format!("{failure} (for {lasts} s)"))
}

/// Fills `view` in from `snapshot`, but for its state. The migration was `called` for, then its driver `started`.
pub(crate) fn fill(view: &mut v1::Migration, snapshot: &SourceSnapshot, called: Instant, started: Instant) {
    view.verified = snapshot.verified;
    view.trouble = trouble(snapshot.trouble.as_ref(), snapshot.trouble_for);
    if let Some(tracker) = snapshot.tracker {
        tracker.as_str().clone_into(&mut view.tracker);
    }
    // One that began to write while the migration was under way.
    if snapshot.late_writes == LateWrites::Undrainable && view.recheck_reason.is_empty() {
        "writes of another process".clone_into(&mut view.recheck_reason);
    }
    view.progress = Some(progress(snapshot, called, started));
}

fn progress(snapshot: &SourceSnapshot, called: Instant, started: Instant) -> v1::MigrationProgress {
    let since_call = |since_start: Duration| duration(since_start + started.duration_since(called));
    let engine = &snapshot.progress;
    let counted = &snapshot.counted;
    let done_of_round = (counted.data_bytes + counted.zero_bytes)
        .saturating_sub(engine.transferred_bytes + engine.zero_bytes);
    let under_way = matches!(snapshot.phase, "copy" | "last_copy");
    let remaining =
        if under_way { snapshot.round_bytes.saturating_sub(done_of_round) } else { engine.remaining_bytes };
    let parts = if engine.downtime.is_some() { engine.downtime_parts.named().to_vec() } else { Vec::new() };
    v1::MigrationProgress {
        ram_bytes: snapshot.ram_bytes,
        present_bytes: snapshot.present_bytes,
        zero_bytes: counted.zero_bytes,
        transferred_bytes: counted.data_bytes,
        remaining_bytes: remaining,
        redirtied_bytes: engine.redirtied_bytes,
        late_bytes: engine.late_bytes,
        round: engine.round,
        dirty_rate_bytes_per_second: engine.dirty_rate.map_or(0, |rate| rate.0),
        throughput_bits_per_second: throughput(snapshot),
        registration_time: Some(duration(counted.registration)),
        registered_bytes: counted.registered_bytes,
        pinned_bytes: snapshot.pinned_bytes,
        pinned_peak_bytes: snapshot.pinned_peak_bytes,
        throttle_percent: engine.throttle.0.into(),
        throttle_peak_percent: engine.throttle_peak.0.into(),
        expected_downtime: engine.expected_downtime.map(duration),
        setup_time: engine.setup_time.map(since_call),
        first_write_time: counted.first_write.map(|at| duration(at.duration_since(called))),
        total_time: engine.total_time.map(since_call),
        postcopy: engine.postcopy,
        postcopy_time: engine.postcopy_time.map(duration),
        postcopy_faults: 0,
        downtime: engine.downtime.map(duration),
        downtime_parts: parts
            .into_iter()
            .map(|(name, part)| v1::DowntimePart { name: name.into(), duration: Some(duration(part)) })
            .collect(),
        rounds: engine
            .rounds
            .iter()
            .map(|round| v1::Round {
                transferred_bytes: round.transferred_bytes,
                duration: Some(duration(round.elapsed)),
                dirtied_bytes: round.dirtied_bytes,
            })
            .collect(),
    }
}

/// Bits per second over the time of the copy itself; while the first round is
/// under way there is no such time yet.
fn throughput(snapshot: &SourceSnapshot) -> u64 {
    let copied = snapshot.progress.copy_time.as_secs_f64();
    if copied > 0.0 { (snapshot.progress.transferred_bytes as f64 * 8.0 / copied) as u64 } else { 0 }
}

pub(crate) fn duration(value: Duration) -> prost_types::Duration {
    // Fails only beyond 292 billion years.
    value.try_into().unwrap_or_default()
}
