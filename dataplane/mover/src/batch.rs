use ramferry_fabric::windows::Window;

/// Most bytes of windows that are registered together: some milliseconds of work.
const BATCH_BYTES: u64 = 8 << 20;

/// Splits windows into those that are registered by one thread and told of together, in their
/// order, which is that of the copy. Scattered pages make many short windows, and to tell of each
/// costs a message and a wake-up. The first is told of at once, since the copy may be waiting for
/// it; each batch has up to twice as many windows as the one before, so that none is waited for
/// much longer than those before it took.
pub(crate) fn batches(windows: &[Window]) -> impl Iterator<Item = &[Window]> {
    let (mut rest, mut most) = (windows, 1);
    std::iter::from_fn(move || {
        let mut bytes = 0_u64;
        let fits = |window: &&Window| {
            bytes = bytes.saturating_add(window.range.length);
            bytes <= BATCH_BYTES
        };
        let count = rest.iter().take(most).take_while(fits).count().max(1);
        most *= 2;
        let (batch, after) = rest.split_at_checked(count)?;
        rest = after;
        Some(batch)
    })
}

#[cfg(test)]
mod tests {
    use ramferry_fabric::windows::WindowId;
    use ramferry_ram::{BlockIndex, BlockRange};

    use super::*;

    fn sizes(window_bytes: u64, windows: u64) -> Vec<usize> {
        let window = |index| Window {
            id: WindowId(index),
            range: BlockRange { block: BlockIndex(0), offset: index * window_bytes, length: window_bytes },
        };
        let windows: Vec<Window> = (0..windows).map(window).collect();
        let batched: Vec<&[Window]> = batches(&windows).collect();
        assert_eq!(batched.concat(), windows);
        batched.iter().map(|batch| batch.len()).collect()
    }

    #[test]
    fn batches_grow_from_one_window_to_their_most_bytes() {
        assert_eq!(sizes(1 << 20, 32), [1, 2, 4, 8, 8, 8, 1]);
        assert_eq!(sizes(4096, 1000), [1, 2, 4, 8, 16, 32, 64, 128, 256, 489]);
        assert_eq!(sizes(64 << 20, 3), [1, 1, 1]);
        assert_eq!(sizes(u64::MAX, 1), [1]);
        assert!(sizes(4096, 0).is_empty());
    }
}
