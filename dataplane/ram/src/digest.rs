use std::fmt;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::file::BASE_PAGE_BYTES;
use crate::{BlockIndex, BlockRange, Memory, PageSets, RamError, Span, zero};

/// What one digest is computed from independently: the bytes that one thread
/// takes at a time. Part of the digest's definition.
const PIECE_BYTES: u64 = 64 << 20;

/// Pages hashed by one call, so that the hash function works on long input.
const BATCH_PAGES: usize = 32;

const PAGE: usize = BASE_PAGE_BYTES as usize;
const ENTRY: usize = size_of::<u64>() + PAGE;

/// What the bytes of one block come down to.
///
/// A block is cut into pieces of 64 MiB and into pages of 4 KiB, whatever its
/// own page size. The digest is BLAKE3 over the pieces' digests in order; a
/// piece's is BLAKE3 over, for each page that is not all zero in ascending
/// order, the page's number in the block (64 bits, little endian) and its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest with these bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

pub(crate) fn of_blocks(memory: &Memory) -> Result<Vec<Digest>, RamError> {
    let present = memory.presence()?;
    let blocks = memory.layout().blocks();
    let pieces: Vec<BlockRange> = (0..)
        .map(BlockIndex)
        .zip(blocks)
        .flat_map(|(block, it)| {
            let length_bytes = it.length_bytes;
            (0..length_bytes.div_ceil(PIECE_BYTES)).map(move |piece| {
                let offset = piece * PIECE_BYTES;
                BlockRange { block, offset, length: PIECE_BYTES.min(length_bytes - offset) }
            })
        })
        .collect();
    let digests = of_pieces(memory, &present, &pieces)?;
    let mut hashers = vec![blake3::Hasher::new(); blocks.len()];
    for (piece, digest) in pieces.iter().zip(&digests) {
        hashers[piece.block.get()].update(digest);
    }
    Ok(hashers.iter().map(|hasher| Digest(*hasher.finalize().as_bytes())).collect())
}

fn of_pieces(memory: &Memory, present: &PageSets, pieces: &[BlockRange]) -> Result<Vec<[u8; 32]>, RamError> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, [u8; 32])>, RamError> {
        let mut batch = Batch::new();
        let mut digests = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(index) else { return Ok(digests) };
            digests.push((index, of_piece(memory, present, *piece, &mut batch)?));
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(pieces.len());
    let mut digests = vec![[0; 32]; pieces.len()];
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            let done = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            for (index, digest) in done {
                digests[index] = digest;
            }
        }
        Ok(digests)
    })
}

fn of_piece(
    memory: &Memory,
    present: &PageSets,
    piece: BlockRange,
    batch: &mut Batch,
) -> Result<[u8; 32], RamError> {
    let page_bytes = present.page_bytes(piece.block);
    let set = present.block(piece.block);
    let end = piece.offset + piece.length;
    let mut from = piece.offset / page_bytes;
    while let Some(run) = set.next_run(from) {
        let run_start = (run.first * page_bytes).max(piece.offset);
        let run_end = (run.end() * page_bytes).min(end);
        for offset in (run_start..run_end).step_by(PAGE) {
            let page = memory.span(BlockRange { block: piece.block, offset, length: BASE_PAGE_BYTES })?;
            batch.add(offset / BASE_PAGE_BYTES, page);
        }
        if run.end() * page_bytes >= end {
            break;
        }
        from = run.end();
    }
    Ok(batch.finish())
}

/// Pages copied out of guest RAM, and the digest of those before them.
struct Batch {
    hasher: blake3::Hasher,
    entries: Box<[u8]>,
    used: usize,
}

impl Batch {
    fn new() -> Self {
        Self { hasher: blake3::Hasher::new(), entries: vec![0; BATCH_PAGES * ENTRY].into(), used: 0 }
    }

    fn add(&mut self, number: u64, page: Span<'_>) {
        let (head, bytes) = self.entries[self.used..][..ENTRY].split_at_mut(size_of::<u64>());
        head.copy_from_slice(&number.to_le_bytes());
        page.read_into(bytes);
        if zero::slice_is_zero(bytes) {
            return;
        }
        self.used += ENTRY;
        if self.used == self.entries.len() {
            self.hash();
        }
    }

    fn hash(&mut self) {
        self.hasher.update(&self.entries[..self.used]);
        self.used = 0;
    }

    fn finish(&mut self) -> [u8; 32] {
        self.hash();
        let digest = *self.hasher.finalize().as_bytes();
        self.hasher.reset();
        digest
    }
}
