//! The layer that lets a request through or answers it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tonic::transport::server::TlsConnectInfo;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::warn;

use super::{Caller, ROLE_PREFIX, Role};
use crate::server::Origin;
use crate::status::status;

/// Authorizes every request of the services below it.
#[derive(Clone, Copy, Debug)]
pub struct Authorize {
    tls: bool,
}

impl Authorize {
    /// Every caller needs a certificate.
    pub const MUTUAL_TLS: Self = Self { tls: true };
    /// Every caller may do everything: only for loopback.
    pub const LOOPBACK: Self = Self { tls: false };
}

impl<S> Layer<S> for Authorize {
    type Service = Authorized<S>;

    fn layer(&self, inner: S) -> Authorized<S> {
        Authorized { inner, tls: self.tls }
    }
}

/// A service whose requests are authorized.
#[derive(Clone, Debug)]
pub struct Authorized<S> {
    inner: S,
    tls: bool,
}

impl<S, R> Service<Request<R>> for Authorized<S>
where
    S: Service<Request<R>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<R>) -> Self::Future {
        let extensions = request.extensions();
        let (caller, origin) = if self.tls {
            let connection = extensions.get::<TlsConnectInfo<Origin>>();
            (Caller::of_connection(connection), connection.map(TlsConnectInfo::get_ref))
        } else {
            (Some(Caller::loopback()), extensions.get::<Origin>())
        };
        match authorize(caller, request.uri().path()) {
            Ok(caller) => {
                if let Some(origin) = origin {
                    origin.let_in();
                }
                request.extensions_mut().insert(caller);
                Box::pin(self.inner.call(request))
            }
            Err(refusal) => Box::pin(async move { Ok(refusal.into_http()) }),
        }
    }
}

/// The role that a method needs; `None`: any certificate will do.
fn needed(path: &str) -> Option<Role> {
    let service = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    match service {
        "ramferry.v1.PeerService" => Some(Role::Peer),
        "grpc.health.v1.Health"
        | "grpc.reflection.v1.ServerReflection"
        | "grpc.reflection.v1alpha.ServerReflection" => None,
        // A service that is added and not named here is at least not open to all.
        _ => Some(Role::Orchestrator),
    }
}

fn authorize(caller: Option<Caller>, path: &str) -> Result<Caller, Status> {
    let Some(caller) = caller else {
        return Err(status(
            Code::Unauthenticated,
            "CERTIFICATE_MISSING",
            "this agent asks for a client certificate that its tls_ca signed; call with --tls-cert and --tls-key",
            [],
        ));
    };
    match needed(path) {
        Some(role) if !caller.has(role) => {
            warn!(%caller, path, role = role.as_str(), "refused a caller without the role");
            let name = format!("{ROLE_PREFIX}{}", role.as_str());
            Err(status(
                Code::PermissionDenied,
                "ROLE_MISSING",
                format!(
                    "the client certificate has no URI subject alternative name {name:?}; issue one that has"
                ),
                [("role", role.as_str().to_owned())],
            ))
        }
        _ => Ok(caller),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_service_needs_its_role() {
        assert_eq!(needed("/ramferry.v1.MigrationService/CreateMigration"), Some(Role::Orchestrator));
        assert_eq!(needed("/ramferry.v1.NodeService/GetNodeInfo"), Some(Role::Orchestrator));
        assert_eq!(needed("/ramferry.v1.PeerService/ExchangeControl"), Some(Role::Peer));
        assert_eq!(needed("/grpc.health.v1.Health/Check"), None);
        assert_eq!(needed("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"), None);
    }

    #[test]
    fn unknown_paths_are_not_open_to_all() {
        for path in ["/", "", "//", "/ramferry.v2.Anything/Do", "/grpc.health.v1.HealthX/Check"] {
            assert_eq!(needed(path), Some(Role::Orchestrator), "{path}");
        }
    }
}
