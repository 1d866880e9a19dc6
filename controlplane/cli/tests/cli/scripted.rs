//! An agent that does what a test tells it, and remembers what it was asked.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ramferry_proto::v1;
use ramferry_proto::v1::migration_service_server::{MigrationService, MigrationServiceServer};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

/// No call of a test takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A request that the agent was sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Call {
    Check(v1::CheckMigrationRequest),
    Create(v1::CreateMigrationRequest),
    Get(String),
    List(v1::ListMigrationsRequest),
    Watch(v1::WatchMigrationRequest),
    Update(v1::UpdateMigrationParametersRequest),
    Cancel(String),
    Switchover(String),
    Delete(String),
}

/// What a stream of updates does.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Update(Box<v1::Migration>),
    Fail(Status),
    UntilCancelled,
    Stall,
}

/// What the agent answers.
#[derive(Debug, Default)]
pub(crate) struct Script {
    /// One a WatchMigration call; the stream ends after its last step.
    pub(crate) watches: Vec<Vec<Step>>,
    /// Of CreateMigration and CheckMigration; none answers them.
    pub(crate) refusal: Option<Status>,
    /// Of CancelMigration; none cancels.
    pub(crate) cancel_refusal: Option<Status>,
    /// Of GetMigration, CancelMigration and the like.
    pub(crate) migration: v1::Migration,
    /// One a ListMigrations call.
    pub(crate) pages: Vec<v1::ListMigrationsResponse>,
    pub(crate) check: v1::CheckMigrationResponse,
}

/// A running agent, or one that can be run again on the same port.
pub(crate) struct Agent {
    listener: TcpListener,
    runtime: Option<Runtime>,
    service: Service,
    tls: Option<ServerTlsConfig>,
}

#[derive(Clone)]
struct Service {
    shared: Arc<Shared>,
}

struct Shared {
    script: Mutex<Script>,
    watches: Mutex<VecDeque<Vec<Step>>>,
    pages: Mutex<VecDeque<v1::ListMigrationsResponse>>,
    calls: Mutex<Vec<Call>>,
    called: Condvar,
    cancelled: watch::Sender<bool>,
}

impl Agent {
    pub(crate) fn start(script: Script) -> Self {
        Self::start_with(script, None)
    }

    pub(crate) fn start_with(mut script: Script, tls: Option<ServerTlsConfig>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a socket");
        let shared = Shared {
            watches: Mutex::new(std::mem::take(&mut script.watches).into()),
            pages: Mutex::new(std::mem::take(&mut script.pages).into()),
            script: Mutex::new(script),
            calls: Mutex::default(),
            called: Condvar::new(),
            cancelled: watch::channel(false).0,
        };
        let mut agent = Self { listener, runtime: None, service: Service { shared: Arc::new(shared) }, tls };
        agent.resume();
        agent
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("bound")
    }

    /// Dies, and breaks all its connections; the port stays taken.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(PATIENCE);
        }
    }

    /// Serves again.
    pub(crate) fn resume(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("threads");
        let listener = self.listener.try_clone().expect("a descriptor");
        let service = MigrationServiceServer::new(self.service.clone());
        let mut server = Server::builder();
        if let Some(tls) = &self.tls {
            server = server.tls_config(tls.clone()).expect("usable TLS");
        }
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            let incoming = TcpListenerStream::new(listener);
            server.add_service(service).serve_with_incoming(incoming).await
        });
        self.runtime = Some(runtime);
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        lock(&self.service.shared.calls).clone()
    }

    /// Returns once `count` calls have come that `wanted` chooses.
    pub(crate) fn wait_for(&self, count: usize, wanted: fn(&Call) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let shared = &self.service.shared;
        let mut calls = lock(&shared.calls);
        while calls.iter().filter(|call| wanted(call)).count() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no such call among {calls:?}");
            calls = shared.called.wait_timeout(calls, left).expect("no test panics with the lock").0;
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no test panics with the lock")
}

impl Service {
    fn record(&self, call: Call) {
        lock(&self.shared.calls).push(call);
        self.shared.called.notify_all();
    }

    fn migration(&self) -> v1::Migration {
        lock(&self.shared.script).migration.clone()
    }
}

