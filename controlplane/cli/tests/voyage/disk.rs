//! State directories on disks that are full, at each moment when a record must
//! be written: the guest runs at one side, and both agents say so.
//!
//! The disk is a small tmpfs that only the agent sees. A log's first page holds
//! what was written so far, and padding chooses the record that needs a second.

use std::path::PathBuf;
use std::time::Instant;

use ramferry_lab::{Qemu, skipped};
use ramferry_proto::v1;
use tonic::Code;

use crate::harness::{
    Agent, MIB, PATIENCE, Pair, assert_proves_itself, assert_refused, assert_runs_untraced, boot, parameters,
    proof, quiet,
};

const PAGE_BYTES: u64 = 4096;
/// Of a record without fields: header, braces and its name.
const fn record_bytes(name: &str) -> u64 {
    8 + r#"{"record":""}"#.len() as u64 + name.len() as u64
}
const SWITCHING_OVER: u64 = record_bytes("switching_over");
const HANDED_OVER: u64 = record_bytes("handed_over");

/// An agent whose state is on a disk of its own.
struct Small {
    agent: Agent,
    /// As the test sees it.
    state: PathBuf,
}

impl Small {
    fn start() -> Option<Small> {
        if !rustix::process::geteuid().is_root() {
            skipped("only root can mount a small disk");
            return None;
        }
        let agent = Agent::start_on_small_disk();
        let state = agent.directory().join("state");
        let seen = PathBuf::from(format!("/proc/{}/root{}", agent.pid(), state.display()));
        Some(Small { agent, state: seen })
    }

    fn fill(&self) {
        let error = std::fs::write(self.state.join("filler"), [1; 1 << 20]).expect_err("the disk is small");
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }

    fn free(&self) {
        std::fs::remove_file(self.state.join("filler")).unwrap();
    }

    fn log_bytes(&self, id: &str, role: &str) -> u64 {
        std::fs::metadata(self.state.join(format!("journal/{id}.{role}.journal"))).unwrap().len()
    }
}

fn slow() -> v1::MigrationParameters {
    v1::MigrationParameters {
        bandwidth_limit_bits_per_second: 8 * 20 * MIB,
        ..parameters(v1::FabricKind::Tcp)
    }
}

async fn create(pair: &Pair, id: &str, request_id: &str, guest: &Qemu, destination: &str) {
    let spec = pair.spec(&guest.qmp_path(), destination.as_ref(), slow());
    let request = v1::CreateMigrationRequest {
        id: id.into(),
        request_id: request_id.into(),
        spec: Some(spec),
        ..Default::default()
    };
    pair.source.client().await.create_migration(request).await.unwrap();
}

