//! Migrations whose source is this host.

mod outside;
mod peer;
mod view;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use ramferry_engine::{Failure, FixedCosts, LateWrites, Reason, Source, SourceEvent};
use ramferry_fabric::windows::{RegistrationMode, WindowConfig};
use ramferry_fabric::{FabricKind, SessionToken};
use ramferry_guest::{Guest, GuestError, GuestInfo, Side};
use ramferry_mover::{SourceHandle, SourceInput, SourceParts, spawn_source};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_request::Order;
use ramferry_proto::v1::peer_service_client::PeerServiceClient;
use ramferry_ram::{Access, Memory, RamFile};
use ramferry_tracking::{TrackedFile, TrackerKind};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tonic::transport::Channel;
use tonic::{Code, Status};

use self::outside::Outside;
pub(crate) use self::peer::channel as peer_channel;
pub(crate) use self::peer::{ORDER_ITEMS, failure_of};
use self::peer::{Peer, PeerSetup};
#[cfg(feature = "fuzzing")]
pub(crate) use self::peer::{input, take_presence};
pub(crate) use self::view::{duration as duration_on_the_wire, state as state_on_the_wire};
use crate::MigrationRole;
use crate::core::{Agent, EXCHANGE_TIMEOUT, PROTOCOL_VERSION};
use crate::device_stream::{self, RelayError};
use crate::fabrics::{Agreed, Connected};
use crate::guest_cell::GuestCell;
use crate::journal::{Created, MigrationLog, Record, Recovered, SpecRecord};
use crate::migrations::{Claim, Entry, Refusal};
use crate::publish::Publisher;
use crate::request::{Request, fabric_on_the_wire, registration_mode};
use crate::status::{TEXT_BYTES, Violation, causes, invalid_argument, precondition, status};

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
    plan: Mutex<Option<Plan>>,
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

