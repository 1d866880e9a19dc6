//! Certificates for agents and their callers.

use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};

/// An authority whose certificates are files.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: tempfile::TempDir,
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), issuer.pem()).unwrap();
        Authority { issuer, directory }
    }

    /// Options that show a certificate with these roles.
    pub(crate) fn options(&self, name: &str, roles: &[&str]) -> Vec<String> {
        self.options_at("127.0.0.1", name, roles)
    }

    /// The same, for an agent at another address.
    pub(crate) fn options_at(&self, address: &str, name: &str, roles: &[&str]) -> Vec<String> {
        let mut parameters = CertificateParams::new(vec![address.to_owned()]).unwrap();
        for role in roles {
            let uri = format!("ramferry:role:{role}").try_into().unwrap();
            parameters.subject_alt_names.push(SanType::URI(uri));
        }
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let (certificate_path, key_path) =
            (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
        std::fs::write(&certificate_path, certificate.pem()).unwrap();
        std::fs::write(&key_path, key.serialize_pem()).unwrap();
        let files =
            [("--tls-cert", certificate_path), ("--tls-key", key_path), ("--tls-ca", self.path("ca.pem"))];
        files.into_iter().flat_map(|(option, path)| [option.to_owned(), path.display().to_string()]).collect()
    }

    /// One of its files.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}
