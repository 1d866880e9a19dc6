//! A guest that leaves.

use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::error::Step;
use crate::guest::{GuestStatus, Paused, Resumed, Side};
use crate::qmp::{QmpClient, QmpError};
use crate::{GuestError, Qemu};

use super::watch::{Seen, Verdict, step_timeout};
use super::{Course, blocks, devices, goes_on, settings, stream};

/// How long QEMU may take to resume a guest before its stream is cut. It takes
/// 2 ms when its global lock is free; it does not hear us while it is not.
const CUT_AFTER: Duration = Duration::from_millis(20);

/// Between looks at a guest that is to run again; events cut it short.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// For how long QEMU is left alone after a migration that did not succeed.
/// Before 8.2 it does not wait for its thread that reads the return path; if
/// that ends late, it takes the return path of the next migration with it, and
/// QEMU crashes. Nothing tells when it has ended.
const SETTLE_DELAY: Duration = Duration::from_millis(300);

/// Looks at a guest that stands still in a cancelled migration before QEMU is
/// taken to have missed the cancellation: it does when it was cancelled
/// between deciding to pause and entering `pre-switchover`, and then waits for
/// a `migrate-continue` for ever. One that comes too much does no harm.
const PATIENT_LOOKS: u32 = 2;

/// Looks at a QEMU that holds on to a migration that has ended, some hundred
/// milliseconds, before it is left at that.
const HELD_LOOKS: u32 = 100;

/// Reopenings of the connection while one guest is made to run again.
const REOPEN_LIMIT: u32 = 1;

impl Qemu {
    /// Sets QEMU's capabilities for a migration of device state only, with a
    /// pause before it. What they were is put back by [`Qemu::resume_source`].
    ///
    /// # Errors
    /// When QEMU refuses.
    pub async fn prepare_source(&self) -> Result<(), GuestError> {
        self.explained(async {
            if self.course().saved.is_none() {
                let client = self.client();
                let migration = self.status_by(&client).await?.0.migration;
                if matches!(migration.as_deref(), Some("cancelled" | "failed")) {
                    sleep(SETTLE_DELAY).await;
                }
                let saved = settings::apply(&client, Side::Source).await?;
                self.course().saved = Some(saved);
            }
            Ok(())
        })
        .await
    }

    /// Waits for QEMU's own transfers, as [`Guest::drain_io`](crate::Guest::drain_io)
    /// has it. A transaction begins by draining every block device (`bdrv_drain_all`),
    /// one of no actions does nothing else.
    ///
    /// # Errors
    /// When QEMU refuses, or a disk does not answer in time.
    pub async fn drain_io(&self) -> Result<(), GuestError> {
        self.explained(async {
            let limit = self.timeouts.drain;
            Ok(self.client().run_within(limit, "transaction", json!({ "actions": [] })).await?)
        })
        .await
    }

    /// Starts QEMU's own migration to the unix socket `stream` (named as it was
    /// bound), and returns when the vCPUs stand still in `pre-switchover`.
    ///
    /// # Errors
    /// When the guest is not in a state to be migrated, the stream breaks, or it
    /// takes too long. [`Qemu::resume_source`] must follow.
    pub async fn pause_for_switchover(&self, stream: &Path) -> Result<Paused, GuestError> {
        self.explained(async {
            let uri = stream::uri(stream)?;
            let client = self.client();
            self.check_unchanged(&client).await?;
            let was_running = self.check_may_leave(&client).await?;
            {
                let mut course = self.course();
                let saved = course.saved.take();
                *course = Course { saved, switchover: true, was_running, ..Course::default() };
            }
            let events = client.events();
            client.run("migrate", json!({ "uri": uri })).await?;
            let mut stopped = None;
            self.watch(&client, events, Step::Pause, self.timeouts.pause, |seen| match seen {
                Seen::Stopped(at) => {
                    stopped = Some(at);
                    Verdict::Wait
                }
                Seen::Resumed => Verdict::Wait,
                Seen::Migration(state) => paused_by(state),
                Seen::Status(status) => paused_by(status.migration.as_deref().unwrap_or("none")),
            })
            .await?;
            Ok(Paused { stop_time: stopped.unwrap_or_else(SystemTime::now), was_running })
        })
        .await
    }

