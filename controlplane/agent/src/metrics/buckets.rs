//! Classic buckets in powers of two; native histograms vanish from the text format.

/// Upper bounds: `first_seconds` doubled `count - 1` times.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Buckets {
    first_seconds: f64,
    count: u32,
}

// Bounds are written out above, never computed: no NaN.
impl Eq for Buckets {}

/// 1 µs to 67 s.
pub(super) const REGISTRATION: Buckets = Buckets { first_seconds: 1e-6, count: 27 };
/// 1 µs to 17 s.
pub(super) const WORK_REQUEST: Buckets = Buckets { first_seconds: 1e-6, count: 25 };
/// 1 ms to 16 s.
pub(super) const DOWNTIME: Buckets = Buckets { first_seconds: 1e-3, count: 15 };
/// 1 ms to 70 min.
pub(super) const LONG: Buckets = Buckets { first_seconds: 1e-3, count: 23 };
/// 256 µs to 67 s.
pub(super) const GRPC: Buckets = Buckets { first_seconds: 256e-6, count: 19 };

impl Buckets {
    /// The upper bounds, in seconds, without +Inf.
    pub fn bounds(self) -> Vec<f64> {
        // From whole microseconds, so that a bound reads 0.001024 and not 0.0010239999.
        let first_us = (self.first_seconds * 1e6).round();
        (0..self.count).map(|power| first_us * f64::from(1_u32 << power) / 1e6).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_powers_of_two_and_read_well() {
        let bounds = REGISTRATION.bounds();
        assert_eq!((bounds[0], bounds[10], bounds[26]), (0.000_001, 0.001_024, 67.108_864));
        assert_eq!(DOWNTIME.bounds().last(), Some(&16.384));
    }
}
