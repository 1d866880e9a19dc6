#![allow(unsafe_code, reason = "scans guest RAM with vector intrinsics")]

use std::arch::x86_64::{
    __m256i, __m512i, _mm256_loadu_si256, _mm256_or_si256, _mm256_testz_si256, _mm512_loadu_si512,
    _mm512_maskz_loadu_epi8, _mm512_or_si512, _mm512_test_epi64_mask,
};

use super::portable::bytes_are_zero;

pub(super) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
}

pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
}

/// # Safety
/// The processor must have AVX-512 F and BW; `len` bytes from `start` must be
/// mapped readable, and stay so meanwhile.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn is_zero_avx512(start: *const u8, len: usize) -> bool {
    const VECTOR: usize = size_of::<__m512i>();
    const STEP: usize = 4 * VECTOR;
    let mut done = 0;
    // SAFETY: every load is of bytes from `done` on that end at or before `len` (the loop
    // conditions; the mask of the last one), which the caller vouches for.
    unsafe {
        while len - done >= STEP {
            let at = start.add(done).cast::<__m512i>();
            let low = _mm512_or_si512(_mm512_loadu_si512(at), _mm512_loadu_si512(at.add(1)));
            let high = _mm512_or_si512(_mm512_loadu_si512(at.add(2)), _mm512_loadu_si512(at.add(3)));
            let any = _mm512_or_si512(low, high);
            if _mm512_test_epi64_mask(any, any) != 0 {
                return false;
            }
            done += STEP;
        }
        while done < len {
            let bytes = (len - done).min(VECTOR);
            let mask = u64::MAX >> (VECTOR - bytes);
            let any = _mm512_maskz_loadu_epi8(mask, start.add(done).cast());
            if _mm512_test_epi64_mask(any, any) != 0 {
                return false;
            }
            done += bytes;
        }
    }
    true
}

/// # Safety
/// The processor must have AVX2; `len` bytes from `start` must be mapped
/// readable, and stay so meanwhile.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn is_zero_avx2(start: *const u8, len: usize) -> bool {
    const VECTOR: usize = size_of::<__m256i>();
    const STEP: usize = 4 * VECTOR;
    let mut done = 0;
    // SAFETY: every load is of bytes from `done` on that end at or before `len` (the loop
    // condition; the rest's length), which the caller vouches for.
    unsafe {
        while len - done >= STEP {
            let at = start.add(done).cast::<__m256i>();
            let low = _mm256_or_si256(_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1)));
            let high = _mm256_or_si256(_mm256_loadu_si256(at.add(2)), _mm256_loadu_si256(at.add(3)));
            let any = _mm256_or_si256(low, high);
            if _mm256_testz_si256(any, any) == 0 {
                return false;
            }
            done += STEP;
        }
        bytes_are_zero(start.add(done), len - done)
    }
}