    /// Lets QEMU save the device state and write it to its stream. Returns when all of it
    /// was sent, and the destination's QEMU has said that it loaded it.
    ///
    /// # Errors
    /// When that fails or takes too long. [`Qemu::resume_source`] must follow.
    pub async fn move_device_state(&self) -> Result<(), GuestError> {
        self.explained(async {
            let client = self.client();
            let events = client.events();
            client.run("migrate-continue", json!({ "state": "pre-switchover" })).await?;
            self.watch(&client, events, Step::DeviceState, self.timeouts.device_state, |seen| match seen {
                Seen::Stopped(_) | Seen::Resumed => Verdict::Wait,
                Seen::Migration(state) => sent_by(state),
                Seen::Status(status) => sent_by(status.migration.as_deref().unwrap_or("none")),
            })
            .await
        })
        .await
    }

    /// Ends whatever migration there is, makes the guest run if it ran before,
    /// and puts QEMU's settings back. Idempotent. If QEMU does not react, its
    /// end of the stream is cut, which works while it hangs in it, too.
    ///
    /// A guest that stood still before its migration still does. QEMU 7.2
    /// leaves it in `postmigrate` then, and does not let it be migrated again
    /// before it has run.
    ///
    /// # Errors
    /// When QEMU is gone or does not resume the guest in time.
    pub async fn resume_source(&self) -> Result<Resumed, GuestError> {
        let cut_in_time = async {
            sleep(CUT_AFTER).await;
            self.cut_stream().await;
            std::future::pending().await
        };
        tokio::select! {
            biased;
            result = self.bring_back() => result,
            never = cut_in_time => never,
        }
    }

    async fn check_unchanged(&self, client: &QmpClient) -> Result<(), GuestError> {
        let Some(inspected) = &self.inspected else { return Ok(()) };
        if !blocks::same(&inspected.blocks, &blocks::query(client).await?) {
            return Err(GuestError::LayoutChanged);
        }
        let disks = devices::late_writers(client, self.pid()).await?.since(&inspected.late);
        if disks.is_empty() { Ok(()) } else { Err(GuestError::DisksChanged { disks }) }
    }

    async fn check_may_leave(&self, client: &QmpClient) -> Result<bool, GuestError> {
        let (status, _) = self.status_by(client).await?;
        super::inspect::check_source_state(&status)?;
        if stream::is_held(client).await? {
            return Err(GuestError::AlreadyMigrating { status: status.migration.unwrap_or_default() });
        }
        Ok(status.running)
    }

    async fn bring_back(&self) -> Result<Resumed, GuestError> {
        let limit = self.timeouts.resume;
        let mut last = Last::default();
        let resumed = match timeout(limit, self.bring_back_by_looks(&mut last)).await {
            Ok(resumed) => resumed?,
            Err(_) => {
                let late = || step_timeout(Step::Resume, limit, last.status.take());
                return Err(last.refusal.take().map_or_else(late, GuestError::from));
            }
        };
        self.restore_settings().await;
        let mut course = self.course();
        let was_running = course.was_running;
        *course = Course { was_running, ..Course::default() };
        Ok(resumed)
    }

    async fn bring_back_by_looks(&self, last: &mut Last) -> Result<Resumed, GuestError> {
        let mut reopened = 0;
        loop {
            let client = match self.client() {
                client if client.has_ended() && reopened < REOPEN_LIMIT => {
                    reopened += 1;
                    self.live_client().await?
                }
                client => client,
            };
            let mut events = client.events();
            match self.look(&client, last).await {
                Ok(Some(resumed)) => return Ok(resumed),
                Ok(None) | Err(GuestError::Qmp(QmpError::Timeout { .. })) => {}
                Err(GuestError::Qmp(error)) if error.has_ended() && reopened < REOPEN_LIMIT => continue,
                Err(GuestError::Qmp(error)) => return Err(self.why_lost(error).await),
                Err(error) => return Err(error),
            }
            let _ = timeout(LOOK_INTERVAL, events.recv()).await;
        }
    }

