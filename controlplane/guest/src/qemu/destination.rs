//! A guest that arrives.

use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::error::Step;
use crate::guest::{GuestStatus, Side};
use crate::qmp::QmpClient;
use crate::{GuestError, Qemu};

use super::watch::{Seen, Verdict, step_timeout};
use super::{settings, stream};

/// Between looks at a guest that is to run.
const LOOK_INTERVAL: Duration = Duration::from_micros(500);

impl Qemu {
    /// Sets QEMU's capabilities to receive device state only, and sees to it
    /// that the guest does not run by itself, whether or not QEMU has `-S`.
    ///
    /// # Errors
    /// When QEMU refuses, or does not wait for a migration.
    pub async fn prepare_destination(&self) -> Result<(), GuestError> {
        self.explained(async {
            let client = self.client();
            self.check_waits(&client).await?;
            if self.course().saved.is_none() {
                let mut saved = settings::apply(&client, Side::Destination).await?;
                saved.autostart = !started_with_stop(self.pid());
                self.course().saved = Some(saved);
            }
            Ok(client.run("stop", json!({})).await?)
        })
        .await
    }

    /// Makes QEMU listen at the unix socket `stream`, which it makes itself.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub async fn start_incoming(&self, stream: &Path) -> Result<(), GuestError> {
        self.explained(async {
            let uri = stream::uri(stream)?;
            let client = self.client();
            self.check_waits(&client).await?;
            self.course().incoming = true;
            Ok(client.run("migrate-incoming", json!({ "uri": uri })).await?)
        })
        .await
    }

    /// Returns when QEMU has loaded all device state. The guest stands still.
    /// The time limit counts from the call.
    ///
    /// # Errors
    /// When loading fails, which ends QEMU, or takes too long. A guest that runs
    /// already is stopped.
    pub async fn wait_loaded(&self) -> Result<(), GuestError> {
        self.explained(async {
            let client = self.client();
            let mut resumed = false;
            let ran = self
                .watch(&client, client.events(), Step::Load, self.timeouts.load, |seen| match seen {
                    Seen::Resumed => {
                        resumed = true;
                        Verdict::Wait
                    }
                    // The last that QEMU does (process_incoming_migration_bh): a guest that was to run does by then. To
                    // ask it takes until it has tidied up.
                    Seen::Migration("completed") => Verdict::Done(resumed),
                    Seen::Migration("failed" | "cancelled") => Verdict::Ask,
                    Seen::Migration(_) | Seen::Stopped(_) => Verdict::Wait,
                    Seen::Status(status) => loaded_by(status),
                })
                .await?;
            if !ran {
                self.course().loaded = true;
                return Ok(());
            }
            let seen = SystemTime::now();
            client.run("stop", json!({})).await?;
            Err(GuestError::RanTooEarly { seen })
        })
        .await
    }

    /// Makes the guest run. Idempotent.
    ///
    /// # Errors
    /// When it has not got its device state, or QEMU refuses, for example
    /// because the source's QEMU still holds a disk.
    pub async fn resume_destination(&self) -> Result<(), GuestError> {
        self.explained(async {
            let (limit, client) = (self.timeouts.resume, self.live_client().await?);
            let deadline = Instant::now() + limit;
            if !self.course().loaded {
                let status = self.status_by(&client).await?.0;
                if status.running {
                    return Ok(());
                }
                if status.run_state == "inmigrate" {
                    // `cont` would only turn autostart on.
                    return Err(GuestError::NotLoaded { run_state: status.run_state });
                }
            }
            loop {
                // The guest stands still for each exchange: its state is asked for behind the order, not after it.
                let (ordered, status) = tokio::join!(client.run("cont", json!({})), self.status_by(&client));
                ordered?;
                let status = status?.0;
                if status.running {
                    return Ok(());
                }
                if Instant::now() >= deadline {
                    return Err(step_timeout(Step::Resume, limit, Some(status)));
                }
                sleep(LOOK_INTERVAL).await;
            }
        })
        .await
    }

    /// Undoes `prepare_destination` once the guest has arrived: what it set
    /// would change later migrations and snapshots of others. Idempotent.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn settle_destination(&self) -> Result<(), GuestError> {
        let Some(saved) = self.course().saved.clone() else { return Ok(()) };
        let client = self.live_client().await?;
        settings::restore(&client, &saved).await?;
        self.course().saved = None;
        Ok(())
    }

    /// Has a guest that ran stand still. Idempotent.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn stop_destination(&self) -> Result<(), GuestError> {
        self.explained(async {
            let client = self.live_client().await?;
            Ok(client.run("stop", json!({})).await?)
        })
        .await
    }

    /// Ends the QEMU of a guest that ran and must not run on. Idempotent.
    ///
    /// # Errors
    /// When the kernel does not let it be ended.
    pub async fn end_destination(&self) -> Result<(), GuestError> {
        // One that waits for memory in the kernel hears nothing else.
        self.process.kill()?;
        if self.process.exits_within(self.timeouts.quit).await {
            return Ok(());
        }
        Err(step_timeout(Step::Quit, self.timeouts.quit, None))
    }

    /// Gives this destination up. Before `migrate-incoming` QEMU is left as it
    /// was found; after it QEMU is told to quit. Idempotent.
    ///
    /// # Errors
    /// When the guest runs, which is left alone, or QEMU does not end in time.
    pub async fn discard(&self) -> Result<(), GuestError> {
        match self.try_discard().await {
            // It ended by itself: that is what was wanted.
            Err(GuestError::Gone { .. }) => Ok(()),
            other => other,
        }
    }

    async fn try_discard(&self) -> Result<(), GuestError> {
        if self.process.has_exited() {
            return Ok(());
        }
        let client = match self.live_client().await {
            Ok(client) => client,
            Err(error) => return self.gone_or(error).await,
        };
        let (status, migration) = match self.status_by(&client).await {
            Ok(answer) => answer,
            Err(error) => return self.gone_or(self.why_lost(error).await).await,
        };
        if status.running {
            return Err(GuestError::DestinationRuns);
        }
        let started = self.course().incoming || migration.incoming_started();
        if status.run_state == "inmigrate" && !started {
            return self.leave_as_found(&client).await;
        }
        match client.run("quit", json!({})).await {
            Ok(()) => {}
            Err(error) if error.has_ended() => {}
            Err(error) => return Err(error.into()),
        }
        if self.process.exits_within(self.timeouts.quit).await {
            return Ok(());
        }
        Err(step_timeout(Step::Quit, self.timeouts.quit, Some(status)))
    }

    async fn gone_or(&self, error: GuestError) -> Result<(), GuestError> {
        // A QEMU whose load failed closes its sockets before it has ended.
        if self.process.exits_within(self.timeouts.quit).await { Ok(()) } else { Err(error) }
    }

    async fn leave_as_found(&self, client: &QmpClient) -> Result<(), GuestError> {
        let Some(saved) = self.course().saved.clone() else { return Ok(()) };
        settings::restore(client, &saved).await?;
        if saved.autostart {
            client.run("cont", json!({})).await?;
        }
        self.course().saved = None;
        Ok(())
    }

    async fn check_waits(&self, client: &QmpClient) -> Result<(), GuestError> {
        let (status, migration) = self.status_by(client).await?;
        if status.run_state != "inmigrate" {
            return Err(GuestError::RunState { side: Side::Destination, run_state: status.run_state });
        }
        if migration.incoming_started() {
            return Err(GuestError::IncomingStarted);
        }
        Ok(())
    }
}

