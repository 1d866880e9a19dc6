//! One migration that is held before each of its steps.

use std::time::Duration;

use ramferry_lab::{Fill, Qemu, RamBlock, Workload};
use ramferry_proto::v1;
use ramferry_proto::v1::MigrationState::Succeeded;
use ramferry_proto::v1::Postcopy::Always;

use super::cut::{Proxy, cut_data};
use super::leftovers::{
    Holdings, assert_holds_no_more, assert_no_sockets_left, assert_nothing_kept, assert_unharmed,
};
use super::steps::{Held, Step, Steps};
use crate::harness::{Agent, MIB, PATIENCE, Pair, assert_proves_itself, boot, is_final, parameters};

/// In this round the switchover is forced: it has a first, a middle and a last.
const FORCED_ROUND: u64 = 2;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    SourceAgentKilled,
    DestinationAgentKilled,
    SourceVmmKilled,
    DestinationVmmKilled,
    /// Every connection between the agents ends, and for a while there is no new one.
    LinkCut,
}

/// How the migration would go without the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Course {
    /// To its end.
    Straight,
    /// It is cancelled while it copies, the guest running.
    CancelledInRound,
    /// It is cancelled while it copies, the guest paused.
    CancelledInSwitchover,
    /// The answer to COMMIT is lost.
    AnswerLost,
    /// To its end, by way of post-copy.
    Postcopy,
    /// The same; the network is away for a while just before the destination begins to read.
    PostcopyInterrupted,
}

impl Course {
    fn is_postcopy(self) -> bool {
        matches!(self, Course::Postcopy | Course::PostcopyInterrupted)
    }

    fn parameters(self, fabric: v1::FabricKind) -> v1::MigrationParameters {
        if self.is_postcopy() {
            return v1::MigrationParameters { verify: false, postcopy: Always.into(), ..endless(fabric) };
        }
        endless(fabric)
    }
}

/// Two agents that hold before each step, a guest, and a VMM for it to move to.
pub(crate) struct Stage {
    /// Of the migration that is held.
    pub(crate) id: String,
    pub(crate) pair: Pair,
    pub(crate) proxy: Proxy,
    pub(crate) steps: Steps,
    pub(crate) guest: Qemu,
    pub(crate) receiver: Qemu,
    idle: [Holdings; 2],
}

/// A guest that boots and moves in no time, and proves itself all the same.
pub(crate) fn small() -> Workload {
    Workload { mib: 4, touch_mib: 12, rate_mib: 16, fill: Fill::Zero, tick_ms: 5, ..Workload::default() }
}

/// Rewrites a part of its memory without pause: all of that is owed when it moves by way of post-copy.
pub(crate) fn hot() -> Workload {
    Workload { mib: 16, rate_mib: 0, fill: Fill::Stamp, ..small() }
}

pub(crate) fn small_guest() -> Qemu {
    boot(Qemu::builder().block(RamBlock::node(64 * MIB)).proof(small()))
}

/// Never converges by itself.
pub(crate) fn endless(fabric: v1::FabricKind) -> v1::MigrationParameters {
    v1::MigrationParameters {
        max_downtime: Some(Duration::from_millis(1).try_into().unwrap()),
        no_progress_timeout: Some(Duration::from_secs(3600).try_into().unwrap()),
        ..parameters(fabric)
    }
}

impl Stage {
    pub(crate) async fn set() -> Stage {
        Stage::set_with(held_agents).await
    }

    /// A stage of agents that are started with this step socket.
    /// A stage for `course`.
    pub(crate) async fn set_course(course: Course) -> Stage {
        let workload = if course.is_postcopy() { hot() } else { small() };
        Stage::set_for(boot(Qemu::builder().block(RamBlock::node(64 * MIB)).proof(workload)), held_agents)
            .await
    }

    pub(crate) async fn set_with(agents: impl FnOnce(&str) -> Pair) -> Stage {
        Stage::set_for(small_guest(), agents).await
    }

    pub(crate) async fn set_for(guest: Qemu, agents: impl FnOnce(&str) -> Pair) -> Stage {
        let steps = Steps::listen();
        let pair = agents(&steps.path().display().to_string());
        let proxy = Proxy::to(pair.destination.grpc).await;
        let receiver = guest.destination().start().unwrap();
        let idle = [&pair.source, &pair.destination].map(|agent| Holdings::of(agent.pid()));
        Stage { id: "first".into(), pair, proxy, steps, guest, receiver, idle }
    }

