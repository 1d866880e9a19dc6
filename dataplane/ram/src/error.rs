use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::BlockIndex;

/// Why guest RAM could not be reached, and what to do about it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RamError {
    /// A RAM file could not be opened.
    #[error("cannot open RAM file {}: check that the agent may open it", path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A descriptor is not of a regular file.
    #[error("the RAM file is not a regular file: give the guest a memory-backend-file with share=on")]
    NotRegular,
    /// A descriptor or a mapping is read-only and must be written through.
    #[error("the RAM file is open for reading only: the destination must open it for writing")]
    ReadOnly,
    /// A question about a RAM file failed.
    #[error("cannot {what} the RAM file")]
    File {
        /// What was tried.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A RAM file is shorter than what is to be mapped of it.
    #[error(
        "the RAM file has {file_bytes} bytes, {needed_bytes} are needed: it is not the file of this block"
    )]
    FileTooShort {
        /// Its length.
        file_bytes: u64,
        /// Length to be mapped.
        needed_bytes: u64,
    },
    /// A RAM file could not be mapped.
    #[error("cannot map {length_bytes} bytes of the RAM file")]
    Map {
        /// Length to be mapped.
        length_bytes: u64,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// More files are mapped than the SIGBUS handler has room for.
    #[error("{limit} RAM files are mapped already: let other migrations end first")]
    TooManyMappings {
        /// Mappings that there may be at once.
        limit: usize,
    },
    /// The SIGBUS handler could not be installed.
    #[error("cannot install the SIGBUS handler")]
    SignalHandler(#[source] io::Error),
    /// A range is not within what is mapped.
    #[error("{length} bytes at {offset:#x} are outside the {mapped_bytes} bytes mapped")]
    OutOfBounds {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// Length of the mapping.
        mapped_bytes: u64,
    },
    /// A range does not start and end on page boundaries.
    #[error("{length} bytes at {offset:#x} are not whole pages of {page_bytes} bytes")]
    Misaligned {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// Page size of the RAM file.
        page_bytes: u64,
    },
    /// The pages of a range could not be made present.
    #[error(
        "cannot populate {length} bytes at {offset:#x}: is the file system of the RAM file full, or out of huge pages?"
    )]
    Populate {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// A RAM file was truncated while it was mapped.
    #[error(
        "the RAM file was truncated to {file_bytes} bytes while in use; the page at {offset:#x} is gone: \
         end the guest, whose RAM is lost, and find out what truncates files in its directory"
    )]
    Truncated {
        /// The first page found missing, in bytes from the block's start.
        offset: u64,
        /// The file's length now.
        file_bytes: u64,
    },
    /// The kernel had no memory to back a page of a RAM file.
    #[error(
        "no memory for the RAM file's page at {offset:#x}: its file system is full, or out of huge pages"
    )]
    Unbacked {
        /// The first page found missing, in bytes from the block's start.
        offset: u64,
    },
    /// A page of a RAM file lies in memory that the hardware reported as bad.
    #[error("the RAM file's page at {offset:#x} is lost to a memory error of the hardware")]
    Poisoned {
        /// The page, in bytes from the block's start.
        offset: u64,
    },
    /// There is not one file for each block.
    #[error("the layout has {blocks} RAM blocks, but {files} RAM files were given")]
    FileCount {
        /// Blocks of the layout.
        blocks: usize,
        /// Files given.
        files: usize,
    },
    /// A block and its file differ in page size.
    #[error("RAM block {name:?} has pages of {block_bytes} bytes, its file pages of {file_bytes}")]
    PageSize {
        /// Name of the block.
        name: String,
        /// Page size in the layout.
        block_bytes: u64,
        /// Page size of the file.
        file_bytes: u64,
    },
    /// Two blocks are of one file.
    #[error("RAM blocks {first:?} and {second:?} are of one file: give each block a file of its own")]
    SameFile {
        /// Name of one.
        first: String,
        /// Name of the other.
        second: String,
    },
    /// The layout has no such block.
    #[error("the guest has no RAM {0}")]
    NoBlock(BlockIndex),
}