async fn cancel(pair: &Pair, id: &str) {
    let request = v1::CancelMigrationRequest { id: id.into() };
    pair.source.client().await.cancel_migration(request).await.unwrap();
    pair.source.wait_end(id).await;
    pair.destination.wait_end(id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disk_at_either_side_refuses_a_new_migration_and_a_retry_succeeds() {
    let (Some(source), Some(destination)) = (Small::start(), Small::start()) else { return };
    let (source_state, destination_state) = (source.state.clone(), destination.state.clone());
    let pair = Pair { source: source.agent, destination: destination.agent };
    let guest = boot(proof(quiet()));
    for (id, state) in [("at-destination", destination_state), ("at-source", source_state)] {
        let receiver = guest.destination().start().unwrap();
        let filler = state.join("filler");
        std::fs::write(&filler, [1; 1 << 20]).expect_err("the disk is small");
        let result = pair.create(id, &guest, &receiver, parameters(v1::FabricKind::Tcp)).await;
        assert_refused(result, Code::Unavailable, "JOURNAL_UNUSABLE", "free space on its disk");
        std::fs::remove_file(filler).unwrap();
        assert_runs_untraced(&guest);
        // What was made at the destination is given up: its guest does not stay taken.
        let id = format!("{id}-again");
        let start = Instant::now();
        while let Err(status) = pair.create(&id, &guest, &receiver, slow()).await {
            assert!(status.message().contains("one client at a time"), "{status:?}");
            assert!(start.elapsed() < PATIENCE, "{status:?}");
            tokio::task::yield_now().await;
        }
        cancel(&pair, &id).await;
    }
    assert_runs_untraced(&guest);
}

/// Runs a migration whose log at the source is full after `first_bytes` of its first page.
async fn full_at_source(first_bytes: u64) -> Option<(Pair, [Qemu; 2], v1::Migration)> {
    let small = Small::start()?;
    let guest = boot(proof(quiet()));
    let receiver = guest.destination().start().unwrap();
    let qmp = receiver.qmp_path().display().to_string();
    let Small { agent, state } = small;
    let pair = Pair { source: agent, destination: Agent::start() };
    create(&pair, "a", "x", &guest, &qmp).await;
    let small = Small { agent: Agent::start(), state };
    let padding = first_bytes - small.log_bytes("a", "source");
    cancel(&pair, "a").await;
    create(&pair, "b", &"x".repeat(1 + usize::try_from(padding).unwrap()), &guest, &qmp).await;
    small.fill();
    assert_eq!(small.log_bytes("b", "source"), first_bytes, "the records are as long as they were");
    let ended = pair.source.wait_end("b").await;
    small.free();
    Some((pair, [guest, receiver], ended))
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_full_when_the_guest_is_handed_over_lets_it_run_on_at_the_source() {
    let Some((pair, [guest, _], ended)) = full_at_source(PAGE_BYTES - SWITCHING_OVER).await else { return };
    let error = ended.error.clone().unwrap();
    assert_eq!((ended.state(), &*error.reason), (v1::MigrationState::Failed, "JOURNAL_FAILED"));
    assert!(error.message.contains("free space on its disk"), "{error:?}");
    assert_runs_untraced(&guest);
    let there = pair.destination.wait_end("b").await;
    assert_ne!(there.state(), v1::MigrationState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_full_at_the_end_changes_nothing_of_it() {
    let first_bytes = PAGE_BYTES - SWITCHING_OVER - HANDED_OVER;
    let Some((pair, [guest, receiver], ended)) = full_at_source(first_bytes).await else { return };
    assert_eq!(ended.state(), v1::MigrationState::Succeeded, "{:?}", ended.error);
    assert_proves_itself(&receiver);
    assert_ne!(guest.status().unwrap(), "running");
    let log = pair.source.log();
    assert!(log.contains("was not recorded; restart the agent"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn disk_full_at_the_commit_holds_the_guest_until_there_is_room_and_then_it_runs_at_the_source() {
    let Some(small) = Small::start() else { return };
    let Small { agent, state } = small;
    let pair = Pair { source: Agent::start(), destination: agent };
    let small = Small { agent: Agent::start(), state };
    let guest = boot(proof(quiet()));
    let receiver = guest.destination().start().unwrap();
    let qmp = receiver.qmp_path();
    let (directory, name) = (qmp.parent().unwrap().display(), qmp.file_name().unwrap().to_str().unwrap());
    create(&pair, "a", "", &guest, &format!("{directory}/{name}")).await;
    // So that no record but the first fits into the page.
    let padding = PAGE_BYTES - small.log_bytes("a", "destination");
    cancel(&pair, "a").await;
    let slashes = "/".repeat(1 + usize::try_from(padding).unwrap());
    create(&pair, "b", "", &guest, &format!("{directory}{slashes}{name}")).await;
    small.fill();
    assert_eq!(small.log_bytes("b", "destination"), PAGE_BYTES);
    let mut log = String::new();
    let start = Instant::now();
    while !log.contains("took no record") {
        assert!(start.elapsed() < PATIENCE, "{log}");
        log.push_str(&pair.destination.log());
        tokio::task::yield_now().await;
    }
    // Neither COMMITTED nor ABORTED can be written: nobody may run the guest.
    assert_ne!(guest.status().unwrap(), "running");
    small.free();
    let ended = pair.source.wait_end("b").await;
    assert_eq!(ended.state(), v1::MigrationState::Failed, "{:?}", ended.error);
    let there = pair.destination.wait_end("b").await;
    let error = there.error.unwrap();
    assert_eq!(error.reason, "JOURNAL_FAILED");
    assert!(error.message.contains("free space on its disk"), "{error:?}");
    assert_runs_untraced(&guest);
}
