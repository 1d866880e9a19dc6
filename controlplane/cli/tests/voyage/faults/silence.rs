//! A network that falls silent: no reset, no end of a connection, no answer.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use ramferry_lab::{Qemu, skipped};

use super::stage::{runs, small_guest};
use super::steps::{Held, Step, Steps};
use crate::authority::Authority;
use crate::harness::{Agent, PATIENCE, Site, assert_proves_itself, assert_runs_untraced};

/// The source notices within 6 s (a keepalive after 2 s, unanswered for 4 s); a
/// busy machine may add as much.
const NOTICED_WITHIN: Duration = Duration::from_secs(12);

/// Two network namespaces that a cable joins.
struct Network {
    names: [String; 2],
}

impl Network {
    const ADDRESSES: [&str; 2] = ["10.99.0.1", "10.99.0.2"];

    fn new(purpose: &str) -> Result<Network, String> {
        let names = ["a", "b"].map(|end| format!("ramferry-{}-{purpose}-{end}", std::process::id()));
        let network = Network { names };
        for name in &network.names {
            ip(&["netns", "add", name])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        let [a, b] = &network.names;
        ip(&["-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b])?;
        for (name, address) in network.names.iter().zip(Network::ADDRESSES) {
            ip(&["-n", name, "address", "add", &format!("{address}/24"), "dev", "cable"])?;
            ip(&["-n", name, "link", "set", "cable", "up"])?;
        }
        Ok(network)
    }

    fn sites(&self) -> [Site; 2] {
        [0, 1].map(|end| Site {
            enter: ["ip", "netns", "exec", &self.names[end]].map(str::to_owned).to_vec(),
            address: Network::ADDRESSES[end].into(),
        })
    }

    /// Pulls the cable at the destination's end: the source's sees only silence.
    fn pull(&self) {
        ip(&["-n", &self.names[1], "link", "set", "cable", "down"]).unwrap();
    }

    fn plug(&self) {
        ip(&["-n", &self.names[1], "link", "set", "cable", "up"]).unwrap();
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            // It may not have been made.
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output();
    let output = output.map_err(|error| format!("cannot run ip: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("ip {arguments:?}: {}", said.trim())) }
}

/// Two agents that know one another by certificate, each in a namespace of its own.
struct Hosts {
    sites: [Site; 2],
    agents: [Agent; 2],
    caller: Vec<String>,
    steps: Steps,
    guest: Qemu,
    receiver: Qemu,
    network: Network,
    _authority: Authority,
}

impl Hosts {
    fn new(network: Network) -> Hosts {
        let (authority, steps) = (Authority::new(), Steps::listen());
        let socket = steps.path().display().to_string();
        let guests = format!("{},/dev/shm", std::env::temp_dir().display());
        let sites = network.sites();
        let agents = [("source", 0), ("destination", 1)].map(|(name, end)| {
            let mut options = authority.options_at(&sites[end].address, name, &["peer"]);
            options.extend(["--step-socket", &socket, "--guest-dirs", &guests].map(str::to_owned));
            let options: Vec<&str> = options.iter().map(String::as_str).collect();
            Agent::start_at(sites[end].clone(), &options)
        });
        let caller = authority.options_at("127.0.0.1", "orchestrator", &["orchestrator"]);
        let guest = small_guest();
        let receiver = guest.destination().start().unwrap();
        Hosts { sites, agents, caller, steps, guest, receiver, network, _authority: authority }
    }

    /// Runs the command line beside one of the agents.
    fn call(&self, end: usize, arguments: &[&str]) -> Output {
        let mut command = self.sites[end].command(env!("CARGO_BIN_EXE_ramferry"));
        command.args(arguments).args(["--agent", &self.agents[end].grpc.to_string()]).args(&self.caller);
        command.output().unwrap()
    }

    fn begin(&self) {
        let (from, to) = (self.guest.qmp_path(), self.receiver.qmp_path());
        let arguments = ["migrate", "--detach", "--id", "first", "--fabric", "tcp", "--max-downtime", "1ms"];
        let destination = self.agents[1].grpc.to_string();
        let paths = [from.to_str().unwrap(), to.to_str().unwrap()];
        let rest = ["--to", &destination, "--source-qmp", paths[0], "--destination-qmp", paths[1]];
        let begun = self.call(0, &[&arguments[..], &rest[..]].concat());
        assert!(begun.status.success(), "{begun:?}");
    }

    fn hold(&self, wanted: impl Fn(&Step) -> bool) -> Held {
        loop {
            let held = self.steps.next();
            if wanted(&held.step) {
                return held;
            }
            if held.step.step == "copy" && held.step.round == Some(2) {
                let forced = self.call(0, &["switchover", "first"]);
                assert!(forced.status.success(), "{forced:?}");
            }
        }
    }

    /// The state in which a side's migration ends.
    fn end(&self, end: usize) -> String {
        let watched = self.call(end, &["watch", "first", "--output", "json"]);
        let text = String::from_utf8(watched.stdout.clone()).unwrap();
        let report: serde_json::Value = serde_json::from_str(text.lines().last().unwrap_or_default())
            .unwrap_or_else(|error| panic!("{error}: {watched:?}\n{}", self.agents[end].log()));
        report["state"].as_str().unwrap().to_owned()
    }
}

fn hosts(purpose: &str) -> Option<Hosts> {
    Network::new(purpose)
        .map(Hosts::new)
        .map_err(|reason| skipped(format!("no network of its own: {reason}")))
        .ok()
}

/// Falls silent before `step`, until the source has given up; how long the guest was not seen to tick.
fn fall_silent(hosts: &Hosts, step: &str) -> Duration {
    hosts.begin();
    let held = hosts.hold(|seen| seen.to_string() == step);
    hosts.network.pull();
    let silent = Instant::now();
    drop(held);
    hosts.steps.open();
    let state = hosts.end(0);
    let noticed = silent.elapsed();
    assert_eq!(state, "FAILED");
    hosts.guest.next_tick(PATIENCE).unwrap();
    let ticks = hosts.guest.ticks();
    let gaps = ticks.windows(2).filter(|pair| pair[1].0 > silent).map(|pair| pair[1].0 - pair[0].0);
    let stood = gaps.max().unwrap();
    eprintln!(
        "{step}: the migration ended {noticed:?} after the silence began; the guest stood still for {stood:?}"
    );
    assert_runs_untraced(&hosts.guest);
    assert!(!runs(&hosts.receiver));
    hosts.network.plug();
    assert_eq!(hosts.end(1), "FAILED");
    stood
}

fn move_again(mut hosts: Hosts) {
    if !hosts.receiver.is_alive() {
        hosts.receiver = hosts.guest.destination().start().unwrap();
    }
    let (from, to) = (hosts.guest.qmp_path(), hosts.receiver.qmp_path());
    let destination = hosts.agents[1].grpc.to_string();
    let paths = [from.to_str().unwrap(), to.to_str().unwrap()];
    let moved = hosts.call(
        0,
        &[
            "migrate",
            "--id",
            "second",
            "--verify",
            "--to",
            &destination,
            "--source-qmp",
            paths[0],
            "--destination-qmp",
            paths[1],
        ],
    );
    assert!(moved.status.success(), "{moved:?}");
    assert_proves_itself(&hosts.receiver);
}

#[test]
fn silence_while_the_guest_runs_ends_the_migration_and_the_guest_never_stands_still() {
    let Some(hosts) = hosts("run") else { return };
    let stood = fall_silent(&hosts, "source copy 2");
    assert!(stood < Duration::from_secs(1), "{stood:?}");
    move_again(hosts);
}

#[test]
fn silence_while_the_guest_is_paused_resumes_it_at_the_source_in_bounded_time() {
    let Some(hosts) = hosts("paused") else { return };
    let stood = fall_silent(&hosts, "source end_round 3");
    assert!(stood < NOTICED_WITHIN, "{stood:?}");
    move_again(hosts);
}

#[test]
fn silence_around_the_commit_leaves_nobody_running_twice_and_is_settled_when_it_ends() {
    let Some(hosts) = hosts("commit") else { return };
    hosts.begin();
    let held = hosts.hold(|seen| seen.step == "send_commit");
    hosts.network.pull();
    drop(held);
    let held = hosts.hold(|seen| seen.step == "ask_outcome");
    assert!(!runs(&hosts.guest) && !runs(&hosts.receiver), "nobody knows yet");
    hosts.network.plug();
    drop(held);
    hosts.steps.open();
    let ends = [hosts.end(0), hosts.end(1)];
    assert_eq!(ends[0], ends[1], "the agents agree");
    let moved = ends[0] == "SUCCEEDED";
    assert_eq!((runs(&hosts.guest), runs(&hosts.receiver)), (!moved, moved));
    eprintln!("the silence around the commit ended {}", ends[0]);
    if moved {
        assert_proves_itself(&hosts.receiver);
    } else {
        move_again(hosts);
    }
}
