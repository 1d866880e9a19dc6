//! What the targets share.

use std::sync::Arc;

use ramferry_ram::{Access, Block, BlockIndex, BlockRange, Layout, Memory, RamFile};

/// Length of a page, in bytes.
pub const PAGE: u64 = 4096;

/// A guest's RAM of one block of so many pages.
pub fn memory(pages: u64) -> Arc<Memory> {
    let length_bytes = pages * PAGE;
    let fd = rustix::fs::memfd_create("ramferry-fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, length_bytes).expect("a memfd of this length");
    let file = RamFile::from_fd(fd, Access::ReadWrite).expect("a RAM file");
    Arc::new(Memory::new(layout(pages), vec![file], Access::ReadWrite).expect("memory"))
}

/// One block of so many pages.
pub fn layout(pages: u64) -> Layout {
    let block = Block { name: "ram".into(), guest_address: 0, length_bytes: pages * PAGE, page_bytes: PAGE };
    Layout::new(vec![block]).expect("a layout")
}

/// `length` bytes at `offset` of the one block.
pub fn range(offset: u64, length: u64) -> BlockRange {
    BlockRange { block: BlockIndex(0), offset, length }
}

/// The messages in `data`: each behind its length in two bytes, the last as long as what is left.
pub fn messages(mut data: &[u8]) -> Vec<&[u8]> {
    let mut messages = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let (message, rest) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
        messages.push(message);
        data = rest;
    }
    messages
}
