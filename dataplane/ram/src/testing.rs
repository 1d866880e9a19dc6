use crate::{Access, PageSet, RamFile};

/// A file of `pages` pages on tmpfs that has no other name.
pub(crate) fn memory_file(pages: u64) -> RamFile {
    let fd = rustix::fs::memfd_create("ramferry-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, pages * 4096).unwrap();
    RamFile::from_fd(fd, Access::ReadWrite).unwrap()
}

/// First page and length of each run.
pub(crate) fn runs(set: &PageSet) -> Vec<(u64, u64)> {
    set.runs().map(|run| (run.first, run.count)).collect()
}
