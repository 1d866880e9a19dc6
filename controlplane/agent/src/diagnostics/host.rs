//! What this host says of itself in files.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Longest text that is read of one file; those of the kernel are shorter.
const TEXT_BYTES: u64 = 1 << 20;
/// Most entries of a directory that are looked at.
const ENTRIES: usize = 4096;

/// The files of a host.
#[derive(Clone, Debug)]
pub(super) struct Host {
    root: PathBuf,
}

impl Host {
    /// This one.
    pub(super) fn here() -> Self {
        Self { root: "/".into() }
    }

    /// A host whose files are below `root`.
    #[cfg(test)]
    pub(super) fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Where an absolute path of the host is.
    pub(super) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    pub(super) fn read(&self, path: impl AsRef<Path>) -> io::Result<String> {
        let mut bytes = Vec::new();
        File::open(self.path(path))?.take(TEXT_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// The trimmed text of a file, where it can be read.
    pub(super) fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        self.read(path).ok()
    }

    /// What a file holds, where it is that.
    pub(super) fn value<T: FromStr>(&self, path: impl AsRef<Path>) -> Option<T> {
        self.text(path)?.parse().ok()
    }

    /// Names in a directory, in order; none where it cannot be read.
    pub(super) fn names(&self, directory: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.path(directory)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).take(ENTRIES).collect();
        // As people count: cpu2 before cpu10.
        names.sort_by_key(|name| (name.len(), name.clone()));
        names
    }

    pub(super) fn has(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// The number, in bytes, of a line such as `VmPin: 12 kB`.
    pub(super) fn kib_field(&self, path: impl AsRef<Path>, field: &str) -> Option<u64> {
        let text = self.text(path)?;
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    }
}

/// A host made of files, for tests.
#[cfg(test)]
pub(super) mod fake {
    use super::*;

    pub(in crate::diagnostics) struct Fake {
        directory: tempfile::TempDir,
    }

    impl Fake {
        pub(in crate::diagnostics) fn new(files: &[(&str, &str)]) -> Self {
            let fake = Self { directory: tempfile::tempdir().unwrap() };
            files.iter().for_each(|(path, text)| fake.write(path, text));
            fake
        }

        pub(in crate::diagnostics) fn host(&self) -> Host {
            Host::at(self.directory.path())
        }

        pub(in crate::diagnostics) fn write(&self, path: &str, text: &str) {
            let path = self.host().path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::Fake;

    #[test]
    fn a_host_is_read_below_its_root_only() {
        let fake =
            Fake::new(&[("/proc/self/status", "VmPin:\t    2048 kB\nVmPing: 1 kB\n"), ("/a/cpu10", "")]);
        fake.write("/a/cpu2", " 7 \n");
        let host = fake.host();
        assert_eq!(host.kib_field("/proc/self/status", "VmPin"), Some(2 << 20));
        assert_eq!(host.kib_field("/proc/self/status", "VmHWM"), None);
        assert_eq!(host.names("/a"), ["cpu2", "cpu10"]);
        assert_eq!(host.value::<u32>("/a/cpu2"), Some(7));
        assert!(host.names("/proc/1").is_empty() && !host.has("/etc/passwd"));
    }
}
