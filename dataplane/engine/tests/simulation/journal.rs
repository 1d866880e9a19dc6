//! A journal, and what a crash leaves of it.

use ramferry_engine::Failure;

/// A record of a journal.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Record {
    HandedOver,
    /// The source's outcome.
    Ended,
    Committed,
    Aborted(Failure),
    /// The destination's outcome, where it had to stop its guest.
    Lost,
}

/// What was written, and what is being written.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    pub(crate) records: Vec<Record>,
    /// So many of them are certain to survive a crash.
    synced: usize,
    pub(crate) writing: Option<Record>,
}

impl Journal {
    /// What was being written is written, and all of it is durable.
    pub(crate) fn sync(&mut self) {
        self.records.extend(self.writing.take());
        self.synced = self.records.len();
    }

    /// What was not synced survives, or does not.
    pub(crate) fn crash(&mut self, unsynced_survives: bool) {
        if unsynced_survives {
            self.sync();
        }
        self.writing = None;
        self.records.truncate(self.synced);
    }
}
