//! The world that both agents live in: a clock, two VMMs, the destination's memory as links reach it, a control
//! stream, and what goes wrong.

mod guests;
mod happening;
mod postcopy;
mod strikes;
mod verdict;

use std::collections::BTreeMap;
use std::time::Duration;

use ramferry_engine::{DestinationEvent, LateWrites, Percent, Postcopy, Reason, SourceEvent};
use ramferry_ram::{Block, BlockIndex, Layout, PageRun, PageSets};

use crate::checker::{Checker, Violation};
use crate::destination_agent::{self, DestinationAgent};
use crate::faults::{Fate, Injection, Random, Sabotage};
use crate::journal::{Journal, Record};
use crate::network::{Message, Network, Side};
use crate::source_agent::{self, SourceAgent};
use guests::{Vmm, contents};
pub(crate) use happening::{Effect, Happening, Reply};
use happening::{failed, reason_of};
use postcopy::Owed;

pub(crate) const PAGES: usize = 16;
pub(crate) const PAGE_BYTES: u64 = 4096;
const WORDS: usize = 4;
/// What a page holds. Its words may be of different writes of the guest where it was copied meanwhile.
pub(crate) type Page = [u64; WORDS];
pub(crate) const ZERO: Page = [0; WORDS];
const HOT_PAGES: u64 = 8;
/// A run that has not ended by then never does.
const HORIZON: Duration = Duration::from_secs(4 * 3600);
const SLOW: Duration = Duration::from_secs(8);

pub(crate) const fn microseconds(count: u64) -> Duration {
    Duration::from_micros(count)
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: Duration,
    queue: BTreeMap<(Duration, u64), Happening>,
    sequence: u64,
    pub(crate) random: Random,
    pub(crate) injections: Vec<Injection>,
    pub(crate) sabotage: Sabotage,
    /// Actions of both sides so far.
    pub(crate) steps: u32,
    pub(crate) checker: Checker,
    pub(crate) network: Network,
    pub(crate) source: SourceAgent,
    pub(crate) destination: DestinationAgent,
    pub(crate) source_vmm: Vmm,
    pub(crate) destination_vmm: Vmm,
    pub(crate) dirty: PageSets,
    pub(crate) is_tracked: bool,
    /// Whether the source guest's disk fills pages late.
    pub(crate) late: LateWrites,
    /// Memory that is owed to the destination's guest.
    pub(crate) owed: Owed,
    /// Transfers that have begun: number, page and what it will hold.
    transfers: Vec<(u32, usize, u64)>,
    transfers_begun: u32,
    /// The links of this number are alive.
    pub(crate) link: Option<u32>,
    links: u32,
    /// When the last write on its way lands.
    pub(crate) landed_at: Duration,
    pub(crate) commit_sent: bool,
    pub(crate) moved: bool,
    /// The life of the destination's agent that saw its VMM die before COMMITTED was durable.
    died_uncommitted_in: Option<u32>,
    stamp: u64,
}

pub(crate) fn no_pages() -> PageSets {
    let length_bytes = PAGES as u64 * PAGE_BYTES;
    let block = Block { name: "ram".into(), guest_address: 0, length_bytes, page_bytes: PAGE_BYTES };
    PageSets::new(&Layout::new(vec![block]).unwrap())
}

pub(crate) fn insert(pages: &mut PageSets, page: usize) {
    pages.block_mut(BlockIndex(0)).insert_run(PageRun { first: page as u64, count: 1 });
}

