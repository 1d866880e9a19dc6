use ramferry_ram::{Block, PageRun};

use super::*;

mod model;

const PAGE: u64 = 4096;

fn layout(blocks: &[(u64, u64)]) -> Layout {
    let block = |(index, (pages, page_bytes)): (usize, &(u64, u64))| Block {
        name: format!("ram{index}"),
        guest_address: (index as u64) << 40,
        length_bytes: pages * page_bytes,
        page_bytes: *page_bytes,
    };
    Layout::new(blocks.iter().enumerate().map(block).collect()).unwrap()
}

fn config(
    mode: RegistrationMode,
    window_pages: u64,
    budget_pages: Option<u64>,
    ahead: usize,
) -> WindowConfig {
    WindowConfig {
        mode,
        window_bytes: window_pages * PAGE,
        first_window_bytes: window_pages * PAGE,
        pin_budget_bytes: budget_pages.map(|pages| pages * PAGE),
        ahead_windows: ahead,
        hole_tolerance_bytes: 2 * PAGE,
        ..WindowConfig::new(mode)
    }
}

fn dynamic(window_pages: u64, budget_pages: Option<u64>, ahead: usize) -> WindowConfig {
    config(RegistrationMode::Dynamic, window_pages, budget_pages, ahead)
}

/// One block of `pages` pages, of which `runs` are wanted.
fn begun(config: WindowConfig, pages: u64, runs: &[(u64, u64)]) -> Windows {
    let layout = layout(&[(pages, PAGE)]);
    let mut windows = Windows::new(config, &layout).unwrap();
    windows.begin_round(&wanted(&layout, runs));
    windows
}

fn wanted(layout: &Layout, runs: &[(u64, u64)]) -> PageSets {
    let mut wanted = PageSets::new(layout);
    for &(first, count) in runs {
        wanted.block_mut(BlockIndex(0)).insert_run(PageRun { first, count });
    }
    wanted
}

/// What is to be done: first page and length of each window to register, and ids to deregister.
fn actions(windows: &mut Windows) -> (Vec<(u64, u64)>, Vec<u64>) {
    let mut all = Vec::new();
    windows.actions(&mut all);
    let (mut register, mut deregister) = (Vec::new(), Vec::new());
    for action in all {
        match action {
            WindowAction::Register(window) => {
                register.push((window.range.offset / PAGE, window.range.length / PAGE));
            }
            WindowAction::Deregister(id) => deregister.push(id.0),
        }
    }
    (register, deregister)
}

fn acquire(windows: &mut Windows, page: u64) -> Acquire {
    windows.acquire(BlockIndex(0), page * PAGE)
}

fn ready(id: u64, pages: u64) -> Acquire {
    Acquire::Ready { id: WindowId(id), bytes: pages * PAGE }
}

#[test]
fn windows_cover_runs_merge_short_gaps_and_skip_holes() {
    let mut windows = begun(dynamic(16, None, 8), 1000, &[(3, 2), (7, 1), (100, 40), (999, 1)]);
    let (register, _) = actions(&mut windows);
    assert_eq!(register, [(3, 5), (100, 16), (116, 16), (132, 8), (999, 1)]);
    assert_eq!(windows.registered_bytes(), 46 * PAGE);
    assert_eq!(actions(&mut windows), (vec![], vec![]));
}

#[test]
fn the_first_windows_are_short_and_each_is_twice_as_long_as_the_one_before() {
    for mode in [RegistrationMode::Dynamic, RegistrationMode::PinAll] {
        let config = WindowConfig { first_window_bytes: PAGE, ..config(mode, 8, None, 8) };
        let mut windows = begun(config, 40, &[(10, 30)]);
        let (register, _) = actions(&mut windows);
        assert_eq!(register[..5], [(10, 1), (11, 2), (13, 4), (17, 8), (25, 8)]);
        windows.begin_round(&wanted(&layout(&[(40, PAGE)]), &[(0, 10)]));
        assert!(actions(&mut windows).0.iter().all(|&(first, count)| count == 8 || first + count == 10));
    }
}

