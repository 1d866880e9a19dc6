//! A toy agent at the source: carries out what its machine orders.

use std::time::Duration;

use ramferry_engine::{
    Failure, FixedCosts, LateWrites, Outcome, Parameters, Percent, Postcopy, Progress, Reason, Source,
    SourceAction, SourceEvent,
};
use ramferry_ram::{BlockIndex, PageSets};

use crate::checker::Violation;
use crate::faults::{Fate, Sabotage};
use crate::journal::{Journal, Record};
use crate::network::{Message, Side};
use crate::world::{
    Effect, Happening, PAGE_BYTES, PAGES, Page, Reply, World, ZERO, insert, microseconds, no_pages,
};

const PAGE_TIME: Duration = Duration::from_millis(1);
const PAUSE_TIME: Duration = Duration::from_millis(5);

#[derive(Debug)]
struct Copying {
    pages: PageSets,
    next: usize,
    began_at: Duration,
    data_bytes: u64,
    zero_bytes: u64,
    stop: bool,
    fate: Fate,
}

#[derive(Debug)]
pub(crate) struct SourceAgent {
    machine: Source,
    pub(crate) is_up: bool,
    pub(crate) life: u32,
    /// The tick that counts.
    pub(crate) wake: u32,
    pub(crate) began_at: Duration,
    pub(crate) journal: Journal,
    pub(crate) outcome: Option<Outcome>,
    seed: u64,
    verify: bool,
    postcopy: Postcopy,
    throttle: Option<Percent>,
    pub(crate) throttle_ordered: Percent,
    copy: u32,
    copying: Option<Copying>,
    /// What each page held when it was last sent.
    sent: [Option<Page>; PAGES],
    pausing: Option<Fate>,
    verifying: Option<Fate>,
    /// Its VMM's device state.
    saved: Option<u64>,
}

impl SourceAgent {
    pub(crate) fn new(seed: u64, verify: bool, postcopy: Postcopy, throttle: Option<Percent>) -> Self {
        Self {
            machine: Source::new(parameters(seed, verify, postcopy, throttle)).unwrap(),
            is_up: true,
            life: 0,
            wake: 0,
            began_at: Duration::ZERO,
            journal: Journal::default(),
            outcome: None,
            seed,
            verify,
            postcopy,
            throttle,
            throttle_ordered: Percent(0),
            copy: 0,
            copying: None,
            sent: [None; PAGES],
            pausing: None,
            verifying: None,
            saved: None,
        }
    }

    /// A fresh one, for the next migration of the same guest.
    pub(crate) fn again(&self, verify: bool) -> Self {
        Self::new(self.seed, verify, self.postcopy, self.throttle)
    }

    pub(crate) fn says_lost(&self) -> bool {
        matches!(self.outcome, Some(Outcome::Lost(_)))
    }

    pub(crate) fn progress(&self) -> &Progress {
        self.machine.progress()
    }

    pub(crate) fn can_cancel(&self) -> bool {
        self.is_up && self.outcome.is_none() && self.machine.can_cancel()
    }

    /// Where the source says that the guest is, once it says so.
    pub(crate) fn says_moved(&self) -> Option<bool> {
        self.outcome.as_ref().map(|outcome| *outcome == Outcome::Succeeded)
    }
}

/// Where post-copy is allowed, the timeout comes somewhere in the first rounds.
fn parameters(seed: u64, verify: bool, postcopy: Postcopy, throttle: Option<Percent>) -> Parameters {
    let timeout = (postcopy == Postcopy::Allow).then(|| Duration::from_millis(1 + seed % 37));
    let max_downtime = Duration::from_millis(15);
    Parameters { max_downtime, verify, postcopy, throttle, timeout, ..Parameters::default() }
}

