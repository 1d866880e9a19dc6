//! QEMU, unmodified, through QMP.
//!
//! Facts that the code rests on, true of 7.2 and 10.0:
//!
//! * With `pause-before-switchover` QEMU stops the vCPUs and waits in
//!   `pre-switchover`. `migrate_cancel` from there, and any failure from there
//!   on, makes QEMU itself resume a guest that ran; not one that stood still.
//! * A `migrate_cancel` at the instant when QEMU enters `pre-switchover` is
//!   lost: the migration stays in `cancelling` and the guest paused, until a
//!   `migrate-continue` for the state `cancelling`.
//! * In `device` QEMU writes to the stream while it holds its global lock. If
//!   the far end does not read, QMP hangs and `migrate_cancel` is not heard:
//!   only the end of the stream helps, which `yank`, out of band, brings about.
//! * After a migration has failed, QEMU still holds on to it for a moment. A
//!   `migrate` in that moment crashes 7.2. `query-yank` tells when it is over,
//!   except for a thread that only time can be given to ([`source`]).
//! * `stop` at a destination that waits for its migration turns off its
//!   autostart: once loaded, it stays paused.
//! * Without `late-block-activate` a destination takes its image locks when it
//!   has loaded, and a source that resumes would not get them back.

mod blocks;
mod destination;
mod devices;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod inspect;
mod process;
mod replies;
mod settings;
mod source;
mod stream;
mod watch;

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ramferry_ram::RamFile;
use serde_json::json;

use crate::GuestError;
use crate::guest::{Guest, GuestFuture, GuestInfo, GuestStatus, Paused, Resumed, Side, Timeouts};
use crate::qmp::{QmpClient, QmpError, QmpSocket, Version};

use blocks::RamBlock;
use devices::LateWriters;
use process::Process;
use replies::{MigrateInfo, StatusInfo};
use settings::Saved;

/// A guest that QEMU runs. Holds the QMP connection while it exists.
#[derive(Debug)]
pub struct Qemu {
    socket: QmpSocket,
    timeouts: Timeouts,
    version: Version,
    process: Process,
    /// As inspected; unknown for a guest that was attached to.
    inspected: Option<Inspected>,
    client: Mutex<Arc<QmpClient>>,
    course: Mutex<Course>,
}

/// What must not change while a guest is migrated.
#[derive(Debug)]
struct Inspected {
    blocks: Vec<RamBlock>,
    late: LateWriters,
}

/// How far this guest's migration has gone, so that it can be undone.
#[derive(Clone, Debug, Default)]
struct Course {
    /// What was found before it was changed; `None` while nothing was changed.
    saved: Option<Saved>,
    /// Whether a switchover may have been begun.
    switchover: bool,
    /// Whether the guest ran before its switchover.
    was_running: bool,
    /// Whether `migrate-incoming` may have been sent.
    incoming: bool,
    /// Whether all device state was seen to be loaded.
    loaded: bool,
}

impl Qemu {
    /// Connects to the QMP socket `qmp`, finds out everything about its guest,
    /// and refuses whatever cannot be migrated. Changes nothing.
    ///
    /// The files are those of the layout's blocks, in their order, opened
    /// through QEMU's own mappings: to read at a source, to write at a destination.
    ///
    /// # Errors
    /// The first thing that stands in the way, each with a reason and a remedy.
    pub async fn inspect(
        qmp: impl Into<QmpSocket>,
        side: Side,
        timeouts: Timeouts,
    ) -> Result<(Self, GuestInfo, Vec<RamFile>), GuestError> {
        let mut qemu = Self::open(qmp.into(), timeouts).await?;
        let found = qemu.explained(inspect::inspect(&qemu, side)).await?;
        qemu.inspected = Some(Inspected { blocks: found.blocks, late: found.late });
        Ok((qemu, found.info, found.files))
    }

    /// Connects to the guest of a migration that an earlier process of ours
    /// left in whatever state, to end it: refuses nothing.
    ///
    /// `was_running` is whether a source ran before its migration; a
    /// destination does not use it. Whether [`Qemu::pid`] is still the process
    /// it was is for the caller to compare.
    ///
    /// # Errors
    /// When nobody answers at `qmp`.
    pub async fn attach(qmp: impl Into<QmpSocket>, was_running: bool) -> Result<Self, GuestError> {
        let qemu = Self::open(qmp.into(), Timeouts::default()).await?;
        *qemu.course() =
            Course { saved: Some(Saved::unknown()), switchover: true, was_running, ..Course::default() };
        Ok(qemu)
    }

    /// The same guest with other time limits.
    #[must_use]
    pub fn with_timeouts(mut self, timeouts: Timeouts) -> Self {
        self.timeouts = timeouts;
        self
    }

    /// Process of this QEMU.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Version of this QEMU.
    pub fn version(&self) -> Version {
        self.version
    }

