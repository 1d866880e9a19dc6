use std::fmt;

use crate::{BlockIndex, BlockRange, Layout};

const WORD_BITS: u64 = u64::BITS as u64;

/// Consecutive pages of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// Number of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

impl PageRun {
    /// Number of the page after the last one.
    pub fn end(self) -> u64 {
        self.first + self.count
    }
}

/// A set of the pages of one block: one bit a page.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    pages: u64,
    words: Vec<u64>,
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} pages", self.count(), self.pages)
    }
}

impl PageSet {
    /// The empty set over `pages` pages.
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(WORD_BITS)).expect("a page set fits in memory");
        Self { pages, words: vec![0; words] }
    }

    /// The set of all of `pages` pages.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::new(pages);
        set.insert_run(PageRun { first: 0, count: pages });
        set
    }

    /// Number of pages that the set is over: members and others.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Number of members.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there is no member.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether `page` is a member.
    ///
    /// # Panics
    /// When `page` is outside the set's pages.
    pub fn contains(&self, page: u64) -> bool {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.words[(page / WORD_BITS) as usize] & (1 << (page % WORD_BITS)) != 0
    }

    /// Makes every page of `run` a member.
    ///
    /// # Panics
    /// When `run` reaches outside the set's pages.
    pub fn insert_run(&mut self, run: PageRun) {
        self.for_words(run, |word, mask| *word |= mask);
    }

    /// Makes no page of `run` a member.
    ///
    /// # Panics
    /// When `run` reaches outside the set's pages.
    pub fn remove_run(&mut self, run: PageRun) {
        self.for_words(run, |word, mask| *word &= !mask);
    }

    /// Whether `run` is one that this set can hold: not empty, within its pages.
    /// For runs that come from a peer.
    pub fn admits(&self, run: PageRun) -> bool {
        run.count > 0 && run.first.checked_add(run.count).is_some_and(|end| end <= self.pages)
    }

    /// Removes every member.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds the members of `other`, a set over as many pages.
    pub fn union_with(&mut self, other: &PageSet) {
        self.zip(other, |ours, theirs| *ours |= theirs);
    }

    /// Removes the members of `other`, a set over as many pages.
    pub fn subtract(&mut self, other: &PageSet) {
        self.zip(other, |ours, theirs| *ours &= !theirs);
    }

    /// Keeps only the members that are in `other` too, a set over as many pages.
    pub fn intersect_with(&mut self, other: &PageSet) {
        self.zip(other, |ours, theirs| *ours &= theirs);
    }

    /// The longest run of members that starts at or after `from`, if there is one.
    pub fn next_run(&self, from: u64) -> Option<PageRun> {
        let first = self.next_page(from, true, self.pages)?;
        let end = self.next_page(first, false, self.pages).unwrap_or(self.pages);
        Some(PageRun { first, count: end - first })
    }

    /// The run of members that starts at or after `from`, as `next_run` has it, but
    /// cut at `max_count` pages. In a set that is nearly full, where a longest run
    /// takes a look at most of the set, this takes one at what it returns.
    ///
    /// # Panics
    /// When `max_count` is 0.
    pub fn next_run_capped(&self, from: u64, max_count: u64) -> Option<PageRun> {
        assert!(max_count > 0, "a run has at least one page");
        let first = self.next_page(from, true, self.pages)?;
        let limit = first.saturating_add(max_count).min(self.pages);
        let end = self.next_page(first, false, limit).unwrap_or(limit);
        Some(PageRun { first, count: end - first })
    }

    /// The first run of members between `from` and `end`, cut there. Looks at no others.
    pub fn next_run_before(&self, from: u64, end: u64) -> Option<PageRun> {
        let end = end.min(self.pages);
        let first = self.next_page(from, true, end)?;
        let stop = self.next_page(first, false, end).unwrap_or(end);
        Some(PageRun { first, count: stop - first })
    }

    /// Whether any page of `run` is a member. Looks at no others.
    pub fn intersects(&self, run: PageRun) -> bool {
        let end = run.first.saturating_add(run.count).min(self.pages);
        self.next_page(run.first, true, end).is_some()
    }

    /// The members as longest runs, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from)?;
            from = run.end();
            Some(run)
        })
    }

    /// The first page from `from` on, before `limit`, that is a member or is none.
    fn next_page(&self, from: u64, member: bool, limit: u64) -> Option<u64> {
        if from >= limit {
            return None;
        }
        let mut index = (from / WORD_BITS) as usize;
        let mut mask = u64::MAX << (from % WORD_BITS);
        while index as u64 * WORD_BITS < limit {
            let word = self.words[index];
            let candidates = if member { word } else { !word } & mask;
            if candidates != 0 {
                let page = index as u64 * WORD_BITS + u64::from(candidates.trailing_zeros());
                return (page < limit).then_some(page);
            }
            mask = u64::MAX;
            index += 1;
        }
        None
    }

    fn for_words(&mut self, run: PageRun, change: impl Fn(&mut u64, u64)) {
        let end = run.first.checked_add(run.count).filter(|end| *end <= self.pages);
        let end = end.unwrap_or_else(|| panic!("{run:?} in a set over {} pages", self.pages));
        let mut page = run.first;
        while page < end {
            let bit = page % WORD_BITS;
            let bits = (WORD_BITS - bit).min(end - page);
            let mask = (u64::MAX >> (WORD_BITS - bits)) << bit;
            change(&mut self.words[(page / WORD_BITS) as usize], mask);
            page += bits;
        }
    }

    fn zip(&mut self, other: &PageSet, change: impl Fn(&mut u64, u64)) {
        assert_eq!(self.pages, other.pages, "sets over the same pages");
        for (ours, theirs) in self.words.iter_mut().zip(&other.words) {
            change(ours, *theirs);
        }
    }
}

