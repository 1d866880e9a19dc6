//! A connection to one agent: every call is bounded in time, and every error
//! is a [`Failure`] that names the agent.

use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use ramferry_proto::v1;
use ramferry_proto::v1::migration_service_client::MigrationServiceClient;
use ramferry_proto::v1::node_service_client::NodeServiceClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Response, Status, Streaming};

use crate::args::connection::ConnectionArgs;
use crate::args::migration::proto_duration;
use crate::args::names::{AgentAddress, MigrationId};
use crate::failure::Failure;

/// Longest wait for an answer. Checks and creation ask two hosts, and scan the guest's memory map.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How often an idle connection is tried, and how long the other side may take.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest answer; agents send no larger.
const MESSAGE_BYTES: usize = 16 << 20;
/// Most migrations that one page of a list holds, and most pages that are asked for.
const PAGE_SIZE: i32 = 1000;
const PAGES: usize = 1000;

/// Every check of the agent's host, and of `peer` where it is not empty.
pub(crate) async fn run_diagnostics(
    args: &ConnectionArgs,
    peer: String,
) -> Result<Vec<v1::DiagnosticResult>, Failure> {
    let client = Client::connect(args).await?;
    let mut service = NodeServiceClient::new(client.channel.clone()).max_decoding_message_size(MESSAGE_BYTES);
    let call = service.run_diagnostics(bounded(v1::RunDiagnosticsRequest { peer }));
    Ok(client.call(call).await?.results)
}

/// A connection to one agent. Clones share it; it is made anew when it breaks.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    channel: Channel,
    service: MigrationServiceClient<Channel>,
    agent: AgentAddress,
    has_tls: bool,
}

