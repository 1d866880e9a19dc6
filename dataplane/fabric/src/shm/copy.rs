//! Copying between mappings of guest RAM.
#![allow(
    unsafe_code,
    reason = "copies guest RAM, of which no reference may be made, with vector instructions"
)]

use ramferry_ram::{RamError, Span};

/// Copies `source` into `destination`, of the same length, with the stores
/// that are the faster of the two here. The spans must not overlap.
///
/// # Errors
/// [`RamError::ReadOnly`] when the destination is.
///
/// # Panics
/// When the lengths differ or the spans overlap.
pub fn copy(destination: Span<'_>, source: Span<'_>) -> Result<(), RamError> {
    non_temporal(destination, source)
}

/// Copies with ordinary stores.
///
/// # Errors
/// [`RamError::ReadOnly`] when the destination is.
///
/// # Panics
/// When the lengths differ or the spans overlap.
pub fn plain(destination: Span<'_>, source: Span<'_>) -> Result<(), RamError> {
    destination.as_mut_ptr()?;
    destination.copy_from(source);
    Ok(())
}

/// Copies with stores that pass the cache by, where the CPU has them: the
/// destination's old bytes are not read first, and what the cache holds stays.
///
/// # Errors
/// [`RamError::ReadOnly`] when the destination is.
///
/// # Panics
/// When the lengths differ or the spans overlap.
pub fn non_temporal(destination: Span<'_>, source: Span<'_>) -> Result<(), RamError> {
    let to = destination.as_mut_ptr()?;
    let (from, length) = (source.as_ptr(), source.len());
    assert_eq!(length, destination.len(), "spans of one length");
    #[cfg(target_arch = "x86_64")]
    if length >= x86::WORTHWHILE && std::arch::is_x86_feature_detected!("avx2") {
        assert!((to as usize).abs_diff(from as usize) >= length, "spans that do not overlap");
        // SAFETY: AVX2 was detected. `length` bytes are mapped readable at `from` and writable at
        // `to` (both spans are borrowed, and checked when made; `as_mut_ptr` checked the latter),
        // and do not overlap (asserted).
        unsafe { x86::copy(to, from, length) };
        return Ok(());
    }
    let _ = (to, from);
    plain(destination, source)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256i, _MM_HINT_NTA, _mm_prefetch, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256,
    };

    /// Shorter copies are for the cache.
    pub(super) const WORTHWHILE: usize = 1 << 10;
    const VECTOR: usize = size_of::<__m256i>();
    /// Vectors stored at once: two cache lines.
    const GROUP: usize = 4 * VECTOR;
    /// How far ahead of the loads lines are asked for.
    const AHEAD: usize = 512;

    /// # Safety
    /// The CPU has AVX2; `length` bytes, at least `WORTHWHILE`, are readable at
    /// `from` and writable at `to`, and do not overlap.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn copy(to: *mut u8, from: *const u8, length: usize) {
        let head = to.align_offset(VECTOR);
        let groups = (length - head) / GROUP;
        let tail = head + groups * GROUP;
        // SAFETY: `head` is less than a vector, and `tail` at most `length`, which is at least
        // `WORTHWHILE`: every access lies within the `length` bytes the caller vouches for. The
        // streaming stores are aligned, as `to + head` is and groups are whole vectors. A
        // prefetch beyond the end is only a hint. Guest writes can only tear what is copied.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to, head);
            for group in 0..groups {
                let at = head + group * GROUP;
                let source = from.add(at);
                _mm_prefetch::<_MM_HINT_NTA>(source.wrapping_add(AHEAD).cast());
                _mm_prefetch::<_MM_HINT_NTA>(source.wrapping_add(AHEAD + 64).cast());
                let source = source.cast::<__m256i>();
                let a = _mm256_loadu_si256(source);
                let b = _mm256_loadu_si256(source.add(1));
                let c = _mm256_loadu_si256(source.add(2));
                let d = _mm256_loadu_si256(source.add(3));
                let target = to.add(at).cast::<__m256i>();
                _mm256_stream_si256(target, a);
                _mm256_stream_si256(target.add(1), b);
                _mm256_stream_si256(target.add(2), c);
                _mm256_stream_si256(target.add(3), d);
            }
            std::ptr::copy_nonoverlapping(from.add(tail), to.add(tail), length - tail);
        }
        // Streaming stores are not ordered with those that tell of them.
        _mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use ramferry_ram::{Access, Mapping, RamFile};
    use rustix::fs::MemfdFlags;

    use super::*;

    const BYTES: u64 = 256 << 10;

    fn mapping(access: Access) -> Mapping {
        let fd = rustix::fs::memfd_create("copy", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, BYTES).unwrap();
        Mapping::new(&RamFile::from_fd(fd, access).unwrap(), BYTES, access).unwrap()
    }

    #[test]
    fn every_copy_moves_its_bytes_and_no_other() {
        let (source, destination) = (mapping(Access::ReadWrite), mapping(Access::ReadWrite));
        let pattern: Vec<u8> = (0..BYTES).map(|at| (at * 7 + (at >> 8)) as u8).collect();
        source.span(0, BYTES).unwrap().write_from(&pattern);
        type Copy = fn(Span<'_>, Span<'_>) -> Result<(), RamError>;
        for copy in [copy as Copy, plain, non_temporal] {
            for (from, to, length) in [
                (0, 0, BYTES),
                (1, 0, 20_000),
                (0, 1, 20_000),
                (4095, 4097, 100_001),
                (31, 33, 16_384),
                (7, 9, 16_385),
                (0, 5, 1),
                (3, 3, 0),
            ] {
                destination.span(0, BYTES).unwrap().write_from(&vec![0xee; BYTES as usize]);
                copy(destination.span(to, length).unwrap(), source.span(from, length).unwrap()).unwrap();
                let mut expected = vec![0xee; BYTES as usize];
                let copied = &pattern[from as usize..(from + length) as usize];
                expected[to as usize..(to + length) as usize].copy_from_slice(copied);
                let mut bytes = vec![0; BYTES as usize];
                destination.span(0, BYTES).unwrap().read_into(&mut bytes);
                assert!(bytes == expected, "{length} bytes from {from} to {to}");
            }
        }
    }

    #[test]
    fn read_only_memory_is_not_copied_to() {
        let (source, destination) = (mapping(Access::ReadWrite), mapping(Access::Read));
        for copy in [copy, plain, non_temporal] {
            let copied = copy(destination.span(0, BYTES).unwrap(), source.span(0, BYTES).unwrap());
            assert!(matches!(copied, Err(RamError::ReadOnly)));
        }
    }
}
