//! A guest moves over RDMA, and nothing is lost.

use ramferry_lab::{Backing, HugePages, Qemu, RamBlock, Workload};
use ramferry_proto::v1::{self, FabricKind, RegistrationMode};

use crate::faults::leftovers::{Holdings, assert_holds_no_more};
use crate::harness::{MIB, Pair, Site, assert_proves_itself, boot, parameters, seconds};
use crate::rdma::{DESTINATION, Rdma, SOURCE, pinned_kib, pinned_peaks, resources, verbs};

/// A guest that writes all the time.
fn guest(touch_mib: u64) -> Qemu {
    let workload = Workload { mib: 8, touch_mib, rate_mib: 8, ..Workload::default() };
    boot(Qemu::builder().block(RamBlock::node(160 * MIB)).proof(workload))
}

async fn move_once(
    pair: &Pair,
    id: &str,
    guest: &Qemu,
    parameters: v1::MigrationParameters,
) -> v1::Migration {
    let destination = guest.destination().start().unwrap();
    let ended = pair.migrate(id, guest, &destination, parameters).await;
    assert_eq!(ended.fabric(), FabricKind::Verbs, "{}", ended.fabric_reason);
    assert_eq!(ended.verified, parameters.verify.then_some(true));
    assert_eq!(destination.status().unwrap(), "running");
    assert_proves_itself(&destination);
    let progress = ended.progress.as_ref().unwrap();
    eprintln!(
        "{id}: {} MB in {:.2} s, downtime {:.0} ms, {} rounds, {} MB pinned at most, tracker {}",
        progress.transferred_bytes / 1_000_000,
        seconds(progress.total_time),
        seconds(progress.downtime) * 1e3,
        progress.rounds.len(),
        progress.pinned_peak_bytes / 1_000_000,
        ended.tracker
    );
    ended
}