#[test]
fn the_lead_moves_with_the_cursor() {
    let mut windows = begun(dynamic(10, None, 2), 100, &[(0, 100)]);
    assert_eq!(actions(&mut windows).0, [(0, 10), (10, 10)]);
    windows.registered(WindowId(0));
    windows.registered(WindowId(1));
    assert_eq!(acquire(&mut windows, 3), ready(0, 7));
    assert_eq!(acquire(&mut windows, 10), ready(1, 10));
    assert_eq!(actions(&mut windows).0, [(20, 10)]);
    assert_eq!(acquire(&mut windows, 50), Acquire::NotYet);
    assert_eq!(actions(&mut windows).0, [(50, 10), (60, 10)]);
}

#[test]
fn more_short_windows_are_registered_ahead_than_long_ones() {
    let scattered: Vec<_> = (0..1000).map(|page| (page * 10, 1)).collect();
    let mut windows = begun(dynamic(16, None, 2), 10_000, &scattered);
    assert_eq!(actions(&mut windows).0.len(), 32);
}

#[test]
fn names_count_on_from_the_first() {
    let config = WindowConfig { first_id: 1 << 40, ..dynamic(4, None, 2) };
    let mut windows = begun(config, 40, &[(0, 40)]);
    let mut actions = Vec::new();
    windows.actions(&mut actions);
    let ids = actions.iter().map(|action| match action {
        WindowAction::Register(window) => window.id.0,
        WindowAction::Deregister(id) => panic!("{id:?} was never registered"),
    });
    assert_eq!(ids.collect::<Vec<_>>(), [1 << 40, (1 << 40) + 1]);
}

#[test]
fn a_page_that_was_not_wanted_is_registered_when_asked_for() {
    let mut windows = begun(dynamic(16, None, 2), 100, &[]);
    assert_eq!(actions(&mut windows).0, []);
    assert_eq!(acquire(&mut windows, 40), Acquire::NotYet);
    assert_eq!(actions(&mut windows).0, [(40, 1)]);
    windows.registered(WindowId(0));
    assert_eq!(
        windows.acquire(BlockIndex(0), 40 * PAGE + 100),
        Acquire::Ready { id: WindowId(0), bytes: PAGE - 100 }
    );
}

#[test]
fn new_windows_fill_the_gaps_between_those_there_are() {
    let mut windows = begun(dynamic(16, None, 4), 100, &[(10, 2), (20, 2)]);
    actions(&mut windows);
    windows.begin_round(&wanted(&layout(&[(100, PAGE)]), &[(5, 30)]));
    assert_eq!(actions(&mut windows).0, [(5, 5), (12, 8), (22, 13)]);
}

#[test]
fn under_a_budget_the_least_recently_used_makes_room() {
    // Windows of 2 pages; room for 4.
    let mut windows = begun(dynamic(100, Some(8), 4), 100, &[(0, 100)]);
    assert_eq!(actions(&mut windows).0, [(0, 2), (2, 2), (4, 2), (6, 2)]);
    for id in 0..4 {
        windows.registered(WindowId(id));
    }
    // The first is in use, the second was used after the third.
    assert_eq!(acquire(&mut windows, 0), ready(0, 2));
    for id in [2, 1, 3] {
        assert_eq!(acquire(&mut windows, 2 * id), ready(id, 2));
        windows.release(WindowId(id));
    }
    assert_eq!(acquire(&mut windows, 8), Acquire::NotYet);
    let (register, deregister) = actions(&mut windows);
    assert_eq!((register, deregister), (vec![], vec![2, 1, 3]));
    assert_eq!(windows.registered_bytes(), 8 * PAGE);
    windows.deregistered(WindowId(2));
    assert_eq!(actions(&mut windows), (vec![(8, 2)], vec![]));
    windows.deregistered(WindowId(1));
    assert_eq!(actions(&mut windows), (vec![(10, 2)], vec![]));
    assert_eq!(windows.peak_bytes(), 8 * PAGE);
}

#[test]
fn a_window_needed_later_makes_room_for_one_needed_now() {
    let mut windows = begun(dynamic(100, Some(4), 4), 100, &[(50, 4)]);
    assert_eq!(actions(&mut windows).0, [(50, 1), (51, 1), (52, 1), (53, 1)]);
    for id in 0..4 {
        windows.registered(WindowId(id));
    }
    assert_eq!(acquire(&mut windows, 3), Acquire::NotYet);
    assert_eq!(actions(&mut windows), (vec![], vec![3]));
    windows.deregistered(WindowId(3));
    assert_eq!(actions(&mut windows), (vec![(3, 1)], vec![]));
}

