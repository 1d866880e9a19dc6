//! TLS settings from the files that the configuration names.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, ServerConfig};
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::config::TlsConfig;

/// Longest handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// TLS of the gRPC services.
///
/// A client without a certificate is let through the handshake and refused by
/// [`super::Authorize`], whose answer says what is missing.
pub fn server_tls(config: &TlsConfig) -> Result<ServerTlsConfig, TlsError> {
    let files = Files::read(config)?;
    // Reads the files as the services will, for an error that names the file.
    files.parse(config)?;
    Ok(ServerTlsConfig::new()
        .identity(Identity::from_pem(files.cert, files.key))
        .client_ca_root(Certificate::from_pem(files.ca))
        .client_auth_optional(true)
        .timeout(HANDSHAKE_TIMEOUT))
}

/// TLS of a call to the agent on `host`: ours to a peer, or the client's.
pub fn client_tls(config: &TlsConfig, host: &str) -> Result<ClientTlsConfig, TlsError> {
    let files = Files::read(config)?;
    files.parse(config)?;
    let name = config.server_name.as_deref().unwrap_or(host);
    Ok(ClientTlsConfig::new()
        .identity(Identity::from_pem(files.cert, files.key))
        .ca_certificate(Certificate::from_pem(files.ca))
        .domain_name(name.trim_start_matches('[').trim_end_matches(']'))
        .timeout(HANDSHAKE_TIMEOUT))
}

/// TLS of a connection to a peer, below gRPC.
pub(crate) fn client_config(config: &TlsConfig) -> Result<Arc<ClientConfig>, TlsError> {
    let Parsed { chain, key, roots } = Files::read(config)?.parse(config)?;
    let mut client = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(|source| TlsError::Identity { path: config.cert.clone(), source })?;
    client.alpn_protocols.push(b"h2".to_vec());
    Ok(Arc::new(client))
}

/// TLS of the metrics endpoint: any certificate that the authorities signed will do.
pub(crate) fn metrics_tls(config: &TlsConfig) -> Result<Arc<ServerConfig>, TlsError> {
    let Parsed { chain, key, roots } = Files::read(config)?.parse(config)?;
    let verifier = WebPkiClientVerifier::builder(roots.into())
        .build()
        .map_err(|source| TlsError::Authorities { path: config.ca.clone(), source })?;
    let mut server = ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|source| TlsError::Identity { path: config.cert.clone(), source })?;
    server.alpn_protocols.push(b"http/1.1".to_vec());
    Ok(Arc::new(server))
}

/// When the agent's own certificates, and those of its authorities, are no longer valid: the
/// first of each, in seconds since 1970.
pub(crate) fn expiries(config: &TlsConfig) -> Result<[(&'static str, i64); 2], TlsError> {
    let files = Files::read(config)?;
    let own = first_expiry(&config.cert, &files.cert)?;
    Ok([("agent", own), ("authority", first_expiry(&config.ca, &files.ca)?)])
}

fn first_expiry(path: &Path, pem: &[u8]) -> Result<i64, TlsError> {
    let unreadable =
        || TlsError::Pem { path: path.to_owned(), what: "certificate", source: pem::Error::NoItemsFound };
    let expiry = |certificate: &CertificateDer<'_>| {
        let parsed = X509Certificate::from_der(certificate).map_err(|_| unreadable())?;
        Ok(parsed.1.validity().not_after.timestamp())
    };
    let found = certificates(path, pem)?;
    let expiries = found.iter().map(expiry).collect::<Result<Vec<_>, _>>()?;
    expiries.into_iter().min().ok_or_else(unreadable)
}

struct Files {
    cert: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
}

struct Parsed {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: RootCertStore,
}

impl Files {
    fn read(config: &TlsConfig) -> Result<Self, TlsError> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|source| TlsError::File { path: path.to_owned(), source })
        };
        Ok(Self { cert: read(&config.cert)?, key: read(&config.key)?, ca: read(&config.ca)? })
    }

    fn parse(&self, config: &TlsConfig) -> Result<Parsed, TlsError> {
        let chain = certificates(&config.cert, &self.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|source| TlsError::Pem {
            path: config.key.clone(),
            what: "private key",
            source,
        })?;
        let mut roots = RootCertStore::empty();
        for authority in certificates(&config.ca, &self.ca)? {
            roots.add(authority).map_err(|source| TlsError::Identity { path: config.ca.clone(), source })?;
        }
        Ok(Parsed { chain, key, roots })
    }
}

fn certificates(path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unusable = |source| TlsError::Pem { path: path.to_owned(), what: "certificate", source };
    let found = CertificateDer::pem_slice_iter(bytes).collect::<Result<Vec<_>, _>>().map_err(unusable)?;
    if found.is_empty() { Err(unusable(pem::Error::NoItemsFound)) } else { Ok(found) }
}

/// Why TLS cannot be set up.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read TLS file {}; check the path, and that the agent may read it", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("TLS file {} holds no usable {what}; give PEM", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// A certificate cannot be used, or is not that of the key.
    #[error("the certificate in {} cannot be used; check that it is that of tls_key", path.display())]
    Identity {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The authorities cannot be used.
    #[error("the authorities in {} cannot be used to check clients", path.display())]
    Authorities {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: VerifierBuilderError,
    },
}