impl World {
    pub(crate) fn new(seed: u64, verify: bool, injections: Vec<Injection>, sabotage: Sabotage) -> Self {
        let mut source_ram = [ZERO; PAGES];
        let mut destination_ram = [ZERO; PAGES];
        for page in 0..PAGES {
            source_ram[page] = if page % 4 == 3 { ZERO } else { contents(page as u64 + 1) };
            destination_ram[page] = if page % 3 == 0 { contents(7777) } else { ZERO };
        }
        Self {
            now: Duration::ZERO,
            queue: BTreeMap::new(),
            sequence: 0,
            random: Random(seed),
            injections,
            sabotage,
            steps: 0,
            checker: Checker::default(),
            network: Network::new(0),
            source: SourceAgent::new(seed, verify, Postcopy::Never, None),
            destination: DestinationAgent::new(),
            source_vmm: Vmm::new(source_ram, true),
            destination_vmm: Vmm::new(destination_ram, false),
            dirty: no_pages(),
            is_tracked: false,
            late: LateWrites::None,
            owed: Owed::default(),
            transfers: Vec::new(),
            transfers_begun: 0,
            link: Some(0),
            links: 0,
            landed_at: Duration::ZERO,
            commit_sent: false,
            moved: false,
            died_uncommitted_in: None,
            stamp: 1000,
        }
    }

    /// A world whose migration may, or is to, lead into post-copy.
    pub(crate) fn with_postcopy(mut self, seed: u64, verify: bool, postcopy: Postcopy) -> Self {
        self.source = SourceAgent::new(seed, verify, postcopy, None);
        self
    }

    /// A world whose guest may be throttled.
    pub(crate) fn with_throttle(mut self, seed: u64, verify: bool) -> Self {
        self.source = SourceAgent::new(seed, verify, Postcopy::Never, Some(Percent(99)));
        self
    }

    /// Runs a migration to its end, and checks that.
    pub(crate) fn run(&mut self) {
        self.at(self.now, Happening::GuestWrites);
        self.source_hears(self.source.life, SourceEvent::Start);
        self.destination_hears(self.destination.life, DestinationEvent::Start);
        while let Some((key, happening)) = self.queue.pop_first() {
            self.now = key.0;
            if self.now > HORIZON || (self.is_settled() && self.checker.violations.is_empty()) {
                break;
            }
            self.happen(happening);
            if !self.checker.violations.is_empty() {
                return;
            }
        }
        self.check_end();
    }

    /// Sets the next migration of the same guest up, to a fresh destination VMM over what the last one left.
    pub(crate) fn again(&mut self, verify: bool) {
        assert!(self.source_vmm.running && !self.destination_vmm.running);
        self.queue.clear();
        self.injections.clear();
        self.links += 1;
        self.link = Some(self.links);
        self.landed_at = self.now;
        self.network = Network::new(self.network.stream + 1);
        self.source = self.source.again(verify);
        self.source.began_at = self.now;
        self.owed = Owed::default();
        self.destination = DestinationAgent::new();
        self.destination_vmm = Vmm::new(self.destination_vmm.ram, false);
        self.dirty = no_pages();
        self.is_tracked = false;
        self.commit_sent = false;
        self.died_uncommitted_in = None;
    }

    pub(crate) fn at(&mut self, time: Duration, happening: Happening) {
        self.sequence += 1;
        self.queue.insert((time.max(self.now), self.sequence), happening);
    }

    pub(crate) fn after(&mut self, delay: Duration, happening: Happening) {
        self.at(self.now + delay, happening);
    }

    pub(crate) fn note(&mut self, text: &str) {
        let at = self.now.as_micros();
        self.checker.trace.push(format!("{at:>12} {text}"));
    }

    /// What befalls the action that is about to begin; strikes those that come before it. `None` when the agent
    /// was killed by it.
    pub(crate) fn begin_action(&mut self, side: Side, life: u32, text: &str) -> Option<Fate> {
        let step = self.steps;
        self.steps += 1;
        let mut fate = Fate::Normal;
        for injection in self.injections.clone().into_iter().filter(|injection| injection.step == step) {
            match Fate::of(injection.fault) {
                Some(befalls) => fate = befalls,
                None if injection.after.is_zero() && injection.fault.is_outside() => {
                    self.strike(injection.fault);
                }
                None => self.after(injection.after, Happening::Strikes(injection.fault)),
            }
        }
        if !self.is_alive(side, life) {
            return None;
        }
        self.note(&format!("#{step} {side:?}: {text} {}", if fate == Fate::Normal { "" } else { "FAULT" }));
        Some(fate)
    }

