//! What the source's driver leaves to the agent: the guest, the journal, the
//! destination's agent, and what is shown of all that.

use std::sync::Arc;

use ramferry_engine::{Failure, Outcome, Reason, SourceAction, SourceEvent};
use ramferry_mover::{SourceInput, SourceOutside, SourceSnapshot};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_request::Order;
use tokio::task::{AbortHandle, JoinHandle};

use super::Session;
use super::view;
use crate::journal::{Durability, MigrationLog, Record};
use crate::migrations::Claim;
use crate::publish::Publisher;

pub(crate) struct Outside {
    session: Arc<Session>,
    log: MigrationLog,
    publisher: Publisher,
    /// A pause that is under way.
    pausing: Option<JoinHandle<()>>,
    last: Option<SourceSnapshot>,
    claim: Option<Claim>,
    watching: AbortHandle,
}

impl Outside {
    pub(crate) fn new(
        session: Arc<Session>,
        log: MigrationLog,
        publisher: Publisher,
        claim: Claim,
        watching: AbortHandle,
    ) -> Self {
        Self { session, log, publisher, pausing: None, last: None, claim: Some(claim), watching }
    }

    /// Runs `work` on the agent's runtime; what it gives goes to the driver.
    fn spawn<F>(&self, work: F) -> JoinHandle<()>
    where
        F: Future<Output = Result<SourceInput, Failure>> + Send + 'static,
    {
        let handle = self.session.handle.clone();
        self.session.agent.runtime.spawn(async move {
            match work.await {
                Ok(input) => handle.send(input),
                Err(failure) => handle.send(SourceEvent::Failed(failure)),
            }
        })
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

    fn pause(&mut self) {
        if let Err(failure) = self.append(&Record::SwitchingOver, Durability::Buffered) {
            return self.session.handle.send(SourceEvent::Failed(failure));
        }
        let session = Arc::clone(&self.session);
        self.pausing = Some(self.spawn(session.pause()));
    }

    fn resume(&mut self) {
        let (session, pausing) = (Arc::clone(&self.session), self.pausing.take());
        self.spawn(async move {
            if let Some(pausing) = pausing {
                pausing.abort();
                // It was cancelled, or is done: either way it orders nothing more.
                let _ = pausing.await;
            }
            session.resume().await.map(Into::into)
        });
    }

    fn hand_over(&mut self) {
        let event = match self.append(&Record::HandedOver, Durability::Synced) {
            Ok(()) => SourceEvent::HandedOverSynced,
            Err(failure) => SourceEvent::Failed(failure),
        };
        self.session.handle.send(event);
    }

    fn finish(&mut self, outcome: &Outcome) {
        let (state, failure) = match outcome {
            Outcome::Succeeded => (v1::MigrationState::Succeeded, None),
            Outcome::Failed(failure) => (v1::MigrationState::Failed, Some(failure.clone())),
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
            self.publisher.downtime(&snapshot.progress);
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
        if let Err(failure) = self.append(&record, Durability::Buffered) {
            // The outcome stands without it: after a restart it is found again.
            tracing::error!(%failure, "the end of a migration was not recorded");
        }
        self.session.close();
        self.watching.abort();
        self.session.entry.set_driver(None);
        self.claim = None;
        self.session.entry.update(|view| {
            view.error = error;
            view.set_state(state);
        });
    }
}

impl SourceOutside for Outside {
    fn act(&mut self, action: SourceAction) {
        let session = Arc::clone(&self.session);
        match action {
            SourceAction::Prepare => {
                self.spawn(async move {
                    session.prepare().await.map(|parts| SourceInput::Ready(Box::new(parts)))
                });
            }
            SourceAction::EndRound { round } => self.order(Order::EndRound(v1::EndRound { round })),
            SourceAction::PauseGuest => self.pause(),
            SourceAction::Verify => self.order(Order::Verify(v1::Verify {})),
            SourceAction::MoveDeviceState => {
                self.spawn(async move { session.move_device_state().await.map(Into::into) });
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
            SourceAction::ResumeGuest => self.resume(),
            SourceAction::Finish(outcome) => self.finish(&outcome),
            SourceAction::Harvest
            | SourceAction::Copy { .. }
            | SourceAction::StopCopy
            | SourceAction::Fence
            | SourceAction::Release
            | SourceAction::SetBandwidthLimit(_) => unreachable!("the mover carries {action:?} out"),
        }
    }

    fn publish(&mut self, snapshot: &SourceSnapshot) {
        self.session.entry.update(|view| {
            view::fill(view, snapshot);
            // The state becomes final with `finish`, together with its error.
            if !snapshot.state.is_final() {
                view.set_state(view::state(snapshot.state));
            }
            self.publisher.source(snapshot, view.progress.get_or_insert_default());
        });
        self.last = Some(snapshot.clone());
    }
}
