//! Random sequences of everything that may be asked of two links of a session, on each fabric, against a model of
//! both sides' memory: every operation that was accepted completes exactly once, also when its link dies; bytes are
//! where they should be; and nothing that ended keeps a region.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up is to fail")]

mod fixtures;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fixtures::{Shm, Tcp};
use proptest::prelude::*;
use ramferry_fabric::conformance::{Drive, Fixture, Pair, TestMemory};
use ramferry_fabric::faulty::{Faults, FaultyLink};
use ramferry_fabric::{Domain, LinkError, OpId, Place, PostError, Region, RegionKey, Rights, Transfer};
use ramferry_ram::{Access, BlockIndex, BlockRange};

const PAGE: u64 = 4096;
const LINKS: usize = 2;
/// Each link has slots of its own: what two links write to one place comes in no order.
const SLOTS_OF_A_LINK: usize = 2;
const SLOTS: usize = LINKS * SLOTS_OF_A_LINK;
/// Local pages: the first half is written from, the second read into. Remote pages: the first half is written to.
const HALF: u64 = 4;
const SLOT_BYTES: u64 = 2 * HALF * PAGE;
/// Registering, deregistering and closing are bounded by this.
const BOUND: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug)]
enum Transferred {
    Written,
    Read,
}

#[derive(Clone, Debug)]
enum Step {
    Transfer {
        link: usize,
        slot: usize,
        what: Transferred,
        from: u64,
        to: u64,
        length: u32,
    },
    Fence {
        link: usize,
    },
    Poll {
        link: usize,
    },
    /// Polls until all has completed.
    Drain {
        link: usize,
    },
    /// Registers the slot again under other keys, when its link is idle.
    Renew {
        slot: usize,
    },
    /// The peer takes the slot's region back, whatever is under way in it.
    TakeBack {
        slot: usize,
    },
    /// A write under a key that the peer never gave.
    Forge {
        link: usize,
        slot: usize,
    },
    /// The link is closed, with whatever is under way on it, and another made.
    Close {
        link: usize,
    },
    /// The link vanishes, and another is made.
    Drop {
        link: usize,
    },
    /// The peer ends the session.
    End,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let link = || 0..LINKS;
    let what = prop_oneof![3 => Just(Transferred::Written), 1 => Just(Transferred::Read)];
    let at = || 0..HALF * PAGE - 64;
    let transfer = (link(), 0..SLOTS_OF_A_LINK, what, at(), at(), 1_u32..3 * PAGE as u32).prop_map(
        |(link, slot, what, from, to, length)| Step::Transfer {
            link,
            slot: link * SLOTS_OF_A_LINK + slot,
            what,
            from,
            to,
            length,
        },
    );
    let step = prop_oneof![
        60 => transfer,
        8 => link().prop_map(|link| Step::Fence { link }),
        12 => link().prop_map(|link| Step::Poll { link }),
        4 => link().prop_map(|link| Step::Drain { link }),
        4 => (0..SLOTS).prop_map(|slot| Step::Renew { slot }),
        1 => (0..SLOTS).prop_map(|slot| Step::TakeBack { slot }),
        1 => (0..SLOTS).prop_map(|slot| Step::Forge { link: slot / SLOTS_OF_A_LINK, slot }),
        1 => link().prop_map(|link| Step::Close { link }),
        1 => link().prop_map(|link| Step::Drop { link }),
        1 => Just(Step::End),
    ];
    prop::collection::vec(step, 1..80)
}

fn faults() -> impl Strategy<Value = Faults> {
    let operation = || prop::option::weighted(0.2, 1_u64..60);
    (operation(), operation(), 0_u32..4, prop::option::of(2_u64..9), any::<bool>()).prop_map(
        |(die_after_operations, lose_operation, delay_polls, refuse_every, reverse_completions)| Faults {
            die_after_operations,
            delay_polls,
            refuse_every,
            lose_operation,
            reverse_completions,
            ..Faults::default()
        },
    )
}

/// A link, and what is known of it.
struct Side {
    drive: Option<Drive>,
    next_id: u64,
    /// Something went wrong since its slots' memory was last known: an operation may have been carried out or not.
    unsure: bool,
    fenced: bool,
}

struct World<'f, F: Fixture> {
    pair: Pair<'f, F>,
    faults: Faults,
    sides: Vec<Side>,
    /// Of each slot, both sides' regions; the peer's may be taken back.
    regions: Vec<(Region, Option<Region>)>,
    /// Bytes of the slots as they will be when all has completed.
    source: Vec<u8>,
    destination: Vec<u8>,
}

fn slot_range(slot: usize) -> BlockRange {
    BlockRange { block: BlockIndex(0), offset: slot as u64 * SLOT_BYTES, length: SLOT_BYTES }
}