    /// Does what an action does after `delay`, and then replies, as `fate` has it.
    pub(crate) fn act(&mut self, side: Side, delay: Duration, effect: Effect, reply: Reply, fate: Fate) {
        let reason = reason_of(&effect);
        let delay = if fate == Fate::Slow { delay + SLOW } else { delay };
        let effect = if fate.has_effect() { effect } else { Effect::Nothing };
        let reply = match fate {
            Fate::Mute => Reply::None,
            Fate::Fail { .. } => failed(side, reason),
            _ => reply,
        };
        self.after(delay, Happening::Effect { side, life: self.life(side), effect, reply });
    }

    /// Has the agent hear of a failure after `delay`.
    pub(crate) fn fail(&mut self, side: Side, delay: Duration, reason: Reason) {
        let reply = failed(side, reason);
        self.after(delay, Happening::Effect { side, life: self.life(side), effect: Effect::Nothing, reply });
    }

    /// Begins to write a record.
    pub(crate) fn write(&mut self, side: Side, record: Record, reply: Reply, fate: Fate) {
        let fate = if fate == Fate::Mute && side == Side::Destination { Fate::Slow } else { fate };
        if fate.has_effect() {
            self.journal(side).writing = Some(record.clone());
        }
        self.act(side, microseconds(1000), Effect::Written(record), reply, fate);
    }

    pub(crate) fn send(&mut self, from: Side, message: Message, fate: Fate) {
        let to = from.other();
        if let Fate::Fail { .. } = fate {
            self.fail(from, Duration::ZERO, Reason::PeerLost);
        }
        if !self.network.is_up || fate == Fate::Mute || !fate.has_effect() {
            return;
        }
        let stream = self.network.stream;
        let straggler = fate == Fate::Straggle;
        let jitter = microseconds(self.random.below(100));
        let arrival = if straggler || fate == Fate::Slow {
            self.now + SLOW
        } else {
            self.network.arrival(self.now, to, jitter)
        };
        let life = self.life(to);
        if let Fate::Duplicate { late } = fate {
            let again = if late { SLOW } else { microseconds(self.random.below(5000)) };
            let message = message.clone();
            self.at(arrival + again, Happening::Arrives { to, life, stream, straggler: true, message });
        }
        self.at(arrival, Happening::Arrives { to, life, stream, straggler, message });
        if straggler {
            self.cut_stream(false);
        }
    }

    pub(crate) fn life(&self, side: Side) -> u32 {
        match side {
            Side::Source => self.source.life,
            Side::Destination => self.destination.life,
        }
    }

    pub(crate) fn is_alive(&self, side: Side, life: u32) -> bool {
        let is_up = match side {
            Side::Source => self.source.is_up,
            Side::Destination => self.destination.is_up,
        };
        is_up && self.life(side) == life
    }

