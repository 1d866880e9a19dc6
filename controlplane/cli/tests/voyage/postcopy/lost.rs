//! A source that is away, or gone for good, while its guest runs elsewhere and is owed memory.

use std::fs::OpenOptions;
use std::time::Duration;

use ramferry_lab::{Qemu, RamBlock};
use ramferry_proto::v1::FabricKind::{self, Shm, Tcp};
use ramferry_proto::v1::MigrationState::{Failed, Postcopy, Succeeded};

use crate::faults::cut::cut_data;
use crate::faults::leftovers::{assert_nothing_kept, assert_unharmed};
use crate::faults::stage::{Course, Stage, hot, runs};
use crate::faults::steps::Held;
use crate::harness::{Agent, MIB, PATIENCE, Pair, assert_proves_itself, boot};

/// Time in which a guest that could run would have ticked many times.
const LONG: Duration = Duration::from_millis(500);

/// A guest that was moved, and is owed much of its memory; it waits for what it touches of that.
pub(super) async fn owed(fabric: FabricKind) -> (Stage, Held) {
    owed_of(Stage::set_course(Course::Postcopy).await, fabric).await
}

async fn owed_of(stage: Stage, fabric: FabricKind) -> (Stage, Held) {
    stage.begin_course(Course::Postcopy, fabric).await;
    let held = stage.hold(Course::Postcopy, |step| step.to_string() == "destination resume_guest").await;
    (stage, held)
}

/// The same, of a guest that stopped writing: it was let at what it touches, and waits for nothing.
pub(super) async fn owed_and_unneeded(fabric: FabricKind) -> (Stage, Held) {
    let stage = Stage::set_course(Course::Postcopy).await;
    stage.begin_course(Course::Postcopy, fabric).await;
    let held = stage.hold(Course::Postcopy, |step| step.to_string() == "source pause_guest 1").await;
    let held = owe_what_is_not_needed(&stage, held).await;
    (stage, held)
}

/// Goes on from where the guest is about to be paused. It has been let at what it touches, and is owed the rest.
pub(crate) async fn owe_what_is_not_needed(stage: &Stage, about_to_pause: Held) -> Held {
    stage.guest.next_tick(PATIENCE).unwrap();
    stage.guest.pause_writing(PATIENCE).unwrap();
    drop(about_to_pause);
    let held = stage.hold(Course::Postcopy, |step| step.to_string() == "destination pull").await;
    for _ in 0..3 {
        stage.receiver.next_tick(PATIENCE).unwrap();
    }
    held
}

/// The guest's RAM file loses all but its first page.
pub(crate) fn truncate(guest: &Qemu) {
    let path = guest.ram_files()[0].as_ref().unwrap();
    OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap();
}

/// Source VMM and source agent end, and the RAM with them; the agent comes back.
fn lose_host(stage: &mut Stage) {
    stage.pair.source.kill();
    stage.guest.kill().unwrap();
    std::fs::remove_file(stage.guest.ram_files()[0].as_ref().unwrap()).unwrap();
}

async fn assert_lost(agent: &Agent, id: &str) {
    let ended = agent.wait_end(id).await;
    let error = ended.error.clone().unwrap_or_default();
    assert_eq!((ended.state(), error.reason.as_str()), (Failed, "MEMORY_LOST"), "{error:?}");
    assert!(error.message.contains("start it again"), "{}", error.message);
}

