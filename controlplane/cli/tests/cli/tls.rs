//! Mutual TLS between the command line and an agent.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

use crate::command::run;
use crate::scripted::{Agent, Script};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("a certificate"))
    }

    fn issue(&self, name: &str) -> (String, String) {
        self.issue_for_years(name, None)
    }

    fn issue_for_years(&self, name: &str, years: Option<(i32, i32)>) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        if let Some((from, to)) = years {
            params.not_before = date_time_ymd(from, 1, 1);
            params.not_after = date_time_ymd(to, 1, 1);
        }
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }
}

fn agent(authority: &Authority, name: &str) -> Agent {
    agent_with(authority, authority.issue(name))
}

fn agent_with(authority: &Authority, (certificate, key): (String, String)) -> Agent {
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(certificate, key))
        .client_ca_root(Certificate::from_pem(authority.0.pem()));
    Agent::start_with(Script::default(), Some(tls))
}

fn write_client_files(directory: &Path, authority: &Authority, signer: &Authority) {
    let (certificate, key) = signer.issue("client");
    for (name, text) in [("ca", authority.0.pem()), ("cert", certificate), ("key", key)] {
        std::fs::write(directory.join(name), text).expect("a temporary directory");
    }
}

fn flags(directory: &Path) -> String {
    let directory = directory.display();
    format!("--tls-ca {directory}/ca --tls-cert {directory}/cert --tls-key {directory}/key")
}

#[test]
fn certificates_of_one_authority_are_let_in() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().expect("a directory");
    write_client_files(directory.path(), &authority, &authority);
    let agent = agent(&authority, "127.0.0.1");
    let ended = run(agent.address(), &format!("list {}", flags(directory.path())));
    assert_eq!(ended.code, 0, "{ended:?}");
}

#[test]
fn agent_of_another_name_is_let_in_only_by_that_name() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().expect("a directory");
    write_client_files(directory.path(), &authority, &authority);
    let agent = agent(&authority, "node-7.example");
    let line = format!("list {}", flags(directory.path()));
    let refused = run(agent.address(), &line);
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.stderr.contains("not valid for name"), "{}", refused.stderr);
    assert!(refused.stderr.contains("--tls-server-name"), "{}", refused.stderr);
    let ended = run(agent.address(), &format!("{line} --tls-server-name node-7.example"));
    assert_eq!(ended.code, 0, "{ended:?}");
}

#[test]
fn strangers_and_plain_connections_are_unreachable_with_a_remedy() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().expect("a directory");
    write_client_files(directory.path(), &authority, &Authority::new());
    let agent = agent(&authority, "127.0.0.1");
    let stranger = run(agent.address(), &format!("list {}", flags(directory.path())));
    assert_eq!(stranger.code, 4, "{stranger:?}");
    // What the server thinks of the certificate is lost when it closes too soon.
    let told = ["signed by an authority in that agent's tls_ca", "that its authorities signed yours"];
    assert!(told.iter().any(|part| stranger.stderr.contains(part)), "{}", stranger.stderr);
    let plain = run(agent.address(), "list");
    assert_eq!(plain.code, 4, "{plain:?}");
    assert!(plain.stderr.contains("with TLS give --tls-ca"), "{}", plain.stderr);
}

#[test]
fn file_that_is_no_certificate_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ca");
    std::fs::write(&path, "no certificate").expect("a temporary directory");
    let ended = run("127.0.0.1:1", &format!("list --tls-ca {}", path.display()));
    assert_eq!(ended.code, 2, "{ended:?}");
    assert_eq!(ended.stderr, format!("error: --tls-ca {}: not a PEM file\n", path.display()));
}

#[test]
fn certificates_out_of_their_time_are_told_by_side() {
    let authority = Authority::new();
    let (past, future) = (Some((2001, 2002)), Some((4000, 4001)));
    for (agents, clients, part) in [
        (past, None, "certificate of the agent there has expired: renew it on its host"),
        (future, None, "certificate of the agent there is not valid yet"),
        (None, past, "the certificate in --tls-cert has expired or is not valid yet: renew it"),
        (None, future, "compare the clocks of both hosts"),
    ] {
        let agent = agent_with(&authority, authority.issue_for_years("127.0.0.1", agents));
        let directory = tempfile::tempdir().expect("a directory");
        write_client_files(directory.path(), &authority, &authority);
        let (certificate, key) = authority.issue_for_years("client", clients);
        std::fs::write(directory.path().join("cert"), certificate).expect("a temporary directory");
        std::fs::write(directory.path().join("key"), key).expect("a temporary directory");
        let ended = run(agent.address(), &format!("list {}", flags(directory.path())));
        assert_eq!(ended.code, 4, "{ended:?}");
        // What a server thinks of a client's certificate is lost when it closes too soon.
        let lost = clients.is_some() && ended.stderr.contains("that yours has not expired");
        assert!(lost || ended.stderr.contains(part), "{part:?} is not in {}", ended.stderr);
    }
}

#[test]
fn agent_of_another_authority_is_told_from_one_that_does_not_speak_tls() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().expect("a directory");
    write_client_files(directory.path(), &authority, &authority);
    let stranger = Authority::new();
    let agent = agent(&stranger, "127.0.0.1");
    let refused = run(agent.address(), &format!("list {}", flags(directory.path())));
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.stderr.contains("no authority in --tls-ca signed the certificate"), "{}", refused.stderr);
    let plain = Agent::start(Script::default());
    let refused = run(plain.address(), &format!("list {}", flags(directory.path())));
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.stderr.contains("does not speak TLS"), "{}", refused.stderr);
}
