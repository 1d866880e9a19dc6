//! Which paths of guests a request may name.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// The directories that hold guests' QMP sockets. Empty: any path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestDirs(Vec<PathBuf>);

impl GuestDirs {
    /// Allows paths below `dirs`; any path when there are none.
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self(dirs)
    }

    /// Whether any path is allowed.
    pub fn is_any(&self) -> bool {
        self.0.is_empty()
    }

    /// The real path of `path`, with symbolic links resolved, when it is below
    /// one of the directories.
    pub fn resolve(&self, path: &Path) -> Result<PathBuf, GuestPathError> {
        if !path.is_absolute() {
            return Err(GuestPathError::Relative { path: path.to_owned() });
        }
        // Where the path leads is told only for allowed places: the answer for
        // any other is the same whether or not something is there.
        let outside = || GuestPathError::Outside { path: path.to_owned() };
        let real = match std::fs::canonicalize(path) {
            Ok(real) => real,
            Err(source) if self.is_any() || self.lexically_below(path) => {
                return Err(GuestPathError::Unreachable { path: path.to_owned(), source });
            }
            Err(_) => return Err(outside()),
        };
        let below = |dir: &PathBuf| std::fs::canonicalize(dir).is_ok_and(|dir| real.starts_with(dir));
        if self.is_any() || self.0.iter().any(below) { Ok(real) } else { Err(outside()) }
    }

    fn lexically_below(&self, path: &Path) -> bool {
        let climbs = path.components().any(|part| part == std::path::Component::ParentDir);
        !climbs && self.0.iter().any(|dir| path.starts_with(dir))
    }
}

/// Why a path of a guest is refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestPathError {
    /// Relative to nothing the caller knows.
    #[error("path {} of a guest is relative; give an absolute path", path.display())]
    Relative {
        /// As given.
        path: PathBuf,
    },
    /// In no directory of `guest_dirs`.
    #[error("path {} is in none of the agent's guest_dirs; move the socket, or add its directory", path.display())]
    Outside {
        /// As given.
        path: PathBuf,
    },
    /// Not there, or not to be reached by the agent.
    #[error("path {} cannot be reached; check that the guest runs and that the agent may use it", path.display())]
    Unreachable {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl GuestPathError {
    /// The reason, as in ErrorInfo.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Relative { .. } => "GUEST_PATH_RELATIVE",
            Self::Outside { .. } => "GUEST_PATH_NOT_ALLOWED",
            Self::Unreachable { .. } => "GUEST_UNREACHABLE",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symlink_out_of_the_directory_is_refused_like_a_path_outside() {
        let dir = tempfile::tempdir().unwrap();
        let allowed = dir.path().join("guests");
        let secret = dir.path().join("secret.sock");
        std::fs::create_dir(&allowed).unwrap();
        std::fs::write(&secret, "").unwrap();
        std::fs::write(allowed.join("vm.sock"), "").unwrap();
        std::os::unix::fs::symlink(&secret, allowed.join("link.sock")).unwrap();
        let dirs = GuestDirs::new(vec![allowed.clone()]);

        assert!(dirs.resolve(&allowed.join("vm.sock")).is_ok());
        for refused in [secret, allowed.join("link.sock"), allowed.join("../secret.sock"), "/nowhere".into()]
        {
            let error = dirs.resolve(&refused).unwrap_err();
            assert_eq!(error.reason(), "GUEST_PATH_NOT_ALLOWED", "{}", refused.display());
        }
    }

    #[test]
    fn missing_socket_in_the_directory_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = GuestDirs::new(vec![dir.path().to_owned()]);
        assert_eq!(dirs.resolve(&dir.path().join("gone")).unwrap_err().reason(), "GUEST_UNREACHABLE");
        assert_eq!(dirs.resolve(Path::new("vm.sock")).unwrap_err().reason(), "GUEST_PATH_RELATIVE");
    }

    #[test]
    fn no_directories_allow_any_absolute_path() {
        assert!(GuestDirs::default().resolve(Path::new("/proc/self/stat")).is_ok());
    }
}
