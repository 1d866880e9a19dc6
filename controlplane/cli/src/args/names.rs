//! Names that are checked before an agent is asked: of agents, migrations and
//! sockets on other hosts.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// Longest id of a migration, and of a request.
const ID_CHARACTERS: usize = 64;

/// Where an agent serves: a host and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AgentAddress {
    /// Without the brackets of an IPv6 address.
    host: String,
    port: u16,
}

/// A migration's name: 1 to 64 of `[A-Za-z0-9._-]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MigrationId(String);

/// An absolute path on the host of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemotePath(String);

/// Why a name was not taken, and what to write.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum NameError {
    #[error("it has a scheme; write HOST:PORT alone, for example 10.0.0.2:7050 (TLS comes with --tls-ca)")]
    Scheme,
    #[error("it has no port; write HOST:PORT, for example {0}:7050")]
    NoPort(String),
    #[error("`{0}` is no port; write a number from 1 to 65535, for example 7050")]
    Port(String),
    #[error(
        "`{0}` is no host; write a name, an IPv4 address, or an IPv6 address in brackets: [fd00::2]:7050"
    )]
    Host(String),
    #[error("an id is 1 to {ID_CHARACTERS} of A-Z, a-z, 0-9, `.`, `_` and `-`")]
    Id,
    #[error("the path is opened by the agent on its host, so it must be absolute: /run/vm/qmp.sock")]
    RelativePath,
}

impl AgentAddress {
    /// As an IPv6 literal has it in certificates and addresses: no brackets.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// Whether the address is surely on this host.
    pub(crate) fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

impl fmt::Display for AgentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for AgentAddress {
    type Err = NameError;

    fn from_str(value: &str) -> Result<Self, NameError> {
        if value.contains("://") {
            return Err(NameError::Scheme);
        }
        if value.parse::<Ipv6Addr>().is_ok() {
            return Err(NameError::NoPort(format!("[{value}]")));
        }
        let (host, port) = value.rsplit_once(':').ok_or_else(|| NameError::NoPort(value.to_owned()))?;
        if host.starts_with('[') && !host.ends_with(']') {
            return Err(NameError::NoPort(value.to_owned()));
        }
        let bad_port = || NameError::Port(port.to_owned());
        let number = port.parse().ok().filter(|number| *number != 0).ok_or_else(bad_port)?;
        let bad_host = || NameError::Host(host.to_owned());
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(literal) => literal.parse::<Ipv6Addr>().map_err(|_| bad_host())?.to_string(),
            None if is_host_name(host) => host.to_owned(),
            None => return Err(bad_host()),
        };
        Ok(Self { host, port: number })
    }
}

fn is_host_name(host: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !host.is_empty() && host.len() <= 253 && host.chars().all(allowed)
}

impl MigrationId {
    /// A name that no other migration has.
    pub(crate) fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 6];
        getrandom::fill(&mut bytes)?;
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self(format!("m-{digits}")))
    }
}

impl FromStr for MigrationId {
    type Err = NameError;

    fn from_str(value: &str) -> Result<Self, NameError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if value.is_empty() || value.len() > ID_CHARACTERS || !value.chars().all(allowed) {
            return Err(NameError::Id);
        }
        Ok(Self(value.to_owned()))
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl RemotePath {
    /// The path, as the protocol has it.
    pub(crate) fn into_string(self) -> String {
        self.0
    }
}

impl FromStr for RemotePath {
    type Err = NameError;

    fn from_str(value: &str) -> Result<Self, NameError> {
        if value.starts_with('/') { Ok(Self(value.to_owned())) } else { Err(NameError::RelativePath) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_addresses_are_host_and_port() {
        for (value, host, shown) in [
            ("10.0.0.2:7050", "10.0.0.2", "10.0.0.2:7050"),
            ("node-1.rack.example:1", "node-1.rack.example", "node-1.rack.example:1"),
            ("[::1]:7050", "::1", "[::1]:7050"),
        ] {
            let address: AgentAddress = value.parse().expect(value);
            assert_eq!((address.host(), address.to_string().as_str()), (host, shown));
        }
    }

    #[test]
    fn other_addresses_are_refused_with_what_to_write() {
        let says = |value: &str, expected: &str| {
            let error = value.parse::<AgentAddress>().expect_err(value).to_string();
            assert!(error.contains(expected), "{value}: {error}");
        };
        says("http://a:1", "scheme");
        says("node", "node:7050");
        says("::1", "[::1]:7050");
        says("[::1]", "no port");
        says("node:", "`` is no port");
        says("node:0", "`0` is no port");
        says("node:70000", "no port");
        says(":7050", "`` is no host");
        says("a b:7050", "`a b` is no host");
        says("[zz]:7050", "no host");
        says("fd00::2:zz:7050", "in brackets");
    }

    #[test]
    fn loopback_is_known_by_address_and_name() {
        let is_loopback = |value: &str| value.parse::<AgentAddress>().expect(value).is_loopback();
        assert!(is_loopback("127.0.0.1:1") && is_loopback("[::1]:1") && is_loopback("localhost:1"));
        assert!(!is_loopback("10.0.0.1:1") && !is_loopback("node:1"));
    }

    #[test]
    fn ids_keep_to_what_the_protocol_allows() {
        assert!("vm-7.prod_A".parse::<MigrationId>().is_ok());
        for bad in ["", "a b", "a/b", "é", &"x".repeat(65)] {
            assert_eq!(bad.parse::<MigrationId>(), Err(NameError::Id), "{bad}");
        }
        let made = MigrationId::random().expect("the system has entropy");
        assert_eq!(made.to_string().parse(), Ok(made));
    }

    #[test]
    fn paths_on_other_hosts_are_absolute() {
        assert!("/run/a.qmp".parse::<RemotePath>().is_ok());
        assert_eq!("run/a.qmp".parse::<RemotePath>(), Err(NameError::RelativePath));
    }
}
