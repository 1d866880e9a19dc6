//! The first page of the file: what it is, whose, and over which blocks.

use std::path::Path;

use super::OwedError;
use crate::Layout;
use crate::file::BASE_PAGE_BYTES;

pub(super) const HEADER_BYTES: u64 = BASE_PAGE_BYTES;

const MAGIC: [u8; 8] = *b"RFRYOWED";
const VERSION: u32 = 1;
const DIGEST_BYTES: usize = blake3::OUT_LEN;

// Offsets. Numbers are little endian.
const VERSION_AT: usize = 8;
const FILE_BYTES_AT: usize = 16;
const LAYOUT_AT: usize = 24;
const ID_BYTES_AT: usize = LAYOUT_AT + DIGEST_BYTES;
const ID_AT: usize = ID_BYTES_AT + 4;
/// BLAKE3 over what is before it.
const CHECKSUM_AT: usize = HEADER_BYTES as usize - DIGEST_BYTES;
const MAX_ID_BYTES: usize = 1024;
const _: () = assert!(ID_AT + MAX_ID_BYTES <= CHECKSUM_AT);

pub(super) fn encode(migration: &str, layout: &Layout, file_bytes: u64) -> Result<Vec<u8>, OwedError> {
    let id_bytes = migration.len();
    if id_bytes > MAX_ID_BYTES {
        return Err(OwedError::IdTooLong { id_bytes, max_bytes: MAX_ID_BYTES });
    }
    let mut header = vec![0; HEADER_BYTES as usize];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC);
    put(VERSION_AT, &VERSION.to_le_bytes());
    put(FILE_BYTES_AT, &file_bytes.to_le_bytes());
    put(LAYOUT_AT, digest_of(layout).as_bytes());
    put(ID_BYTES_AT, &(id_bytes as u32).to_le_bytes());
    put(ID_AT, migration.as_bytes());
    let checksum = blake3::hash(&header[..CHECKSUM_AT]);
    header[CHECKSUM_AT..].copy_from_slice(checksum.as_bytes());
    Ok(header)
}

/// Whether `header`, as far as the file has one, is what [`encode`] would make.
pub(super) fn check(
    path: &Path,
    header: &[u8],
    migration: &str,
    layout: &Layout,
    file_bytes: u64,
) -> Result<(), OwedError> {
    let path = || path.to_owned();
    let damaged = |why| OwedError::Damaged { path: path(), why };
    if !header.starts_with(&MAGIC) {
        return Err(OwedError::NotOwed { path: path() });
    }
    if header.len() != HEADER_BYTES as usize {
        return Err(damaged("it is shorter than its header"));
    }
    let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    // Before the checksum, whose place another version may have changed.
    if number(VERSION_AT) != VERSION {
        return Err(OwedError::Version { path: path(), version: number(VERSION_AT) });
    }
    if header[CHECKSUM_AT..] != *blake3::hash(&header[..CHECKSUM_AT]).as_bytes() {
        return Err(damaged("its header does not match its checksum"));
    }
    let id_bytes = number(ID_BYTES_AT) as usize;
    let found = header[ID_AT..].get(..id_bytes.min(MAX_ID_BYTES)).unwrap_or_default();
    if found != migration.as_bytes() {
        let found = String::from_utf8_lossy(found).into_owned();
        return Err(OwedError::OtherMigration { path: path(), found });
    }
    if header[LAYOUT_AT..ID_BYTES_AT] != *digest_of(layout).as_bytes() {
        return Err(OwedError::OtherLayout { path: path() });
    }
    if header[FILE_BYTES_AT..LAYOUT_AT] != file_bytes.to_le_bytes() {
        return Err(damaged("its header tells of another length"));
    }
    Ok(())
}

/// What the blocks of `layout` come down to: two that differ in anything have different ones.
fn digest_of(layout: &Layout) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for block in layout.blocks() {
        hasher.update(&(block.name.len() as u64).to_le_bytes());
        hasher.update(block.name.as_bytes());
        for number in [block.guest_address, block.length_bytes, block.page_bytes] {
            hasher.update(&number.to_le_bytes());
        }
    }
    hasher.finalize()
}
