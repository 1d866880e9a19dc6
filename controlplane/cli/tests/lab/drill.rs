//! The drills of docs/operations.md that need RDMA: alerts as they fire, and what tools print.
//! `scripts/lab-test 6.12 -- --ignored --nocapture drill::`

use std::process::Command;

use ramferry_lab::inside::hosts::{Host, Hosts};
use ramferry_lab::{Fill, Qemu, RamBlock, Workload};
use ramferry_proto::v1::{self, MigrationState};

use crate::harness::{Agent, MIB, assert_proves_itself, boot};
use crate::limits::limited;
use crate::prometheus::Prometheus;
use crate::rdma::{DESTINATION, Rdma, SOURCE, system, verbs};
use crate::transcript::{show, show_doctor, show_figures};

const FIRING: &str = "ALERTS{alertstate=\"firing\"}";
/// Under TCG neither an agent nor Prometheus answers as fast as elsewhere.
const SCRAPE_MS: u32 = 1000;

/// A guest that hardly writes, so that all that counts is the first round.
fn guest() -> Qemu {
    let workload = Workload { mib: 2, touch_mib: 96, rate_mib: 1, fill: Fill::Random, ..Workload::default() };
    boot(Qemu::builder().block(RamBlock::node(160 * MIB)).proof(workload))
}

fn unverified() -> v1::MigrationParameters {
    v1::MigrationParameters { verify: false, ..verbs() }
}

fn prometheus(agents: &[&Agent]) -> Prometheus {
    Prometheus::every(SCRAPE_MS, agents).expect("scripts/setup test has fetched it")
}

/// Waits for an alert, and shows it.
async fn await_alert(prometheus: &Prometheus, alert: &str) {
    prometheus.wait_firing(alert).await;
    println!("$ promtool query instant PROMETHEUS '{FIRING}'\n{}", prometheus.shown(FIRING));
}

/// The next migration of a guest, with what it costs.
async fn leave(rdma: &Rdma, id: &str, guest: &Qemu, parameters: v1::MigrationParameters) -> Qemu {
    let receiver = guest.destination().start().unwrap();
    let ended = rdma.pair.migrate(id, guest, &receiver, parameters).await;
    show_figures(id, &ended);
    assert_proves_itself(&receiver);
    receiver
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a drill, to be read: a minute"]
async fn low_memlock_is_told_of_and_a_budget_and_then_a_limit_helps() {
    let mut rdma = Rdma::start();
    let caller = rdma.caller();
    let source = rdma.agent(SOURCE, limited(), &[]);
    drop(std::mem::replace(&mut rdma.pair.source, source));
    let asked = rdma.pair.source.grpc.to_string();
    let watch = prometheus(&[&rdma.pair.source, &rdma.pair.destination]);
    await_alert(&watch, "RamferryHostUnfit").await;
    show_doctor(&rdma.pair.source, &["memlock"], &caller);

    let guest = guest();
    let receiver = guest.destination().start().unwrap();
    let ended = rdma.pair.run("tight", &guest, &receiver, unverified()).await;
    assert_eq!(ended.state(), MigrationState::Failed);
    let told = show(&["get", "tight", "--agent", &asked], &caller);
    assert!(told.contains("RLIMIT_MEMLOCK"), "{told}");
    await_alert(&watch, "RamferryRegistrationErrors").await;
    rdma.pair.destination.wait_end("tight").await;
    drop(receiver);

    let budget = v1::MigrationParameters { pin_budget_bytes: 8 * MIB, ..unverified() };
    let guest = leave(&rdma, "budget-8-MiB", &guest, budget).await;

    // The way back begins at the other host; a third agent, without the limit, takes the place of the first.
    rdma.pair.source = rdma.agent(SOURCE, crate::harness::Site::here(), &[]);
    show_doctor(&rdma.pair.source, &["memlock"], &caller);
    leave(&rdma, "no-limit", &guest, unverified()).await;
}

/// What a program of the system prints.
fn show_system(command: &str) {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    println!("$ {command}\n{}", String::from_utf8_lossy(&output.stdout));
}

/// Puts the cable back as it was.
struct Restored(Hosts);

impl Drop for Restored {
    fn drop(&mut self) {
        set_mtu(9000);
        self.0.mend().unwrap();
    }
}

fn set_mtu(mtu: u32) {
    for host in Host::BOTH {
        system("ip", &["link", "set", "dev", &host.network_device(), "mtu", &mtu.to_string()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a drill, to be read: a minute"]
async fn low_mtu_is_told_of_and_costs_throughput_until_it_is_raised() {
    let restored = Restored(Hosts::here().unwrap());
    set_mtu(1500);
    let rdma = Rdma::start();
    let caller = rdma.caller();
    let watch = prometheus(&[&rdma.pair.source, &rdma.pair.destination]);
    await_alert(&watch, "RamferryHostImpaired").await;
    let told = show_doctor(&rdma.pair.source, &["rdma_mtu"], &caller);
    assert!(told.contains("1024"), "{told}");
    show_system("ibv_devinfo | grep -E 'hca_id|active_mtu'");
    let guest = leave(&rdma, "mtu-1500", &guest(), unverified()).await;

    set_mtu(9000);
    show_system("ip link show v0 | head -n 1");
    for agent in [&rdma.pair.source, &rdma.pair.destination] {
        let told = show_doctor(agent, &["rdma_mtu"], &caller);
        assert!(told.starts_with("ok"), "{told}");
    }
    leave(&rdma, "mtu-9000", &guest, unverified()).await;
    watch.wait("absent(ALERTS{alertname=\"RamferryHostImpaired\",alertstate=\"firing\"})").await;
    drop(restored);
    println!("{} to {}: done", SOURCE.device, DESTINATION.device);
}
