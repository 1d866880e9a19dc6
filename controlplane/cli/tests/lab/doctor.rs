//! What `ramferry doctor` says of two real RDMA devices.

use ramferry_lab::inside::hosts::{Host, Hosts};
use serde_json::Value;

use crate::harness::ramferry;
use crate::rdma::system;

/// What doctor said of every check, in this process.
fn doctor() -> Vec<Value> {
    let state = tempfile::tempdir().unwrap();
    let config = state.path().join("agent.toml");
    let options = format!("rdma_listen = \"10.77.0.1:0\"\nstate_dir = \"{}\"\n", state.path().display());
    // Another address than loopback is served with TLS only; none is served here.
    let authority = crate::authority::Authority::new();
    std::fs::write(&config, options + "guest_dirs = [\"/dev/shm\"]\n").unwrap();
    let output = ramferry()
        .args(["doctor", "--output", "json", "--config"])
        .arg(&config)
        .args(authority.options("doctor", &["peer"]))
        .output()
        .unwrap();
    let answer: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let expected = if answer["failed"] == 0 { 0 } else { 6 };
    assert_eq!(output.status.code(), Some(expected), "{output:?}");
    answer["checks"].as_array().unwrap().clone()
}

#[track_caller]
fn assert_said(checks: &[Value], id: &str, status: &str, parts: &[&str]) {
    let check = checks.iter().find(|check| check["id"] == id).unwrap();
    assert_eq!(check["status"], status, "{check}");
    for part in parts {
        assert!(check.to_string().contains(part), "{check} does not say {part}");
    }
}

/// Puts the hosts back, also after a test that failed.
struct Restored(Hosts);

impl Drop for Restored {
    fn drop(&mut self) {
        system("ip", &["link", "set", "dev", "v0", "mtu", "9000"]);
        self.0.mend().unwrap();
    }
}

#[test]
fn doctor_finds_both_devices_and_warns_of_a_low_mtu_and_of_ports_that_are_down() {
    let restored = Restored(Hosts::here().unwrap());
    let sound = doctor();
    assert_said(&sound, "rdma_devices", "ok", &["rxe0", "rxe1"]);
    assert_said(&sound, "rdma_port", "ok", &["rxe0/1 on v0 is ACTIVE", "rxe1/1 on v1 is ACTIVE"]);
    assert_said(
        &sound,
        "rdma_mtu",
        "ok",
        &["rxe0/1 carries 4096 bytes a packet of 4096 at most; v0 has MTU 9000"],
    );
    assert_said(&sound, "rdma_gid", "ok", &["10.77.0.1 (RoCE v2", "10.77.0.2 (RoCE v2"]);
    assert_said(&sound, "rdma_listen", "ok", &["10.77.0.1"]);
    assert_said(&sound, "tracker_uffd_wp", "ok", &[]);

    system("ip", &["link", "set", "dev", "v0", "mtu", "1500"]);
    let low = doctor();
    assert_said(
        &low,
        "rdma_mtu",
        "warn",
        &["rxe0/1 carries 1024 bytes", "rxe1/1 carries 4096 bytes", "ip link set dev v0 mtu 9000"],
    );

    restored.0.cut(Host::B).unwrap();
    // A cable that is out takes the carrier from both ends; only one was set down. The address of rdma_listen is asked
    // for, so that no active port is a failure.
    let down = doctor();
    assert_said(
        &down,
        "rdma_port",
        "fail",
        &["rxe1/1 on v1 is DOWN", "ip link set v1 up", "v0 is up and has no carrier"],
    );
    assert_said(&down, "rdma_listen", "fail", &["is its link up?"]);
    drop(restored);
    assert_said(&doctor(), "rdma_mtu", "ok", &[]);
}
