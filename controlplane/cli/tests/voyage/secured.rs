//! Two agents and a caller that know one another by certificate only.

use std::path::Path;
use std::process::Output;

use crate::authority::Authority;
use crate::harness::{Agent, assert_proves_itself, boot, proof, quiet, ramferry};
use crate::secrets::everything_of;

fn agent(options: &[String]) -> Agent {
    let talkative = ["--log-filter", "trace"];
    Agent::start_with(&options.iter().map(String::as_str).chain(talkative).collect::<Vec<_>>())
}

/// No line of any private key is anywhere that an agent writes.
fn assert_keys_are_kept(authority: &Authority, agents: [(&str, &Agent); 2]) {
    let mut lines = Vec::new();
    for name in ["source.key", "destination.key", "orchestrator.key"] {
        let pem = std::fs::read_to_string(authority.path(name)).unwrap();
        lines.extend(pem.lines().filter(|line| !line.starts_with("-----")).map(str::to_owned));
    }
    assert!(lines.len() >= 3 && lines.iter().any(|line| line.len() == 64), "{lines:?}");
    for (name, agent) in agents {
        let places = everything_of(name, agent);
        assert!(places[0].1.contains("\"TRACE\""), "{name} logs little");
        for (place, text) in places {
            assert!(!lines.iter().any(|line| text.contains(line)), "{place} holds a private key");
        }
    }
}

fn migrate(source: &Agent, destination: &Agent, guests: [&Path; 2], options: &[String]) -> Output {
    ramferry()
        .args(["migrate", "--agent", &source.grpc.to_string(), "--to", &destination.grpc.to_string()])
        .arg("--source-qmp")
        .arg(guests[0])
        .arg("--destination-qmp")
        .arg(guests[1])
        .args(["--fabric", "tcp", "--verify", "--output", "json"])
        // Agents that log so much are slow.
        .args(["--max-downtime", "10s"])
        .args(options)
        .output()
        .unwrap()
}

#[test]
fn agents_and_caller_with_certificates_migrate_and_others_are_refused() {
    let authority = Authority::new();
    let source = agent(&authority.options("source", &["peer"]));
    let destination = agent(&authority.options("destination", &["peer"]));
    let guest = boot(proof(quiet()));
    let receiver = guest.destination().start().unwrap();
    let (from, to) = (guest.qmp_path(), receiver.qmp_path());

    // A peer's certificate gives no right to order a migration, and none at all gives none.
    let refused = migrate(&source, &destination, [&from, &to], &authority.options("impostor", &["peer"]));
    assert_eq!(refused.status.code(), Some(5), "{refused:?}");
    let refused = migrate(&source, &destination, [&from, &to], &[]);
    assert!(!refused.status.success(), "{refused:?}");

    let orchestrator = authority.options("orchestrator", &["orchestrator"]);
    let moved = migrate(&source, &destination, [&from, &to], &orchestrator);
    assert!(moved.status.success(), "{moved:?}");
    assert_proves_itself(&receiver);
    assert_keys_are_kept(&authority, [("source", &source), ("destination", &destination)]);
}

#[test]
fn agent_without_the_role_of_a_peer_cannot_reach_a_destination() {
    let authority = Authority::new();
    let source = agent(&authority.options("source", &["orchestrator"]));
    let destination = agent(&authority.options("destination", &["peer"]));
    let guest = boot(proof(quiet()));
    let receiver = guest.destination().start().unwrap();
    let orchestrator = authority.options("orchestrator", &["orchestrator"]);
    let refused = migrate(&source, &destination, [&guest.qmp_path(), &receiver.qmp_path()], &orchestrator);
    assert_eq!(refused.status.code(), Some(5), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stdout).contains("peer"), "{refused:?}");
    assert_proves_itself(&guest);
}
