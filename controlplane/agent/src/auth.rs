//! Who may call what.
//!
//! With TLS, every caller shows a certificate that `tls_ca` signed, and its URI
//! subject alternative names say what it may do:
//!
//! | name | may call |
//! |---|---|
//! | `ramferry:role:orchestrator` | `MigrationService`, `NodeService` |
//! | `ramferry:role:peer` | `PeerService` |
//! | either or none | health, reflection |
//!
//! Without TLS only loopback is served, and its callers may do everything.

use std::fmt;

use tonic::transport::server::TlsConnectInfo;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

pub use hint::tls_hint;
pub use layer::{Authorize, Authorized};
pub use tls::{TlsError, client_tls, server_tls};
pub(crate) use tls::{client_config, expiries, metrics_tls};

mod hint;
mod layer;
mod tls;

use crate::server::Origin;

const ROLE_PREFIX: &str = "ramferry:role:";

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Orders migrations.
    Orchestrator,
    /// An agent of another host.
    Peer,
}

impl Role {
    /// The role's name behind `ramferry:role:`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Orchestrator => "orchestrator",
            Self::Peer => "peer",
        }
    }
}

/// Who calls; in the extensions of every request that is let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The certificate's subject, or "loopback". For logs, never for decisions.
    pub name: String,
    orchestrator: bool,
    peer: bool,
}

impl Caller {
    /// A caller on this host, where TLS is off.
    pub fn loopback() -> Self {
        Self { name: "loopback".to_owned(), orchestrator: true, peer: true }
    }

    /// The caller that shows the certificate `der`, which TLS has verified;
    /// `None` when it cannot be read.
    pub fn of_certificate(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let mut caller = Self { name: certificate.subject().to_string(), orchestrator: false, peer: false };
        let alternative = certificate.subject_alternative_name().ok()?;
        for name in alternative.iter().flat_map(|extension| &extension.value.general_names) {
            let GeneralName::URI(uri) = name else { continue };
            match uri.strip_prefix(ROLE_PREFIX) {
                Some("orchestrator") => caller.orchestrator = true,
                Some("peer") => caller.peer = true,
                _ => {}
            }
        }
        Some(caller)
    }

    /// Whether it has a role.
    pub fn has(&self, role: Role) -> bool {
        match role {
            Role::Orchestrator => self.orchestrator,
            Role::Peer => self.peer,
        }
    }

    /// The caller of a TLS connection; `None` without a certificate.
    fn of_connection(connection: Option<&TlsConnectInfo<Origin>>) -> Option<Self> {
        let certificates = connection?.peer_certs()?;
        Self::of_certificate(certificates.first()?)
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

#[cfg(test)]
mod tests;