/// A set of a guest's pages: one [`PageSet`] for each block of its layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSets {
    sets: Vec<PageSet>,
    page_bytes: Vec<u64>,
}

impl PageSets {
    /// The empty sets for `layout`.
    pub fn new(layout: &Layout) -> Self {
        Self {
            sets: layout.blocks().iter().map(|block| PageSet::new(block.pages())).collect(),
            page_bytes: layout.blocks().iter().map(|block| block.page_bytes).collect(),
        }
    }

    /// The set of `block`.
    ///
    /// # Panics
    /// When the layout has no such block.
    pub fn block(&self, block: BlockIndex) -> &PageSet {
        &self.sets[block.get()]
    }

    /// The set of `block`, to change.
    ///
    /// # Panics
    /// When the layout has no such block.
    pub fn block_mut(&mut self, block: BlockIndex) -> &mut PageSet {
        &mut self.sets[block.get()]
    }

    /// Page size of `block`, in bytes.
    ///
    /// # Panics
    /// When the layout has no such block.
    pub fn page_bytes(&self, block: BlockIndex) -> u64 {
        self.page_bytes[block.get()]
    }

    /// Every block with its set.
    pub fn iter(&self) -> impl Iterator<Item = (BlockIndex, &PageSet)> {
        (0..).map(BlockIndex).zip(&self.sets)
    }

    /// Members of all sets, counted.
    pub fn count(&self) -> u64 {
        self.sets.iter().map(PageSet::count).sum()
    }

    /// Bytes of all members.
    pub fn bytes(&self) -> u64 {
        self.sets.iter().zip(&self.page_bytes).map(|(set, page)| set.count() * page).sum()
    }

    /// Whether no set has a member.
    pub fn is_empty(&self) -> bool {
        self.sets.iter().all(PageSet::is_empty)
    }

    /// Adds the members of `other`, sets of the same layout.
    pub fn union_with(&mut self, other: &PageSets) {
        self.zip(other, PageSet::union_with);
    }

    /// Removes the members of `other`, sets of the same layout.
    pub fn subtract(&mut self, other: &PageSets) {
        self.zip(other, PageSet::subtract);
    }

    /// Keeps only the members that are in `other` too, sets of the same layout.
    pub fn intersect_with(&mut self, other: &PageSets) {
        self.zip(other, PageSet::intersect_with);
    }

