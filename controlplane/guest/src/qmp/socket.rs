use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where a VMM listens for QMP.
#[derive(Clone, Debug)]
pub struct QmpSocket {
    path: PathBuf,
    pinned: Option<Arc<OwnedFd>>,
}

impl QmpSocket {
    /// The socket that `descriptor` is open on (`O_PATH`), whatever its name,
    /// `path`, leads to by the time of a connection.
    pub fn pinned(path: PathBuf, descriptor: OwnedFd) -> Self {
        Self { path, pinned: Some(Arc::new(descriptor)) }
    }

    /// Its name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What to connect to.
    pub(super) fn address(&self) -> PathBuf {
        match &self.pinned {
            Some(descriptor) => format!("/proc/self/fd/{}", descriptor.as_raw_fd()).into(),
            None => self.path.clone(),
        }
    }
}

impl From<&Path> for QmpSocket {
    fn from(path: &Path) -> Self {
        Self { path: path.to_owned(), pinned: None }
    }
}

impl From<&PathBuf> for QmpSocket {
    fn from(path: &PathBuf) -> Self {
        path.as_path().into()
    }
}
