//! `MigrationService`: the orchestrator's calls.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use ramferry_engine::SourceEvent;
use ramferry_proto::v1;
use ramferry_proto::v1::migration_service_server::MigrationService;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use crate::core::Agent;
use crate::journal::is_migration_id;
use crate::migrations::{Entry, is_final};
use crate::status::{causes, invalid_argument, precondition, status};
use crate::{MigrationRole, request, source};

const PAGE_SIZE: usize = 100;
const MAX_PAGE_SIZE: usize = 1000;
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
const WATCH_INTERVALS: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(60);

/// Serves `ramferry.v1.MigrationService`.
pub(crate) struct Migrations {
    pub(crate) agent: Arc<Agent>,
}

impl Migrations {
    /// The entry of `id`: where this agent has both sides of it, the source's.
    fn entry(&self, id: &str) -> Result<Arc<Entry>, Status> {
        if id.is_empty() {
            return Err(invalid_argument("id", "FIELD_MISSING", "id is missing: name a migration"));
        }
        let registry = &self.agent.registry;
        let found = registry.get(MigrationRole::Source, id);
        found.or_else(|| registry.get(MigrationRole::Destination, id)).ok_or_else(|| {
            let message = format!(
                "this agent knows no migration {id:?}; list what it knows, or ask the source's agent"
            );
            status(Code::NotFound, "MIGRATION_NOT_FOUND", message, [("id", id.to_owned())])
        })
    }

    /// The entry of a migration whose source is here and which has not ended.
    fn running(&self, id: &str) -> Result<Arc<Entry>, Status> {
        let entry = self.entry(id)?;
        if entry.role == MigrationRole::Destination {
            let message = "this agent is the destination's: ask the source's agent, which decides".to_owned();
            return Err(precondition("NOT_THE_SOURCE", message, [], []));
        }
        if entry.has_ended() {
            let view = entry.view();
            let message = format!("migration {id:?} has ended: {}", view.state().as_str_name());
            return Err(precondition("MIGRATION_ENDED", message, [], []));
        }
        Ok(entry)
    }
}

type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchMigrationResponse, Status>> + Send>>;

#[tonic::async_trait]
impl MigrationService for Migrations {
    async fn check_migration(
        &self,
        request: Request<v1::CheckMigrationRequest>,
    ) -> Result<Response<v1::CheckMigrationResponse>, Status> {
        let request = request::Request::try_from(request.into_inner().spec)?;
        source::check(&self.agent, &request).await.map(Response::new)
    }

    async fn create_migration(
        &self,
        request: Request<v1::CreateMigrationRequest>,
    ) -> Result<Response<v1::CreateMigrationResponse>, Status> {
        let call = request.into_inner();
        let id = if call.id.is_empty() { random_id()? } else { call.id };
        if !is_migration_id(&id) {
            let message = format!("id is {id:?}: give 1 to 64 of [A-Za-z0-9._-], or none");
            return Err(invalid_argument("id", "MIGRATION_ID_INVALID", message));
        }
        let request = request::Request::try_from(call.spec)?;
        if let Some(entry) = self.agent.registry.get(MigrationRole::Source, &id) {
            let view = entry.view();
            let same = !call.request_id.is_empty()
                && entry.request_id == call.request_id
                && entry.asked.as_ref() == Some(&request.spec);
            if same {
                return Ok(Response::new(v1::CreateMigrationResponse { migration: Some(view) }));
            }
        }
        if call.validate_only {
            let checked = source::check(&self.agent, &request).await?;
            let migration = v1::Migration {
                id,
                spec: Some(request.spec),
                fabric: checked.fabric,
                fabric_reason: checked.fabric_reason,
                tracker: checked.tracker,
                recheck_reason: checked.recheck_reason,
                ..Default::default()
            };
            return Ok(Response::new(v1::CreateMigrationResponse { migration: Some(migration) }));
        }
        // A caller that goes away must not leave half a migration behind.
        let agent = Arc::clone(&self.agent);
        let creating =
            tokio::spawn(async move { source::create(&agent, &id, &call.request_id, request).await });
        let entry = creating.await.map_err(|error| crate::status::internal("INTERNAL", &error))??;
        Ok(Response::new(v1::CreateMigrationResponse { migration: Some(entry.view()) }))
    }

    async fn get_migration(
        &self,
        request: Request<v1::GetMigrationRequest>,
    ) -> Result<Response<v1::GetMigrationResponse>, Status> {
        let entry = self.entry(&request.into_inner().id)?;
        Ok(Response::new(v1::GetMigrationResponse { migration: Some(entry.view()) }))
    }

    async fn list_migrations(
        &self,
        request: Request<v1::ListMigrationsRequest>,
    ) -> Result<Response<v1::ListMigrationsResponse>, Status> {
        let call = request.into_inner();
        let page_size = match usize::try_from(call.page_size) {
            Ok(0) => PAGE_SIZE,
            Ok(size) => size.min(MAX_PAGE_SIZE),
            Err(_) => return Err(invalid_argument("page_size", "OUT_OF_RANGE", "page_size is negative")),
        };
        let migrations =
            self.agent.registry.all().into_iter().map(|entry| (page_token(&entry), entry.view()));
        let mut migrations = migrations
            .filter(|(token, _)| token.as_str() > call.page_token.as_str())
            .filter(|(_, view)| call.states.is_empty() || call.states.contains(&view.state))
            .peekable();
        let mut page = Vec::new();
        let mut last = String::new();
        while page.len() < page_size {
            let Some((token, view)) = migrations.next() else { break };
            page.push(view);
            last = token;
        }
        let next_page_token = if migrations.peek().is_some() { last } else { String::new() };
        Ok(Response::new(v1::ListMigrationsResponse { migrations: page, next_page_token }))
    }

