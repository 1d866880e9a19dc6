//! Whether memory is all zero, as fast as it can be read.
//!
//! The memory may be written by the guest while it is scanned. It is read
//! through raw pointers only, each byte once, by volatile loads or vector
//! intrinsics, so that nothing is ever assumed about a value but that it is
//! some bytes. An answer spoiled by a write does no harm: the write made the page
//! dirty, and it is scanned again in the next round.
#![allow(unsafe_code, reason = "scans guest RAM through raw pointers")]

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

/// Whether `len` bytes from `start` are all zero. Stops at the first that is not.
///
/// # Safety
/// `len` bytes from `start` must be mapped readable, and stay so meanwhile.
pub unsafe fn is_zero(start: *const u8, len: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        if x86::has_avx512() {
            // SAFETY: the processor has AVX-512 F and BW (just checked); the caller
            // answers for the memory.
            return unsafe { x86::is_zero_avx512(start, len) };
        }
        if x86::has_avx2() {
            // SAFETY: the processor has AVX2 (just checked); the caller answers for the memory.
            return unsafe { x86::is_zero_avx2(start, len) };
        }
    }
    // SAFETY: the caller answers for the memory.
    unsafe { portable::is_zero(start, len) }
}

/// Whether `bytes` are all zero.
pub fn slice_is_zero(bytes: &[u8]) -> bool {
    // SAFETY: a slice's bytes are readable for as long as it is borrowed.
    unsafe { is_zero(bytes.as_ptr(), bytes.len()) }
}

/// Which implementation [`is_zero`] uses on this processor.
pub fn implementation() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if x86::has_avx512() {
            return "avx512";
        }
        if x86::has_avx2() {
            return "avx2";
        }
    }
    "portable"
}

#[cfg(test)]
mod tests {
    use super::*;

    type Implementation = (&'static str, unsafe fn(*const u8, usize) -> bool);

    fn implementations() -> Vec<Implementation> {
        let mut all: Vec<Implementation> = vec![("dispatched", is_zero), ("portable", portable::is_zero)];
        #[cfg(target_arch = "x86_64")]
        {
            if x86::has_avx512() {
                // SAFETY: only called where the processor has AVX-512, and on bytes of a slice.
                all.push(("avx512", |start, len| unsafe { x86::is_zero_avx512(start, len) }));
            }
            if x86::has_avx2() {
                // SAFETY: only called where the processor has AVX2, and on bytes of a slice.
                all.push(("avx2", |start, len| unsafe { x86::is_zero_avx2(start, len) }));
            }
        }
        all
    }

    fn check(bytes: &[u8], expected: bool, what: &str) {
        for (name, implementation) in implementations() {
            // SAFETY: the bytes of a slice are readable.
            let answer = unsafe { implementation(bytes.as_ptr(), bytes.len()) };
            assert_eq!(answer, expected, "{name}: {what}");
        }
    }

    #[test]
    fn one_byte_at_any_offset_is_seen_by_every_implementation() {
        let mut page = vec![0_u8; 4096];
        check(&page, true, "a page of zeros");
        for offset in 0..page.len() {
            for value in [1, 0x80] {
                page[offset] = value;
                check(&page, false, &format!("{value:#x} at {offset}"));
            }
            page[offset] = 0;
        }
    }

    #[test]
    fn any_start_and_length_is_scanned_to_its_ends_and_not_beyond() {
        let mut bytes = vec![0_u8; 1024];
        for start in 64..64 + 70 {
            for length in (0..=300).chain([511, 512, 513, 640]) {
                let end = start + length;
                bytes[start - 1] = 0xff;
                bytes[end] = 0xff;
                check(&bytes[start..end], true, &format!("{length} bytes from {start}"));
                bytes[start - 1] = 0;
                bytes[end] = 0;
                for offset in [start, end - 1, start + length / 2].into_iter().filter(|_| length > 0) {
                    bytes[offset] = 1;
                    check(&bytes[start..end], false, &format!("{length} bytes from {start}, 1 at {offset}"));
                    bytes[offset] = 0;
                }
            }
        }
    }

    /// `cargo test --release -p ramferry-ram -- --ignored --nocapture zeros_are_scanned`
    #[test]
    #[ignore = "a measurement"]
    fn zeros_are_scanned_at_the_speed_of_memory() {
        let file = crate::testing::memory_file(1 << 18);
        let mapping = crate::Mapping::new(&file, 1 << 30, crate::Access::ReadWrite).unwrap();
        mapping.populate(0, 1 << 30, crate::Access::ReadWrite).unwrap();
        let start = mapping.span(0, 1 << 30).unwrap().as_ptr();
        for (name, implementation) in implementations() {
            let mut best = f64::INFINITY;
            for _ in 0..5 {
                let begin = std::time::Instant::now();
                for page in 0..1 << 18 {
                    // SAFETY: the page is within the mapping.
                    assert!(unsafe { implementation(start.add(page * 4096), 4096) });
                }
                best = best.min(begin.elapsed().as_secs_f64());
            }
            println!("{name}: {:.1} GB/s", 1.073_741_824 / best);
        }
    }
}
