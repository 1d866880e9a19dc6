//! Random sequences of everything that may happen to windows, against a model
//! that keeps its own books.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::*;

const HUGE: u64 = 4 * PAGE;

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Registering,
    Ready(u64),
    Deregistering,
}

struct Model {
    windows: Windows,
    layout: Layout,
    config: WindowConfig,
    known: BTreeMap<WindowId, (BlockRange, State)>,
    ids_seen: u64,
    in_flight: Vec<WindowId>,
    round: PageSets,
    asked: PageSets,
    failures_left: u32,
    peak_bytes: u64,
    total_bytes: u64,
}

impl Model {
    fn in_state(&self, wanted: fn(State) -> bool) -> Vec<WindowId> {
        self.known.iter().filter(|(_, (_, state))| wanted(*state)).map(|(id, _)| *id).collect()
    }

    fn act(&mut self, ending: bool) -> Result<(), TestCaseError> {
        let mut out = Vec::new();
        if ending {
            self.windows.end_all(&mut out);
        } else {
            self.windows.actions(&mut out);
        }
        for action in out {
            match action {
                WindowAction::Register(window) => self.begin(&window)?,
                WindowAction::Deregister(id) => {
                    let (_, state) = self.known.get_mut(&id).expect("a window that is there");
                    prop_assert_eq!(*state, State::Ready(0), "deregistered while in use");
                    *state = State::Deregistering;
                }
            }
        }
        let held: u64 = self.known.values().map(|(range, _)| range.length).sum();
        self.peak_bytes = self.peak_bytes.max(held);
        let pinned = held + self.config.links_bytes;
        prop_assert!(pinned <= self.config.pin_budget_bytes.unwrap_or(u64::MAX), "over the budget");
        prop_assert_eq!(self.windows.registered_bytes(), held);
        prop_assert_eq!(self.windows.peak_bytes(), self.peak_bytes);
        prop_assert_eq!(self.windows.total_registered_bytes(), self.total_bytes);
        Ok(())
    }

    fn begin(&mut self, window: &Window) -> Result<(), TestCaseError> {
        let range = window.range;
        prop_assert_eq!(window.id.0, self.ids_seen, "ids are new");
        self.ids_seen += 1;
        prop_assert!(self.layout.contains(range) && range.length > 0);
        let end = range.offset + range.length;
        for (other, _) in self.known.values().filter(|(other, _)| other.block == range.block) {
            prop_assert!(end <= other.offset || other.offset + other.length <= range.offset, "overlap");
        }
        let page = self.round.page_bytes(range.block);
        prop_assert!(range.offset.is_multiple_of(page) && range.length.is_multiple_of(page));
        prop_assert!(range.length <= self.config.window_bytes.max(page));
        if self.config.mode == RegistrationMode::Dynamic {
            let mut pages = self.round.block(range.block).clone();
            pages.union_with(self.asked.block(range.block));
            let (first, last) = (range.offset / page, end / page - 1);
            prop_assert!(pages.contains(first) && pages.contains(last), "a hole at an end");
            let mut at = first;
            while at <= last {
                let run = pages.next_run(at).expect("the last page is one");
                prop_assert!((run.first - at) * page <= self.config.hole_tolerance_bytes, "a long hole");
                at = run.end();
            }
        }
        self.known.insert(window.id, (range, State::Registering));
        Ok(())
    }

    /// Lets one thing happen that somebody outside has under way; `false` if there is none.
    fn happen(&mut self, choice: usize) -> bool {
        let registering = self.in_state(|state| state == State::Registering);
        let leaving = self.in_state(|state| state == State::Deregistering);
        let choices = registering.len() + leaving.len() + self.in_flight.len();
        if choices == 0 {
            return false;
        }
        let mut index = (choice >> 3) % choices;
        if index < registering.len() {
            let id = registering[index];
            if choice & 7 == 0 && self.failures_left > 0 {
                self.failures_left -= 1;
                self.known.remove(&id);
                self.windows.failed(id);
            } else {
                let (range, state) = self.known.get_mut(&id).expect("just found");
                *state = State::Ready(0);
                self.total_bytes += range.length;
                self.windows.registered(id);
            }
            return true;
        }
        index -= registering.len();
        if index < leaving.len() {
            self.known.remove(&leaving[index]);
            self.windows.deregistered(leaving[index]);
            return true;
        }
        let id = self.in_flight.swap_remove(index - leaving.len());
        let (_, State::Ready(in_flight)) = self.known.get_mut(&id).expect("a window in use") else {
            panic!("a window in use is ready");
        };
        *in_flight -= 1;
        self.windows.release(id);
        true
    }

    /// Bytes that may be copied from `offset` on.
    fn acquire(&mut self, block: BlockIndex, offset: u64) -> Result<Option<u64>, TestCaseError> {
        let page = PageRun { first: offset / self.round.page_bytes(block), count: 1 };
        self.asked.block_mut(block).insert_run(page);
        let is_ready = self.windows.is_ready(block, offset);
        let acquired = self.windows.acquire(block, offset);
        prop_assert_eq!(is_ready, acquired != Acquire::NotYet, "what is announced is what is found");
        let Acquire::Ready { id, bytes } = acquired else { return Ok(None) };
        let (range, state) = self.known.get_mut(&id).expect("a window that is there");
        let State::Ready(in_flight) = state else { panic!("acquired while {state:?}") };
        *in_flight += 1;
        prop_assert_eq!(range.block, block);
        prop_assert!(range.offset <= offset && bytes > 0);
        prop_assert_eq!(offset + bytes, range.offset + range.length, "bytes end with the window");
        self.in_flight.push(id);
        Ok(Some(bytes))
    }

