//! Waiting for QEMU to get somewhere.

use std::time::{Duration, SystemTime};

use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::error::Step;
use crate::guest::GuestStatus;
use crate::qmp::{QmpClient, QmpError, QmpEvent};
use crate::{GuestError, Qemu};

use super::replies::MigrateInfo;

/// Events are what is waited for; this is for one that was missed.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Between questions when the answer is about to change.
const ASK_INTERVAL: Duration = Duration::from_micros(500);

/// What was learnt.
pub(super) enum Seen<'a> {
    /// QEMU's migration has entered a state, at a time.
    Migration(&'a str),
    /// The vCPUs stopped.
    Stopped(SystemTime),
    /// The vCPUs run.
    Resumed,
    /// What QEMU answered when asked.
    Status(&'a GuestStatus),
}

/// What is made of it.
pub(super) enum Verdict<T> {
    /// Goes on waiting.
    Wait,
    /// Asks QEMU for its status: at once after an event, soon after a status.
    Ask,
    /// It is there.
    Done(T),
    /// It will not get there: the migration has ended in another way.
    Failed,
}

impl Qemu {
    /// Shows `judge` how things stand and what happens, until it has seen enough or
    /// `limit` is over.
    pub(super) async fn watch<T>(
        &self,
        client: &QmpClient,
        mut events: Receiver<QmpEvent>,
        step: Step,
        limit: Duration,
        mut judge: impl FnMut(Seen<'_>) -> Verdict<T>,
    ) -> Result<T, GuestError> {
        let deadline = Instant::now() + limit;
        let mut last: Option<GuestStatus> = None;
        let mut next_poll = Instant::now();
        loop {
            if Instant::now() >= deadline {
                return Err(step_timeout(step, limit, last));
            }
            let verdict = tokio::select! {
                biased;
                event = events.recv() => match event {
                    Ok(event) => match seen(&event) {
                        Some(seen) => judge(seen),
                        None => Verdict::Wait,
                    },
                    Err(RecvError::Lagged(_)) => Verdict::Ask,
                    Err(RecvError::Closed) => return Err(self.why_lost(QmpError::Ended(client.ended().await)).await),
                },
                ended = client.ended() => return Err(self.why_lost(QmpError::Ended(ended)).await),
                () = sleep_until(next_poll.min(deadline)) => Verdict::Ask,
            };
            let verdict = if let Verdict::Ask = verdict {
                next_poll = Instant::now() + POLL_INTERVAL;
                // QEMU answers late while it moves device state.
                let Ok(answer) = timeout_at(deadline, self.status_by(client)).await else { continue };
                match answer {
                    Ok((status, _)) => judge(Seen::Status(last.insert(status))),
                    Err(QmpError::Timeout { .. }) => Verdict::Wait,
                    Err(error) if error.has_ended() => return Err(self.why_lost(error).await),
                    Err(error) => return Err(error.into()),
                }
            } else {
                verdict
            };
            match verdict {
                Verdict::Wait => {}
                Verdict::Ask => next_poll = Instant::now() + ASK_INTERVAL,
                Verdict::Done(value) => return Ok(value),
                Verdict::Failed => return Err(self.failure(client, step).await),
            }
        }
    }

    async fn failure(&self, client: &QmpClient, step: Step) -> GuestError {
        match self.status_by(client).await {
            Ok((_, MigrateInfo { status, error_desc, .. })) => GuestError::Failed {
                step,
                status: status.unwrap_or_else(|| "none".to_owned()),
                description: error_desc,
            },
            Err(error) => self.why_lost(error).await,
        }
    }
}

pub(super) fn step_timeout(step: Step, limit: Duration, last: Option<GuestStatus>) -> GuestError {
    let unknown = || "unknown".to_owned();
    let (run_state, migration) = match last {
        Some(status) => (status.run_state, status.migration.unwrap_or_else(|| "none".to_owned())),
        None => (unknown(), unknown()),
    };
    GuestError::StepTimeout { step, limit, run_state, migration }
}

fn seen(event: &QmpEvent) -> Option<Seen<'_>> {
    match event.name.as_str() {
        "MIGRATION" => event.data.get("status")?.as_str().map(Seen::Migration),
        "STOP" => Some(Seen::Stopped(event.timestamp)),
        "RESUME" => Some(Seen::Resumed),
        _ => None,
    }
}