impl Client {
    /// Connects.
    pub(crate) async fn connect(args: &ConnectionArgs) -> Result<Self, Failure> {
        let (endpoint, has_tls) = endpoint(args)?;
        let agent = args.agent.clone();
        let channel = endpoint.connect().await.map_err(|error| Failure::Unreachable {
            agent: Box::new(agent.clone()),
            has_tls,
            source: Box::new(error),
        })?;
        let service = MigrationServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES);
        Ok(Self { channel, service, agent, has_tls })
    }

    /// Every check of a migration; nothing is changed.
    pub(crate) async fn check(&self, spec: v1::MigrationSpec) -> Result<v1::CheckMigrationResponse, Failure> {
        let request = v1::CheckMigrationRequest { spec: Some(spec) };
        self.call(self.service.clone().check_migration(bounded(request))).await
    }

    /// Creates a migration.
    pub(crate) async fn create(&self, request: v1::CreateMigrationRequest) -> Result<v1::Migration, Failure> {
        let answer = self.call(self.service.clone().create_migration(bounded(request))).await?;
        answer.migration.ok_or(Failure::Incomplete("migration"))
    }

    /// One migration.
    pub(crate) async fn get(&self, id: &MigrationId) -> Result<v1::Migration, Failure> {
        let request = v1::GetMigrationRequest { id: id.to_string() };
        let answer = self.call(self.service.clone().get_migration(bounded(request))).await?;
        answer.migration.ok_or(Failure::Incomplete("migration"))
    }

    /// All migrations in `states`, or in any.
    pub(crate) async fn list(&self, states: &[v1::MigrationState]) -> Result<Vec<v1::Migration>, Failure> {
        let mut migrations = Vec::new();
        let mut page_token = String::new();
        for _ in 0..PAGES {
            let states = states.iter().map(|state| i32::from(*state)).collect();
            let request = v1::ListMigrationsRequest { states, page_size: PAGE_SIZE, page_token };
            let answer = self.call(self.service.clone().list_migrations(bounded(request))).await?;
            migrations.extend(answer.migrations);
            page_token = answer.next_page_token;
            if page_token.is_empty() {
                return Ok(migrations);
            }
        }
        Err(Failure::Incomplete("last page"))
    }

    /// Updates of one migration, to its end.
    pub(crate) async fn watch(
        &self,
        id: &MigrationId,
        interval: Duration,
    ) -> Result<Streaming<v1::WatchMigrationResponse>, Failure> {
        let request =
            v1::WatchMigrationRequest { id: id.to_string(), interval: proto_duration(Some(interval)) };
        // Not `bounded`: its deadline would end the stream.
        self.call(self.service.clone().watch_migration(request)).await
    }

    /// Ends a migration before its commit.
    pub(crate) async fn cancel(&self, id: &MigrationId) -> Result<v1::Migration, Failure> {
        let request = v1::CancelMigrationRequest { id: id.to_string() };
        let answer = self.call(self.service.clone().cancel_migration(bounded(request))).await?;
        answer.migration.ok_or(Failure::Incomplete("migration"))
    }

    /// Changes those parameters that `mask` names.
    pub(crate) async fn update(
        &self,
        id: &MigrationId,
        parameters: v1::MigrationParameters,
        mask: prost_types::FieldMask,
    ) -> Result<v1::Migration, Failure> {
        let request = v1::UpdateMigrationParametersRequest {
            id: id.to_string(),
            parameters: Some(parameters),
            update_mask: Some(mask),
        };
        let answer = self.call(self.service.clone().update_migration_parameters(bounded(request))).await?;
        answer.migration.ok_or(Failure::Incomplete("migration"))
    }

    /// Switches over after the round that is under way.
    pub(crate) async fn force_switchover(&self, id: &MigrationId) -> Result<v1::Migration, Failure> {
        let request = v1::ForceSwitchoverRequest { id: id.to_string() };
        let answer = self.call(self.service.clone().force_switchover(bounded(request))).await?;
        answer.migration.ok_or(Failure::Incomplete("migration"))
    }

    /// Makes the agent forget a migration that has ended.
    pub(crate) async fn delete(&self, id: &MigrationId) -> Result<(), Failure> {
        let request = v1::DeleteMigrationRequest { id: id.to_string() };
        self.call(self.service.clone().delete_migration(bounded(request))).await.map(drop)
    }

    /// What went wrong with a call or a stream of this connection.
    pub(crate) fn failure(&self, status: Status) -> Failure {
        Failure::from_status(&self.agent, self.has_tls, status)
    }

    /// The stream of a migration that has not ended is over, or says nothing any more.
    pub(crate) fn stream_ended(&self) -> Failure {
        Failure::StreamEnded { agent: Box::new(self.agent.clone()) }
    }

    /// No answer within `waited`.
    pub(crate) fn silent(&self, waited: Duration) -> Failure {
        Failure::Silent { agent: Box::new(self.agent.clone()), waited }
    }

    async fn call<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Failure> {
        match tokio::time::timeout(CALL_TIMEOUT, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failure(status)),
            Err(_) => Err(self.silent(CALL_TIMEOUT)),
        }
    }
}

/// Tells the agent too when the answer is no longer waited for.
fn bounded<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

fn endpoint(args: &ConnectionArgs) -> Result<(Endpoint, bool), Failure> {
    let tls = tls(args)?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", args.agent))
        .map_err(Failure::Tls)?
        .connect_timeout(args.connect_timeout)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let has_tls = tls.is_some();
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls).map_err(Failure::Tls)?;
    }
    Ok((endpoint, has_tls))
}

fn tls(args: &ConnectionArgs) -> Result<Option<ClientTlsConfig>, Failure> {
    let Some(ca) = &args.tls.tls_ca else { return Ok(None) };
    let name = args.tls.tls_server_name.as_deref().unwrap_or(args.agent.host());
    let mut tls = ClientTlsConfig::new()
        .domain_name(name)
        .ca_certificate(Certificate::from_pem(read("--tls-ca", ca)?))
        .timeout(args.connect_timeout);
    if let (Some(cert), Some(key)) = (&args.tls.tls_cert, &args.tls.tls_key) {
        tls = tls.identity(Identity::from_pem(read("--tls-cert", cert)?, read("--tls-key", key)?));
    }
    Ok(Some(tls))
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, Failure> {
    let failure = |source| Failure::File { option, path: path.to_owned(), source };
    let bytes = std::fs::read(path).map_err(failure)?;
    if !bytes.windows(10).any(|window| window == b"-----BEGIN") {
        return Err(failure(io::Error::new(io::ErrorKind::InvalidData, "not a PEM file")));
    }
    Ok(bytes)
}
