//! What the pause is made of.

use std::time::Duration;

use ramferry_lab::{Accel, Fill, Workload};
use ramferry_proto::v1;

use crate::harness::{Pair, assert_proves_itself, boot, parameters, proof, seconds};

/// Rewritten without pause, so that rounds come to leave no less than the one before.
const WORKING_SET_MIB: u64 = 64;

#[tokio::test(flavor = "multi_thread")]
async fn working_set_rewritten_without_pause_is_moved_by_policy_and_its_downtime_accounted_for() {
    let pair = Pair::start();
    for fabric in [v1::FabricKind::Shm, v1::FabricKind::Tcp] {
        let workload =
            Workload { mib: WORKING_SET_MIB, rate_mib: 0, fill: Fill::Stamp, ..Workload::default() };
        let guest = boot(proof(workload).accel(Accel::Tcg));
        let destination = guest.destination().start().unwrap();
        let mut parameters = parameters(fabric);
        parameters.verify = false;
        parameters.max_downtime = Some(Duration::from_millis(1).try_into().unwrap());
        let ended = pair.migrate(fabric.as_str_name(), &guest, &destination, parameters).await;
        assert_proves_itself(&destination);

        let progress = ended.progress.unwrap();
        let part = |name: &str| {
            let part = progress.downtime_parts.iter().find(|part| part.name == name);
            seconds(part.unwrap_or_else(|| panic!("no part {name}")).duration)
        };
        for name in ["pause", "harvest", "copy", "fence", "device_state", "journal", "commit"] {
            assert!(part(name) > 0.0, "{name}: {progress:?}");
        }
        // The device state hides it, all but what it takes longer.
        assert!(part("acknowledge") < part("device_state"), "{progress:?}");
        let parts: f64 = progress.downtime_parts.iter().map(|part| seconds(part.duration)).sum();
        let (downtime, pause) = (seconds(progress.downtime), part("pause"));
        let unaccounted = downtime - (parts - pause);
        assert!(
            unaccounted.abs() < 0.001 + 0.05 * downtime,
            "{unaccounted} s of {downtime} s: {progress:#?}"
        );

        assert!(
            progress.rounds.len() >= 3,
            "it gave up before it saw that it does not converge: {progress:?}"
        );
        let last = progress.rounds.last().unwrap();
        let copied: f64 = progress.rounds.iter().map(|round| seconds(round.duration)).sum();
        let throughput = progress.transferred_bytes as f64 / copied;
        let needed = last.transferred_bytes as f64 / throughput + part("device_state") + part("harvest");
        eprintln!(
            "{fabric:?}: {} rounds, last {} bytes, downtime {:.1} ms, {:.2} of what it needs ({:.1} ms): {:?}",
            progress.rounds.len(),
            last.transferred_bytes,
            downtime * 1e3,
            downtime / needed,
            needed * 1e3,
            progress
                .downtime_parts
                .iter()
                .map(|part| (&part.name, seconds(part.duration) * 1e3))
                .collect::<Vec<_>>()
        );
    }
}