    pub(crate) async fn begin(&self, fabric: v1::FabricKind) {
        self.begin_course(Course::Straight, fabric).await;
    }

    pub(crate) async fn begin_course(&self, course: Course, fabric: v1::FabricKind) {
        self.begin_with(course.parameters(fabric)).await;
    }

    pub(crate) async fn begin_with(&self, parameters: v1::MigrationParameters) {
        let mut spec = self.pair.spec(&self.guest.qmp_path(), &self.receiver.qmp_path(), parameters);
        spec.destination_agent = self.proxy.address.to_string();
        let request =
            v1::CreateMigrationRequest { id: self.id.clone(), spec: Some(spec), ..Default::default() };
        self.pair.source.client().await.create_migration(request).await.unwrap();
    }

    pub(crate) async fn cancel(&self) {
        let request = v1::CancelMigrationRequest { id: self.id.clone() };
        self.pair.source.client().await.cancel_migration(request).await.unwrap();
    }

    /// Does at `step` what `course` has done there.
    pub(crate) async fn steer(&self, course: Course, step: &Step) {
        let is = |role: &str, action: &str| step.role == role && step.step == action;
        if is("source", "copy") && step.round == Some(FORCED_ROUND) {
            let request = v1::ForceSwitchoverRequest { id: self.id.clone() };
            self.pair.source.client().await.force_switchover(request).await.unwrap();
        }
        match course {
            Course::CancelledInRound if is("source", "copy") && step.round == Some(1) => self.cancel().await,
            Course::CancelledInSwitchover if is("source", "copy") && step.phase == "last_copy" => {
                self.cancel().await;
            }
            Course::AnswerLost if is("destination", "answer_running") => {
                self.proxy.cut().await;
                // Only the first answer: the source asks again.
            }
            Course::AnswerLost if is("source", "ask_outcome") => self.proxy.heal(),
            // The guest may not have had a turn since its pages were copied: nothing would be owed.
            Course::Postcopy | Course::PostcopyInterrupted if is("source", "pause_guest") => {
                for _ in 0..2 {
                    self.guest.next_tick(PATIENCE).unwrap();
                }
            }
            Course::PostcopyInterrupted if is("destination", "pull") && step.phase == "resume" => {
                self.proxy.cut().await;
                cut_data(&self.pair.source, self.proxy.address);
            }
            Course::PostcopyInterrupted if is("source", "reconnect") || is("source", "ask_outcome") => {
                self.proxy.heal();
            }
            _ => {}
        }
    }

    /// Lets the migration go on up to the first step that `wanted` accepts.
    pub(crate) async fn hold(&self, course: Course, wanted: impl Fn(&Step) -> bool) -> Held {
        loop {
            let held = self.steps.next();
            if wanted(&held.step) {
                return held;
            }
            self.steer(course, &held.step).await;
        }
    }

    /// Every step to the end of both sides, in the order in which they were seen.
    pub(crate) async fn collect(&self, course: Course) -> Vec<Step> {
        let mut seen: Vec<Step> = Vec::new();
        let ended = |seen: &[Step]| seen.iter().filter(|step| step.step == "finish").count() == 2;
        while !ended(&seen) {
            let held = self.steps.next();
            self.steer(course, &held.step).await;
            seen.push(held.step.clone());
        }
        seen
    }

    /// Lets every step go by until both sides have ended, the `held` one first.
    pub(crate) async fn let_end(&self, held: Held) {
        drop(held);
        self.let_all_end().await;
    }

    /// The same, where no step is held any more.
    pub(crate) async fn let_all_end(&self) {
        while !is_final(self.state(&self.pair.source).await)
            || !is_final(self.state(&self.pair.destination).await)
        {
            drop(self.steps.next_within(Duration::from_millis(10)));
        }
    }