/// Whether it is loaded, and if so, whether it runs already.
fn loaded_by(status: &GuestStatus) -> Verdict<bool> {
    match (status.run_state.as_str(), status.migration.as_deref()) {
        _ if status.running => Verdict::Done(true),
        (_, Some("failed" | "cancelled")) => Verdict::Failed,
        // QEMU is about to leave it.
        ("inmigrate", Some("completed")) => Verdict::Ask,
        ("inmigrate", _) => Verdict::Wait,
        (_, Some("completed")) => Verdict::Done(false),
        _ => Verdict::Wait,
    }
}

/// Whether QEMU's command line has `-S`.
fn started_with_stop(pid: u32) -> bool {
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    arguments.split(|byte| *byte == 0).any(|argument| matches!(argument, b"-S" | b"--S"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(running: bool, run_state: &str, migration: Option<&str>) -> GuestStatus {
        GuestStatus { running, run_state: run_state.into(), migration: migration.map(str::to_owned) }
    }

    #[test]
    fn a_destination_is_loaded_when_it_stands_still_after_its_migration() {
        let loaded = |running, run_state, migration| match loaded_by(&status(running, run_state, migration)) {
            Verdict::Wait => "wait",
            Verdict::Ask => "ask",
            Verdict::Done(false) => "loaded",
            Verdict::Done(true) => "ran",
            Verdict::Failed => "failed",
        };
        assert_eq!(loaded(false, "inmigrate", None), "wait");
        assert_eq!(loaded(false, "inmigrate", Some("active")), "wait");
        assert_eq!(loaded(false, "inmigrate", Some("failed")), "failed");
        assert_eq!(loaded(false, "inmigrate", Some("completed")), "ask");
        assert_eq!(loaded(false, "paused", Some("active")), "wait");
        assert_eq!(loaded(false, "paused", Some("completed")), "loaded");
        assert_eq!(loaded(true, "running", Some("completed")), "ran");
    }
}
