//! A guest's RAM as the rest of the project sees it: blocks, sets of pages,
//! mappings of the guest's RAM files, what of them was ever touched, and which
//! of their pages are zero; and what of it a destination is still owed.
//!
//! Guest writes race every read made here. Guest RAM is reached through raw
//! pointers only; no reference to it is ever made.

mod block;
mod digest;
mod error;
mod file;
mod huge;
mod locked;
mod mapping;
mod memory;
mod owed;
mod page_hash;
mod pages;
mod sigbus;
#[cfg(test)]
mod testing;
pub mod zero;

pub use block::{Block, BlockIndex, BlockRange, Layout, LayoutError, LayoutMismatch};
pub use digest::Digest;
pub use error::RamError;
pub use file::{Access, FileIdentity, RamFile};
pub use locked::LockedFile;
pub use mapping::{FAULT_AROUND_BYTES, Mapping, Span};
pub use memory::Memory;
pub use owed::{Owed, OwedError};
pub use page_hash::{HashedPage, PageHash, PageHasher};
pub use pages::{PageRun, PageSet, PageSets};
