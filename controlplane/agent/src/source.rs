//! Migrations whose source is this host.

mod checks;
mod negotiate;
mod outside;
mod peer;
mod reads;
mod view;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use ramferry_engine::{Failure, FixedCosts, Postcopy, Reason, Source, SourceEvent};
use ramferry_fabric::windows::{RegistrationMode, WindowConfig};
use ramferry_guest::{GuestError, GuestInfo};
use ramferry_mover::{SourceHandle, SourceInput, SourceParts, spawn_source};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_request::Order;
use ramferry_ram::{Access, Memory, RamFile};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tonic::{Code, Status};

pub(crate) use self::checks::check;
pub(crate) use self::checks::tracked_files;
use self::checks::{check_tracking, inspect, late_writes, recheck_reason};
pub(crate) use self::negotiate::is_shm_socket;
#[cfg(test)]
pub(crate) use self::negotiate::peer_refusal;
use self::negotiate::{agreed, negotiate};
use self::outside::Outside;
pub(crate) use self::peer::channel as peer_channel;
pub(crate) use self::peer::{ORDER_ITEMS, add_runs, failure_of, orders, settled, windows};
use self::peer::{Peer, PeerSetup};
#[cfg(feature = "fuzzing")]
pub(crate) use self::peer::{input, take_presence};
use self::reads::Reads;
pub(crate) use self::view::{duration as duration_on_the_wire, state as state_on_the_wire, trouble};
use crate::MigrationRole;
use crate::core::{Agent, EXCHANGE_TIMEOUT};
use crate::device_stream::{self, RelayError};
use crate::fabrics::{Agreed, Connected};
use crate::guest_cell::GuestCell;
use crate::journal::{Created, MigrationLog, Record, Recovered, SpecRecord, SyncedAhead};
use crate::keepsake::{self, Keepsake, Terms};
use crate::migrations::{Claim, Entry, Refusal};
use crate::publish::Publisher;
use crate::request::{Request, fabric_on_the_wire, reading_budget, registration_mode};
use crate::status::{causes, invalid_argument, status};
use crate::throttle::Throttle;

/// Of a fence, until one was measured.
const FENCE_ESTIMATE: Duration = Duration::from_millis(1);
/// Longest wait for the destination to confirm that it gave up.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Everything that the steps of one migration share.
pub(crate) struct Session {
    agent: Arc<Agent>,
    entry: Arc<Entry>,
    handle: SourceHandle,
    peer: Arc<Peer>,
    guest: GuestCell,
    /// Whether HANDED_OVER may be in the journal.
    handed_over: AtomicBool,
    /// Ended with the migration: each keeps the session, and so the guest's QMP socket.
    tasks: Mutex<Vec<AbortHandle>>,
    /// Steps that order something of the guest: preparing, draining, pausing, moving its device state.
    ordering: Mutex<Vec<JoinHandle<()>>>,
    incoming: tokio::sync::Mutex<mpsc::Receiver<v1::DeviceState>>,
    /// Whether what the VMM saves must not reach the destination yet.
    device_state_held: watch::Sender<bool>,
    plan: Mutex<Option<Plan>>,
    reads: Mutex<Reads>,
    /// Held while the destination is being connected to again.
    reconnecting: tokio::sync::Mutex<()>,
    throttle: Arc<Throttle>,
    /// When the migration was asked for.
    called: Instant,
    /// When its driver started, from which that counts.
    started: Instant,
}

/// What [`Session::prepare`] works from.
struct Plan {
    request: Request,
    info: GuestInfo,
    files: Vec<RamFile>,
    agreed: Agreed,
}

