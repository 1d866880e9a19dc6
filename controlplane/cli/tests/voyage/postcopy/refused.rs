//! Destinations whose accesses to guest RAM cannot all be made to wait.

use ramferry_lab::Qemu;
use ramferry_proto::v1;
use ramferry_proto::v1::FabricKind::{Shm, Tcp};
use ramferry_proto::v1::MigrationState::Failed;
use ramferry_ram::{Access, Mapping, RamFile};
use tonic::{Code, Status};

use super::into_postcopy;
use crate::faults::stage::{Course, Stage, runs};
use crate::harness::{MIB, Pair, assert_proves_itself, assert_refused, boot, parameters, proof, quiet};

async fn check(pair: &Pair, guest: &Qemu, destination: &Qemu) -> Result<v1::Migration, Status> {
    let parameters = into_postcopy(Tcp, v1::Postcopy::Allow);
    let spec = pair.spec(&guest.qmp_path(), &destination.qmp_path(), parameters);
    let request = v1::CheckMigrationRequest { spec: Some(spec) };
    let checked = pair.source.client().await.check_migration(request).await;
    checked.map(|_| v1::Migration::default())
}

#[tokio::test(flavor = "multi_thread")]
async fn destination_whose_ram_another_process_maps_is_refused_by_name() {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    let path = destination.ram_files()[0].as_ref().unwrap();
    let file = RamFile::open(path, Access::ReadWrite).unwrap();
    let mapping = Mapping::new(&file, 256 * MIB, Access::ReadWrite).unwrap();
    let ours = format!("process {} (", std::process::id());
    let refused = "POSTCOPY_UNAVAILABLE";
    assert_refused(check(&pair, &guest, &destination).await, Code::FailedPrecondition, refused, &ours);
    for when in [v1::Postcopy::Allow, v1::Postcopy::Always] {
        let result = pair.create("refused", &guest, &destination, into_postcopy(Tcp, when)).await;
        assert_refused(result, Code::FailedPrecondition, refused, &ours);
    }
    drop((mapping, file));
    check(&pair, &guest, &destination).await.unwrap();
    // Without post-copy nobody has to wait.
    pair.migrate("moved", &guest, &destination, parameters(Tcp)).await;
    assert_proves_itself(&destination);
}

/// All that was looked at before the copy was in order; the process comes while the guest stands still, and what it will be owed
/// is being written down. It would read, or write, what has not come.
#[tokio::test(flavor = "multi_thread")]
async fn process_that_maps_the_ram_when_it_is_known_what_is_owed_keeps_the_guest_at_its_source() {
    for (fabric, access) in [(Tcp, Access::Read), (Shm, Access::ReadWrite)] {
        let stage = Stage::set_course(Course::Postcopy).await;
        stage.begin_course(Course::Postcopy, fabric).await;
        let held = stage.hold(Course::Postcopy, |step| step.to_string() == "destination hold_owed").await;
        assert!(!runs(&stage.guest) && !runs(&stage.receiver));
        let file = RamFile::open(stage.receiver.ram_files()[0].as_ref().unwrap(), access).unwrap();
        let mapping = Mapping::new(&file, 64 * MIB, access).unwrap();
        stage.let_end(held).await;
        let ours = format!("process {} (", std::process::id());
        for agent in [&stage.pair.source, &stage.pair.destination] {
            let ended = agent.wait_end(&stage.id).await;
            let error = ended.error.clone().unwrap_or_default();
            assert_eq!(ended.state(), Failed, "{error:?}");
            assert!(error.message.contains(&ours), "{error:?} does not say {ours}");
        }
        assert!(runs(&stage.guest));
        drop((mapping, file));
        stage.assert_one_runs(None, fabric).await;
    }
}
