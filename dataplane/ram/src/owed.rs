//! The pages that a destination is still owed by the source of its guest.
//!
//! One bit a page, in a file that is mapped shared: what is written there is the
//! kernel's at once, so that it outlives an agent that is killed at any instant.
//!
//! ```text
//! file: header, 4096 bytes | the bits of block 0 | of block 1 | ... | zeros, up to whole pages
//! ```
//!
//! A page's bit is cleared once its bytes are in the RAM file, and before the
//! guest is let at it. So a page whose bit is set was never seen by the guest and
//! may be read again; one whose bit is clear may have been written by it since, and
//! must not be.
#![allow(unsafe_code, reason = "reaches the bits as atomics in mapped memory")]

mod error;
mod header;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, OFlags, RenameFlags};
use rustix::io::Errno;

pub use error::OwedError;

use crate::file::BASE_PAGE_BYTES;
use crate::{Access, BlockIndex, Layout, LockedFile, Mapping, PageRun, PageSets, RamFile};
use header::HEADER_BYTES;

const WORD_BITS: u64 = u64::BITS as u64;
const WORD_BYTES: u64 = size_of::<u64>() as u64;

/// Which pages are still owed; see the module's documentation.
///
/// The file is locked for as long as this lives: no two agents go by one. It belongs on a tmpfs, as `/run` is: on a disk,
/// clearing a bit may wait for the disk, and a host that loses a tmpfs has lost the guest's RAM too.
#[derive(Debug)]
pub struct Owed {
    path: PathBuf,
    mapping: Mapping,
    _file: LockedFile,
    layout: Layout,
    blocks: Vec<Bits>,
}

/// The bits of one block.
#[derive(Debug)]
struct Bits {
    /// Where they begin in the file.
    offset: u64,
    pages: u64,
    page_bytes: u64,
    /// How many of them are set.
    owed_pages: AtomicU64,
}

impl Bits {
    fn words(&self) -> u64 {
        self.pages.div_ceil(WORD_BITS)
    }
}

impl Owed {
    /// Writes `pages`, sets over `layout`, to a new file at `path` that only its owner may read; it has its name once it
    /// is complete. `migration` tells whose it is.
    ///
    /// # Errors
    /// When there is such a file already, or it cannot be made.
    ///
    /// # Panics
    /// When `pages` is not over `layout`.
    pub fn create(
        path: &Path,
        migration: &str,
        layout: &Layout,
        pages: &PageSets,
    ) -> Result<Self, OwedError> {
        let (blocks, file_bytes) = place(layout);
        let mut bytes = header::encode(migration, layout, file_bytes)?;
        let mut words = vec![0_u64; ((file_bytes - HEADER_BYTES) / WORD_BYTES) as usize];
        assert_eq!(pages.iter().count(), blocks.len(), "sets over the layout");
        for ((_, set), bits) in pages.iter().zip(&blocks) {
            assert_eq!(set.pages(), bits.pages, "sets over the layout");
            let first = ((bits.offset - HEADER_BYTES) / WORD_BYTES) as usize;
            for run in set.runs() {
                for (word, mask) in masks(run) {
                    words[first + word as usize] |= mask;
                }
            }
        }
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        let file = write_new(path, &bytes)?;
        Self::of(path, file, layout, blocks, file_bytes)
    }

    /// Opens what [`create`](Self::create) made, of the same migration and layout.
    ///
    /// # Errors
    /// When it is not there, is open elsewhere, or is not what `create` made.
    pub fn open(path: &Path, migration: &str, layout: &Layout) -> Result<Self, OwedError> {
        let failed = |operation| move |source| OwedError::Io { path: path.to_owned(), operation, source };
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
            .map_err(failed("open"))?;
        let file = lock(path, file)?;
        let metadata = file.file().metadata().map_err(failed("look at"))?;
        if !metadata.is_file() {
            return Err(OwedError::NotOwed { path: path.to_owned() });
        }
        let mut bytes = vec![0; HEADER_BYTES as usize];
        let read = read_up_to(file.file(), &mut bytes).map_err(failed("read"))?;
        let (blocks, file_bytes) = place(layout);
        header::check(path, &bytes[..read], migration, layout, file_bytes)?;
        if metadata.len() != file_bytes {
            return Err(OwedError::Damaged { path: path.to_owned(), why: "its length is not what it was" });
        }
        Self::of(path, file, layout, blocks, file_bytes)
    }

    /// Whether `page` of `block` is owed.
    ///
    /// # Errors
    /// When the file lost a page under us: nothing may be let in any more.
    ///
    /// # Panics
    /// When the layout has no such page.
    pub fn is_owed(&self, block: BlockIndex, page: u64) -> Result<bool, OwedError> {
        let bits = &self.blocks[block.get()];
        assert!(page < bits.pages, "page {page} of {}", bits.pages);
        let word = self.word(bits, page / WORD_BITS).load(Ordering::Acquire);
        self.check()?;
        Ok(word & (1 << (page % WORD_BITS)) != 0)
    }

