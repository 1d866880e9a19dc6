use std::sync::{Arc, OnceLock};

use crate::{
    Access, BlockIndex, BlockRange, Digest, Layout, Mapping, PageSets, RamError, RamFile, Span, digest,
};

/// The RAM of one guest on one side: its layout, and each block's file and
/// mapping.
#[derive(Debug)]
pub struct Memory {
    layout: Layout,
    // In the order of the layout's blocks.
    mappings: Vec<Mapping>,
    files: Vec<RamFile>,
    first_presence: OnceLock<Arc<PageSets>>,
}

impl Memory {
    /// Maps `files`, which are in the order of `layout.blocks()`.
    ///
    /// # Errors
    /// When they do not fit the layout, or one cannot be mapped.
    pub fn new(layout: Layout, files: Vec<RamFile>, access: Access) -> Result<Self, RamError> {
        if files.len() != layout.blocks().len() {
            return Err(RamError::FileCount { blocks: layout.blocks().len(), files: files.len() });
        }
        let mut mappings = Vec::with_capacity(files.len());
        for (index, (block, file)) in layout.blocks().iter().zip(&files).enumerate() {
            if block.page_bytes != file.page_bytes() {
                return Err(RamError::PageSize {
                    name: block.name.clone(),
                    block_bytes: block.page_bytes,
                    file_bytes: file.page_bytes(),
                });
            }
            if let Some(other) = files[..index].iter().position(|other| other.identity() == file.identity()) {
                return Err(RamError::SameFile {
                    first: layout.blocks()[other].name.clone(),
                    second: block.name.clone(),
                });
            }
            mappings.push(Mapping::new(file, block.length_bytes, access)?);
        }
        Ok(Self { layout, mappings, files, first_presence: OnceLock::new() })
    }

    /// The layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The mapping of `block`.
    ///
    /// # Panics
    /// When the layout has no such block.
    pub fn mapping(&self, block: BlockIndex) -> &Mapping {
        &self.mappings[block.get()]
    }

    /// The file of `block`.
    ///
    /// # Panics
    /// When the layout has no such block.
    pub fn file(&self, block: BlockIndex) -> &RamFile {
        &self.files[block.get()]
    }

