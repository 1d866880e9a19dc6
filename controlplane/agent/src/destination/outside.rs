//! What the destination's driver leaves to the agent: the guest, the journal,
//! the source's agent, and what is shown of all that.

use std::sync::Arc;
use std::time::Instant;

use ramferry_engine::{DestinationAction, DestinationEvent, DestinationOutcome, Failure, Reason};
use ramferry_mover::{DestinationInput, DestinationOutside, DestinationSnapshot, Step};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_response::Answer;

use super::DestinationSession;
use super::recovery::aborted;
use crate::MigrationRole;
use crate::journal::{Durability, MigrationLog, Record, SyncedAhead};
use crate::keepsake;
use crate::migrations::Claim;
use crate::publish::Publisher;
use crate::status::causes;
use crate::step_gate::StepGate;

pub(crate) struct Outside {
    session: Arc<DestinationSession>,
    log: MigrationLog,
    publisher: Publisher,
    claim: Option<Claim>,
    committed: Option<Instant>,
    /// The guest ran here, and is not to run on.
    ran: bool,
    journal_nanoseconds: u64,
    gate: StepGate,
}

impl Outside {
    pub(crate) fn new(
        session: Arc<DestinationSession>,
        log: MigrationLog,
        publisher: Publisher,
        claim: Claim,
    ) -> Self {
        let socket = session.agent.config.step_socket.as_deref();
        let gate = StepGate::new(socket, MigrationRole::Destination, &session.entry.id);
        Self {
            session,
            log,
            publisher,
            claim: Some(claim),
            committed: None,
            ran: false,
            journal_nanoseconds: 0,
            gate,
        }
    }

    fn spawn<F>(&self, work: F)
    where
        F: Future<Output = Result<DestinationInput, Failure>> + Send + 'static,
    {
        let handle = self.session.handle.clone();
        let task = self.session.agent.runtime.spawn(async move {
            match work.await {
                Ok(input) => handle.send(input),
                Err(failure) => handle.send(DestinationEvent::Failed(failure)),
            }
        });
        self.session.keep(task.abort_handle());
    }

    /// Writes a record that an answer depends on.
    fn write(&mut self, record: &Record, done: DestinationEvent) {
        let event = match self.log.append(record, Durability::Synced) {
            Ok(()) => done,
            Err(error) => DestinationEvent::Failed(Failure::new(Reason::JournalFailed, causes(&error))),
        };
        self.session.handle.send(event);
    }

    fn commit(&mut self) {
        let started = Instant::now();
        self.committed = Some(started);
        self.write(&Record::Committed, DestinationEvent::CommittedSynced);
        self.journal_nanoseconds = nanoseconds(started);
    }

    fn answer_running(&mut self, memory_owed: bool) {
        if !memory_owed {
            self.claim.iter().for_each(Claim::is_over);
        }
        let running = v1::DestinationRunning {
            resume_nanoseconds: self.committed.map_or(0, nanoseconds),
            journal_nanoseconds: self.journal_nanoseconds,
            memory_owed,
        };
        self.session.answer_blocking(Answer::Running(running));
    }

    /// Takes up what an agent that ended in post-copy left. Where that cannot be had, the guest must not run on.
    fn retake(&self) {
        let session = Arc::clone(&self.session);
        let task = self.session.agent.runtime.spawn(async move {
            match session.retake().await {
                Ok(input) => {
                    let reads = matches!(input, DestinationInput::Retaken(_));
                    session.handle.send(input);
                    if reads {
                        session.has_retaken();
                    }
                }
                Err(failure) if failure.reason == Reason::MemoryLost => {
                    session.handle.send(DestinationEvent::MemoryLost(keepsake::why_lost(failure)));
                }
                Err(failure) => session.handle.send(DestinationEvent::Failed(failure)),
            }
        });
        self.session.keep(task.abort_handle());
    }

    /// Leaves the guest that arrived without settings of ours.
    fn settle_guest(&self) {
        let settled = self.session.agent.runtime.block_on(async {
            match self.session.guest.now() {
                Some(guest) => guest.settle_destination().await,
                None => Ok(()),
            }
        });
        if let Err(error) = settled {
            let (id, error) = (&self.session.entry.id, causes(&error));
            tracing::warn!(id, error, "the guest's migration settings were not put back");
        }
    }

