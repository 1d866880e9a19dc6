//! When to switch over: the one place that decides it.
//!
//! After each round and the harvest that follows it, the downtime of a switchover that began now is
//! expected to be
//!
//! ```text
//! (owed bytes + dirty rate x PAUSE_LATENCY) / throughput  +  harvest + fence + max(acknowledgement, device state)
//! ```
//!
//! and the switchover begins once that is at most `max_downtime`. All terms are measured, except the device
//! state, which the driver estimates.
//!
//! * Throughput is what recent rounds reached, each weighted by its size, the latest most. Under a bandwidth
//!   limit it is what the limit lets through, although the last round is not held to the limit: how much faster
//!   the links would be is not known, and a downtime that turns out shorter than expected hurts nobody.
//! * In round 1 only what was sent counts: zero pages that the guest never wrote cost next to nothing, and tell
//!   nothing about those that it writes.
//! * The comparison of RAM (`verify`) is not part of the expectation.
//!
//! * Where pages are filled late, the recheck at the pause counts, at the rate at which the last one went.
//!
//! Short enough is not as short as can be: where what is owed is a good part of that downtime, and a round more is expected
//! to leave at most half of it, that round is made while the guest runs, up to 3 of them in a migration. Each is judged as
//! any other, so that a guest that begins to write more is not caught with a longer pause.
//!
//! A migration makes progress when what is owed reaches a new minimum, by 5 % at least. Without progress for
//! `no_progress_timeout`, and for 3 rounds, it does not converge. Where post-copy is allowed, one such round is enough:
//! post-copy can begin at any time with a short downtime, and a further round would only send pages again. When nothing
//! is owed, that cannot get less: where the fixed costs alone exceed `max_downtime`, no further round can help, and the
//! same rule ends it.

use std::time::Duration;

use crate::limits::{PAUSE_LATENCY, ROUND_INTERVAL};
use crate::source::RecheckDue;
use crate::{BytesPerSecond, Failure, FixedCosts, Parameters, Postcopy, Reason, Round};

/// Rounds without progress that it takes at least not to converge.
const ROUNDS_WITHOUT_PROGRESS: u32 = 3;
/// A new minimum is at most this many percent of the one before.
const PROGRESS_PERCENT: u128 = 95;
/// What a round weighs in the throughput, once the next one was measured.
const OLDER_ROUNDS_DIVISOR: u64 = 4;

/// Rounds at most that are made although the downtime is short enough.
const SHORTENING_ROUNDS: u32 = 3;
/// A copy in the pause is worth such a round where it takes so long, which the round's own harvest, fence and
/// acknowledgement may take too,
const WORTHWHILE: Duration = Duration::from_millis(2);
/// and is this part of the downtime at least.
const WORTHWHILE_DIVISOR: u32 = 8;

/// What to do after a harvest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Copy what is owed while the guest runs.
    NextRound,
    /// The downtime is expected to be short enough.
    SwitchOver,
    /// It would be, but for what there is to recheck.
    Settle,
    /// Further rounds do not help.
    NotConverging,
}

#[derive(Clone, Copy, Debug)]
struct Best {
    owed_bytes: u64,
    since: Duration,
    rounds_since: u32,
}

/// What was measured, and what follows from it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Convergence {
    harvest: Duration,
    fence: Duration,
    acknowledge: Duration,
    device_state: Duration,
    copied_bytes: u64,
    copied_in: Duration,
    dirty_rate: Option<BytesPerSecond>,
    rechecked_bytes: u64,
    rechecked_in: Duration,
    best: Option<Best>,
    shortening_rounds: u32,
}

impl Convergence {
    pub(crate) fn new(fixed: FixedCosts) -> Self {
        Self { fence: fixed.fence, device_state: fixed.device_state, ..Self::default() }
    }

    pub(crate) fn copied(&mut self, round: &Round) {
        let first_round_sent = round.number == 1 && round.transferred_bytes > 0;
        let zero_bytes = if first_round_sent { 0 } else { round.zero_bytes };
        let bytes = round.transferred_bytes.saturating_add(zero_bytes);
        if bytes > 0 {
            self.copied_bytes = (self.copied_bytes / OLDER_ROUNDS_DIVISOR).saturating_add(bytes);
            let older = self.copied_in / u32::try_from(OLDER_ROUNDS_DIVISOR).expect("a small constant");
            self.copied_in = older.saturating_add(round.elapsed);
        }
    }

    pub(crate) fn fenced(&mut self, elapsed: Duration) {
        self.fence = elapsed;
    }

