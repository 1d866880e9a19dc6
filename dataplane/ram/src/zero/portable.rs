#![allow(unsafe_code, reason = "scans guest RAM through raw pointers")]

const WORD: usize = size_of::<u64>();
const STEP: usize = 8 * WORD;

/// # Safety
/// `len` bytes from `start` must be mapped readable, and stay so meanwhile.
pub(super) unsafe fn is_zero(start: *const u8, len: usize) -> bool {
    let head = start.align_offset(WORD).min(len);
    let steps = (len - head) / STEP;
    // SAFETY: the head, the steps and the tail are parts of the `len` bytes that the caller
    // vouches for; the steps start at a word boundary.
    unsafe {
        if !bytes_are_zero(start, head) {
            return false;
        }
        let body = start.add(head).cast::<[u64; STEP / WORD]>();
        for step in 0..steps {
            let words = body.add(step).cast::<u64>();
            let mut any = 0;
            for word in 0..STEP / WORD {
                any |= words.add(word).read_volatile();
            }
            if any != 0 {
                return false;
            }
        }
        let done = head + steps * STEP;
        bytes_are_zero(start.add(done), len - done)
    }
}

/// # Safety
/// `len` bytes from `start` must be mapped readable, and stay so meanwhile.
pub(super) unsafe fn bytes_are_zero(start: *const u8, len: usize) -> bool {
    // SAFETY: every address is within the bytes that the caller vouches for.
    (0..len).all(|offset| unsafe { start.add(offset).read_volatile() } == 0)
}
