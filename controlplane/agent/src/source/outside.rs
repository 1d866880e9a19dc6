//! What the source's driver leaves to the agent: the guest, the journal, the
//! destination's agent, and what is shown of all that.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ramferry_engine::{Failure, Outcome, Percent, Reason, SourceAction, SourceEvent};
use ramferry_mover::{SourceInput, SourceOutside, SourceSnapshot, Step};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_request::Order;
use tokio::task::JoinHandle;

use super::Session;
use super::reads::event_of;
use super::view;
use crate::MigrationRole;
use crate::journal::{Durability, MigrationLog, Record, SyncedAhead};
use crate::migrations::Claim;
use crate::publish::Publisher;
use crate::step_gate::StepGate;

pub(crate) struct Outside {
    session: Arc<Session>,
    log: MigrationLog,
    publisher: Publisher,
    last: Option<SourceSnapshot>,
    claim: Option<Claim>,
    gate: StepGate,
}

impl Outside {
    pub(crate) fn new(session: Arc<Session>, log: MigrationLog, publisher: Publisher, claim: Claim) -> Self {
        let socket = session.agent.config.step_socket.as_deref();
        let gate = StepGate::new(socket, MigrationRole::Source, &session.entry.id);
        Self { session, log, publisher, last: None, claim: Some(claim), gate }
    }

    /// Runs `work` on the agent's runtime; what it gives goes to the driver.
    fn spawn<F>(&self, work: F) -> JoinHandle<()>
    where
        F: Future<Output = Result<SourceInput, Failure>> + Send + 'static,
    {
        let handle = self.session.handle.clone();
        let task = self.session.agent.runtime.spawn(async move {
            match work.await {
                Ok(input) => handle.send(input),
                Err(failure) => handle.send(SourceEvent::Failed(failure)),
            }
        });
        self.session.keep(task.abort_handle());
        task
    }

    /// What fails is tried again; what comes of it the destination tells.
    fn in_postcopy<F>(&self, work: F)
    where
        F: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let handle = self.session.handle.clone();
        let task = self.session.agent.runtime.spawn(async move {
            if let Err(failure) = work.await {
                handle.send(event_of(failure));
            }
        });
        self.session.keep(task.abort_handle());
    }

    fn order(&self, order: Order) {
        if !self.session.peer.send_blocking(order) {
            self.session.handle.send(SourceEvent::PeerLost);
        }
    }

    fn append(&mut self, record: &Record, durability: Durability) -> Result<(), Failure> {
        self.log
            .append(record, durability)
            .map_err(|error| Failure::new(Reason::JournalFailed, crate::status::causes(&error)))
    }

    fn pause(&mut self, postcopy: bool) {
        if let Err(failure) = self.append(&Record::SwitchingOver, Durability::Buffered) {
            return self.session.handle.send(SourceEvent::Failed(failure));
        }
        // While the guest runs: HANDED_OVER will be synced in its pause.
        let synced = SyncedAhead::begin(&self.session.agent.runtime, &self.log);
        let session = Arc::clone(&self.session);
        let pausing = self.spawn(session.pause(postcopy, synced));
        self.session.keep_ordering(pausing);
    }

    /// A drain that fails is none: everything is rechecked at the pause.
    fn drain(&mut self) {
        let session = Arc::clone(&self.session);
        let draining = self.spawn(async move {
            let drained = session.guest.get().await?.drain_io().await;
            if let Err(error) = &drained {
                let id = &session.entry.id;
                let error = crate::status::causes(error);
                tracing::warn!(
                    id,
                    error,
                    "the guest's transfers were not drained; all is rechecked at its pause"
                );
            }
            Ok(SourceEvent::Drained { complete: drained.is_ok() }.into())
        });
        self.session.keep_ordering(draining);
    }

    /// Nothing of a migration fails with it.
    fn throttle(&mut self, percent: Percent) {
        self.session.throttle.order(percent);
        let session = Arc::clone(&self.session);
        self.spawn(async move {
            let followed = session.follow_throttle().await;
            if let Err(failure) = &followed {
                tracing::warn!(id = session.entry.id, %failure, ?percent, "the guest was not throttled as ordered");
            }
            Ok(followed.unwrap_or_else(SourceEvent::ThrottleFailed).into())
        });
    }

    fn resume(&mut self) {
        let (session, stopped) = (Arc::clone(&self.session), self.session.stop_ordering());
        self.spawn(async move {
            stopped.await;
            session.resume().await.map(Into::into)
        });
    }

    /// A guest that stays is left as it was found: a migration that ended before
    /// its pause has not been resumed, which is what puts its settings back.
    fn restore(&mut self) {
        let (session, stopped) = (Arc::clone(&self.session), self.session.stop_ordering());
        let restored = self.session.agent.runtime.block_on(async move {
            stopped.await;
            session.resume().await
        });
        if let Err(failure) = restored {
            tracing::error!(id = self.session.entry.id, %failure, "the guest's migration settings were not put back");
        }
    }

    fn hand_over(&mut self) {
        self.session.handed_over.store(true, Ordering::Release);
        let event = match self.append(&Record::HandedOver, Durability::Synced) {
            Ok(()) => SourceEvent::HandedOverSynced,
            Err(failure) => SourceEvent::Failed(failure),
        };
        self.session.handle.send(event);
    }

    fn finish(&mut self, outcome: &Outcome) {
        self.session.end_throttle();
        let (state, failure) = match outcome {
            Outcome::Succeeded => (v1::MigrationState::Succeeded, None),
            Outcome::Failed(failure) | Outcome::Lost(failure) => {
                (v1::MigrationState::Failed, Some(failure.clone()))
            }
            Outcome::Cancelled => {
                let failure = Failure::new(
                    Reason::Cancelled,
                    "the migration was cancelled; the guest runs on at the source",
                );
                (v1::MigrationState::Cancelled, Some(failure))
            }
        };
        self.publisher.ended(state, failure.as_ref().map(|failure| failure.reason.as_str()));
        if let (Outcome::Succeeded, Some(snapshot)) = (outcome, &self.last) {
            self.publisher.downtime(snapshot);
            self.session.agent.note_device_state_cost(snapshot.progress.downtime_parts.device_state);
        }
        match &failure {
            Some(failure) => tracing::warn!(id = self.session.entry.id, %failure, "migration ended"),
            None => tracing::info!(id = self.session.entry.id, "migration succeeded"),
        }
        let mut ended = self.session.entry.view();
        let error = failure.map(|failure| v1::MigrationError {
            reason: failure.reason.as_str().into(),
            message: failure.message,
        });
        ended.error = error.clone();
        ended.set_state(state);
        let record = crate::summary::ended_record(&ended);
        // One that has left must not run here.
        if matches!(outcome, Outcome::Failed(_) | Outcome::Cancelled) {
            self.restore();
        }
        match self.append(&record, Durability::Buffered) {
            Ok(()) => self.claim = None,
            Err(failure) => {
                tracing::error!(%failure, "the end of a migration was not recorded; restart the agent");
                self.claim.take().into_iter().for_each(Claim::keep_until_restart);
            }
        }
        self.session.end_reads();
        self.session.close();
        self.session.entry.set_driver(None);
        self.session.entry.update(|view| {
            view.error = error;
            view.set_state(state);
        });
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.claim.take().into_iter().for_each(Claim::keep_until_restart);
        }
    }
}