    pub(crate) fn acknowledged(&mut self, elapsed: Duration) {
        self.acknowledge = elapsed;
    }

    /// The guest wrote `written_bytes` in the `interval` between two harvests, the later of which took `elapsed`.
    pub(crate) fn harvested(&mut self, written_bytes: u64, interval: Duration, elapsed: Duration) {
        self.harvest = elapsed;
        self.dirty_rate = rate(written_bytes, interval);
    }

    pub(crate) fn rechecked(&mut self, bytes: u64, elapsed: Duration) {
        if bytes > 0 {
            (self.rechecked_bytes, self.rechecked_in) = (bytes, elapsed);
        }
    }

    pub(crate) fn throughput(&self) -> Option<BytesPerSecond> {
        if self.copied_bytes == 0 { None } else { rate(self.copied_bytes, self.copied_in) }
    }

    pub(crate) fn dirty_rate(&self) -> Option<BytesPerSecond> {
        self.dirty_rate
    }

    /// How long the copy of `bytes` would take; `None` while nothing was copied to tell it from.
    pub(crate) fn copy_time(&self, bytes: u64) -> Option<Duration> {
        if bytes == 0 {
            return Some(Duration::ZERO);
        }
        let copied_bytes = u128::from(self.copied_bytes);
        let nanoseconds = u128::from(bytes).saturating_mul(self.copied_in.as_nanos());
        nanoseconds.checked_div(copied_bytes).map(from_nanoseconds)
    }

    /// How long the recheck of `bytes` would take. None was made yet: not known, and taken for nothing.
    fn recheck_time(&self, bytes: u64) -> Duration {
        let nanoseconds = u128::from(bytes).saturating_mul(self.rechecked_in.as_nanos());
        nanoseconds.checked_div(u128::from(self.rechecked_bytes)).map_or(Duration::ZERO, from_nanoseconds)
    }

    /// The downtime, if the switchover began now with `owed_bytes` to be sent and `recheck_bytes` to be compared.
    pub(crate) fn expected_downtime(&self, owed_bytes: u64, recheck_bytes: u64) -> Option<Duration> {
        let copy = self.copy_time(owed_bytes.saturating_add(self.dirtied_in(PAUSE_LATENCY)))?;
        Some(copy.saturating_add(self.fixed()).saturating_add(self.recheck_time(recheck_bytes)))
    }

    /// What to do with `owed_bytes`, harvested or left over after a round.
    pub(crate) fn judge(
        &mut self,
        now: Duration,
        owed_bytes: u64,
        recheck: RecheckDue,
        parameters: &Parameters,
    ) -> Verdict {
        let progress = self.note_progress(now, owed_bytes);
        let fits = |recheck_bytes| {
            self.expected_downtime(owed_bytes, recheck_bytes)
                .is_some_and(|expected| expected <= parameters.max_downtime)
        };
        if fits(recheck.bytes) && !recheck.never_settled {
            return Verdict::SwitchOver;
        }
        let stalled_for = now.saturating_sub(progress.since);
        let (rounds, patience) = match parameters.postcopy {
            Postcopy::Never => (ROUNDS_WITHOUT_PROGRESS, parameters.no_progress_timeout),
            Postcopy::Allow | Postcopy::Always => (1, Duration::ZERO),
        };
        if progress.rounds_since >= rounds && stalled_for >= patience {
            return Verdict::NotConverging;
        }
        if recheck.can_settle && fits(0) {
            return Verdict::Settle;
        }
        Verdict::NextRound
    }

    /// Whether a round more shortens a `downtime` that is short enough, by something that counts. Says so a few times only.
    pub(crate) fn shortens(&mut self, owed_bytes: u64, downtime: Duration) -> bool {
        let Some(copy) = self.copy_time(owed_bytes) else { return false };
        let round =
            [self.fence, self.acknowledge, self.harvest].into_iter().fold(copy, Duration::saturating_add);
        let left_bytes = self.dirtied_in(round.max(ROUND_INTERVAL));
        let shortens = self.shortening_rounds < SHORTENING_ROUNDS
            && copy >= WORTHWHILE.max(downtime / WORTHWHILE_DIVISOR)
            && left_bytes <= owed_bytes / 2;
        self.shortening_rounds += u32::from(shortens);
        shortens
    }

    /// What the guest writes meanwhile, at its last rate.
    fn dirtied_in(&self, time: Duration) -> u64 {
        let dirty_rate = u128::from(self.dirty_rate.map_or(0, |rate| rate.0));
        let dirtied = dirty_rate.saturating_mul(time.as_nanos()) / NANOSECONDS_PER_SECOND;
        u64::try_from(dirtied).unwrap_or(u64::MAX)
    }

