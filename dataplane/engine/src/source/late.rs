//! Pages that are filled after they were reported.
//!
//! DMA marks a page written when it is pinned, and fills it later without a mark. A harvest and a copy may come in
//! between; then what was sent is old, and nothing tells. So where there is such DMA, each page's hash is
//! taken just before it is sent, and compared:
//!
//! * *Settle*, while the guest runs, once the downtime would be short enough: harvest, drain, recheck, and copy what
//!   differs together with what was harvested. A transfer pinned before that harvest has ended with the drain:
//!   what it filled was compared or is copied now. One pinned after it will be reported by the next harvest. So
//!   all that was sent until then, this round included, is settled.
//! * At the pause the VMM has ended its transfers. What was sent in later rounds, from a harvest in which a page may
//!   have been marked that was not filled yet, is unsettled: it is rechecked after the last harvest.
//!
//! * In a switchover into post-copy nothing is rechecked: what is unsettled at the pause is owed, and read once more.
//!
//! Where nobody can be asked to drain, everything stays unsettled; a settle then still sends early what differs, and
//! measures what the recheck at the pause will cost.

use std::time::Duration;

use ramferry_ram::PageSets;

use super::phase::Phase;
use super::{LateWrites, Source, SourceAction};

#[derive(Clone, Debug, Default)]
pub(super) struct Late {
    writes: LateWrites,
    /// Sent since late writes are expected, and not settled.
    unsettled: Option<PageSets>,
    /// Whether a settle has come to its recheck.
    has_settled: bool,
    /// The settle under way found the guest drained.
    drained: bool,
    /// The round under way settles.
    settling: bool,
}

/// What a pause now would have to recheck.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RecheckDue {
    pub(crate) bytes: u64,
    /// It must not pause before it has settled once.
    pub(crate) never_settled: bool,
    /// Whether a settle would leave less to recheck.
    pub(crate) can_settle: bool,
}

impl Late {
    pub(super) fn expect(&mut self, writes: LateWrites) {
        self.writes = self.writes.max(writes);
    }

    pub(super) fn is_expected(&self) -> bool {
        self.writes != LateWrites::None
    }

    pub(super) fn recheck_due(&self) -> RecheckDue {
        if !self.is_expected() {
            return RecheckDue::default();
        }
        let bytes = self.unsettled.as_ref().map_or(0, PageSets::bytes);
        RecheckDue {
            bytes,
            never_settled: !self.has_settled,
            can_settle: !self.has_settled || (self.writes == LateWrites::Drainable && bytes > 0),
        }
    }

    /// Takes note of a round's pages.
    pub(super) fn copied(&mut self, pages: &PageSets) {
        if !self.is_expected() || self.settling {
            return;
        }
        match &mut self.unsettled {
            Some(unsettled) => unsettled.union_with(pages),
            None => self.unsettled = Some(pages.clone()),
        }
    }

    fn drains(&self) -> bool {
        self.writes == LateWrites::Drainable
    }

    pub(super) fn drained(&mut self, complete: bool) {
        if complete {
            self.drained = true;
        } else {
            self.writes = LateWrites::Undrainable;
        }
    }

    /// The settle's recheck was made; its round comes next.
    pub(super) fn settled(&mut self) {
        self.has_settled = true;
        // A writer that cannot be drained may have come up meanwhile.
        if std::mem::take(&mut self.drained) && self.drains() {
            self.unsettled = None;
            self.settling = true;
        }
    }

    pub(super) fn settled_round_ended(&mut self) {
        self.settling = false;
    }

    /// `pages`, and all that may have been filled since it was sent.
    pub(super) fn and_unsettled(&self, mut pages: PageSets) -> PageSets {
        if let Some(unsettled) = &self.unsettled {
            pages.union_with(unsettled);
        }
        pages
    }

    /// What must be rechecked when `pages` are sent in any case; `None` when nothing.
    pub(super) fn unsettled_but(&self, pages: &PageSets) -> Option<PageSets> {
        let mut unsettled = self.unsettled.clone()?;
        unsettled.subtract(pages);
        (!unsettled.is_empty()).then_some(unsettled)
    }
}

impl Source {
    /// Begins to settle, with `pages` harvested just now.
    pub(super) fn settle(&mut self, now: Duration, pages: PageSets, actions: &mut Vec<SourceAction>) {
        self.owed = Some(pages);
        if self.late.drains() {
            self.enter(now, Phase::Drain);
            actions.push(SourceAction::DrainGuest);
        } else {
            self.recheck(now, actions);
        }
    }

    pub(super) fn recheck(&mut self, now: Duration, actions: &mut Vec<SourceAction>) {
        let mut pages = self.late.unsettled.clone();
        if let (Some(pages), Some(owed)) = (&mut pages, &self.owed) {
            pages.subtract(owed);
        }
        let Some(pages) = pages.or_else(|| self.owed.clone().map(without_pages)) else {
            unreachable!("a settle begins with what was harvested");
        };
        self.enter(now, Phase::Recheck);
        actions.push(SourceAction::Recheck { pages });
    }

    pub(super) fn note_recheck(&mut self, differing: &PageSets, checked_bytes: u64, elapsed: Duration) {
        self.convergence.rechecked(checked_bytes, elapsed);
        self.progress.late_bytes = self.progress.late_bytes.saturating_add(differing.bytes());
    }
}

fn without_pages(mut pages: PageSets) -> PageSets {
    let all = pages.clone();
    pages.subtract(&all);
    pages
}
