use std::fmt;

use crate::{BlockIndex, BlockRange, Layout};

const WORD_BITS: u64 = u64::BITS as u64;
const CHUNK_WORDS: usize = 64;
const CHUNK_PAGES: u64 = CHUNK_WORDS as u64 * WORD_BITS;

/// The bits of 4096 pages.
type Chunk = [u64; CHUNK_WORDS];

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

/// A set of the pages of one block: one bit a page, where there are members. What
/// it takes, in memory and in time, follows the members and not the block's length.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    pages: u64,
    /// `None` where there is no member, and only there.
    chunks: Vec<Option<Box<Chunk>>>,
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} pages", self.count(), self.pages)
    }
}

impl PageSet {
    /// The empty set over `pages` pages.
    pub fn new(pages: u64) -> Self {
        let chunks = usize::try_from(pages.div_ceil(CHUNK_PAGES)).expect("a page set fits in memory");
        Self { pages, chunks: vec![None; chunks] }
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
        let words = self.chunks.iter().flatten().flat_map(|chunk| chunk.iter());
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there is no member.
    pub fn is_empty(&self) -> bool {
        self.chunks.iter().all(Option::is_none)
    }

    /// Whether `page` is a member.
    ///
    /// # Panics
    /// When `page` is outside the set's pages.
    pub fn contains(&self, page: u64) -> bool {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let chunk = self.chunks[(page / CHUNK_PAGES) as usize].as_ref();
        chunk.is_some_and(|chunk| chunk[word_of(page)] & (1 << (page % WORD_BITS)) != 0)
    }

    /// Makes every page of `run` a member.
    ///
    /// # Panics
    /// When `run` reaches outside the set's pages.
    pub fn insert_run(&mut self, run: PageRun) {
        self.check(run);
        let mut page = run.first;
        while page < run.end() {
            let chunk = self.chunks[(page / CHUNK_PAGES) as usize].get_or_insert_with(empty);
            page = for_words(chunk, page, run.end(), |word, mask| *word |= mask);
        }
    }

    /// Makes no page of `run` a member.
    ///
    /// # Panics
    /// When `run` reaches outside the set's pages.
    pub fn remove_run(&mut self, run: PageRun) {
        self.check(run);
        let mut page = run.first;
        while page < run.end() {
            let slot = &mut self.chunks[(page / CHUNK_PAGES) as usize];
            page = match slot {
                Some(chunk) => for_words(chunk, page, run.end(), |word, mask| *word &= !mask),
                None => (page / CHUNK_PAGES + 1) * CHUNK_PAGES,
            };
            drop_if_empty(slot);
        }
    }

    /// Whether `run` is one that this set can hold: not empty, within its pages.
    /// For runs that come from a peer.
    pub fn admits(&self, run: PageRun) -> bool {
        run.count > 0 && run.first.checked_add(run.count).is_some_and(|end| end <= self.pages)
    }

    /// Removes every member.
    pub fn clear(&mut self) {
        self.chunks.fill(None);
    }

    /// Adds the members of `other`, a set over as many pages.
    pub fn union_with(&mut self, other: &PageSet) {
        for (ours, theirs) in self.zip(other) {
            match (ours, theirs) {
                (Some(ours), Some(theirs)) => combine(ours, theirs, |ours, theirs| ours | theirs),
                (ours @ None, Some(_)) => ours.clone_from(theirs),
                (_, None) => {}
            }
        }
    }

    /// Removes the members of `other`, a set over as many pages.
    pub fn subtract(&mut self, other: &PageSet) {
        for (slot, theirs) in self.zip(other) {
            if let (Some(ours), Some(theirs)) = (&mut *slot, theirs) {
                combine(ours, theirs, |ours, theirs| ours & !theirs);
                drop_if_empty(slot);
            }
        }
    }

    /// Keeps only the members that are in `other` too, a set over as many pages.
    pub fn intersect_with(&mut self, other: &PageSet) {
        for (slot, theirs) in self.zip(other) {
            match (&mut *slot, theirs) {
                (Some(ours), Some(theirs)) => {
                    combine(ours, theirs, |ours, theirs| ours & theirs);
                    drop_if_empty(slot);
                }
                (Some(_), None) => *slot = None,
                (None, _) => {}
            }
        }
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
        let mut page = from;
        while page < limit {
            let Some(chunk) = &self.chunks[(page / CHUNK_PAGES) as usize] else {
                if !member {
                    return Some(page);
                }
                page = (page / CHUNK_PAGES + 1) * CHUNK_PAGES;
                continue;
            };
            let mut mask = u64::MAX << (page % WORD_BITS);
            for word in &chunk[word_of(page)..] {
                let candidates = if member { *word } else { !*word } & mask;
                if candidates != 0 {
                    let found = page / WORD_BITS * WORD_BITS + u64::from(candidates.trailing_zeros());
                    return (found < limit).then_some(found);
                }
                mask = u64::MAX;
                page = (page / WORD_BITS + 1) * WORD_BITS;
            }
        }
        None
    }

    fn check(&self, run: PageRun) {
        let end = run.first.checked_add(run.count);
        assert!(end.is_some_and(|end| end <= self.pages), "{run:?} in a set over {} pages", self.pages);
    }

    fn zip<'a>(
        &'a mut self,
        other: &'a PageSet,
    ) -> impl Iterator<Item = (&'a mut Option<Box<Chunk>>, &'a Option<Box<Chunk>>)> {
        assert_eq!(self.pages, other.pages, "sets over the same pages");
        self.chunks.iter_mut().zip(&other.chunks)
    }
}