    /// Rounds in a row that brought no progress.
    pub(crate) fn rounds_without_progress(&self) -> u32 {
        self.best.map_or(0, |best| best.rounds_since)
    }

    /// Something was done about it: the time without progress begins anew.
    pub(crate) fn begin_anew(&mut self, now: Duration) {
        if let Some(best) = &mut self.best {
            (best.since, best.rounds_since) = (now, 0);
        }
    }

    /// Whether a switchover with nothing to be sent would be short enough.
    pub(crate) fn copy_decides(&self, parameters: &Parameters) -> bool {
        self.fixed() <= parameters.max_downtime
    }

    /// Why a migration that owes `owed_bytes` does not converge, and what to do about it.
    pub(crate) fn not_converging(
        &self,
        owed_bytes: u64,
        recheck_bytes: u64,
        parameters: &Parameters,
    ) -> Failure {
        let downtime = self.expected_downtime(owed_bytes, recheck_bytes);
        let fixed = self.fixed().saturating_add(self.recheck_time(recheck_bytes));
        let recheck = if recheck_bytes > 0 { "recheck, " } else { "" };
        let cause = if fixed > parameters.max_downtime {
            format!("harvest, {recheck}fence, and device state or acknowledgement alone take {fixed:?}; ")
        } else {
            String::new()
        };
        let message = format!(
            "rounds brought no progress for {:?}: {cause}the guest dirties {}, the copy reaches {}, expected \
             downtime {}, max_downtime {:?}. Raise max_downtime{}, allow post-copy{}, force the switchover (timeout_action \
             FORCE), or migrate while the guest writes less",
            parameters.no_progress_timeout,
            shown_rate(self.dirty_rate),
            shown_rate(self.throughput()),
            downtime.map_or("unknown".to_owned(), |downtime| format!("{downtime:.1?}")),
            parameters.max_downtime,
            if parameters.bandwidth_limit.is_some() { " or bandwidth_limit" } else { "" },
            if parameters.throttle.is_none() { " or throttling" } else { "" },
        );
        Failure::new(Reason::NotConverging, message)
    }

    fn fixed(&self) -> Duration {
        [self.harvest, self.fence, self.acknowledge.max(self.device_state)]
            .into_iter()
            .fold(Duration::ZERO, Duration::saturating_add)
    }

    fn note_progress(&mut self, now: Duration, owed_bytes: u64) -> Best {
        let best = match self.best {
            Some(best) if !is_progress(best.owed_bytes, owed_bytes) => {
                Best { rounds_since: best.rounds_since.saturating_add(1), ..best }
            }
            _ => Best { owed_bytes, since: now, rounds_since: 0 },
        };
        self.best = Some(best);
        best
    }
}

const NANOSECONDS_PER_SECOND: u128 = 1_000_000_000;

fn is_progress(best_bytes: u64, owed_bytes: u64) -> bool {
    owed_bytes < best_bytes && u128::from(owed_bytes) * 100 <= u128::from(best_bytes) * PROGRESS_PERCENT
}

fn from_nanoseconds(nanoseconds: u128) -> Duration {
    u64::try_from(nanoseconds).map_or(Duration::MAX, Duration::from_nanos)
}

/// `None` for a time of zero, in which nothing can be measured.
fn rate(bytes: u64, elapsed: Duration) -> Option<BytesPerSecond> {
    let per_second = (u128::from(bytes) * NANOSECONDS_PER_SECOND).checked_div(elapsed.as_nanos())?;
    Some(BytesPerSecond(u64::try_from(per_second).unwrap_or(u64::MAX)))
}