impl<'f, F: Fixture> World<'f, F> {
    fn new(fixture: &'f F, faults: Faults) -> Self {
        let length = SLOTS as u64 * SLOT_BYTES;
        let memory = |seed| TestMemory::with_blocks(seed, Access::ReadWrite, &[length]);
        let pair = Pair::between(fixture, memory(1), memory(2));
        let both = Rights { remote_write: true, remote_read: true };
        let regions = (0..SLOTS).map(|slot| pair.register(slot_range(slot), both));
        let regions = regions.map(|(local, remote)| (local, Some(remote))).collect();
        let (source, destination) = (pair.source.all().remove(0), pair.destination.all().remove(0));
        let sides = (0..LINKS).map(|_| Side { drive: None, next_id: 0, unsure: false, fenced: true });
        let mut world = Self { faults, sides: sides.collect(), regions, source, destination, pair };
        (0..LINKS).for_each(|link| world.connect(link));
        world
    }

    /// Makes a link where there is none and the session lives; then its memory is known again.
    fn connect(&mut self, link: usize) {
        let Some(session) = &self.pair.session else { return };
        let started = Instant::now();
        let made = loop {
            let domain = Arc::clone(&self.pair.source_domain);
            match self.pair.fixture.connect(session, &self.pair.token, domain) {
                // The place of the one that was there is free a moment later.
                Err(LinkError::TooManyLinks) if started.elapsed() < BOUND => std::thread::yield_now(),
                made => break made.unwrap(),
            }
        };
        self.sides[link].drive = Some(Drive::new(Box::new(FaultyLink::new(made, self.faults))));
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Transfer { link, slot, what, from, to, length } => {
                self.transfer(link, slot, what, from, to, length);
            }
            Step::Fence { link } => self.fence(link),
            Step::Poll { link } => {
                if let Some(drive) = &mut self.sides[link].drive {
                    drive.poll();
                }
            }
            Step::Drain { link } => self.drain(link),
            Step::Renew { slot } => self.renew(slot),
            Step::TakeBack { slot } => {
                self.sides[slot / SLOTS_OF_A_LINK].unsure = true;
                self.take_back(slot);
            }
            Step::Forge { link, slot } => {
                let key = RegionKey(!self.regions[slot].0.key.0);
                let op = self.operation(link, slot, key, 0, 0, 64);
                self.sides[link].unsure = true;
                self.post(link, |drive| drive.write(op));
            }
            Step::Close { link } => {
                self.sides[link].unsure = true;
                if let Some(drive) = self.sides[link].drive.take() {
                    let started = Instant::now();
                    drive.link.close();
                    assert!(started.elapsed() < BOUND, "closing is bounded");
                }
            }
            Step::Drop { link } => {
                self.sides[link].unsure = true;
                self.sides[link].drive = None;
            }
            Step::End => {
                self.sides.iter_mut().for_each(|side| side.unsure = true);
                self.pair.session = None;
            }
        }
    }

    fn operation(
        &mut self,
        link: usize,
        slot: usize,
        key: RegionKey,
        from: u64,
        to: u64,
        length: u32,
    ) -> Transfer {
        let start = slot_range(slot).offset;
        let id = OpId(self.sides[link].next_id);
        self.sides[link].next_id += 1;
        Transfer {
            id,
            local: Place { key: self.regions[slot].0.key, offset: start + from },
            remote: Place { key, offset: start + to },
            length,
        }
    }

    fn transfer(&mut self, link: usize, slot: usize, what: Transferred, from: u64, to: u64, length: u32) {
        let half = HALF * PAGE;
        let length = u64::from(length).min(half - from).min(half - to);
        let start = slot_range(slot).offset as usize;
        let key = self.regions[slot].1.map_or(RegionKey(0), |region| region.key);
        let (local, accepted) = match what {
            Transferred::Written => {
                let op = self.operation(link, slot, key, from, to, length as u32);
                (from, self.post(link, |drive| drive.write(op)))
            }
            Transferred::Read => {
                let op = self.operation(link, slot, key, half + to, from, length as u32);
                (half + to, self.post(link, |drive| drive.read(op)))
            }
        };
        if !accepted {
            return;
        }
        let remote = if let Transferred::Written = what { to } else { from };
        let local = start + local as usize..start + (local + length) as usize;
        let remote = start + remote as usize..start + (remote + length) as usize;
        match what {
            Transferred::Written => self.destination[remote].copy_from_slice(&self.source[local]),
            Transferred::Read => self.source[local].copy_from_slice(&self.destination[remote]),
        }
        self.sides[link].fenced = false;
    }

    /// Posts; `false` when the link is dead or gone.
    fn post(&mut self, link: usize, post: impl FnOnce(&mut Drive) -> Result<(), PostError>) -> bool {
        let side = &mut self.sides[link];
        let Some(drive) = &mut side.drive else { return false };
        match post(drive) {
            Ok(()) => true,
            Err(PostError::Dead(_)) => {
                side.unsure = true;
                false
            }
            Err(error) => panic!("a valid operation was not accepted: {error}"),
        }
    }

    fn fence(&mut self, link: usize) {
        let id = self.sides[link].next_id;
        self.sides[link].next_id += 1;
        self.post(link, |drive| drive.fence(id));
        self.sides[link].fenced |= self.sides[link].drive.is_some();
    }

    /// Everything completes, each operation once; what was fenced well is in its place. Where something failed,
    /// the link is made again and memory taken as it is.
    fn drain(&mut self, link: usize) {
        let side = &mut self.sides[link];
        if let Some(drive) = &mut side.drive {
            drive.drain();
            let ids: HashSet<OpId> = drive.completions.iter().map(|completion| completion.id).collect();
            assert_eq!(ids.len(), drive.completions.len(), "an operation completed twice");
            assert_eq!(drive.completions.len(), drive.accepted(), "every operation completed");
            let failed = drive.completions.iter().any(|completion| completion.result.is_err());
            assert!(!failed || drive.link.is_dead().is_some(), "a link that failed an operation is dead");
            side.unsure |= drive.link.is_dead().is_some();
        }
        if side.unsure || side.drive.is_none() {
            self.begin_anew(link);
        } else if side.fenced {
            self.check(link);
        }
    }

    fn check(&self, link: usize) {
        let (source, destination) = (self.pair.source.all(), self.pair.destination.all());
        for slot in link * SLOTS_OF_A_LINK..(link + 1) * SLOTS_OF_A_LINK {
            let range = slot_range(slot);
            let bytes = range.offset as usize..(range.offset + range.length) as usize;
            assert!(destination[0][bytes.clone()] == self.destination[bytes.clone()], "slot {slot}, written");
            assert!(source[0][bytes.clone()] == self.source[bytes], "slot {slot}, read");
        }
    }

    /// No link, no operation under way: the slots' regions are free, and their bytes are what they are.
    fn begin_anew(&mut self, link: usize) {
        self.sides[link].drive = None;
        for slot in link * SLOTS_OF_A_LINK..(link + 1) * SLOTS_OF_A_LINK {
            self.take_back(slot);
            self.register_again(slot);
            let range = slot_range(slot);
            let bytes = range.offset as usize..(range.offset + range.length) as usize;
            self.source[bytes.clone()].copy_from_slice(&self.pair.source.bytes(range));
            self.destination[bytes].copy_from_slice(&self.pair.destination.bytes(range));
        }
        self.connect(link);
        let side = &mut self.sides[link];
        (side.unsure, side.fenced) = (side.drive.is_none(), true);
    }

    fn take_back(&mut self, slot: usize) {
        if let Some(region) = self.regions[slot].1.take() {
            let started = Instant::now();
            self.pair.destination_domain.deregister(region.key).unwrap();
            assert!(started.elapsed() < BOUND, "deregistering is bounded");
        }
    }

    /// Nothing is under way in the slot.
    fn register_again(&mut self, slot: usize) {
        let both = Rights { remote_write: true, remote_read: true };
        let started = Instant::now();
        self.pair.source_domain.deregister(self.regions[slot].0.key).unwrap();
        assert!(started.elapsed() < Duration::from_secs(1), "nothing kept the region");
        let (local, remote) = self.pair.register(slot_range(slot), both);
        assert!(self.regions.iter().all(|(other, _)| other.key != local.key), "a key is not used twice");
        self.regions[slot] = (local, Some(remote));
    }

    fn renew(&mut self, slot: usize) {
        let link = slot / SLOTS_OF_A_LINK;
        self.fence(link);
        self.drain(link);
        if !self.sides[link].unsure {
            self.take_back(slot);
            self.register_again(slot);
        }
    }

    fn end(mut self) {
        for link in 0..LINKS {
            self.fence(link);
            self.drain(link);
            if let Some(drive) = self.sides[link].drive.take() {
                drive.link.close();
            }
        }
        self.pair.session = None;
        for slot in 0..SLOTS {
            self.take_back(slot);
            self.pair.source_domain.deregister(self.regions[slot].0.key).unwrap();
        }
        assert_eq!(self.pair.source_domain.pinned_bytes(), 0);
        assert_eq!(self.pair.destination_domain.pinned_bytes(), 0);
    }
}

fn run<F: Fixture>(fixture: &F, faults: Faults, steps: &[Step]) {
    let mut world = World::new(fixture, faults);
    steps.iter().for_each(|step| world.take(step));
    world.end();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_asked_of_tcp_completes_once_and_lands_in_its_place(faults in faults(), steps in steps()) {
        run(&Tcp, faults, &steps);
    }

    #[test]
    fn whatever_is_asked_of_shm_completes_once_and_lands_in_its_place(faults in faults(), steps in steps()) {
        run(&Shm, faults, &steps);
    }
}
