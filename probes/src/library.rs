//! Which libibverbs is probed: the host's own.
//!
//! A probe belongs to a file (its inode), not to a name. Containers bring files of their own, which have to be
//! named.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::Absence;
use crate::probe::Probe;
use crate::symbols::Library;

const NAME: &str = "libibverbs.so.1";

/// Where distributions put it: Debian's, Fedora's, and what was built by hand.
const DIRECTORIES: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
];

/// No library is larger.
const LARGEST_BYTES: u64 = 64 << 20;

/// The host's own: what this process has mapped, and what is where the dynamic linker looks; each file once.
pub fn standard_libraries() -> Vec<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let standard = DIRECTORIES.iter().map(|directory| Path::new(directory).join(NAME));
    let files: BTreeSet<PathBuf> =
        mapped(&maps).into_iter().chain(standard).filter_map(|path| fs::canonicalize(path).ok()).collect();
    files.into_iter().collect()
}

/// Paths of libibverbs in the mappings of a process.
fn mapped(maps: &str) -> Vec<PathBuf> {
    let paths = maps.lines().filter_map(|line| line.find('/').map(|start| &line[start..]));
    paths
        .filter(|path| path.rsplit('/').next().is_some_and(|name| name.starts_with("libibverbs.so.")))
        .map(PathBuf::from)
        .collect()
}

/// A library and what of it is to be probed.
pub(crate) struct Target {
    pub(crate) path: PathBuf,
    offsets: Vec<(Probe, Result<u64, Absence>)>,
}

impl Target {
    /// Looks up the functions of `probes` in the library at `path`.
    pub(crate) fn open(path: &Path, probes: impl Iterator<Item = Probe>) -> Self {
        let read = read(path);
        let library = read
            .as_ref()
            .map_err(Clone::clone)
            .and_then(|data| Library::parse(data).map_err(|error| unreadable(path, &error.to_string())));
        let offset = |probe: Probe| {
            let found = library.as_ref().map_err(Clone::clone)?.offset_of(probe.as_str());
            found.map_err(|error| unreadable(path, &error.to_string()))?.ok_or_else(|| {
                Absence::SymbolMissing { symbol: probe.as_str(), place: path.display().to_string() }
            })
        };
        Self { path: path.to_owned(), offsets: probes.map(|probe| (probe, offset(probe))).collect() }
    }

    /// Where in the file the probe's function begins.
    pub(crate) fn offset(&self, probe: Probe) -> Result<u64, Absence> {
        let found = self.offsets.iter().find(|(other, _)| *other == probe);
        found.map_or(Err(Absence::Pending), |(_, offset)| offset.clone())
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Absence> {
    let bytes = fs::metadata(path).map_err(|error| unreadable(path, &error.to_string()))?.len();
    if bytes > LARGEST_BYTES {
        return Err(unreadable(path, "it is too large"));
    }
    fs::read(path).map_err(|error| unreadable(path, &error.to_string()))
}

fn unreadable(path: &Path, reason: &str) -> Absence {
    Absence::LibraryUnreadable { library: path.display().to_string(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_library_is_found_by_its_name() {
        let maps = "7f00-7f01 r-xp 00001000 fe:00 12  /opt/ofed/lib/libibverbs.so.1.14.44.0\n\
                    7f01-7f02 r-xp 00000000 fe:00 13  /usr/lib/libibverbs-extra.so.1\n\
                    7f02-7f03 rw-p 00000000 00:00 0 \n";
        assert_eq!(mapped(maps), [PathBuf::from("/opt/ofed/lib/libibverbs.so.1.14.44.0")]);
    }

    #[test]
    fn library_that_is_not_there_says_so_for_each_probe() {
        let target = Target::open(Path::new("/nonexistent/libibverbs.so.1"), Probe::ALL.into_iter());
        for probe in Probe::ALL {
            let absence = target.offset(probe).unwrap_err();
            assert_eq!(absence.code(), "library_unreadable");
            assert!(absence.to_string().contains("/nonexistent"), "{absence}");
        }
    }
}