    pub(crate) fn journal(&mut self, side: Side) -> &mut Journal {
        match side {
            Side::Source => &mut self.source.journal,
            Side::Destination => &mut self.destination.journal,
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Effect { side, life, effect, reply } => {
                let alive = self.is_alive(side, life);
                if alive || effect.outlives_agent() {
                    self.take_effect(side, effect);
                }
                match reply {
                    Reply::Source(event) if alive => self.source_hears(life, event),
                    Reply::Destination(event) if alive => self.destination_hears(life, event),
                    _ => {}
                }
            }
            Happening::Tick { side: Side::Source, life, wake } if self.source.wake == wake => {
                self.source_hears(life, SourceEvent::Tick);
            }
            Happening::Tick { side: Side::Destination, life, wake } if self.destination.wake == wake => {
                self.destination_hears(life, DestinationEvent::Tick);
            }
            Happening::Tick { .. } => {}
            Happening::Arrives { to, life, stream, straggler, message } => {
                let dropped = self.network.dropped.contains(&stream) && !straggler;
                if self.is_alive(to, life) && !dropped {
                    self.arrives(to, message);
                }
            }
            Happening::StreamLost { side: Side::Source, life } => {
                self.source_hears(life, SourceEvent::PeerLost);
            }
            Happening::StreamLost { side: Side::Destination, life } => {
                self.destination_hears(life, DestinationEvent::PeerLost);
            }
            Happening::StreamBack => self.stream_back(),
            Happening::CopyPage { life, copy } => source_agent::copy_page(self, life, copy),
            Happening::Harvest { life, fate } => source_agent::harvest(self, life, fate),
            Happening::Fenced { life, link, began_at, fate } => {
                source_agent::fenced(self, life, link, began_at, fate);
            }
            Happening::Lands { link, page, value, late } => self.lands(link, page, value, late),
            Happening::Digest { life, fate } => destination_agent::digest(self, life, fate),
            Happening::Drained { life, round, fate } => destination_agent::drained(self, life, round, fate),
            Happening::PullBegins { life, pull } => self.pull_begins(life, pull),
            Happening::PageRead { life, pull, link, page } => self.page_read(life, pull, link, page),
            Happening::PageLetIn { life, pull, page } => self.page_let_in(life, pull, page),
            Happening::PullLost { life } if self.is_alive(Side::Destination, life) => self.pull_lost(life),
            Happening::PullLost { .. } => {}
            Happening::Loads { life, state } => destination_agent::load(self, life, state),
            Happening::GuestWrites => self.guest_writes(),
            Happening::TransferEnds { transfer } => self.end_transfers(Some(transfer)),
            Happening::Strikes(fault) => self.strike(fault),
            Happening::Restart(side) => self.restart(side),
            Happening::CancelCheck => {
                self.checker.require(self.source_vmm.running, Violation::SlowCancel);
            }
        }
    }

    fn arrives(&mut self, to: Side, message: Message) {
        match to {
            Side::Source => source_agent::arrives(self, message),
            Side::Destination => destination_agent::arrives(self, message),
        }
    }

    fn take_effect(&mut self, side: Side, effect: Effect) {
        match effect {
            Effect::Nothing => {}
            Effect::Written(record) => {
                let is_synced = !matches!(
                    (self.sabotage, &record),
                    (Sabotage::UnsyncedHandedOver, Record::HandedOver)
                        | (Sabotage::UnsyncedCommitted, Record::Committed)
                );
                let journal = self.journal(side);
                if journal.writing.take().is_some() {
                    journal.records.push(record);
                    if is_synced {
                        journal.sync();
                    }
                }
            }
            Effect::PauseSource { order } if order == self.source_vmm.pause_order => {
                self.note("source guest pauses");
                // A VMM that stops waits for its transfers first.
                self.end_transfers(None);
                self.source_vmm.running = false;
            }
            Effect::PauseSource { .. } => {}
            Effect::ResumeSource => self.resume_source(),
            Effect::ThrottleSource => self.source_vmm.throttle = self.source.throttle_ordered,
            Effect::EndTransfers => self.end_transfers(None),
            Effect::WaitForDeviceState { postcopy } => {
                self.destination_vmm.waits = true;
                self.owed.is_armed = postcopy;
            }
            Effect::LoadDeviceState(state) => {
                if self.destination_vmm.waits && !self.destination_vmm.dead {
                    self.destination_vmm.device_state = Some(state);
                }
            }
            Effect::ResumeDestination { order } if order == self.destination_vmm.pause_order => {
                self.resume_destination();
            }
            Effect::ResumeDestination { .. } => {}
            Effect::StopDestination => {
                self.note("destination guest stops");
                self.destination_vmm.running = false;
            }
            Effect::Discard => {
                let must_go = !self.destination_vmm.running || self.owed.is_lost;
                self.checker.require(must_go, Violation::GuestLost);
                (self.destination_vmm.dead, self.destination_vmm.running) = (true, false);
            }
            Effect::HoldOwed(pages) => self.hold_owed(&pages),
            Effect::Zero(page) => {
                self.destination.zeroing -= 1;
                if self.destination.takes_writes {
                    self.checker.require(!self.destination_vmm.running, Violation::WrittenWhileRunning);
                    self.destination_vmm.ram[page] = ZERO;
                }
            }
        }
    }
}