    /// The members as byte ranges, one for each longest run.
    pub fn ranges(&self) -> impl Iterator<Item = BlockRange> + '_ {
        self.iter().flat_map(move |(block, set)| {
            let page = self.page_bytes(block);
            set.runs().map(move |run| BlockRange {
                block,
                offset: run.first * page,
                length: run.count * page,
            })
        })
    }

    fn zip(&mut self, other: &PageSets, change: impl Fn(&mut PageSet, &PageSet)) {
        assert_eq!(self.sets.len(), other.sets.len(), "sets of one layout");
        for (ours, theirs) in self.sets.iter_mut().zip(&other.sets) {
            change(ours, theirs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pages: u64, runs: &[(u64, u64)]) -> PageSet {
        let mut set = PageSet::new(pages);
        for &(first, count) in runs {
            set.insert_run(PageRun { first, count });
        }
        set
    }

    fn runs(set: &PageSet) -> Vec<(u64, u64)> {
        set.runs().map(|run| (run.first, run.count)).collect()
    }

    #[test]
    fn runs_cross_words_and_stop_at_the_last_page() {
        let all = [(0, 1), (62, 4), (127, 66), (199, 1)];
        assert_eq!(runs(&set(200, &all)), all);
        assert_eq!(runs(&PageSet::full(130)), [(0, 130)]);
        assert_eq!(runs(&PageSet::new(0)), []);
        assert_eq!(PageSet::full(130).count(), 130);
    }

    #[test]
    fn capped_runs_are_the_starts_of_the_longest() {
        let pages = set(200, &[(0, 1), (62, 4), (127, 66), (199, 1)]);
        for from in 0..=200 {
            for max_count in [1, 2, 3, 63, 64, 65, 66, 200, u64::MAX] {
                let longest = pages.next_run(from);
                let expected = longest.map(|run| PageRun { count: run.count.min(max_count), ..run });
                assert_eq!(pages.next_run_capped(from, max_count), expected);
            }
        }
    }

    #[test]
    fn a_run_intersects_where_one_of_its_pages_is_a_member() {
        let pages = set(200, &[(62, 4), (199, 1)]);
        let intersects = |first, count| pages.intersects(PageRun { first, count });
        assert!(intersects(0, 63) && intersects(65, 1) && intersects(198, 2) && intersects(199, u64::MAX));
        assert!(!intersects(0, 62) && !intersects(66, 133) && !intersects(63, 0) && !intersects(200, 1));
    }

    #[test]
    fn removed_runs_split_what_was_there() {
        let mut pages = PageSet::full(200);
        pages.remove_run(PageRun { first: 60, count: 70 });
        assert_eq!(runs(&pages), [(0, 60), (130, 70)]);
        assert!(pages.contains(59) && !pages.contains(60) && pages.contains(130));
    }

    #[test]
    fn union_subtract_and_intersect() {
        let (a, b) = (set(100, &[(0, 50)]), set(100, &[(40, 20)]));
        let with = |change: fn(&mut PageSet, &PageSet)| {
            let mut out = a.clone();
            change(&mut out, &b);
            runs(&out)
        };
        assert_eq!(with(PageSet::union_with), [(0, 60)]);
        assert_eq!(with(PageSet::subtract), [(0, 40)]);
        assert_eq!(with(PageSet::intersect_with), [(40, 10)]);
    }

    #[test]
    fn runs_of_a_peer_are_admitted_only_within_the_set() {
        let pages = PageSet::new(10);
        assert!(pages.admits(PageRun { first: 9, count: 1 }));
        for (first, count) in [(9, 2), (10, 1), (0, 0), (u64::MAX, 2)] {
            assert!(!pages.admits(PageRun { first, count }));
        }
    }

    #[test]
    #[should_panic(expected = "in a set over 10 pages")]
    fn a_run_outside_the_set_is_an_invariant_of_ours() {
        PageSet::new(10).insert_run(PageRun { first: u64::MAX, count: 2 });
    }
}
