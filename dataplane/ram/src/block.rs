use std::fmt;

use thiserror::Error;

/// One contiguous RAM area of a guest. QEMU calls it a RAMBlock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Name under which both sides know the block.
    pub name: String,
    /// Address in the guest's RAM address space (QEMU's `ram_addr_t`), in bytes.
    pub guest_address: u64,
    /// Length in bytes; a multiple of `page_bytes`.
    pub length_bytes: u64,
    /// Dirty-tracking granule in bytes: 4 KiB, or the huge page size on hugetlbfs.
    pub page_bytes: u64,
}

impl Block {
    /// Number of pages in the block.
    pub fn pages(&self) -> u64 {
        self.length_bytes / self.page_bytes
    }

    fn check(&self) -> Result<(), LayoutError> {
        let bad = |why| LayoutError::Block { name: self.name.clone(), why };
        if self.name.is_empty() {
            return Err(bad("its name is empty"));
        }
        if !self.page_bytes.is_power_of_two() || self.page_bytes < 4096 {
            return Err(bad("its page size is not a power of two of at least 4096"));
        }
        if self.length_bytes == 0 || !self.length_bytes.is_multiple_of(self.page_bytes) {
            return Err(bad("its length is not a positive multiple of its page size"));
        }
        if self.guest_address.checked_add(self.length_bytes).is_none() {
            return Err(bad("its end is beyond the address space"));
        }
        Ok(())
    }
}

/// Position of a block in its [`Layout`]; the same on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u32);

impl BlockIndex {
    /// The index as a `usize`, for slices that hold one entry a block.
    pub fn get(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}", self.0)
    }
}

/// A range of bytes within one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRange {
    /// The block.
    pub block: BlockIndex,
    /// First byte, from the block's start.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

impl BlockRange {
    /// First byte after the range, or `None` when that overflows.
    pub fn checked_end(&self) -> Option<u64> {
        self.offset.checked_add(self.length)
    }
}

/// All blocks of a guest, in the order of their guest addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    blocks: Vec<Block>,
}

impl Layout {
    /// Checks and orders `blocks`.
    ///
    /// # Errors
    /// When there is no block, one is malformed, two share a name, or two overlap.
    pub fn new(mut blocks: Vec<Block>) -> Result<Self, LayoutError> {
        if blocks.is_empty() {
            return Err(LayoutError::Empty);
        }
        for block in &blocks {
            block.check()?;
        }
        blocks.sort_by_key(|block| block.guest_address);
        for pair in blocks.windows(2) {
            if pair[0].guest_address + pair[0].length_bytes > pair[1].guest_address {
                return Err(LayoutError::Overlap(pair[0].name.clone(), pair[1].name.clone()));
            }
        }
        let mut names: Vec<&str> = blocks.iter().map(|block| block.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(LayoutError::SameName(pair[0].to_owned()));
        }
        Ok(Self { blocks })
    }

    /// The blocks; `BlockIndex(i)` names the `i`th.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The block at `index`, or `None` when there is none.
    pub fn block(&self, index: BlockIndex) -> Option<&Block> {
        self.blocks.get(index.get())
    }

    /// Length of all blocks together, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.length_bytes).sum()
    }

    /// Whether `range` lies within one block of this layout.
    pub fn contains(&self, range: BlockRange) -> bool {
        match (self.block(range.block), range.checked_end()) {
            (Some(block), Some(end)) => end <= block.length_bytes,
            _ => false,
        }
    }

    /// Compares the source's layout (`self`) with the destination's.
    ///
    /// # Errors
    /// The first difference.
    pub fn check_same(&self, destination: &Layout) -> Result<(), LayoutMismatch> {
        if self.blocks.len() != destination.blocks.len() {
            return Err(LayoutMismatch::BlockCount {
                source_blocks: self.blocks.len(),
                destination_blocks: destination.blocks.len(),
            });
        }
        for (ours, theirs) in self.blocks.iter().zip(&destination.blocks) {
            if ours != theirs {
                return Err(LayoutMismatch::Block {
                    source_block: ours.clone(),
                    destination_block: theirs.clone(),
                });
            }
        }
        Ok(())
    }
}

