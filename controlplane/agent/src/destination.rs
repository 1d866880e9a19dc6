//! Migrations whose destination is this host.

mod answers;
mod negotiate;
mod outside;
mod reads;
mod recovery;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use ramferry_engine::{Destination, DestinationEvent, Failure, Reason};
use ramferry_fabric::{FabricKind, SessionToken};
use ramferry_guest::GuestError;
use ramferry_mover::{
    DestinationHandle, DestinationInput, DestinationParts, PostcopyParts, spawn_destination,
};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_response::Answer;
use ramferry_ram::{Access, Layout, Memory, RamFile};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;

use self::answers::Answers;
pub(crate) use self::answers::{windows_registered, windows_released};
#[cfg(feature = "fuzzing")]
pub(crate) use self::negotiate::layout;
pub(crate) use self::negotiate::negotiate;
use self::outside::Outside;
use self::reads::Reads;
pub(crate) use self::recovery::{abort_unknown, outcome, recover, undecided};
use crate::core::Agent;
use crate::device_stream::{self, Incoming};
use crate::fabrics::Admitted;
use crate::guest_cell::GuestCell;
use crate::journal::MigrationLog;
use crate::keepsake::{self, Terms};
use crate::migrations::{Claim, Entry};
use crate::publish::Publisher;
use crate::source::blocking_step;
use crate::status::causes;

/// Time in which a session's source must open the control stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// Orders of the source, by what they are about (windows, runs of pages), that
/// wait or are being carried out. More wait at the source.
const ORDERS: usize = 1 << 20;

/// One migration to this host, as long as its driver runs.
pub(crate) struct DestinationSession {
    pub(crate) agent: Arc<Agent>,
    pub(crate) entry: Arc<Entry>,
    pub(crate) handle: DestinationHandle,
    /// `None` after a restart: only the outcome can be asked.
    pub(crate) token: Option<SessionToken>,
    pub(crate) device_state: Incoming,
    places: Arc<Semaphore>,
    /// Until it is relayed; gone with the migration, so that nobody waits for it to be read.
    incoming: Mutex<Option<mpsc::Receiver<v1::DeviceState>>>,
    /// The control stream's answers; those that come before it is opened wait.
    answers: Mutex<Answers>,
    pub(crate) guest: GuestCell,
    run_guest: bool,
    /// Ended with the migration: each keeps the session, and so the guest's QMP socket.
    tasks: Mutex<Vec<AbortHandle>>,
    plan: Mutex<Option<Plan>>,
    reads: Mutex<Reads>,
    /// Held while links to the source's memory are opened.
    opening: tokio::sync::Mutex<()>,
    /// A digest of the token, after a restart: by it the source is known again.
    pub(crate) token_digest: Option<String>,
}

/// What [`DestinationSession::prepare`] works from.
pub(crate) struct Plan {
    pub(crate) layout: Layout,
    pub(crate) files: Vec<RamFile>,
    pub(crate) fabric: FabricKind,
    pub(crate) streams: u32,
    pub(crate) pin_budget_bytes: Option<u64>,
    pub(crate) vmm: u32,
    /// Processes that may reach the guest's RAM beside its VMM and this agent.
    pub(crate) partners: Vec<u32>,
}

/// What [`start`] needs beside the agent and the entry.
pub(crate) struct Start {
    pub(crate) engine: Destination,
    pub(crate) token: Option<SessionToken>,
    pub(crate) token_digest: Option<String>,
    pub(crate) guest: GuestCell,
    pub(crate) run_guest: bool,
    pub(crate) plan: Option<Plan>,
    pub(crate) publisher: Publisher,
    pub(crate) log: MigrationLog,
    pub(crate) claim: Claim,
}

/// Starts the driver of a migration to this host.
pub(crate) fn start(agent: &Arc<Agent>, entry: Arc<Entry>, start: Start) {
    let Start { engine, token, token_digest, guest, run_guest, plan, publisher, log, claim } = start;
    let id = entry.id.clone();
    let (device_state, incoming) = device_stream::queue();
    let mut driven = None;
    let (_, thread) = spawn_destination(engine, |handle| {
        let session = Arc::new(DestinationSession {
            agent: Arc::clone(agent),
            entry,
            handle,
            token,
            device_state,
            places: Arc::new(Semaphore::new(ORDERS)),
            incoming: Mutex::new(Some(incoming)),
            answers: Mutex::default(),
            guest,
            run_guest,
            tasks: Mutex::default(),
            plan: Mutex::new(plan),
            reads: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
            token_digest,
        });
        agent.sessions.lock().expect("no panic while it is held").insert(id.clone(), Arc::clone(&session));
        driven = Some(Arc::clone(&session));
        session.keep(tokio::spawn(watch_guest(Arc::clone(&session))).abort_handle());
        if session.token.is_some() {
            session.keep(tokio::spawn(give_up_unopened(Arc::clone(&session))).abort_handle());
        }
        Outside::new(session, log, publisher, claim)
    });
    let agent = Arc::clone(agent);
    tokio::task::spawn_blocking(move || {
        if let (Err(_), Some(session)) = (thread.join(), driven) {
            tracing::error!(
                id,
                "the destination's driver panicked; restart the agent: the journal says how it ends"
            );
            session.hang_up();
        }
        agent.sessions.lock().expect("no panic while it is held").remove(&id);
    });
}