/// Starts a migration: from its refusals, all before anything is changed, to its driver.
pub(crate) async fn create(
    agent: &Arc<Agent>,
    id: &str,
    request_id: &str,
    request: Request,
) -> Result<Arc<Entry>, Status> {
    let called = Instant::now();
    let mut claim = agent.registry.claim(MigrationRole::Source, id).map_err(|refusal| refused(&refusal))?;
    let (guest, info, files) = inspect(agent, &request, Some(&mut claim)).await?;
    claim.claim_guest(info.pid).map_err(|refusal| refused(&refusal))?;
    let (pid, tracked) = (info.pid, tracked_files(&info, &files));
    let others = check_tracking(pid, tracked).await?;
    let channel = peer::channel(&request.destination_agent, agent.config.tls.as_ref())?;
    let response = negotiate(agent, channel.clone(), id, &request, &info, false).await?;
    let token = Bytes::copy_from_slice(&response.session_token);
    let begun = agreed(&request, response)
        .and_then(|agreed| Ok((begin_log(agent, id, request_id, &request, &info)?, agreed)));
    let (log, agreed) = match begun {
        Ok(begun) => begun,
        Err(refusal) => {
            peer::give_up(channel, id, token, refusal.message()).await;
            return Err(refusal);
        }
    };
    let mut parameters = request.parameters.clone();
    if !info.running {
        // A guest that stands still has no downtime to keep short.
        parameters.max_downtime = *ramferry_engine::Parameters::MAX_DOWNTIME.end();
    }
    let engine = Source::new(parameters.clone())
        .map_err(|error| invalid_argument("spec.parameters", "OUT_OF_RANGE", error.to_string()))?;
    let mut view = v1::Migration {
        id: id.to_owned(),
        spec: Some(request.spec.clone()),
        fabric: fabric_on_the_wire(agreed.fabric).into(),
        fabric_reason: agreed.fabric_reason.clone(),
        recheck_reason: recheck_reason(&info, &others),
        ..Default::default()
    };
    view.set_state(v1::MigrationState::Pending);
    let entry = Entry::new(request_id.to_owned(), MigrationRole::Source, view);
    agent.registry.insert(&entry);
    tracing::info!(id, fabric = %agreed.fabric, reason = agreed.fabric_reason, "migration created");

    let setup = PeerSetup {
        channel: Ok(channel),
        id: id.to_owned(),
        token: Bytes::copy_from_slice(agreed.token.as_bytes()),
        layout: Some(info.layout.clone()),
        fabric: agreed.fabric.as_str(),
        mode: request.registration.as_str(),
    };
    let plan = Plan { request, info, files, agreed };
    start(
        agent,
        &entry,
        Start {
            engine,
            parameters,
            setup,
            guest: GuestCell::found(guest),
            handed_over: false,
            plan: Some(plan),
            log,
            claim,
            called,
        },
    );
    Ok(entry)
}

fn begin_log(
    agent: &Agent,
    id: &str,
    request_id: &str,
    request: &Request,
    info: &GuestInfo,
) -> Result<MigrationLog, Status> {
    let created = Created {
        id: id.to_owned(),
        request_id: request_id.to_owned(),
        role: MigrationRole::Source,
        spec: SpecRecord::try_from(&request.spec)
            .map_err(|error| invalid_argument("spec", "OUT_OF_RANGE", error.to_string()))?,
        guest_pid: info.pid,
        created_unix_ms: unix_milliseconds(),
        guest_was_running: info.running,
        session: None,
    };
    let log = agent.journal.create(MigrationRole::Source, id, &created);
    log.map_err(|error| status(Code::Unavailable, error.reason(), causes(&error), []))
}

/// What [`start`] needs beside the agent and the entry.
struct Start {
    engine: Source,
    parameters: ramferry_engine::Parameters,
    setup: PeerSetup,
    guest: GuestCell,
    handed_over: bool,
    plan: Option<Plan>,
    log: MigrationLog,
    claim: Claim,
    called: Instant,
}