    /// Strikes while `held` waits, lets everything go on, and undoes what can be undone.
    pub(crate) async fn strike(&mut self, fault: Fault, held: Held) {
        match fault {
            Fault::SourceAgentKilled => self.pair.source.kill(),
            Fault::DestinationAgentKilled => self.pair.destination.kill(),
            Fault::SourceVmmKilled => self.guest.kill().unwrap(),
            Fault::DestinationVmmKilled => self.receiver.kill().unwrap(),
            Fault::LinkCut => {
                self.proxy.cut().await;
                cut_data(&self.pair.source, self.proxy.address);
            }
        }
        drop(held);
        self.steps.open();
        match fault {
            Fault::SourceAgentKilled => self.pair.source.restart(),
            Fault::DestinationAgentKilled => self.pair.destination.restart(),
            Fault::LinkCut => self.outage().await,
            Fault::SourceVmmKilled | Fault::DestinationVmmKilled => {}
        }
        self.proxy.heal();
    }

    /// The network stays away until the source has missed it, or did not need it.
    async fn outage(&self) {
        let refused = self.proxy.refused();
        let missed = async {
            let mut looks = tokio::time::interval(Duration::from_millis(10));
            while self.proxy.refused() == refused && !is_final(self.state(&self.pair.source).await) {
                looks.tick().await;
            }
        };
        tokio::time::timeout(PATIENCE, missed).await.expect("the source misses its network");
    }

    async fn state(&self, agent: &Agent) -> v1::MigrationState {
        let request = v1::GetMigrationRequest { id: self.id.clone() };
        let response = agent.client().await.get_migration(request).await.unwrap().into_inner();
        response.migration.unwrap().state()
    }

    /// Waits until both agents have come to an end, which must be the same one;
    /// whether the guest moved.
    pub(crate) async fn agree(&self) -> bool {
        let at_source = self.pair.source.wait_end(&self.id).await;
        let at_destination = self.pair.destination.wait_end(&self.id).await;
        let moved = at_source.state() == Succeeded;
        assert_eq!(
            moved,
            at_destination.state() == Succeeded,
            "the agents disagree: {at_source:#?}\n{at_destination:#?}"
        );
        moved
    }

    /// Exactly one VMM runs the guest; or none, where the one that would was killed. A second migration succeeds.
    pub(crate) async fn assert_one_runs(self, fault: Option<Fault>, fabric: v1::FabricKind) {
        let (moved, killed) = self.assert_settled(fault).await;
        if !killed {
            self.move_again(moved, fabric).await;
        }
    }

    /// Exactly one VMM runs the guest, or none, and nothing else is left. Whether it moved, and whether it was killed.
    pub(crate) async fn assert_settled(&self, fault: Option<Fault>) -> (bool, bool) {
        self.steps.open();
        let moved = self.agree().await;
        let killed = match fault {
            Some(Fault::SourceVmmKilled) => !moved,
            Some(Fault::DestinationVmmKilled) => moved,
            _ => false,
        };
        let running = (runs(&self.guest), runs(&self.receiver));
        let expected = (!moved && !killed, moved && !killed);
        let logs = || format!("{}\n--- destination\n{}", self.pair.source.log(), self.pair.destination.log());
        assert_eq!(running, expected, "source and destination run; moved: {moved}\n{}", logs());
        for (agent, idle) in [(&self.pair.source, &self.idle[0]), (&self.pair.destination, &self.idle[1])] {
            assert_holds_no_more(agent, idle);
            assert_no_sockets_left(agent);
            assert_nothing_kept(agent);
        }
        for vmm in [&self.guest, &self.receiver].into_iter().filter(|vmm| vmm.is_alive()) {
            assert_unharmed(vmm);
        }
        (moved, killed)
    }

    /// The guest runs on, and a second migration of it succeeds.
    async fn move_again(self, moved: bool, fabric: v1::FabricKind) {
        let (pair, runner, other) = if moved {
            (self.pair.swap(), self.receiver, self.guest)
        } else {
            (self.pair, self.guest, self.receiver)
        };
        assert_proves_itself(&runner);
        let waits = !moved && other.is_alive();
        let again = if waits { other } else { runner.destination().start().unwrap() };
        pair.migrate("second", &runner, &again, parameters(fabric)).await;
        assert_proves_itself(&again);
    }
}

/// Agents that hold before each step.
pub(crate) fn held_agents(socket: &str) -> Pair {
    let agent = || Agent::start_with(&["--step-socket", socket]);
    Pair { source: agent(), destination: agent() }
}

/// Whether the guest runs in this VMM.
pub(crate) fn runs(guest: &Qemu) -> bool {
    guest.is_alive() && guest.status().is_ok_and(|status| status == "running")
}