/// Why blocks do not make a layout.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// There is no block.
    #[error("the guest has no shared RAM block")]
    Empty,
    /// One block is malformed.
    #[error("RAM block {name:?} is not usable: {why}")]
    Block {
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Two blocks have one name.
    #[error("two RAM blocks are named {0:?}")]
    SameName(String),
    /// Two blocks share guest addresses.
    #[error("RAM blocks {0:?} and {1:?} overlap")]
    Overlap(String, String),
}

/// How two layouts differ.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutMismatch {
    /// They have different numbers of blocks.
    #[error("the source guest has {source_blocks} RAM blocks, the destination guest {destination_blocks}")]
    BlockCount {
        /// Blocks at the source.
        source_blocks: usize,
        /// Blocks at the destination.
        destination_blocks: usize,
    },
    /// Two blocks in the same position differ.
    #[error(
        "RAM block {:?} (address {:#x}, {} bytes, {} byte pages) at the source is {:?} (address {:#x}, {} bytes, {} byte pages) at the destination",
        source_block.name, source_block.guest_address, source_block.length_bytes, source_block.page_bytes,
        destination_block.name, destination_block.guest_address, destination_block.length_bytes, destination_block.page_bytes
    )]
    Block {
        /// The source's.
        source_block: Block,
        /// The destination's.
        destination_block: Block,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, guest_address: u64, length_bytes: u64) -> Block {
        Block { name: name.into(), guest_address, length_bytes, page_bytes: 4096 }
    }

    #[test]
    fn layout_is_ordered_by_guest_address() {
        let layout = Layout::new(vec![block("b", 8192, 4096), block("a", 0, 8192)]).unwrap();
        assert_eq!(layout.blocks()[0].name, "a");
        assert_eq!(layout.total_bytes(), 12288);
    }

    #[test]
    fn malformed_blocks_are_refused() {
        assert_eq!(Layout::new(vec![]), Err(LayoutError::Empty));
        for bad in [
            block("", 0, 4096),
            block("a", 0, 0),
            block("a", 0, 4097),
            block("a", u64::MAX - 4096, 8192),
            Block { page_bytes: 5000, ..block("a", 0, 5000) },
        ] {
            assert!(matches!(Layout::new(vec![bad]), Err(LayoutError::Block { .. })));
        }
        let twice = Layout::new(vec![block("a", 0, 4096), block("a", 4096, 4096)]);
        assert_eq!(twice, Err(LayoutError::SameName("a".into())));
        let overlap = Layout::new(vec![block("a", 0, 8192), block("b", 4096, 4096)]);
        assert_eq!(overlap, Err(LayoutError::Overlap("a".into(), "b".into())));
    }

    #[test]
    fn layouts_that_differ_say_where() {
        let source = Layout::new(vec![block("a", 0, 8192)]).unwrap();
        assert_eq!(source.check_same(&source.clone()), Ok(()));
        let longer = Layout::new(vec![block("a", 0, 12288)]).unwrap();
        assert!(matches!(source.check_same(&longer), Err(LayoutMismatch::Block { .. })));
        let more = Layout::new(vec![block("a", 0, 8192), block("b", 8192, 4096)]).unwrap();
        assert!(matches!(source.check_same(&more), Err(LayoutMismatch::BlockCount { .. })));
    }

    #[test]
    fn ranges_outside_a_block_are_not_contained() {
        let layout = Layout::new(vec![block("a", 0, 8192)]).unwrap();
        let range = |block, offset, length| BlockRange { block: BlockIndex(block), offset, length };
        assert!(layout.contains(range(0, 4096, 4096)));
        assert!(!layout.contains(range(0, 4096, 4097)));
        assert!(!layout.contains(range(1, 0, 1)));
        assert!(!layout.contains(range(0, u64::MAX, 2)));
    }
}
