//! What must hold, whatever happens.

/// A rule that was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Violation {
    /// The guest ran on both sides at once.
    BothRun,
    /// A guest that ran at the destination was discarded.
    GuestLost,
    /// At the end the guest ran nowhere.
    NeitherRuns,
    /// The destination guest was resumed with RAM or device state that is not the source's last, or its VMM was
    /// given device state before RAM was; but for pages that are owed. Or it came to a page that is not its memory.
    Differs,
    /// Something was written to the destination's RAM while its guest ran.
    WrittenWhileRunning,
    /// A page that the destination guest was let in to was written again by a read from the source.
    Overwritten,
    /// A guest whose memory is lost runs on.
    RunsOn,
    /// The source let go of memory that the destination's guest is owed.
    LetGoEarly,
    /// The destination guest was resumed while COMMITTED was not its journal's last record.
    ResumedWithoutCommitted,
    /// The source guest was resumed after COMMIT was sent while ABORTED was not the destination's last record.
    ResumedInDoubt,
    /// A side did not come to its end.
    Unfinished,
    /// A side reported an end that is not where the guest runs, or more than one.
    WrongOutcome,
    /// The source guest was still held back when its migration ended.
    LeftThrottled,
    /// A cancelled migration had its guest paused 100 ms later.
    SlowCancel,
}

/// Collects what was broken, and when, in words.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    pub(crate) violations: Vec<Violation>,
    pub(crate) trace: Vec<String>,
}

impl Checker {
    pub(crate) fn require(&mut self, holds: bool, violation: Violation) {
        if !holds {
            self.trace.push(format!("!!! {violation:?}"));
            self.violations.push(violation);
        }
    }
}