/// Tells the driver when the guest is lost. Ended with the migration: it keeps the guest's QMP socket.
async fn watch_guest(session: Arc<DestinationSession>) {
    if let Some(guest) = session.guest.now() {
        let lost = guest.lost().await;
        let failure = guest_failure(&lost);
        let in_postcopy = session.entry.view().state() == v1::MigrationState::Postcopy;
        session.handle.send(match lost {
            GuestError::Gone { .. } if in_postcopy => DestinationEvent::GuestGone(failure),
            _ => DestinationEvent::Failed(failure),
        });
    }
}

/// A source that never opens the control stream is lost, though no stream ended.
async fn give_up_unopened(session: Arc<DestinationSession>) {
    tokio::time::sleep(OPEN_TIMEOUT).await;
    if session.answers().opened == 0 {
        session.handle.send(DestinationEvent::PeerLost);
    }
}

impl DestinationSession {
    /// Ends `task` with the migration.
    pub(crate) fn keep(&self, task: AbortHandle) {
        let mut tasks = self.tasks.lock().expect("no panic while it is held");
        // One that was begun while the migration was closed is not among those that were ended.
        if self.places.is_closed() {
            return task.abort();
        }
        tasks.retain(|task| !task.is_finished());
        tasks.push(task);
    }

    /// Ends every task of the migration, and the wait of every order; the
    /// control stream stays, for the source to close.
    pub(crate) fn close(&self) {
        // From here on no order waits, and nothing begins.
        self.places.close();
        drop(self.incoming().take());
        for task in self.tasks.lock().expect("no panic while it is held").drain(..) {
            task.abort();
        }
    }

    /// Hands an order about `items` things to the driver, when there is room for it.
    pub(crate) async fn order(&self, input: impl Into<DestinationInput>, items: usize) {
        let permits = u32::try_from(items.clamp(1, ORDERS)).expect("ORDERS fits");
        let place = Arc::clone(&self.places).acquire_many_owned(permits).await;
        // It is closed once nobody carries orders out any more.
        if let Ok(place) = place {
            self.handle.send(DestinationInput::Placed(Box::new(input.into()), Arc::new(place)));
        }
    }

