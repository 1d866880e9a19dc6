//! `ramferry doctor`, of real agents and of this process.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use ramferry_lab::skipped;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};
use serde_json::Value;

use crate::harness::{Agent, Site, ramferry};

const MEMLOCK: &str = "65536";

fn doctor(arguments: &[&str]) -> (Output, Value) {
    run(ramferry().args(["doctor", "--output", "json"]).args(arguments))
}

fn run(command: &mut Command) -> (Output, Value) {
    let output = command.output().unwrap();
    let answer: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let expected = if answer["failed"] == 0 { 0 } else { 6 };
    assert_eq!(output.status.code(), Some(expected), "{output:?}");
    (output, answer)
}

#[track_caller]
fn assert_said(answer: &Value, id: &str, status: &str, part: &str) {
    let checks = answer["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["id"] == id).unwrap();
    assert_eq!(check["status"], status, "{check}");
    assert!(check.to_string().contains(part), "{check} does not say {part}");
}

#[test]
fn running_agent_tells_of_its_own_limits_and_of_its_peer() {
    let limit = format!("--memlock={MEMLOCK}:{MEMLOCK}");
    let enter = ["prlimit", &limit, "--"].map(str::to_owned).to_vec();
    let agent = Agent::start_at(Site { enter, ..Site::here() }, &[]);
    let peer = Agent::start();
    let (asked, at) = (agent.grpc.to_string(), peer.grpc.to_string());

    let (_, alone) = doctor(&["--agent", &asked]);
    assert_said(&alone, "memlock", "ok", MEMLOCK);
    assert_said(&alone, "journal", "ok", "an agent holds it");
    assert_said(&alone, "certificate", "skip", "TLS is off");
    assert_said(&alone, "peer_agent", "skip", "--peer");
    let published = agent.scrape();
    for check in alone["checks"].as_array().unwrap() {
        let value = match check["status"].as_str().unwrap() {
            "ok" => "0",
            "warn" => "1",
            "fail" => "2",
            _ => "-1",
        };
        let id = check["id"].as_str().unwrap();
        let series = format!("ramferry_doctor_check_status{{check=\"{id}\"}} {value}\n");
        assert!(published.contains(&series), "{series} is not in {published}");
    }

    let (_, both) = doctor(&["--agent", &asked, "--peer", &at]);
    assert_said(&both, "peer_agent", "ok", &at);
    assert_said(&both, "peer_version", "ok", "protocol 1");
    assert_said(&both, "peer_clock", "ok", "within");
    assert_said(&both, "peer_data", "ok", "took a connection");
    assert_eq!(both["agent"], asked);
}

#[test]
fn agents_with_certificates_show_them_to_one_another() {
    let authority = crate::authority::Authority::new();
    let start = |name| {
        let options = authority.options(name, &["peer"]);
        Agent::start_with(&options.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let (agent, peer) = (start("source"), start("destination"));
    let (asked, at) = (agent.grpc.to_string(), peer.grpc.to_string());
    let caller = authority.options("caller", &["orchestrator"]);
    let mut arguments = vec!["--agent", &asked, "--peer", &at];
    arguments.extend(caller.iter().map(String::as_str));
    let (_, answer) = doctor(&arguments);
    assert_said(&answer, "certificate", "ok", "source.pem is valid for");
    assert_said(&answer, "peer_certificate", "ok", "is valid for");
    assert_said(&answer, "peer_version", "ok", "protocol 1");

    // Of an authority that the peer does not know.
    let stranger = crate::authority::Authority::new();
    let options = stranger.options("stranger", &["peer"]);
    let mut arguments = vec!["--peer", &at];
    arguments.extend(options.iter().map(String::as_str));
    let (_, answer) = doctor(&arguments);
    assert_said(&answer, "peer_agent", "ok", &at);
    assert_said(&answer, "peer_certificate", "fail", "tls_ca");
    assert_said(&answer, "peer_version", "fail", "does not tell of itself");
}

#[test]
fn without_an_agent_this_process_is_examined_for_the_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let mut parameters = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    parameters.subject_alt_names.push(SanType::URI("ramferry:role:peer".to_owned().try_into().unwrap()));
    parameters.not_after = (SystemTime::now() + Duration::from_secs(86_400)).into();
    let key = KeyPair::generate().unwrap();
    let certificate = parameters.self_signed(&key).unwrap().pem();
    std::fs::write(path("node.pem"), certificate).unwrap();
    std::fs::write(path("node.key"), key.serialize_pem()).unwrap();
    let keys =
        [("tls_cert", "node.pem"), ("tls_key", "node.key"), ("tls_ca", "node.pem"), ("state_dir", "state")];
    let lines: Vec<String> = keys.iter().map(|(key, name)| format!("{key} = {:?}", path(name))).collect();
    std::fs::write(path("agent.toml"), lines.join("\n")).unwrap();

    // Bound, so that nobody else gets the port, and not listening.
    let deaf = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&deaf, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
    let at = SocketAddr::try_from(getsockname(&deaf).unwrap()).unwrap().to_string();

    let (output, answer) = doctor(&["--config", &path("agent.toml"), "--peer", &at]);
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    assert_said(&answer, "certificate", "warn", "node.pem expires in 23 hours");
    assert_said(&answer, "peer_agent", "fail", "refuses connections");
    assert_said(&answer, "state_dir", "ok", "the agent makes it");
    assert_eq!(answer["agent"], Value::Null);

    let text = ramferry().args(["doctor", "--config", &path("agent.toml"), "--peer", &at]).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    let last: Vec<&str> = text.lines().rev().take(3).collect();
    assert!(last[0].contains("1 failed") || last[0].contains("failed,"), "{text}");
    assert!(last[1].contains("-> "), "a remedy stands above the summary: {text}");
    assert!(text.contains("fail  peer_agent"), "{text}");
}

#[test]
fn unit_that_is_deployed_is_one_that_systemd_understands() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/ramferry-agent.service");
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("ramferry-agent.service");
    let text = std::fs::read_to_string(unit).unwrap();
    // It is looked for.
    std::fs::write(&copy, text.replace("/usr/bin/ramferry", env!("CARGO_BIN_EXE_ramferry"))).unwrap();
    let Ok(verified) = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&copy).output()
    else {
        return skipped("there is no systemd-analyze");
    };
    // What it does not understand, it says, and succeeds.
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    let of_unit: Vec<&str> = said.lines().filter(|line| line.contains("ramferry-agent")).collect();
    assert!(verified.status.success() && of_unit.is_empty(), "{said}");
}