    /// The first run of owed pages of `block` at or after `from`, cut at `max_count` pages.
    ///
    /// # Errors
    /// As [`is_owed`](Self::is_owed).
    ///
    /// # Panics
    /// When the layout has no such block, or `max_count` is 0.
    pub fn next_run(
        &self,
        block: BlockIndex,
        from: u64,
        max_count: u64,
    ) -> Result<Option<PageRun>, OwedError> {
        assert!(max_count > 0, "a run has at least one page");
        let bits = &self.blocks[block.get()];
        let run = self.next_page(bits, from, true, bits.pages).map(|first| {
            let limit = first.saturating_add(max_count).min(bits.pages);
            let end = self.next_page(bits, first, false, limit).unwrap_or(limit);
            PageRun { first, count: end - first }
        });
        self.check()?;
        Ok(run)
    }

    /// The bytes of `run` are in the RAM file: its pages are owed no more. How many were until this call; of calls that
    /// race for a page, one counts it.
    ///
    /// # Errors
    /// As [`is_owed`](Self::is_owed).
    ///
    /// # Panics
    /// When the layout has no such pages.
    pub fn clear(&self, block: BlockIndex, run: PageRun) -> Result<u64, OwedError> {
        let bits = &self.blocks[block.get()];
        let end = run.first.checked_add(run.count);
        assert!(end.is_some_and(|end| end <= bits.pages), "{run:?} of {} pages", bits.pages);
        let mut cleared = 0;
        for (word, mask) in masks(run) {
            let before = self.word(bits, word).fetch_and(!mask, Ordering::AcqRel);
            cleared += u64::from((before & mask).count_ones());
        }
        // A word that became zeros under us was not cleared by this call: what was counted is of no use then.
        self.check()?;
        bits.owed_pages.fetch_sub(cleared, Ordering::AcqRel);
        Ok(cleared)
    }

    /// Pages that are owed.
    pub fn pages(&self) -> u64 {
        self.blocks.iter().map(|bits| bits.owed_pages.load(Ordering::Acquire)).sum()
    }

    /// Bytes that are owed.
    pub fn bytes(&self) -> u64 {
        let bytes = |bits: &Bits| bits.owed_pages.load(Ordering::Acquire) * bits.page_bytes;
        self.blocks.iter().map(bytes).sum()
    }

    /// Whether nothing is owed.
    pub fn is_empty(&self) -> bool {
        self.pages() == 0
    }

    /// What is owed, as sets.
    ///
    /// # Errors
    /// As [`is_owed`](Self::is_owed).
    pub fn to_page_sets(&self) -> Result<PageSets, OwedError> {
        let mut sets = PageSets::new(&self.layout);
        for (block, bits) in (0..).map(BlockIndex).zip(&self.blocks) {
            let mut from = 0;
            while let Some(run) = self.next_run(block, from, bits.pages)? {
                sets.block_mut(block).insert_run(run);
                from = run.end();
            }
        }
        Ok(sets)
    }

