//! What the pause is made of.

use ramferry_lab::{Fill, Workload};
use ramferry_proto::v1;

use crate::harness::{MIB, Pair, assert_proves_itself, boot, parameters, proof, seconds};

/// Rewritten without pause, so that no round leaves less than the one before.
const WORKING_SET_MIB: u64 = 64;

#[tokio::test(flavor = "multi_thread")]
async fn working_set_rewritten_without_pause_is_moved_by_policy_and_its_downtime_accounted_for() {
    let pair = Pair::start();
    for fabric in [v1::FabricKind::Shm, v1::FabricKind::Tcp] {
        let workload =
            Workload { mib: WORKING_SET_MIB, rate_mib: 0, fill: Fill::Stamp, ..Workload::default() };
        let guest = boot(proof(workload));
        let destination = guest.destination().start().unwrap();
        let mut parameters = parameters(fabric);
        parameters.verify = false;
        let ended = pair.migrate(fabric.as_str_name(), &guest, &destination, parameters).await;
        assert_proves_itself(&destination);

        let progress = ended.progress.unwrap();
        let part = |name: &str| {
            let part = progress.downtime_parts.iter().find(|part| part.name == name);
            seconds(part.unwrap_or_else(|| panic!("no part {name}")).duration)
        };
        for name in ["pause", "harvest", "copy", "fence", "acknowledge", "device_state", "journal", "commit"]
        {
            assert!(part(name) > 0.0, "{name}: {progress:?}");
        }
        assert!(progress.rounds.len() >= 3, "{progress:?}");
        let last = progress.rounds.last().unwrap();
        assert!(last.transferred_bytes > WORKING_SET_MIB * MIB / 4, "{last:?}");
        let copied: f64 = progress.rounds.iter().map(|round| seconds(round.duration)).sum();
        let throughput = progress.transferred_bytes as f64 / copied;
        let limit = last.transferred_bytes as f64 / throughput + part("device_state") + part("harvest");
        let downtime = seconds(progress.downtime);
        eprintln!("{fabric:?}: downtime {downtime:.4} s against {limit:.4} s, {:?}", progress.downtime_parts);
        assert!(downtime <= 1.5 * limit, "downtime {downtime:.4} s, limit {limit:.4} s: {progress:#?}");
    }
}