    /// The bytes of `range`.
    ///
    /// # Errors
    /// When `range` is not within one block.
    pub fn span(&self, range: BlockRange) -> Result<Span<'_>, RamError> {
        let mapping = self.mappings.get(range.block.get()).ok_or(RamError::NoBlock(range.block))?;
        mapping.span(range.offset, range.length)
    }

    /// Which pages were ever touched; see [`RamFile::presence`].
    ///
    /// # Errors
    /// When the kernel cannot tell.
    pub fn presence(&self) -> Result<PageSets, RamError> {
        let mut present = PageSets::new(&self.layout);
        for ((index, block), file) in (0..).map(BlockIndex).zip(self.layout.blocks()).zip(&self.files) {
            *present.block_mut(index) = file.presence(block.pages())?;
        }
        Ok(present)
    }

    /// Which pages had been touched when this was first called. The kernel takes 10 ms to tell of 1 GiB,
    /// which is not for everybody who begins a migration to spend again.
    ///
    /// # Errors
    /// As [`Memory::presence`].
    pub fn first_presence(&self) -> Result<Arc<PageSets>, RamError> {
        if let Some(known) = self.first_presence.get() {
            return Ok(Arc::clone(known));
        }
        let found = Arc::new(self.presence()?);
        Ok(Arc::clone(self.first_presence.get_or_init(|| found)))
    }

    /// Whether every page reached so far was there; see [`Mapping::check`].
    ///
    /// # Errors
    /// What the first mapping that is broken says.
    pub fn check(&self) -> Result<(), RamError> {
        self.mappings.iter().try_for_each(Mapping::check)
    }

    /// A digest of each block, in the layout's order: equal exactly when every
    /// page reads the same. A page of zeros counts the same whether it was ever
    /// touched or not. Only touched pages are read, by as many threads as the
    /// process may run.
    ///
    /// The guest must not be running, or the digests say nothing.
    ///
    /// # Errors
    /// When presence cannot be told, or a page was lost.
    pub fn digests(&self) -> Result<Vec<Digest>, RamError> {
        let digests = digest::of_blocks(self)?;
        self.check()?;
        Ok(digests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{memory_file, runs};
    use crate::{Block, PageRun};

    fn layout(pages: &[u64]) -> Layout {
        let block = |(index, pages): (usize, &u64)| Block {
            name: format!("ram{index}"),
            guest_address: (index as u64) << 40,
            length_bytes: pages * 4096,
            page_bytes: 4096,
        };
        Layout::new(pages.iter().enumerate().map(block).collect()).unwrap()
    }

    fn memory(pages: &[u64]) -> Memory {
        let files = pages.iter().map(|pages| memory_file(*pages)).collect();
        Memory::new(layout(pages), files, Access::ReadWrite).unwrap()
    }

    fn write(memory: &Memory, block: u32, offset: u64, bytes: &[u8]) {
        let range = BlockRange { block: BlockIndex(block), offset, length: bytes.len() as u64 };
        memory.span(range).unwrap().write_from(bytes);
    }

    #[test]
    fn files_must_fit_the_layout() {
        let new = |layout: Layout, files| Memory::new(layout, files, Access::Read).unwrap_err();
        assert!(matches!(new(layout(&[1]), vec![]), RamError::FileCount { .. }));
        assert!(matches!(new(layout(&[2]), vec![memory_file(1)]), RamError::FileTooShort { .. }));
        let file = memory_file(1);
        assert!(matches!(new(layout(&[1, 1]), vec![file.clone(), file]), RamError::SameFile { .. }));
        let huge =
            Block { name: "huge".into(), guest_address: 0, length_bytes: 2 << 20, page_bytes: 2 << 20 };
        let huge = Layout::new(vec![huge]).unwrap();
        assert!(matches!(new(huge, vec![memory_file(512)]), RamError::PageSize { .. }));
    }

    #[test]
    fn ranges_name_blocks() {
        let memory = memory(&[1, 2]);
        write(&memory, 1, 4096, b"here");
        assert_eq!(runs(memory.presence().unwrap().block(BlockIndex(1))), [(1, 1)]);
        assert!(memory.presence().unwrap().block(BlockIndex(0)).is_empty());
        let range = |block, length| BlockRange { block: BlockIndex(block), offset: 0, length };
        assert!(matches!(memory.span(range(0, 4097)), Err(RamError::OutOfBounds { .. })));
        assert!(matches!(memory.span(range(2, 1)), Err(RamError::NoBlock(BlockIndex(2)))));
    }

    #[test]
    fn first_presence_stays_what_it_was() {
        let memory = memory(&[3]);
        write(&memory, 0, 4096, b"before");
        assert_eq!(runs(memory.first_presence().unwrap().block(BlockIndex(0))), [(1, 1)]);
        write(&memory, 0, 0, b"after");
        assert_eq!(runs(memory.first_presence().unwrap().block(BlockIndex(0))), [(1, 1)]);
        assert_eq!(runs(memory.presence().unwrap().block(BlockIndex(0))), [(0, 2)]);
    }

    #[test]
    fn digests_do_not_tell_holes_from_zero_pages() {
        // More than one piece of 64 MiB, the second one all zero.
        let pages = [3 * (16 << 10) + 5, 7];
        let (a, b) = (memory(&pages), memory(&pages));
        for memory in [&a, &b] {
            write(memory, 0, 5 * 4096 + 9, b"bytes");
            write(memory, 0, (pages[0] - 1) * 4096, b"the last page");
        }
        write(&b, 0, 20_000 * 4096, &[0; 8192]);
        write(&b, 1, 0, &[0; 7 * 4096]);
        assert_ne!(a.presence().unwrap(), b.presence().unwrap());
        assert_eq!(a.digests().unwrap(), b.digests().unwrap());
        assert_ne!(a.digests().unwrap()[0], a.digests().unwrap()[1]);
    }

    #[test]
    fn digests_see_every_byte_and_its_place() {
        let memory = memory(&[16]);
        let mut seen = vec![memory.digests().unwrap()[0]];
        for offset in [0, 4095, 4096, 15 * 4096 + 1] {
            write(&memory, 0, offset, &[1]);
            seen.push(memory.digests().unwrap()[0]);
            write(&memory, 0, offset, &[0]);
        }
        write(&memory, 0, 4096, &[2]);
        seen.push(memory.digests().unwrap()[0]);
        let mut unique = seen.clone();
        unique.sort_by_key(|digest| *digest.as_bytes());
        unique.dedup();
        assert_eq!(unique.len(), seen.len());
    }

    #[test]
    fn digests_are_what_their_definition_says() {
        let pages = 2 * (16 << 10) + 100;
        let memory = memory(&[pages]);
        let touched = [0, 1, 33, 34, 35, (16 << 10) - 1, 16 << 10, pages - 1];
        for page in touched {
            write(&memory, 0, page * 4096, &[page as u8 | 1; 4096]);
        }
        let mut pieces = [const { Vec::new() }; 3];
        for page in touched {
            let piece: &mut Vec<u8> = &mut pieces[(page >> 14) as usize];
            piece.extend_from_slice(&page.to_le_bytes());
            piece.extend_from_slice(&[page as u8 | 1; 4096]);
        }
        let mut whole = blake3::Hasher::new();
        for piece in &pieces {
            whole.update(blake3::hash(piece).as_bytes());
        }
        let expected = Digest::from_bytes(*whole.finalize().as_bytes());
        assert_eq!(memory.digests().unwrap(), [expected]);
        assert_eq!(expected.to_string().len(), 64);
    }

    #[test]
    fn digests_read_no_hole() {
        let memory = memory(&[1000]);
        write(&memory, 0, 10 * 4096, &[1]);
        memory.digests().unwrap();
        let mut present = memory.presence().unwrap();
        present.block_mut(BlockIndex(0)).remove_run(PageRun { first: 10, count: 1 });
        assert!(present.is_empty());
    }

    #[test]
    fn digests_of_huge_pages_are_those_of_their_bytes() {
        let Some(file) = crate::huge::tests::huge_file(3) else { return };
        let block =
            Block { name: "ram0".into(), guest_address: 0, length_bytes: 6 << 20, page_bytes: 2 << 20 };
        let huge = Memory::new(Layout::new(vec![block]).unwrap(), vec![file], Access::ReadWrite).unwrap();
        let small = memory(&[3 * 512]);
        for memory in [&huge, &small] {
            write(memory, 0, (2 << 20) + 4096, b"in the second");
        }
        assert_eq!(huge.digests().unwrap(), small.digests().unwrap());
    }

    #[test]
    fn digests_of_a_lost_page_are_an_error() {
        let memory = memory(&[4]);
        write(&memory, 0, 0, &[1; 4 * 4096]);
        rustix::fs::ftruncate(memory.file(BlockIndex(0)), 4096).unwrap();
        let span = memory.span(BlockRange { block: BlockIndex(0), offset: 4096, length: 1 }).unwrap();
        assert!(span.is_zero());
        assert!(matches!(memory.digests(), Err(RamError::Truncated { .. })));
        assert!(matches!(memory.check(), Err(RamError::Truncated { .. })));
    }
}
