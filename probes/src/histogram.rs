//! Histograms of durations, with exact sums.

use std::time::Duration;

use crate::records::HistogramRecord;

/// Slots of a histogram: one for each of [`BOUNDS_US`], and one for what took longer than all of them.
pub const SLOTS: usize = BOUNDS_US.len() + 1;

/// The most that each slot holds, in microseconds: 1 us to 67 s.
pub const BOUNDS_US: [u64; 27] = {
    let mut bounds = [1; 27];
    let mut slot = 1;
    while slot < bounds.len() {
        bounds[slot] = bounds[slot - 1] * 2;
        slot += 1;
    }
    bounds
};

/// How long calls took, and what they were about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// All of it.
    pub sum: Duration,
    /// The longest.
    pub max: Duration,
    /// Memory pinned, or released.
    pub bytes: u64,
    /// Calls in each slot.
    pub slots: [u64; SLOTS],
}

impl Histogram {
    /// Calls.
    pub fn count(&self) -> u64 {
        self.slots.iter().fold(0, |sum, &slot| sum.saturating_add(slot))
    }

    /// The duration that a share of the calls kept below, to within its slot; none of no calls.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        // Calls that lie at or below it: at least one.
        let rank = (share.clamp(0.0, 1.0) * count as f64).ceil().max(1.0);
        let mut below: u64 = 0;
        for (slot, &calls) in self.slots.iter().enumerate() {
            if (below + calls) as f64 >= rank {
                let (lowest, highest) = self.range(slot);
                let into = (rank - below as f64) / calls as f64;
                let estimate = lowest + (highest.saturating_sub(lowest)).mul_f64(into);
                return Some(estimate.min(self.max));
            }
            below += calls;
        }
        Some(self.max)
    }

    /// Adds another's calls.
    pub fn add(&mut self, other: &Self) {
        self.sum = self.sum.saturating_add(other.sum);
        self.max = self.max.max(other.max);
        self.bytes = self.bytes.saturating_add(other.bytes);
        for (slot, more) in self.slots.iter_mut().zip(other.slots) {
            *slot = slot.saturating_add(more);
        }
    }

    /// What may be in a slot.
    fn range(&self, slot: usize) -> (Duration, Duration) {
        let bound = |slot: usize| BOUNDS_US.get(slot).map(|&us| Duration::from_micros(us));
        let lowest = slot.checked_sub(1).and_then(bound).unwrap_or_default();
        (lowest, bound(slot).unwrap_or(self.max))
    }
}

impl From<HistogramRecord> for Histogram {
    fn from(record: HistogramRecord) -> Self {
        Self {
            sum: Duration::from_nanos(record.sum_ns),
            max: Duration::from_nanos(record.max_ns),
            bytes: record.bytes,
            slots: record.slots,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    fn histogram(calls: &[(usize, u64)], max: Duration) -> Histogram {
        let mut histogram = Histogram { max, ..Histogram::default() };
        for &(slot, count) in calls {
            histogram.slots[slot] = count;
        }
        histogram
    }

    #[test]
    fn bounds_are_those_of_the_metrics() {
        assert_eq!((BOUNDS_US[0], BOUNDS_US[10], BOUNDS_US[26]), (1, 1024, 67_108_864));
        assert_eq!(SLOTS, 28);
    }

    #[test]
    fn quantiles_stay_within_the_slot_and_below_the_longest() {
        let histogram = histogram(&[(4, 98), (10, 2)], 600 * US);
        let median = histogram.quantile(0.5).unwrap();
        assert!(median > 8 * US && median <= 16 * US, "{median:?}");
        let p99 = histogram.quantile(0.99).unwrap();
        assert!(p99 > 512 * US && p99 <= 600 * US, "{p99:?}");
        assert_eq!(histogram.quantile(1.0), Some(600 * US));
        assert_eq!(histogram.quantile(0.0).map(|lowest| lowest > 8 * US), Some(true));
    }

    #[test]
    fn quantile_of_no_calls_is_none() {
        assert_eq!(Histogram::default().quantile(0.5), None);
    }

    #[test]
    fn quantile_of_what_took_longest_of_all_is_between_the_last_bound_and_the_longest() {
        let histogram = histogram(&[(27, 3)], Duration::from_secs(80));
        let median = histogram.quantile(0.5).unwrap();
        assert!(median > Duration::from_secs(67) && median <= Duration::from_secs(80), "{median:?}");
    }

    #[test]
    fn sums_add_and_the_longest_stays() {
        let mut sum = histogram(&[(1, 2)], 2 * US);
        sum.add(&histogram(&[(1, 1), (5, 1)], 30 * US));
        assert_eq!((sum.count(), sum.slots[1], sum.max), (4, 3, 30 * US));
    }
}