fn empty() -> Box<Chunk> {
    Box::new([0; CHUNK_WORDS])
}

fn drop_if_empty(slot: &mut Option<Box<Chunk>>) {
    slot.take_if(|chunk| **chunk == [0; CHUNK_WORDS]);
}

fn combine(ours: &mut Chunk, theirs: &Chunk, change: impl Fn(u64, u64) -> u64) {
    for (ours, theirs) in ours.iter_mut().zip(theirs) {
        *ours = change(*ours, *theirs);
    }
}

/// Where in its chunk a page's word is.
fn word_of(page: u64) -> usize {
    (page % CHUNK_PAGES / WORD_BITS) as usize
}

/// Changes the bits of the pages from `page` to before `end`, as far as they are
/// in `chunk`, which holds the first; the page after them.
fn for_words(chunk: &mut Chunk, mut page: u64, end: u64, change: impl Fn(&mut u64, u64)) -> u64 {
    let end = end.min((page / CHUNK_PAGES + 1) * CHUNK_PAGES);
    while page < end {
        let bit = page % WORD_BITS;
        let bits = (WORD_BITS - bit).min(end - page);
        let mask = (u64::MAX >> (WORD_BITS - bits)) << bit;
        change(&mut chunk[word_of(page)], mask);
        page += bits;
    }
    page
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
    fn sets_over_many_chunks_are_equal_when_their_members_are() {
        let pages = 5 * CHUNK_PAGES + 7;
        let all = [(CHUNK_PAGES - 1, 2), (3 * CHUNK_PAGES, CHUNK_PAGES), (pages - 1, 1)];
        let mut set = set(pages, &all);
        assert_eq!(runs(&set), all);
        assert_eq!(set.next_run_before(2 * CHUNK_PAGES, 3 * CHUNK_PAGES), None);
        assert_eq!(PageSet::full(pages).next_run(9), Some(PageRun { first: 9, count: pages - 9 }));
        let mut rest = PageSet::full(pages);
        rest.subtract(&set);
        assert_eq!(rest.count() + set.count(), pages);
        rest.union_with(&set);
        assert_eq!(rest, PageSet::full(pages));
        rest.intersect_with(&set);
        assert_eq!(rest, set);
        set.remove_run(PageRun { first: 0, count: pages });
        assert_eq!(set, PageSet::new(pages));
        assert!(set.is_empty() && set.chunks.iter().all(Option::is_none));
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
