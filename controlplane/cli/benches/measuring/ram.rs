//! A guest's RAM as the limits take it.

use std::path::Path;

use anyhow::Result;
use ramferry_ram::{Access, Block, Layout, Memory, RamFile};
use tempfile::NamedTempFile;

/// The memory in one RAM file.
pub(crate) fn memory(path: &Path, bytes: u64, access: Access) -> Result<Memory> {
    let file = RamFile::open(path, access)?;
    let block =
        Block { name: "ram".into(), guest_address: 0, length_bytes: bytes, page_bytes: file.page_bytes() };
    Ok(Memory::new(Layout::new(vec![block])?, vec![file], access)?)
}

/// A RAM file that nothing has touched.
pub(crate) fn fresh_file(bytes: u64) -> Result<NamedTempFile> {
    let file = tempfile::Builder::new().prefix("ramferry-bench").tempfile_in("/dev/shm")?;
    file.as_file().set_len(bytes)?;
    Ok(file)
}
