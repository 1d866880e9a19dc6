//! Page sets against the plainest thing that they could be: a `BTreeSet` of page numbers.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use ramferry_ram::{Block, BlockIndex, Layout, PageRun, PageSet, PageSets};

/// Longer than two of the parts that a set is made of, and no whole number of words.
const MOST_PAGES: u64 = 2 * 4096 + 300;

#[derive(Clone, Debug)]
enum Change {
    Insert(PageRun),
    Remove(PageRun),
    Union(Vec<PageRun>),
    Subtract(Vec<PageRun>),
    Intersect(Vec<PageRun>),
    Clear,
}

/// A run within `pages`; may be empty.
fn runs_within(pages: u64) -> impl Strategy<Value = PageRun> {
    (0..=pages)
        .prop_flat_map(move |first| (0..=pages - first).prop_map(move |count| PageRun { first, count }))
}

fn changes(pages: u64) -> impl Strategy<Value = Vec<Change>> {
    let runs = || prop::collection::vec(runs_within(pages), 0..6);
    let change = prop_oneof![
        4 => runs_within(pages).prop_map(Change::Insert),
        3 => runs_within(pages).prop_map(Change::Remove),
        2 => runs().prop_map(Change::Union),
        2 => runs().prop_map(Change::Subtract),
        2 => runs().prop_map(Change::Intersect),
        1 => Just(Change::Clear),
    ];
    prop::collection::vec(change, 1..20)
}

fn any_changes() -> impl Strategy<Value = (u64, Vec<Change>)> {
    (0..=MOST_PAGES).prop_flat_map(|pages| (Just(pages), changes(pages)))
}

fn set_of(pages: u64, runs: &[PageRun]) -> PageSet {
    let mut set = PageSet::new(pages);
    runs.iter().for_each(|run| set.insert_run(*run));
    set
}

fn model_of(runs: &[PageRun]) -> BTreeSet<u64> {
    runs.iter().flat_map(|run| run.first..run.end()).collect()
}

fn apply(set: &mut PageSet, model: &mut BTreeSet<u64>, change: &Change) {
    let pages = set.pages();
    match change {
        Change::Insert(run) => {
            set.insert_run(*run);
            model.extend(run.first..run.end());
        }
        Change::Remove(run) => {
            set.remove_run(*run);
            model.retain(|page| !(run.first..run.end()).contains(page));
        }
        Change::Union(runs) => {
            set.union_with(&set_of(pages, runs));
            model.extend(model_of(runs));
        }
        Change::Subtract(runs) => {
            set.subtract(&set_of(pages, runs));
            let others = model_of(runs);
            model.retain(|page| !others.contains(page));
        }
        Change::Intersect(runs) => {
            set.intersect_with(&set_of(pages, runs));
            let others = model_of(runs);
            model.retain(|page| others.contains(page));
        }
        Change::Clear => {
            set.clear();
            model.clear();
        }
    }
}

/// A set, and the plain one, after `changes`.
fn changed(pages: u64, changes: &[Change]) -> (PageSet, BTreeSet<u64>) {
    let (mut set, mut model) = (PageSet::new(pages), BTreeSet::new());
    changes.iter().for_each(|change| apply(&mut set, &mut model, change));
    (set, model)
}

/// The longest runs of consecutive members.
fn runs_of(model: &BTreeSet<u64>) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for page in model {
        match runs.last_mut() {
            Some(run) if run.end() == *page => run.count += 1,
            _ => runs.push(PageRun { first: *page, count: 1 }),
        }
    }
    runs
}

