//! Making a session: the destination's refusals, all before anything is
//! changed, and what it chooses.

use std::sync::Arc;

use ramferry_engine::{Destination, Postcopy};
use ramferry_fabric::{FabricKind, SessionToken};
use ramferry_guest::{GuestInfo, Side};
use ramferry_proto::v1;
use ramferry_ram::{Block, Layout, RamFile};
use tonic::{Code, Status};

use super::{Plan, Start, start, token_digest};
use crate::MigrationRole;
use crate::core::{Agent, PROTOCOL_VERSION};
use crate::guest_cell::GuestCell;
use crate::inspect::inspect;
use crate::journal::{Created, SpecRecord, is_migration_id};
use crate::migrations::Entry;
use crate::publish::Publisher;
use crate::request::{MAX_STREAMS, fabric_on_the_wire, postcopy, registration_mode};
use crate::source::{blocking, refused, tracked_files, unix_milliseconds};
use crate::status::{Violation, causes, internal, invalid_argument, precondition, status};

/// Links of a migration whose caller leaves that open. A queue pair waits for its acknowledgements,
/// which others fill, and costs no processor; a stream or a copying thread does.
fn default_streams(fabric: FabricKind) -> u32 {
    match fabric {
        FabricKind::Verbs => 4,
        FabricKind::Tcp | FabricKind::Shm => 2,
    }
}

/// Makes a session, or with `validate_only` only all its checks.
pub(crate) async fn negotiate(
    agent: &Arc<Agent>,
    request: v1::NegotiateSessionRequest,
) -> Result<v1::NegotiateSessionResponse, Status> {
    if request.protocol_version != PROTOCOL_VERSION {
        let message = format!(
            "the source's agent ({}) speaks version {} of the protocol, this one ({}) version {PROTOCOL_VERSION}: upgrade the older agent",
            request.agent_version,
            request.protocol_version,
            env!("CARGO_PKG_VERSION")
        );
        return Err(status(Code::FailedPrecondition, "PROTOCOL_VERSION", message, []));
    }
    if !is_migration_id(&request.migration_id) {
        return Err(invalid_argument(
            "migration_id",
            "MIGRATION_ID_INVALID",
            "an id is 1 to 64 of [A-Za-z0-9._-]",
        ));
    }
    if request.streams > MAX_STREAMS {
        let message = format!("streams is {}: give at most {MAX_STREAMS}", request.streams);
        return Err(invalid_argument("streams", "OUT_OF_RANGE", message));
    }
    let layout = layout(&request.blocks)?;
    let (chosen, reason) = agent.fabrics.choose(&request, request.boot_id == agent.boot_id)?;
    let mode = registration_mode(request.registration_mode)?;
    let mut claim = if request.validate_only {
        None
    } else {
        let claim = agent.registry.claim(MigrationRole::Destination, &request.migration_id);
        Some(claim.map_err(|refusal| refused(&refusal))?)
    };
    let (guest, info, files) =
        inspect(agent, request.destination_qmp_path.as_ref(), Side::Destination, claim.as_mut()).await?;
    check_guests(&request, &layout, &info)?;
    if postcopy(request.postcopy)? != Postcopy::Never {
        check_postcopy(&info, &files, partners(agent, &request)).await?;
    }
    let mut response = v1::NegotiateSessionResponse {
        protocol_version: PROTOCOL_VERSION,
        session_token: Vec::new(),
        fabric: fabric_on_the_wire(chosen).into(),
        fabric_reason: reason.clone(),
        fabric_address: agent.fabrics.address(chosen),
        streams: if request.streams == 0 { default_streams(chosen) } else { request.streams },
        vmm_version: format!("{} ({})", info.vmm, info.machine),
        agent_version: env!("CARGO_PKG_VERSION").into(),
    };
    let Some(mut claim) = claim.take() else {
        return Ok(response);
    };
    claim.claim_guest(info.pid).map_err(|refusal| refused(&refusal))?;
    let token = SessionToken::random().map_err(|error| internal("NO_RANDOMNESS", &error))?;
    response.session_token = token.as_bytes().to_vec();
    let log = agent.journal.create(
        MigrationRole::Destination,
        &request.migration_id,
        &created(&request, &info, &token),
    );
    let log = log.map_err(|error| status(Code::Unavailable, error.reason(), causes(&error), []))?;
    let plan = Plan {
        layout: info.layout,
        files,
        fabric: chosen,
        streams: response.streams,
        pin_budget_bytes: Some(request.pin_budget_bytes).filter(|bytes| *bytes > 0),
        vmm: info.pid,
        partners: partners(agent, &request),
    };
    let entry = entry(&request, chosen, &reason);
    agent.registry.insert(&entry);
    tracing::info!(id = request.migration_id, fabric = %chosen, reason, "session made");
    let publisher = Publisher::new(
        &agent.metrics,
        MigrationRole::Destination,
        &request.migration_id,
        mode.as_str(),
        chosen.as_str(),
    );
    let parts = Start {
        engine: Destination::new(),
        token: Some(token),
        token_digest: None,
        guest: GuestCell::found(Arc::new(guest)),
        run_guest: request.guest_running,
        plan: Some(plan),
        publisher,
        log,
        claim,
    };
    start(agent, entry, parts);
    Ok(response)
}