/// Both agents say so, and say it again after a restart; nobody runs the guest.
pub(super) async fn assert_lost_for_good(stage: &mut Stage) {
    for _ in 0..2 {
        assert_lost(&stage.pair.source, &stage.id).await;
        assert_lost(&stage.pair.destination, &stage.id).await;
        assert!(!runs(&stage.guest) && !runs(&stage.receiver));
        assert_nothing_kept(&stage.pair.source);
        assert_nothing_kept(&stage.pair.destination);
        stage.pair.source.restart();
        stage.pair.destination.restart();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_whose_source_host_is_gone_is_stopped_and_both_agents_say_why() {
    let (mut stage, held) = owed_and_unneeded(Tcp).await;
    lose_host(&mut stage);
    drop(held);
    stage.steps.open();
    stage.pair.source.restart();
    assert_lost_for_good(&mut stage).await;
    assert_eq!(stage.receiver.status().unwrap(), "paused");
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_whose_source_ram_was_truncated_is_stopped_and_both_agents_say_why() {
    for fabric in [Tcp, Shm] {
        let (mut stage, held) = owed_and_unneeded(fabric).await;
        truncate(&stage.guest);
        drop(held);
        stage.steps.open();
        assert_lost_for_good(&mut stage).await;
        assert_eq!(stage.receiver.status().unwrap(), "paused");
    }
}

/// It waits in the kernel for what never comes, so that its VMM cannot stop it.
#[tokio::test(flavor = "multi_thread")]
async fn vmm_of_a_guest_that_waits_for_what_is_lost_is_ended() {
    let (mut stage, held) = owed(Shm).await;
    lose_host(&mut stage);
    drop(held);
    stage.steps.open();
    stage.pair.source.restart();
    assert_lost_for_good(&mut stage).await;
    assert!(!stage.receiver.is_alive());
}

/// What the destination says of a source that it waits for.
async fn assert_waits(stage: &Stage) {
    // At first it may say which link was lost.
    let in_trouble = |migration: &ramferry_proto::v1::Migration| {
        migration.state() == Postcopy && migration.trouble.contains("see that both agents run")
    };
    let seen = stage.pair.destination.wait(&stage.id, in_trouble).await;
    assert!(seen.trouble.contains("(for "), "{}", seen.trouble);
    assert!(seen.progress.unwrap().remaining_bytes > 0);
    let ticks = stage.receiver.ticks().len();
    tokio::time::sleep(LONG).await;
    assert_eq!(stage.receiver.ticks().len(), ticks, "the guest ran on without its memory");
    assert!(stage.receiver.is_alive());
}

async fn assert_completes(stage: Stage) {
    for agent in [&stage.pair.source, &stage.pair.destination] {
        assert_eq!(agent.wait_end(&stage.id).await.state(), Succeeded, "{}", agent.log());
        assert_nothing_kept(agent);
    }
    assert_proves_itself(&stage.receiver);
    assert_unharmed(&stage.receiver);
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_waits_for_a_source_agent_that_is_away_and_goes_on_when_it_is_back() {
    for fabric in [Tcp, Shm] {
        let (mut stage, held) = owed(fabric).await;
        stage.pair.source.kill();
        drop(held);
        stage.steps.open();
        assert_waits(&stage).await;
        stage.pair.source.restart();
        assert_completes(stage).await;
    }
}

/// Both agents end, the destination's twice: the VMM waits all the while.
#[tokio::test(flavor = "multi_thread")]
async fn guest_waits_while_neither_agent_runs_and_goes_on_when_both_are_back() {
    let (mut stage, held) = owed(Tcp).await;
    stage.pair.source.kill();
    drop(held);
    stage.steps.open();
    stage.pair.destination.kill();
    let ticks = stage.receiver.ticks().len();
    tokio::time::sleep(LONG).await;
    stage.pair.destination.restart();
    stage.pair.destination.restart();
    assert_eq!(stage.receiver.ticks().len(), ticks, "the guest ran on without its memory");
    let series = stage.pair.destination.scrape();
    assert!(series.contains("ramferry_postcopy_bytes_total{fabric=\"tcp\"} 0"), "{series}");
    assert!(!series.contains("fabric=\"unknown\""), "{series}");
    stage.pair.source.restart();
    assert_completes(stage).await;
}

/// The VMM's main loop waits for memory, and so answers nobody: neither does a new agent need it to.
#[tokio::test(flavor = "multi_thread")]
async fn agents_that_come_back_need_no_answer_of_a_vmm_that_waits() {
    let (mut stage, held) = owed(Shm).await;
    stage.pair.source.kill();
    drop(held);
    stage.steps.open();
    stage.pair.destination.kill();
    let saved = stage.receiver.directory().join("saved");
    let read_all = serde_json::json!({
        "execute": "pmemsave",
        "arguments": { "val": 0, "size": 64 * MIB, "filename": saved.display().to_string() },
    });
    std::thread::scope(|scope| {
        let (receiver, pair) = (&stage.receiver, &mut stage.pair);
        let reading = scope.spawn(move || receiver.qmp(&read_all));
        std::thread::sleep(LONG);
        assert!(!reading.is_finished(), "the VMM read memory that has not come");
        pair.destination.restart();
        std::thread::sleep(LONG);
        assert!(!reading.is_finished(), "the VMM read memory that has not come");
        pair.source.restart();
        reading.join().unwrap().unwrap();
    });
    assert_completes(stage).await;
}

/// Each time the source offers its memory anew; what is offered is not thrown away for ever.
#[tokio::test(flavor = "multi_thread")]
async fn network_that_comes_and_goes_does_not_keep_a_guest_from_its_memory() {
    for fabric in [Tcp, Shm] {
        let (stage, held) = owed(fabric).await;
        stage.proxy.cut().await;
        cut_data(&stage.pair.source, stage.proxy.address);
        drop(held);
        stage.steps.open();
        for pause in [0, 1, 5, 10, 20, 50, 100, 200] {
            stage.proxy.heal();
            tokio::time::sleep(Duration::from_millis(pause)).await;
            stage.proxy.cut().await;
            cut_data(&stage.pair.source, stage.proxy.address);
        }
        stage.proxy.heal();
        assert_completes(stage).await;
    }
}

/// An agent that is told to stop in post-copy leaves the VMM waiting, and the next one goes on.
#[tokio::test(flavor = "multi_thread")]
async fn agents_that_are_told_to_stop_in_postcopy_go_on_when_they_are_started_again() {
    let impatient = |socket: &str| {
        let agent = || Agent::start_with(&["--step-socket", socket, "--shutdown-grace", "1s"]);
        Pair { source: agent(), destination: agent() }
    };
    let guest = boot(Qemu::builder().block(RamBlock::node(64 * MIB)).proof(hot()));
    let (mut stage, held) = owed_of(Stage::set_for(guest, impatient).await, Tcp).await;
    stage.pair.source.kill();
    drop(held);
    stage.steps.open();
    assert!(stage.pair.destination.stop().success());
    let ticks = stage.receiver.ticks().len();
    tokio::time::sleep(LONG).await;
    assert_eq!(stage.receiver.ticks().len(), ticks, "the guest ran on without its memory");
    stage.pair.source.restart();
    // The source's is told before it has heard from the destination's.
    assert!(stage.pair.source.stop().success());
    stage.pair.destination.restart();
    stage.pair.source.restart();
    assert_completes(stage).await;
}