    /// One look at the guest, and one step towards where it should be.
    async fn look(&self, client: &QmpClient, last: &mut Last) -> Result<Option<Resumed>, GuestError> {
        let course = self.course().clone();
        let status = self.status_by(client).await?.0;
        last.status = Some(status.clone());
        if !course.switchover {
            return Ok(Some(as_found(status)));
        }
        let migration = status.migration.as_deref();
        match status.run_state.as_str() {
            // `cont` would only make this destination run by itself later.
            "inmigrate" => Err(GuestError::RunState { side: Side::Source, run_state: status.run_state }),
            "finish-migrate" if migration == Some("cancelling") => {
                last.cancelling_looks += 1;
                if last.cancelling_looks > PATIENT_LOOKS {
                    let go_on = client.run("migrate-continue", json!({ "state": "cancelling" })).await;
                    keep_refusal(go_on, last)?;
                }
                Ok(None)
            }
            _ if migration == Some("cancelling") => Ok(None),
            _ if goes_on(migration) => {
                let cancel = client.run("migrate_cancel", json!({})).await;
                keep_refusal(cancel, last)?;
                Ok(None)
            }
            // QEMU is about to leave it.
            "finish-migrate" => Ok(None),
            _ if last.held_looks < HELD_LOOKS && stream::is_held(client).await? => {
                last.held_looks += 1;
                Ok(None)
            }
            run_state if status.running || stopped_itself(run_state) || !course.was_running => {
                Ok(Some(as_found(status)))
            }
            _ => {
                let cont = client.run("cont", json!({})).await;
                keep_refusal(cont, last)?;
                Ok(None)
            }
        }
    }

    async fn cut_stream(&self) {
        let began = self.course().switchover;
        if began {
            match stream::cut(&self.client()).await {
                Ok(()) => tracing::info!(pid = self.pid(), "cut QEMU's device state stream"),
                Err(error) => {
                    tracing::debug!(pid = self.pid(), %error, "no device state stream to be cut");
                }
            }
        }
    }

    /// The guest runs by now; settings that stay behind are worth a warning only.
    pub(super) async fn restore_settings(&self) {
        let saved = self.course().saved.clone();
        if let Some(saved) = saved
            && let Err(error) = settings::restore(&self.client(), &saved).await
        {
            tracing::warn!(pid = self.pid(), %error, "could not put back QEMU's migration settings");
        }
    }
}

/// What was seen of a guest that is to run again.
#[derive(Default)]
struct Last {
    status: Option<GuestStatus>,
    refusal: Option<QmpError>,
    /// How often it stood still in a migration that was being cancelled.
    cancelling_looks: u32,
    /// How often QEMU still held on to a migration that had ended.
    held_looks: u32,
}

/// Keeps QEMU's refusal for the case that time runs out: the next look tries again.
fn keep_refusal(result: Result<(), QmpError>, last: &mut Last) -> Result<(), QmpError> {
    match result {
        Err(error @ QmpError::Refused { .. }) => {
            last.refusal = Some(error);
            Ok(())
        }
        result => result,
    }
}

/// What a guest is that nothing is to be done to.
fn as_found(status: GuestStatus) -> Resumed {
    if status.running {
        Resumed::Running
    } else if stopped_itself(&status.run_state) {
        Resumed::StoppedItself { run_state: status.run_state }
    } else {
        Resumed::LeftPaused
    }
}

/// Whether the guest, or its host's disk, brought this state about.
fn stopped_itself(run_state: &str) -> bool {
    matches!(
        run_state,
        "shutdown" | "guest-panicked" | "internal-error" | "io-error" | "watchdog" | "suspended"
    )
}

fn paused_by(migration: &str) -> Verdict<()> {
    match migration {
        "pre-switchover" => Verdict::Done(()),
        migration if goes_on(Some(migration)) => Verdict::Wait,
        _ => Verdict::Failed,
    }
}

fn sent_by(migration: &str) -> Verdict<()> {
    match migration {
        "completed" => Verdict::Done(()),
        migration if goes_on(Some(migration)) => Verdict::Wait,
        _ => Verdict::Failed,
    }
}