    /// The layout it is over.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Deletes the file.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn remove(self) -> Result<(), OwedError> {
        fs::remove_file(&self.path).map_err(|source| OwedError::Io {
            path: self.path.clone(),
            operation: "remove",
            source,
        })
    }

    fn of(
        path: &Path,
        file: LockedFile,
        layout: &Layout,
        blocks: Vec<Bits>,
        file_bytes: u64,
    ) -> Result<Self, OwedError> {
        let lost = |source| OwedError::Lost { path: path.to_owned(), source };
        let copy = file.file().try_clone().map_err(|source| OwedError::Io {
            path: path.to_owned(),
            operation: "open",
            source,
        })?;
        let ram_file = RamFile::from_fd(OwnedFd::from(copy), Access::ReadWrite).map_err(lost)?;
        let mapping = Mapping::new(&ram_file, file_bytes, Access::ReadWrite).map_err(lost)?;
        let owed = Self { path: path.to_owned(), mapping, _file: file, layout: layout.clone(), blocks };
        owed.count()?;
        Ok(owed)
    }

    /// Counts what is owed, and makes sure that no bit is set which is no page's.
    fn count(&self) -> Result<(), OwedError> {
        let mut at = HEADER_BYTES;
        for bits in &self.blocks {
            let mut owed_pages = 0;
            for word in 0..bits.words() {
                let value = self.word(bits, word).load(Ordering::Acquire);
                let used = (bits.pages - word * WORD_BITS).min(WORD_BITS);
                if value & !(u64::MAX >> (WORD_BITS - used)) != 0 {
                    return Err(self.stray_bit());
                }
                owed_pages += u64::from(value.count_ones());
            }
            bits.owed_pages.store(owed_pages, Ordering::Release);
            at = bits.offset + bits.words() * WORD_BYTES;
        }
        let rest = self.mapping.span(at, self.mapping.length_bytes() - at);
        let is_zero = rest.map(|rest| rest.is_zero());
        self.check()?;
        if is_zero.is_ok_and(|is_zero| is_zero) { Ok(()) } else { Err(self.stray_bit()) }
    }

    fn stray_bit(&self) -> OwedError {
        OwedError::Damaged { path: self.path.clone(), why: "a bit is set that is no page's" }
    }

    /// To be called after each look at the bits, and before what was seen is gone by: a page that the file lost
    /// reads as zeros, as if nothing were owed.
    fn check(&self) -> Result<(), OwedError> {
        self.mapping.check().map_err(|source| OwedError::Lost { path: self.path.clone(), source })
    }

    fn word(&self, bits: &Bits, word: u64) -> &AtomicU64 {
        assert!(word < bits.words(), "word {word} of {}", bits.words());
        let span = self.mapping.span(bits.offset + word * WORD_BYTES, WORD_BYTES);
        let place = span.and_then(|span| span.as_mut_ptr()).expect("the bits lie in the writable mapping");
        // SAFETY: eight bytes within the mapping (`span` checked), which lives as long as `self`
        // and is writable; aligned, as the mapping begins at a page and `offset` is a multiple of
        // eight (`place`). This process reaches them through atomics only, but for `count`, which
        // looks at what follows them.
        unsafe { AtomicU64::from_ptr(place.cast()) }
    }

    /// The first page from `from` on, before `limit`, that is owed or is not.
    fn next_page(&self, bits: &Bits, from: u64, owed: bool, limit: u64) -> Option<u64> {
        let mut page = from;
        while page < limit {
            let word = self.word(bits, page / WORD_BITS).load(Ordering::Acquire);
            let candidates = if owed { word } else { !word } & (u64::MAX << (page % WORD_BITS));
            let start = page / WORD_BITS * WORD_BITS;
            if candidates != 0 {
                let found = start + u64::from(candidates.trailing_zeros());
                return (found < limit).then_some(found);
            }
            page = start + WORD_BITS;
        }
        None
    }
}

/// Where the bits of each block are, and the file's length.
fn place(layout: &Layout) -> (Vec<Bits>, u64) {
    let mut offset = HEADER_BYTES;
    let mut blocks = Vec::new();
    for block in layout.blocks() {
        let (pages, page_bytes) = (block.pages(), block.page_bytes);
        let bits = Bits { offset, pages, page_bytes, owed_pages: AtomicU64::new(0) };
        offset += bits.words() * WORD_BYTES;
        blocks.push(bits);
    }
    (blocks, offset.next_multiple_of(BASE_PAGE_BYTES))
}

/// The words that hold the bits of `run`, each with a mask of them.
fn masks(run: PageRun) -> impl Iterator<Item = (u64, u64)> {
    let end = run.end();
    (run.first / WORD_BITS..end.div_ceil(WORD_BITS)).map(move |word| {
        let start = word * WORD_BITS;
        let first = run.first.max(start) - start;
        let count = end.min(start + WORD_BITS) - start - first;
        (word, (u64::MAX >> (WORD_BITS - count)) << first)
    })
}

/// Makes a file of `bytes` that has its name only once it is complete, and locks it before.
fn write_new(path: &Path, bytes: &[u8]) -> Result<LockedFile, OwedError> {
    let failed = |operation| move |source| OwedError::Io { path: path.to_owned(), operation, source };
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".new");
    let unfinished = PathBuf::from(unfinished);
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("replace")(error)),
        _ => {}
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)
        .map_err(failed("create"))?;
    let named = lock(path, file).and_then(|file| {
        file.file().write_all(bytes).map_err(failed("write"))?;
        rustix::fs::renameat_with(CWD, &unfinished, CWD, path, RenameFlags::NOREPLACE).map_err(|errno| {
            match errno {
                Errno::EXIST => OwedError::Exists { path: path.to_owned() },
                errno => failed("name")(errno.into()),
            }
        })?;
        Ok(file)
    });
    if named.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    named
}

fn lock(path: &Path, file: File) -> Result<LockedFile, OwedError> {
    match LockedFile::new(file) {
        Ok(Some(file)) => Ok(file),
        Ok(None) => Err(OwedError::Locked { path: path.to_owned() }),
        Err(source) => Err(OwedError::Io { path: path.to_owned(), operation: "lock", source }),
    }
}

/// Fills `bytes` as far as the file goes; how far that is.
fn read_up_to(mut file: &File, bytes: &mut [u8]) -> io::Result<usize> {
    let mut read = 0;
    while read < bytes.len() {
        match file.read(&mut bytes[read..])? {
            0 => break,
            more => read += more,
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests;