fn check(set: &PageSet, model: &BTreeSet<u64>) -> Result<(), TestCaseError> {
    prop_assert_eq!(set.count(), model.len() as u64);
    prop_assert_eq!(set.is_empty(), model.is_empty());
    for page in 0..set.pages() {
        prop_assert_eq!(set.contains(page), model.contains(&page), "page {}", page);
    }
    prop_assert_eq!(set.runs().collect::<Vec<_>>(), runs_of(model));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn any_changes_leave_the_members_that_a_plain_set_has((pages, changes) in any_changes()) {
        let (mut set, mut model) = (PageSet::new(pages), BTreeSet::new());
        for change in &changes {
            apply(&mut set, &mut model, change);
            check(&set, &model)?;
        }
    }

    #[test]
    fn searches_find_what_a_plain_set_has(
        (pages, changes) in any_changes(),
        from in 0..=MOST_PAGES,
        most in 1..=MOST_PAGES,
        count in 0..=MOST_PAGES,
    ) {
        let (set, model) = changed(pages, &changes);
        let longest = model.range(from..).next().map(|first| {
            let count = (*first..).take_while(|page| model.contains(page)).count() as u64;
            PageRun { first: *first, count }
        });
        prop_assert_eq!(set.next_run(from), longest);
        let capped = longest.map(|run| PageRun { count: run.count.min(most), ..run });
        prop_assert_eq!(set.next_run_capped(from, most), capped);
        let end = from + count;
        let first = model.range(from..end).next();
        let before = first.map(|first| {
            let count = (*first..end).take_while(|page| model.contains(page)).count() as u64;
            PageRun { first: *first, count }
        });
        prop_assert_eq!(set.next_run_before(from, end), before);
        let touches = model.range(from..from + count).next().is_some();
        prop_assert_eq!(set.intersects(PageRun { first: from, count }), touches);
    }

    /// As runs go over the wire: first, count, first, count...
    #[test]
    fn a_set_sent_as_runs_is_the_same_set_to_the_peer((pages, changes) in any_changes()) {
        let (set, _) = changed(pages, &changes);
        let sent: Vec<u64> = set.runs().flat_map(|run| [run.first, run.count]).collect();
        let mut received = PageSet::new(pages);
        for pair in sent.chunks_exact(2) {
            let run = PageRun { first: pair[0], count: pair[1] };
            prop_assert!(received.admits(run));
            received.insert_run(run);
        }
        prop_assert_eq!(received, set);
    }

    /// Runs of a peer, whatever they are: what is admitted can be inserted, and all of it is within the set.
    #[test]
    fn runs_are_admitted_exactly_where_they_fit(
        pages in 0..=MOST_PAGES,
        first in prop_oneof![0..=MOST_PAGES, any::<u64>()],
        count in prop_oneof![0..=MOST_PAGES, any::<u64>()],
    ) {
        let run = PageRun { first, count };
        let fits = count > 0 && u128::from(first) + u128::from(count) <= u128::from(pages);
        let mut set = PageSet::new(pages);
        prop_assert_eq!(set.admits(run), fits);
        if fits {
            set.insert_run(run);
            prop_assert_eq!(set.count(), count);
        }
    }

    #[test]
    fn byte_ranges_of_several_blocks_are_their_pages(
        small in prop::collection::vec(runs_within(100), 0..6),
        huge in prop::collection::vec(runs_within(20), 0..6),
    ) {
        let block = |name: &str, guest_address, pages, page_bytes| Block {
            name: name.into(),
            guest_address,
            length_bytes: pages * page_bytes,
            page_bytes,
        };
        let blocks = vec![block("small", 0, 100, 4096), block("huge", 1 << 40, 20, 2 << 20)];
        let layout = Layout::new(blocks).unwrap();
        let mut pages = PageSets::new(&layout);
        small.iter().for_each(|run| pages.block_mut(BlockIndex(0)).insert_run(*run));
        huge.iter().for_each(|run| pages.block_mut(BlockIndex(1)).insert_run(*run));
        let mut again = PageSets::new(&layout);
        let mut bytes = 0;
        for range in pages.ranges() {
            prop_assert!(layout.contains(range) && range.length > 0);
            let page_bytes = pages.page_bytes(range.block);
            prop_assert!(range.offset % page_bytes == 0 && range.length % page_bytes == 0);
            let run = PageRun { first: range.offset / page_bytes, count: range.length / page_bytes };
            prop_assert!(!again.block(range.block).intersects(run), "each page once");
            again.block_mut(range.block).insert_run(run);
            bytes += range.length;
        }
        prop_assert_eq!(bytes, pages.bytes());
        let members = pages.block(BlockIndex(0)).count() + pages.block(BlockIndex(1)).count();
        prop_assert_eq!(pages.count(), members);
        prop_assert_eq!(again, pages);
    }
}
