//! The drill of docs/operations.md that needs no RDMA: alerts as they fire, and what tools print.
//! `cargo test -p ramferry --test voyage -- --ignored --nocapture drill::`

use std::time::Duration;

use ramferry_lab::{Accel, DebianGuest, Guest, Qemu, RamBlock, skipped};
use ramferry_proto::v1;
use ramferry_proto::v1::FabricKind::Tcp;

use crate::dashboards::Prometheus;
use crate::harness::{MIB, PATIENCE, Pair, parameters};
use crate::transcript::{show, show_doctor, show_figures};

/// What `stress` of the Debian guest fills, and writes again and again.
const STRESS_BYTES: u64 = 200 << 20;

const FIRING: &str = "ALERTS{alertstate=\"firing\"}";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a drill, to be read: a minute"]
async fn guest_that_does_not_converge_is_told_of_and_moves_once_it_may_pause_for_longer() {
    let debian = match DebianGuest::find() {
        Ok(debian) => debian,
        Err(reason) => return skipped(reason),
    };
    let pair = Pair::start();
    let Some(prometheus) = Prometheus::over(&[&pair.source, &pair.destination]) else {
        return skipped("there is no Prometheus (see scripts/setup)");
    };
    let builder =
        Qemu::builder().accel(Accel::Tcg).block(RamBlock::node(1024 * MIB)).guest(Guest::Debian(debian));
    let guest = builder.start().unwrap();
    await_stress(&guest);
    let receiver = guest.destination().start().unwrap();
    let patient = v1::MigrationParameters {
        max_downtime: Some(Duration::from_millis(15).try_into().unwrap()),
        no_progress_timeout: Some(Duration::from_secs(120).try_into().unwrap()),
        verify: false,
        ..parameters(Tcp)
    };
    pair.create("busy", &guest, &receiver, patient).await.unwrap();
    prometheus.wait_firing("RamferryMigrationNotConverging").await;
    println!("$ promtool query instant PROMETHEUS '{FIRING}'\n{}", prometheus.shown(FIRING));
    for query in [
        "ramferry_migration_expected_downtime_seconds",
        "ramferry_migration_max_downtime_seconds",
        "ramferry_migration_round{role=\"source\"}",
        "ramferry_migration_dirty_rate_bytes_per_second{role=\"source\"}",
        "ramferry_migration_throughput_bytes_per_second{role=\"source\"}",
        "topk(1, ramferry:stall:share_1m)",
    ] {
        println!("$ promtool query instant PROMETHEUS '{query}'\n{}", prometheus.shown(query));
    }
    let asked = pair.source.grpc.to_string();
    show_doctor(&pair.source, &["memlock", "tracker_uffd_wp"], &[]);
    let told = show(&["get", "busy", "--agent", &asked], &[]);
    assert!(told.contains("PRECOPY"), "{told}");
    show(&["set", "busy", "--max-downtime", "150ms", "--agent", &asked], &[]);
    let ended = pair.source.wait_end("busy").await;
    assert_eq!(ended.state(), v1::MigrationState::Succeeded, "{:?}", ended.error);
    show(&["get", "busy", "--agent", &asked], &[]);
    show_figures("after --max-downtime 150ms", &ended);
    receiver.wait_line(|line| line.starts_with("tick"), PATIENCE).unwrap();
    let ended = "absent(ALERTS{alertname=\"RamferryMigrationNotConverging\",alertstate=\"firing\"})";
    prometheus.wait(ended).await;
}

/// Until the guest has ticked, and its `stress` has filled what it writes: its RAM file holds that much.
fn await_stress(guest: &Qemu) {
    guest.wait_line(|line| line.starts_with("tick"), 3 * PATIENCE).unwrap();
    let filled =
        |line: &str| line.starts_with("tick") && resident_bytes(guest.pid()) > STRESS_BYTES + (64 << 20);
    guest.wait_line(filled, 3 * PATIENCE).unwrap();
}

/// Shared memory that a process has in use.
fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