fn start(agent: &Arc<Agent>, entry: &Arc<Entry>, start: Start) {
    let Start { engine, parameters, setup, guest, handed_over, plan, log, claim, called } = start;
    let publisher =
        Publisher::new(&agent.metrics, MigrationRole::Source, &entry.id, setup.mode, setup.fabric);
    let (queue, incoming) = device_stream::queue();
    let mut driven = None;
    let (handle, thread) = spawn_source(engine, |handle| {
        let peer = Peer::new(setup, handle.clone(), queue);
        let session = Arc::new(Session {
            agent: Arc::clone(agent),
            entry: Arc::clone(entry),
            handle,
            peer,
            guest,
            handed_over: AtomicBool::new(handed_over),
            tasks: Mutex::default(),
            ordering: Mutex::default(),
            incoming: tokio::sync::Mutex::new(incoming),
            device_state_held: watch::Sender::default(),
            plan: Mutex::new(plan),
            reads: Mutex::default(),
            reconnecting: tokio::sync::Mutex::default(),
            throttle: Arc::new(Throttle::new(&agent.config, &entry.id)),
            called,
            started: Instant::now(),
        });
        session.keep(tokio::spawn(watch_guest(Arc::clone(&session))).abort_handle());
        driven = Some(Arc::clone(&session));
        Outside::new(session, log, publisher, claim)
    });
    if !entry.has_ended() {
        entry.set_driver(Some((handle, parameters)));
    }
    tokio::task::spawn_blocking(move || {
        if let (Err(_), Some(session)) = (thread.join(), driven) {
            session.driver_panicked();
        }
    });
}

/// Tells the driver when the guest is lost. Ended with the migration: it keeps the guest's QMP socket.
async fn watch_guest(session: Arc<Session>) {
    if let Some(guest) = session.guest.now() {
        let lost = guest.lost().await;
        // The guest left it behind: its RAM is held without it.
        if session.entry.view().state() != v1::MigrationState::Postcopy {
            session.handle.send(SourceEvent::Failed(guest_failure(&lost)));
        }
    }
}

/// Asks a migration to end before its commit.
pub(crate) fn cancel(entry: &Entry) {
    if let Some((handle, _)) = &*entry.driver() {
        handle.send(SourceEvent::Cancel);
    }
}

/// Takes up a migration that the journal holds.
pub(crate) fn recover(agent: &Arc<Agent>, found: Recovered) {
    let mut view = crate::summary::restored(&found);
    let ended = found.records.iter().any(|record| matches!(record, Record::Ended { .. }));
    if ended {
        // Recorded, and killed before it was all tidied up.
        keepsake::remove(&agent.config, &found.created.id, MigrationRole::Source);
        let entry = Entry::new(found.created.request_id, MigrationRole::Source, view);
        return agent.registry.insert(&entry);
    }
    let handed_over = found.records.iter().any(|record| matches!(record, Record::HandedOver));
    let state = if handed_over { v1::MigrationState::SwitchingOver } else { v1::MigrationState::Cancelling };
    view.set_state(state);
    let entry = Entry::new(found.created.request_id.clone(), MigrationRole::Source, view);
    agent.registry.insert(&entry);
    let (id, created) = (&found.created.id, &found.created);
    let socket = created.spec.source_qmp_path.as_ref();
    let claim = agent.registry.reclaim(MigrationRole::Source, id, created.guest_pid, socket);
    drop(agent.device_state_socket(&found.created.id));
    tracing::warn!(id = found.created.id, handed_over, "taking up a migration that a restart interrupted");
    let spec = v1::MigrationSpec::from(&found.created.spec);
    let given = spec.parameters.unwrap_or_default();
    let parameters = crate::request::engine_parameters(&given).unwrap_or_default();
    let engine = if handed_over {
        Source::recover_handed_over(parameters.clone())
    } else {
        Source::recover_before_handover(parameters.clone())
    };
    let setup = PeerSetup {
        channel: peer::channel(&spec.destination_agent, agent.config.tls.as_ref()),
        id: found.created.id.clone(),
        token: kept_token(agent, id, handed_over),
        layout: None,
        fabric: "unknown",
        mode: registration_mode(given.registration_mode).map_or("unknown", RegistrationMode::as_str),
    };
    let dirs = agent.config.guest_dirs.clone();
    let guest = GuestCell::lost(spec.source_qmp_path, dirs, &found.created);
    start(
        agent,
        &entry,
        Start {
            engine,
            parameters,
            setup,
            guest,
            handed_over,
            plan: None,
            log: found.log,
            claim,
            called: Instant::now(),
        },
    );
}

