//! Limits of the host that stand in the way of registering.

use ramferry_lab::{Fill, Qemu, RamBlock, Workload};
use ramferry_proto::v1::MigrationState;

use crate::harness::{MIB, Site, assert_proves_itself, boot};
use crate::rdma::{DESTINATION, Host, Rdma, SOURCE, pinned_kib, verbs};

/// Root may lock without limit, unless it is robbed of the right to.
pub(crate) fn limited() -> Site {
    let limit = format!("--memlock={0}:{0}", 16 * MIB);
    let enter = ["prlimit", &limit, "setpriv", "--bounding-set=-ipc_lock", "--"];
    Site { enter: enter.map(str::to_owned).to_vec(), ..Site::here() }
}

async fn memlock_exhausted(host: Host) {
    let mut rdma = Rdma::start();
    let agent = rdma.agent(host, limited(), &[]);
    let place = match host.name {
        "source" => &mut rdma.pair.source,
        _ => &mut rdma.pair.destination,
    };
    let unlimited = std::mem::replace(place, agent);
    let workload = Workload { mib: 4, touch_mib: 48, rate_mib: 8, fill: Fill::Random, ..Workload::default() };
    let guest = boot(Qemu::builder().block(RamBlock::node(96 * MIB)).proof(workload));
    let receiver = guest.destination().start().unwrap();
    let ended = rdma.pair.run("limited", &guest, &receiver, verbs()).await;
    assert_eq!(ended.state(), MigrationState::Failed);
    let error = ended.error.unwrap();
    assert_eq!(error.reason, "REGISTRATION_FAILED", "{}", error.message);
    for part in ["RLIMIT_MEMLOCK", &(16 * MIB).to_string(), "LimitMEMLOCK", "ulimit -l"] {
        assert!(error.message.contains(part), "{:?} does not say {part}", error.message);
    }
    assert_proves_itself(&guest);

    // A budget that keeps below the limit is one remedy, a higher limit another.
    rdma.pair.source.wait_end("limited").await;
    rdma.pair.destination.wait_end("limited").await;
    let receiver = if receiver.is_alive() { receiver } else { guest.destination().start().unwrap() };
    let budget = ramferry_proto::v1::MigrationParameters { pin_budget_bytes: 8 * MIB, ..verbs() };
    rdma.pair.migrate("within", &guest, &receiver, budget).await;
    assert_proves_itself(&receiver);
    assert_eq!(pinned_kib(rdma.pair.source.pid()), 0);
    drop(unlimited);
}

#[tokio::test(flavor = "multi_thread")]
async fn memlock_exhausted_at_the_source_names_the_limit_and_a_budget_below_it_succeeds() {
    memlock_exhausted(SOURCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memlock_exhausted_at_the_destination_names_the_limit_and_a_budget_below_it_succeeds() {
    memlock_exhausted(DESTINATION).await;
}