/// What the journal leaves to be done after a restart.
pub(crate) fn restart(world: &mut World) {
    let agent = &mut world.source;
    agent.life += 1;
    agent.is_up = true;
    (agent.copying, agent.pausing, agent.verifying) = (None, None, None);
    // What a dead agent held is gone with it, where nobody else does.
    world.owed.is_lost |= world.source_vmm.dead;
    // By what it kept of it, whatever the journal says.
    world.source_vmm.throttle = Percent(0);
    let parameters = parameters(agent.seed, agent.verify, agent.postcopy, agent.throttle);
    match agent.journal.records.last() {
        Some(Record::Ended) => return,
        Some(Record::HandedOver) => agent.machine = Source::recover_handed_over(parameters),
        _ => agent.machine = Source::recover_before_handover(parameters),
    }
    agent.outcome = None;
    let life = agent.life;
    world.source_hears(life, SourceEvent::Start);
}

impl World {
    /// The machine hears `event`, if it is still that of `life`, and has its orders carried out.
    pub(crate) fn source_hears(&mut self, life: u32, event: SourceEvent) {
        if !self.is_alive(Side::Source, life) {
            return;
        }
        if event != SourceEvent::Tick {
            self.note(&format!("Source hears {}", short(&format!("{event:?}"))));
        }
        let lost_in_doubt = event == SourceEvent::PeerLost && self.commit_sent;
        if self.sabotage == Sabotage::ResumeOnPeerLost && lost_in_doubt && self.source.outcome.is_none() {
            self.resume_source();
        }
        let mut actions = Vec::new();
        self.source.machine.handle(self.now, event, &mut actions);
        for action in actions {
            let text = short(&format!("{action:?}"));
            let Some(fate) = self.begin_action(Side::Source, life, &text) else { return };
            perform(self, action, fate);
        }
        self.source.wake += 1;
        if let Some(deadline) = self.source.machine.deadline() {
            let wake = self.source.wake;
            self.at(deadline, Happening::Tick { side: Side::Source, life, wake });
        }
    }
}

fn perform(world: &mut World, action: SourceAction, fate: Fate) {
    let life = world.source.life;
    let sabotage = world.sabotage;
    let mut act = |delay, effect, event| {
        world.act(Side::Source, microseconds(delay), effect, Reply::Source(event), fate);
    };
    match action {
        SourceAction::Prepare => prepare(world, fate),
        SourceAction::Harvest => harvest_later(world, life, fate),
        SourceAction::Copy { pages, .. } => copy(world, pages, fate),
        SourceAction::StopCopy => {
            if let Some(copying) = &mut world.source.copying {
                copying.stop = true;
            }
        }
        SourceAction::DrainGuest => drain(world, fate),
        SourceAction::Recheck { pages } => recheck(world, &pages, fate),
        SourceAction::Fence => fence(world, fate),
        SourceAction::EndRound { round } => world.send(Side::Source, Message::EndRound(round), fate),
        SourceAction::PauseGuest { postcopy } => begin_pause(world, postcopy, fate),
        SourceAction::SendOwed { pages } => world.send(Side::Source, Message::Owed(pages), fate),
        SourceAction::Verify => {
            world.source.verifying = Some(fate);
            world.send(Side::Source, Message::Verify, fate);
        }
        SourceAction::SaveDeviceState if matches!(fate, Fate::Fail { .. }) => {
            world.fail(Side::Source, microseconds(500), Reason::GuestFailed);
        }
        SourceAction::SaveDeviceState => world.source.saved = Some(world.device_state()),
        SourceAction::MoveDeviceState => {
            if let Some(saved) = world.source.saved {
                world.send(Side::Source, Message::DeviceState(saved), fate);
            }
        }
        SourceAction::WriteHandedOver if sabotage == Sabotage::CommitWithoutHandedOver => {
            act(1000, Effect::Nothing, SourceEvent::HandedOverSynced);
        }
        SourceAction::WriteHandedOver => {
            let reply = Reply::Source(SourceEvent::HandedOverSynced);
            world.write(Side::Source, Record::HandedOver, reply, fate);
        }
        SourceAction::SendCommit => {
            world.commit_sent = true;
            world.send(Side::Source, Message::Commit, fate);
        }
        SourceAction::AskOutcome if sabotage == Sabotage::NeverAsk => {}
        SourceAction::AskOutcome => world.send(Side::Source, Message::Ask, fate),
        SourceAction::AbortPeer(failure) => {
            act(500, Effect::Nothing, SourceEvent::PeerAborted);
            world.send(Side::Source, Message::Abort(failure), fate);
        }
        SourceAction::ResumeGuest => {
            if fate.has_effect() {
                world.source_vmm.pause_order += 1;
                world.source.pausing = None;
            }
            let reply = Reply::Source(SourceEvent::GuestResumed);
            world.act(Side::Source, microseconds(200), Effect::ResumeSource, reply, fate);
        }
        SourceAction::Release => {
            world.is_tracked = false;
            world.source.copying = None;
            let is_needed = world.owed.any() && world.destination_vmm.running && !world.owed.is_lost;
            world.checker.require(!is_needed, Violation::LetGoEarly);
            world.owed.is_served = false;
            world.cut_links();
            world.act(
                Side::Source,
                microseconds(1000),
                Effect::Nothing,
                Reply::Source(SourceEvent::Released),
                fate,
            );
        }
        SourceAction::ThrottleGuest { percent } => throttle(world, percent, fate),
        SourceAction::SetBandwidthLimit(_) => {}
        SourceAction::Reconnect => reconnect(world, fate),
        SourceAction::TellMemoryLost(failure) => {
            world.send(Side::Source, Message::MemoryLost(failure), fate);
        }
        SourceAction::Finish(outcome) => {
            let first = world.source.outcome.is_none();
            world.checker.require(first, Violation::WrongOutcome);
            world.checker.require(world.source_vmm.throttle == Percent(0), Violation::LeftThrottled);
            world.source.outcome = Some(outcome);
            let journal = &mut world.source.journal;
            // Behind what was synced, without a sync of its own.
            journal.sync();
            journal.records.push(Record::Ended);
            world.cut_stream(true);
        }
    }
}

