//! The account of what a guest is owed is taken from under the agent that goes by it. Where it ends, its pages read as
//! zeros, as if nothing were owed: no page may be let in by that.

use std::fs::OpenOptions;

use ramferry_proto::v1::FabricKind::{Shm, Tcp};

use super::lost::{assert_lost_for_good, owed, owed_and_unneeded};
use crate::faults::stage::Stage;

/// All of the account but its header.
fn truncate(stage: &Stage) {
    let name = format!("state/postcopy/{}.owed", stage.id);
    let account = OpenOptions::new().write(true).open(stage.pair.destination.directory().join(name)).unwrap();
    assert!(account.metadata().unwrap().len() > 4096);
    account.set_len(4096).unwrap();
}

/// The guest ran on nothing that it had not written.
fn assert_saw_nothing_wrong(stage: &Stage) {
    let ticks = stage.receiver.ticks();
    assert!(ticks.iter().all(|(_, tick)| tick.errors == 0), "{:?}", stage.receiver.lines());
}

async fn assert_says_why(stage: &Stage) {
    let ended = stage.pair.destination.wait_end(&stage.id).await;
    let message = ended.error.unwrap().message;
    assert!(message.contains(&format!("{}.owed", stage.id)), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_whose_account_is_truncated_while_it_is_pulled_is_stopped_and_both_agents_say_why() {
    for fabric in [Tcp, Shm] {
        let (mut stage, held) = owed_and_unneeded(fabric).await;
        truncate(&stage);
        drop(held);
        stage.steps.open();
        assert_says_why(&stage).await;
        assert_lost_for_good(&mut stage).await;
        assert_eq!(stage.receiver.status().unwrap(), "paused");
        assert_saw_nothing_wrong(&stage);
    }
}

/// It waits for what it is owed: no zeros are let in in its place.
#[tokio::test(flavor = "multi_thread")]
async fn guest_that_waits_when_its_account_is_truncated_sees_nothing_that_has_not_come() {
    let (mut stage, held) = owed(Tcp).await;
    truncate(&stage);
    drop(held);
    stage.steps.open();
    assert_says_why(&stage).await;
    assert_lost_for_good(&mut stage).await;
    assert_saw_nothing_wrong(&stage);
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_whose_account_is_truncated_while_its_agent_is_away_is_stopped_and_both_agents_say_why() {
    let (mut stage, held) = owed_and_unneeded(Tcp).await;
    stage.pair.destination.kill();
    truncate(&stage);
    drop(held);
    stage.steps.open();
    stage.pair.destination.restart();
    assert_says_why(&stage).await;
    assert_lost_for_good(&mut stage).await;
    assert_eq!(stage.receiver.status().unwrap(), "paused");
    assert_saw_nothing_wrong(&stage);
}