    type WatchMigrationStream = WatchStream;

    async fn watch_migration(
        &self,
        request: Request<v1::WatchMigrationRequest>,
    ) -> Result<Response<WatchStream>, Status> {
        let call = request.into_inner();
        let entry = self.entry(&call.id)?;
        let interval = match call.interval.map(Duration::try_from) {
            None => WATCH_INTERVAL,
            Some(Ok(interval)) if WATCH_INTERVALS.contains(&interval) => interval,
            Some(_) => {
                let message = format!(
                    "interval must be from {:?} to {:?}",
                    WATCH_INTERVALS.start(),
                    WATCH_INTERVALS.end()
                );
                return Err(invalid_argument("interval", "OUT_OF_RANGE", message));
            }
        };
        let (sender, stream) = mpsc::channel(4);
        tokio::spawn(watch(entry.subscribe(), interval, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn update_migration_parameters(
        &self,
        request: Request<v1::UpdateMigrationParametersRequest>,
    ) -> Result<Response<v1::UpdateMigrationParametersResponse>, Status> {
        let call = request.into_inner();
        let entry = self.running(&call.id)?;
        let change = call.parameters.unwrap_or_default();
        let paths = call.update_mask.unwrap_or_default().paths;
        {
            let mut driver = entry.driver();
            let view = entry.view();
            let current = view.spec.as_ref().and_then(|spec| spec.parameters).unwrap_or_default();
            let merged = request::apply(&current, &change, &paths)?;
            let parameters = request::engine_parameters(&merged)?;
            if let Some((handle, set)) = &mut *driver {
                handle.send(SourceEvent::SetParameters(parameters.clone()));
                *set = parameters;
            }
            entry.update(|view| {
                view.spec.get_or_insert_default().parameters = Some(merged);
            });
        }
        Ok(Response::new(v1::UpdateMigrationParametersResponse { migration: Some(entry.view()) }))
    }

    async fn cancel_migration(
        &self,
        request: Request<v1::CancelMigrationRequest>,
    ) -> Result<Response<v1::CancelMigrationResponse>, Status> {
        let id = request.into_inner().id;
        let entry = self.entry(&id)?;
        let view = entry.view();
        if view.state() == v1::MigrationState::Cancelled {
            return Ok(Response::new(v1::CancelMigrationResponse { migration: Some(view) }));
        }
        let entry = self.running(&id)?;
        not_in_postcopy(&entry, "cannot be cancelled")?;
        source::cancel(&entry);
        Ok(Response::new(v1::CancelMigrationResponse { migration: Some(entry.view()) }))
    }

    async fn force_switchover(
        &self,
        request: Request<v1::ForceSwitchoverRequest>,
    ) -> Result<Response<v1::ForceSwitchoverResponse>, Status> {
        let entry = self.running(&request.into_inner().id)?;
        not_in_postcopy(&entry, "has switched over already")?;
        if let Some((handle, _)) = &*entry.driver() {
            handle.send(SourceEvent::ForceSwitchover);
        }
        Ok(Response::new(v1::ForceSwitchoverResponse { migration: Some(entry.view()) }))
    }

    async fn delete_migration(
        &self,
        request: Request<v1::DeleteMigrationRequest>,
    ) -> Result<Response<v1::DeleteMigrationResponse>, Status> {
        let id = request.into_inner().id;
        let entry = self.entry(&id)?;
        if !entry.has_ended() {
            let message = format!("migration {id:?} has not ended; cancel it, or wait for its end");
            return Err(precondition("MIGRATION_RUNNING", message, [], []));
        }
        if entry.role == MigrationRole::Destination && !entry.is_settled() {
            let message = format!(
                "the source's agent does not know yet how migration {id:?} ended and will ask; delete it there first"
            );
            return Err(precondition("OUTCOME_NOT_SETTLED", message, [], []));
        }
        let removed = self.agent.journal.remove(entry.role, &id);
        removed.map_err(|error| status(Code::Unavailable, error.reason(), causes(&error), []))?;
        self.agent.registry.remove(entry.role, &id);
        Ok(Response::new(v1::DeleteMigrationResponse {}))
    }
}

/// Refuses what can no longer be done once the guest runs at the destination on memory of both hosts.
fn not_in_postcopy(entry: &Entry, what: &str) -> Result<(), Status> {
    if entry.view().state() != v1::MigrationState::Postcopy {
        return Ok(());
    }
    let message = format!(
        "migration {:?} {what}: it is in post-copy, and the guest runs at the destination on memory that is still here; \
         keep both agents running until it has ended",
        entry.id
    );
    Err(precondition("IN_POSTCOPY", message, [], []))
}

/// Sends the view now, at each change of state, and at intervals, to its end.
async fn watch(
    mut view: watch::Receiver<v1::Migration>,
    interval: Duration,
    sender: mpsc::Sender<Result<v1::WatchMigrationResponse, Status>>,
) {
    loop {
        let migration = view.borrow_and_update().clone();
        let state = migration.state();
        let response = v1::WatchMigrationResponse { migration: Some(migration) };
        if sender.send(Ok(response)).await.is_err() || is_final(state) {
            return;
        }
        let changed = view.wait_for(|view| view.state() != state);
        tokio::select! {
            _ = tokio::time::timeout(interval, changed) => {}
            () = sender.closed() => return,
        }
    }
}

fn page_token(entry: &Entry) -> String {
    format!("{}/{}", entry.id, entry.role)
}

fn random_id() -> Result<String, Status> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| crate::status::internal("NO_RANDOMNESS", &error))?;
    Ok(format!("m-{:016x}", u64::from_le_bytes(bytes)))
}