fn throttle(world: &mut World, percent: Percent, fate: Fate) {
    let forgets = world.sabotage == Sabotage::ForgetThrottle && percent == Percent(0);
    if fate.has_effect() && !forgets {
        world.source.throttle_ordered = percent;
    }
    let answer = match fate {
        Fate::Fail { .. } => SourceEvent::ThrottleFailed(Failure::new(Reason::ThrottleFailed, "injected")),
        _ => SourceEvent::Throttled { percent },
    };
    // What it answers with has failed, not the order as others do.
    let fate = if matches!(fate, Fate::Fail { .. }) { Fate::Normal } else { fate };
    world.act(Side::Source, microseconds(300), Effect::ThrottleSource, Reply::Source(answer), fate);
}

fn reconnect(world: &mut World, fate: Fate) {
    if world.owed.is_lost {
        let failure = Failure::new(Reason::Internal, "the file is gone");
        let reply = Reply::Source(SourceEvent::MemoryLost(failure));
        return world.act(Side::Source, microseconds(500), Effect::Nothing, reply, fate);
    }
    world.owed.is_served |= fate.has_effect();
    world.send(Side::Source, Message::Ask, fate);
}

fn prepare(world: &mut World, fate: Fate) {
    world.is_tracked = true;
    if world.late != LateWrites::None {
        let reply = Reply::Source(SourceEvent::LateWrites(world.late));
        world.act(Side::Source, Duration::ZERO, Effect::Nothing, reply, Fate::Normal);
    }
    let mut pages = no_pages();
    for page in 0..PAGES {
        let holds_data = world.source_vmm.ram[page] != ZERO || world.destination_vmm.ram[page] != ZERO;
        if holds_data || world.is_pinned(page) {
            insert(&mut pages, page);
        }
    }
    let fixed = FixedCosts { fence: Duration::ZERO, device_state: Duration::from_millis(1) };
    let reply = Reply::Source(SourceEvent::Prepared { pages, fixed });
    world.act(Side::Source, microseconds(3000), Effect::Nothing, reply, fate);
}

fn harvest_later(world: &mut World, life: u32, fate: Fate) {
    world.after(microseconds(100), Happening::Harvest { life, fate });
}

