//! Certificates for agents and their callers, as a test asks for them.

use std::path::PathBuf;

/// An authority whose certificates are files.
pub(crate) struct Authority(ramferry_lab::Authority);

impl Authority {
    pub(crate) fn new() -> Authority {
        Authority(ramferry_lab::Authority::new().unwrap())
    }

    /// Options that show a certificate with these roles.
    pub(crate) fn options(&self, name: &str, roles: &[&str]) -> Vec<String> {
        self.options_at("127.0.0.1", name, roles)
    }

    /// The same, for an agent at another address.
    pub(crate) fn options_at(&self, address: &str, name: &str, roles: &[&str]) -> Vec<String> {
        self.0.issue(address, name, roles).unwrap().options()
    }

    /// One of its files.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }
}
