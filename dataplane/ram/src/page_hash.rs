use std::num::NonZeroU64;

use twox_hash::XxHash3_64;

use crate::{BlockRange, Memory, RamError, zero};

/// Longest part of a page that is copied out and hashed at once: it stays in a core's cache.
const PART_BYTES: u64 = 64 << 10;

/// What a page's bytes come down to, to tell whether they changed. Good within one migration only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHash(NonZeroU64);

impl PageHash {
    /// The hash with this value, unless it is 0.
    pub fn from_value(value: u64) -> Option<Self> {
        NonZeroU64::new(value).map(Self)
    }

    /// Its value: never 0.
    pub fn value(self) -> u64 {
        self.0.get()
    }
}

/// What was found of a page at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashedPage {
    /// Of its bytes.
    pub hash: PageHash,
    /// Whether these bytes were all zero.
    pub is_zero: bool,
}

/// Hashes pages: XXH3 of 64 bits, with a seed that a guest cannot know.
#[derive(Debug)]
pub struct PageHasher {
    seed: u64,
    part: Box<[u8]>,
}

impl PageHasher {
    /// Hashers of one seed agree.
    pub fn new(seed: u64) -> Self {
        Self { seed, part: Box::default() }
    }

    /// Reads every byte of `page` once, so that both answers are about the same bytes. Those may be torn.
    ///
    /// # Errors
    /// When `page` is not within one block.
    pub fn hash(&mut self, memory: &Memory, page: BlockRange) -> Result<HashedPage, RamError> {
        let part_bytes = page.length.min(PART_BYTES);
        if (self.part.len() as u64) < part_bytes {
            self.part = vec![0; part_bytes as usize].into();
        }
        let (mut hash, mut is_zero) = (self.seed, true);
        let mut done = 0;
        while done < page.length {
            let length = PART_BYTES.min(page.length - done);
            let bytes = &mut self.part[..length as usize];
            memory.span(BlockRange { offset: page.offset + done, length, ..page })?.read_into(bytes);
            // A part's hash is the seed of the next.
            hash = XxHash3_64::oneshot_with_seed(hash, bytes);
            is_zero = is_zero && zero::slice_is_zero(bytes);
            done += length;
        }
        let hash = PageHash(NonZeroU64::new(hash).unwrap_or(NonZeroU64::MIN));
        Ok(HashedPage { hash, is_zero })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory_file;
    use crate::{Access, Block, BlockIndex, Layout};

    const PAGES: u64 = 64;

    fn memory() -> Memory {
        let block =
            Block { name: "ram".into(), guest_address: 0, length_bytes: PAGES * 4096, page_bytes: 4096 };
        let layout = Layout::new(vec![block]).unwrap();
        Memory::new(layout, vec![memory_file(PAGES)], Access::ReadWrite).unwrap()
    }

    fn range(offset: u64, length: u64) -> BlockRange {
        BlockRange { block: BlockIndex(0), offset, length }
    }

    fn write(memory: &Memory, offset: u64, byte: u8) {
        memory.span(range(offset, 1)).unwrap().write_from(&[byte]);
    }

    #[test]
    fn every_byte_of_a_page_counts_and_equal_pages_hash_the_same() {
        let memory = memory();
        for length in [4096, PAGES * 4096, 3 * 32768] {
            let mut hasher = PageHasher::new(7);
            let empty = hasher.hash(&memory, range(0, length)).unwrap();
            assert!(empty.is_zero);
            for offset in [0, 1, 4095, length / 2, length - 1] {
                write(&memory, offset, 1);
                let changed = hasher.hash(&memory, range(0, length)).unwrap();
                assert!(!changed.is_zero && changed.hash != empty.hash, "{offset} of {length}");
                write(&memory, offset, 0);
                assert_eq!(PageHasher::new(7).hash(&memory, range(0, length)).unwrap(), empty);
            }
        }
    }

    #[test]
    fn a_page_hashes_to_another_value_with_another_seed() {
        let memory = memory();
        let hash = |seed| PageHasher::new(seed).hash(&memory, range(0, 4096)).unwrap().hash;
        assert_ne!(hash(1), hash(2));
        assert_eq!(PageHash::from_value(hash(1).value()), Some(hash(1)));
        assert_eq!(PageHash::from_value(0), None);
    }

    #[test]
    fn a_page_that_is_not_there_is_an_error() {
        let beyond = PageHasher::new(1).hash(&memory(), range(PAGES * 4096, 4096));
        assert!(matches!(beyond, Err(RamError::OutOfBounds { .. })));
    }
}
