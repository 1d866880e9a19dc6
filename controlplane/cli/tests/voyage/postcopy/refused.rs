//! Destinations whose accesses to guest RAM cannot all be made to wait.

use ramferry_lab::Qemu;
use ramferry_proto::v1;
use ramferry_proto::v1::FabricKind::Tcp;
use ramferry_ram::{Access, Mapping, RamFile};
use tonic::{Code, Status};

use super::into_postcopy;
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
