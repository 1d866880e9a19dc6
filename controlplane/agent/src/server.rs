//! Serves gRPC and metrics, and tells the service manager.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use ramferry_proto::v1;
use sd_notify::NotifyState;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_rustls::rustls::ServerConfig;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::transport::Server as Grpc;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tower::Service;
use tracing::{debug, info, warn};

use crate::auth::{self, Authorize, TlsError};
use crate::config::Config;
use crate::metrics::{Endpoint, EndpointError, MeasureCalls, Metrics};

pub(crate) use incoming::Origin;

mod incoming;

/// Largest gRPC message in either direction, for every service.
pub const MESSAGE_LIMIT_BYTES: usize = 16 * 1024 * 1024;
/// After this long a silence a connection is probed, and after as long again it is closed.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Most calls of one connection at once.
const CALLS_LIMIT: u32 = 256;
/// How often recorded observations are moved into buckets.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// What reflection serves, and which methods metrics know.
const DESCRIPTOR_SETS: &[&[u8]] = &[
    v1::DESCRIPTORS,
    tonic_health::pb::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
];

/// Where the agent is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The gRPC services.
    pub grpc: SocketAddr,
    /// The Prometheus endpoint.
    pub metrics: Option<SocketAddr>,
}

/// Tells callers whether the services take calls.
#[derive(Clone, Debug)]
pub struct Health {
    reporter: HealthReporter,
    names: Vec<&'static str>,
}

impl Health {
    /// Every service takes calls.
    pub async fn serving(&self) {
        self.set(ServingStatus::Serving).await;
    }

    /// No service takes calls much longer.
    pub async fn not_serving(&self) {
        self.set(ServingStatus::NotServing).await;
    }

    async fn set(&self, status: ServingStatus) {
        for name in std::iter::once(&"").chain(&self.names) {
            self.reporter.set_service_status(name, status).await;
        }
    }
}

/// The services of a server: health and reflection, and those that are added.
#[derive(Debug)]
pub struct Services {
    routes: Routes,
    health: Health,
}

impl Services {
    /// Health and reflection (v1 and v1alpha).
    pub fn new() -> Self {
        let (reporter, service) = tonic_health::server::health_reporter();
        let reflection = || {
            DESCRIPTOR_SETS.iter().fold(tonic_reflection::server::Builder::configure(), |builder, set| {
                builder.register_encoded_file_descriptor_set(set)
            })
        };
        let routes = Routes::new(service)
            .add_service(reflection().build_v1().expect("the descriptors are compiled in"))
            .add_service(reflection().build_v1alpha().expect("the descriptors are compiled in"));
        Self { routes, health: Health { reporter, names: Vec::new() } }
    }

    /// Adds a service, which health will report.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.health.names.push(S::NAME);
        self.routes = self.routes.add_service(service);
        self
    }

    /// Tells callers whether the services take calls.
    pub fn health(&self) -> Health {
        self.health.clone()
    }
}

impl Default for Services {
    fn default() -> Self {
        Self::new()
    }
}

/// A server that is bound and not yet serving.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    endpoint: Option<Endpoint>,
    bound: Bound,
    grpc: Grpc,
    authorize: Authorize,
    metrics_tls: Option<Arc<ServerConfig>>,
    metrics: Metrics,
    grace: Duration,
    connections_limit: usize,
}

impl Server {
    /// Reads the TLS files and binds both addresses.
    pub async fn bind(config: &Config, metrics: Metrics) -> Result<Self, ServerError> {
        let mut grpc = Grpc::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .max_concurrent_streams(CALLS_LIMIT);
        let mut authorize = Authorize::LOOPBACK;
        let mut metrics_tls = None;
        if let Some(tls) = &config.tls {
            authorize = Authorize::MUTUAL_TLS;
            for (certificate, expiry_seconds) in auth::expiries(tls)? {
                metrics.certificate(certificate, expiry_seconds);
            }
            grpc = grpc
                .tls_config(auth::server_tls(tls)?)
                .map_err(|source| ServerError::TlsRefused { source })?;
            if config.metrics_listen.is_some_and(|address| !address.ip().is_loopback()) {
                metrics_tls = Some(auth::metrics_tls(tls)?);
            }
        }
        let cannot = |source| ServerError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        let endpoint = match config.metrics_listen {
            Some(address) => Some(Endpoint::bind(address).await?),
            None => None,
        };
        let bound = Bound { grpc: address, metrics: endpoint.as_ref().map(Endpoint::address) };
        let grace = config.shutdown_grace;
        let connections_limit = incoming::CONNECTIONS_LIMIT;
        Ok(Self {
            listener,
            endpoint,
            bound,
            grpc,
            authorize,
            metrics_tls,
            metrics,
            grace,
            connections_limit,
        })
    }