pub(crate) fn harvest(world: &mut World, life: u32, fate: Fate) {
    if !world.is_alive(Side::Source, life) || fate == Fate::Mute {
        return;
    }
    let is_last = !world.source_vmm.running;
    let mut written = std::mem::replace(&mut world.dirty, no_pages());
    if is_last && world.sabotage == Sabotage::SkipLastHarvest {
        written = no_pages();
    }
    let event = match fate {
        Fate::Fail { .. } => SourceEvent::Failed(Failure::new(Reason::TrackerFailed, "injected")),
        _ => SourceEvent::Harvested { written, elapsed: microseconds(100) },
    };
    world.source_hears(life, event);
}

fn copy(world: &mut World, pages: PageSets, fate: Fate) {
    let fate = if fate == Fate::Mute && world.source_vmm.running { Fate::Slow } else { fate };
    world.source.copy += 1;
    world.source.copying = Some(Copying {
        pages,
        next: 0,
        began_at: world.now,
        data_bytes: 0,
        zero_bytes: 0,
        stop: false,
        fate,
    });
    let (life, copy) = (world.source.life, world.source.copy);
    world.after(microseconds(50), Happening::CopyPage { life, copy });
}

pub(crate) fn copy_page(world: &mut World, life: u32, copy: u32) {
    if !world.is_alive(Side::Source, life) || world.source.copy != copy {
        return;
    }
    let Some(mut copying) = world.source.copying.take() else { return };
    let set = copying.pages.block(BlockIndex(0));
    let next = set.next_run(copying.next as u64).map(|run| run.first as usize);
    let fails = copying.fate == Fate::Fail { had_effect: false };
    let (page, link) = match (next, world.link) {
        (_, None) => return link_lost(world, life),
        _ if fails => return link_lost(world, life),
        (Some(page), Some(link)) if !copying.stop => (page, link),
        _ => return copied(world, life, copying, next.is_none()),
    };
    let value = world.source_vmm.ram[page];
    world.source.sent[page] = Some(value);
    if value == ZERO {
        copying.zero_bytes += PAGE_BYTES;
        world.send(Side::Source, Message::ZeroPage(page), Fate::Normal);
    } else {
        copying.data_bytes += PAGE_BYTES;
        let delay = if world.random.chance(4) { 7_000 } else { 500 };
        let lands_at = world.now + microseconds(world.random.below(delay));
        world.landed_at = world.landed_at.max(lands_at);
        let late = world.random.below(value.len() as u64 + 1) as usize;
        world.at(lands_at, Happening::Lands { link, page, value, late });
    }
    copying.next = page + 1;
    world.source.copying = Some(copying);
    world.after(PAGE_TIME, Happening::CopyPage { life, copy });
}

/// Waits for the transfers under way, unless the guest does not know them.
fn drain(world: &mut World, fate: Fate) {
    let complete = world.late == LateWrites::Drainable;
    let effect = match world.sabotage {
        Sabotage::LieAboutDrain => Effect::Nothing,
        _ if complete => Effect::EndTransfers,
        _ => Effect::Nothing,
    };
    let reply = Reply::Source(SourceEvent::Drained { complete });
    world.act(Side::Source, microseconds(2000), effect, reply, fate);
}

fn recheck(world: &mut World, pages: &PageSets, fate: Fate) {
    let mut differing = no_pages();
    for page in pages.block(BlockIndex(0)).runs().flat_map(|run| run.first..run.end()) {
        let page = page as usize;
        if world.sabotage != Sabotage::SkipRecheck
            && world.source.sent[page] != Some(world.source_vmm.ram[page])
        {
            insert(&mut differing, page);
        }
    }
    let (checked_bytes, elapsed) = (pages.bytes(), microseconds(100));
    let reply = Reply::Source(SourceEvent::Rechecked { differing, checked_bytes, elapsed });
    world.act(Side::Source, elapsed, Effect::Nothing, reply, fate);
}