#[test]
fn what_a_round_left_in_line_is_not_registered_in_the_next() {
    let mut windows = begun(dynamic(1, Some(1), 4), 10, &[(0, 10)]);
    actions(&mut windows);
    windows.registered(WindowId(0));
    assert_eq!(acquire(&mut windows, 5), Acquire::NotYet);
    assert_eq!(actions(&mut windows), (vec![], vec![0]));
    windows.begin_round(&wanted(&layout(&[(10, PAGE)]), &[]));
    windows.deregistered(WindowId(0));
    assert_eq!(actions(&mut windows), (vec![], vec![]));
}

#[test]
fn a_window_in_use_is_waited_for() {
    let mut windows = begun(dynamic(1, Some(1), 4), 10, &[(0, 10)]);
    assert_eq!(actions(&mut windows).0, [(0, 1)]);
    windows.registered(WindowId(0));
    assert_eq!(acquire(&mut windows, 0), ready(0, 1));
    assert_eq!(acquire(&mut windows, 1), Acquire::NotYet);
    assert_eq!(actions(&mut windows), (vec![], vec![]));
    windows.release(WindowId(0));
    assert_eq!(actions(&mut windows), (vec![], vec![0]));
    assert_eq!(acquire(&mut windows, 0), Acquire::NotYet);
    assert_eq!(acquire(&mut windows, 1), Acquire::NotYet);
    windows.deregistered(WindowId(0));
    assert_eq!(actions(&mut windows), (vec![(1, 1)], vec![]));
}

#[test]
fn what_failed_is_tried_again_only_when_asked_for() {
    let mut windows = begun(dynamic(10, None, 4), 30, &[(0, 30)]);
    actions(&mut windows);
    windows.failed(WindowId(1));
    assert_eq!(actions(&mut windows).0, []);
    assert_eq!(windows.registered_bytes(), 20 * PAGE);
    assert_eq!(acquire(&mut windows, 10), Acquire::NotYet);
    assert_eq!(actions(&mut windows).0, [(10, 10)]);
    windows.failed(WindowId(3));
    windows.begin_round(&wanted(&layout(&[(30, PAGE)]), &[(0, 30)]));
    assert_eq!(actions(&mut windows).0, [(10, 10)]);
}

#[test]
fn pin_all_registers_everything_once_from_the_first_wanted_page_on() {
    let layout = layout(&[(25, PAGE), (10, PAGE)]);
    let mut windows = Windows::new(config(RegistrationMode::PinAll, 10, Some(35), 1), &layout).unwrap();
    windows.begin_round(&wanted(&layout, &[(12, 1)]));
    assert_eq!(actions(&mut windows).0, [(12, 10), (22, 3), (0, 10), (0, 10), (10, 2)]);
    assert_eq!(windows.registered_bytes(), 35 * PAGE);
    for id in 0..5 {
        windows.registered(WindowId(id));
    }
    assert_eq!(windows.total_registered_bytes(), 35 * PAGE);
    windows.begin_round(&wanted(&layout, &[(0, 25)]));
    assert_eq!(actions(&mut windows), (vec![], vec![]));
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    let guest = layout(&[(10, PAGE), (4, 2 << 20)]);
    let refused = |config| Windows::new(config, &guest).unwrap_err();
    assert_eq!(
        refused(dynamic(1, Some(511), 1)),
        WindowError::BudgetBelowPage { budget_bytes: 511 * PAGE, page_bytes: 2 << 20 }
    );
    assert!(matches!(
        refused(config(RegistrationMode::PinAll, 1, Some(600), 1)),
        WindowError::BudgetBelowGuest { .. }
    ));
    assert_eq!(
        refused(WindowConfig { links_bytes: PAGE, ..dynamic(1, Some(512), 1) }),
        WindowError::BudgetBelowPage { budget_bytes: 511 * PAGE, page_bytes: 2 << 20 }
    );
    let large = layout(&[(1 << 20, PAGE)]);
    let short = Windows::new(config(RegistrationMode::PinAll, 1, None, 1), &large);
    assert!(matches!(short, Err(WindowError::TooManyWindows { .. })));
    assert!(Windows::new(dynamic(0, Some(512), 0), &guest).is_ok());
}

