//! A toy agent at the destination: carries out what its machine orders.

use ramferry_engine::{
    Destination, DestinationAction, DestinationEvent, DestinationOutcome, Failure, Reason,
};

use crate::checker::Violation;
use crate::faults::{Fate, Sabotage};
use crate::journal::{Journal, Record};
use crate::network::{Message, Side};
use crate::world::{Effect, Happening, PAGES, Reply, World, microseconds};

#[derive(Debug)]
pub(crate) struct DestinationAgent {
    machine: Destination,
    pub(crate) is_up: bool,
    pub(crate) life: u32,
    /// The tick that counts.
    pub(crate) wake: u32,
    pub(crate) journal: Journal,
    pub(crate) outcome: Option<DestinationOutcome>,
    /// Its memory is registered.
    pub(crate) takes_writes: bool,
    /// Zero pages that came and are not applied.
    pub(crate) zeroing: u32,
}

impl DestinationAgent {
    pub(crate) fn new() -> Self {
        Self {
            machine: Destination::new(),
            is_up: true,
            life: 0,
            wake: 0,
            journal: Journal::default(),
            outcome: None,
            takes_writes: true,
            zeroing: 0,
        }
    }

    /// Whether the destination says that the guest runs here, once it says anything.
    pub(crate) fn says_running(&self) -> Option<bool> {
        self.outcome.as_ref().map(|outcome| *outcome == DestinationOutcome::Running)
    }

    pub(crate) fn says_lost(&self) -> bool {
        matches!(self.outcome, Some(DestinationOutcome::Lost(_)))
    }
}

/// What the journal leaves to be done after a restart.
pub(crate) fn restart(world: &mut World) {
    let agent = &mut world.destination;
    agent.life += 1;
    agent.is_up = true;
    agent.takes_writes = false;
    agent.zeroing = 0;
    if world.sabotage == Sabotage::ForgetOwed {
        world.owed.pages = [false; PAGES];
    }
    agent.machine = match agent.journal.records.last() {
        // Its end answers for it.
        Some(Record::Lost) => return,
        Some(Record::Committed) if world.owed.any() => Destination::recover_postcopy(),
        Some(Record::Committed) => Destination::recover_committed(),
        Some(Record::Aborted(cause)) => Destination::recover_aborted(cause.clone()),
        _ => Destination::recover_prepared(),
    };
    agent.outcome = None;
    let life = agent.life;
    world.destination_hears(life, DestinationEvent::Start);
}

impl World {
    /// The machine hears `event`, if it is still that of `life`, and has its orders carried out.
    pub(crate) fn destination_hears(&mut self, life: u32, event: DestinationEvent) {
        if !self.is_alive(Side::Destination, life) {
            return;
        }
        if event != DestinationEvent::Tick {
            self.note(&format!("Destination hears {event:?}"));
        }
        let mut actions = Vec::new();
        self.destination.machine.handle(self.now, event, &mut actions);
        for action in actions {
            let Some(fate) = self.begin_action(Side::Destination, life, &format!("{action:?}")) else {
                return;
            };
            perform(self, action, fate);
        }
        self.destination.wake += 1;
        if let Some(deadline) = self.destination.machine.deadline() {
            let wake = self.destination.wake;
            self.at(deadline, Happening::Tick { side: Side::Destination, life, wake });
        }
    }
}

fn perform(world: &mut World, action: DestinationAction, fate: Fate) {
    let life = world.destination.life;
    let sabotage = world.sabotage;
    let mut act = |delay, effect, event| {
        world.act(Side::Destination, microseconds(delay), effect, Reply::Destination(event), fate);
    };
    let mut message = None;
    match action {
        DestinationAction::Prepare => act(1000, Effect::Nothing, DestinationEvent::Prepared),
        DestinationAction::DrainRound { round } => {
            world.after(microseconds(100), Happening::Drained { life, round, fate });
        }
        DestinationAction::AcknowledgeRound { round } => message = Some(Message::RoundEnded(round)),
        DestinationAction::StartIncoming { postcopy } => {
            act(1000, Effect::WaitForDeviceState { postcopy }, DestinationEvent::IncomingReady);
        }
        DestinationAction::TellIncomingReady => message = Some(Message::IncomingReady),
        DestinationAction::Digest => world.after(microseconds(1000), Happening::Digest { life, fate }),
        DestinationAction::TellDeviceStateLoaded => message = Some(Message::DeviceStateLoaded),
        DestinationAction::WriteCommitted => {
            let reply = Reply::Destination(DestinationEvent::CommittedSynced);
            world.write(Side::Destination, Record::Committed, reply, fate);
            if sabotage == Sabotage::ResumeBeforeCommitted {
                world.resume_destination();
            }
        }
        DestinationAction::HoldOwed { pages } => {
            act(300, Effect::HoldOwed(pages), DestinationEvent::OwedHeld);
        }
        DestinationAction::TellOwedAccepted => message = Some(Message::OwedAccepted),
        DestinationAction::ResumeGuest => resume(world, fate),
        DestinationAction::Pull => world.pull(fate),
        DestinationAction::StopGuest => stop(world, fate),
        DestinationAction::AnswerRunning { memory_owed } => message = Some(Message::Running(memory_owed)),
        DestinationAction::AnswerLost(cause) => message = Some(Message::Lost(cause)),
        DestinationAction::WriteAborted(_) if sabotage == Sabotage::AbortWithoutRecord => {
            act(1000, Effect::Nothing, DestinationEvent::AbortedSynced);
        }
        DestinationAction::WriteAborted(cause) => {
            let reply = Reply::Destination(DestinationEvent::AbortedSynced);
            world.write(Side::Destination, Record::Aborted(cause), reply, fate);
        }
        DestinationAction::DiscardGuest => act(500, Effect::Discard, DestinationEvent::GuestDiscarded),
        DestinationAction::AnswerAborted(cause) => message = Some(Message::Aborted(cause)),
        DestinationAction::Release => {
            act(1000, Effect::Nothing, DestinationEvent::Released);
            world.destination.takes_writes = false;
            world.owed.is_armed = world.owed.any();
            world.cut_links();
        }
        DestinationAction::Finish(outcome) => {
            let first = world.destination.outcome.is_none();
            world.checker.require(first, Violation::WrongOutcome);
            if let DestinationOutcome::Lost(_) = outcome {
                world.destination.journal.records.push(Record::Lost);
                world.destination.journal.sync();
            }
            world.destination.outcome = Some(outcome);
        }
    }
    if let Some(message) = message {
        world.send(Side::Destination, message, fate);
    }
}