fn copied(world: &mut World, life: u32, copying: Copying, complete: bool) {
    let mut unsent = copying.pages;
    let sent = ramferry_ram::PageRun { first: 0, count: copying.next as u64 };
    unsent.block_mut(BlockIndex(0)).remove_run(sent);
    let event = SourceEvent::Copied {
        data_bytes: copying.data_bytes,
        zero_bytes: copying.zero_bytes,
        elapsed: world.now - copying.began_at,
        complete,
        unsent,
    };
    match copying.fate {
        Fate::Mute => {}
        Fate::Fail { .. } => link_lost(world, life),
        Fate::Slow => {
            world.act(Side::Source, Duration::ZERO, Effect::Nothing, Reply::Source(event), Fate::Slow);
        }
        _ => world.source_hears(life, event),
    }
}

fn link_lost(world: &mut World, life: u32) {
    world.source_hears(life, SourceEvent::Failed(Failure::new(Reason::LinkLost, "the link died")));
}

fn fence(world: &mut World, fate: Fate) {
    let wait = match world.sabotage {
        Sabotage::SkipFence => Duration::ZERO,
        _ => world.landed_at.saturating_sub(world.now) + microseconds(100),
    };
    let (life, link, began_at) = (world.source.life, world.link, world.now);
    world.after(wait, Happening::Fenced { life, link, began_at, fate });
}

/// Everything has landed, if the links lived until now.
pub(crate) fn fenced(world: &mut World, life: u32, link: Option<u32>, began_at: Duration, fate: Fate) {
    if !world.is_alive(Side::Source, life) {
        return;
    }
    if link.is_none() || link != world.link {
        return link_lost(world, life);
    }
    let reply = Reply::Source(SourceEvent::Fenced { elapsed: world.now - began_at });
    world.act(Side::Source, Duration::ZERO, Effect::Nothing, reply, fate);
}

pub(crate) fn arrives(world: &mut World, message: Message) {
    let life = world.source.life;
    let event = match message {
        Message::RoundEnded(round) => SourceEvent::RoundEnded { round },
        Message::IncomingReady => return pause(world),
        Message::Digests(digests) => {
            let Some(fate) = world.source.verifying.take() else { return };
            let equal = digests == world.source_vmm.ram;
            let reply = Reply::Source(SourceEvent::Verified { equal });
            return world.act(Side::Source, microseconds(100), Effect::Nothing, reply, fate);
        }
        Message::OwedAccepted => SourceEvent::OwedAccepted,
        Message::DeviceStateLoaded => SourceEvent::DeviceStateMoved,
        Message::Running(memory_owed) => SourceEvent::DestinationRunning { memory_owed },
        Message::StillOwed(bytes) => SourceEvent::StillOwed { bytes },
        Message::Lost(cause) => SourceEvent::DestinationLost(cause),
        Message::Aborted(cause) => SourceEvent::DestinationAborted(cause),
        other => panic!("{other:?} to the source"),
    };
    world.source_hears(life, event);
}

/// Where it fails half-way, the VMM pauses all the same, later.
fn begin_pause(world: &mut World, postcopy: bool, fate: Fate) {
    world.source_vmm.pause_order += 1;
    let sent = match fate {
        Fate::Fail { .. } | Fate::Mute => Fate::Normal,
        _ => fate,
    };
    if fate.has_effect() {
        world.source.pausing = Some(fate);
        world.owed.is_served = postcopy;
        world.send(Side::Source, Message::PrepareIncoming(postcopy), sent);
    }
    if let Fate::Fail { .. } = fate {
        world.fail(Side::Source, PAUSE_TIME / 2, Reason::GuestFailed);
    }
}

/// The destination's VMM waits for device state: this one starts its stream, and pauses.
fn pause(world: &mut World) {
    let Some(fate) = world.source.pausing.take() else { return };
    let order = world.source_vmm.pause_order;
    let reply = match fate {
        Fate::Mute | Fate::Fail { .. } => Reply::None,
        _ => Reply::Source(SourceEvent::GuestPaused),
    };
    world.act(Side::Source, PAUSE_TIME, Effect::PauseSource { order }, Reply::None, Fate::Normal);
    world.act(Side::Source, PAUSE_TIME + microseconds(300), Effect::Nothing, reply, Fate::Normal);
}

fn short(text: &str) -> String {
    text.chars().take(60).collect()
}