/// The session's token, where this agent's end came in the middle of a handover into post-copy.
fn kept_token(agent: &Agent, id: &str, handed_over: bool) -> Bytes {
    if !handed_over {
        keepsake::remove(&agent.config, id, MigrationRole::Source);
        return Bytes::new();
    }
    match Keepsake::read(&keepsake::path(&agent.config, id, MigrationRole::Source)) {
        Ok(kept) => kept
            .and_then(|kept| kept.token())
            .map_or_else(Bytes::new, |token| Bytes::copy_from_slice(token.as_bytes())),
        Err(failure) => {
            tracing::error!(id, %failure, "what was kept of a migration cannot be used");
            Bytes::new()
        }
    }
}

impl Session {
    async fn prepare(&self) -> Result<SourceParts, Failure> {
        let plan = self.plan.lock().expect("no panic while it is held").take();
        let Plan { request, info, files, agreed } =
            plan.ok_or_else(|| Failure::new(Reason::Internal, "the migration was prepared twice"))?;
        let presence = async {
            let refused = |status: Status| Failure::new(Reason::PeerLost, status.message());
            self.peer.open().await.map_err(refused)?;
            self.peer.wait(|said| said.presence.is_some()).await.map_err(refused)?;
            Ok(self.peer.said().presence.expect("it was waited for"))
        };
        let guest =
            async { self.guest.get().await?.prepare_source().await.map_err(|error| guest_failure(&error)) };
        let memory = async {
            let tracked = tracked_files(&info, &files);
            let pid = info.pid;
            let layout = info.layout.clone();
            blocking_step(move || {
                let ram = |error: ramferry_ram::RamError| Failure::new(Reason::GuestFailed, causes(&error));
                let memory = Arc::new(Memory::new(layout, files, Access::Read).map_err(ram)?);
                let tracker = ramferry_tracking::arm(None, pid, &tracked)
                    .map_err(|error| Failure::new(Reason::TrackerFailed, causes(&error)))?;
                Ok((memory, tracker))
            })
            .await
        };
        // None is left behind half done where another fails.
        let (presence, guest, memory) = tokio::join!(presence, guest, memory);
        let destination_presence = presence?;
        guest?;
        let (memory, tracker) = memory?;
        *self.reads.lock().expect("no panic while it is held") = Reads::of(
            &memory,
            Terms {
                fabric: agreed.fabric,
                streams: agreed.streams,
                pin_budget_bytes: request.pin_budget_bytes,
                partners: Vec::new(),
            },
        );

        let pin_budget_bytes = request.pin_budget_bytes.map(|bytes| match request.parameters.postcopy {
            Postcopy::Never => bytes,
            _ => bytes.saturating_sub(reading_budget(bytes, &info.layout)),
        });
        let agent = Arc::clone(&self.agent);
        let (to, reached) = (request.destination_agent, Arc::clone(&memory));
        let connect = move || agent.fabrics.connect(&agreed, &reached, &to);
        let Connected { domain, links, links_bytes } = blocking_step(connect).await?;
        let peer = Arc::clone(&self.peer);
        let config = &self.agent.config;
        Ok(SourceParts {
            links,
            domain,
            tracker,
            memory,
            windows: WindowConfig {
                pin_budget_bytes,
                links_bytes,
                // Here registering a hole would allocate its pages, and a region more costs next to nothing.
                hole_tolerance_bytes: 0,
                ..WindowConfig::new(request.registration)
            },
            registration_workers: config.registration_workers,
            destination_presence: Arc::unwrap_or_clone(destination_presence),
            late_writes: late_writes(&info),
            fixed_costs: FixedCosts {
                fence: FENCE_ESTIMATE,
                device_state: self.agent.device_state_cost(info.private_bytes),
            },
            order: Box::new(move |order| {
                peer::orders(&order).into_iter().all(|order| peer.send_blocking(order))
            }),
            poller_cpus: config.poller_cpus.clone(),
        })
    }

