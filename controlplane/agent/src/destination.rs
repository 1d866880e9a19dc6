//! Migrations whose destination is this host.

mod negotiate;
mod outside;
mod reads;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use ramferry_engine::{Destination, DestinationEvent, Failure, Reason};
use ramferry_fabric::windows::WindowId;
use ramferry_fabric::{FabricKind, SessionToken};
use ramferry_guest::GuestError;
use ramferry_mover::{
    DestinationHandle, DestinationInput, DestinationParts, PeerAnswer, PostcopyParts, RegisteredWindow,
    WindowsAnswer, spawn_destination,
};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_response::Answer;
use ramferry_ram::{Access, Layout, Memory, PageSets, RamFile};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;
use tonic::Status;

#[cfg(feature = "fuzzing")]
pub(crate) use self::negotiate::layout;
pub(crate) use self::negotiate::negotiate;
use self::outside::Outside;
use self::reads::Reads;
use crate::MigrationRole;
use crate::core::Agent;
use crate::device_stream::{self, Incoming};
use crate::fabrics::Admitted;
use crate::guest_cell::GuestCell;
use crate::journal::{Durability, MigrationLog, Record, Recovered};
use crate::keepsake::{self, Terms};
use crate::migrations::{Claim, Entry};
use crate::publish::Publisher;
use crate::source::blocking_step;
use crate::status::causes;

/// Time in which a session's source must open the control stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// Answers that wait for the network.
const ANSWERS: usize = 1024;
/// Orders of the source, by what they are about (windows, runs of pages), that
/// wait or are being carried out. More wait at the source.
const ORDERS: usize = 1 << 20;
/// Runs that one message of presence carries.
const PRESENCE_RUNS: usize = 16 * 1024;
/// In the journal, the VMM's process of a migration that never ran here.
const NO_GUEST: u32 = 0;

/// What a control stream's caller receives.
pub(crate) type AnswerStream = mpsc::Receiver<Result<v1::ExchangeControlResponse, Status>>;
type AnswerSender = mpsc::Sender<Result<v1::ExchangeControlResponse, Status>>;

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

