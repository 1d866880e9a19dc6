//! Marks in our own binary (USDT), for bpftrace, perf, gdb and whatever else reads `.note.stapsdt`.
//!
//! Their provider is `ramferry`. While nobody listens to a mark it costs the reading of one word, and its arguments are not
//! computed. All are of events that come a window, a round or a migration: none a page.
#![allow(
    unsafe_code,
    reason = "the marks are instructions and notes of the assembler's; see each SAFETY comment"
)]

use std::time::Duration;

use ramferry_engine::{DowntimeParts, Progress, Round};

/// `ramferry:window_registered(bytes, nanoseconds)`
#[inline(never)]
pub fn window_registered(bytes: u64, elapsed: Duration) {
    probe::probe_lazy!(ramferry, window_registered, bytes, nanoseconds(elapsed));
}

/// `ramferry:round_done(number, bytes, nanoseconds)`
#[inline(never)]
pub fn round_done(round: &Round) {
    probe::probe_lazy!(
        ramferry,
        round_done,
        round.number,
        round.transferred_bytes,
        nanoseconds(round.elapsed)
    );
}

/// `ramferry:switchover_part(name, name_bytes, nanoseconds)`, of each part in order, and
/// `ramferry:switchover_done(nanoseconds)`
#[inline(never)]
pub fn switchover_done(downtime: Duration, parts: &DowntimeParts) {
    for (name, elapsed) in parts.named() {
        probe::probe_lazy!(ramferry, switchover_part, name.as_ptr(), name.len(), nanoseconds(elapsed));
    }
    probe::probe_lazy!(ramferry, switchover_done, nanoseconds(downtime));
}

/// What of a source has been marked.
#[derive(Debug, Default)]
pub(crate) struct Marked {
    round: u32,
    is_switched_over: bool,
}

impl Marked {
    /// Marks what is new in `progress`; to be called after every event.
    pub(crate) fn follow(&mut self, progress: &Progress) {
        if let Some(round) = progress.rounds.last().filter(|round| round.number > self.round) {
            self.round = round.number;
            round_done(round);
        }
        if let (Some(downtime), false) = (progress.downtime, self.is_switched_over) {
            self.is_switched_over = true;
            switchover_done(downtime, &progress.downtime_parts);
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