/// Makes every check of a migration and changes nothing.
pub(crate) async fn check(
    agent: &Arc<Agent>,
    request: &Request,
) -> Result<v1::CheckMigrationResponse, Status> {
    let (guest, info, files) = inspect(agent, request, None).await?;
    let tracked = tracked_files(&info, &files);
    let pid = info.pid;
    let others = check_tracking(pid, tracked).await?;
    let works = |kind| ramferry_tracking::self_test(kind).map(|()| kind);
    let tracker = blocking(move || works(TrackerKind::UffdWp).or_else(|_| works(TrackerKind::SoftDirty)))
        .await?
        .map_err(|error| precondition("TRACKING_UNAVAILABLE", causes(&error), [], []))?;
    let channel = peer::channel(&request.destination_agent, agent.config.tls.as_ref())?;
    let response = negotiate(agent, channel, "check", request, &info, true).await?;
    let fabric = v1::FabricKind::try_from(response.fabric).unwrap_or_default();
    let mut present_bytes = 0;
    for (block, file) in info.layout.blocks().iter().zip(&files) {
        let present = file.presence(block.pages()).map_err(|error| guest_status("RAM", &error))?;
        present_bytes += present.count() * block.page_bytes;
    }
    drop(guest);
    Ok(v1::CheckMigrationResponse {
        fabric: fabric.into(),
        fabric_reason: response.fabric_reason,
        tracker: tracker.as_str().into(),
        ram_bytes: info.layout.total_bytes(),
        present_bytes,
        source_vmm: format!("{} ({})", info.vmm, info.machine),
        destination_vmm: response.vmm_version,
        recheck_reason: recheck_reason(&info, &others),
    })
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
            plan: Mutex::new(plan),
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
        session.handle.send(SourceEvent::Failed(Failure::new(Reason::GuestFailed, causes(&lost))));
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
        token: Bytes::new(),
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

        let agent = Arc::clone(&self.agent);
        let (to, reached) = (request.destination_agent, Arc::clone(&memory));
        let connect = move || agent.fabrics.connect(&agreed, &reached, &to);
        let Connected { domain, links } = blocking_step(connect).await?;
        let peer = Arc::clone(&self.peer);
        let config = &self.agent.config;
        Ok(SourceParts {
            links,
            domain,
            tracker,
            memory,
            windows: WindowConfig {
                pin_budget_bytes: request.pin_budget_bytes,
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
    async fn pause(self: Arc<Self>) -> Result<SourceInput, Failure> {
        let lost = |status: Status| Failure::new(Reason::PeerLost, status.message());
        if !self.peer.send(Order::PrepareIncoming(v1::PrepareIncoming {})).await {
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
        let send = |state| self.peer.send(Order::DeviceState(state));
        device_stream::relay(stream, &mut incoming, send).await
    }

    async fn move_device_state(&self) -> Result<SourceEvent, Failure> {
        let sent = async {
            self.guest.get().await?.continue_device_state().await.map_err(|error| guest_failure(&error))
        };
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

    /// Asks the destination for the outcome; its answer comes by the control stream.
    async fn ask_outcome(&self) {
        let asked = match self.peer.open().await {
            Ok(()) => self.peer.send(Order::AskOutcome(v1::AskOutcome {})).await,
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

async fn inspect(
    agent: &Agent,
    request: &Request,
    claim: Option<&mut Claim>,
) -> Result<(Arc<dyn Guest>, GuestInfo, Vec<RamFile>), Status> {
    let (guest, info, files) =
        crate::inspect::inspect(agent, &request.source_qmp, Side::Source, claim).await?;
    if !info.pinning_disks.is_empty() {
        return Err(direct_io(&info.pinning_disks));
    }
    Ok((Arc::new(guest), info, files))
}

async fn negotiate(
    agent: &Agent,
    channel: Channel,
    id: &str,
    request: &Request,
    info: &GuestInfo,
    validate_only: bool,
) -> Result<v1::NegotiateSessionResponse, Status> {
    let (offered, verbs_unavailable) = agent.fabrics.offer();
    let call = v1::NegotiateSessionRequest {
        protocol_version: PROTOCOL_VERSION,
        migration_id: id.to_owned(),
        destination_qmp_path: request.destination_qmp.clone(),
        blocks: peer::blocks(&info.layout),
        machine_type: info.machine.clone(),
        vmm_version: info.vmm.clone(),
        boot_id: agent.boot_id.clone(),
        fabric: request.fabric.map_or(v1::FabricKind::Unspecified, fabric_on_the_wire).into(),
        fabrics: offered.into_iter().map(|kind| fabric_on_the_wire(kind).into()).collect(),
        verbs_unavailable,
        streams: request.streams,
        registration_mode: request.spec.parameters.unwrap_or_default().registration_mode,
        pin_budget_bytes: request.pin_budget_bytes.unwrap_or_default(),
        validate_only,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        guest_running: info.running,
        vcpus: info.vcpus,
    };
    let mut call = tonic::Request::new(call);
    call.set_timeout(EXCHANGE_TIMEOUT);
    let answered = PeerServiceClient::new(channel).negotiate_session(call).await;
    answered
        .map(tonic::Response::into_inner)
        .map_err(|error| peer_refusal(&request.destination_agent, &error))
}

/// The destination's refusal, passed on with its details; or that it cannot be reached.
pub(crate) fn peer_refusal(address: &str, error: &Status) -> Status {
    let metadata = [("address", address.to_owned())];
    match crate::status::reason_of(error).as_deref() {
        // Of this agent, not of the caller, who would take it for a word on its own certificate.
        Some("ROLE_MISSING" | "CERTIFICATE_MISSING") => {
            let message = format!(
                "the destination's agent at {address} refuses this agent, not the caller: {}; give this agent a tls_cert with the role peer",
                error.message()
            );
            return status(Code::FailedPrecondition, "PEER_ROLE_MISSING", message, metadata);
        }
        Some(_) => {
            return Status::with_details(
                error.code(),
                error.message(),
                Bytes::copy_from_slice(error.details()),
            );
        }
        None => {}
    }
    if let Some(hint) = crate::auth::tls_hint(error) {
        let message =
            format!("no TLS connection to the destination's agent at {address}: {}; {hint}", causes(error));
        return status(Code::FailedPrecondition, "DESTINATION_TLS", message, metadata);
    }
    let message = format!(
        "the destination's agent at {address} cannot be reached or refused the call: {}; check that it runs, that the address is right, and that both agents use TLS or neither",
        causes(error)
    );
    let code = if error.code() == Code::Unknown { Code::Unavailable } else { error.code() };
    status(code, "DESTINATION_UNREACHABLE", message, metadata)
}

fn agreed(request: &Request, response: v1::NegotiateSessionResponse) -> Result<Agreed, Status> {
    let wrong = |what: &str| {
        status(Code::Internal, "PEER_PROTOCOL", format!("the destination's answer is not usable: {what}"), [])
    };
    if response.protocol_version != PROTOCOL_VERSION {
        let message = format!(
            "the destination's agent ({}) answers in version {} of the protocol, this one ({}) speaks version {PROTOCOL_VERSION}: upgrade the older agent",
            response.agent_version,
            response.protocol_version,
            env!("CARGO_PKG_VERSION")
        );
        return Err(status(Code::FailedPrecondition, "PROTOCOL_VERSION", message, []));
    }
    let text_bytes =
        response.fabric_reason.len() + response.fabric_address.len() + response.vmm_version.len();
    if text_bytes > TEXT_BYTES {
        return Err(wrong("its texts are too long"));
    }
    let token = <[u8; 32]>::try_from(&*response.session_token)
        .map_err(|_| wrong("its token is not 32 bytes long"))?;
    let fabric = crate::request::fabric(response.fabric)?.ok_or_else(|| wrong("it names no fabric"))?;
    if response.streams == 0 || response.streams > 64 || request.fabric.is_some_and(|asked| asked != fabric) {
        return Err(wrong("it chose a fabric or a number of streams that was not asked for"));
    }
    if fabric == FabricKind::Shm && !is_shm_socket(&response.fabric_address) {
        return Err(wrong("its socket is not one of an agent"));
    }
    Ok(Agreed {
        token: SessionToken::from_bytes(token),
        fabric,
        fabric_reason: response.fabric_reason,
        address: response.fabric_address,
        streams: response.streams,
    })
}

/// Whether `path` can be the shm socket of an agent: a destination must not
/// make this host connect to whatever socket it names.
fn is_shm_socket(path: &str) -> bool {
    let path = std::path::Path::new(path);
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let pid = name.strip_prefix("shm-").and_then(|rest| rest.strip_suffix(".sock"));
    path.is_absolute() && pid.is_some_and(|pid| pid.parse::<u32>().is_ok())
}

fn tracked_files(info: &GuestInfo, files: &[RamFile]) -> Vec<TrackedFile> {
    let tracked = |(block, file): (&ramferry_ram::Block, &RamFile)| TrackedFile {
        identity: file.identity(),
        pages: block.pages(),
        page_bytes: block.page_bytes,
    };
    info.layout.blocks().iter().zip(files).map(tracked).collect()
}

/// Refuses a guest whose RAM a process writes that cannot be tracked, by that process' name. Names those that can
/// be, beside the guest's own.
async fn check_tracking(guest: u32, files: Vec<TrackedFile>) -> Result<Vec<String>, Status> {
    let refuse = |why: String, violations: Vec<Violation>| {
        let message = format!("the source guest's writes cannot be tracked: {why}");
        precondition("TRACKING_UNAVAILABLE", message, violations, [])
    };
    let writers = blocking(move || ramferry_tracking::check(guest, &files)).await?;
    let mut others = Vec::new();
    for writer in writers.map_err(|error| refuse(causes(&error), Vec::new()))? {
        let subject = format!("process {} ({})", writer.pid, writer.comm);
        if let Some(obstacle) = writer.obstacle {
            let description = format!("{subject} writes to its RAM: {}", causes(&obstacle));
            let violation = Violation { kind: "HOST".into(), subject, description: description.clone() };
            return Err(refuse(description, vec![violation]));
        }
        if writer.pid != guest {
            others.push(subject);
        }
    }
    Ok(others)
}

/// Whether the guest's devices fill pages after they were reported.
fn late_writes(info: &GuestInfo) -> LateWrites {
    if !info.undrainable_devices.is_empty() {
        LateWrites::Undrainable
    } else if !info.direct_io_disks.is_empty() {
        LateWrites::Drainable
    } else {
        LateWrites::None
    }
}

/// Why what was sent is rechecked; empty when it is not.
fn recheck_reason(info: &GuestInfo, others: &[String]) -> String {
    let reasons = [
        ("direct I/O of", &info.direct_io_disks[..]),
        ("transfers of", &info.undrainable_devices),
        ("writes of", others),
    ];
    let named = reasons.iter().filter(|(_, names)| !names.is_empty());
    let named: Vec<String> = named.map(|(what, names)| format!("{what} {}", names.join(", "))).collect();
    named.join("; ")
}

/// Pages that a disk keeps pinned are filled again and again without a mark, so that even what was compared may have
/// changed back and forth since.
fn direct_io(disks: &[String]) -> Status {
    let remedy = "attach these disks by another block driver, such as host_device or file";
    let violation = |disk: &String| Violation {
        kind: "GUEST".into(),
        subject: disk.clone(),
        description: format!("it keeps guest RAM pinned; {remedy}"),
    };
    let message = format!(
        "the source guest cannot be migrated: its disks {} keep guest RAM pinned, and what they write there cannot be tracked; {remedy}",
        disks.join(", ")
    );
    precondition("DIRECT_IO", message, disks.iter().map(violation), [])
}

pub(crate) fn refused(refusal: &Refusal) -> Status {
    let code = match refusal {
        Refusal::Exists(_) => Code::AlreadyExists,
        Refusal::Full(_) | Refusal::TooManyKnown(_) | Refusal::TooManyNeverRan(_) => Code::ResourceExhausted,
        Refusal::GuestBusy { .. } | Refusal::SocketBusy { .. } => Code::FailedPrecondition,
    };
    status(code, refusal.reason(), refusal.to_string(), [])
}

fn guest_status(subject: &str, error: &dyn std::error::Error) -> Status {
    status(Code::FailedPrecondition, "GUEST_MEMORY", causes(error), [("subject", subject.to_owned())])
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
