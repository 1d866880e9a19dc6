//! Many migrations in a row between two agents, each of another kind, and
//! agents and VMMs killed, and links cut, now and then, before post-copy and in it: nothing is lost, and nothing is left.

use std::time::{Duration, SystemTime};

use ramferry_lab::{Backing, Fill, HugePages, Place, Qemu, RamBlock, Workload, skipped};
use ramferry_proto::v1;
use ramferry_proto::v1::FabricKind::{Shm, Tcp};
use ramferry_proto::v1::MigrationState::Succeeded;
use ramferry_proto::v1::{Postcopy, RegistrationMode};

use crate::faults::cut::cut_data;
use crate::faults::leftovers::{
    Holdings, assert_holds_no_more, assert_no_sockets_left, assert_nothing_kept, assert_unharmed,
};
use crate::faults::stage::{Fault, runs};
use crate::faults::steps::{Step, Steps};
use crate::harness::{Agent, MIB, Pair, assert_proves_itself, boot, is_final, parameters};

/// As many as an ordinary run of the tests has time for.
const ORDINARY: u64 = 15;
/// Steps of a migration with two rounds; longer ones are struck early.
const STEPS: u64 = 36;

/// SplitMix64: what is drawn depends on the seed alone.
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[usize::try_from(self.below(choices.len() as u64)).unwrap()].clone()
    }
}

/// What happened.
#[derive(Debug, Default)]
struct Tally {
    moved: u64,
    stayed: u64,
    lost_with_its_vmm: u64,
    struck: u64,
    guests: u64,
    /// Went through post-copy.
    postcopy: u64,
    /// Struck while the destination's guest was, or was about to be, owed memory.
    struck_in_postcopy: u64,
    /// Of those, how many were owed more than nothing, and less than all, at that moment.
    struck_midway: u64,
}

/// What is struck, and when.
#[derive(Clone, Copy, Debug)]
struct Strike {
    fault: Fault,
    when: When,
    /// So long after the step was let go; a step that is held when it is nothing.
    late: Duration,
}

#[derive(Clone, Copy, Debug)]
enum When {
    /// At the step with this number.
    Step(u64),
    /// When the destination begins to read what it is owed.
    Pull,
}

/// Pages that the destination's guest is owed.
fn owed_pages(destination: &Agent, id: &str) -> Option<u64> {
    const HEADER_BYTES: usize = 4096;
    let bits = std::fs::read(destination.directory().join(format!("state/postcopy/{id}.owed"))).ok()?;
    Some(bits[HEADER_BYTES..].iter().map(|byte| u64::from(byte.count_ones())).sum())
}

struct Soak {
    draw: Draw,
    pair: Pair,
    steps: Steps,
    idle: Vec<Holdings>,
    huge: Option<HugePages>,
    tally: Tally,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_in_a_row_lose_nothing_and_leave_nothing() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = number("RAMFERRY_SOAK_SEED").unwrap_or(u64::from(now.subsec_nanos()));
    let count = number("RAMFERRY_SOAK").unwrap_or(ORDINARY);
    eprintln!("RAMFERRY_SOAK={count} RAMFERRY_SOAK_SEED={seed}");
    let huge = HugePages::reserve(2 * 64 * MIB).map_err(skipped).ok();
    let steps = Steps::listen();
    let socket = steps.path().display().to_string();
    let agent = || Agent::start_with(&["--step-socket", &socket]);
    let pair = Pair { source: agent(), destination: agent() };
    let idle = [&pair.source, &pair.destination].map(|agent| Holdings::of(agent.pid())).to_vec();
    let mut soak = Soak { draw: Draw(seed), pair, steps, idle, huge, tally: Tally::default() };
    let mut guest = None;
    for turn in 0..count {
        let traveller = match guest.take() {
            Some(guest) if soak.draw.below(4) > 0 => guest,
            _ => soak.new_guest(),
        };
        guest = soak.move_on(turn, traveller).await;
    }
    eprintln!("{count} migrations, seed {seed}: {:?}; before and after: {:?}", soak.tally, soak.idle);
}

impl Soak {
    fn new_guest(&mut self) -> Qemu {
        self.tally.guests += 1;
        let mut builder = Qemu::builder().vcpus(1 + u32::try_from(self.draw.below(2)).unwrap());
        builder = match (self.draw.below(3), &self.huge) {
            (0, Some(huge)) => {
                builder.block(RamBlock::node(64 * MIB).on(Backing::HugeTlbfs(huge.mount().to_owned())))
            }
            (1, _) => builder.block(RamBlock::node(64 * MIB)).block(RamBlock::node(32 * MIB)),
            _ => builder.block(RamBlock::node(96 * MIB)),
        };
        let workload = Workload {
            mib: self.draw.of(&[2, 8, 16]),
            touch_mib: self.draw.of(&[0, 8, 24]),
            rate_mib: self.draw.of(&[1, 32, 128, 0]),
            fill: self.draw.of(&[Fill::Random, Fill::Stamp, Fill::Zero]),
            place: self.draw.of(&[Place::Spread, Place::Packed]),
            seed: self.draw.below(u64::MAX),
            tick_ms: 10,
            ..Workload::default()
        };
        boot(builder.proof(workload))
    }