    fn finish(&mut self, outcome: DestinationOutcome) {
        let (state, failure) = match outcome {
            DestinationOutcome::Running => (v1::MigrationState::Succeeded, None),
            DestinationOutcome::Aborted(failure) if failure.reason == Reason::Cancelled => {
                (v1::MigrationState::Cancelled, Some(failure))
            }
            DestinationOutcome::Aborted(failure) | DestinationOutcome::Lost(failure) => {
                (v1::MigrationState::Failed, Some(failure))
            }
        };
        let entry = &self.session.entry;
        self.publisher.ended(state, failure.as_ref().map(|failure| failure.reason.as_str()));
        match &failure {
            Some(failure) => tracing::warn!(id = entry.id, %failure, "the destination's part ended"),
            None => tracing::info!(id = entry.id, "the guest runs here"),
        }
        let error = failure.map(|failure| v1::MigrationError {
            reason: failure.reason.as_str().into(),
            message: failure.message,
        });
        let mut ended = entry.view();
        ended.error = error.clone();
        ended.set_state(state);
        if state == v1::MigrationState::Succeeded {
            self.settle_guest();
        }
        match self.log.append(&crate::summary::ended_record(&ended), Durability::Buffered) {
            Ok(()) => self.claim = None,
            Err(error) => {
                tracing::error!(
                    error = causes(&error),
                    "the end of a migration was not recorded; restart the agent"
                );
                self.claim.take().into_iter().for_each(Claim::keep_until_restart);
            }
        }
        keepsake::remove(&self.session.agent.config, &self.session.entry.id, MigrationRole::Destination);
        self.session.close();
        let entry = &self.session.entry;
        entry.update(|view| {
            view.error = error;
            view.set_state(state);
        });
        // A source that came back while this ended may have asked what nobody answered.
        if self.session.is_untold()
            && let Some(answer) = super::outcome(entry)
        {
            self.session.answer_blocking(answer);
        }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.claim.take().into_iter().for_each(Claim::keep_until_restart);
        }
    }
}

impl DestinationOutside for Outside {
    fn before(&mut self, step: Step) {
        self.gate.pass(step);
    }

    fn act(&mut self, action: DestinationAction) {
        let session = Arc::clone(&self.session);
        match action {
            DestinationAction::Prepare => {
                self.spawn(async move {
                    session.prepare().await.map(|parts| DestinationInput::Ready(Box::new(parts)))
                });
            }
            DestinationAction::AcknowledgeRound { round } => {
                session.answer_blocking(Answer::RoundEnded(v1::RoundEnded { round }));
            }
            DestinationAction::StartIncoming { postcopy } => {
                // COMMITTED will be synced while nobody runs the guest.
                let synced = SyncedAhead::begin(&session.agent.runtime, &self.log);
                self.spawn(async move {
                    let started = session.start_incoming(postcopy).await?;
                    synced.wait().await;
                    Ok(started.into())
                });
            }
            DestinationAction::TellOwedAccepted => {
                session.answer_blocking(Answer::OwedAccepted(v1::OwedAccepted {}));
            }
            DestinationAction::Pull => self.retake(),
            DestinationAction::StopGuest => {
                self.ran = true;
                self.spawn(async move { session.stop_guest().await.map(Into::into) });
            }
            DestinationAction::AnswerLost(failure) => {
                session.answer_blocking(Answer::Lost(v1::MemoryLost { message: failure.message }));
            }
            DestinationAction::TellIncomingReady => {
                session.answer_blocking(Answer::IncomingReady(v1::IncomingReady {}));
            }
            DestinationAction::TellDeviceStateLoaded => {
                session.answer_blocking(Answer::DeviceStateLoaded(v1::DeviceStateLoaded {}));
            }
            DestinationAction::WriteCommitted => self.commit(),
            DestinationAction::ResumeGuest => {
                self.spawn(async move { session.resume().await.map(Into::into) });
            }
            DestinationAction::AnswerRunning { memory_owed } => self.answer_running(memory_owed),
            DestinationAction::WriteAborted(failure) => {
                let record =
                    Record::Aborted { reason: failure.reason.as_str().into(), message: failure.message };
                self.write(&record, DestinationEvent::AbortedSynced);
            }
            DestinationAction::DiscardGuest => {
                let ran = self.ran;
                self.spawn(async move { session.discard(ran).await.map(Into::into) });
            }
            DestinationAction::AnswerAborted(failure) => {
                session.answer_blocking(Answer::Aborted(aborted(&failure)));
            }
            DestinationAction::Finish(outcome) => self.finish(outcome),
            DestinationAction::DrainRound { .. }
            | DestinationAction::Digest
            | DestinationAction::HoldOwed { .. }
            | DestinationAction::Release => {
                unreachable!("the mover carries {action:?} out")
            }
        }
    }

    fn publish(&mut self, snapshot: &DestinationSnapshot) {
        self.publisher.destination(snapshot);
        self.session.entry.update(|view| {
            if !snapshot.state.is_final() {
                view.set_state(crate::source::state_on_the_wire(snapshot.state));
            }
            view.trouble = crate::source::trouble(snapshot.trouble.as_ref(), snapshot.trouble_for);
            let progress = view.progress.get_or_insert_default();
            progress.ram_bytes = snapshot.ram_bytes;
            if let Some(owed_bytes) = snapshot.owed_bytes {
                progress.postcopy = true;
                progress.remaining_bytes = owed_bytes;
            }
            progress.postcopy_faults = snapshot.counted.faults.posted;
            progress.registered_bytes = snapshot.counted.registered_bytes;
            progress.registration_time =
                Some(crate::source::duration_on_the_wire(snapshot.counted.registration));
            progress.pinned_bytes = snapshot.pinned_bytes;
            progress.pinned_peak_bytes = progress.pinned_peak_bytes.max(snapshot.pinned_bytes);
        });
    }
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
