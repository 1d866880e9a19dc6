//! `NodeService`: what this host is and can do.

use std::sync::Arc;

use ramferry_proto::v1;
use ramferry_proto::v1::node_service_server::{NodeService, NodeServiceServer};
use rustix::process::Resource;
use tonic::{Request, Response, Status};

use crate::core::Agent;
use crate::diagnostics::{Doctor, Finding};
use crate::metrics::Metrics;
use crate::server::MESSAGE_LIMIT_BYTES;
use crate::status::{invalid_argument, shortened};

/// Longest address of a peer: a host name of 253 bytes and a port.
const ADDRESS_BYTES: usize = 260;

/// Tells of this host.
#[derive(Clone)]
pub(crate) struct Node {
    agent: Arc<Agent>,
    metrics: Metrics,
    doctor: Doctor,
    /// One examination at a time: each starts children.
    examining: Arc<tokio::sync::Mutex<()>>,
}

impl Node {
    /// The service of an agent.
    pub(crate) fn service(agent: &Arc<Agent>, metrics: &Metrics, doctor: &Doctor) -> NodeServiceServer<Self> {
        let node = Self {
            agent: Arc::clone(agent),
            metrics: metrics.clone(),
            doctor: doctor.clone(),
            examining: Arc::default(),
        };
        NodeServiceServer::new(node)
            .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
            .max_encoding_message_size(MESSAGE_LIMIT_BYTES)
    }
}

#[tonic::async_trait]
impl NodeService for Node {
    async fn get_node_info(
        &self,
        _: Request<v1::GetNodeInfoRequest>,
    ) -> Result<Response<v1::GetNodeInfoResponse>, Status> {
        let trackers = tokio::task::spawn_blocking(trackers)
            .await
            .map_err(|error| crate::status::internal("TRACKER_TEST_FAILED", &error))?;
        let system = rustix::system::uname();
        let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
        Ok(Response::new(v1::GetNodeInfoResponse {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            hostname: text(system.nodename()),
            kernel_release: text(system.release()),
            boot_id: boot_id().await?,
            fabrics: self.agent.fabrics.info(),
            trackers,
            limits: limits(),
            migrations_active: self.metrics.migrations_active(),
            migrations_max: self.agent.config.max_migrations,
        }))
    }

    async fn run_diagnostics(
        &self,
        request: Request<v1::RunDiagnosticsRequest>,
    ) -> Result<Response<v1::RunDiagnosticsResponse>, Status> {
        let peer = request.into_inner().peer;
        if peer.len() > ADDRESS_BYTES {
            let message = format!("a peer's address has at most {ADDRESS_BYTES} bytes; give HOST:PORT");
            return Err(invalid_argument("peer", "ADDRESS_INVALID", message));
        }
        let peer = (!peer.is_empty()).then_some(peer.as_str());
        let _turn = self.examining.lock().await;
        let findings = self.doctor.examine(peer).await;
        let findings = findings.map_err(|error| crate::status::internal("DIAGNOSTICS_FAILED", &error))?;
        if peer.is_none() {
            self.metrics.diagnosed(&findings);
        }
        let result = |finding: Finding| v1::DiagnosticResult {
            id: finding.check.info().id.to_owned(),
            status: finding.verdict.status.on_the_wire().into(),
            evidence: shortened(finding.verdict.evidence),
            remedy: shortened(finding.verdict.remedy),
        };
        let results = findings.into_iter().map(result).collect();
        Ok(Response::new(v1::RunDiagnosticsResponse { results }))
    }
}

async fn boot_id() -> Result<String, Status> {
    let id = tokio::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .await
        .map_err(|error| crate::status::internal("BOOT_ID_UNREADABLE", &error))?;
    Ok(id.trim().to_owned())
}

fn trackers() -> Vec<v1::TrackerInfo> {
    use ramferry_tracking::{TrackerKind, self_test};

    [TrackerKind::UffdWp, TrackerKind::SoftDirty]
        .into_iter()
        .map(|kind| {
            let tested = self_test(kind);
            v1::TrackerInfo {
                name: kind.as_str().to_owned(),
                available: tested.is_ok(),
                detail: tested.err().map(|error| crate::status::causes(&error)).unwrap_or_default(),
            }
        })
        .collect()
}

fn limits() -> Vec<v1::LimitInfo> {
    [("memlock", Resource::Memlock, "bytes"), ("open_files", Resource::Nofile, "descriptors")]
        .into_iter()
        .map(|(name, resource, unit)| v1::LimitInfo {
            name: name.to_owned(),
            value: rustix::process::getrlimit(resource).current,
            unit: unit.to_owned(),
        })
        .collect()
}