#[tokio::test(flavor = "multi_thread")]
async fn running_guest_moves_in_every_mode() {
    let rdma = Rdma::start();
    for (mode, streams) in
        [(RegistrationMode::Dynamic, 1), (RegistrationMode::PinAll, 2), (RegistrationMode::Dynamic, 4)]
    {
        let parameters = v1::MigrationParameters { registration_mode: mode.into(), streams, ..verbs() };
        move_once(&rdma.pair, &format!("{mode:?}-{streams}"), &guest(32), parameters).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pin_budget_of_64_mib_is_kept_and_the_guest_arrives() {
    let rdma = Rdma::start();
    let parameters = v1::MigrationParameters { pin_budget_bytes: 64 * MIB, ..verbs() };
    let guest = guest(96);
    let moved = move_once(&rdma.pair, "budget", &guest, parameters);
    let (ended, peaks) = pinned_peaks(&rdma.pair, moved).await;
    let progress = ended.progress.unwrap();
    assert!(progress.pinned_peak_bytes > 0 && progress.pinned_peak_bytes <= 64 * MIB, "{progress:?}");
    assert!(peaks.iter().all(|peak| (48 * MIB..=64 * MIB).contains(peak)), "VmPin was {peaks:?}");
    assert!(
        progress.registered_bytes > 64 * MIB,
        "windows were released and others registered: {progress:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_that_runs_before_its_memory_is_there_reads_it_over_verbs() {
    let rdma = Rdma::start();
    for (mode, pin_budget_bytes) in
        [(RegistrationMode::Dynamic, 0), (RegistrationMode::PinAll, 0), (RegistrationMode::Dynamic, 32 * MIB)]
    {
        let parameters = v1::MigrationParameters {
            postcopy: v1::Postcopy::Always.into(),
            registration_mode: mode.into(),
            pin_budget_bytes,
            verify: false,
            ..verbs()
        };
        let id = format!("postcopy-{mode:?}-{pin_budget_bytes}");
        let guest = guest(32);
        let (ended, peaks) = pinned_peaks(&rdma.pair, move_once(&rdma.pair, &id, &guest, parameters)).await;
        let budget_bytes = if pin_budget_bytes == 0 { u64::MAX } else { pin_budget_bytes };
        assert!(peaks.iter().all(|peak| (1..=budget_bytes).contains(peak)), "VmPin was {peaks:?}");
        let progress = ended.progress.unwrap();
        assert!(progress.postcopy && progress.postcopy_time.is_some(), "{progress:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_pages_move() {
    let pages = HugePages::reserve(2 * 128 * MIB).unwrap();
    let rdma = Rdma::start();
    let block = RamBlock::node(128 * MIB).on(Backing::HugeTlbfs(pages.mount().to_owned()));
    let workload = Workload { mib: 8, touch_mib: 48, rate_mib: 8, ..Workload::default() };
    let guest = boot(Qemu::builder().block(block).proof(workload));
    move_once(&rdma.pair, "huge", &guest, verbs()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_backends_move() {
    let rdma = Rdma::start();
    let guest = Qemu::builder()
        .block(RamBlock::node(96 * MIB))
        .block(RamBlock::node(32 * MIB).on(Backing::TmpfsUnlinked))
        .block(RamBlock::dimm(128 * MIB))
        .proof(Workload { mib: 8, touch_mib: 48, rate_mib: 8, ..Workload::default() });
    move_once(&rdma.pair, "backends", &boot(guest), verbs()).await;
}

/// Two hosts in one VM have one boot id: one agent is shown another.
#[tokio::test(flavor = "multi_thread")]
async fn auto_takes_verbs_between_hosts_that_both_have_a_device_and_tcp_where_one_has_none() {
    const OTHER: &str = r#"mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@""#;
    let directory = tempfile::tempdir().unwrap();
    let boot_id = directory.path().join("boot_id");
    std::fs::write(&boot_id, "11111111-2222-3333-4444-555555555555\n").unwrap();
    let mut enter: Vec<String> =
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", OTHER].map(Into::into).into();
    enter.push(boot_id.display().to_string());
    let elsewhere = Site { enter, ..Site::here() };

    let mut rdma = Rdma::start();
    rdma.pair.destination = rdma.agent(DESTINATION, elsewhere.clone(), &[]);
    let auto = parameters(FabricKind::Unspecified);
    let ended = move_once(&rdma.pair, "auto", &guest(32), auto).await;
    assert!(ended.fabric_reason.contains(DESTINATION.device), "{}", ended.fabric_reason);

    rdma.pair.destination = rdma.agent(DESTINATION, elsewhere, &["--rdma-listen", "off"]);
    let guest = guest(32);
    let receiver = guest.destination().start().unwrap();
    let ended = rdma.pair.migrate("without", &guest, &receiver, auto).await;
    assert_eq!(ended.fabric(), FabricKind::Tcp);
    assert!(ended.fabric_reason.contains("rdma_listen is off"), "{}", ended.fabric_reason);
    assert_proves_itself(&receiver);
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_migrations_in_a_row_leave_nothing_behind() {
    let mut rdma = Rdma::start();
    let workload = Workload { mib: 4, touch_mib: 12, rate_mib: 8, ..Workload::default() };
    let mut guest = boot(Qemu::builder().block(RamBlock::node(64 * MIB)).proof(workload));
    let modes = [RegistrationMode::Dynamic, RegistrationMode::PinAll];
    let mut before = None;
    for turn in 0..20 {
        let parameters = v1::MigrationParameters { registration_mode: modes[turn % 2].into(), ..verbs() };
        let receiver = guest.destination().start().unwrap();
        rdma.pair.migrate(&format!("turn-{turn}"), &guest, &receiver, parameters).await;
        assert_proves_itself(&receiver);
        guest = receiver;
        rdma.pair = rdma.pair.swap();
        // After one there and one back each has been both, and opened its device.
        if turn == 1 {
            let agents = [&rdma.pair.source, &rdma.pair.destination];
            before = Some(agents.map(|agent| (Holdings::of(agent.pid()), resources(agent.pid()).len())));
        }
    }
    let before = before.unwrap();
    for (agent, (holdings, held)) in [&rdma.pair.source, &rdma.pair.destination].into_iter().zip(before) {
        assert_holds_no_more(agent, &holdings);
        let now = resources(agent.pid());
        assert_eq!(now.len(), held, "{now:#?}");
        assert_eq!(pinned_kib(agent.pid()), 0);
    }
    eprintln!("20 migrations between {} and {}: nothing left", SOURCE.device, DESTINATION.device);
}