fn shown_rate(rate: Option<BytesPerSecond>) -> String {
    rate.map_or("an unknown amount".to_owned(), |rate| format!("{:.1} MB/s", rate.0 as f64 / 1e6))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn milliseconds(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// 1 GiB/s, 1 ms of harvest, 1 ms of fence, 1 ms of acknowledgement, 7 ms of device state.
    fn measured() -> Convergence {
        let fixed = FixedCosts { fence: milliseconds(50), device_state: milliseconds(7) };
        let mut convergence = Convergence::new(fixed);
        convergence.copied(&round(1, 1024 * MIB, 0, 1000));
        convergence.fenced(milliseconds(1));
        convergence.acknowledged(milliseconds(1));
        convergence.harvested(0, milliseconds(1000), milliseconds(1));
        convergence
    }

    fn round(number: u32, transferred_bytes: u64, zero_bytes: u64, elapsed_ms: u64) -> Round {
        Round { number, transferred_bytes, zero_bytes, elapsed: milliseconds(elapsed_ms), dirtied_bytes: 0 }
    }

    fn parameters(max_downtime_ms: u64) -> Parameters {
        Parameters { max_downtime: milliseconds(max_downtime_ms), ..Parameters::default() }
    }

    #[test]
    fn switches_over_once_what_is_owed_fits_the_downtime() {
        let mut convergence = measured();
        assert_eq!(convergence.expected_downtime(256 * MIB, 0), Some(milliseconds(259)));
        assert_eq!(
            convergence.judge(milliseconds(0), 256 * MIB, RecheckDue::default(), &parameters(258)),
            Verdict::NextRound
        );
        assert_eq!(
            convergence.judge(milliseconds(0), 256 * MIB, RecheckDue::default(), &parameters(259)),
            Verdict::SwitchOver
        );
    }

    #[test]
    fn one_more_round_is_made_where_it_halves_what_the_pause_would_copy() {
        let shortens = |dirtied_mib: u64, owed_mib: u64| {
            let mut convergence = measured();
            convergence.harvested(dirtied_mib * MIB, milliseconds(1000), milliseconds(1));
            let downtime = convergence.expected_downtime(owed_mib * MIB, 0).unwrap();
            convergence.shortens(owed_mib * MIB, downtime)
        };
        assert!(shortens(100, 100));
        assert!(shortens(480, 100));
        assert!(!shortens(520, 100), "the next round would owe more than half of this one");
        assert!(!shortens(1, 1), "the device state takes far longer than that copy");
        assert!(!shortens(0, 0));
    }

    #[test]
    fn rounds_for_a_shorter_pause_come_to_an_end() {
        let mut convergence = measured();
        let downtime = convergence.expected_downtime(100 * MIB, 0).unwrap();
        let made = (0..10).filter(|_| convergence.shortens(100 * MIB, downtime)).count();
        assert_eq!(made, SHORTENING_ROUNDS as usize);
    }

    #[test]
    fn what_the_guest_dirties_until_its_pause_is_counted() {
        let mut convergence = measured();
        convergence.harvested(512 * MIB, milliseconds(1000), milliseconds(1));
        let idle = measured().expected_downtime(0, 0).unwrap();
        let expected = convergence.expected_downtime(0, 0).unwrap() - idle;
        assert!(expected.abs_diff(PAUSE_LATENCY / 2) < Duration::from_micros(1), "{expected:?}");
    }

    #[test]
    fn nothing_copied_means_nothing_is_expected() {
        let mut convergence = Convergence::new(FixedCosts::default());
        assert_eq!(convergence.expected_downtime(1, 0), None);
        assert_eq!(convergence.throughput(), None);
        assert!(!convergence.shortens(1, Duration::ZERO));
        assert_eq!(
            convergence.judge(milliseconds(0), 1, RecheckDue::default(), &parameters(100)),
            Verdict::NextRound
        );
        assert_eq!(
            convergence.judge(milliseconds(0), 0, RecheckDue::default(), &parameters(100)),
            Verdict::SwitchOver
        );
    }

    #[test]
    fn zero_pages_of_the_first_round_do_not_make_the_copy_look_fast() {
        let mut convergence = Convergence::new(FixedCosts::default());
        convergence.copied(&round(1, 100 * MIB, 10_000 * MIB, 100));
        assert_eq!(convergence.copy_time(100 * MIB), Some(milliseconds(100)));
        convergence.copied(&round(2, 100 * MIB, 900 * MIB, 100));
        assert!(convergence.copy_time(100 * MIB).unwrap() < milliseconds(20));
    }

    #[test]
    fn a_first_round_of_zero_pages_alone_still_gives_a_throughput() {
        let mut convergence = Convergence::new(FixedCosts::default());
        convergence.copied(&round(1, 0, 100 * MIB, 100));
        assert_eq!(convergence.copy_time(100 * MIB), Some(milliseconds(100)));
    }

    #[test]
    fn a_link_that_slows_down_is_noticed_and_a_tiny_round_is_not_trusted() {
        let mut convergence = measured();
        convergence.copied(&round(2, 4096, 0, 1));
        let after_tiny = convergence.copy_time(1024 * MIB).unwrap();
        assert!(after_tiny < milliseconds(1100), "{after_tiny:?}");
        for number in 3..6 {
            convergence.copied(&round(number, 100 * MIB, 0, 1000));
        }
        let after_slow = convergence.copy_time(100 * MIB).unwrap();
        assert!(after_slow > milliseconds(800), "{after_slow:?}");
    }

    #[test]
    fn where_postcopy_is_allowed_one_round_without_progress_is_enough() {
        let parameters = Parameters { postcopy: Postcopy::Allow, ..parameters(5) };
        let mut convergence = measured();
        let mut judge = |owed| convergence.judge(Duration::ZERO, owed, RecheckDue::default(), &parameters);
        assert_eq!(judge(1000 * MIB), Verdict::NextRound);
        assert_eq!(judge(900 * MIB), Verdict::NextRound);
        assert_eq!(judge(880 * MIB), Verdict::NotConverging);
    }

    #[test]
    fn no_progress_takes_both_time_and_rounds() {
        let parameters = parameters(100);
        let mut convergence = measured();
        let mut judge =
            |at_ms| convergence.judge(milliseconds(at_ms), 1000 * MIB, RecheckDue::default(), &parameters);
        assert_eq!(judge(0), Verdict::NextRound);
        assert_eq!(judge(9000), Verdict::NextRound);
        assert_eq!(judge(18000), Verdict::NextRound);
        assert_eq!(judge(27000), Verdict::NotConverging);

        let mut convergence = measured();
        let mut judge =
            |at_ms| convergence.judge(milliseconds(at_ms), 1000 * MIB, RecheckDue::default(), &parameters);
        assert!((0..500).all(|round| judge(round * 10) == Verdict::NextRound));
        assert_eq!(judge(5000), Verdict::NotConverging);
    }

    #[test]
    fn a_new_minimum_is_progress_only_by_five_percent() {
        let parameters = parameters(100);
        let mut convergence = measured();
        let mut owed_bytes = 1_000_000 * MIB;
        for round in 0..100 {
            let verdict =
                convergence.judge(milliseconds(round * 6000), owed_bytes, RecheckDue::default(), &parameters);
            assert_eq!(verdict, Verdict::NextRound, "round {round}");
            owed_bytes = owed_bytes / 100 * 95;
        }
        let verdicts: Vec<_> = (1..=4)
            .map(|round| {
                convergence.judge(
                    milliseconds(600_000 + round * 6000),
                    owed_bytes,
                    RecheckDue::default(),
                    &parameters,
                )
            })
            .collect();
        assert_eq!(verdicts.last(), Some(&Verdict::NotConverging));
    }

    #[test]
    fn fixed_costs_above_the_downtime_end_in_not_converging() {
        let parameters = parameters(5);
        let mut convergence = measured();
        let mut verdicts = (0..4).map(|round| {
            convergence.judge(milliseconds(round * 2000), 0, RecheckDue::default(), &parameters)
        });
        assert!(verdicts.by_ref().take(3).all(|verdict| verdict == Verdict::NextRound));
        assert_eq!(verdicts.next(), Some(Verdict::NotConverging));
        let message = convergence.not_converging(0, 0, &parameters).message;
        assert!(message.contains("alone take 9ms"), "{message}");
    }

    #[test]
    fn the_failure_says_what_was_measured_and_what_to_do() {
        let mut convergence = measured();
        convergence.harvested(2_000_000_000, milliseconds(1000), milliseconds(1));
        let parameters = Parameters { bandwidth_limit: Some(BytesPerSecond(1 << 30)), ..parameters(100) };
        let failure = convergence.not_converging(1 << 30, 0, &parameters);
        assert_eq!(failure.reason, Reason::NotConverging);
        for part in ["2000.0 MB/s", "1073.7 MB/s", "max_downtime 100ms", "or bandwidth_limit", "FORCE"] {
            assert!(failure.message.contains(part), "{part} in {}", failure.message);
        }
    }

    #[test]
    fn extremes_saturate() {
        let mut convergence =
            Convergence::new(FixedCosts { fence: Duration::MAX, device_state: Duration::MAX });
        convergence.copied(&round(1, 1, 0, u64::MAX));
        convergence.copied(&round(2, u64::MAX, u64::MAX, 0));
        convergence.copied(&round(3, 1, 0, u64::MAX));
        convergence.harvested(u64::MAX, Duration::from_nanos(1), Duration::MAX);
        assert!(convergence.expected_downtime(u64::MAX, 0).is_some());
        assert!(!convergence.shortens(u64::MAX, Duration::MAX));
        assert_eq!(
            convergence.judge(Duration::MAX, u64::MAX, RecheckDue::default(), &parameters(100)),
            Verdict::NextRound
        );
    }
}
