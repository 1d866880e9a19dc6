//! The HTTP endpoint that Prometheus scrapes.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tracing::debug;

use super::Metrics;

/// Most scrapers at once; more wait to be accepted.
const CONNECTIONS_LIMIT: usize = 32;
/// Longest TLS handshake, and longest wait for a request's head.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest life of a connection.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(3600);
/// Pause after a failed accept, which is most often the lack of descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(200);
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A bound endpoint.
#[derive(Debug)]
pub struct Endpoint {
    listener: TcpListener,
    address: SocketAddr,
}

/// The endpoint cannot be had.
#[derive(Debug, Error)]
#[error("cannot serve metrics on {address}; choose another metrics_listen, or \"off\"")]
pub struct EndpointError {
    /// What was asked for.
    pub address: SocketAddr,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

impl Endpoint {
    /// Binds; port 0 lets the kernel choose.
    pub async fn bind(address: SocketAddr) -> Result<Self, EndpointError> {
        let bind = async {
            let listener = TcpListener::bind(address).await?;
            Ok((listener.local_addr()?, listener))
        };
        let (address, listener) = bind.await.map_err(|source| EndpointError { address, source })?;
        Ok(Self { listener, address })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until dropped.
    pub async fn serve(self, metrics: Metrics, tls: Option<Arc<ServerConfig>>) -> Infallible {
        let acceptor = tls.map(TlsAcceptor::from);
        let permits = Arc::new(Semaphore::new(CONNECTIONS_LIMIT));
        let mut connections = tokio::task::JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let permit = Arc::clone(&permits).acquire_owned().await.expect("this semaphore is never closed");
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let (metrics, acceptor) = (metrics.clone(), acceptor.clone());
                    connections.spawn(async move {
                        let _permit = permit;
                        let connection = connection(stream, acceptor, metrics);
                        if timeout(CONNECTION_LIFETIME, connection).await.is_err() {
                            debug!("metrics: closed a connection that was kept open for long");
                        }
                    });
                }
                Err(error) => {
                    debug!(%error, "metrics: cannot accept");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }
}

async fn connection(stream: TcpStream, acceptor: Option<TlsAcceptor>, metrics: Metrics) {
    match acceptor {
        None => answer(stream, metrics).await,
        Some(acceptor) => match timeout(PATIENCE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => answer(stream, metrics).await,
            Ok(Err(error)) => debug!(%error, "metrics: TLS handshake failed"),
            Err(_) => debug!("metrics: TLS handshake took too long"),
        },
    }
}

async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin, metrics: Metrics) {
    let service = service_fn(|request: Request<Incoming>| {
        let response = respond(request.method(), request.uri().path(), &metrics);
        async move { Ok::<_, Infallible>(response) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        debug!(%error, "metrics: connection ended early");
    }
}

fn respond(method: &Method, path: &str, metrics: &Metrics) -> Response<Full<Bytes>> {
    let (code, content_type, text) = match (method, path) {
        (&Method::GET | &Method::HEAD, "/metrics") => (StatusCode::OK, CONTENT_TYPE, metrics.render()),
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "GET only\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "metrics are at /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}