fn resume(world: &mut World, fate: Fate) {
    let reply = if world.destination_vmm.dead {
        DestinationEvent::GuestGone(Failure::new(Reason::GuestFailed, "the VMM ended"))
    } else {
        DestinationEvent::GuestResumed
    };
    let reply = Reply::Destination(reply);
    let effect = Effect::ResumeDestination { order: world.destination_vmm.pause_order };
    world.act(Side::Destination, microseconds(300), effect, reply, fate);
}

fn stop(world: &mut World, fate: Fate) {
    if fate.has_effect() {
        world.destination_vmm.pause_order += 1;
    }
    let reply = Reply::Destination(DestinationEvent::GuestStopped);
    world.act(Side::Destination, microseconds(300), Effect::StopDestination, reply, fate);
}

pub(crate) fn digest(world: &mut World, life: u32, fate: Fate) {
    if !world.is_alive(Side::Destination, life) || fate == Fate::Mute {
        return;
    }
    if let Fate::Fail { .. } = fate {
        let failure = Failure::new(Reason::Internal, "injected");
        return world.destination_hears(life, DestinationEvent::Failed(failure));
    }
    let digests = Message::Digests(world.destination_vmm.ram.to_vec());
    world.send(Side::Destination, digests, fate);
    world.destination_hears(life, DestinationEvent::Verified);
}

/// Once all zero pages that came are applied.
pub(crate) fn drained(world: &mut World, life: u32, round: u32, fate: Fate) {
    if !world.is_alive(Side::Destination, life) || fate == Fate::Mute {
        return;
    }
    if world.destination.zeroing > 0 {
        return world.after(microseconds(100), Happening::Drained { life, round, fate });
    }
    let event = if world.link.is_none() || matches!(fate, Fate::Fail { .. }) {
        DestinationEvent::Failed(Failure::new(Reason::LinkLost, "the link died"))
    } else {
        DestinationEvent::RoundDrained { round }
    };
    world.destination_hears(life, event);
}

pub(crate) fn arrives(world: &mut World, message: Message) {
    let life = world.destination.life;
    let event = match message {
        Message::ZeroPage(page) => return zero(world, page),
        Message::EndRound(round) => DestinationEvent::EndRound { round },
        Message::PrepareIncoming(postcopy) => DestinationEvent::PrepareIncoming { postcopy },
        Message::Owed(pages) => DestinationEvent::Owed { pages },
        Message::MemoryLost(cause) => DestinationEvent::MemoryLost(cause),
        Message::Verify => DestinationEvent::Verify,
        Message::DeviceState(state) => return load(world, life, state),
        Message::Commit => DestinationEvent::Commit,
        Message::Ask => DestinationEvent::AskOutcome,
        Message::Abort(failure) => DestinationEvent::Abort(failure),
        other => panic!("{other:?} to the destination"),
    };
    world.destination_hears(life, event);
}

/// Once all zero pages that came are applied: the VMM reads RAM while it loads.
pub(crate) fn load(world: &mut World, life: u32, state: u64) {
    if !world.is_alive(Side::Destination, life) {
        return;
    }
    if world.destination.zeroing > 0 && world.sabotage != Sabotage::LoadBeforeZeroPages {
        return world.after(microseconds(20), Happening::Loads { life, state });
    }
    let in_order = ["receive_last", "drain"].contains(&world.destination.machine.phase());
    if in_order && !world.source_vmm.running {
        let is_whole = world.has_the_rest();
        world.vmm_accesses();
        world.checker.require(is_whole, Violation::Differs);
    }
    let reply = Reply::Destination(DestinationEvent::DeviceStateLoaded);
    let effect = Effect::LoadDeviceState(state);
    world.act(Side::Destination, microseconds(500), effect, reply, Fate::Normal);
}

fn zero(world: &mut World, page: usize) {
    if world.destination.takes_writes {
        world.destination.zeroing += 1;
        let takes = microseconds(if world.random.chance(4) { 4000 } else { 150 });
        world.act(Side::Destination, takes, Effect::Zero(page), Reply::None, Fate::Normal);
    }
}