    /// Brings the guest to its pause: the destination's VMM listens, the
    /// source's sends up to the point where it stops its vCPUs.
    async fn pause(self: Arc<Self>, postcopy: bool, synced: SyncedAhead) -> Result<SourceInput, Failure> {
        let lost = |status: Status| Failure::new(Reason::PeerLost, status.message());
        if postcopy {
            self.begin_reads().await?;
        }
        if !self.peer.send(Order::PrepareIncoming(v1::PrepareIncoming { postcopy })).await {
            return Err(lost(Status::unavailable("the control stream is lost")));
        }
        self.peer.wait(|said| said.incoming_ready).await.map_err(lost)?;
        let guest = self.guest.get().await?;
        let socket = self.agent.device_state_socket(&self.entry.id);
        let path = socket.path();
        let listener = socket.listen_for(guest.pid()).map_err(|error| {
            let message = format!("cannot listen for the VMM: {}", causes(&error));
            Failure::new(Reason::Internal, message)
        })?;
        let relaying = Arc::clone(&self);
        let relay = tokio::spawn(async move {
            if let Err(error @ RelayError::Vmm(_)) = relaying.relay_device_state(listener).await {
                let failure = Failure::new(Reason::GuestFailed, error.to_string());
                relaying.handle.send(SourceEvent::Failed(failure));
            }
        });
        self.keep(relay.abort_handle());
        synced.wait().await;
        let paused = guest.pause_for_switchover(path).await;
        let paused = paused.map_err(|error| guest_failure(&error))?;
        let ago = SystemTime::now().duration_since(paused.stop_time).unwrap_or_default();
        Ok(SourceInput::GuestPaused(ago))
    }

    async fn relay_device_state(&self, listener: UnixListener) -> Result<(), RelayError> {
        let vmm = self.guest.get().await.map_err(|failure| std::io::Error::other(failure.to_string()))?.pid();
        let stream = loop {
            let (stream, _) = listener.accept().await?;
            match device_stream::check_vmm(&stream, vmm) {
                Ok(()) => break stream,
                Err(error) => tracing::warn!(id = self.entry.id, %error, "a connection was refused"),
            }
        };
        drop(listener);
        let mut incoming = self.incoming.lock().await;
        let send = async |state| {
            // Its sender is the session's.
            let _ = self.device_state_held.subscribe().wait_for(|held| !held).await;
            self.peer.send(Order::DeviceState(state)).await
        };
        device_stream::relay(stream, &mut incoming, send).await
    }

    /// Has the device state saved, and waits until it was let go and has arrived. A VMM that fails to save it is heard at once.
    async fn move_device_state(&self) -> Result<SourceEvent, Failure> {
        let guest = self.guest.get().await?;
        let sent = async { guest.move_device_state().await.map_err(|error| guest_failure(&error)) };
        let loaded = async {
            let lost = |status: Status| Failure::new(Reason::PeerLost, status.message());
            self.peer.wait(|said| said.device_state_loaded).await.map_err(lost)
        };
        tokio::try_join!(sent, loaded)?;
        Ok(SourceEvent::DeviceStateMoved)
    }

    async fn resume(&self) -> Result<SourceEvent, Failure> {
        let guest = match self.guest.get().await {
            Ok(guest) => guest,
            Err(failure) if self.guest.is_gone() => return Ok(SourceEvent::GuestGone(failure)),
            Err(failure) => return Err(failure),
        };
        match guest.resume_source().await {
            Ok(_) => Ok(SourceEvent::GuestResumed),
            Err(error @ GuestError::Gone { .. }) => Ok(SourceEvent::GuestGone(guest_failure(&error))),
            Err(error) => Err(guest_failure(&error)),
        }
    }

    /// Holds the guest back as was last ordered.
    async fn follow_throttle(&self) -> Result<SourceEvent, Failure> {
        let failed = |error: &dyn std::error::Error| Failure::new(Reason::ThrottleFailed, causes(error));
        let (mut pid, mut threads) = (0, Vec::new());
        if self.throttle.needs_threads() {
            let guest = self.guest.get().await?;
            pid = guest.pid();
            threads = guest.vcpu_threads().await.map_err(|error| failed(&error))?;
        }
        let throttle = Arc::clone(&self.throttle);
        blocking_step(move || throttle.follow(pid, &threads).map_err(|error| failed(&error)))
            .await
            .map(|percent| SourceEvent::Throttled { percent })
    }

    fn end_throttle(&self) {
        if let Err(error) = self.throttle.end() {
            let error = causes(&error);
            tracing::error!(id = self.entry.id, error, "the guest may still be throttled; restart the agent");
        }
    }