#[tonic::async_trait]
impl MigrationService for Service {
    async fn check_migration(
        &self,
        request: Request<v1::CheckMigrationRequest>,
    ) -> Result<Response<v1::CheckMigrationResponse>, Status> {
        self.record(Call::Check(request.into_inner()));
        let script = lock(&self.shared.script);
        script.refusal.clone().map_or_else(|| Ok(Response::new(script.check.clone())), Err)
    }

    async fn create_migration(
        &self,
        request: Request<v1::CreateMigrationRequest>,
    ) -> Result<Response<v1::CreateMigrationResponse>, Status> {
        let request = request.into_inner();
        self.record(Call::Create(request.clone()));
        if let Some(refusal) = lock(&self.shared.script).refusal.clone() {
            return Err(refusal);
        }
        let migration = v1::Migration {
            id: request.id,
            spec: request.spec,
            state: v1::MigrationState::Pending.into(),
            ..Default::default()
        };
        Ok(Response::new(v1::CreateMigrationResponse { migration: Some(migration) }))
    }

    async fn get_migration(
        &self,
        request: Request<v1::GetMigrationRequest>,
    ) -> Result<Response<v1::GetMigrationResponse>, Status> {
        self.record(Call::Get(request.into_inner().id));
        Ok(Response::new(v1::GetMigrationResponse { migration: Some(self.migration()) }))
    }

    async fn list_migrations(
        &self,
        request: Request<v1::ListMigrationsRequest>,
    ) -> Result<Response<v1::ListMigrationsResponse>, Status> {
        self.record(Call::List(request.into_inner()));
        Ok(Response::new(lock(&self.shared.pages).pop_front().unwrap_or_default()))
    }

    type WatchMigrationStream =
        Pin<Box<dyn tokio_stream::Stream<Item = Result<v1::WatchMigrationResponse, Status>> + Send>>;

    async fn watch_migration(
        &self,
        request: Request<v1::WatchMigrationRequest>,
    ) -> Result<Response<Self::WatchMigrationStream>, Status> {
        let steps = lock(&self.shared.watches).pop_front();
        let (sender, receiver) = mpsc::channel(1);
        let mut cancelled = self.shared.cancelled.subscribe();
        tokio::spawn(async move {
            for step in steps.unwrap_or_default() {
                let item = match step {
                    Step::Update(migration) => Ok(v1::WatchMigrationResponse { migration: Some(*migration) }),
                    Step::Fail(status) => Err(status),
                    Step::UntilCancelled => match cancelled.wait_for(|cancelled| *cancelled).await {
                        Ok(_) => continue,
                        Err(_) => return,
                    },
                    Step::Stall => std::future::pending().await,
                };
                if sender.send(item).await.is_err() {
                    return;
                }
            }
        });
        self.record(Call::Watch(request.into_inner()));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn update_migration_parameters(
        &self,
        request: Request<v1::UpdateMigrationParametersRequest>,
    ) -> Result<Response<v1::UpdateMigrationParametersResponse>, Status> {
        self.record(Call::Update(request.into_inner()));
        Ok(Response::new(v1::UpdateMigrationParametersResponse { migration: Some(self.migration()) }))
    }

    async fn cancel_migration(
        &self,
        request: Request<v1::CancelMigrationRequest>,
    ) -> Result<Response<v1::CancelMigrationResponse>, Status> {
        self.record(Call::Cancel(request.into_inner().id));
        if let Some(refusal) = lock(&self.shared.script).cancel_refusal.clone() {
            return Err(refusal);
        }
        self.shared.cancelled.send_replace(true);
        Ok(Response::new(v1::CancelMigrationResponse { migration: Some(self.migration()) }))
    }

    async fn force_switchover(
        &self,
        request: Request<v1::ForceSwitchoverRequest>,
    ) -> Result<Response<v1::ForceSwitchoverResponse>, Status> {
        self.record(Call::Switchover(request.into_inner().id));
        Ok(Response::new(v1::ForceSwitchoverResponse { migration: Some(self.migration()) }))
    }

    async fn delete_migration(
        &self,
        request: Request<v1::DeleteMigrationRequest>,
    ) -> Result<Response<v1::DeleteMigrationResponse>, Status> {
        self.record(Call::Delete(request.into_inner().id));
        Ok(Response::new(v1::DeleteMigrationResponse {}))
    }
}
