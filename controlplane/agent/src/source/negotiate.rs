//! Making a session with the destination's agent: what is asked, what it answered, and what its refusals mean.

use bytes::Bytes;
use ramferry_fabric::{FabricKind, SessionToken};
use ramferry_guest::GuestInfo;
use ramferry_proto::v1;
use ramferry_proto::v1::peer_service_client::PeerServiceClient;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::peer;
use crate::core::{Agent, EXCHANGE_TIMEOUT, PROTOCOL_VERSION};
use crate::fabrics::Agreed;
use crate::request::{Request, fabric_on_the_wire};
use crate::status::{TEXT_BYTES, causes, status};

pub(super) async fn negotiate(
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
        agent_pid: std::process::id(),
        postcopy: request.spec.parameters.unwrap_or_default().postcopy,
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

pub(super) fn agreed(request: &Request, response: v1::NegotiateSessionResponse) -> Result<Agreed, Status> {
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
pub(crate) fn is_shm_socket(path: &str) -> bool {
    let path = std::path::Path::new(path);
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let pid = name.strip_prefix("shm-").and_then(|rest| rest.strip_suffix(".sock"));
    path.is_absolute() && pid.is_some_and(|pid| pid.parse::<u32>().is_ok())
}