#[derive(Default)]
struct Answers {
    stream: Option<AnswerSender>,
    /// The stream on which the final answer went out.
    final_on: Option<u64>,
    /// Counts the streams that were opened.
    opened: u64,
    waiting: Vec<Answer>,
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
    let publisher =
        Publisher::new(&agent.metrics, MigrationRole::Destination, &entry.id, "unknown", "unknown");
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

pub(crate) fn aborted(failure: &Failure) -> v1::DestinationAborted {
    v1::DestinationAborted { reason: failure.reason.as_str().into(), message: failure.message.clone() }
}

impl Answers {
    fn note_final(&mut self, answer: &Answer) {
        let is_final = match answer {
            Answer::Running(running) => !running.memory_owed,
            Answer::Aborted(_) | Answer::Lost(_) => true,
            _ => false,
        };
        if self.stream.is_some() && is_final {
            self.final_on = Some(self.opened);
        }
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

    /// A defect of ours: the source learns from the end of the stream that nobody answers any more.
    fn hang_up(&self) {
        self.close();
        self.answers().stream = None;
    }

    /// Whether the final answer went out on control stream `number`.
    pub(crate) fn has_told(&self, number: u64) -> bool {
        self.answers().final_on == Some(number)
    }

    /// Whether a control stream is open on which the final answer did not go out.
    pub(crate) fn is_untold(&self) -> bool {
        let answers = self.answers();
        answers.stream.is_some() && answers.final_on != Some(answers.opened)
    }

    /// Whether a control stream is open.
    pub(crate) fn is_connected(&self) -> bool {
        self.answers().stream.as_ref().is_some_and(|stream| !stream.is_closed())
    }

    /// A control stream was opened: what waits goes out on it first. An older
    /// stream ends. Returns the answers and the stream's number.
    pub(crate) fn attach(&self) -> (AnswerStream, u64) {
        let mut answers = self.answers();
        let waiting = std::mem::take(&mut answers.waiting);
        let (sender, stream) = mpsc::channel(ANSWERS + waiting.len() + 1);
        for answer in waiting {
            sender.try_send(Ok(response(answer))).expect("there is room for what waited");
        }
        answers.stream = Some(sender);
        answers.opened += 1;
        (stream, answers.opened)
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
        let _ = tokio::task::spawn_blocking(move || settle(&handle)).await;
    }

    /// Resolves when every order that was handed over is carried out, or nobody carries orders out any more.
    pub(crate) async fn orders_carried_out(&self) {
        let all = u32::try_from(ORDERS).expect("ORDERS fits");
        let _ = self.places.acquire_many(all).await;
    }

    /// Resolves when nobody hears control stream `number` any more.
    pub(crate) async fn unheard(&self, number: u64) {
        let stream = {
            let answers = self.answers();
            answers.stream.clone().filter(|_| answers.opened == number)
        };
        if let Some(stream) = stream {
            stream.closed().await;
        }
    }

    /// Control stream `number` ended.
    pub(crate) fn detach(&self, number: u64) {
        let mut answers = self.answers();
        if answers.opened == number {
            answers.stream = None;
            drop(answers);
            self.handle.send(DestinationEvent::PeerLost);
        }
    }

    /// Answers from a thread that may block. Before the first stream is opened
    /// answers wait for it; later they are lost with a lost stream.
    pub(crate) fn answer_blocking(&self, answer: Answer) -> bool {
        let sender = {
            let mut answers = self.answers();
            if answers.opened == 0 {
                answers.waiting.push(answer);
                return true;
            }
            answers.note_final(&answer);
            answers.stream.clone()
        };
        sender.is_some_and(|sender| sender.blocking_send(Ok(response(answer))).is_ok())
    }

    /// Answers from where nothing may block; the queue of a new stream has room.
    pub(crate) fn answer_soon(&self, answer: Answer) {
        if let Some(sender) = &self.answers().stream {
            let _ = sender.try_send(Ok(response(answer)));
        }
    }

    pub(crate) async fn answer(&self, answer: Answer) -> bool {
        let sender = {
            let mut answers = self.answers();
            answers.note_final(&answer);
            answers.stream.clone()
        };
        match sender {
            Some(sender) => sender.send(Ok(response(answer))).await.is_ok(),
            None => false,
        }
    }

    fn incoming(&self) -> MutexGuard<'_, Option<mpsc::Receiver<v1::DeviceState>>> {
        self.incoming.lock().expect("no panic while it is held")
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().expect("no panic while it is held")
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

    fn answer_of_the_data_plane(&self, answer: PeerAnswer) -> bool {
        match answer {
            PeerAnswer::Presence(pages) => self.tell_presence(&pages),
            PeerAnswer::Windows(WindowsAnswer::Registered(windows)) => {
                self.answer_blocking(Answer::WindowsRegistered(windows_registered(windows)))
            }
            PeerAnswer::Windows(WindowsAnswer::Released(ids)) => {
                self.answer_blocking(Answer::WindowsReleased(windows_released(&ids)))
            }
            PeerAnswer::StillOwed(bytes) => self.answer_blocking(Answer::StillOwed(v1::StillOwed { bytes })),
            // Others are on their way.
            PeerAnswer::ReadersLost if self.is_opening() => true,
            PeerAnswer::ReadersLost => {
                let message = "others are needed".into();
                self.answer_blocking(Answer::ReadsLost(v1::ReadsLost { message }))
            }
            PeerAnswer::Digests(digests) => {
                let blocks = digests.iter().map(|digest| digest.as_bytes().to_vec()).collect();
                self.answer_blocking(Answer::Digests(v1::Digests { blocks }))
            }
        }
    }

    fn tell_presence(&self, pages: &PageSets) -> bool {
        for (block, set) in pages.iter() {
            let runs: Vec<_> = set.runs().collect();
            for runs in runs.chunks(PRESENCE_RUNS) {
                let runs = runs.iter().flat_map(|run| [run.first, run.count]).collect();
                let pages = vec![v1::PageRuns { block: block.0, runs }];
                if !self.answer_blocking(Answer::Presence(v1::DestinationPresence { pages, last: false })) {
                    return false;
                }
            }
        }
        self.answer_blocking(Answer::Presence(v1::DestinationPresence { pages: Vec::new(), last: true }))
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

/// What became of windows, as it goes over the wire.
pub(crate) fn windows_registered(windows: Vec<RegisteredWindow>) -> v1::WindowsRegistered {
    let windows = windows.into_iter().map(|window| v1::RegisteredWindow {
        id: window.id.0,
        remote_key: window.key.as_ref().map_or(0, |key| key.0),
        nanoseconds: u64::try_from(window.elapsed.as_nanos()).unwrap_or(u64::MAX),
        error: window.key.err().unwrap_or_default(),
    });
    v1::WindowsRegistered { windows: windows.collect() }
}

/// Windows that were released, as they go over the wire.
pub(crate) fn windows_released(ids: &[WindowId]) -> v1::WindowsReleased {
    v1::WindowsReleased { ids: ids.iter().map(|id| id.0).collect() }
}

fn response(answer: Answer) -> v1::ExchangeControlResponse {
    v1::ExchangeControlResponse { answer: Some(answer) }
}