    /// Asks the destination for the outcome; its answer comes by the control stream.
    async fn ask_outcome(self: &Arc<Self>) {
        let asked = match self.peer.open().await {
            Ok(()) => {
                self.lend_to_ask().await;
                self.peer.send(Order::AskOutcome(v1::AskOutcome {})).await
            }
            Err(error) => {
                let (id, error) = (&self.entry.id, error.message());
                tracing::warn!(id, error, "the destination cannot be asked for the outcome");
                false
            }
        };
        if !asked {
            self.handle.send(SourceEvent::PeerLost);
        }
    }

    /// Tells the destination to give up, and waits a while for it to have done so.
    async fn abort_peer(&self, failure: &Failure) {
        let order = Order::Abort(v1::AbortSession {
            reason: failure.reason.as_str().into(),
            message: failure.message.clone(),
        });
        let told = async {
            if self.peer.open().await.is_ok() && self.peer.send(order).await {
                // Lost now, it gives up by itself.
                let _ = self.peer.wait(|said| said.aborted).await;
            }
        };
        let _ = tokio::time::timeout(ABORT_TIMEOUT, told).await;
    }

    /// Ends `task` with the migration.
    fn keep(&self, task: AbortHandle) {
        let mut tasks = self.tasks.lock().expect("no panic while it is held");
        tasks.retain(|task| !task.is_finished());
        tasks.push(task);
    }

    /// `task` orders something of the guest: it ends before the guest is resumed.
    fn keep_ordering(&self, task: JoinHandle<()>) {
        self.ordering.lock().expect("no panic while it is held").push(task);
    }

    /// Orders the guest nothing more that is under way.
    fn stop_ordering(&self) -> impl Future<Output = ()> + Send + use<> {
        let ordering = std::mem::take(&mut *self.ordering.lock().expect("no panic while it is held"));
        async move {
            for task in ordering {
                task.abort();
                // It was cancelled, or is done.
                let _ = task.await;
            }
        }
    }

    fn close(&self) {
        self.peer.close();
        for task in self.tasks.lock().expect("no panic while it is held").drain(..) {
            task.abort();
        }
    }

    /// A defect of ours. The guest comes first: it runs on here, unless it may run there.
    fn driver_panicked(&self) {
        let id = &self.entry.id;
        if self.handed_over.load(Ordering::Acquire) {
            self.end_throttle();
            tracing::error!(
                id,
                "the driver panicked after the handover; restart the agent: it asks for the outcome"
            );
            return;
        }
        let resumed = self.agent.runtime.block_on(async {
            let stopped = tokio::time::timeout(EXCHANGE_TIMEOUT, self.stop_ordering()).await;
            if stopped.is_err() {
                tracing::error!(id, "a step does not end; the guest is resumed all the same");
            }
            self.close();
            self.resume().await
        });
        self.end_throttle();
        tracing::error!(id, ?resumed, "the driver panicked");
        self.entry.update(|view| {
            view.set_state(v1::MigrationState::Failed);
            let reason = Reason::Internal.as_str().into();
            let message =
                "a defect of the agent ended the migration; report it with the agent's log, and restart \
                           the agent before the guest is migrated again"
                    .into();
            view.error = Some(v1::MigrationError { reason, message });
        });
    }
}

pub(crate) fn refused(refusal: &Refusal) -> Status {
    let code = match refusal {
        Refusal::Exists(_) => Code::AlreadyExists,
        Refusal::Full(_) | Refusal::TooManyKnown(_) | Refusal::TooManyNeverRan(_) => Code::ResourceExhausted,
        Refusal::GuestBusy { .. } | Refusal::SocketBusy { .. } => Code::FailedPrecondition,
    };
    status(code, refusal.reason(), refusal.to_string(), [])
}

fn guest_failure(error: &GuestError) -> Failure {
    Failure::new(Reason::GuestFailed, causes(error))
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|error| crate::status::internal("INTERNAL", &error))
}

/// A step of a migration that waits on the kernel.
pub(crate) async fn blocking_step<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Failure::new(Reason::Internal, error.to_string()))?
}

pub(crate) fn unix_milliseconds() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
