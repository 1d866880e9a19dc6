//! Certificates for agents and their callers, as files.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use tempfile::TempDir;

/// An authority of its own; its files go away with it.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

/// Where somebody's certificate, its key and its authority's certificate are.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authority's certificate.
    pub authority: PathBuf,
}

impl Authority {
    /// A new authority.
    pub fn new() -> Result<Authority> {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate()?)?;
        let directory = tempfile::tempdir()?;
        write(&directory.path().join("ca.pem"), &issuer.pem())?;
        Ok(Authority { issuer, directory })
    }

    /// A certificate with these roles, for whoever is reached at `address`. Its files are named for `name`.
    pub fn issue(&self, address: &str, name: &str, roles: &[&str]) -> Result<Credentials> {
        let mut parameters = CertificateParams::new(vec![address.to_owned()])?;
        for role in roles {
            let uri = format!("ramferry:role:{role}").try_into()?;
            parameters.subject_alt_names.push(SanType::URI(uri));
        }
        let key = KeyPair::generate()?;
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        let credentials = Credentials {
            certificate: self.path(&format!("{name}.pem")),
            key: self.path(&format!("{name}.key")),
            authority: self.path("ca.pem"),
        };
        write(&credentials.certificate, &certificate.pem())?;
        write(&credentials.key, &key.serialize_pem())?;
        Ok(credentials)
    }

    /// Where one of its files is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Credentials {
    /// Options of `ramferry` that show them.
    pub fn options(&self) -> Vec<String> {
        [("--tls-cert", &self.certificate), ("--tls-key", &self.key), ("--tls-ca", &self.authority)]
            .into_iter()
            .flat_map(|(option, path)| [option.to_owned(), path.display().to_string()])
            .collect()
    }
}

fn write(path: &Path, pem: &str) -> Result<()> {
    fs::write(path, pem).with_context(|| format!("cannot write {}", path.display()))
}
