use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use ramferry_ram::{
    Access, BlockIndex, BlockRange, FAULT_AROUND_BYTES, FileIdentity, Layout, Mapping, RamFile,
};

use crate::LinkError;

/// What is mapped by one touch.
const GRANULE_BYTES: u64 = FAULT_AROUND_BYTES;

/// A file that a peer granted, for one block.
pub(super) struct GrantedFile {
    pub(super) descriptor: OwnedFd,
    pub(super) access: Access,
}

/// The RAM of a session's peer, mapped once for all links of the session: the
/// page tables of a large guest are large.
#[derive(Debug)]
pub(crate) struct PeerMemory {
    blocks: Vec<PeerBlock>,
}

#[derive(Debug)]
struct PeerBlock {
    mapping: Mapping,
    identity: FileIdentity,
    /// A bit a granule: whether its pages were mapped.
    populated: Vec<AtomicU64>,
}

impl PeerMemory {
    /// Maps what was granted, or takes `earlier` when that is the same.
    pub(super) fn map(
        layout: &Layout,
        granted: Vec<GrantedFile>,
        earlier: Option<Arc<Self>>,
    ) -> Result<Arc<Self>, LinkError> {
        let cannot = |error| LinkError::Fabric(format!("cannot map the peer's RAM: {error}"));
        let mut files = Vec::with_capacity(granted.len());
        for GrantedFile { descriptor, access } in granted {
            files.push(RamFile::to_map(descriptor, access).map_err(cannot)?);
        }
        if let Some(earlier) = earlier.filter(|earlier| earlier.is_of(&files)) {
            return Ok(earlier);
        }
        let mut blocks = Vec::with_capacity(files.len());
        for (file, block) in files.iter().zip(layout.blocks()) {
            let mapping = Mapping::new(file, block.length_bytes, file.access()).map_err(cannot)?;
            let words = block.length_bytes.div_ceil(GRANULE_BYTES * 64);
            let populated = (0..words).map(|_| AtomicU64::new(0)).collect();
            blocks.push(PeerBlock { mapping, identity: file.identity(), populated });
        }
        Ok(Arc::new(Self { blocks }))
    }

    fn is_of(&self, files: &[RamFile]) -> bool {
        self.blocks.len() == files.len()
            && self.blocks.iter().zip(files).all(|(block, file)| {
                block.identity == file.identity() && block.mapping.access() == file.access()
            })
    }

    pub(super) fn mapping(&self, block: BlockIndex) -> Option<&Mapping> {
        self.blocks.get(block.get()).map(|block| &block.mapping)
    }

    /// Maps the pages of `range` that were not mapped before: stores would fault
    /// them in one by one, and `MADV_POPULATE_READ` costs twice as much. `region`
    /// encloses `range`; pages outside it are the peer's to allocate, or not.
    pub(super) fn populate(&self, range: BlockRange, region: BlockRange) {
        let Some(block) = self.blocks.get(range.block.get()) else { return };
        let Some(end) = range.checked_end() else { return };
        for granule in range.offset / GRANULE_BYTES..end.div_ceil(GRANULE_BYTES) {
            if block.take(granule) {
                let first = (granule * GRANULE_BYTES).max(region.offset);
                if let Ok(span) = block.mapping.span(first, 1) {
                    span.touch();
                }
            }
        }
    }
}

impl PeerBlock {
    /// Whether `granule` is to be populated by the caller: by one caller only.
    fn take(&self, granule: u64) -> bool {
        let Some(word) = self.populated.get((granule / 64) as usize) else { return false };
        let bit = 1 << (granule % 64);
        word.load(Relaxed) & bit == 0 && word.fetch_or(bit, Relaxed) & bit == 0
    }
}
