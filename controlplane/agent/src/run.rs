//! From a configuration to a running agent.

use std::path::PathBuf;
use std::sync::Arc;

use ramferry_proto::v1::migration_service_server::MigrationServiceServer;
use ramferry_proto::v1::peer_service_server::PeerServiceServer;
use sd_notify::NotifyState;
use thiserror::Error;
use tracing::info;

use crate::config::{Config, ConfigError, Options};
use crate::core::{Agent, CoreError};
use crate::diagnostics::Doctor;
use crate::journal::{Journal, JournalError, Recovered};
use crate::logs;
use crate::metrics::Metrics;
use crate::migration_service::Migrations;
use crate::node_service::Node;
use crate::peer_service::Peers;
use crate::probes;
use crate::server::{self, Bound, MESSAGE_LIMIT_BYTES, Server, ServerError, Services};

/// Runs an agent until SIGTERM or SIGINT.
pub async fn run(options: Options) -> Result<(), AgentError> {
    let shutdown = server::shutdown_signal().map_err(|source| AgentError::Signals { source })?;
    let config = Config::load(&options)?;
    logs::init(&config.log);
    run_until(config, shutdown, |_| {}).await
}

/// Runs an agent until `shutdown` resolves. `ready` is told where it is served;
/// connections made from then on are taken.
pub async fn run_until(
    config: Config,
    shutdown: impl Future<Output = ()>,
    ready: impl FnOnce(&Bound),
) -> Result<(), AgentError> {
    let metrics = Metrics::new();
    // The journal first: its lock keeps a second agent from touching anything.
    let (journal, recovered) = open_journal(config.state_dir.join("journal")).await?;
    let server = Server::bind(&config, metrics.clone()).await?;
    let bound = server.bound();

    let core = Agent::start(config.clone(), journal, recovered, metrics.clone())?;
    let probes = probes::watch(config.probes, &metrics);
    let doctor = Doctor::of_agent(config.clone(), probes.states());
    let services = services(&core, &metrics, &doctor);

    info!(
        version = env!("CARGO_PKG_VERSION"),
        grpc = %bound.grpc,
        metrics = bound.metrics.map(tracing::field::display),
        tls = config.tls.is_some(),
        "agent started"
    );
    let health = services.health();
    let stopping = async {
        shutdown.await;
        // Detaching takes a second, of which nobody waits for any here.
        drop(probes);
        server::tell(&[NotifyState::Stopping]);
        health.not_serving().await;
        core.shut_down(config.shutdown_grace).await;
    };
    ready(&bound);
    let watched = doctor.watch(metrics);
    tokio::select! {
        served = server.serve(services, stopping) => served?,
        never = watched => match never {},
    }
    info!("agent stopped");
    Ok(())
}

fn services(agent: &Arc<Agent>, metrics: &Metrics, doctor: &Doctor) -> Services {
    let migrations = MigrationServiceServer::new(Migrations { agent: Arc::clone(agent) })
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES);
    let peers = PeerServiceServer::new(Peers { agent: Arc::clone(agent) })
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES);
    Services::new().with(Node::service(agent, metrics, doctor)).with(migrations).with(peers)
}

async fn open_journal(directory: PathBuf) -> Result<(Journal, Vec<Recovered>), AgentError> {
    tokio::task::spawn_blocking(move || Journal::open(&directory))
        .await
        .map_err(|source| AgentError::Panicked { source })?
        .map_err(AgentError::Journal)
}

/// Why the agent cannot run, or stopped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// It cannot be served.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The data plane cannot be used.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// SIGTERM and SIGINT cannot be handled.
    #[error("cannot handle SIGTERM and SIGINT; start the agent again")]
    Signals {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A defect of the agent.
    #[error("a task of the agent panicked; report it with the log")]
    Panicked {
        /// Which.
        #[source]
        source: tokio::task::JoinError,
    },
}