    /// What QEMU says of its guest now.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn status(&self) -> Result<GuestStatus, GuestError> {
        self.explained(async { Ok(self.status_by(&self.client()).await?.0) }).await
    }

    /// QEMU's threads that are its vCPUs; with one thread for all of them, that.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn vcpu_threads(&self) -> Result<Vec<u32>, GuestError> {
        self.explained(async { Ok(inspect::vcpu_threads(&self.client()).await?) }).await
    }

    /// Resolves when the guest cannot be migrated any more: QEMU has ended, the
    /// connection was lost, or the balloon moves.
    pub async fn lost(&self) -> GuestError {
        loop {
            let client = self.client();
            let mut events = client.events();
            tokio::select! {
                ended = client.ended() => {
                    if Arc::ptr_eq(&client, &self.client()) {
                        return self.why_lost(QmpError::Ended(ended)).await;
                    }
                }
                error = devices::balloon_moves(&mut events) => return error,
            }
        }
    }

    async fn open(socket: QmpSocket, timeouts: Timeouts) -> Result<Self, GuestError> {
        let client = QmpClient::connect(socket.clone(), timeouts.command).await?;
        let hidden = || GuestError::NoProcess { path: socket.path().to_owned() };
        let pid = client.peer_pid().ok_or_else(hidden)?;
        Ok(Self {
            socket,
            timeouts,
            version: client.version(),
            process: Process::open(pid)?,
            inspected: None,
            client: Mutex::new(Arc::new(client)),
            course: Mutex::default(),
        })
    }

    fn client(&self) -> Arc<QmpClient> {
        Arc::clone(&self.client.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn course(&self) -> MutexGuard<'_, Course> {
        self.course.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection, opened again if it has ended.
    async fn live_client(&self) -> Result<Arc<QmpClient>, GuestError> {
        let client = self.client();
        if !client.has_ended() {
            return Ok(client);
        }
        let client = match QmpClient::connect(self.socket.clone(), self.timeouts.command).await {
            Ok(client) => Arc::new(client),
            Err(error) => return Err(self.why_lost(error).await),
        };
        let (before, now) = (self.pid(), client.peer_pid().unwrap_or(0));
        if self.process.has_exited() {
            return Err(GuestError::Gone { pid: before });
        }
        if before != now {
            return Err(GuestError::Replaced { path: self.socket.path().to_owned(), before, now });
        }
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&client);
        Ok(client)
    }

    /// What `work` returns, with what is behind the end of the connection.
    async fn explained<T>(&self, work: impl Future<Output = Result<T, GuestError>>) -> Result<T, GuestError> {
        match work.await {
            Err(GuestError::Qmp(error)) if error.has_ended() => Err(self.why_lost(error).await),
            result => result,
        }
    }

    /// Tells a QEMU that died from one that hung up.
    async fn why_lost(&self, error: QmpError) -> GuestError {
        let pid = self.pid();
        if self.process.exits_soon().await {
            return GuestError::Gone { pid };
        }
        if error.has_ended() { GuestError::Disconnected { pid, source: error } } else { error.into() }
    }

    async fn status_by(&self, client: &QmpClient) -> Result<(GuestStatus, MigrateInfo), QmpError> {
        let (status, migration) = tokio::try_join!(
            client.execute::<StatusInfo>("query-status", json!({})),
            client.execute::<MigrateInfo>("query-migrate", json!({})),
        )?;
        let status = GuestStatus {
            running: status.running,
            run_state: status.status,
            migration: migration.status.clone(),
        };
        Ok((status, migration))
    }
}

/// Whether a migration in this state still goes on.
fn goes_on(migration: Option<&str>) -> bool {
    !matches!(migration, None | Some("none" | "completed" | "failed" | "cancelled"))
}

impl Guest for Qemu {
    fn pid(&self) -> u32 {
        Qemu::pid(self)
    }

    fn prepare_source(&self) -> GuestFuture<'_, Result<(), GuestError>> {
        Box::pin(Qemu::prepare_source(self))
    }

    fn vcpu_threads(&self) -> GuestFuture<'_, Result<Vec<u32>, GuestError>> {
        Box::pin(Qemu::vcpu_threads(self))
    }

    fn drain_io(&self) -> GuestFuture<'_, Result<(), GuestError>> {
        Box::pin(Qemu::drain_io(self))
    }

    fn pause_for_switchover<'a>(&'a self, stream: &'a Path) -> GuestFuture<'a, Result<Paused, GuestError>> {
        Box::pin(Qemu::pause_for_switchover(self, stream))
    }

    fn move_device_state(&self) -> GuestFuture<'_, Result<(), GuestError>> {
        Box::pin(Qemu::move_device_state(self))
    }

    fn resume_source(&self) -> GuestFuture<'_, Result<Resumed, GuestError>> {
        Box::pin(Qemu::resume_source(self))
    }

    fn prepare_destination(&self) -> GuestFuture<'_, Result<(), GuestError>> {
        Box::pin(Qemu::prepare_destination(self))
    }

    fn start_incoming<'a>(&'a self, stream: &'a Path) -> GuestFuture<'a, Result<(), GuestError>> {
        Box::pin(Qemu::start_incoming(self, stream))
    }

    fn wait_loaded(&self) -> GuestFuture<'_, Result<(), GuestError>> {
        Box::pin(Qemu::wait_loaded(self))
    }

    fn resume_destination(&self) -> GuestFuture<'_, Result<(), GuestError>> {
        Box::pin(Qemu::resume_destination(self))
    }

    fn settle_destination(&self) -> GuestFuture<'_, Result<(), GuestError>> {
        Box::pin(Qemu::settle_destination(self))
    }

    fn stop_destination(&self) -> GuestFuture<'_, Result<(), GuestError>> {
        Box::pin(Qemu::stop_destination(self))
    }

    fn end_destination(&self) -> GuestFuture<'_, Result<(), GuestError>> {
        Box::pin(Qemu::end_destination(self))
    }

    fn discard(&self) -> GuestFuture<'_, Result<(), GuestError>> {
        Box::pin(Qemu::discard(self))
    }

    fn lost(&self) -> GuestFuture<'_, GuestError> {
        Box::pin(Qemu::lost(self))
    }

    fn status(&self) -> GuestFuture<'_, Result<GuestStatus, GuestError>> {
        Box::pin(Qemu::status(self))
    }
}