#[test]
fn the_number_of_windows_is_bounded() {
    let scattered: Vec<_> = (0..10).map(|page| (page * 10, 1)).collect();
    let mut windows = begun(dynamic(16, None, 4), 100, &scattered);
    windows.table.max_windows = 3;
    assert_eq!(actions(&mut windows).0, [(0, 1), (10, 1), (20, 1)]);
    for id in 0..3 {
        windows.registered(WindowId(id));
    }
    assert_eq!(acquire(&mut windows, 10), ready(1, 1));
    assert_eq!(actions(&mut windows), (vec![], vec![0]));
    windows.deregistered(WindowId(0));
    assert_eq!(actions(&mut windows), (vec![(30, 1)], vec![]));
}

#[test]
fn the_end_deregisters_what_is_idle_and_then_the_rest() {
    let mut windows = begun(dynamic(10, None, 4), 30, &[(0, 30)]);
    actions(&mut windows);
    windows.registered(WindowId(0));
    windows.registered(WindowId(1));
    assert_eq!(acquire(&mut windows, 0), ready(0, 10));
    let end_all = |windows: &mut Windows| {
        let mut out = Vec::new();
        windows.end_all(&mut out);
        out
    };
    assert_eq!(end_all(&mut windows), [WindowAction::Deregister(WindowId(1))]);
    windows.deregistered(WindowId(1));
    assert_eq!(acquire(&mut windows, 10), Acquire::NotYet);
    assert_eq!(actions(&mut windows), (vec![], vec![]));
    windows.release(WindowId(0));
    windows.registered(WindowId(2));
    let ids = [WindowAction::Deregister(WindowId(2)), WindowAction::Deregister(WindowId(0))];
    let mut rest = end_all(&mut windows);
    rest.sort_by_key(|action| *action != ids[0]);
    assert_eq!(rest, ids);
    assert_eq!(end_all(&mut windows), []);
    windows.deregistered(WindowId(0));
    windows.deregistered(WindowId(2));
    assert_eq!(windows.registered_bytes(), 0);
}

/// Each state of a window meets each report about it: what does not fit is ignored.
#[test]
fn every_report_in_every_state() {
    type Report = fn(&mut Windows, WindowId);
    let reports: [(&str, Report); 3] = [
        ("registered", Windows::registered),
        ("failed", Windows::failed),
        ("deregistered", Windows::deregistered),
    ];
    let expected = [
        // From none, REGISTERING, READY, DEREGISTERING to, for each report:
        ("none", ["none", "none", "none"]),
        ("registering", ["ready", "none", "registering"]),
        ("ready", ["ready", "ready", "ready"]),
        ("deregistering", ["deregistering", "deregistering", "none"]),
    ];
    for (from, to) in expected {
        for ((name, report), to) in reports.iter().zip(to) {
            let mut windows = begun(dynamic(10, None, 1), 10, &[(0, 10)]);
            let id = WindowId(0);
            if from != "none" {
                actions(&mut windows);
            }
            if from == "ready" || from == "deregistering" {
                windows.registered(id);
            }
            if from == "deregistering" {
                windows.end_all(&mut Vec::new());
            }
            report(&mut windows, id);
            assert_eq!(state_of(&windows, id), to, "{name} when {from}");
        }
    }
}

fn state_of(windows: &Windows, id: WindowId) -> &'static str {
    match windows.table.find(id).map(|entry| entry.state) {
        None => "none",
        Some(table::State::Registering) => "registering",
        Some(table::State::Ready { .. }) => "ready",
        Some(table::State::Deregistering) => "deregistering",
    }
}

#[test]
#[should_panic(expected = "an operation in flight")]
fn releasing_what_was_not_acquired_is_an_invariant_of_ours() {
    let mut windows = begun(dynamic(10, None, 1), 10, &[(0, 10)]);
    actions(&mut windows);
    windows.registered(WindowId(0));
    windows.release(WindowId(0));
}
