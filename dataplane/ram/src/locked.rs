//! Files that one process at a time may go by.

use std::fs::File;
use std::io;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// A file that is locked (`flock`) as long as this lives.
#[derive(Debug)]
pub struct LockedFile(File);

impl LockedFile {
    /// Locks a file; `None` where it is locked elsewhere, in this process or another.
    ///
    /// # Errors
    /// When it cannot be locked.
    pub fn new(file: File) -> io::Result<Option<Self>> {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        // Closing is not enough: a child of this process that has not yet begun its own program shares the lock. When it
        // fails, closing has to do.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_ends_with_it_though_the_descriptor_has_a_copy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let open = || File::options().create(true).truncate(false).write(true).open(&path).unwrap();
        let locked = LockedFile::new(open()).unwrap().unwrap();
        // As a fork has one.
        let _copy = locked.file().try_clone().unwrap();
        assert!(LockedFile::new(open()).unwrap().is_none());
        drop(locked);
        assert!(LockedFile::new(open()).unwrap().is_some());
    }
}
