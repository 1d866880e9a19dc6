use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Unused allowance that may be caught up in a burst.
const BURST: Duration = Duration::from_millis(10);

/// Keeps the bytes of all links together under a bandwidth limit.
#[derive(Debug)]
pub(crate) struct Pacer {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bytes_per_second: Option<u64>,
    free_at: Instant,
}

impl Pacer {
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { state: Mutex::new(State { bytes_per_second, free_at: Instant::now() }) }
    }

    pub(crate) fn set_limit(&self, bytes_per_second: Option<u64>) {
        let mut state = self.state.lock().expect("no panic while it is held");
        state.bytes_per_second = bytes_per_second;
        state.free_at = Instant::now();
    }

    /// How long to wait until the limit allows the next bytes.
    pub(crate) fn delay(&self, now: Instant) -> Duration {
        let state = self.state.lock().expect("no panic while it is held");
        match state.bytes_per_second {
            Some(_) => state.free_at.saturating_duration_since(now),
            None => Duration::ZERO,
        }
    }

    /// Counts bytes that are being sent.
    pub(crate) fn spend(&self, now: Instant, bytes: u64) {
        let mut state = self.state.lock().expect("no panic while it is held");
        if let Some(limit) = state.bytes_per_second {
            let earliest = now.checked_sub(BURST).unwrap_or(now);
            let cost = Duration::from_secs_f64(bytes as f64 / limit.max(1) as f64);
            state.free_at = state.free_at.max(earliest) + cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_over_the_limit_wait_for_their_time() {
        let pacer = Pacer::new(Some(1_000_000));
        let start = Instant::now();
        pacer.set_limit(Some(1_000_000));
        pacer.spend(start, 500_000);
        let delay = pacer.delay(start);
        assert!(delay > Duration::from_millis(480) && delay < Duration::from_millis(520), "{delay:?}");
        assert_eq!(pacer.delay(start + Duration::from_secs(1)), Duration::ZERO);
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let pacer = Pacer::new(Some(1));
        let now = Instant::now();
        pacer.spend(now, 1 << 40);
        pacer.set_limit(None);
        assert_eq!(pacer.delay(now), Duration::ZERO);
    }
}
