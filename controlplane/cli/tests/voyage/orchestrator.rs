//! Other programs' view: a Python client that knows only the protos and what
//! reflection tells it, and the command line.

use std::path::{Path, PathBuf};
use std::process::Command;

use ramferry_lab::skipped;
use serde_json::Value;

use crate::harness::{Pair, assert_proves_itself, boot, proof, quiet, ramferry};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[tokio::test(flavor = "multi_thread")]
async fn python_client_discovers_the_services_and_migrates() {
    let python = repository().join("target/venv/bin/python");
    if !python.exists() {
        return skipped("target/venv is not there: run scripts/setup test");
    }
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    let output = Command::new(python)
        .arg(repository().join("controlplane/cli/tests/orchestrator/orchestrator.py"))
        .args(["--agent", &pair.source.grpc.to_string(), "--to", &pair.destination.grpc.to_string()])
        .arg("--source-qmp")
        .arg(guest.qmp_path())
        .arg("--destination-qmp")
        .arg(destination.qmp_path())
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    let seen: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert!(seen.to_string().contains("ramferry.v1.MigrationService"), "{seen}");
    assert!(seen.to_string().contains("SUCCEEDED"), "{seen}");
    assert_proves_itself(&destination);
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_prints_one_object_with_the_documented_keys() {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    let output = ramferry()
        .args([
            "migrate",
            "--agent",
            &pair.source.grpc.to_string(),
            "--to",
            &pair.destination.grpc.to_string(),
        ])
        .arg("--source-qmp")
        .arg(guest.qmp_path())
        .arg("--destination-qmp")
        .arg(destination.qmp_path())
        .args(["--id", "cli", "--verify", "--output", "json"])
        .output()
        .unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Map<String, Value> = serde_json::from_str(&stdout).unwrap();
    for key in [
        "id",
        "state",
        "fabric",
        "registration",
        "postcopy",
        "ram_bytes",
        "present_bytes",
        "zero_bytes",
        "transferred_bytes",
        "rounds",
        "setup_seconds",
        "total_seconds",
        "downtime_seconds",
        "downtime_parts",
        "throttle_peak_percent",
        "throughput_bits_per_second",
        "registration_seconds",
        "registered_bytes",
        "pinned_peak_bytes",
        "verified",
        "error",
    ] {
        assert!(report.contains_key(key), "{key} is missing: {stdout}");
    }
    assert_eq!(report.len(), 22, "{stdout}");
    assert_eq!((&report["state"], &report["verified"]), (&"SUCCEEDED".into(), &true.into()));
    assert_eq!(report["fabric"], "shm");
    assert!(report["downtime_seconds"].as_f64().unwrap() > 0.0);
    assert_proves_itself(&destination);

    let metrics = pair.source.scrape();
    for name in
        ["ramferry_migrations_total", "ramferry_transfer_bytes_total", "ramferry_migration_downtime_seconds"]
    {
        assert!(metrics.contains(name), "{name} is missing:\n{metrics}");
    }
    let deleted =
        ramferry().args(["delete", "--agent", &pair.source.grpc.to_string(), "cli"]).output().unwrap();
    assert!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
}
