//! How much of what nobody waits for is asked for at once.

use std::time::Duration;

use super::AROUND_BYTES;
use crate::copy::CHUNK_BYTES;

/// A fault's bytes come behind those that the stream has asked for: that is to take no longer. Four links with two chunks of
/// 1 MiB each are asked for whole from 7 Gbit/s on.
const AHEAD: Duration = Duration::from_millis(10);

/// The length of a stream thread's next chunk, by how long those before it took to come: at first as little as any.
#[derive(Debug)]
pub(super) struct Portion {
    bytes: u64,
}

impl Portion {
    pub(super) fn new() -> Self {
        Self { bytes: AROUND_BYTES }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A chunk came so long after it was asked for, behind whatever was asked for before it.
    pub(super) fn came_after(&mut self, elapsed: Duration) {
        if elapsed > AHEAD {
            self.bytes = (self.bytes / 2).max(AROUND_BYTES);
        } else if elapsed < AHEAD / 2 {
            self.bytes = (self.bytes * 2).min(CHUNK_BYTES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of eight chunks under way on a link of so many bytes a second.
    fn settled(bytes_per_second: u64) -> u64 {
        let mut portion = Portion::new();
        for _ in 0..20 {
            portion
                .came_after(Duration::from_secs_f64((8 * portion.bytes()) as f64 / bytes_per_second as f64));
        }
        portion.bytes()
    }

    #[test]
    fn a_slow_link_is_asked_for_little_and_a_fast_one_for_whole_chunks() {
        assert_eq!(settled(10_000_000_000), CHUNK_BYTES);
        assert_eq!(settled(1_000_000_000), CHUNK_BYTES);
        assert_eq!(settled(125_000_000), 128 << 10);
        assert_eq!(settled(4_000_000), AROUND_BYTES);
    }

    #[test]
    fn a_link_that_was_busy_for_a_while_is_asked_for_whole_chunks_again() {
        let mut portion = Portion::new();
        (0..4).for_each(|_| portion.came_after(AHEAD / 8));
        assert_eq!(portion.bytes(), CHUNK_BYTES);
        (0..10).for_each(|_| portion.came_after(AHEAD * 2));
        assert_eq!(portion.bytes(), AROUND_BYTES);
        portion.came_after(AHEAD / 2);
        assert_eq!(portion.bytes(), AROUND_BYTES);
        (0..4).for_each(|_| portion.came_after(AHEAD / 8));
        assert_eq!(portion.bytes(), CHUNK_BYTES);
    }
}