    fn copy_round(&mut self, mut choice: impl FnMut() -> usize) -> Result<(), TestCaseError> {
        let mut todo = self.round.clone();
        for step in 0.. {
            prop_assert!(step < 200_000, "no end");
            if !choice().is_multiple_of(4) {
                self.act(false)?;
            }
            let now = choice();
            if now.is_multiple_of(3) && self.happen(choice()) {
                continue;
            }
            if now % 23 == 1 {
                let block = BlockIndex((choice() % self.layout.blocks().len()) as u32);
                let length = self.layout.block(block).expect("it is one").length_bytes;
                self.acquire(block, (choice() as u64 * 1000) % length)?;
                continue;
            }
            let Some(range) = todo.ranges().next() else { return Ok(()) };
            match self.acquire(range.block, range.offset)? {
                Some(bytes) => {
                    let page = todo.page_bytes(range.block);
                    let count = (bytes.min(range.length) / page).min(1 + choice() as u64 % 8).max(1);
                    todo.block_mut(range.block).remove_run(PageRun { first: range.offset / page, count });
                }
                None => {
                    self.act(false)?;
                    let moving = self.happen(choice());
                    prop_assert!(moving, "nothing under way, and {range:?} is not ready");
                }
            }
        }
        unreachable!("the loop above ends")
    }

    /// Lets everything happen that is under way or begins.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..10_000 {
            self.act(false)?;
            if !self.happen(usize::MAX) {
                return Ok(());
            }
        }
        prop_assert!(false, "no end");
        Ok(())
    }

    fn end(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..10_000 {
            self.act(true)?;
            if !self.happen(usize::MAX) {
                break;
            }
        }
        prop_assert_eq!(self.windows.registered_bytes(), 0);
        prop_assert!(self.known.is_empty());
        Ok(())
    }
}

fn guest() -> Layout {
    layout(&[(100, PAGE), (17, HUGE), (150, PAGE)])
}

fn configs() -> impl Strategy<Value = WindowConfig> {
    let mode = prop_oneof![4 => Just(RegistrationMode::Dynamic), 1 => Just(RegistrationMode::PinAll)];
    let budget = prop_oneof![Just(None), (4_u64..8).prop_map(Some), (8_u64..200).prop_map(Some)];
    let lengths = (1_u64..40, prop_oneof![Just(40), 0_u64..10]);
    (mode, lengths, budget, 0_usize..6, 0_u64..4, 0_u64..3).prop_map(
        |(mode, (window, first), budget, ahead, tolerance, links)| {
            let budget = match mode {
                RegistrationMode::Dynamic => budget.map(|pages| (pages + links) * PAGE),
                RegistrationMode::PinAll => budget.map(|_| guest().total_bytes() + links * PAGE),
            };
            WindowConfig {
                mode,
                window_bytes: window * PAGE,
                first_window_bytes: first * PAGE,
                pin_budget_bytes: budget,
                links_bytes: links * PAGE,
                ahead_windows: ahead,
                hole_tolerance_bytes: tolerance * PAGE,
                first_id: 0,
            }
        },
    )
}

/// Runs of wanted pages: block, first page and length.
fn rounds() -> impl Strategy<Value = Vec<Vec<(u32, u64, u64)>>> {
    let run = (0_u32..3, 0_u64..100, 1_u64..50);
    prop::collection::vec(prop::collection::vec(run, 0..12), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_every_wanted_page_is_covered_within_the_rules(
        config in configs(),
        rounds in rounds(),
        choices in prop::collection::vec(any::<u16>(), 64..256),
        failures_left in prop_oneof![Just(0_u32), 1_u32..10],
    ) {
        let layout = guest();
        let never_fails = failures_left == 0;
        let mut model = Model {
            windows: Windows::new(config, &layout).expect("a configuration that works"),
            config,
            known: BTreeMap::new(),
            ids_seen: 0,
            in_flight: Vec::new(),
            round: PageSets::new(&layout),
            asked: PageSets::new(&layout),
            layout,
            failures_left,
            peak_bytes: 0,
            total_bytes: 0,
        };
        let (mut next, mut mixed) = (0, 0_usize);
        let mut choice = || {
            next += 1;
            mixed = mixed.wrapping_mul(31).wrapping_add(choices[next % choices.len()] as usize + next / 97);
            (mixed >> 2) & 0xffff
        };
        for runs in rounds {
            model.round = PageSets::new(&model.layout);
            for (block, first, count) in runs {
                let pages = model.layout.block(BlockIndex(block)).expect("it is one").pages();
                let run = PageRun { first: first % pages, count: count.min(pages - first % pages) };
                model.round.block_mut(BlockIndex(block)).insert_run(run);
            }
            model.asked = PageSets::new(&model.layout);
            model.windows.begin_round(&model.round);
            model.copy_round(&mut choice)?;
        }
        if config.mode == RegistrationMode::PinAll && never_fails {
            model.settle()?;
            let ready: u64 = model.known.values().map(|(range, _)| range.length).sum();
            prop_assert_eq!(ready, model.layout.total_bytes(), "every page is covered once");
        }
        model.end()?;
    }
}