impl SourceOutside for Outside {
    fn before(&mut self, step: Step) {
        self.gate.pass(step);
    }

    fn act(&mut self, action: SourceAction) {
        let session = Arc::clone(&self.session);
        match action {
            SourceAction::Prepare => {
                let preparing = self.spawn(async move {
                    session.prepare().await.map(|parts| SourceInput::Ready(Box::new(parts)))
                });
                self.session.keep_ordering(preparing);
            }
            SourceAction::EndRound { round } => self.order(Order::EndRound(v1::EndRound { round })),
            SourceAction::DrainGuest => self.drain(),
            SourceAction::PauseGuest { postcopy } => self.pause(postcopy),
            SourceAction::SendOwed { pages } => {
                if !session.send_owed(&pages) {
                    session.handle.send(SourceEvent::PeerLost);
                }
            }
            SourceAction::Reconnect => self.in_postcopy(async move { session.reconnect().await }),
            SourceAction::TellMemoryLost(failure) => {
                self.in_postcopy(async move { session.tell_memory_lost(&failure).await });
            }
            SourceAction::Verify => self.order(Order::Verify(v1::Verify {})),
            SourceAction::SaveDeviceState => {
                session.device_state_held.send_replace(true);
                let moving = self.spawn(async move { session.move_device_state().await.map(Into::into) });
                self.session.keep_ordering(moving);
            }
            SourceAction::MoveDeviceState => {
                session.device_state_held.send_replace(false);
            }
            SourceAction::WriteHandedOver => self.hand_over(),
            SourceAction::SendCommit => self.order(Order::Commit(v1::Commit {})),
            SourceAction::AskOutcome => {
                self.session.agent.runtime.spawn(async move { session.ask_outcome().await });
            }
            SourceAction::AbortPeer(failure) => {
                self.spawn(async move {
                    session.abort_peer(&failure).await;
                    Ok(SourceEvent::PeerAborted.into())
                });
            }
            SourceAction::ThrottleGuest { percent } => self.throttle(percent),
            SourceAction::ResumeGuest => self.resume(),
            SourceAction::Finish(outcome) => self.finish(&outcome),
            SourceAction::Harvest
            | SourceAction::Copy { .. }
            | SourceAction::Recheck { .. }
            | SourceAction::StopCopy
            | SourceAction::Fence
            | SourceAction::Release
            | SourceAction::SetBandwidthLimit(_) => unreachable!("the mover carries {action:?} out"),
        }
    }

    fn publish(&mut self, snapshot: &SourceSnapshot) {
        self.session.entry.update(|view| {
            view::fill(view, snapshot, self.session.called, self.session.started);
            // The state becomes final with `finish`, together with its error.
            if !snapshot.state.is_final() {
                view.set_state(view::state(snapshot.state));
            }
            self.publisher.source(snapshot, view.progress.get_or_insert_default());
        });
        self.last = Some(snapshot.clone());
    }
}