    /// Where it is bound.
    pub fn bound(&self) -> Bound {
        self.bound
    }

    /// Serves until `shutdown` resolves; then takes no more connections, and ends
    /// the calls that still run after the grace period.
    pub async fn serve(
        self,
        services: Services,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), ServerError> {
        services.health.serving().await;
        let (stop, stopped) = oneshot::channel::<()>();
        let mut grpc =
            self.grpc.layer(MeasureCalls::new(self.metrics.clone(), DESCRIPTOR_SETS)).layer(self.authorize);
        let serving = grpc.add_routes(services.routes).serve_with_incoming_shutdown(
            incoming::connections(self.listener, self.connections_limit),
            async {
                // Fails when the sender is gone, and then there is nothing to wait for either.
                let _ = stopped.await;
            },
        );
        tokio::pin!(serving);
        let _beside = AbortOnDrop(vec![
            tokio::spawn(upkeep(self.metrics.clone())),
            tokio::spawn(watchdog()),
            tokio::spawn(serve_metrics(self.endpoint, self.metrics, self.metrics_tls)),
        ]);
        tell(&[NotifyState::Ready]);
        tokio::select! {
            result = &mut serving => return result.map_err(|source| ServerError::Serve { source }),
            () = shutdown => {}
        }
        // Fails when `serving` has ended, which is what it asks for.
        let _ = stop.send(());
        match tokio::time::timeout(self.grace, serving).await {
            Ok(result) => result.map_err(|source| ServerError::Serve { source }),
            Err(_) => {
                warn!("calls still run after the grace period; they end with the agent");
                Ok(())
            }
        }
    }
}

/// Resolves at the first SIGTERM or SIGINT from now on.
pub fn shutdown_signal() -> std::io::Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => info!("SIGTERM: shutting down"),
            _ = interrupt.recv() => info!("SIGINT: shutting down"),
        }
    })
}

/// Tells the service manager, when there is one.
pub(crate) fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!(%error, "the service manager cannot be told");
    }
}

/// Shows the service manager, when it watches, that the runtime still runs tasks.
async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()) else { return };
    let mut ticks = tokio::time::interval(limit / 3);
    loop {
        ticks.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

async fn upkeep(metrics: Metrics) {
    let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        ticks.tick().await;
        metrics.upkeep();
        let host = metrics.clone();
        // Fails only when it panics or the runtime ends: the next tick tries again.
        let _ = tokio::task::spawn_blocking(move || host.refresh_host()).await;
    }
}

async fn serve_metrics(endpoint: Option<Endpoint>, metrics: Metrics, tls: Option<Arc<ServerConfig>>) {
    if let Some(endpoint) = endpoint {
        match endpoint.serve(metrics, tls).await {}
    }
}

struct AbortOnDrop(Vec<JoinHandle<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

/// Why the agent cannot be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The address cannot be had.
    #[error("cannot listen on {address}; choose another address with listen, or stop what uses it")]
    Listen {
        /// What was asked for.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The metrics endpoint cannot be had.
    #[error(transparent)]
    Metrics(#[from] EndpointError),
    /// The TLS files cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The TLS files can be read, but not used together.
    #[error("TLS cannot be set up; check that tls_cert is the certificate of tls_key")]
    TlsRefused {
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// It stopped serving.
    #[error("the gRPC server ended early; start the agent again")]
    Serve {
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
}

#[cfg(test)]
mod tests;