    fn parameters(&mut self) -> v1::MigrationParameters {
        v1::MigrationParameters {
            registration_mode: self.draw.of(&[RegistrationMode::Dynamic, RegistrationMode::PinAll]).into(),
            streams: self.draw.of(&[0, 1, 3]),
            max_downtime: Some(Duration::from_millis(self.draw.of(&[1, 50, 300])).try_into().unwrap()),
            no_progress_timeout: Some(Duration::from_millis(100).try_into().unwrap()),
            postcopy: self.draw.of(&[Postcopy::Never, Postcopy::Allow, Postcopy::Always]).into(),
            ..parameters(self.draw.of(&[Shm, Tcp]))
        }
    }

    /// Perhaps one; where the guest moves by way of post-copy, more often in it than anywhere else.
    fn strike(&mut self, postcopy: Postcopy) -> Option<Strike> {
        let faults = [
            Fault::SourceAgentKilled,
            Fault::DestinationAgentKilled,
            Fault::SourceVmmKilled,
            Fault::DestinationVmmKilled,
            Fault::LinkCut,
        ];
        let fault = (self.draw.below(2) == 0).then(|| self.draw.of(&faults))?;
        let when = match postcopy {
            Postcopy::Allow | Postcopy::Always if self.draw.below(3) > 0 => When::Pull,
            _ => When::Step(self.draw.below(STEPS)),
        };
        // Agents that die within a step die in the midst of system calls and exchanges.
        let late = Duration::from_micros(self.draw.of(&[0, 0, 500, 3_000, 10_000]));
        Some(Strike { fault, when, late })
    }

    /// One migration; the guest where it runs now, if its VMM was not killed.
    async fn move_on(&mut self, turn: u64, guest: Qemu) -> Option<Qemu> {
        let id = format!("turn-{turn}");
        let receiver = guest.destination().start().unwrap();
        let parameters = self.parameters();
        let strike = self.strike(parameters.postcopy());
        self.pair.create(&id, &guest, &receiver, parameters).await.unwrap();
        let struck = self.carry_on(&id, strike, [&guest, &receiver]).await;

        let at_source = self.pair.source.wait_end(&id).await;
        let at_destination = self.pair.destination.wait_end(&id).await;
        let moved = at_source.state() == Succeeded;
        let what = format!("{id}: {struck:?} of {strike:?} {parameters:?} {at_source:?} {at_destination:?}");
        assert_eq!(moved, at_destination.state() == Succeeded, "the agents disagree: {what}");
        let killed = match struck {
            Some(Fault::SourceVmmKilled) => !moved,
            Some(Fault::DestinationVmmKilled) => moved,
            _ => false,
        };
        assert!(struck.is_some() || moved, "{what}");
        let running = (runs(&guest), runs(&receiver));
        assert_eq!(running, (!moved && !killed, moved && !killed), "{what}");
        for (agent, idle) in [&self.pair.source, &self.pair.destination].into_iter().zip(&self.idle) {
            assert_holds_no_more(agent, idle);
            assert_no_sockets_left(agent);
            assert_nothing_kept(agent);
        }
        self.tally.postcopy += u64::from(at_source.progress.is_some_and(|progress| progress.postcopy));
        self.tally.struck += u64::from(struck.is_some());
        if killed {
            self.tally.lost_with_its_vmm += 1;
            return None;
        }
        let (runner, count) = if moved {
            std::mem::swap(&mut self.pair.source, &mut self.pair.destination);
            self.idle.swap(0, 1);
            (receiver, &mut self.tally.moved)
        } else {
            (guest, &mut self.tally.stayed)
        };
        *count += 1;
        assert_unharmed(&runner);
        assert_proves_itself(&runner);
        Some(runner)
    }

    /// Lets steps go by until both sides have ended, and strikes at the one that is due.
    async fn carry_on(
        &mut self,
        id: &str,
        strike: Option<Strike>,
        [guest, receiver]: [&Qemu; 2],
    ) -> Option<Fault> {
        let mut passed = 0;
        let mut struck = None;
        let ended = async |agent: &Agent| {
            let request = v1::GetMigrationRequest { id: id.to_owned() };
            let response = agent.client().await.get_migration(request).await.unwrap().into_inner();
            is_final(response.migration.unwrap().state())
        };
        loop {
            let Some(held) = self.steps.next_within(Duration::from_millis(10)) else {
                if ended(&self.pair.source).await && ended(&self.pair.destination).await {
                    return struck;
                }
                continue;
            };
            let is_due = |step: &Step, when| match when {
                When::Step(at) => at == passed,
                When::Pull => struck.is_none() && step.step == "pull",
            };
            match strike {
                Some(Strike { fault, when, late }) if is_due(&held.step, when) => {
                    struck = Some(fault);
                    let all = owed_pages(&self.pair.destination, id);
                    let held = (late == Duration::ZERO).then_some(held);
                    tokio::time::sleep(late).await;
                    if let (Some(all), Some(left)) = (all, owed_pages(&self.pair.destination, id)) {
                        self.tally.struck_in_postcopy += 1;
                        self.tally.struck_midway += u64::from(left > 0 && left < all);
                    }
                    match fault {
                        Fault::LinkCut => {
                            cut_data(&self.pair.source, self.pair.destination.grpc);
                        }
                        Fault::SourceVmmKilled => guest.kill().unwrap(),
                        Fault::DestinationVmmKilled => receiver.kill().unwrap(),
                        Fault::SourceAgentKilled => self.pair.source.restart(),
                        _ => self.pair.destination.restart(),
                    }
                    drop(held);
                }
                _ => drop(held),
            }
            passed += 1;
        }
    }
}
