//! `NodeService`: what this host is and can do.

use std::sync::Arc;

use ramferry_proto::v1;
use ramferry_proto::v1::node_service_server::{NodeService, NodeServiceServer};
use rustix::process::Resource;
use tonic::{Code, Request, Response, Status};

use crate::core::Agent;
use crate::metrics::Metrics;
use crate::server::MESSAGE_LIMIT_BYTES;
use crate::status::status;

/// Tells of this host.
#[derive(Clone)]
pub(crate) struct Node {
    agent: Arc<Agent>,
    metrics: Metrics,
}

impl Node {
    /// The service of an agent.
    pub(crate) fn service(agent: &Arc<Agent>, metrics: &Metrics) -> NodeServiceServer<Self> {
        let node = Self { agent: Arc::clone(agent), metrics: metrics.clone() };
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
        _: Request<v1::RunDiagnosticsRequest>,
    ) -> Result<Response<v1::RunDiagnosticsResponse>, Status> {
        Err(status(
            Code::Unimplemented,
            "DIAGNOSTICS_UNIMPLEMENTED",
            "this version of the agent makes no diagnostics; GetNodeInfo tells what the host can do",
            [],
        ))
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