pub(crate) fn layout(blocks: &[v1::MemoryBlock]) -> Result<Layout, Status> {
    let block = |block: &v1::MemoryBlock| Block {
        name: block.name.clone(),
        guest_address: block.guest_address,
        length_bytes: block.length_bytes,
        page_bytes: block.page_bytes,
    };
    Layout::new(blocks.iter().map(block).collect())
        .map_err(|error| invalid_argument("blocks", "LAYOUT_INVALID", error.to_string()))
}

fn check_guests(
    request: &v1::NegotiateSessionRequest,
    source: &Layout,
    info: &GuestInfo,
) -> Result<(), Status> {
    let refuse = |reason: &str, message: String| {
        let violation =
            Violation { kind: "GUEST".into(), subject: "destination".into(), description: message.clone() };
        Err(precondition(reason, message, [violation], []))
    };
    if request.machine_type != info.machine {
        return refuse(
            "MACHINE_TYPE_DIFFERS",
            format!(
                "the source guest is a {:?}, the destination guest a {:?}; start the destination with the source's -machine type, version included",
                request.machine_type, info.machine
            ),
        );
    }
    if request.vcpus != info.vcpus {
        return refuse(
            "VCPUS_DIFFER",
            format!(
                "the source guest has {} vCPUs, the destination guest {}; start the destination with the source's -smp",
                request.vcpus, info.vcpus
            ),
        );
    }
    match source.check_same(&info.layout) {
        Ok(()) => Ok(()),
        Err(mismatch) => refuse(
            "LAYOUT_DIFFERS",
            format!("{mismatch}; start the destination with the source's memory options"),
        ),
    }
}

/// The source's agent, where it is on this host.
fn partners(agent: &Agent, request: &v1::NegotiateSessionRequest) -> Vec<u32> {
    let here = request.boot_id == agent.boot_id && request.agent_pid != 0;
    if here { vec![request.agent_pid] } else { Vec::new() }
}

/// Refuses a VMM whose accesses could not be held up, before anything is changed.
async fn check_postcopy(info: &GuestInfo, files: &[RamFile], partners: Vec<u32>) -> Result<(), Status> {
    let (pid, tracked) = (info.pid, tracked_files(info, files));
    let checked = blocking(move || ramferry_tracking::postcopy::check(pid, &tracked, &partners)).await?;
    checked.map_err(|error| {
        let message = format!(
            "post-copy cannot be used: the accesses of the destination guest to its memory cannot be held up: {}; \
             migrate without it (postcopy never), or mend that",
            causes(&error)
        );
        let violation =
            Violation { kind: "GUEST".into(), subject: "destination".into(), description: message.clone() };
        precondition("POSTCOPY_UNAVAILABLE", message, [violation], [])
    })
}

fn created(request: &v1::NegotiateSessionRequest, info: &GuestInfo, token: &SessionToken) -> Created {
    Created {
        id: request.migration_id.clone(),
        request_id: String::new(),
        role: MigrationRole::Destination,
        spec: SpecRecord { destination_qmp_path: request.destination_qmp_path.clone(), ..Default::default() },
        guest_pid: info.pid,
        created_unix_ms: unix_milliseconds(),
        guest_was_running: request.guest_running,
        session: Some(token_digest(token)),
    }
}

fn entry(request: &v1::NegotiateSessionRequest, chosen: FabricKind, reason: &str) -> Arc<Entry> {
    let mut view = v1::Migration {
        id: request.migration_id.clone(),
        spec: Some(v1::MigrationSpec {
            destination_qmp_path: request.destination_qmp_path.clone(),
            ..Default::default()
        }),
        fabric: fabric_on_the_wire(chosen).into(),
        fabric_reason: reason.to_owned(),
        ..Default::default()
    };
    view.set_state(v1::MigrationState::Pending);
    Entry::new(String::new(), MigrationRole::Destination, view)
}