    /// Does what an answer about windows asks for, which may be to wait for room in the control stream.
    pub(crate) async fn settle_windows(&self, settle: impl FnOnce(&DestinationHandle) + Send + 'static) {
        let handle = self.handle.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || settle(&handle)).await {
            let message = format!("an answer about windows was not settled: {error}");
            self.handle.send(DestinationEvent::Failed(Failure::new(Reason::Internal, message)));
        }
    }

    /// Resolves when every order that was handed over is carried out, or nobody carries orders out any more.
    pub(crate) async fn orders_carried_out(&self) {
        let all = u32::try_from(ORDERS).expect("ORDERS fits");
        let _ = self.places.acquire_many(all).await;
    }

    fn incoming(&self) -> MutexGuard<'_, Option<mpsc::Receiver<v1::DeviceState>>> {
        self.incoming.lock().expect("no panic while it is held")
    }

    async fn prepare(self: &Arc<Self>) -> Result<DestinationParts, Failure> {
        let plan = self.plan.lock().expect("no panic while it is held").take();
        let plan = plan.ok_or_else(|| Failure::new(Reason::Internal, "the migration was prepared twice"))?;
        let guest = async {
            self.guest.get().await?.prepare_destination().await.map_err(|error| guest_failure(&error))
        };
        let session = Arc::clone(self);
        // Neither is left behind half done where the other fails.
        let (guest, parts) = tokio::join!(guest, blocking_step(move || session.build(plan)));
        guest.and(parts)
    }

    fn build(self: &Arc<Self>, plan: Plan) -> Result<DestinationParts, Failure> {
        let ram = |error: ramferry_ram::RamError| Failure::new(Reason::GuestFailed, causes(&error));
        let memory = Arc::new(Memory::new(plan.layout, plan.files, Access::ReadWrite).map_err(ram)?);
        let terms = Terms {
            fabric: plan.fabric,
            streams: plan.streams,
            pin_budget_bytes: plan.pin_budget_bytes,
            partners: plan.partners.clone(),
        };
        self.note_memory(&memory, terms);
        let token = self.token.clone().expect("a session that is prepared has a token");
        let Admitted { domain, links } =
            self.agent.fabrics.admit(plan.fabric, token, &memory, plan.streams)?;
        let answering = Arc::clone(self);
        Ok(DestinationParts {
            links,
            domain,
            memory,
            registration_workers: self.agent.config.registration_workers,
            postcopy: PostcopyParts {
                vmm: plan.vmm,
                partners: plan.partners,
                owed_path: keepsake::owed_path(&self.agent.config, &self.entry.id),
                migration: self.entry.id.clone(),
            },
            answer: Arc::new(move |answer| answering.answer_of_the_data_plane(answer)),
        })
    }

    /// Lets the VMM listen for device state, and connects to it.
    async fn start_incoming(self: &Arc<Self>, postcopy: bool) -> Result<DestinationEvent, Failure> {
        if postcopy {
            self.begin_reads().await?;
        }
        let guest = self.guest.get().await?;
        let room = self.agent.device_state_room(&self.entry.id);
        let path = &room.open_for(guest.pid()).map_err(|error| {
            let message = format!("cannot make a directory for the VMM's socket: {}", causes(&error));
            Failure::new(Reason::Internal, message)
        })?;
        guest.start_incoming(path).await.map_err(|error| guest_failure(&error))?;
        let stream = UnixStream::connect(path).await.map_err(|error| {
            Failure::new(Reason::GuestFailed, format!("cannot reach the VMM at {path:?}: {error}"))
        })?;
        device_stream::check_vmm(&stream, guest.pid())
            .map_err(|error| Failure::new(Reason::GuestFailed, error.to_string()))?;
        let taken = self.incoming().take();
        let mut incoming =
            taken.ok_or_else(|| Failure::new(Reason::Internal, "device state was begun twice"))?;
        let session = Arc::clone(self);
        let relaying = tokio::spawn(async move {
            let send = |state| session.answer(Answer::DeviceState(state));
            if let Err(error) = device_stream::relay(stream, &mut incoming, send).await {
                tracing::info!(id = session.entry.id, %error, "the device state's stream broke");
            }
        });
        self.keep(relaying.abort_handle());
        let session = Arc::clone(self);
        let loading = tokio::spawn(async move {
            let event = match session.wait_loaded().await {
                Ok(()) => DestinationEvent::DeviceStateLoaded,
                Err(failure) => DestinationEvent::Failed(failure),
            };
            session.handle.send(event);
        });
        self.keep(loading.abort_handle());
        Ok(DestinationEvent::IncomingReady)
    }

    async fn wait_loaded(&self) -> Result<(), Failure> {
        self.guest.get().await?.wait_loaded().await.map_err(|error| guest_failure(&error))
    }

    async fn resume(&self) -> Result<DestinationEvent, Failure> {
        if !self.run_guest {
            return Ok(DestinationEvent::GuestResumed);
        }
        let guest = match self.guest.get().await {
            Ok(guest) => guest,
            Err(failure) if self.guest.is_gone() => return Ok(self.lost(failure)),
            Err(failure) => return Err(failure),
        };
        match guest.resume_destination().await {
            Ok(()) => Ok(DestinationEvent::GuestResumed),
            Err(error @ GuestError::Gone { .. }) => Ok(self.lost(guest_failure(&error))),
            Err(error) => Err(guest_failure(&error)),
        }
    }

    /// Has the guest stand still for good: it lacks memory.
    async fn stop_guest(&self) -> Result<DestinationEvent, Failure> {
        let guest = match self.guest.get().await {
            Ok(guest) => guest,
            Err(failure) if self.guest.is_gone() => return Ok(self.lost(failure)),
            Err(failure) => return Err(failure),
        };
        match guest.stop_destination().await {
            Ok(()) => Ok(DestinationEvent::GuestStopped),
            Err(error @ GuestError::Gone { .. }) => Ok(self.lost(guest_failure(&error))),
            Err(error) => Err(guest_failure(&error)),
        }
    }

    /// The guest ended between its handover and its resume, or just after that.
    fn lost(&self, failure: Failure) -> DestinationEvent {
        let id = &self.entry.id;
        tracing::error!(id, %failure, "the guest was handed over to this host, and is lost: start it again");
        DestinationEvent::GuestGone(failure)
    }

    async fn discard(&self, ran: bool) -> Result<DestinationEvent, Failure> {
        let guest = match self.guest.get().await {
            Ok(guest) => guest,
            // Neither is one that has ended.
            Err(_) if self.guest.is_gone() => return Ok(DestinationEvent::GuestDiscarded),
            Err(failure) => return Err(failure),
        };
        if !ran && let Err(failure) = self.give_vmm_back().await {
            tracing::warn!(id = self.entry.id, %failure, "a VMM may go on waiting for memory");
        }
        let discarded = if ran { guest.end_destination().await } else { guest.discard().await };
        discarded.map_err(|error| guest_failure(&error))?;
        Ok(DestinationEvent::GuestDiscarded)
    }
}

fn guest_failure(error: &GuestError) -> Failure {
    Failure::new(Reason::GuestFailed, causes(error))
}

/// What the journal keeps of a session's token.
pub(crate) fn token_digest(token: &SessionToken) -> String {
    blake3::hash(token.as_bytes()).to_hex().to_string()
}
